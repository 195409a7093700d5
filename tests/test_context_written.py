"""Attention that a model writes out, over a sequence that is cut: recognised, in every form, exact; or left, and said why."""

from __future__ import annotations

import math
import warnings
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
        self.sinks = nn.Parameter(torch.randn(4)) if kind.startswith("sink") else None
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
        if self.kind.endswith("window"):
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
        if self.kind.startswith("filled"):
            return scores.masked_fill(~causal, -math.inf).softmax(-1)
        scores = scores + torch.where(causal, 0.0, NEVER)
        if self.sinks is not None:
            joined = torch.cat([scores, self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, s, -1)], -1)
            joined = joined - joined.max(-1, keepdim=True).values if self.kind == "sink, less the largest" else joined
            return joined.softmax(-1)[..., :-1]
        return scores.softmax(-1)


class Decoder(nn.Module):
    """A block of each kind, and a loss that shifts the labels."""

    def __init__(self, *kinds: str, kv: int = 4, layer: Any = Written) -> None:
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(V, H), nn.Embedding(S, H), nn.Linear(H, V)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": layer(kind, kv), "m": nn.Linear(H, H)}) for kind in kinds)

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


EVERY = ("plain", "capped", "capped window", "bias", "strength", "buffer", "alibi", "everything", "sink", "sink, less the largest")
HIDDEN = ("filled", "filled window", "sink, window")


def lines(model: nn.Module, mesh: str, context: Any, *, padding: bool = False) -> list[str]:
    """What is said of attention."""
    with simulate(math.prod(int(part[-1]) for part in mesh.split(","))):
        config = mp.ParallelConfig(context=context)
        text = str(mp.parallelize(model, mp.make_mesh(mesh), config=config, example=batch(padding=padding)).explain())
    return text.split("Attention over")[1].split("\n\n")[0].splitlines()[1:]


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("context", "mesh", "kv", "kinds", "padding"),
    [
        ("ring", "cp=4", 2, (*EVERY, *HIDDEN), False),
        ("heads", "cp=2,tp=2", 4, ("plain", "bias", "sink"), False),
        ("ring", "cp=2", 4, ("plain", "bias", "buffer", "two masks", "sink"), True),
        ("gather", "dp=2,cp=2", 1, ("plain", "capped", "strength", "two masks", "sink"), True),
    ],
)
def test_it_is_that_of_one_device(context: Any, mesh: str, kv: int, kinds: tuple[str, ...], padding: bool) -> None:
    """With padding the first queries of a sample see nothing, and count."""
    torch.manual_seed(0)
    model = Decoder(*kinds, kv=kv)
    mp.verify(model, mesh, batch(padding=padding), config=mp.ParallelConfig(context=context)).raise_if_failed()
    forms = {line.split()[2] for line in lines(model, mesh, context, padding=padding)}
    assert forms == {context, "halo"} if context == "ring" and "capped window" in kinds else forms == {context}


def test_windows_have_a_halo_however_they_are_hidden() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lines(Decoder("filled", "filled window", "sink, window"), "cp=2", "ring")
    assert [line.split()[1:3] for line in found] == [["x1", "ring"], ["x2", "halo"]], found


def test_it_is_proved() -> None:
    report = static_report(
        Decoder("plain", "capped window", "bias", "alibi", "sink", "filled", "sink, window"),
        "cp=2,tp=2",
        batch(),
        config=mp.ParallelConfig(context="ring"),
    )
    report.check()
    assert report.share == 1.0 and not report.unproved


class Refused(Written):
    """What is no attention, or one that draws."""

    def _weights(self, q: Tensor, k: Tensor, padding: Tensor | None) -> Tensor:
        at = torch.arange(q.shape[2])
        scores = q @ k.transpose(-1, -2) * 8**-0.5 + torch.where(at <= at[:, None], 0.0, NEVER)
        if self.kind == "sunk":
            weights = torch.cat([scores, torch.zeros(*scores.shape[:-1], 1, dtype=scores.dtype)], -1).softmax(-1)
            return weights[..., :-1] * (1 + weights[..., -1:])
        if self.kind == "read twice":
            return scores.softmax(-1) * (1 + 0.01 * scores.sigmoid().mean())
        if self.kind == "rounded":
            return scores.round().softmax(-1)
        weights = scores.softmax(-1)
        if self.kind == "weights read twice":
            return weights + 0.0 * weights.sum()
        return F.dropout(weights, 0.3, self.training)


def test_what_is_left_is_exact_and_told_why() -> None:
    torch.manual_seed(0)
    reasons = {
        "read twice": "(its scores are read elsewhere too)",
        "weights read twice": "(its weights are read elsewhere too)",
        "rounded": "(its scores go through round)",
        "dropout": "(it drops weights at random)",
        "sunk": "(the weight of one score more than there are keys is read too)",
    }
    model = Decoder(*reasons, layer=Refused)
    mp.verify(model, "cp=2", batch(), config=mp.ParallelConfig(context="ring")).raise_if_failed()
    said = lines(model, "cp=2", "ring")
    assert len(said) == len(reasons) and all("not recognised as attention: " in line for line in said)
    assert all(sum(reason in line for line in said) == 1 for reason in reasons.values() if reason)


class Crossed(Written):
    """Torch's own attention, with keys of twice as many positions as queries, or with dropout."""

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        q, k, v = (m(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.kind == "longer":
            k, v = (torch.cat([one, one * 0.5], 2) for one in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3 if self.kind == "dropout" and self.training else 0.0)
        return self.o(out.transpose(1, 2).reshape(x.shape))


def test_a_ring_that_cannot_be_is_told_why() -> None:
    longer, dropout = lines(Decoder("longer", "dropout", layer=Crossed), "cp=2", "ring")
    assert "(no ring, its queries and its keys are not known to be of one sequence)" in longer
    assert "(no ring, it drops weights at random)" in dropout
