"""What is said of operators on parts holds: run on the parts of two ranks, results and gradients are those of the whole, as said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from meshpar.graph.facts import Facts, Info, set_facts
from meshpar.graph.op import Op, op_name, read
from meshpar.proof.static.actions import action_of
from meshpar.proof.static.experts import stacked
from meshpar.proof.static.forms import AS_RESULT, PARTIAL, WHOLE, Outcome, through
from meshpar.proof.static.moves import Level, is_move, moved
from meshpar.proof.static.report import Contradiction, Unproved
from meshpar.sharding.types import I, P, Partial, Shard, Type, local_shape, plain

aten, ours = torch.ops.aten, torch.ops.meshpar
RANKS = 2


def t(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).add_(0.1).requires_grad_()


def n(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


@dataclass
class Sample:
    """A call; `local` tells what its arguments are for these parts where sizes are among them."""

    target: Any
    args: tuple[Any, ...]
    local: Callable[[tuple[Any, ...], tuple[int, ...]], tuple[Any, ...]] | None = None


def sized(place: int) -> Callable[[tuple[Any, ...], tuple[int, ...]], tuple[Any, ...]]:
    return lambda args, shape: (*args[:place], list(shape), *args[place + 1 :])


def samples() -> dict[str, Sample]:
    torch.manual_seed(0)
    x, y, w = t(4, 6, 8), t(4, 6, 8), t(10, 8)
    return {
        "linear": Sample(aten.linear.default, (x, w, t(10))),
        "linear without bias": Sample(aten.linear.default, (x, w)),
        "mm": Sample(aten.mm.default, (t(4, 6), t(6, 8))),
        "bmm": Sample(aten.bmm.default, (t(4, 6, 8), t(4, 8, 2))),
        "addmm": Sample(aten.addmm.default, (t(8), t(4, 6), t(6, 8))),
        "baddbmm": Sample(aten.baddbmm.default, (t(4, 6, 2), t(4, 6, 8), t(4, 8, 2))),
        "matmul": Sample(aten.matmul.default, (t(2, 4, 6, 8), t(2, 4, 8, 2))),
        "einsum": Sample(aten.einsum.default, ("bid,bjd->bij", [t(2, 4, 8), t(2, 6, 8)])),
        "einsum of any lead": Sample(aten.einsum.default, ("...id,...jd->...ij", [t(2, 4, 8), t(2, 6, 8)])),
        "conv1d": Sample(aten.conv1d.default, (t(4, 6, 8), t(4, 6, 3), t(4))),
        "add": Sample(aten.add.Tensor, (x, t(6, 8))),
        "add of a number": Sample(aten.add.Tensor, (x, 1.0)),
        "sub": Sample(aten.sub.Tensor, (x, y)),
        "mul": Sample(aten.mul.Tensor, (x, t(4, 1, 8))),
        "mul by itself": Sample(aten.mul.Tensor, (x, x)),
        "div": Sample(aten.div.Tensor, (x, y)),
        "exp": Sample(aten.exp.default, (x,)),
        "neg": Sample(aten.neg.default, (x,)),
        "gelu": Sample(aten.gelu.default, (x,)),
        "where": Sample(aten.where.self, (n(2, 4, 6, 8).bool(), x, y)),
        "to float32": Sample(aten._to_copy.default, (x,)),
        "softmax": Sample(aten.softmax.int, (x, -1)),
        "cumsum": Sample(aten.cumsum.default, (x, 1)),
        "tril": Sample(aten.tril.default, (x,)),
        "flip": Sample(aten.flip.default, (x, [1])),
        "sum": Sample(aten.sum.dim_IntList, (x, [1])),
        "sum of all": Sample(aten.sum.default, (x,)),
        "mean": Sample(aten.mean.dim, (x, [0, 2], True)),
        "amax": Sample(aten.amax.default, (x, [1])),
        "logsumexp": Sample(aten.logsumexp.default, (x, [2])),
        "topk": Sample(aten.topk.default, (x, 2, 1)),
        "layer_norm": Sample(aten.layer_norm.default, (x, [8], t(8), t(8))),
        "group_norm": Sample(aten.group_norm.default, (t(4, 8, 6), 2, t(8), t(8))),
        "embedding": Sample(aten.embedding.default, (t(12, 8), n(12, 4, 6))),
        "index": Sample(aten.index.Tensor, (t(4, 12, 8), [None, n(12, 6)])),
        "index_select": Sample(aten.index_select.default, (x, 1, n(6, 4))),
        "gather": Sample(aten.gather.default, (x, 2, n(8, 4, 6, 2))),
        "scatter_add": Sample(aten.scatter_add.default, (x, 2, n(8, 4, 6, 2), t(4, 6, 2))),
        "index_add": Sample(aten.index_add.default, (x, 1, n(6, 4), t(4, 4, 8))),
        "slice_scatter": Sample(aten.slice_scatter.default, (x, t(4, 2, 8), 1, 0, 2)),
        "pad": Sample(aten.constant_pad_nd.default, (x, [1, 1], 0.0)),
        "one_hot": Sample(aten.one_hot.default, (n(4, 4, 6), 4)),
        "cross_entropy sum": Sample(aten.cross_entropy_loss.default, (t(8, 10), n(10, 8), None, 2)),
        "cross_entropy none": Sample(aten.cross_entropy_loss.default, (t(8, 10), n(10, 8), None, 0)),
        "weighed cross_entropy": Sample(aten.cross_entropy_loss.default, (t(8, 10), n(10, 8), torch.rand(10).double(), 2)),
        "mse": Sample(aten.mse_loss.default, (x, y, 0)),
        "attention": Sample(aten.scaled_dot_product_attention.default, (t(2, 4, 6, 8), t(2, 4, 6, 8), t(2, 4, 6, 8))),
        "causal attention": Sample(
            aten.scaled_dot_product_attention.default, (t(2, 4, 6, 8), t(2, 4, 6, 8), t(2, 4, 6, 8), None, 0.0, True)
        ),
        "masked attention": Sample(
            aten.scaled_dot_product_attention.default, (t(2, 4, 6, 8), t(2, 4, 6, 8), t(2, 4, 6, 8), t(2, 1, 6, 6).detach())
        ),
        "max_pool1d": Sample(aten.max_pool1d.default, (x, [2])),
        "glu": Sample(aten.glu.default, (x, -1)),
        "dispatch": Sample(ours.dispatch.default, (t(8, 4), n(4, 8, 2), 4)),
        # what only rearranges
        "reshape": Sample(aten.reshape.default, (t(4, 6, 8), [4, 6, 2, 4]), sized(1)),
        "reshape together": Sample(aten.reshape.default, (t(4, 6, 8), [24, 8]), sized(1)),
        "transpose": Sample(aten.transpose.int, (x, 1, 2)),
        "permute": Sample(aten.permute.default, (x, [2, 0, 1])),
        "unsqueeze": Sample(aten.unsqueeze.default, (x, 1)),
        "select": Sample(aten.select.int, (x, 1, 2)),
        "expand": Sample(aten.expand.default, (t(4, 1, 8), [4, 6, 8]), sized(1)),
        "cat": Sample(aten.cat.default, ([x, y], 1)),
        "cat of equal parts": Sample(aten.cat.default, ([x, y], 0)),
        "stack": Sample(aten.stack.default, ([x, y], 1)),
        "repeat": Sample(aten.repeat.default, (x, [1, 2, 1])),
        "repeat_interleave": Sample(aten.repeat_interleave.self_int, (x, 2, 1)),
        "unbind": Sample(aten.unbind.int, (x, 0)),
    }


SAMPLES = samples()


def call_of(sample: Sample) -> tuple[Op, list[Tensor], Callable[[list[Tensor], tuple[int, ...]], list[Tensor]]]:
    """The call as a node of a graph, its operands, and how it runs on others."""
    graph, tensors = fx.Graph(), list[Tensor]()

    def node(value: Any) -> Any:
        if isinstance(value, Tensor):
            same = next((i for i, one in enumerate(tensors) if one is value), None)
            if same is not None:
                return list(graph.nodes)[same]
            tensors.append(value)
            made = graph.placeholder(f"x{len(tensors)}")
            return set_facts(made, Facts(Info(tuple(value.shape), value.dtype, value.requires_grad)))
        return [node(v) for v in value] if isinstance(value, list) else value

    args = tuple(node(a) for a in sample.args)
    out = sample.target(*sample.args)
    outs = out if isinstance(out, (list, tuple)) else (out,)
    infos = tuple(Info(tuple(o.shape), o.dtype, o.requires_grad) for o in outs)
    made = set_facts(graph.call_function(sample.target, args), Facts(infos if len(infos) > 1 else infos[0]))

    def run(given: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
        values = dict(zip([n for n in graph.nodes if n.op == "placeholder"], given, strict=True))
        local = fx.map_arg(args, values.__getitem__)
        found = sample.target(*(local if sample.local is None else sample.local(local, shape)))
        return list(found) if isinstance(found, (list, tuple)) else [found]

    return read(made), tensors, run


def typings(op: Op) -> Iterator[tuple[Type, ...]]:
    """All ways in which operands can lie."""
    each = [
        [I, *([P] if info.dtype.is_floating_point else []), *(plain(d, size) for d, size in enumerate(info.shape) if size % RANKS == 0)]
        for info in op.infos
    ]
    return product(*each)  # type: ignore[return-value]


def parts(x: Tensor, type_: Type) -> list[Tensor]:
    if isinstance(type_, Shard):
        found = [torch.cat([x.narrow(type_.dim, a, b - a) for a, b in type_.pieces(RANKS, r)], type_.dim) for r in range(RANKS)]
    elif isinstance(type_, Partial):
        some = torch.randn_like(x) if x.dtype.is_floating_point else torch.zeros_like(x)
        found = [some, x - some]
    else:
        found = [x] * RANKS
    return [one.detach().clone().requires_grad_(x.requires_grad) for one in found]


def whole(values: list[Tensor], like: Tensor, type_: Type) -> Tensor:
    if isinstance(type_, Partial):
        return values[0] + values[1]
    if isinstance(type_, Shard):
        found = torch.empty_like(like)
        for r, value in enumerate(values):
            at = 0
            for a, b in type_.pieces(RANKS, r):
                found.narrow(type_.dim, a, b - a).copy_(value.narrow(type_.dim, at, b - a))
                at += b - a
        return found
    assert torch.allclose(values[0], values[1]), "said to be the same on all ranks"
    return values[0]


def derived(op: Op, types: tuple[Type, ...]) -> Outcome:
    if is_move(op.name):
        level = Level(RANKS, tuple(i.shape for i in op.infos), tuple(o.shape for o in op.outs if o is not None))
        back = (AS_RESULT if all(t == I for t in types) else WHOLE,) * len(types)
        return Outcome(moved(op, types, level), back)
    action = action_of(op)
    assert action is not None
    return through(action, types, RANKS)


def holds(op: Op, tensors: list[Tensor], run: Any, types: tuple[Type, ...], outcome: Outcome) -> None:
    torch.manual_seed(1)
    shape = op.out.shape
    wanted = run(tensors, shape)
    given = [parts(x, types[_place(op, i)]) for i, x in enumerate(tensors)]
    found = [run([g[r] for g in given], local_shape(shape, outcome.outs[0], RANKS, r)) for r in range(RANKS)]
    for i, (value, type_) in enumerate(zip(wanted, outcome.outs, strict=True)):
        if op.name == "meshpar.dispatch" and i != 1:
            continue  # rows in another order
        got = whole([f[i] for f in found], value, type_)
        assert torch.allclose(got.to(value.dtype), value), f"{op_name(op.node.target)} {types} -> {outcome.outs}"
    first = wanted[0]
    if first.requires_grad and op.name != "meshpar.dispatch":
        _gradients(op, tensors, given, found, first, types, outcome)


def _place(op: Op, index: int) -> int:
    """The operand that the index-th tensor is."""
    return next(i for i, node in enumerate(op.operands) if node.name == f"x{index + 1}")


def _gradients(
    op: Op, tensors: list[Tensor], given: list[list[Tensor]], found: list[list[Tensor]], first: Tensor, types: Any, outcome: Outcome
) -> None:
    seed = torch.randn_like(first)
    needing = [i for i, x in enumerate(tensors) if x.requires_grad]
    wanted = torch.autograd.grad(first, [tensors[i] for i in needing], seed, allow_unused=True)
    seeds = parts(seed, outcome.outs[0]) if isinstance(outcome.outs[0], Shard) else [seed.detach()] * RANKS
    local = [
        torch.autograd.grad(found[r][0], [given[i][r] for i in needing], seeds[r].detach(), allow_unused=True, materialize_grads=True)
        for r in range(RANKS)
    ]
    for at, (i, right) in enumerate(zip(needing, wanted, strict=True)):
        if right is None:
            continue
        place, values = _place(op, i), [local[r][at] for r in range(RANKS)]
        kind = outcome.back[place]
        type_: Type = P if kind is PARTIAL else types[place] if isinstance(types[place], Shard) else I
        assert torch.allclose(whole(values, right, type_), right), (
            f"{op_name(op.node.target)} {types}: gradient of operand {place} is {kind}"
        )


@pytest.mark.sweep(52)
@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_derived_holds(name: str) -> None:
    op, tensors, run = call_of(SAMPLES[name])
    proved = 0
    for types in typings(op):
        if any(a == b and types[i] != types[j] for i, a in enumerate(op.operands) for j, b in enumerate(op.operands)):
            continue  # one value has one type
        try:
            outcome = derived(op, types)
        except (Contradiction, Unproved):
            continue
        holds(op, tensors, run, types, outcome)
        proved += any(t != I for t in types)
    assert proved, "nothing is proved of any part"


def test_experts_of_pending_sums_are_stacked_as_any_values_are() -> None:
    """Nothing is on a rank alone, and nothing is cut: a stack of sums is a sum of stacks. Beside a part it is no stack of the model's."""
    stack = Sample(aten.stack.default, ([t(3, 4), t(3, 4)],))
    op, _, _ = call_of(stack)
    assert stacked(op, (P, P)) is None
    with pytest.raises(Contradiction, match="lie in different ways"):
        stacked(op, (P, Shard(0)))
