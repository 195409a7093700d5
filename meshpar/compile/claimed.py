"""Rules from outside, tried before they are used: what `add_rule` says of an operator is run on drawn values, forward and backward.

    mp.add_rule("mylib.unit_gradient", "n c -> n c")         # its backward gives g / |g| of each row

    cut into n: x[:2], x[2:]       parts of the result, parts of the gradient               holds
    cut into c: x[:, :3], x[:, 3:] parts of the result, but |g| of a part is not that of g  refused

Every typing that the rule allows is lowered as any call is, and run on the parts that two ranks would hold. The results must be parts of
the whole result (shares of it where they are pending sums), and the gradients parts or shares of the whole gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from meshpar.capture.functions.operators import ForeignOperator
from meshpar.capture.functions.proofs import draws, sizes
from meshpar.capture.stand_in import aside
from meshpar.errors import PlanError, raise_all
from meshpar.graph.facts import Facts, Info, facts, set_facts
from meshpar.graph.op import operands
from meshpar.graph.operators import draws as draws_numbers
from meshpar.graph.operators import operator_of
from meshpar.mesh import Axis
from meshpar.ops.own_backward import ExampleCall
from meshpar.passes.lower import Lower
from meshpar.plan import AxisPlan, NodePlan
from meshpar.sharding.infer import infer
from meshpar.sharding.price import Price
from meshpar.sharding.types import P, Partial, R, Ragged, Shard, Type
from meshpar.sharding.typings import Choice, choices

RANKS = 2
TOLERANCE = 1e-5
"""Of the largest element: above the rounding of sums in float32."""
_WAY_OUT = "Put [brackets] around what must be whole, leave out of linear= what it is not linear in, or give no rule: it then runs whole."
_tried: dict[tuple[Any, ...], str] = {}
"""What was wrong with a call, "" for nothing: models repeat their calls, and steps their graphs."""


def check_rules(graph: fx.Graph) -> None:
    """Try every rule of `add_rule` that this graph would use. Raises PlanError for those that do not hold, once for each operator."""
    complaints = dict[str, None]()
    for node in graph.nodes:
        claim = operator_of(node.target).claim if node.op == "call_function" else None
        if claim is None or draws_numbers(node):
            continue
        complaint = _complaint(node, claim)
        if complaint:
            where = f"{facts(node).module or 'the model'} ({facts(node).source or 'source unknown'})"
            complaints[f"{node.target} in {where}, with the rule {claim!r}: {complaint}. {_WAY_OUT}"] = None
    raise_all(PlanError, "Rules given to add_rule that do not hold:", list(complaints))


def _complaint(node: fx.Node, claim: str) -> str:
    operator = ForeignOperator(node.target, node.args, node.kwargs)
    fixed = str(fx.node.map_arg((node.args, node.kwargs), lambda n: "*"))
    key = node.target, claim, operator_of(node.target), fixed, operator.tensors, facts(node).nature
    if key not in _tried:
        _tried[key] = aside(lambda: _first_complaint(node, operator))
    return _tried[key]


def _first_complaint(node: fx.Node, operator: ForeignOperator) -> str:
    trials = list(_trials(node, operator))
    if not trials:
        warnings.warn(
            f"{node.target}: its rule could not be tried, since the operator takes none of the values that were drawn for it. "
            "It is used as it was given; mp.verify(model, mesh, batch) tells whether it holds.",
            stacklevel=2,
        )
    return next((complaint for trial in trials if (complaint := trial.complaint())), "")


def _trials(node: fx.Node, operator: ForeignOperator) -> Iterator[_TypingRun]:
    """Every typing on every draw, at the first sizes and in the first dtype in which the operator runs."""
    for examples in sizes(operator.tensors):
        for dtype in (torch.double, None):
            found = [whole for values in draws(examples, dtype=dtype) if (whole := _whole(operator, examples, values)) is not None]
            if found:
                call, typings = _typings(node, found[0])
                yield from (_TypingRun(call, whole, typing) for whole in found for typing in typings)
                return


@dataclass(frozen=True, eq=False)
class _Whole:
    """A call on one device: `results` of `operands`, and for each operand the gradient that `gradients` of the results give it."""

    examples: tuple[ExampleCall, ...]
    operands: list[Tensor]
    results: list[Tensor]
    gradients: list[Tensor]
    found: list[Tensor | None]


def _whole(operator: ForeignOperator, examples: tuple[ExampleCall, ...], values: list[Tensor]) -> _Whole | None:
    """None where the operator does not take these values: there is nothing to learn from them."""
    generator = torch.Generator().manual_seed(2)
    try:
        leaves, results = operator.under_autograd(values)
        gradients = [torch.randn(r.shape, dtype=torch.double, generator=generator).to(r.dtype) for r in results]
        found = _gradients(leaves, results, gradients)
    except Exception:  # whatever it is
        return None
    finite = all(bool(torch.isfinite(x).all()) for x in (*results, *found) if x is not None)
    return _Whole(examples, values, results, gradients, found) if finite and results else None


def _gradients(leaves: Sequence[Tensor], results: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """That of each leaf; None for those that need none."""
    pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if r.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not wanted:
        return [None] * len(leaves)
    got = torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, materialize_grads=True)
    by_leaf = iter(got)
    return [next(by_leaf) if leaf.requires_grad else None for leaf in leaves]


def _typings(node: fx.Node, whole: _Whole) -> tuple[fx.Node, tuple[Choice, ...]]:
    """The call at the sizes of a draw, alone in a graph, and what its rule allows there."""
    graph = fx.Graph()
    infos = iter(Info(tuple(x.shape), x.dtype, e.needs_grad) for x, e in zip(whole.operands, whole.examples, strict=True))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: _placeholder(graph, next(infos)))
    assert callable(node.target)
    call = graph.call_function(node.target, args, kwargs)
    results = tuple(Info(tuple(r.shape), r.dtype, r.requires_grad) for r in whole.results)
    set_facts(call, replace(facts(node), info=results if isinstance(facts(node).info, tuple) else results[0]))
    graph.output(())
    inference = infer(graph)
    bound, extents = inference.calls[call], inference.extents
    every = [one for dims in inference.dims.values() for one in dims if one is not None]
    factors = sorted({f for one in every for f in (*extents.leaves(one), *extents.cuttable(one), extents.find(one))})
    found = choices(bound, inference, factors, RANKS, Price(), 1.0)
    return call, tuple(c for c in found if not any(isinstance(t, Ragged) for t in (*c.uses, *c.outs)))


def _placeholder(graph: fx.Graph, info: Info) -> fx.Node:
    node = graph.placeholder(f"x{len(graph.nodes)}")
    set_facts(node, Facts(info))
    return node


@dataclass(frozen=True, eq=False)
class _TypingRun:
    """One typing of a call, run as two ranks would."""

    call: fx.Node
    whole: _Whole
    typing: Choice

    def complaint(self) -> str:
        """What two ranks would get wrong; "" where they are right."""
        try:
            ranks = [self._run(rank) for rank in range(RANKS)]
        except Exception as error:
            return f"{self._told} it raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for i, (want, type_) in enumerate(zip(self.whole.results, self.typing.outs, strict=True)):
            if not _agree([results[i] for results, _ in ranks], want, type_):
                return f"{self._told} result {i} is not a part of the whole one" + " (or a share of it)" * (type_ == P)
        for i, (gradient, type_) in enumerate(zip(self.whole.found, self.typing.uses, strict=True)):
            if gradient is not None and not _agree([found[i] for _, found in ranks], gradient, _DUAL.get(type_, type_)):
                return f"{self._told} the gradient of operand {i} is not a part of the whole one (or a share of it)"
        return ""

    @property
    def _told(self) -> str:
        return f"over {RANKS} ranks as {', '.join(map(str, self.typing.uses))} -> {', '.join(map(str, self.typing.outs))}"

    def _run(self, rank: int) -> tuple[list[Tensor], list[Tensor | None]]:
        parts = [_part(x, t, rank) for x, t in zip(self.whole.operands, self.typing.uses, strict=True)]
        leaves = [x.detach().requires_grad_(e.needs_grad) for x, e in zip(parts, self.whole.examples, strict=True)]
        with torch.enable_grad():
            given = self._lowered(rank)(*leaves)
        results = [r for r in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(r, Tensor)]
        duals = [_DUAL.get(t, t) for t in self.typing.outs]
        return results, _gradients(leaves, results, [_part(g, t, rank) for g, t in zip(self.whole.gradients, duals, strict=True)])

    def _lowered(self, rank: int) -> fx.GraphModule:
        """The call as this rank makes it."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.call.graph.nodes:
            if node.op != "output":
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(())
        types = dict(zip(operands(self.call), self.typing.uses, strict=True))
        plan = {node.name: NodePlan((), (type_,), "") for node, type_ in types.items()}
        plan[self.call.name] = NodePlan(self.typing.uses, self.typing.outs, "")
        lowered = Lower(AxisPlan("tp", RANKS, plan, ()), Axis("tp", RANKS, rank, ""))(graph)
        made = [n for n in lowered.nodes if n.op == "call_function" and n.target is self.call.target][-1]
        lowered.erase_node(next(iter(reversed(lowered.nodes))))
        lowered.output(made)
        return fx.GraphModule(nn.Module(), lowered)


