"""Attention that a model writes out, over a sequence that is cut: recognised, in every form, exact; or left, and said why."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.proof.alone import static_report
from meshpar.simulate import simulate

B, S, H, V, NEVER = 2, 16, 32, 37, torch.finfo(torch.float32).min


class Written(nn.Module):
    """4 query heads on `kv`. `kind` says what is between the products."""

    def __init__(self, kind: str, kv: int = 4) -> None:
        super().__init__()
        self.kind, self.kv = kind, kv
        self.q, self.k, self.v, self.o = nn.Linear(H, H), nn.Linear(H, 8 * kv), nn.Linear(H, 8 * kv), nn.Linear(H, H)
        self.bias = nn.Parameter(torch.randn(1, 4, 2 * S) / 4) if kind == "bias" else None
        self.strength = nn.Parameter(torch.randn(4, 1, 1)) if kind == "strength" else None
        self.register_buffer("seen", torch.ones(S, S, dtype=torch.bool).tril()[None, None], persistent=False)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (m(x).view(b, s, -1, 8).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = (one[:, :, None].expand(-1, -1, 4 // self.kv, -1, -1).reshape(b, 4, s, 8) for one in (k, v))
        out = self._joined(q, k, v) if self.kind == "alibi" else self._weights(q, k, padding) @ v
        return self.o(out.transpose(1, 2).reshape(b, s, H))

    def _joined(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Samples and heads in one dim, distances added in the product."""
        b, _, s, _ = q.shape
        at = torch.arange(s)
        distance = (2.0 ** -torch.arange(4)[:, None, None] * at).to(q.dtype).repeat(b, 1, 1)
        scores = torch.baddbmm(distance, q.reshape(b * 4, s, 8), k.transpose(-1, -2).reshape(b * 4, 8, s), beta=1.0, alpha=8**-0.5)
        scores = scores.view(b, 4, s, s) + torch.where(at <= at[:, None], 0.0, NEVER)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights.view(b * 4, s, s), v.reshape(b * 4, s, 8)).view(b, 4, s, 8)

    def _weights(self, q: Tensor, k: Tensor, padding: Tensor | None) -> Tensor:
        at, s = torch.arange(q.shape[2]), q.shape[2]
        causal = at <= at[:, None]
        scores = q @ k.transpose(-1, -2) * 8**-0.5
        if self.kind == "buffer":
            scores = torch.where(self.seen[:, :, :s, :s], scores, torch.tensor(NEVER, dtype=scores.dtype))
            causal = torch.ones(s, s, dtype=torch.bool) if padding is None else causal
        if self.kind in ("capped", "capped window"):
            scores = torch.tanh(scores / 2.0) * 2.0
        if self.kind == "capped window":
            causal = causal & (at > at[:, None] - 3)
        if self.strength is not None:
            scores = scores * self.strength
        if self.bias is not None:
            scores = scores + self.bias[:, :, (at[:, None] - at) % (2 * S)]
        if self.kind == "two masks" and padding is not None:
            scores, padding = scores + torch.where(padding[:, None, None, :].bool(), 0.0, NEVER), None
        causal = causal if padding is None else causal & padding[:, None, None, :].bool()
        if self.kind == "everything":
            return scores.softmax(-1)
        return (scores + torch.where(causal, 0.0, NEVER)).softmax(-1)


