"""Every rule against the operator itself: each typing it allows, run on the parts of real tensors, gives the parts of the real result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import meshpar.ops.ctc
import meshpar.ops.expect  # noqa: F401  (both register operators)
from meshpar.graph.facts import Facts, Info, set_facts
from meshpar.graph.operators import OPERATORS, add_rule
from meshpar.mesh import Axis
from meshpar.passes.lower import Lower
from meshpar.plan import AxisPlan, NodePlan
from meshpar.sharding.infer import infer
from meshpar.sharding.price import Price
from meshpar.sharding.types import I, Partial, Shard, Type
from meshpar.sharding.typings import Choice, choices

aten, ours = torch.ops.aten, torch.ops.meshpar
SIZE = 2


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


# operator, arguments, and the least number of typings that cut something
CASES: list[tuple[Any, tuple[Any, ...], int]] = [
    (aten.linear.default, (x(4, 6, 8), x(10, 8), x(10)), 4),
    (aten.linear.default, (x(4, 6, 8), x(10, 8)), 4),
    (aten.mm.default, (x(4, 6), x(6, 8)), 3),
    (aten.bmm.default, (x(4, 6, 8), x(4, 8, 2)), 4),
    (aten.addmm.default, (x(8), x(4, 6), x(6, 8)), 3),
    (aten.addmm.default, (x(4, 8), x(4, 6), x(6, 8)), 3),
    (aten.baddbmm.default, (x(4, 6, 2), x(4, 6, 8), x(4, 8, 2)), 4),
    (aten.matmul.default, (x(4, 2, 6, 8), x(4, 2, 8, 4)), 5),
    (aten.matmul.default, (x(4, 6, 8), x(8)), 3),
    (aten.matmul.default, (x(8), x(8, 4)), 2),
    (aten.matmul.default, (x(4, 6, 8), x(8, 4)), 4),
    (aten.mv.default, (x(4, 6), x(6)), 2),
    (aten.dot.default, (x(6), x(6)), 1),
    (aten.einsum.default, ("bsh,ehf->besf", [x(4, 6, 8), x(2, 8, 10)]), 5),
    (aten.scaled_dot_product_attention.default, (x(4, 2, 6, 8), x(4, 2, 10, 8), x(4, 2, 10, 4)), 2),
    (aten.scaled_dot_product_attention.default, (x(4, 2, 6, 8), x(4, 2, 10, 8), x(4, 2, 10, 4), x(4, 1, 6, 10)), 2),
    (aten.scaled_dot_product_attention.default, (x(4, 2, 6, 8), x(4, 2, 10, 8), x(4, 2, 10, 4), x(6, 10)), 2),
    (aten.convolution.default, (x(4, 6, 8, 8), x(10, 6, 3, 3), x(10), [1, 1], [0, 0], [1, 1], False, [0, 0], 1), 3),
    (aten.conv1d.default, (x(4, 6, 8), x(6, 1, 3), x(6), [1], [2], [1], 6), 2),
    (aten.conv2d.default, (x(4, 6, 8, 8), x(10, 6, 3, 3)), 3),
    (aten.embedding.default, (x(12, 8), ids(12, 4, 6)), 4),
    (aten.embedding.default, (x(13, 8), ids(13, 4, 6), 3), 4),
    (aten.index.Tensor, (x(4, 6, 8), [None, ids(6, 4)]), 3),
    (aten.index.Tensor, (x(6, 4), [ids(6, 2, 4), ids(4, 2, 4)]), 2),
    (aten.index_select.default, (x(4, 6), 1, ids(6, 4)), 2),
    (aten.gather.default, (x(4, 6), 1, ids(6, 4, 2)), 1),
    (aten.scatter.src, (x(4, 6), 1, ids(6, 4, 2), x(4, 2)), 1),
    (aten.scatter.value, (x(4, 6), 1, ids(6, 4, 2), 1.0), 1),
    (aten.one_hot.default, (ids(6, 4, 2), 6), 2),
    (aten.layer_norm.default, (x(4, 6, 8), [8], x(8), x(8)), 2),
    (aten.layer_norm.default, (x(4, 6, 8), [6, 8], x(6, 8), x(6, 8)), 1),
    (aten.rms_norm.default, (x(4, 6, 8), [8], x(8)), 2),
    (aten.group_norm.default, (x(4, 6, 8), 2, x(6), x(6)), 1),
    (aten._native_batch_norm_legit_no_training.default, (x(4, 6, 8), x(6), x(6), x(6), x(6).abs(), 0.1, 1e-5), 3),
    (aten.native_batch_norm.default, (x(4, 6, 8), x(6), x(6), None, None, True, 0.1, 1e-5), 1),
    (aten.softmax.int, (x(4, 6, 8), -1), 2),
    (aten._log_softmax.default, (x(4, 6, 8), 1, False), 2),
    (aten.cross_entropy_loss.default, (x(12, 10), ids(10, 12), None, 2, -100), 1),
    (aten.cross_entropy_loss.default, (x(12, 10), ids(10, 12), x(10).abs(), 0, 3), 1),
    (aten.sum.dim_IntList, (x(4, 6, 8), [1], True), 3),
    (aten.sum.default, (x(4, 6, 8),), 3),
    (aten.mean.dim, (x(4, 6, 8), [0, 2]), 3),
    (aten.mean.default, (x(4, 6),), 2),
    (aten.amax.default, (x(4, 6, 8), [1]), 2),
    (aten.max.dim, (x(4, 6, 8), 1), 2),
    (aten.argmax.default, (x(4, 6, 8), -1), 2),
    (aten.logsumexp.default, (x(4, 6, 8), [-1]), 2),
    (aten.var.correction, (x(4, 6, 8), [1]), 2),
    (aten.linalg_vector_norm.default, (x(4, 6, 8), 2, [-1], True), 2),
    (aten.topk.default, (x(4, 6), 2), 1),
    (aten.sort.default, (x(4, 6), 0), 1),
    (aten.cumsum.default, (x(4, 6), 1), 1),
    (aten.pad.default, (x(4, 6), [1, 1]), 1),
    (aten.max_pool2d.default, (x(4, 6, 8, 8), [2, 2]), 2),
    (aten.adaptive_avg_pool2d.default, (x(4, 6, 8, 8), [1, 1]), 2),
    (aten.add.Tensor, (x(4, 1, 8), x(6, 8)), 3),
    (aten.add.Tensor, (x(4, 6), 1.0), 2),
    (aten.add.Tensor, (x(4, 6), x(4, 6)), 2),
    (aten.sub.Tensor, (x(4, 6), x(6)), 2),
    (aten.rsub.Scalar, (x(4, 6), 1.0), 2),
    (aten.mul.Tensor, (x(4, 6), x(6)), 2),
    (aten.mul.Tensor, (x(4, 6), 3.0), 2),
    (aten.div.Tensor, (x(4, 6), x(4, 1)), 2),
    (aten.div.Scalar, (x(4, 6), 3.0), 2),
    (aten.where.self, (ids(2, 4, 6).bool(), x(4, 6), x(6)), 2),
    (aten.masked_fill.Scalar, (x(4, 6), ids(2, 4, 6).bool(), 0.0), 2),
    (aten.gelu.default, (x(4, 6),), 2),
    (aten.pow.Tensor_Scalar, (x(4, 6), 2), 2),
    (aten.maximum.default, (x(4, 6), x(4, 6)), 2),
    (aten._to_copy.default, (x(4, 6),), 2),
    (aten.view.default, (x(4, 48), [4, 6, 8]), 3),
    (aten.reshape.default, (x(4, 6, 8), [24, 8]), 3),
    (aten.reshape.default, (x(4, 6, 8), [2, 2, 48]), 4),
    (aten.reshape.default, (x(4, 6), [8, 3]), 2),
    (aten.transpose.int, (x(4, 6, 8), 1, -1), 3),
    (aten.permute.default, (x(4, 6, 8), [2, 0, 1]), 3),
    (aten.movedim.int, (x(4, 6, 8), 0, 2), 3),
    (aten.unsqueeze.default, (x(4, 6), 1), 2),
    (aten.squeeze.dim, (x(4, 1, 6), 1), 2),
    (aten.expand.default, (x(4, 1, 6), [4, 8, -1]), 3),
    (aten.expand.default, (x(6), [4, 6]), 2),
    (aten.split.Tensor, (x(4, 24), 8, 1), 1),
    (aten.split_with_sizes.default, (x(4, 24), [16, 4, 4], 1), 1),
    (aten.chunk.default, (x(4, 24), 3, 1), 1),
    (aten.cat.default, ([x(4, 6), x(4, 8)], 1), 1),
    (aten.cat.default, ([x(4, 1), x(4, 8)], 1), 1),
    (aten.stack.default, ([x(4, 6), x(4, 6)], 1), 2),
    (aten.slice.Tensor, (x(4, 8), 1, 2, 6), 1),
    (aten.slice.Tensor, (x(4, 8), 1, 0, 9223372036854775807), 2),
    (aten.slice.Tensor, (x(4, 8), 1, 0, 8, 2), 1),
    (aten.slice.Tensor, (x(4, 8), 1, -4, 9223372036854775807), 1),
    (aten.select.int, (x(4, 6, 8), 1, 2), 2),
    (aten.unbind.int, (x(4, 3, 8), 1), 2),
    (aten.flip.default, (x(4, 6), [1]), 1),
    (aten.roll.default, (x(4, 6), [1], [1]), 1),
    (aten.triu.default, (x(4, 6, 6), 1), 1),
    (aten.repeat.default, (x(4, 6), [2, 1, 2]), 3),
    (aten.repeat_interleave.self_int, (x(4, 6), 2, 1), 3),
    (aten.clone.default, (x(4, 6),), 2),
    (aten.zeros_like.default, (x(4, 6),), 2),
    (aten.new_zeros.default, (x(4, 6), [4, 8]), 2),
    (aten.full.default, ([4, 8], 2.0), 2),
    (aten.dropout.default, (x(4, 6), 0.0, True), 2),
    # what a rule once got wrong
    (aten.pad.default, (x(4, 6, 8), [0, 0, 1, -1]), 2),
    (aten.constant_pad_nd.default, (x(4, 6, 8), [1, -1]), 2),
    (aten.avg_pool2d.default, (x(4, 6, 8), [3, 3], [1, 1], [1, 1]), 1),
    (aten.max_pool1d.default, (x(4, 6), [3], [1], [1]), 1),
    (aten.kthvalue.default, (x(4, 6, 8), 2, 1), 2),
    (aten.split_with_sizes.default, (x(4, 8), [0, 4, 4], 1), 1),
    (aten.slice.Tensor, (x(4, 8), 1, 2, 2), 1),
    (aten.mT.default, (x(2, 4, 6),), 3),
    (aten.swapaxes.default, (x(4, 6, 8), 0, 2), 3),
    (aten.einsum.default, ("...c,dc->...d", [x(4, 6, 8), x(10, 8)]), 4),
    (aten.einsum.default, ("...ij,...jk->...ik", [x(4, 1, 6, 8), x(2, 8, 10)]), 4),
    (aten.conv_transpose2d.input, (x(4, 6, 4, 4), x(6, 8, 2, 2), x(8), [2, 2]), 3),
    (aten.convolution.default, (x(4, 6, 8), x(6, 4, 3), None, [1], [0], [1], True, [0], 1), 3),
    (aten.bilinear.default, (x(4, 6), x(4, 8), x(10, 6, 8), x(10)), 4),
    (aten.cdist.default, (x(2, 4, 6), x(2, 8, 6)), 3),
    (aten.glu.default, (x(4, 12), -1), 2),
    (aten.glu.default, (x(4, 2, 6), 1), 2),
    (aten.prelu.default, (x(4, 6, 8), x(6)), 3),
    (aten.prelu.default, (x(4, 6, 8), x(1)), 3),
    (aten.lstm.input, (x(4, 6, 8), [x(1, 4, 2), x(1, 4, 2)], [x(8, 8), x(8, 2)], False, 1, 0.0, True, False, True), 1),
    (aten.gru.input, (x(6, 4, 8), x(2, 4, 2), [x(6, 8), x(6, 2), x(6, 8), x(6, 2)], False, 1, 0.0, True, True, False), 1),
    (aten.nll_loss_nd.default, (x(4, 10, 6), ids(10, 4, 6), None, 2), 2),
    (aten.nll_loss_nd.default, (x(4, 10), ids(10, 4), x(10), 0), 1),
    (aten.mse_loss.default, (x(4, 6), x(6), 0), 2),
    (aten.binary_cross_entropy_with_logits.default, (x(4, 6), x(4, 6), None, x(6), 0), 2),
    (aten.upsample_bilinear2d.vec, (x(4, 6, 4, 4), [8, 8], False, None), 2),
    (aten.adaptive_max_pool2d.default, (x(4, 6, 8, 8), [2, 2]), 2),
    (aten.where.ScalarSelf, (ids(2, 4, 6).bool(), 1.0, x(4, 6)), 2),
    (aten.masked_fill.Tensor, (x(4, 6), ids(2, 4, 6).bool(), torch.tensor(1.0, dtype=torch.float64)), 2),
    (aten.copy.default, (x(4, 6), x(6)), 2),
    (aten.view_as_complex.default, (x(4, 6, 2),), 2),
    (aten.view_as_real.default, (torch.complex(x(4, 6), x(4, 6)),), 2),
    (aten.slice_scatter.default, (x(4, 6), x(4, 2), 1, 2, 4), 1),
    (aten.type_as.default, (x(6), x(2, 4, 8)), 1),
    (aten.multiply.Tensor, (x(4, 6), x(6)), 2),
    (aten.divide.Tensor, (x(4, 6), x(4, 1)), 2),
    (aten.subtract.Tensor, (x(4, 6), x(6)), 2),
    (aten.greater.Scalar, (x(4, 6), 0.0), 2),
    (aten._weight_norm.default, (x(4, 6, 8), x(4, 1, 1), 0), 1),
    (aten._weight_norm.default, (x(4, 6, 8), x(1, 1, 8), 2), 1),
    (aten.unfold.default, (x(4, 6, 8), 1, 3, 1), 2),
    (aten.log_sigmoid.default, (x(4, 6),), 2),
    (aten.select_scatter.default, (x(4, 6, 8), x(4, 8), 1, 2), 2),
    (aten.scaled_dot_product_attention.default, (x(4, 2, 6, 8), x(4, 1, 10, 8), x(4, 1, 10, 4), x(4, 1, 6, 10)), 2),
    (aten.scaled_dot_product_attention.default, (x(4, 2, 6, 8), x(4, 1, 10, 8), x(4, 1, 10, 4), x(4, 2, 6, 10)), 2),
    (aten.im2col.default, (x(4, 6, 5, 5), [3, 3], [1, 1], [1, 1], [2, 2]), 2),
    (aten.im2col.default, (x(6, 5, 5), [3, 1], [1, 1], [1, 0], [1, 1]), 1),
    (aten.col2im.default, (x(4, 54, 9), [5, 5], [3, 3], [1, 1], [0, 0], [1, 1]), 2),
    (aten.fft_fftn.default, (x(4, 6, 8), None, [1]), 2),
    (aten.index_add.default, (x(4, 6), 0, ids(4, 8), x(8, 6)), 1),
    (aten.index_add.default, (x(4, 6, 2), 1, torch.tensor([3]), x(4, 1, 2)), 2),
    (aten.diff.default, (x(4, 6), 1, -1, x(4, 1)), 1),
    (aten.diff.default, (x(4, 6, 2), 2, 1, None, x(4, 3, 2)), 2),
    (aten.__and__.Tensor, (ids(2, 4, 1, 8).bool(), ids(2, 6, 8).bool()), 3),
    (ours.ctc_loss.default, (x(7, 4, 6).log_softmax(-1), ids(5, 4, 3) + 1, torch.full((4,), 7), torch.tensor([3, 1, 0, 2]), 0, True), 1),
    (ours.ctc_loss.default, (x(7, 4, 6).log_softmax(-1), ids(5, 6) + 1, torch.full((4,), 7), torch.tensor([3, 1, 0, 2]), 0, True), 0),
    (aten.matmul.default, (x(2, 6, 8), x(2, 1, 8, 4)), 5),
    (aten.matmul.default, (x(2, 1, 6, 8), x(2, 8, 4)), 5),
    (aten.cdist.default, (x(4, 6, 8), x(4, 1, 2, 8)), 4),
    (aten.squeeze.dim, (x(2, 1, 6), 0), 2),
    (aten.squeeze.default, (x(2, 1, 6),), 2),
    (aten.squeeze.dims, (x(2, 1, 2, 4), [0, 1, 2]), 3),
    (aten.lstm_cell.default, (x(4, 6), [x(4, 2), x(4, 2)], x(8, 6), x(8, 2), x(8), x(8)), 1),
    (aten.gru_cell.default, (x(4, 6), x(4, 2), x(6, 6), x(6, 2)), 1),
    (aten.cosine_similarity.default, (x(4, 6, 8), x(6, 8)), 2),
    (aten.cosine_similarity.default, (x(4, 1, 8), x(4, 6, 8), 0), 2),
    (aten.hardswish.default, (x(4, 6),), 2),
    (ours.expect.default, (torch.tensor([[3, 1], [0, 2]]), [3, 1, 0, 2], ""), 0),
]  # fmt: skip


@pytest.mark.sweep(31)
@pytest.mark.parametrize(("target", "args", "least"), CASES, ids=[f"{c[0].__name__}-{i}" for i, c in enumerate(CASES)])
def test_every_typing_computes_the_operator(target: Any, args: tuple[Any, ...], least: int) -> None:
    graph, tensors = _graph(target, args)
    expected = target(*args)
    node = next(n for n in graph.nodes if n.op == "call_function")
    inference = infer(graph)
    call = inference.calls[node]
    assert call.signature is not None, "the operator has no rule"
    factors = {
        f
        for axes in inference.dims.values()
        for one in axes
        if one is not None
        for f in (*inference.extents.leaves(one), inference.extents.find(one))
    }
    found = choices(call, inference, sorted(factors), SIZE, Price(), 1.0)
    for choice in found:
        if call.signature.gathers & set(choice.why.split()):
            continue  # needs its collectives: see the operator's own tests
        _check(graph, node, tensors, expected, choice)
    assert sum(any(isinstance(t, Shard) for t in (*c.uses, *c.outs)) for c in found) >= least, [c.why for c in found]


def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail: softmax must not be cut along its own dim."""
    monkeypatch.setitem(OPERATORS, "softmax", OPERATORS["softmax"])  # put back afterwards
    add_rule("softmax", "a b -> a b")
    with pytest.raises(AssertionError):
        test_every_typing_computes_the_operator(aten.softmax.int, (x(4, 6), -1), 1)


