"""Runs every stage of a program once as it would run on a cluster: the runtime's own modules and FSDP2, on tensors without memory.

Ranks that do not exist are torch's "fake" process group. A microbatch goes through a stage, forward and backward, as the first of a step,
then another as the last: what happens once per step (gathers that last, the sum of gradients) shows as the difference.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshpar._torch import FakeStore, FakeTensorMode, local_of
from meshpar.compile.program import Program
from meshpar.compile.programs import Programs
from meshpar.compile.split import StageGraph
from meshpar.config import ParallelConfig
from meshpar.dry_run.tape import MachineTape, Sounding, TapeMark, alive, levels
from meshpar.errors import ConfigError
from meshpar.graph.facts import Extra, Info, facts, info_of
from meshpar.graph.op import op_name
from meshpar.mesh import make_mesh, parse_mesh
from meshpar.ops import random
from meshpar.ops.deferred import WeightGradients
from meshpar.ops.load import Tally
from meshpar.runtime.blocks import Tree
from meshpar.runtime.build import trees_in_memory
from meshpar.runtime.data_parallel import DataParallelism
from meshpar.runtime.engine import loss_alone
from meshpar.runtime.parameters.specs import spec_of


@dataclass(frozen=True)
class Standing:
    """Bytes that are alive at a moment and were not before the pass."""

    gathered: int
    """Parameters that FSDP2 gathered, and its buffers."""
    rest: int
    """Between forward and backward what backward reads again; after it, gradients."""
    scattered: int
    """`rest`, if what was gathered over an axis counted as the part it was gathered from."""

    @property
    def total(self) -> int:
        return self.gathered + self.rest


@dataclass(frozen=True)
class Pass:
    """A microbatch on a stage, forward and backward: bytes are above those before its forward."""

    calls: tuple[Sounding, ...]
    forward_peak: int
    forward: Standing
    """After forward."""
    backward_peak: int
    waiting: int
    """After the gradients of inputs, where those of weights are put off."""
    backward: Standing
    """After backward."""


@dataclass(frozen=True)
class Rehearsed:
    """A stage on the ranks of its place: what it holds, and its passes."""

    index: int
    graph: fx.Graph
    parameters: int
    """Bytes of parameters between steps, shared out over data ranks."""
    trained: int
    """Bytes of those that are trained."""
    elements: int
    """Trained parameters, before they are shared out over data ranks: those that all data ranks hold."""
    expert_elements: int
    """The same of experts."""
    tensors: int
    """How many parameters are trained."""
    buffers: int
    received: int
    """Bytes that a microbatch is handed by the stage before, and stay with it until its backward."""
    sent: int
    logits: int
    """Bytes of what the loss reads, on the stage that computes it."""
    first: Pass
    """The first microbatch of a step."""
    middle: Pass
    """One between; the first where there is none."""
    last: Pass
    """The last one; the first where there is one."""

    @property
    def blocks(self) -> int:
        """Blocks that it runs; 1 where it has none."""
        return len({facts(n).region for n in self.graph.nodes} - {None, ""}) or 1


@contextmanager
def absent(mesh: str | Mapping[str, int]) -> Iterator[DeviceMesh]:
    """This process as rank 0 of a mesh whose other ranks do not exist."""
    if dist.is_initialized():
        raise ConfigError("this process is a rank already, a dry run needs one of its own: start it without torchrun.")
    sizes = parse_mesh(mesh)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=prod(sizes.values()))
    try:
        yield make_mesh(sizes, "cpu")
    finally:
        dist.destroy_process_group()


def rehearse(programs: Programs, program: Program, model: nn.Module, mesh: DeviceMesh, config: ParallelConfig) -> tuple[Rehearsed, ...]:
    """Every stage of `program`, on the fake process group that `mesh` is of."""
    cuts = program.stages or (program.step or StageGraph(0, program.graph, (), program.inputs, (), (), ()),)
    first: dict[Hashable, int] = {}
    like = [first.setdefault(likeness(cut), cut.index) for cut in cuts]
    memory = FakeTensorMode(allow_non_fake_inputs=True)
    trees, data = trees_in_memory(model, mesh, config, program, programs.schedule, memory, tuple(first.values()))
    with memory:
        done = {i: _stage(cuts[i], trees[i], data[i], program, programs, config) for i in first.values()}
    return tuple(replace(done[i], index=cut.index, graph=cut.graph) for i, cut in zip(like, cuts, strict=True))


def likeness(cut: StageGraph) -> Hashable:
    """What stages that ask the same of a machine have in common: calls, shapes and blocks, but no names and no random numbers."""
    number: dict[fx.Node, int] = {}
    blocks: dict[Any, int] = {}
    found: list[Hashable] = []
    for node in cut.graph.nodes:
        number[node] = len(number)
        target = node.target if node.op == "call_function" else ""
        drawn = getattr(target, "__module__", "") == random.__name__
        args, kwargs = fx.map_arg((node.args, {} if drawn else node.kwargs), number.__getitem__)
        block = blocks.setdefault(facts(node).region, len(blocks))
        found.append((node.op, str(target), "" if drawn else repr((args, kwargs)), repr(facts(node).info), block))
    return (*found, len(cut.receives), len(cut.sends), len(cut.mutations))


def _stage(cut: StageGraph, tree: Tree, data: DataParallelism, program: Program, programs: Programs, config: ParallelConfig) -> Rehearsed:
    held = [(name, p, _local(p)) for name, p in tree.named_parameters()]
    elements, expert_elements = _elements(tree, program)
    received = [info_of(n) for n in _placeholders(cut) if n.name in cut.receives]
    sent = [info_of(n) for n in _outputs(cut.graph)[: len(cut.sends)]]
    stage = _Stage(cut, tree, data, program, programs.schedule is not None, _defers(programs, config))
    with MachineTape() as tape:
        first = stage.run(tape, first=True, last=config.microbatches == 1)
        middle = stage.run(tape, first=False, last=False) if config.microbatches > 2 else first
        last = stage.run(tape, first=False, last=True) if config.microbatches > 1 else first
    return Rehearsed(
        cut.index,
        cut.graph,
        sum(local.nbytes for _, _, local in held),
        sum(local.nbytes for _, p, local in held if p.requires_grad),
        elements,
        expert_elements,
        sum(p.requires_grad for _, p, _ in held),
        sum(b.nbytes for b in tree.buffers()),
        sum(i.nbytes for i in received),
        sum(i.nbytes for i in sent),
        _logits(cut.graph),
        first,
        middle,
        last,
    )


def _defers(programs: Programs, config: ParallelConfig) -> bool:
    return programs.schedule is not None and programs.schedule.defers(config.microbatches)


def _elements(tree: Tree, program: Program) -> tuple[int, int]:
    """Trained parameters of a stage, without and with experts divided over `ep`, as the layout (not data parallelism) cuts them."""
    axes, found = {name: (size, 0) for name, size in program.plan.mesh}, [0, 0]
    for parameter in tree.parameters():
        spec = spec_of(parameter)
        if spec is not None and parameter.requires_grad:
            found["ep" in spec.placements] += prod(spec.local_shape(axes))
    return found[0], found[1]


class _Stage:
    """A stage with its inputs, ready to run."""

    def __init__(self, cut: StageGraph, tree: Tree, data: DataParallelism, program: Program, staged: bool, defers: bool) -> None:
        self.cut, self.tree, self.data, self.program, self.staged, self.defers = cut, tree, data, program, staged, defers
        self.alone = cut is program.step
        """Whether it returns the loss alone, though there is no pipeline."""

    def run(self, tape: MachineTape, *, first: bool, last: bool) -> Pass:
        """One microbatch: forward, then backward, then, where they are put off, the gradients of weights."""
        later = WeightGradients()
        inputs = [_input(node, later if self.defers else None) for node in _placeholders(self.cut)]
        if not self.staged:
            self.data.microbatch(1 - first, 2 - first if last else 3)
        tape.phase = "forward"
        given = {tape.number(x) for x in inputs if isinstance(x, torch.Tensor)}
        for tensor in (*self.tree.parameters(), *self.tree.buffers()):
            tape.number(_local(tensor))
        begun = tape.mark()
        outputs = self.tree.run(loss_alone(self.program) if self.alone else self.program.key, *inputs)
        roots, grads = self._roots(outputs)
        del outputs
        forwards = tape.mark()
        inputs_done = self._backward(tape, roots, grads, later, last)
        del roots, grads
        for x in inputs:
            if isinstance(x, torch.Tensor):
                x.grad = None  # sent on
        return _pass(tape, begun, forwards, inputs_done, given)

    def _roots(self, outputs: tuple[torch.Tensor, ...]) -> tuple[list[Any], list[Any]]:
        """Where backward starts, and the gradients that arrive there. What was sent on is let go, only its place is kept."""
        sends = outputs[: len(self.cut.sends)]
        loss = self.program.captured.loss
        if not self.cut.sends:
            last = outputs[0 if self.staged or self.alone else loss or 0]
            return [last], [None]
        edges = [torch.autograd.graph.get_gradient_edge(v) for v in sends if v.requires_grad]
        return edges, [(v.shape, v.dtype) for v in sends if v.requires_grad]

    def _backward(self, tape: MachineTape, roots: list[Any], grads: list[Any], later: WeightGradients, last: bool) -> TapeMark:
        """Backward; returns when the gradients of inputs were there."""
        tape.phase = "backward"
        if self.defers:
            later.open()
        if self.staged:
            self.data.backward(last=last and not self.defers)
        else:
            self.data.alone()
        arrived = [None if g is None else torch.empty(g[0], dtype=g[1]) for g in grads]
        torch.autograd.backward(roots, arrived)
        later.close()
        done = tape.mark()
        if self.defers:
            tape.phase = "weight"
            later.run()
            self.data.accumulate()
            if last:
                self.data.reduce()
        elif last:
            self.data.done(0, 1)
        return done


def _pass(tape: MachineTape, begun: TapeMark, forwards: TapeMark, inputs_done: TapeMark, given: set[int]) -> Pass:
    changes = tape.storages.changes
    level = [0, *levels(changes, without=given)]
    start = level[begun[1]]
    makers: dict[int, Sounding] = {}
    for call in tape.calls:
        for number in call.writes:
            makers.setdefault(number, call)
    before = alive(changes[: begun[1]])

    def standing(moment: int) -> Standing:
        now = alive(changes[:moment])
        grown = {n: now.get(n, 0) - before.get(n, 0) for n in (*now, *(n for n in before if n not in now)) if n not in given}
        own = {n: size for n, size in grown.items() if not _is_of_data_parallelism(makers.get(n))}
        rest = sum(own.values())
        return Standing(sum(grown.values()) - rest, rest, round(sum(size * _part(makers, n) for n, size in own.items())))

    return Pass(
        tuple(tape.calls[begun[0] :]),
        max(level[begun[1] : forwards[1] + 1]) - start,
        standing(forwards[1]),
        max(level[forwards[1] :]) - start,
        level[inputs_done[1]] - start,
        standing(len(changes)),
    )


def _is_of_data_parallelism(maker: Sounding | None) -> bool:
    """FSDP2 fills what it allocated; everything else is made by the operator that computes it."""
    return maker is None or maker.kernel.name.startswith(("fsdp.", "c10d."))


def _part(makers: Mapping[int, Sounding], number: int) -> float:
    """The share of a value that this rank had before it was gathered over an axis: 1 for what was not."""
    maker = makers.get(number)
    while maker is not None and maker.kernel.name in _COPIES and maker.reads and maker.reads[0] in makers:
        maker = makers[maker.reads[0]]
    if maker is None or maker.kernel.collective != "all_gather" or not maker.kernel.moved:
        return 1.0
    return maker.kernel.read / maker.kernel.moved


_COPIES = frozenset(("aten.clone", "aten.cat", "aten.contiguous", "aten.copy"))


def _logits(graph: fx.Graph) -> int:
    """The largest value that a cross entropy reads."""
    losses = [n for n in graph.nodes if n.op == "call_function" and "cross_entropy" in op_name(n.target)]
    infos = [facts(source).info for n in losses for source in n.all_input_nodes]
    return max((i.nbytes for i in infos if isinstance(i, Info)), default=0)


def _placeholders(cut: StageGraph) -> list[fx.Node]:
    return [n for n in cut.graph.nodes if n.op == "placeholder"]


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    found: Any = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    return list(found)


def _input(node: fx.Node, later: WeightGradients | None) -> Any:
    """A value for a placeholder."""
    if facts(node).extra == Extra.EXPERT_TALLY:
        return Tally()
    if facts(node).extra == Extra.WEIGHT_GRADIENTS:
        return later
    if facts(node).extra == Extra.RANDOM_KEY:
        return 0
    info: Info = info_of(node)
    return torch.empty(info.shape, dtype=info.dtype).requires_grad_(info.requires_grad)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return local_of(tensor) if isinstance(tensor, DTensor) else tensor
