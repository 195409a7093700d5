"""What is silently wrong in other context parallelism, each by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.ops.ring import ring_attention
from meshpar.sharding.types import Shard
from meshpar.simulate import local_tensors, per_rank
from tests.test_context_parallel import Attention, Decoder, Packed, S, batch

CUT = Shard(2, 1, ((S // 2, 1), (-S // 2, 1)))


def ok(model: nn.Module, mesh: str, given: dict[str, Tensor], context: Any = "auto", **options: Any) -> bool:
    return mp.verify(model, mesh, given, config=mp.ParallelConfig(context=context, **options)).ok


class Nearly(Attention):
    """A mask that is causal but for a few pairs."""

    def _seen(self, s: int, padding: Tensor | None) -> Tensor:
        at = torch.arange(s)
        behind = at[:, None] - at
        return {
            "one hidden": (behind >= 0) & ~((at[:, None] == 9) & (at == 5)),
            "one ahead": (behind >= 0) | ((at[:, None] == 3) & (at == 4)),
            "the next too": at <= at[:, None] + 1,
            "itself not": (behind > 0) | (at == 0),
            "with gaps": (behind >= 0) & (behind % 3 != 1),
            "a long window": (at <= at[:, None]) & (at > at[:, None] - (S - 1)),  # only the last query does not see the first key
        }[self.kind]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kinds", [("one hidden", "one ahead"), ("the next too", "itself not"), ("with gaps", "a long window")])
def test_any_mask_taken_for_causal(kinds: tuple[str, str]) -> None:
    torch.manual_seed(0)
    model = Decoder()
    for block, kind in zip(model.blocks, kinds, strict=True):
        block["a"] = Nearly(kind)  # type: ignore[index]
    assert ok(model, "cp=2", batch(), "ring")


class Late(Decoder):
    """Every position counts, and the label of each is the first of the next part: nothing to shift within a part."""

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": super().forward(ids, F.pad(labels, (0, 1), value=-100)[:, 1:])["loss"]}


@pytest.mark.parametrize("mesh", ["cp=2,tp=2"])
def test_labels_cut_before_the_shift(mesh: str) -> None:
    """Labels that count only at the first position of a part are those of the last position of the part before, on another rank."""
    torch.manual_seed(0)
    given = batch()
    firsts = [low for rank in range(4) for low, _ in Shard(1, 1, CUT.segments).pieces(4, rank)]
    given["labels"] = torch.where(torch.isin(torch.arange(S), torch.tensor(firsts)), given["ids"], -100)
    assert ok(Decoder(), mesh, given) and ok(Late(), mesh, given)


def test_ring_backward_with_stale_keys_and_values() -> None:
    """The backward of a first call comes after the forward of a second one, whose keys and values went round in between."""
    torch.manual_seed(0)
    sets = [[torch.randn(2, 2, S, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)] for _ in range(2)]
    wanted = [torch.autograd.grad(F.scaled_dot_product_attention(*one, is_causal=True).square().sum(), one) for one in sets]

    def taken(x: Tensor, rank: int) -> Tensor:
        return torch.cat([x.detach()[:, :, low:high] for low, high in CUT.ranges(2, rank)], 2)

    with mp.simulate(2):
        where = {"group": mp.make_mesh("cp=2").get_group("cp").group_name, "size": 2, "rank": -1}
        parts = [[per_rank(lambda rank, x=x: taken(x, rank)).requires_grad_() for x in one] for one in sets]
        outs = [ring_attention(*one, [], 2, 1, CUT.segments, causal=True, **where) for one in parts]  # type: ignore[misc]
        for out, own, right in zip(outs, parts, wanted, strict=True):
            for got, want in zip(torch.autograd.grad(out.square().sum(), own), right, strict=True):
                for rank, local in local_tensors(got).items():
                    torch.testing.assert_close(local, taken(want, rank), rtol=1e-12, atol=1e-12)


def documents(*lengths: list[int]) -> dict[str, Tensor]:
    """Documents of these lengths in each sample, the rest padding."""
    found = batch(len(lengths))
    rows = [torch.cat([torch.full((n,), i + 1) for i, n in enumerate(own)]) for own in lengths]
    places = [torch.cat([torch.arange(n) for n in own]) for own in lengths]
    found["documents"], found["places"] = (torch.stack([F.pad(row, (0, S - len(row))) for row in one]) for one in (rows, places))
    found["labels"] = found["labels"].masked_fill((found["documents"] == 0) | (found["places"] == 0), -100)
    return found


def test_odd_packed_lengths() -> None:
    """None of which cp or 2 cp divides: nothing is rounded."""
    torch.manual_seed(0)
    assert ok(Packed(), "cp=4", documents([7, 5, 1], [1, 1, 1, 9], [3, 13]))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("lengths", [[15, 1], [1, 15], [6, 4, 6]])
def test_a_document_that_begins_in_one_rank_and_ends_in_another(lengths: list[int]) -> None:
    torch.manual_seed(0)
    assert ok(Packed(), "cp=2", documents(lengths, lengths[::-1]), "gather")


def test_loss_times_cp() -> None:
    """Nor the gradients, nor their norm: by numbers, not only beside the model's."""
    torch.manual_seed(0)
    model = Decoder().double()
    right = model(**batch())["loss"]
    right.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    with mp.simulate(4):
        pm = mp.parallelize(model, mp.make_mesh("cp=4"), example=batch())
        loss = pm.train_step(**batch())
        for one in local_tensors(loss).values():
            torch.testing.assert_close(one, right.detach(), rtol=1e-12, atol=0)
        for one in local_tensors(mp.clip_grad_norm_(pm.parameters(), 1e9)).values():
            torch.testing.assert_close(one, norm, rtol=1e-12, atol=0)


def test_padding_in_the_auxiliary_loss_of_a_router() -> None:
    """All padding lies on one rank, which has no token of its own to count."""
    torch.manual_seed(0)
    assert ok(Packed(), "cp=2", documents([5], [3, 2]), "heads")


@pytest.mark.parametrize("mesh", ["cp=2", "cp=4"])
def test_outputs_in_head_tail_order(mesh: str) -> None:
    """What leaves the model lies as the model gives it: logits, and a hidden state whose values are positions."""
    torch.manual_seed(0)
    model = Decoder().double().eval()
    right = model(**batch())["logits"]
    with mp.simulate(int(mesh[-1])):
        pm = mp.parallelize(model, mp.make_mesh(mesh), example=batch())
        assert any("~" in str(conversion) for node in pm._first.plan.axes[0].nodes.values() for conversion in node.outs)
        for logits in local_tensors(pm(**batch())["logits"]).values():
            torch.testing.assert_close(logits, right, rtol=1e-12, atol=1e-12)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("context", ["ring", "gather"])
def test_windows_across_a_boundary(context: Any) -> None:
    """Windows of 5 positions, pieces of 2: every query sees keys of at least two other pieces."""
    torch.manual_seed(0)
    assert ok(Decoder("window", kv=4), "cp=4", batch(), context)
