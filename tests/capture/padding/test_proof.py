"""Whether a model ignores padding: what is proved, and what is told of models that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar._torch import pytree
from meshpar.capture.padding.fills import filled, layout
from meshpar.capture.padding.proof import PaddingCounts, PaddingUnproved, Question, prove
from meshpar.capture.state.taken import Ask
from tests.models import numbers

VOCABULARY, WIDTH = 31, 16


class LM(nn.Module):
    """Ids to logits to a loss; the middle is what differs."""

    def __init__(self, middle: nn.Module | None = None, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(VOCABULARY, WIDTH), middle or nn.Identity(), nn.Linear(WIDTH, VOCABULARY)
        self.loss = loss or token_mean

    def forward(self, ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        x = self.embed(ids)
        x = self.middle(x, attention_mask) if isinstance(self.middle, Attention) else self.middle(x)
        x, extra = x if isinstance(x, tuple) else (x, None)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        loss = self.loss(logits, labels)
        return {"loss": loss if extra is None else loss + 0.01 * extra, "logits": logits, **({} if extra is None else {"extra": extra})}


def token_mean(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-1)


def over_all(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").mean()


def weighed(logits: Tensor, labels: Tensor) -> Tensor:
    mask = (labels != -100).double()
    return (F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none") * mask).sum() / mask.sum()


def by_samples(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[0]


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.qkv = causal, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        where = None if mask is None else mask[:, None, :].bool()
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=where, is_causal=self.causal and mask is None)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Convolution(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.conv, self.pad = nn.Conv1d(WIDTH, WIDTH, 3), (2, 0) if causal else (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), self.pad)).transpose(1, 2)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Balanced(nn.Module):
    """Two experts, and a loss that balances them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.router(x).softmax(-1)
        y = (self.up(x).unflatten(-1, (2, WIDTH)) * p.unsqueeze(-1)).sum(-2)
        return y, (p.mean((0, 1)) ** 2).sum()


class _Adds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + 0.001 * ctx.saved_tensors[0]


class Adds(nn.Module):
    """Its backward adds the gradient of a loss of its own."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Adds.apply(x)
        return found


class Contrasting(nn.Module):
    """Every sample sees the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Pooled(nn.Module):
    """Takes away the mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Branching(nn.Module):
    """Looks back in short sequences, and at everything in long ones."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(True)

    def forward(self, x: Tensor) -> Tensor:
        self.attention.causal = x.shape[1] < 40
        return self.attention(x)


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    samples: str = ""
    """Words of the refusal where samples are filled up; empty: exact."""
    positions: str = ""


def lm(middle: Callable[[], nn.Module] | None = None, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Callable[[], nn.Module]:
    return lambda: LM(middle() if middle else None, loss)


CASES: dict[str, Case] = {
    "rows alone": Case(lm()),
    "labels shifted, another number ignored": Case(lm(loss=shifted)),
    "a mask of labels": Case(lm(loss=weighed)),
    "a mean over all": Case(
        lm(loss=over_all), "the loss moves: every module gives the same", "that counts padding too, as a mean over all does"
    ),
    "a sum by samples": Case(lm(loss=by_samples), "the loss moves"),
    "causal attention": Case(lm(lambda: Attention(True))),
    "attention to all": Case(lm(lambda: Attention(False)), positions="middle gives other values"),
    "a recurrent net": Case(lm(Recurrent)),
    "a causal convolution": Case(lm(lambda: Convolution(True))),
    "a centred convolution": Case(lm(lambda: Convolution(False)), positions="middle.conv gives other values"),
    "batch norm": Case(lm(Normed), "middle.norm gives other values", "middle.norm gives other values"),
    "a balancing loss": Case(lm(Balanced), r"the loss moves \(so does extra", r"the loss moves \(so does extra"),
    "a backward that adds": Case(lm(Adds), "a backward adds", "the gradient of embed.weight is not: a backward adds"),
    "samples that see each other": Case(lm(Contrasting), "middle gives other values"),
    "dropout": Case(lm(Dropping)),
    "a mean over positions": Case(lm(Pooled), positions="middle gives other values"),
}


def drawn(samples: int, length: int, ignored: int = -100) -> dict[str, Tensor]:
    labels = numbers(VOCABULARY, samples, length)
    labels[0, : length // 2] = ignored
    return {"ids": numbers(VOCABULARY, samples, length), "labels": labels}


def question(model: nn.Module, batch: dict[str, Tensor], *, outputs: bool = False, ignored: int = -100) -> Question:
    found = layout(list(batch.values()), [ignored if name == "labels" else None for name in batch], lengths=True)
    return Question(model.train(), ((), batch), found, None, Ask(), outputs)


@pytest.mark.parametrize("name", CASES)
def test_exact_or_refused(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make()
    ignored = -1 if "another number" in name else -100
    asked = question(model, drawn(3, 8, ignored), ignored=ignored)
    for words, more in ((case.samples, (1, 0)), (case.positions, (0, 2))):
        if words:
            with pytest.raises(PaddingCounts, match=words):
                prove(asked, samples=bool(more[0]))
        else:
            prove(asked, samples=bool(more[0]))
            if name != "dropout":
                assert moved(model.double(), asked, more) < 1e-12


def moved(model: nn.Module, asked: Question, more: tuple[int, int]) -> float:
    """How much the loss and the gradients move when the batch is filled up."""
    leaves, spec = pytree.tree_flatten(asked.batch)
    found = []
    for extra in ((0, 0), more):
        model.zero_grad()
        batch = pytree.tree_unflatten([filled(x, d, *extra) for x, d in zip(leaves, asked.layout.inputs, strict=True)], spec)[1]
        loss = model(**batch)["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def test_a_mask_makes_attention_to_all_exact() -> None:
    batch = {**drawn(3, 8), "attention_mask": torch.ones(3, 8, dtype=torch.int64)}
    prove(question(LM(Attention(False)), batch), samples=False)


def test_outputs_are_cut_where_they_grew() -> None:
    ids = {"ids": numbers(VOCABULARY, 3, 8)}
    assert prove(question(LM(Attention(True)), ids, outputs=True), samples=False) == ((1,),)
    assert prove(question(LM(Attention(True)), ids, outputs=True), samples=True) == ((0,),)
    with pytest.raises(PaddingCounts, match="logits moves: middle gives other values"):
        prove(question(LM(Attention(False)), ids, outputs=True), samples=False)
    with pytest.raises(PaddingUnproved, match="samples and positions in one dim"):
        prove(question(Flat(), ids, outputs=True), samples=False)


class Flat(LM):
    def forward(self, ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        return super().forward(ids)["logits"].flatten(0, 1)


def test_another_way_at_the_true_length_is_not_proved_by_a_short_one(monkeypatch: Any) -> None:
    monkeypatch.setattr("meshpar.capture.padding.proof.WORK", 1.0)
    prove(question(LM(Attention(True)), drawn(2, 50)), samples=False)
    with pytest.raises(PaddingUnproved, match="otherwise at 50 positions than at few: .*False in place of .*True"):
        prove(question(LM(Branching()), drawn(2, 50)), samples=False)


def test_a_large_model_is_not_drawn(monkeypatch: Any) -> None:
    monkeypatch.setattr("meshpar.capture.padding.proof.MOST", 1000)
    with pytest.raises(PaddingUnproved, match="the model has 1,023 parameters, and the proof draws 1,000 at most"):
        prove(question(LM(), drawn(2, 8)), samples=True)


def test_the_model_is_as_it_was() -> None:
    model = LM(Normed())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(PaddingCounts):
        prove(question(model, drawn(2, 8)), samples=True)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