def _graph(target: Any, args: tuple[Any, ...]) -> tuple[fx.Graph, list[Tensor]]:
    graph, tensors = fx.Graph(), list[Tensor]()

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            node = graph.placeholder(f"x{len(tensors)}")
            set_facts(node, Facts(_info(value)))
            return node
        return [placed(v) for v in value] if isinstance(value, list) else value

    placed_args = tuple(placed(a) for a in args)
    node = graph.call_function(target, placed_args)
    out = target(*args)
    set_facts(node, Facts(tuple(_info(o) for o in out) if isinstance(out, (tuple, list)) else _info(out)))
    graph.output((node,))
    return graph, tensors


def _info(value: Tensor) -> Info:
    return Info(tuple(value.shape), value.dtype, value.is_floating_point())


def _check(graph: fx.Graph, node: fx.Node, tensors: Sequence[Tensor], expected: Any, choice: Choice) -> None:
    plan = {n.name: NodePlan((), (t,), "") for n, t in zip((n for n in graph.nodes if n.op == "placeholder"), choice.uses, strict=True)}
    plan[node.name] = NodePlan(choice.uses, choice.outs, "")
    results = []
    for rank in range(SIZE):
        axis = Axis("tp", SIZE, rank, "")
        single = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for n in graph.nodes:
            if n.op == "output":
                single.output((mapping[node],) if len(choice.outs) == 1 else ())
            else:
                mapping[n] = single.node_copy(n, mapping.__getitem__)
        lowered = Lower(AxisPlan("tp", SIZE, plan, choice.outs if len(choice.outs) == 1 else ()), axis)(single)
        made = next(n for n in reversed(lowered.nodes) if n.op == "call_function")
        lowered.erase_node(next(n for n in reversed(lowered.nodes) if n.op == "output"))
        lowered.output(made)
        run = fx.GraphModule(torch.nn.Module(), lowered)
        results.append(run(*(_part(t, type_, rank) for t, type_ in zip(tensors, choice.uses, strict=True))))
    outs = expected if isinstance(expected, (tuple, list)) else (expected,)
    for index, (want, type_) in enumerate(zip(outs, choice.outs, strict=True)):
        have = [r[index] if isinstance(expected, (tuple, list)) else r for r in results]
        _compare(have, want, type_, choice)


