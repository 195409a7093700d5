"""Attention with gathered keys and values: exact, one message each way, and a rank keeps its own part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import meshpar as mp
from meshpar.dry_run.tape import MachineTape, alive
from meshpar.ops import context, gathered
from meshpar.ops.collectives import s_to_r
from meshpar.ops.context import causal_attention
from meshpar.ops.gathered import gathered_attention
from meshpar.sharding.types import Shard
from meshpar.simulate import local_tensors, per_rank
from tests.ops.test_context import LAYOUTS, agrees, taken, whole
from tests.pool import Pool


@pytest.mark.sweep(19)
@pytest.mark.parametrize("segments", LAYOUTS, ids=["contiguous", "head-tail", "four"])
@pytest.mark.parametrize("size, heads", [(2, (4, 2)), (4, (3, 1))])
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 5)])
@pytest.mark.parametrize("repeats", [False, True], ids=["grouped", "repeated"])
def test_exact(
    size: int,
    heads: tuple[int, int],
    segments: tuple[tuple[int, int], ...],
    causal: bool,
    window: int | None,
    repeats: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`repeats`: as on devices whose kernels with a mask know no grouped heads."""
    monkeypatch.setattr(context, "TABLE", 64)  # a few queries at a time
    monkeypatch.setattr(context, "repeats_heads", lambda query: repeats)
    monkeypatch.setattr(gathered, "repeats_heads", lambda query: repeats)

    def op(*args: Any, **how: Any) -> Tensor:
        return gathered_attention(*args[:3], None, *args[3:], keys=segments, causal=causal, window=window, **how)

    assert agrees(op, size, segments, whole(causal, window), heads, False) < 1e-13


@pytest.mark.parametrize("kind", ["booleans", "trained"])
def test_masks(kind: str) -> None:
    """Cut along their queries. One that is trained gets its gradient; queries that see nothing are no NaN."""
    torch.manual_seed(0)
    cut, size = Shard(2, 1, LAYOUTS[1]), 2
    q, k, v = (torch.randn(2, n, 16, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    seen = torch.rand(2, 1, 16, 16) < 0.6
    seen[0, :, 3] = False
    mask = seen if kind == "booleans" else torch.randn(1, 4, 16, 16, dtype=torch.float64, requires_grad=True)
    trained = [q, k, v] + [mask] * mask.requires_grad
    right = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    wanted = torch.autograd.grad(right, trained, grad := torch.randn_like(right))
    with mp.simulate(size):
        group = mp.make_mesh("cp=2").get_group("cp").group_name
        parts = [per_rank(lambda rank, x=x: taken(x, cut, size, rank)).requires_grad_(x.requires_grad) for x in (q, k, v, mask)]
        how: dict[str, Any] = {"keys": cut.segments, "enable_gqa": True, "group": group, "size": size, "rank": -1}
        out = gathered_attention(*parts, 2, 1, cut.segments, **how)
        found = torch.autograd.grad(out, parts[: len(trained)], per_rank(lambda rank: taken(grad, cut, size, rank)))
        for got, want in zip((out, *found), (right, *wanted), strict=True):
            for rank, x in local_tensors(got).items():
                torch.testing.assert_close(x, taken(want, cut, size, rank), rtol=0, atol=1e-13)


def kept_bytes() -> dict[str, int]:
    """What autograd keeps of the gather as one operator and as conversions, what that leaves alive under recompute, and the messages."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    where: dict[str, Any] = {"group": group.group_name, "size": 2, "rank": rank}
    cut = Shard(2, 1, ((32, 1), (-32, 1)))
    q = torch.randn(1, 4, 32, 8, requires_grad=True)
    k, v = (torch.randn(1, 2, 32, 8, requires_grad=True) for _ in range(2))

    def as_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gathered_attention(q, k, v, None, 2, 1, cut.segments, keys=cut.segments, causal=True, enable_gqa=True, **where)

    def as_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (s_to_r(x, 2, 1, cut.segments, **where) for x in (k, v))
        return causal_attention(q, k, v, 2, 1, cut.segments, enable_gqa=True, **where)

    found = {}
    for name, run in (("one", as_one), ("two", as_two)):
        kept: dict[int, int] = {}

        def see(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with saved_tensors_hooks(see, lambda x: x):
            out = run(q, k, v)
        found[name] = sum(kept.values())
        with MachineTape() as tape:
            again = checkpoint(run, q, k, v, use_reentrant=False)
            found[f"{name}, computed again"] = sum(alive(tape.storages.changes).values())
            tape.phase = "backward"
            grads = torch.autograd.grad(again, (q, k, v), torch.ones_like(again))
        wanted = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
        found[f"{name}, messages"] = sum("all_gather" in call.kernel.name or "reduce_scatter" in call.kernel.name for call in tape.calls)
    return found


def test_a_rank_keeps_its_own_part(gloo: Pool) -> None:
    """64 positions on 2 ranks, in float32."""
    found = gloo.run(kept_bytes)[0]
    query, key, sums = 4 * 32 * 8 * 4, 2 * 32 * 8 * 4, 4 * 32 * 4
    assert found["one"] == 2 * query + 2 * key + sums  # queries, results, own keys and values, a log-sum-exp for each row
    assert found["two"] >= found["one"] + 2 * key  # all keys and values
    assert found["one, computed again"] < 2 * query + 2 * key + 16  # operands and results, and nothing in between
    assert (found["one, messages"], found["two, messages"]) == (4, 6)  # forward, forward again, backward: there and back
