"""Pipeline stages of any model as plain modules, for `torch.distributed.pipelining` and nothing else of meshpar.

    stages = mp.pipeline.split(model, batch, 4, microbatches=8)
    mine = stages[rank]
    stage = PipelineStage(mine, rank, 4, device, input_args=mine.input_args, output_args=mine.output_args)
    schedule = Schedule1F1B(stage, 8, loss_fn=mp.pipeline.loss, scale_grads=False)
    losses = []
    schedule.step(target=mine.step_target, losses=losses, return_outputs=False, **mine.keywords(**batch))
    mp.pipeline.sum_shared_gradients([mine])

Every stage holds the model's own parameters under their original names, those it shares with other stages too. The sum of the losses is the
loss of the whole batch, also where microbatches ignore different numbers of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from meshpar.capture.export import capture
from meshpar.capture.structure import order_of
from meshpar.compile.decide import Decision, StageRequest, decide
from meshpar.compile.denominators import Split, split_denominators
from meshpar.compile.ground import Budget, Staging
from meshpar.compile.lowering import in_stages
from meshpar.compile.program import Program, parts_of
from meshpar.compile.programs import parameter_facts
from meshpar.compile.signature import BatchSignature, flatten
from meshpar.compile.split import StageGraph
from meshpar.compile.stages import choose
from meshpar.errors import BatchError, ConfigError, near
from meshpar.graph.captured import Captured
from meshpar.graph.facts import Info
from meshpar.mesh import Axis
from meshpar.pipeline.ties import Ties
from meshpar.roles import stage_axis
from meshpar.runtime.blocks import Tree, print_code
from meshpar.runtime.build import trees_of
from meshpar.runtime.engine import Counting, teach
from meshpar.runtime.recompute import Mode
from meshpar.sharding.price import Price

StageExample = Mapping[str, Any] | tuple[Any, ...] | Tensor


def split(
    model: nn.Module,
    example: StageExample,
    stages: int = 4,
    *,
    microbatches: int = 1,
    where: Sequence[int] | Sequence[str] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    price: Price | None = None,
    cost: Callable[[fx.Node], float] | None = None,
    memory: Budget | None = None,
    recompute: Mode = "none",
) -> tuple[Stage, ...]:
    """Cut a model, in its present mode, into `stages` modules that compute the same.

    `example`: the keyword arguments (a dict) or positional ones (a tuple) of a batch, of which a microbatch is the `microbatches`-th part.
    `where`: None balances the estimated cost; numbers are blocks per stage; names are the modules at which stages 1, 2, ... begin.
    `loss_fn(output, batch)` where the model does not return its loss. The last stage returns the loss, as a tensor of one element; without
    one, the tensors of the model's output. `price`, `cost`, `memory`: see `compile.stages.choose`.

    Raises CaptureError, BatchError, and PlanError when there are fewer places to cut, or when `where` does not fit.

    >>> first, second = split(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 4), 2, where=["2"])
    >>> list(first.state_dict()), list(second.state_dict())
    (['0.weight', '0.bias'], ['2.weight', '2.bias'])
    """
    args, kwargs = _arguments(model, example)
    device = next((tensor.device.type for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "meta"), "cpu")
    captured = capture(model, args, kwargs, device=device, divide=microbatches, loss_fn=loss_fn)
    wanted = None if captured.loss is None else (captured.loss,)
    staging = choose(captured, stages, where=where, wanted=wanted, price=price, cost=cost, memory=_in_flight(memory, microbatches))
    program = _program(model, captured, staging, flatten(args, kwargs, model.training)[1], microbatches)
    parameters, counting = dict(model.named_parameters()), Counting(dict(model.named_buffers()))
    counting.learn(program)
    common = _Common(model, program, staging, microbatches, counting)
    made = []
    for index in range(stages):
        trees = trees_of(model, program, (index,), parameters, _buffers(model, program, index), recompute=recompute)
        teach(trees, program)
        made.append(Stage(trees[index], program.stages[index], common))
    return tuple(made)


def loss(output: Tensor, target: Any) -> Tensor:
    """The `loss_fn` of a schedule whose last stage returns the loss itself."""
    return output.sum()


def sum_shared_gradients(stages: Sequence[Stage], group: dist.ProcessGroup | None = None) -> None:
    """Sum the gradients of parameters that several stages share, after a step. Collective over the ranks of the pipeline.

    `stages`: those of this rank, whose shared parameters are the same objects or hold the same values.
    """
    shared = stages[0].shared_parameters
    group = group or dist.group.WORLD
    if not shared or group is None:
        return
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, [stage.index for stage in stages], group=group)
    holders = {name: tuple(r for r, held in enumerate(everyone) if set(held) & set(users)) for name, (users, _, _) in shared.items()}
    copies = {name: _own_copies(name, stages) for name in shared}
    mine = {name: own[0] for name, own in copies.items() if own}
    for name, parameter in mine.items():
        grads = [one.grad for one in copies[name] if one.grad is not None]
        parameter.grad = sum(grads[1:], start=grads[0]) if grads else torch.zeros_like(parameter)
    axis = Axis(stage_axis(), len(everyone), dist.get_rank(group), group.group_name)
    Ties(axis, {name: holders[name] for name in mine}, mine).sum({})
    for name, parameter in mine.items():
        for other in copies[name][1:]:
            other.grad = None if parameter.grad is None else parameter.grad.clone()


def _own_copies(name: str, stages: Sequence[Stage]) -> list[nn.Parameter]:
    """The different objects that stages of this rank hold for one parameter."""
    held = (parameter for stage in stages for found, parameter in stage.named_parameters() if found == name)
    return list({id(parameter): parameter for parameter in held}.values())


class _Common:
    """What all stages of a model know."""

    def __init__(self, model: nn.Module, program: Program, staging: Staging, count: int, counting: Counting) -> None:
        self.program, self.staging, self.microbatches, self.counting = program, staging, count, counting
        self.ordered = order_of(model)

    @property
    def captured(self) -> Captured:
        return self.program.captured


class Stage(nn.Module):
    """One stage: `stage(*received, **batch)` returns what it hands on, or, the last one, the loss or the model's outputs.

    From the batch it takes the tensors named in `inputs`, and ignores the model's others.
    """

    # Written past nn.Module's own bookkeeping, which would take the tree for a submodule.
    _tree: Tree
    _stage: StageGraph
    _common: _Common

    def __init__(self, tree: Tree, stage: StageGraph, common: _Common) -> None:
        super().__init__()
        # The tree's own tables, not copies: what is swapped in the tree is what this module shows.
        self.__dict__.update(_modules=tree._modules, _parameters=tree._parameters, _buffers=tree._buffers)
        self.__dict__["_non_persistent_buffers_set"] = tree._non_persistent_buffers_set
        self.__dict__.update(_tree=tree, _stage=stage, _common=common)
        self.training = common.program.signature.training

    # -- what it is ------------------------------------------------------------------------------------------------------------------------

    @property
    def index(self) -> int:
        """Which stage this is, from 0."""
        return self._stage.index

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensors of the batch that this stage reads."""
        return self._stage.inputs

    @property
    def receives(self) -> tuple[str, ...]:
        """Names of the values that the stage before hands over: the positional arguments."""
        return self._stage.receives

    @property
    def sends(self) -> tuple[str, ...]:
        """Names of the values handed on."""
        return self._stage.sends

    @property
    def shared_parameters(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]:
        """Parameters that several stages hold, of the whole model: the stages, the shape and the dtype."""
        plans = self._common.program.plan.parameters
        return {n: (p.stages, p.shape, getattr(torch, p.dtype)) for n, p in plans.items() if len(p.stages) > 1}

    @property
    def staging(self) -> Staging:
        """Why the stages begin where they do, and what each costs."""
        return self._common.staging

    @property
    def input_args(self) -> tuple[Tensor, ...]:
        """Tensors on `meta` that look like what is received, for `PipelineStage`; none for the first stage, which reads the batch."""
        return tuple(_like(info) for info in self._stage.received)

    @property
    def output_args(self) -> tuple[Tensor, ...]:
        """Tensors on `meta` that look like what is returned."""
        infos = (*self._stage.sent, *self._stage.returned)
        return tuple(_like(replace(info, shape=(1,)) if self._is_loss else info) for info in infos)

    @property
    def step_target(self) -> Tensor:
        """What to pass as `target` to a schedule whose last stage returns the loss: it wants one, and nobody reads it."""
        return torch.zeros(self._common.microbatches)

    @property
    def device(self) -> torch.device:
        """Where the stage's tensors are."""
        return next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    def explain(self) -> str:
        """All stages with their costs, and what this one takes and gives."""
        lines = [str(self.staging), f"stage {self.index} of {len(self.staging.seconds)}:"]
        lines += [f"  receives {_named(self.receives, self._stage.received)}"] if self.receives else []
        lines += [f"  reads {', '.join(self.inputs)} of the batch"] if self.inputs else []
        lines += [f"  hands on {_named(self.sends, self._stage.sent)}"] if self.sends else []
        shared = {name: users for name, (users, _, _) in self.shared_parameters.items() if self.index in users}
        lines += [f"  shares {name} with {_others(self.index, users)}" for name, users in shared.items()]
        return "\n".join(lines)

    def print_readable(self) -> str:
        """The code of this stage: the root's, and that of each block structure once. Returned, and printed."""
        code = print_code(self._tree, self._common.program.key)
        print(code)
        return code

    def get_submodule(self, target: str) -> nn.Module:
        """As any module's, also where a module of the model is called like an attribute of this class."""
        return self._tree.get_submodule(target) if target else self

    # -- running ---------------------------------------------------------------------------------------------------------------------------

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Run the stage on one microbatch. Positional arguments are what was received, then tensors of `inputs`; others go by name.

        Raises BatchError for tensors that are missing, unknown, or of another shape than the example's.
        """
        received, rest = args[: len(self.receives)], args[len(self.receives) :]
        given = {**dict(zip(self.inputs, rest)), **kwargs}
        self._check(len(args), given)
        tensors = [_Received.apply(x) if x.requires_grad else x for x in received]
        tensors += [given[name].reshape(info.shape) for name, info in self._stage.given.items()]
        values = self._tree.run(self._common.program.key, *tensors)
        if self.sends:
            return tuple(value.contiguous() for value in values)
        if self._is_loss:
            return values[0].reshape(1)
        return values[0] if len(values) == 1 else tuple(values)

    def keywords(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What `schedule.step` takes for this stage, from the arguments of the model for a whole batch.

        Tensors without samples are repeated per microbatch, because schedules cut everything along dim 0. Denominators of the loss
        (counts of valid labels) are counted over the whole batch.
        """
        common, captured, count = self._common, self._common.captured, self._common.microbatches
        tensors, signature = flatten(args, common.ordered(kwargs), self.training)
        if signature.spec != captured.in_spec:
            raise BatchError(f"this batch has another structure than the example: {signature.spec}, not {captured.in_spec}.")
        batch = dict(zip(captured.inputs, tensors))
        if any(name not in batch for name in self.inputs):
            parts = [dict(zip(captured.inputs, part)) for part in parts_of(captured, tensors, count)]
            batch |= common.counting.count(common.program, parts)
        cut = {name for name in self.inputs if captured.batch_dims.get(name) == 0}
        return {name: batch[name] if name in cut else batch[name].expand(count, *batch[name].shape) for name in self.inputs}

    def _check(self, positional: int, given: Mapping[str, Tensor]) -> None:
        known = self._common.captured.inputs
        complaints = [f"{name!r} is no tensor of the batch.{near(name, known)}" for name in given if name not in known]
        if positional < len(self.receives):
            complaints.append(f"it receives {len(self.receives)} values ({', '.join(self.receives)}), but {positional} were given.")
        for name, info in self._stage.given.items():
            if name not in given:
                complaints.append(f"it reads {name!r}, which was not given.")
            elif tuple(given[name].shape) not in (info.shape, (1, *info.shape)):
                complaints.append(f"{name!r} has shape {list(given[name].shape)}; a microbatch of the example has {list(info.shape)}.")
        if complaints:
            raise BatchError("\n  ".join((f"stage {self.index}:", *complaints)))

    @property
    def _is_loss(self) -> bool:
        """Whether this stage returns the loss."""
        return not self.sends and self._common.captured.loss is not None and self._stage.outputs == (self._common.captured.loss,)