def _part(full: Tensor, type_: Type, rank: int) -> Tensor:
    if isinstance(type_, Partial):
        share = torch.sin(torch.arange(full.numel(), dtype=torch.float64)).reshape(full.shape)
        return full * 0 + share if rank == 0 else full - share
    if isinstance(type_, Shard):
        return torch.cat([full.narrow(type_.dim, a, b - a) for a, b in type_.ranges(SIZE, rank)], type_.dim)
    return full.clone()


def _compare(have: Sequence[Tensor], want: Tensor, type_: Type, choice: Choice) -> None:
    close: Callable[..., None] = torch.testing.assert_close
    if isinstance(type_, Partial):
        close(sum(have), want, msg=lambda m: f"{choice}: {m}")
        return
    for rank, part in enumerate(have):
        close(part.contiguous(), _part(want, type_, rank).contiguous(), msg=partial("{} on rank {}: {}".format, choice, rank))


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.cholesky_inverse.default, (torch.eye(4, dtype=torch.float64),)),
        (aten.view.dtype, (x(4, 6), torch.int64)),
        (aten.take_along_dim.default, (x(4, 6), ids(6, 5))),
        (aten.embedding.default, (x(12, 8), ids(12, 4), -1, True)),
        (aten.scatter.src, (x(4, 6), 1, ids(6, 4, 2), x(6, 2))),
        (aten.fft_fftn.default, (x(4, 6), [8], [1])),
        (aten.sort.default, (x(),)),
        (aten.scatter.value, (x(), 0, ids(1), 1.0)),
        (aten.index_select.default, (x(), 0, ids(1))),
    ],
)
def test_operators_without_a_rule_run_whole(target: Any, args: tuple[Any, ...]) -> None:
    graph, _ = _graph(target, args)
    inference = infer(graph)
    call = next(iter(inference.calls.values()))
    assert call.signature is None
    found = choices(call, inference, range(4), SIZE, Price(), 1.0)
    assert set((*found[0].uses, *found[0].outs)) == {I}
    assert not any(isinstance(t, Shard) for c in found for t in (*c.uses, *c.outs))