class Decoder(nn.Module):
    """Two blocks and a loss that shifts the labels."""

    def __init__(self, kind: str, kv: int = 4, layer: Any = Written) -> None:
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(V, H), nn.Embedding(S, H), nn.Linear(H, V)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": layer(kind, kv), "m": nn.Linear(H, H)}) for _ in range(2))

    def forward(self, ids: Tensor, labels: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = x + block["a"](x, padding)  # type: ignore[index]
            x = x + torch.tanh(block["m"](x))  # type: ignore[index]
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return {"loss": F.cross_entropy(self.head(x).reshape(-1, V), labels.reshape(-1))}


def batch(*, padding: bool = False) -> dict[str, Tensor]:
    """With padding before the second sample: its first queries see nothing, and their labels count."""
    torch.manual_seed(1)
    ids = torch.randint(0, V, (B, S))
    return {"ids": ids, "labels": ids} | ({"padding": (torch.arange(S) >= torch.tensor([[0], [5]])).long()} if padding else {})


CASES = [
    ("plain", 2, "ring", "cp=4", False),
    ("plain", 2, "gather", "cp=2,tp=2", False),
    ("plain", 4, "ring", "cp=2", True),
    ("plain", 4, "gather", "cp=2", True),
    ("capped", 2, "ring", "cp=2,tp=2", False),
    ("capped", 4, "heads", "cp=2,tp=2", True),
    ("capped", 2, "gather", "cp=4", False),
    ("capped window", 2, "ring", "cp=4", False),
    ("bias", 4, "ring", "cp=2,tp=2", False),
    ("bias", 4, "heads", "cp=2", True),
    ("strength", 2, "ring", "cp=2,tp=2", True),
    ("strength", 2, "gather", "cp=2,tp=2", True),
    ("buffer", 4, "ring", "cp=4", False),
    ("buffer", 4, "auto", "cp=2,tp=2", True),
    ("alibi", 4, "ring", "cp=2,tp=2", False),
    ("alibi", 4, "gather", "cp=4", False),
    ("everything", 2, "ring", "dp=2,cp=2", False),
    ("two masks", 4, "ring", "cp=2", True),
]


@pytest.mark.parametrize("kind, kv, context, mesh, padding", CASES, ids=[f"{c[0]}-{c[2]}-{c[3]}" + "-padding" * c[4] for c in CASES])
def test_it_is_that_of_one_device(kind: str, kv: int, context: Any, mesh: str, padding: bool) -> None:
    torch.manual_seed(0)
    config = mp.ParallelConfig(context=context)
    mp.verify(Decoder(kind, kv), mesh, batch(padding=padding), config=config).raise_if_failed()
    with simulate(math.prod(int(part[-1]) for part in mesh.split(","))):
        pm = mp.parallelize(Decoder(kind, kv), mp.make_mesh(mesh), config=config, example=batch(padding=padding))
        said = str(pm.explain()).split("Attention over")[1].split("\n\n")[0]
        assert "products and a softmax" not in said
        form = "halo" if kind == "capped window" else context
        assert form == "auto" or f"blocks.*.a  x2  {form}" in said, said


@pytest.mark.parametrize("kind", ["plain", "capped window", "bias", "alibi"])
def test_it_is_proved(kind: str) -> None:
    report = static_report(Decoder(kind, 2 if kind == "plain" else 4), "cp=2,tp=2", batch(), config=mp.ParallelConfig(context="ring"))
    report.check()
    assert report.share == 1.0 and not report.unproved


class Refused(Written):
    """What is no attention, or one that draws."""

    def _weights(self, q: Tensor, k: Tensor, padding: Tensor | None) -> Tensor:
        at = torch.arange(q.shape[2])
        scores = q @ k.transpose(-1, -2) * 8**-0.5 + torch.where(at <= at[:, None], 0.0, NEVER)
        if self.kind == "sink":
            return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1]
        if self.kind == "read twice":
            return scores.softmax(-1) * (1 + 0.01 * scores.sigmoid().mean())
        if self.kind == "rounded":
            return scores.round().softmax(-1)
        weights = scores.softmax(-1)
        if self.kind == "weights read twice":
            return weights + 0.0 * weights.sum()
        return F.dropout(weights, 0.3, self.training)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sink", ""),
        ("read twice", "its scores are read elsewhere too"),
        ("weights read twice", "its weights are read elsewhere too"),
        ("rounded", "its scores go through round"),
        ("dropout", "it drops weights at random"),
    ],
)
def test_what_is_left_is_exact_and_told_why(kind: str, reason: str) -> None:
    torch.manual_seed(0)
    config = mp.ParallelConfig(context="ring")
    mp.verify(Decoder(kind, layer=Refused), "cp=2", batch(), config=config).raise_if_failed()
    with simulate(2):
        text = str(mp.parallelize(Decoder(kind, layer=Refused), mp.make_mesh("cp=2"), config=config, example=batch()).explain())
    (line,) = [line for line in text.splitlines() if "products and a softmax" in line]
    assert "blocks.*.a  x2" in line and "not recognised as attention" in line and (f"({reason})" in line if reason else "(" not in line)


class Crossed(Written):
    """Torch's own attention, with keys of twice as many positions as queries, or with dropout."""

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        q, k, v = (m(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.kind == "longer":
            k, v = (torch.cat([one, one * 0.5], 2) for one in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3 if self.kind == "dropout" and self.training else 0.0)
        return self.o(out.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("longer", "no ring, its queries and its keys are not known to be of one sequence"),
        ("dropout", "no ring, it drops weights at random"),
    ],
)
def test_a_ring_that_cannot_be_is_told_why(kind: str, reason: str) -> None:
    with simulate(2):
        model = Decoder(kind, layer=Crossed)
        text = str(mp.parallelize(model, mp.make_mesh("cp=2"), config=mp.ParallelConfig(context="ring"), example=batch()).explain())
    assert any("blocks.*.a  x2" in line and f"({reason})" in line for line in text.splitlines()), text
