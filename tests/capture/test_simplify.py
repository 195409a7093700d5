"""Every cleanup on a small graph: what it leaves, and that the value (and gradient) stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar.capture.export import capture
from meshpar.graph.captured import Captured
from meshpar.graph.facts import info_of
from meshpar.graph.run import run


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(4, dtype=torch.double))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.w, *inputs)


def captured_same(function: Callable[..., Any], *inputs: Tensor) -> Captured:
    torch.manual_seed(0)
    model = Function(function)
    captured = capture(model, inputs)
    (got,) = run(captured, {"w": model.w}, dict(zip(captured.inputs, inputs, strict=True)))
    expected = model(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if expected.requires_grad:
        (ours,), (theirs,) = (torch.autograd.grad(value.square().sum(), [model.w]) for value in (got, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    return captured


def ops(captured: Captured) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in captured.graph.nodes if node.op == "call_function"]


X = torch.randn(3, 4, dtype=torch.double)


@pytest.mark.sweep(10)
@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda w, x: (x + 0) * w, ["mul.Tensor"]),
        (lambda w, x: (x * 1.0 - 0.0) / 1 * w, ["mul.Tensor"]),
        (lambda w, x: (x.long() + 0.0) * w, ["_to_copy.default", "add.Tensor", "mul.Tensor"]),
        (lambda w, x: (x + 1) * w, ["add.Tensor", "mul.Tensor"]),
        (lambda w, x: (x * w).index_put((x > 0,), x.new_tensor(2.0)), ["mul.Tensor", "gt.Scalar", "where.self"]),
        (
            lambda w, x: (x * w).index_put((x[:, 0] > 0,), w),
            ["mul.Tensor", "select.int", "gt.Scalar", "reshape.default", "where.self"],
        ),
        (lambda w, x: x.clone().to(torch.double) * w, ["mul.Tensor"]),
        (lambda w, x: x.detach() * w, ["mul.Tensor"]),
        (lambda w, x: (x * w).detach() * w, ["mul.Tensor", "detach.default", "mul.Tensor"]),
        (lambda w, x: torch.cat([torch.zeros(0, dtype=x.dtype), x * w], 0), ["mul.Tensor"]),
        (lambda w, x: torch.cat([torch.zeros(0), x, x * w], 0), ["mul.Tensor", "cat.default"]),
        (lambda w, x: F.dropout(x, 0.0) * w, ["mul.Tensor"]),
        (lambda w, x: F.dropout(x, 0.5, training=False) * w, ["mul.Tensor"]),
        (lambda w, x: (x * w).view(2, -1), ["mul.Tensor", "reshape.default"]),
        (lambda w, x: (x * w).view(3, 4)[:, :], ["mul.Tensor"]),
        (lambda w, x: (x * w)[::2], ["mul.Tensor", "slice.Tensor"]),
        (lambda w, x: (x * w).expand(2, 3, 4).reshape(-1), ["mul.Tensor", "expand.default", "reshape.default"]),
        (lambda w, x: (x * w).permute(0, 1), ["mul.Tensor"]),
        (lambda w, x: (x[:, :3] * w[:3]).permute(1, 0), ["slice.Tensor", "slice.Tensor", "mul.Tensor", "permute.default"]),
        (lambda w, x: (x * w).t(), ["mul.Tensor", "transpose.int"]),
        (lambda w, x: (x * w).T, ["mul.Tensor", "permute.default"]),
        (lambda w, x: (x * w).mT.contiguous(), ["mul.Tensor", "transpose.int", "clone.default"]),
        (lambda w, x: torch.zeros_like(x).copy_(x[:1] * w), ["slice.Tensor", "mul.Tensor", "expand.default"]),
        (lambda w, x: F.mse_loss(x * w, x), ["mul.Tensor", "mse_loss.default", "mean.default"]),
        (lambda w, x: F.smooth_l1_loss(x * w, x, reduction="sum", beta=0.5), ["mul.Tensor", "smooth_l1_loss.default", "sum.default"]),
        (
            lambda w, x: F.mse_loss(x * w, x[:1], reduction="mean"),
            ["mul.Tensor", "slice.Tensor", "expand.default", "mse_loss.default", "mean.default"],
        ),
        (lambda w, x: F.mse_loss(x * w, x, reduction="none"), ["mul.Tensor", "mse_loss.default"]),
    ],
)
def test_what_is_left(function: Callable[..., Any], left: list[str]) -> None:
    assert ops(captured_same(function, X)) == left


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=torch.double)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_cross_entropy_is_a_sum_over_a_count(weight: Tensor | None, smoothing: float, shape: tuple[int, ...]) -> None:
    target = torch.tensor([0, 3, -7, 1, 2, -7]).view(shape)
    x = torch.randn(*target.shape, 4, dtype=torch.double)

    def loss(w: Tensor, x: Tensor, target: Tensor) -> Tensor:
        logits = (x * w).movedim(-1, 1) if x.dim() == 3 else x * w
        return F.cross_entropy(logits, target, weight, ignore_index=-7, label_smoothing=smoothing)

    captured = captured_same(loss, x, target)
    (result,) = captured.graph.output_node().args[0]  # type: ignore[misc]
    assert result.target is torch.ops.aten.div.Tensor
    total, count = result.args
    assert total.args[3] == 2 and not info_of(count).requires_grad


def test_cross_entropy_left_alone() -> None:
    target = torch.softmax(torch.randn(3, 4, dtype=torch.double), -1)
    assert "div.Tensor" not in ops(captured_same(lambda w, x, t: F.cross_entropy(x * w, t), X, target))
    labels = torch.tensor([0, 1, 2])
    assert "div.Tensor" not in ops(captured_same(lambda w, x, t: F.cross_entropy(x * w, t, reduction="sum"), X, labels))


def test_nll_loss() -> None:
    captured = captured_same(lambda w, x, t: F.nll_loss(F.log_softmax(x * w, -1), t), X, torch.tensor([0, -100, 2]))
    assert ops(captured)[-1] == "div.Tensor"


def test_half_precision_loss_is_summed_in_float32() -> None:
    x, target = torch.randn(70_000, 2, dtype=torch.half), torch.zeros(70_000, dtype=torch.long)
    captured = capture(nn.CrossEntropyLoss(), (x * 4, target))
    (loss,) = run(captured, {}, {"input": x * 4, "target": target})
    assert loss.dtype == torch.half and torch.isfinite(loss)
    torch.testing.assert_close(loss, F.cross_entropy(x.float() * 4, target).half())


def test_sparse_gradients_become_dense() -> None:
    captured = capture(nn.Embedding(5, 3, padding_idx=1, sparse=True), (torch.tensor([0, 2, 2]),))
    (lookup,) = [node for node in captured.graph.nodes if node.op == "call_function"]
    assert lookup.target is torch.ops.aten.embedding.default
    assert lookup.args[2:] == (1, False)
