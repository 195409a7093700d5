"""Attention of parts of a sequence: local ranges, a ring, a halo, against attention of the whole, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import meshpar as mp
from meshpar.ops import pairings, ring
from meshpar.ops.context import causal_attention
from meshpar.ops.halo import halo_attention, windowed_attention
from meshpar.ops.ring import ring_attention
from meshpar.sharding.extents import dealt_out
from meshpar.sharding.types import Shard
from meshpar.simulate import local_tensors, per_rank

S = 16
LAYOUTS = [((S, 1),), dealt_out(S, 2), dealt_out(S, 4)]
"""In one piece, a piece of the beginning with one of the end, and four pieces: single positions on four ranks."""


def whole(causal: bool, window: int | None) -> Tensor:
    behind = torch.arange(S)[:, None] - torch.arange(S)
    seen = behind >= 0 if causal else torch.ones(S, S, dtype=torch.bool)
    return seen if window is None else seen & (behind < window)


def taken(x: Tensor, cut: Shard, size: int, rank: int) -> Tensor:
    return torch.cat([x.detach()[:, :, low:high] for low, high in cut.ranges(size, rank)], 2)


def agrees(
    op: Callable[..., Tensor], size: int, segments: tuple[tuple[int, int], ...], mask: Tensor, heads: tuple[int, int], gathered: bool
) -> float:
    """The largest difference of results and gradients of `op(q, k, v, dim, repeat, segments, group=...)` from attention in one piece."""
    torch.manual_seed(0)
    cut = Shard(2, 1, segments)
    inputs = [torch.randn(2, n, S, d, dtype=torch.float64, requires_grad=True) for n, d in ((heads[0], 8), (heads[1], 8), (heads[1], 6))]
    right = F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)
    grad = torch.randn_like(right)
    wanted = torch.autograd.grad(right, inputs, grad)
    with mp.simulate(size):
        group = mp.make_mesh(f"cp={size}").get_group("cp").group_name
        parts = [per_rank(lambda rank, x=x: taken(x, cut, size, rank)).requires_grad_() for x in inputs]
        if gathered:
            parts[1:] = [per_rank(lambda rank, x=x: x.detach()).requires_grad_() for x in inputs[1:]]
        out = op(*parts, 2, 1, segments, enable_gqa=True, group=group, size=size, rank=-1)
        found = torch.autograd.grad(out, parts, per_rank(lambda rank: taken(grad, cut, size, rank)))
        worst = [0.0]
        for got, want in zip((out, *found), (right, *wanted), strict=True):
            local = local_tensors(got)
            if got.shape == want.shape:  # gathered: every rank has a part of the sum
                worst.append(float((sum(local.values()) - want).abs().max()))
            else:
                worst += [float((x - taken(want, cut, size, rank)).abs().max()) for rank, x in local.items()]
    return max(worst)


@pytest.mark.parametrize("segments", LAYOUTS, ids=["contiguous", "head-tail", "four"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=["grouped", "one"])
@pytest.mark.parametrize("size", [2, 4])
class TestForms:
    @pytest.mark.parametrize("window", [None, 5])
    def test_gathered(self, size: int, heads: tuple[int, int], segments: tuple[tuple[int, int], ...], window: int | None) -> None:
        def op(*args: object, **how: object) -> Tensor:
            return causal_attention(*args, window=window, **how)  # type: ignore[arg-type]

        assert agrees(op, size, segments, whole(True, window), heads, True) < 1e-13

    @pytest.mark.sweep(16)
    @pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 5)])
    def test_ring(
        self,
        size: int,
        heads: tuple[int, int],
        segments: tuple[tuple[int, int], ...],
        causal: bool,
        window: int | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(pairings, "SIDE", 3)

        def op(*args: object, **how: object) -> Tensor:
            return ring_attention(*args[:3], [], *args[3:], causal=causal, window=window, **how)  # type: ignore[arg-type]

        assert agrees(op, size, segments, whole(causal, window), heads, False) < 1e-13

    @pytest.mark.sweep(16)
    @pytest.mark.parametrize("window", [1, 3, 13])
    def test_halo(self, size: int, heads: tuple[int, int], segments: tuple[tuple[int, int], ...], window: int) -> None:
        """Also where a window reaches over the whole of the rank before."""

        def op(*args: object, **how: object) -> Tensor:
            return halo_attention(*args, window=window, **how)  # type: ignore[arg-type]

        assert agrees(op, size, segments, whole(True, window), heads, False) < 1e-13


def test_a_window_of_a_whole_sequence() -> None:
    q, k, v = (torch.randn(1, 2, S, 4) for _ in range(3))
    torch.testing.assert_close(windowed_attention(q, k, v, window=5), F.scaled_dot_product_attention(q, k, v, attn_mask=whole(True, 5)))


def test_queries_that_see_nothing_yet_are_not_nan() -> None:
    """In a ring the first part that arrives may be all in the future."""
    cut = ((S, 1),)
    assert agrees(lambda *a, **k: ring_attention(*a[:3], [], *a[3:], causal=True, **k), 4, cut, whole(True, None), (2, 2), False) < 1e-13


def test_causal_work_is_shared_alike() -> None:
    """Pairs of positions by rank: 1.5 of the mean in one piece on 2 ranks, the mean itself from both ends."""

    def share(segments: tuple[tuple[int, int], ...], size: int) -> float:
        work = [sum(sum(range(low + 1, high + 1)) for low, high in Shard(0, 1, segments).ranges(size, rank)) for rank in range(size)]
        return max(work) * size / sum(work)

    n = 4096
    assert [round(share(((n, 1),), size), 2) for size in (2, 4, 8)] == [1.5, 1.75, 1.87]
    assert all(share(((n // 2, 1), (-n // 2, 1)), size) < 1.001 for size in (2, 4, 8))


def test_a_ring_sends_beside_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values before they are met here; sums of gradients beside the next step, but for the last."""
    said = list[str]()
    start, meet, turn = ring.start_rotated, ring._meet, ring._return

    def starting(x: Tensor, axis: tuple[str, int, int]) -> Callable[[], Tensor]:
        number = sum(word.startswith("send") for word in said)
        said.append(f"send {number}")
        finish = start(x, axis)
        return lambda: (said.append(f"came {number}"), finish())[1]

    def told(name: str, fn: Callable[..., None]) -> Callable[..., None]:
        def run(how: Any, step: int, key: Any, value: Any, rank: int, *tensors: Tensor) -> None:
            if rank == 0:
                said.append(f"{name} {step}")
            fn(how, step, key, value, rank, *tensors)

        return run

    monkeypatch.setattr(ring, "start_rotated", starting)
    monkeypatch.setattr(ring, "_meet", told("meet", meet))
    monkeypatch.setattr(ring, "_return", told("return", turn))
    with mp.simulate(3):
        group = mp.make_mesh("cp=3").get_group("cp").group_name
        q, k, v = (per_rank(lambda rank: torch.randn(1, 2, 4, 8)).requires_grad_() for _ in range(3))
        out = ring.ring_attention(q, k, v, [], 2, 1, ((12, 1),), group=group, size=3, rank=-1)
        assert said == ["send 0", "meet 0", "came 0", "send 1", "meet 1", "came 1", "meet 2"]
        said.clear()
        out.sum().backward()
    first = ["send 0", "return 0", "send 1", "came 0"]
    second = ["send 2", "return 1", "came 1", "send 3", "came 2"]
    assert said == [*first, *second, "return 2", "came 3", "send 4", "came 4"]
