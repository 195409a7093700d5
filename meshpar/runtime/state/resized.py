"""Programs of new sizes from those of known ones, without a capture, a plan or a graph: the functions of blocks with other numbers.

    sizes 16, 20, 32       made as ever: captured or watched, planned, lowered, cut into blocks. Every number of their code is kept
    size 24                lies between them: each number follows from those and from the formulas of the forward (`capture.symbolic`)

What is decided about a program by comparing sizes with numbers, in the forward, by a pass or by the solver, is decided alike for all sizes
between two for which it is decided alike: so new sizes must lie between two known ones in every dim. What is decided by dividing them is
compared: every cut that was even must be even. The first program that is made in this way is made as ever too, and compared; only then are
others trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from meshpar.capture.state.places import described
from meshpar.capture.state.taken import State
from meshpar.capture.symbolic import BatchSizes, Formulas
from meshpar.capture.witness import Unseen
from meshpar.compile.program import Program
from meshpar.compile.shapes.fitted import Fitted
from meshpar.compile.shapes.numbers import Differs, Number
from meshpar.compile.shapes.outline import outline, sizes_of
from meshpar.compile.shapes.plans import AxisShard, cut_again, cuts_of, with_outputs
from meshpar.compile.shapes.written import plain, with_numbers
from meshpar.compile.signature import BatchSignature
from meshpar.compile.split import StageGraph
from meshpar.graph.captured import Captured
from meshpar.graph.facts import infos_of
from meshpar.graph.text import digest
from meshpar.plan import Plan
from meshpar.runtime.engine import Engine, Functions

LEAST = 3
"""From how many known sizes on others are told."""
KEPT = 12
"""How many known sizes are kept of programs that differ in numbers alone."""
KIN = 4
"""How many different programs are kept for one kind of batch, and how many ways that a forward takes for one of them."""
REASONS = 8
"""How many different reasons are kept."""


@dataclass(frozen=True)
class _Known:
    """The numbers of one program, in the order of its functions, its graphs and its types."""

    sizes: BatchSizes
    functions: list[list[Number]]
    outside: list[list[int]]
    cuts: list[AxisShard]
    outputs: list[AxisShard]


@dataclass
class _Kin:
    """Programs of which only numbers differ."""

    what: Any
    plan: Plan
    functions: Functions
    living: list[Program]
    """Those whose code the trees have."""
    known: list[_Known]
    cuts: list[tuple[AxisShard, ...]] = field(default_factory=list)
    """The different types that cut, as they are at the known sizes."""
    formulas: dict[Hashable, list[Formulas]] = field(default_factory=dict)
    trusted: frozenset[tuple[int, int]] = frozenset()
    """The dims (which tensor, which dim) of which a difference was told right."""
    refused: str = ""


@dataclass
class Told:
    """A program that was made of others, and what the rank runs for it. `tried`: whether that is to be compared with one made as ever."""

    program: Program
    functions: Functions
    of: _Kin
    varying: frozenset[tuple[int, int]]
    tried: bool


Holds = Callable[[State], bool]
Follow = Callable[[Any, Sequence[int]], Formulas]


class Resized:
    """The programs of one engine by kind of batch."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kinds: dict[Hashable, list[_Kin]] = {}
        self._new: list[tuple[Hashable, Program]] = []
        """What is still to be read: nothing is, of a run with batches of one shape."""
        self.made = 0
        """How many programs were made of others."""
        self.reasons: dict[str, int] = {}
        """Why others were not."""

    def learn(self, kind: Hashable, program: Program) -> None:
        """Remember a program that was made as ever, and that the engine knows."""
        self._new.append((kind, program))

    def _learn(self, kind: Hashable, program: Program) -> None:
        functions = self._engine.functions(program)
        what, known = _read(program, functions)
        several = self._kinds.setdefault(kind, [])
        kin = next((one for one in several if one.what == what), None)
        if kin is None:
            kin = _Kin(what, program.plan, functions, [], [], refused=_refused(program))
            several.insert(0, kin)
            del several[KIN:]
        kin.living.append(program)
        kin.known = [*(one for one in kin.known if one.sizes != known.sizes), known]
        if len(kin.known) > KEPT:
            kin.known = _spread(kin.known)
        kin.cuts = [*dict.fromkeys(zip(*(one.cuts for one in kin.known), strict=True))]

    def forget(self, program: Program) -> None:
        """The engine does not know this program any more."""
        self._new = [(kind, one) for kind, one in self._new if one is not program]
        for kind, several in list(self._kinds.items()):
            for kin in several:
                kin.living = [one for one in kin.living if one is not program]
            self._kinds[kind] = [kin for kin in several if kin.living]

    def one_of(self, kind: Hashable) -> Captured | None:
        """The capture of a program of this kind of batch, where there are enough to tell others."""
        for found in self._new:
            self._learn(*found)
        self._new = []
        return next((one.living[-1].captured for one in self._kinds.get(kind, ()) if len(one.known) >= LEAST), None)

    def at(self, kind: Hashable, sizes: BatchSizes, signature: BatchSignature, holds: Holds, follow: Follow) -> Told | None:
        """The program for a batch of these sizes, if known ones tell it.

        `holds`: whether what a forward read is so now. `follow(symbol_of, hints)`: the formulas of the forward.
        """
        for kin in self._kinds.get(kind, ()):
            if len(kin.known) >= LEAST and holds(kin.living[-1].captured.state):
                try:
                    return _made(kin, sizes, signature, follow)
                except (Differs, Unseen) as error:
                    self._note(str(error))
        return None

    def add(self, made: Told) -> None:
        """Teach the engine a program that is trusted."""
        self._engine.add_like(made.program, made.of.living[-1], made.functions)
        made.of.living.append(made.program)
        self.made += 1

    def compare(self, made: Told, as_ever: Program) -> None:
        """Compare a program that is not trusted yet with one that was made as ever, and that the engine knows."""
        if code_of(self._engine.functions(as_ever)) == code_of(made.functions) and _outside(as_ever) == _outside(made.program):
            made.of.trusted |= made.varying
        else:
            made.of.refused = "a program that was told by known sizes was another one when it was made"
            self._note(made.of.refused)

    def told(self) -> tuple[str, ...]:
        """How many programs were told by others, and why some were not, for `explain`."""
        lines = [f"{self.made} programs made of the code of others, by numbers alone"] if self.made or self.reasons else []
        return (*lines, *(f"not made of code because {reason} ({times}x)" for reason, times in self.reasons.items()))

    def _note(self, reason: str) -> None:
        if reason in self.reasons or len(self.reasons) < REASONS:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1


