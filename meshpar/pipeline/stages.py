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
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from meshpar.capture.export import capture
from meshpar.compile.denominators import Split, split_denominators
from meshpar.compile.program import flatten
from meshpar.compile.split import StageGraph, mark, shared_parameters
from meshpar.compile.split import split as split_graph
from meshpar.compile.stages import Budget, Staging, choose
from meshpar.errors import BatchError, ConfigError, near
from meshpar.graph.captured import Captured
from meshpar.graph.facts import Info, info_of
from meshpar.graph.run import run
from meshpar.passes.inputs import extra_inputs
from meshpar.runtime.blocks import Tree, print_code
from meshpar.runtime.recompute import Mode
from meshpar.sharding.price import Price

_KEY = "stage"

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
    `where`: None balances the measured cost; numbers are blocks per stage; names are the modules at which stages 1, 2, ... begin.
    `loss_fn(output, batch)` where the model does not return its loss. The last stage returns the loss, as a tensor of one element; without
    one, the tensors of the model's output. `price`, `cost`, `memory`: see `passes.stages.choose`.

    Raises CaptureError, BatchError, and PlanError when there are fewer places to cut, or when `where` does not fit.

    >>> first, second = split(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 4), 2, where=["2"])
    >>> list(first.state_dict()), list(second.state_dict())
    (['0.weight', '0.bias'], ['2.weight', '2.bias'])
    """
    args, kwargs = _arguments(example)
    device = next((tensor.device.type for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "meta"), "cpu")
    captured = capture(model, args, kwargs, device=device, divide=microbatches, loss_fn=loss_fn)
    wanted = None if captured.loss is None else (captured.loss,)
    staging = choose(captured, stages, where=where, wanted=wanted, price=price, cost=cost, memory=_in_flight(memory, microbatches))
    mark(captured.graph, staging.starts)
    whole = Split(captured, None, ())
    if microbatches > 1 and captured.loss is not None:
        whole = split_denominators(captured, microbatches)
    captured = whole.captured
    graphs = split_graph(captured.graph, stages, parameters=captured.parameters, mutations=captured.mutations, wanted=wanted)
    common = _Common(captured, whole, staging, microbatches, shared_parameters(graphs, captured.parameters), model.training)
    return tuple(Stage(_tree(model, captured, graphs, graph, recompute), graph, common) for graph in graphs)


def loss(output: Tensor, target: Any) -> Tensor:
    """The `loss_fn` of a schedule whose last stage returns the loss itself."""
    return output.sum()


def sum_shared_gradients(stages: Sequence[Stage], group: dist.ProcessGroup | None = None) -> None:
    """Sum the gradients of parameters that several stages share, after a step. Collective over the ranks of the pipeline.

    `stages`: those of this rank, whose shared parameters are the same objects or hold the same values.
    """
    for name, (users, shape, dtype) in stages[0].shared_parameters.items():
        mine = [dict(stage.named_parameters())[name] for stage in stages if stage.index in users]
        own = list({id(parameter): parameter for parameter in mine}.values())
        total = torch.zeros(shape, dtype=dtype, device=stages[0].device)
        for parameter in own:
            total += 0 if parameter.grad is None else parameter.grad
        dist.all_reduce(total, group=group)
        for parameter in own:
            parameter.grad = total.clone()


@dataclass(frozen=True)
class _Common:
    """What all stages of a model know."""

    captured: Captured
    counted: Split
    staging: Staging
    microbatches: int
    shared: Mapping[str, tuple[int, ...]]
    training: bool


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
        self.training = common.training
        nodes = list(stage.graph.nodes)
        infos = [info_of(node) for node in nodes if node.op == "placeholder"]
        self._received: tuple[Info, ...] = tuple(infos[: len(stage.receives)])
        self._given: dict[str, Info] = dict(zip(stage.inputs, infos[len(stage.receives) :]))
        count = len(stage.sends) + len(stage.outputs)
        self._returned: tuple[Info, ...] = tuple(info_of(value) for value in nodes[-1].args[0][:count])

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
        infos = {str(n.target): info_of(n) for n in self._common.captured.graph.nodes if n.op == "get_attr"}
        return {name: (users, infos[name].shape, infos[name].dtype) for name, users in self._common.shared.items()}

    @property
    def staging(self) -> Staging:
        """Why the stages begin where they do, and what each costs."""
        return self._common.staging

    @property
    def input_args(self) -> tuple[Tensor, ...]:
        """Tensors on `meta` that look like what is received, for `PipelineStage`; none for the first stage, which reads the batch."""
        return tuple(_like(info) for info in self._received)

    @property
    def output_args(self) -> tuple[Tensor, ...]:
        """Tensors on `meta` that look like what is returned."""
        return tuple(_like(replace(info, shape=(1,)) if self._is_loss else info) for info in self._returned)

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
        lines += [f"  receives {_named(self.receives, self._received)}"] if self.receives else []
        lines += [f"  reads {', '.join(self.inputs)} of the batch"] if self.inputs else []
        lines += [f"  hands on {_named(self.sends, self._returned)}"] if self.sends else []
        here = [name for name, users in self._common.shared.items() if self.index in users]
        lines += [f"  shares {name} with {_others(self.index, self._common.shared[name])}" for name in here]
        return "\n".join(lines)

    def print_readable(self) -> str:
        """The code of this stage: the root's, and that of each block structure once. Returned, and printed."""
        code = print_code(self._tree, _KEY)
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
        tensors += [given[name].reshape(info.shape) for name, info in self._given.items()]
        values = self._tree.run(_KEY, *tensors)
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
        captured, count = self._common.captured, self._common.microbatches
        tensors, signature = flatten(args, kwargs, self.training)
        if signature.spec != captured.in_spec:
            raise BatchError(f"this batch has another structure than the example: {signature.spec}, not {captured.in_spec}.")
        batch = dict(zip(captured.inputs, tensors))
        counted = self._denominators(batch) if any(name not in batch for name in self.inputs) else {}
        found = {}
        for name in self.inputs:
            value = batch[name] if name in batch else counted[name]
            found[name] = value if captured.batch_dims.get(name) == 0 else value.expand(count, *value.shape)
        return found

    def _denominators(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        counts, dims, count = self._common.counted.counts, self._common.captured.batch_dims, self._common.microbatches
        assert counts is not None
        parts = [{n: x.chunk(count, dims[n])[i] if n in dims else x for n, x in batch.items()} for i in range(count)]
        with torch.no_grad():
            found = [run(counts, dict(self._tree.named_buffers()), part) for part in parts]
        names = extra_inputs(self._common.counted.captured.graph).denominators
        return {name: torch.stack(values).sum(0) for name, values in zip(names, zip(*found), strict=True)}

    def _check(self, positional: int, given: Mapping[str, Tensor]) -> None:
        known = self._common.captured.inputs
        complaints = [f"{name!r} is no tensor of the batch.{near(name, known)}" for name in given if name not in known]
        if positional < len(self.receives):
            complaints.append(f"it receives {len(self.receives)} values ({', '.join(self.receives)}), but {positional} were given.")
        for name, info in self._given.items():
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


def _arguments(example: StageExample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), {name: example[name] for name in sorted(example)}
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise ConfigError(f"the example must be a dict of keyword arguments or a tuple of positional ones, not {type(example).__name__}.")


def _in_flight(memory: Budget | None, microbatches: int) -> Budget:
    memory = memory or Budget()
    return replace(memory, microbatches=microbatches) if memory.microbatches is None and microbatches > 1 else memory


def _tree(model: nn.Module, captured: Captured, stages: Sequence[StageGraph], stage: StageGraph, recompute: Mode) -> Tree:
    """The stage's modules at their original places. What no stage uses is held by the first."""
    reads = [{str(n.target) for n in one.graph.nodes if n.op == "get_attr"} | set(one.mutations) for one in stages]
    everywhere = set().union(*reads)

    def holds(name: str) -> bool:
        return name in reads[stage.index] or (stage.index == 0 and name not in everywhere)

    tree = Tree(
        {name: parameter for name, parameter in model.named_parameters() if holds(name)},
        {name: buffer for name, buffer in model.named_buffers() if holds(name)},
        aliases=captured.aliases,
        non_persistent=_non_persistent(model),
        recompute=recompute,
    )
    tree.add_program(_KEY, stage.graph, constants=captured.constants, mutations=stage.mutations)
    return tree


def _non_persistent(model: nn.Module) -> tuple[str, ...]:
    paths = [(f"{path}." if path else "", module) for path, module in model.named_modules()]
    return tuple(path + name for path, module in paths for name in module._non_persistent_buffers_set)


def _like(info: Info) -> Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta", requires_grad=info.requires_grad and info.dtype.is_floating_point)


def _named(names: Sequence[str], infos: Sequence[Info]) -> str:
    return ", ".join(f"{name} {list(info.shape)} {str(info.dtype).removeprefix('torch.')}" for name, info in zip(names, infos))


def _others(index: int, users: Sequence[int]) -> str:
    others = [str(user) for user in users if user != index]
    return f"stage{'s' if len(others) > 1 else ''} {', '.join(others)}"