_DUAL: dict[Type, Type] = {P: R, R: P}
"""What the gradient of a value is, where it is not what the value is."""


def _part(whole: Tensor, type_: Type, rank: int) -> Tensor:
    """What a rank holds of a value."""
    if isinstance(type_, Shard):
        return torch.cat([whole.narrow(type_.dim, a, b - a) for a, b in type_.ranges(RANKS, rank)], type_.dim)
    if isinstance(type_, Partial) and whole.is_floating_point():
        share = torch.randn(whole.shape, dtype=torch.double, generator=torch.Generator().manual_seed(4)).to(whole.dtype) * whole.abs().max()
        return share if rank == 0 else whole - share
    return whole.clone()


def _agree(ranks: Sequence[Tensor | None], whole: Tensor, type_: Type) -> bool:
    """Whether what the ranks hold is the whole value."""
    held = [x for x in ranks if x is not None]
    if isinstance(type_, Partial):
        return len(held) == RANKS and _close(sum(held[1:], held[0]), whole)
    return len(held) == RANKS and all(_close(x, _part(whole, type_, rank)) for rank, x in enumerate(held))


def _close(x: Tensor, y: Tensor) -> bool:
    x, y = x.detach(), y.detach()
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not x.is_floating_point():
        return torch.equal(x, y)
    scale = float(y.abs().max()) if y.numel() else 0.0
    return bool(((x - y).abs() <= TOLERANCE * max(scale, 1e-30)).all())