def _spread(known: list[_Known]) -> list[_Known]:
    """All but one, between the smallest and the largest: the one that tells least."""
    order = sorted(range(len(known)), key=lambda i: known[i].sizes)
    gaps = {order[at]: _distance(known[order[at - 1]], known[order[at + 1]]) for at in range(1, len(order) - 1)}
    drop = min(gaps, key=lambda i: gaps[i])
    return [one for i, one in enumerate(known) if i != drop]


def _distance(one: _Known, other: _Known) -> int:
    return sum(abs(n - m) for a, b in zip(one.sizes, other.sizes, strict=True) for n, m in zip(a, b, strict=True))


def _made(kin: _Kin, sizes: BatchSizes, signature: BatchSignature, follow: Follow) -> Told:
    if kin.refused:
        raise Differs(kin.refused)
    dims = _varying(kin.known, sizes)
    formulas = _formulas(kin, dims, sizes, follow)
    rows = [formulas.numbers([known.sizes[at][dim] for at, dim in dims.values()]) for known in kin.known]
    like = [i for i, row in enumerate(rows) if row is not None]  # those for which the forward does what it does now
    known = [kin.known[i] for i in like]
    _check_between(known, sizes)
    now = formulas.numbers([values[-1] for values in dims])
    fitted = Fitted([row for row in rows if row is not None], now or ())
    functions = {
        at: with_numbers(graph, _told(fitted, [one.functions[i] for one in known])) for i, (at, graph) in enumerate(kin.functions.items())
    }
    outside = [[int(n) for n in _told(fitted, several)] for several in zip(*(one.outside for one in known), strict=True)]
    now_cut = {several: cut_again(several, fitted) for several in dict.fromkeys(tuple(cuts[i] for i in like) for cuts in kin.cuts)}
    outputs = (now_cut[several] for several in zip(*(one.outputs for one in known), strict=True))
    plan = with_outputs(kin.plan, outputs, signature.key)
    program = _program(kin.living[-1], replace(signature, state=kin.living[-1].signature.state), plan, iter(outside))
    varying = frozenset(dims.values())
    return Told(program, functions, kin, varying, tried=not varying <= kin.trusted)


def _told(fitted: Fitted, several: Sequence[Sequence[Number]]) -> Iterator[Number]:
    return iter([fitted.now(values) for values in zip(*several, strict=True)])


def _varying(known: Sequence[_Known], sizes: BatchSizes) -> dict[tuple[int, ...], tuple[int, int]]:
    """The sizes that differ, those that were always equal taken together: their values -> the first such dim."""
    found: dict[tuple[int, ...], tuple[int, int]] = {}
    for at, shape in enumerate(sizes):
        for dim, now in enumerate(shape):
            values = *(one.sizes[at][dim] for one in known), now
            if any(n != values[0] for n in values):
                found.setdefault(values, (at, dim))
    if len({values[:-1] for values in found}) < len(found):
        raise Differs("two sizes that were equal for the shapes known differ now")
    return found


