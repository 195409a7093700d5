"""The parallel model: an nn.Module with the original names, whose steps run lowered programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from ..config import ParallelConfig
from ..errors import BatchError, ConfigError
from ..mesh import check_batch, check_whole
from ..ops.load import Tally
from ..ops.random import RandomState
from ..passes.randomness import KEY
from ..passes.tally import TALLY
from ..plan import Comm, Plan
from ..schedule import Event, Order, schedule_table
from ..sharding.types import Shard
from .blocks import inlined, print_code
from .build import build, copy_values
from .describe import explain
from .engine import Engine
from .failures import Together
from .gradients import OnMesh
from .load import expert_load
from .memory import MemoryReport, memory
from .names import together as one_module
from .parameters import convert_state_dicts
from .pipeline import Pipelined
from .program import Program, Programs, Signature, flatten, restore
from .states import EXTRA_STATE, check_state
from .weights import tensor_groups


class ParallelModel(nn.Module):
    """What `parallelize` returns.

    Parameters are DTensors under the original names with global shapes; plain torch optimizers work on them. Every data rank passes its own
    local batch, ranks that share a data coordinate pass the same one. Tensors as long along dim 0 as the first, in the
    order of the forward's parameters, hold a row per sample; longer ones hold several, where the model runs with nothing else (the patches
    of all images). Others are the same for all samples, and on all ranks.

        loss = pm.train_step(**batch)        forward and backward, gradients summed over the mesh; the loss of the global batch
        loss = pm.eval_step(**batch)         the same loss without gradients
        out  = pm(**batch)                   the model's own output; tensors that are cut are DTensors; out.loss.backward() works
    """

    # Written past nn.Module's own bookkeeping, which would take them for submodules.
    _engine: Engine
    _programs: dict[tuple[Signature, int], Program]
    _checked: set[tuple[Signature, int]]
    _together: Together
    _tallies: list[Tally]

    def __init__(
        self, engine: Engine, mesh: DeviceMesh, config: ParallelConfig, programs: Programs, first: Program, together: Together
    ) -> None:
        super().__init__()
        self.__dict__.update(_engine=engine, _programs={}, _checked=set(), _together=together, _tallies=[])
        self._take_names()
        self.mesh, self.config = mesh, config
        self.random = RandomState(config.seed)
        self._makes = programs
        self._programs[first.signature, config.microbatches] = first
        self._first = first
        self.training = first.signature.training
        known = frozenset(n for n in programs.skeleton.state_dict() if n.rpartition(".")[2] != EXTRA_STATE)
        convert_state_dicts(self, known, [group for group, _ in tensor_groups(programs.skeleton) if len(group) > 1])

    def _take_names(self) -> None:
        """The trees' own tables, not copies: what FSDP2 swaps there is what this module shows."""
        names = one_module(list(self._engine.trees.values()))
        self.__dict__.update(_modules=names._modules, _parameters=names._parameters, _buffers=names._buffers)
        self.__dict__["_non_persistent_buffers_set"] = names._non_persistent_buffers_set

    @property
    def original_module(self) -> nn.Module:
        """The module this was made from, its parameters without memory: for what else it has, such as a configuration."""
        return self._makes.skeleton

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of this rank's stages; a rank may have none (then optimizers take `[{"params": pm.parameters()}]`)."""
        return OnMesh(super().parameters(recurse), self.mesh)

    @torch.no_grad()
    def spread_buffers(self) -> None:
        """Give every stage of this rank that has a copy of a buffer the values it has under this module's names, as after loading."""
        own = dict(self.named_buffers())
        for tree in self._engine.trees.values():
            for name, buffer in tree.named_buffers():
                if buffer is not own[name]:
                    buffer.copy_(own[name])

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModel:
        """Another parallel model that runs the same programs, with copies of parameters, gradients and buffers: for averages of weights.

        Hooks on this module are not copied. Collective.
        """
        engine = build(self._makes.skeleton, self.mesh, self.config, self._first, self._makes.schedule, filled=False)
        new = type(self)(engine, self.mesh, self.config, self._makes, self._first, self._together)
        memo |= {id(self): new, **copy_values(self._engine, engine)}
        for key, program in self._programs.items():
            if key not in new._programs:
                new._programs[key] = program
                engine.add(program)
        new.random.load_state_dict(self.random.state_dict())
        return new.train(self.training)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of this model on any rank's share, or of the model as it was (whole tensors): every rank keeps its part.

        As in torch, floating values are cast, and without `strict` missing and unexpected names are returned. Names of one tensor must hold
        the same values. Raises StateDictError (a CheckpointError and a RuntimeError) with all that does not fit.
        """
        check_state(self, self._makes.skeleton, state_dict, strict=strict, assign=assign)
        return super().load_state_dict(state_dict, strict)

    # -- running ---------------------------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output for this rank's local batch. The loss is that of the global batch."""
        with self._together.section("forward"):
            return self._forward(args, kwargs)

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._makes.schedule is not None and self.training and torch.is_grad_enabled():
            raise BatchError(
                "a pipelined model trains by pm.train_step(**batch), which runs forward and backward of all microbatches in the order of "
                "its schedule and returns the loss. To see outputs: pm.eval(), then with torch.no_grad(): pm(**batch)."
            )
        tensors, program = self._program(args, kwargs, 1)
        outputs = self._engine.run(program, self._inputs(program, tensors, 0))
        self.random.advance()
        return restore(program, lambda i: self._as_output(program, outputs[i], i))

    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one step over all microbatches. Returns the loss of the global batch, the same on every rank.

        The loss is the mean over the valid labels of the whole global batch, also where microbatches or ranks have uneven numbers of them;
        gradients equal those of one device on the global batch, and add to what `.grad` holds.
        Raises BatchError when the model has no loss for this batch, or when ranks disagree about it.
        """
        with self._together.section("train_step"):
            return self._step(args, kwargs, backward=True)

    @torch.no_grad()
    def eval_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of the global batch, without gradients. Call `eval()` first to switch dropout off, as with any module."""
        with self._together.section("eval_step"):
            return self._step(args, kwargs, backward=False)

    def _step(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, backward: bool) -> torch.Tensor:
        count = self.config.microbatches
        tensors, program = self._program(args, kwargs, count)
        loss_at = program.captured.loss
        if loss_at is None:
            raise BatchError(
                "this batch gives no loss: the model returned none. Pass labels if the model computes its loss from them, "
                "or loss_fn=lambda output, batch: ... to parallelize."
            )
        parts = [self._inputs(program, part, i) for i, part in enumerate(self._microbatches(program, tensors, count))]
        counted = {f"denominator_{i}": value for i, value in enumerate(self._engine.count(program, parts))}
        total = self._engine.step(program, [{**part, **counted} for part in parts], backward=backward)
        self.random.advance()
        return total

    def _inputs(self, program: Program, tensors: Sequence[torch.Tensor], microbatch: int) -> dict[str, Any]:
        """The values of a graph's placeholders, by name."""
        found: dict[str, Any] = dict(zip(program.captured.inputs, tensors, strict=False))
        if program.has_experts:
            self._tallies = [*(self._tallies if microbatch else ()), Tally()]
            found[TALLY] = self._tallies[-1]
        return {**found, KEY: self.random.key(microbatch)} if program.is_random else found

    def _microbatches(self, program: Program, tensors: list[torch.Tensor], count: int) -> list[list[torch.Tensor]]:
        if count == 1:
            return [tensors]
        dims = program.captured.batch_dims
        names = program.captured.inputs[: len(tensors)]
        cut = [x.chunk(count, dims[n]) if n in dims else (x,) * count for n, x in zip(names, tensors, strict=True)]
        return [list(part) for part in zip(*cut, strict=True)]

    def _program(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], microbatches: int) -> tuple[list[torch.Tensor], Program]:
        kwargs = self._makes.ordered(kwargs)
        tensors, signature = flatten(args, kwargs, self.training)
        key = (signature, microbatches)
        if key not in self._checked:
            check_batch((args, kwargs), self.mesh)
        if key not in self._programs:
            program = self._makes.make(args, kwargs, training=self.training, microbatches=microbatches)
            self._programs[key] = program
            self._engine.add(program)
        if key not in self._checked:
            captured = self._programs[key].captured
            named = zip(captured.inputs, tensors, strict=False)
            check_whole({name: tensor for name, tensor in named if name not in captured.batch_dims}, self.mesh)
        self._checked.add(key)
        dtype = self.config.precision.compute_dtype
        if dtype is not None:
            tensors = [x.to(dtype) if x.is_floating_point() else x for x in tensors]
        return tensors, self._programs[key]

    def _as_output(self, program: Program, value: torch.Tensor, index: int) -> Any:
        """A tensor that is cut comes out as a DTensor."""
        types = {a.axis: a.outputs[index] for a in program.plan.axes}
        if not any(isinstance(t, Shard) for t in types.values()):
            return value
        placements: list[Placement] = []
        for name in self.mesh.mesh_dim_names or ():
            found = types.get(name if name in ("ep", "tp") else "dp") if name != "pp" else None
            placements.append(ShardPlacement(found.dim) if isinstance(found, Shard) else Replicate())
        info = next(n for n in reversed(program.captured.graph.nodes) if n.op == "output").args[0][index].meta["info"]
        strides, step = [], 1
        for n in reversed(info.shape):
            strides.append(step)
            step *= n
        return DTensor.from_local(
            value, self.mesh, placements, run_check=False, shape=torch.Size(info.shape), stride=tuple(reversed(strides))
        )

    # -- looking ---------------------------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Every decision, as data."""
        return self._first.plan

    def comms(self) -> tuple[Comm, ...]:
        """The ledger: every collective of one microbatch."""
        return self.plan.comms()

    def expert_load(self) -> dict[str, torch.Tensor]:
        """Experts module -> how many rows (token and choice) each of its experts got in the last step or forward, [E] (int64, on the CPU).

        Summed over microbatches and over the mesh, the same on every rank. Collective. Empty for a model without recognised experts, and
        before the first step.
        """
        return expert_load(self._tallies, self.mesh)

    def explain(self) -> str:
        """The plan in words: placements and the reasons for them, communication, repeated work."""
        program = self._first
        return explain(
            self.plan,
            program.graph,
            inlined={path: why for tree in self._engine.trees.values() for path, why in inlined(tree).items()},
            averaged=program.averaged,
            within=program.within,
            dropped=program.captured.dropped,
            unrecognised=program.captured.unrecognised,
            order=self.schedule,
        )

    def memory(self) -> MemoryReport:
        """What a rank keeps in memory while it trains, by kind; with a pipeline, this rank with its stages."""
        return memory(self.plan, self._first.graph, self._first.stages, self.schedule, self._stage_rank)

    @property
    def schedule(self) -> Order | None:
        """With a pipeline, what every rank of it computes, sends and receives in a training step, in order."""
        return None if self._makes.schedule is None else self._makes.schedule.order(self.config.microbatches)

    def schedule_table(self) -> str:
        """The order of computation as text: a row per rank of the pipeline, a column per slot, a dot where a rank waits for another.

        Raises ConfigError without a `pp` axis.
        """
        return schedule_table(self._order())

    def timeline(self, *args: Any, **kwargs: Any) -> tuple[Event, ...]:
        """Run one `train_step` on this batch, and return when every rank of the pipeline computed what, in seconds from a common start.

        Collective. It is a step as any other: gradients add to what `.grad` holds. Take the second or third step: the first one makes
        buffers and connections. `mp.plot.schedule(pm.schedule, measured=events)` draws it, `mp.plot.chrome_trace(events, path)` writes it.

        Clocks of ranks are set to zero when they leave one barrier: times of different ranks are off by what ranks leave it apart, much
        less than a millisecond on one machine, more over slow networks; durations on one rank are exact. On a GPU a rank waits for its
        device after every action, which costs what would overlap otherwise.

        Raises ConfigError without a `pp` axis.
        """
        self._order()
        assert isinstance(self._engine, Pipelined)
        with self._together.section("timeline"), self._engine.measuring() as events:
            self._step(args, kwargs, backward=True)
        return tuple(events)

    def _order(self) -> Order:
        if self.schedule is None:
            raise ConfigError("this mesh has no pp axis of more than one rank: there are no stages and no schedule.")
        return self.schedule

    @property
    def _stage_rank(self) -> int:
        return self._engine.axis.rank if isinstance(self._engine, Pipelined) else 0

    def print_readable(self) -> str:
        """The code this rank runs: the root's, and that of each block structure once. Returned, and printed."""
        several = len(self._engine.trees) > 1
        parts = [(f"# stage {i}\n" if several else "") + print_code(tree, self._first.key) for i, tree in self._engine.trees.items()]
        code = "\n".join(parts)
        print(code)
        return code

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ParallelModel:
        self._check_applicable(fn)
        for tree in self._engine.trees.values():
            tree._apply(fn, recurse)
        self._take_names()
        return self

    def _check_applicable(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The programs compute in the dtypes of the captured model, on the devices of the mesh. Raises ConfigError for any other."""
        for dtype in {p.dtype for p in self.parameters()}:
            made = fn(torch.empty(0, dtype=dtype, device=self.mesh.device_type))
            if made.dtype != dtype:
                raise ConfigError(
                    f"the dtype of a parallel model is fixed ({dtype}): convert the model before parallelize, or compute in another dtype "
                    f"with ParallelConfig(precision=...)."
                )
            if made.device.type != self.mesh.device_type:
                raise ConfigError(
                    f"a parallel model stays on the devices of its mesh ({self.mesh.device_type}): to have it on {made.device.type}, save "
                    f"a checkpoint and load it into a model parallelized on a mesh of that type."
                )
