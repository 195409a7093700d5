"""How many pieces of a sequence a rank gets is told by the documents of an example: when it pays, and no more than do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.compile import balance
from meshpar.compile.programs import Programs
from meshpar.dry_run.rehearsal import absent
from meshpar.plan import AxisPlan, Plan
from meshpar.sharding.types import Shard

S = 2048


class Documents(nn.Module):
    """Attention within documents, which the batch tells. `kind`: how the mask is written."""

    def __init__(self, kind: str = "bool") -> None:
        super().__init__()
        self.kind, self.embed, self.qkv, self.head = kind, nn.Embedding(16, 32), nn.Linear(32, 96), nn.Linear(32, 16)

    def forward(self, document: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(document % 16)
        at = torch.arange(document.shape[1])
        seen = (document[:, None, :, None] == document[:, None, None]) & (at <= at[:, None])
        mask = seen if self.kind == "bool" else torch.where(seen, 0.0, -torch.inf)
        q, k, v = (one.unflatten(-1, (2, 16)).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
        if self.kind == "written":
            y = (q @ k.transpose(-1, -2) / 4).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return F.cross_entropy(self.head(x + y.transpose(1, 2).flatten(2)).flatten(0, 1), labels.flatten())


def batch(*lengths: int) -> dict[str, Tensor]:
    """Documents of these lengths."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    return {"document": document, "labels": document % 16}


def plan_of(programs: Programs, given: dict[str, Tensor]) -> Plan:
    return programs.make((), given, training=True).plan


def on(plan: Plan) -> AxisPlan:
    found = plan.axis("cp")
    assert found is not None
    return found


def pieces(axis: AxisPlan) -> set[int]:
    return {len(one.segments) for node in axis.nodes.values() for one in node.outs if isinstance(one, Shard)}


SKEWED = batch(900, 100, 48, 700, 300)
"""From both ends, the ranks in the middle have much less."""


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", ["bool", "float", "written"])
def test_pieces_are_as_many_as_documents_need(kind: str) -> None:
    with absent("cp=4") as mesh:
        programs = Programs(Documents(kind), mesh, mp.ParallelConfig(context="ring"))
        plan = plan_of(programs, SKEWED)
        axis = on(plan)
        assert axis.chunks > 2 and pieces(axis) == {axis.chunks}, axis.pieces
        assert "times the mean of the tiles that the example's masks leave; in one piece 1.47 times" in axis.pieces
        assert on(Plan.from_json(plan.to_json())) == axis
        later = on(plan_of(programs, batch(500, 540)))  # 1040 positions: 4 x 4 pieces divide them, no more powers of two do
        assert pieces(later) == {max(n for n in (1, *range(2, axis.chunks + 1, 2)) if 1040 % (4 * n) == 0)}


def test_other_forms_and_even_documents_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gather computes all pairs under such a mask: ranks have equal shares."""

    def made(given: dict[str, Tensor], **asked: Any) -> AxisPlan:
        with absent("cp=4") as mesh:
            return on(plan_of(Programs(Documents(), mesh, mp.ParallelConfig(**asked)), given))

    assert pieces(made(SKEWED, context="gather")) == {1} and made(SKEWED, context="gather").pieces == ""
    even = made(batch(*[64] * 32), context="ring")
    assert pieces(even) == {1} and even.pieces == ""
    monkeypatch.setattr(balance, "_MATTERS", 2.0)
    little = made(SKEWED, context="ring")
    assert pieces(little) == {1} and "it would save little of a step" in little.pieces
