"""Plain attention by kernels that return the log-sum-exp: the same as in tiles; which pairs they compute; a kernel that is not exact."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meshpar.ops import blockwise, fused_attention, tiles
from meshpar.ops.blockwise import apart, attend_, attend_backward_
from meshpar.ops.pairings import Pairing, Sight, Stretch
from meshpar.ops.tiles import ScoreStep, Scoring, nothing_yet

HEAD_TAIL = ((Stretch(0, 0, 96), Stretch(96, 288, 96)), (Stretch(0, 96, 96), Stretch(96, 192, 96)))
"""What two ranks hold of 384 positions."""
SINK: tuple[ScoreStep, ...] = (("times", 0.5), ("sink", 0))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...], bool]]]:
    """Of each call of a kernel: which way, the queries and keys, and whether it is causal."""
    made = list[tuple[str, tuple[int, ...], bool]]()
    cpu = fused_attention._KERNELS["flash, cpu"]

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        made.append(("forward", (q.shape[2], k.shape[2]), causal))
        return cpu.forward(q, k, v, causal, scale)

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        made.append(("backward", (q.shape[2], k.shape[2]), causal))
        return cpu.backward(grad, q, k, v, out, norm, causal, scale)

    monkeypatch.setitem(fused_attention._KERNELS, "flash, cpu", fused_attention.FusedAttention(forward, backward))
    fused_attention.fused_attention_for(*(torch.ones(1, 1, 1, 1) for _ in range(3)))
    yield made


def ring(dtype: torch.dtype, scoring: Scoring, kv: int = 2, width: int = 8) -> list[Tensor]:
    """Results, sums of scores and gradients of the first rank's queries, which meet its own keys and then the other's."""
    numbers = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 192, n, width, generator=numbers, dtype=torch.float64).to(dtype).transpose(1, 2) for n in (4, kv, kv, 4)]
    q, k, v, grad = drawn
    others = [torch.randn(2, kv, 192, width, generator=numbers, dtype=torch.float64).to(dtype) for _ in range(2)]
    sink = torch.randn(1, 4, 1, 1, generator=numbers, dtype=torch.float64).to(dtype).expand(1, 4, 192, 1)
    operands = [sink] if scoring.sink_of([sink]) is not None else []
    out, norm = nothing_yet(q, width, scoring.sink_of(operands))
    meeting = [(k, v, Pairing(HEAD_TAIL[0], HEAD_TAIL[0]).numbers), (*others, Pairing(*HEAD_TAIL).numbers)]
    for key, value, pairings in meeting:
        attend_(q, key, value, operands, pairings, scoring.written, out, norm)
    found, delta = out.to(dtype), (out * grad).sum(-1)
    of_query = torch.zeros_like(out)
    gradients = [of_query]
    for key, value, pairings in meeting:
        sums = [tiles.wide(torch.zeros_like(x)) for x in (key, value)]
        rest = q, key, value, operands, pairings, scoring.written, grad, found, norm, delta
        attend_backward_(*rest, of_query, *sums, [torch.zeros(1)] * len(operands))
        gradients += sums
    return [out, norm.sum(-1), *gradients]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scoring", [Scoring(True, None, 0.3), Scoring(False, None, 0.3), Scoring(True, 100, 0.3, SINK)], ids=str)
def test_kernels_compute_what_tiles_do(dtype: torch.dtype, scoring: Scoring, calls: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    right = ring(torch.float64, replace(scoring)) if dtype != torch.float64 else None
    calls.clear()
    by_kernels = ring(dtype, scoring)
    assert calls
    with sdpa_kernel([SDPBackend.MATH]):
        calls.clear()
        in_tiles = ring(dtype, scoring)
        assert not calls, "torch was told to use no kernel"
    for one, other, exact in zip(by_kernels, in_tiles, right or in_tiles, strict=True):
        error, bound = float((one - exact).abs().max()), float((other - exact).abs().max())
        assert error <= 4 * bound + 8 * torch.finfo(dtype).eps * float(exact.abs().max())


def test_which_pairs_a_kernel_computes(calls: list[tuple[str, tuple[int, ...], bool]]) -> None:
    """Keys that all are seen are one block, those of the queries' own positions another; nothing is computed of what nobody sees."""
    ring(torch.float32, Scoring(True))
    own = [((96, 96), True), ((96, 96), False), ((96, 96), True)]
    assert [(shape, causal) for way, shape, causal in calls if way == "forward"] == [*own, ((96, 192), False)]
    assert [(shape, causal) for way, shape, causal in calls if way == "backward"] == [*own, ((96, 192), False)]


