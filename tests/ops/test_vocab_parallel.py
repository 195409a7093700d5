"""Embedding and cross entropy on a sharded vocabulary against torch's own on the whole one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from meshpar.ops import vocab_parallel
from meshpar.simulate import local_tensors, per_rank, simulate
from tests.ops.layouts import Layout, part
from tests.pool import Pool

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""bfloat16: 8 bits, and torch keeps log-probabilities in it where we keep probabilities."""


def axis(rank: int = -1) -> dict[str, Any]:
    return {"group": dist.group.WORLD.group_name, "size": dist.get_world_size(), "rank": rank}


# ------------------------------------------------------------------------------------------------------------------ embedding

TABLES: dict[str, tuple[int, Layout]] = {
    "plain": (12, (0, 1, ((12, 1),))),
    "uneven": (13, (0, 1, ((13, 1),))),
    "a rank without rows": (5, (0, 1, ((5, 1),))),
    "repeat": (12, (0, 2, ((6, 1),))),
    "segments": (12, (0, 1, ((5, 2), (2, 1)))),
}


@pytest.mark.parametrize("padding", [None, 0, 4])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("size", [2, 4])
def test_embedding(size: int, table: str, padding: int | None) -> None:
    rows, layout = TABLES[table]
    weight = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    ids, grad = torch.arange(2 * rows).view(2, rows) % rows, torch.randn(2, rows, 3, dtype=torch.float64)
    expected = F.embedding(ids, weight, padding)
    (weight_grad,) = torch.autograd.grad(expected, weight, grad)
    with simulate(size):
        local = per_rank(lambda rank: part(weight, layout, size, rank)).requires_grad_()
        out = vocab_parallel.embedding(ids, local, padding, *layout, **axis())
        out.backward(per_rank(lambda _: grad))
        torch.testing.assert_close(sum(local_tensors(out).values()), expected.detach(), rtol=0, atol=0)
        for rank, found in local_tensors(local.grad).items():
            torch.testing.assert_close(found, part(weight_grad, layout, size, rank))


def look_up_outside() -> str:
    rank = dist.get_rank()
    try:
        vocab_parallel.embedding(torch.tensor([1, 12]), torch.randn(6, 2), None, 0, 1, ((12, 1),), **axis(rank))
    except IndexError:
        return "IndexError"
    return "nothing"


def test_an_id_outside_the_table_is_an_error_on_every_rank(gloo: Pool) -> None:
    assert gloo.run(look_up_outside, world=2) == ["IndexError"] * 2


# -------------------------------------------------------------------------------------------------------------- cross entropy

LOGITS: dict[str, tuple[tuple[int, ...], Layout]] = {
    "even": ((7, 12), (1, 1, ((12, 1),))),
    "uneven": ((7, 13), (1, 1, ((13, 1),))),
    "a rank without classes": ((7, 5), (1, 1, ((5, 1),))),
    "images": ((3, 13, 4), (1, 1, ((13, 1),))),
    "one sample": ((12,), (0, 1, ((12, 1),))),
    "repeat": ((7, 12), (1, 2, ((6, 1),))),
    "segments": ((7, 12), (1, 1, ((5, 2), (2, 1)))),
}