class _Received(torch.autograd.Function):
    """The value that was received; its gradient is made contiguous, as sending wants it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _arguments(model: nn.Module, example: StageExample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), order_of(model)(example)
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise ConfigError(f"the example must be a dict of keyword arguments or a tuple of positional ones, not {type(example).__name__}.")


def _in_flight(memory: Budget | None, microbatches: int) -> Budget:
    memory = memory or Budget()
    return replace(memory, microbatches=microbatches) if memory.microbatches is None and microbatches > 1 else memory


def _program(model: nn.Module, captured: Captured, staging: Staging, signature: BatchSignature, count: int) -> Program:
    """What the runtime of a pipeline would run, of the model as it was captured: no axis cuts anything."""
    whole = Split(captured, None, ()) if count == 1 or captured.loss is None else split_denominators(captured, count)
    stages = len(staging.seconds)
    request = StageRequest(tuple(range(stages)), chosen=staging)
    plan = decide(whole.captured, Decision(((stage_axis(), stages),), (), stages=request, others=parameter_facts(model)))
    counts = None if whole.counts is None else Program(signature.counting, whole.counts, plan, whole.counts.graph)
    return in_stages(Program(signature, whole.captured, plan, whole.captured.graph, counts, whole.averaged, whole.within))


def _buffers(model: nn.Module, program: Program, stage: int) -> dict[str, Tensor]:
    """The buffers that a stage reads or changes; what no stage uses is held by the first."""
    reads = [{str(n.target) for n in one.graph.nodes if n.op == "get_attr"} | set(one.mutations) for one in program.all_stages]
    used = set[str]().union(*reads)
    return {name: b for name, b in model.named_buffers() if name in reads[stage] or (stage == 0 and name not in used)}


def _like(info: Info) -> Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta", requires_grad=info.requires_grad and info.dtype.is_floating_point)


def _named(names: Sequence[str], infos: Sequence[Info]) -> str:
    return ", ".join(f"{name} {list(info.shape)} {str(info.dtype).removeprefix('torch.')}" for name, info in zip(names, infos))


def _others(index: int, users: Sequence[int]) -> str:
    others = [str(user) for user in users if user != index]
    return f"stage{'s' if len(others) > 1 else ''} {', '.join(others)}"