def _check_between(known: Sequence[_Known], sizes: BatchSizes) -> None:
    flat = [n for shape in sizes for n in shape]
    others = [[n for shape in one.sizes for n in shape] for one in known]
    if len(known) < LEAST:
        raise Differs(f"fewer than {LEAST} known shapes do what this one does")
    below = any(all(n <= m for n, m in zip(one, flat, strict=True)) for one in others)
    above = any(all(n >= m for n, m in zip(one, flat, strict=True)) for one in others)
    if not (below and above):
        raise Differs("it is smaller, or larger, than every shape known")


def _formulas(kin: _Kin, dims: Mapping[tuple[int, ...], tuple[int, int]], sizes: BatchSizes, follow: Follow) -> Formulas:
    """What the forward computes with at these sizes: as it was followed before, where that holds for them."""
    symbols = {values: i for i, values in enumerate(dims)}
    symbol_of = tuple(
        tuple(symbols.get((*(one.sizes[at][dim] for one in kin.known), now)) for dim, now in enumerate(shape))
        for at, shape in enumerate(sizes)
    )
    hints, found = [values[-1] for values in dims], kin.formulas.setdefault(symbol_of, [])
    known = next((one for one in found if one.numbers(hints) is not None), None)
    if known is None:
        known = follow(symbol_of, hints)
        found.insert(0, known)
        del found[KIN:]
    if known.numbers(hints) is None:
        raise Differs("a size has one element or none")
    return known


# ---- reading and making -----------------------------------------------------------------------------------------------------------------


def _refused(program: Program) -> str:
    """Why no other program is made of this one, if none is."""
    state = program.captured.state
    if program.captured.hooks:
        return "hooks that act in backward were captured for one shape"
    if state.numbers or state.inputs:
        return "it takes numbers of Python as inputs"
    return ""


def _read(program: Program, functions: Functions) -> tuple[Any, _Known]:
    what: list[Any] = []
    numbers: list[list[Number]] = []
    for at, graph in functions.items():
        own: list[Number] = []
        what.append((at, [_written(node, own) for node in graph.nodes]))
        numbers.append(own)
    captured = program.captured
    shapes = {str(node.target): infos_of(node)[0] for node in captured.graph.nodes if node.op == "placeholder"}
    sizes = tuple(info.shape for name in captured.inputs if (info := shapes[name]) is not None)
    kinds, cuts, outputs = cuts_of(program.plan)
    what += [kinds, captured.out_leaves, captured.loss, captured.inputs, {k: digest(v) for k, v in captured.constants.items()}]
    what += [dict(captured.experts), [len(shape) for shape in sizes], _stages(program), program.signature.state]
    what.append([(str(place), described(formula)) for place, formula in captured.state.writes.items()])
    return what, _Known(sizes, numbers, [sizes_of(graph) for graph in _graphs(program)], cuts, outputs)


def _written(node: fx.Node, numbers: list[Number]) -> Any:
    args = node.args[1:] if node.op == "call_module" else node.args  # (the key of the program is not a part of it)
    return node.op, node.name, node.target, plain((args, node.kwargs), numbers)


def _stages(program: Program) -> Any:
    return [(s.index, s.receives, s.inputs, s.sends, s.outputs, s.mutations) for s in _cuts(program)]


def _cuts(program: Program) -> list[StageGraph]:
    return [*program.stages, *program.all_stages, *((program.step,) if program.step is not None else ())]


def _graphs(program: Program) -> list[fx.Graph]:
    """All graphs of a program whose inputs and outputs anyone asks for, in the order of `_program`."""
    own = [program.captured.graph, program.graph, *(one.graph for one in _cuts(program))]
    return [*own, *(_graphs(program.counts) if program.counts is not None else [])]


def _program(like: Program, signature: BatchSignature, plan: Plan, sizes: Iterator[list[int]]) -> Program:
    """The program `like` as one sees it from outside, at other sizes."""
    captured = replace(like.captured, graph=outline(like.captured.graph, iter(next(sizes))))
    graph = outline(like.graph, iter(next(sizes)))
    cuts = [replace(one, graph=outline(one.graph, iter(next(sizes)))) for one in _cuts(like)]
    stages, every, step = cuts[: len(like.stages)], cuts[len(like.stages) :][: len(like.all_stages)], cuts[-1:]
    return replace(
        like,
        signature=signature,
        captured=captured,
        plan=plan,
        graph=graph,
        counts=like.counts and _program(like.counts, signature.counting, like.counts.plan, sizes),
        stages=tuple(stages),
        all_stages=tuple(every),
        step=like.step and step[0],
        like=like,
    )


def code_of(functions: Functions) -> Any:
    """All that is printed of the code of some functions."""
    numbers: list[Number] = []
    return [(at, [_written(node, numbers) for node in graph.nodes]) for at, graph in functions.items()], numbers


def _outside(program: Program) -> Any:
    return [sizes_of(graph) for graph in _graphs(program)], [axis.outputs for axis in program.plan.axes]