def problem(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype, reduction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits, target with ignored places, class weights, gradient of the loss)."""
    classes = shape[layout[0]]
    target = torch.randint(0, classes, shape[: layout[0]] + shape[layout[0] + 1 :])
    if target.dim():
        target.view(-1)[::3] = -100
    grad = torch.randn(target.shape if reduction == "none" else (), dtype=dtype)
    return 3 * torch.randn(shape, dtype=dtype), target, torch.rand(classes, dtype=dtype), grad


@pytest.mark.sweep(19)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "class weights"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", LOGITS)
def test_cross_entropy(case: str, dtype: torch.dtype, weighted: bool, smoothing: float) -> None:
    shape, layout = LOGITS[case]
    size, close = (4, {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]})
    for reduction in ("sum", "none"):
        logits, target, weight, grad = problem(shape, layout, dtype, reduction)
        weight = weight if weighted else None
        whole = logits.clone().requires_grad_()
        expected = F.cross_entropy(whole, target, weight, reduction=reduction, label_smoothing=smoothing)
        (logits_grad,) = torch.autograd.grad(expected, whole, grad)
        with simulate(size):
            local = per_rank(lambda rank, x=logits: part(x, layout, size, rank)).requires_grad_()
            loss = vocab_parallel.cross_entropy(local, target, weight, *layout, reduction=reduction, label_smoothing=smoothing, **axis())
            loss.backward(per_rank(lambda _, g=grad: g))
            for rank in range(size):
                torch.testing.assert_close(local_tensors(loss)[rank], expected.detach(), **close)
                torch.testing.assert_close(local_tensors(local.grad)[rank], part(logits_grad, layout, size, rank), **close)


def cross_entropy_on_a_real_rank() -> list[Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    logits, target, _, _ = problem((7, 13), (1, 1, ((13, 1),)), torch.float64, "sum")
    local = part(logits, (1, 1, ((13, 1),)), size, rank).requires_grad_()
    kept = local.detach().clone()
    loss = vocab_parallel.cross_entropy(local, target, None, 1, 1, ((13, 1),), ignore_index=-100, **axis(rank))
    loss.backward()
    assert local.equal(kept), "the logits were changed in place"
    return [loss.detach(), local.grad, logits, target]


def test_cross_entropy_on_gloo_ranks(gloo: Pool) -> None:
    (loss, grad0, logits, target), (loss1, grad1, *_) = gloo.run(cross_entropy_on_a_real_rank, world=2)
    whole = logits.requires_grad_()
    expected = F.cross_entropy(whole, target, reduction="sum")
    expected.backward()
    assert loss.equal(loss1)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(torch.cat([grad0, grad1], 1), whole.grad)


def test_cross_entropy_keeps_one_tensor_of_the_size_of_the_local_logits() -> None:
    kept: list[int] = []
    with simulate(2):
        logits = per_rank(lambda _: torch.randn(8, 50)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            vocab_parallel.cross_entropy(logits, torch.arange(8), None, 1, 1, ((100, 1),), **axis())
    assert kept.count(8 * 50) == 1
    assert sum(kept) <= 8 * 50 + 6 * 8


def test_cross_entropy_reduces_three_numbers_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    real = vocab_parallel.call
    monkeypatch.setattr(vocab_parallel, "call", lambda op, x, *rest: sent.append(x.numel()) or real(op, x, *rest))
    with simulate(2):
        logits = per_rank(lambda _: torch.randn(8, 50)).requires_grad_()
        vocab_parallel.cross_entropy(logits, torch.arange(8), None, 1, 1, ((100, 1),), **axis()).backward()
    assert sent == [8, 16]
    bytes_sent = [2 * n * 4 // 2 for n in sent]  # ring all-reduce on two ranks, float32
    assert [t.nbytes for t in vocab_parallel.cross_entropy_traffic(8, torch.float32, 2)] == bytes_sent


def test_a_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="'sum' or 'none'"):
        vocab_parallel.cross_entropy(torch.randn(2, 4), torch.zeros(2).long(), None, 1, 1, ((4, 1),), reduction="mean", **{**NOWHERE})


NOWHERE: dict[str, Any] = {"group": "", "size": 1, "rank": 0}


def test_an_axis_of_one_rank_is_torchs_own() -> None:
    logits, target, weight, _ = problem((7, 12), (1, 1, ((12, 1),)), torch.float32, "sum")
    found = vocab_parallel.cross_entropy(logits, target, weight, 1, 1, ((12, 1),), label_smoothing=0.1, **NOWHERE)
    assert found.equal(F.cross_entropy(logits, target, weight, reduction="sum", label_smoothing=0.1))