@pytest.mark.parametrize("window", [None, 40, 96, 200, 500])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_and_the_rest_are_all_pairs_that_are_seen(causal: bool, window: int | None) -> None:
    keys = (Stretch(0, 96, 96), Stretch(96, 0, 96), Stretch(192, 288, 70), Stretch(262, 358, 26))
    queries = (Stretch(0, 288, 70), Stretch(70, 96, 96), Stretch(166, 380, 30), Stretch(196, 0, 96), Stretch(292, 500, 64))
    sight = Sight(causal, window)
    at_of = [torch.cat([torch.arange(at, at + size) for _, at, size in several]) for several in (queries, keys)]
    behind = at_of[0][:, None] - at_of[1]
    seen = torch.ones_like(behind, dtype=torch.bool) if not causal and window is None else behind >= 0
    seen &= behind < (window or 10**6)
    found = torch.zeros_like(behind)
    whole, rest = apart(Pairing(queries, keys), sight)
    for (row, rows), (column, columns), diagonal in whole:
        block = torch.ones(rows, columns, dtype=torch.long)
        found[row : row + rows, column : column + columns] += block.tril() if diagonal else block
    for one in rest.queries if rest is not None else ():
        found[one.held : one.held + one.size] += seen[one.held : one.held + one.size]
    assert torch.equal(found, seen.long())
    assert bool(whole) == (window != 40), "a window narrower than the blocks leaves none"


def test_what_is_added_to_scores_is_done_in_tiles(calls: list[object]) -> None:
    q, k, v = (torch.randn(1, 2, 128, 8) for _ in range(3))
    calls.clear()
    whole = Pairing((Stretch(0, 0, 128),), (Stretch(0, 0, 128),)).numbers
    for steps in ((("tanh",),), (("plus", 0),), (("seen", 1),), (("times", 2.0), ("tanh",))):
        operands = [torch.zeros(1, 1, 128, 128), torch.ones(1, 1, 128, 128, dtype=torch.bool)]
        attend_(q, k, v, operands, whole, Scoring(True, steps=steps).written, *nothing_yet(q, 8))
    short = Pairing((Stretch(0, 0, 63),), (Stretch(0, 0, 63),)).numbers
    attend_(q, k, v, [], short, Scoring(True).written, *nothing_yet(q, 8))
    attend_(q, k, v[..., :4], [], whole, Scoring(True).written, *nothing_yet(q, 4))  # of values that are narrower: torch has none
    assert not calls


@pytest.mark.parametrize("wrong", ["results", "log-sum-exp", "gradients", "refuses"])
def test_a_kernel_that_does_not_compute_this_is_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = fused_attention._KERNELS["flash, cpu"]

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, norm = cpu.forward(q, k, v, causal, scale)
        return (out * 1.001, norm) if wrong == "results" else (out, norm * 1.4427) if wrong == "log-sum-exp" else (out, norm)

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if wrong == "refuses":
            raise RuntimeError("no kernel for this")
        own = cpu.forward(q, k, v, causal, scale) if wrong == "gradients" else (out, norm)  # as if there were no other keys
        return cpu.backward(grad, q, k, v, *own, causal, scale)

    monkeypatch.setitem(fused_attention._KERNELS, "flash, cpu", fused_attention.FusedAttention(forward, backward))
    fused_attention._proved.cache_clear()
    said = "cannot be called" if wrong == "refuses" else "not exact"
    with pytest.warns(UserWarning, match=said):
        found = ring(torch.float64, Scoring(True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        ring(torch.float64, Scoring(True))
    monkeypatch.undo()
    fused_attention._proved.cache_clear()
    monkeypatch.setattr(blockwise, "LEAST", 10**6)
    apart.cache_clear()
    in_tiles = ring(torch.float64, Scoring(True))
    apart.cache_clear()
    assert all(torch.equal(x, y) for x, y in zip(found, in_tiles, strict=True))


def test_gradients_and_results_of_any_strides() -> None:
    q, k, v = (torch.randn(1, 2, 128, 8, dtype=torch.float64) for _ in range(3))
    whole, how = Pairing((Stretch(0, 0, 128),), (Stretch(0, 0, 128),)).numbers, Scoring(True).written
    out, norm = nothing_yet(q, 8)
    attend_(q, k, v, [], whole, how, out, norm)
    found = list[list[Tensor]]()
    for grad, result in ((torch.ones_like(out), out), (torch.ones((), dtype=out.dtype).expand_as(out), out.mT.contiguous().mT)):
        found.append([torch.zeros_like(x) for x in (q, k, v)])
        attend_backward_(q, k, v, [], whole, how, grad, result, norm, (out * grad).sum(-1), *found[-1], [])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_asking_draws_no_number() -> None:
    before = torch.get_rng_state()
    fused_attention._proved.cache_clear()
    assert fused_attention.fused_attention_for(*(torch.ones(1, 1, 64, 8) for _ in range(3))) is not None
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("name", "group"), [("flash", 1), ("flash", 2), ("efficient", 1)])
def test_operators_of_accelerators_take_these_arguments(name: str, group: int) -> None:
    """Their shapes, on `meta`: what they compute is seen on an accelerator, before they are used there."""
    q, k, v = (torch.empty(2, n, 70, 16, dtype=torch.bfloat16, device="meta") for n in (2 * group, 2, 2))
    kernel = fused_attention._KERNELS[name]
    out, norm = kernel.forward(q, k, v, True, 0.3)
    assert out.shape == q.shape and norm.shape == q.shape[:3] and norm.dtype == torch.float32
    assert [x.shape for x in kernel.backward(q, q, k, v, out, norm, True, 0.3)] == [x.shape for x in (q, k, v)]
