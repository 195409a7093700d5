"""Models for tests of pipelines that are not a list of equal blocks, each with its global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pipeline_exactness.models import UNet, images


class Chain(nn.Module):
    """Equal residual blocks of one matrix and a bias; what a pipeline likes. Returns a dictionary with its loss."""

    def __init__(self, layers: int = 4, width: int = 8, *, dropout: float = 0.0, norm: bool = False, classes: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) if norm else nn.Identity() for _ in range(layers))
        self.dropout, self.head = dropout, nn.Linear(width, classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        for layer, norm in zip(self.layers, self.norms):
            x = x + F.dropout(torch.tanh(norm(layer(x))), self.dropout, self.training)
        logits = self.head(x)
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})


class Bare(nn.Module):
    """Work without parameters between a first and a last layer: some stage has none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(12):
            x = torch.sin(x) @ torch.cos(x).transpose(-1, -2) @ x / 8
        return F.cross_entropy(self.last(x).flatten(0, 1), labels.flatten())


class OneStage(nn.Module):
    """All parameters at the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(6):
            x = torch.sin(x) @ torch.cos(x).transpose(-1, -2) @ x / 8
        return F.cross_entropy(x.flatten(0, 1), labels.flatten())


class EarlyLoss(Chain):
    """The loss comes from the first block; the others only make an output. An auxiliary term comes from the middle."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        assert labels is not None
        loss = F.cross_entropy(self.head(torch.tanh(self.layers[0](x))), labels)
        for index, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x))
            if index == len(self.layers) // 2:
                loss = loss + 0.1 * x.pow(2).mean()
        return {"loss": loss, "hidden": x, "labels": labels, "inputs": x}


class Balanced(Chain):
    """A term of the loss that is no sum over samples, as routers have it."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        share = self.layers[0](x).softmax(-1).mean(0)
        found = super().forward(x, labels)
        return {**found, "loss": found["loss"] + (share * share).sum()}


class Everywhere(nn.Module):
    """A value and a parameter that every block reads, integers made from activations, values that are transposed."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.scale, self.codes = nn.Parameter(torch.rand(8)), nn.Embedding(8, 8)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor | None = None, strict: bool = True, power: float = 1.5) -> Any:
        first = self.embed(ids).transpose(1, 2)  # [b, 8, t], not contiguous where it is handed on
        x, picked = first, first.argmax(1)
        for index, layer in enumerate(self.layers):
            if strict:
                x = (x.transpose(1, 2) * self.scale + torch.tanh(layer(x.transpose(1, 2)))).transpose(1, 2)
            if index % 2:
                x = x + first / power + self.codes(picked).transpose(1, 2)
        logits = self.head(x.transpose(1, 2))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)
        return {"loss": loss, "picked": picked, "ids": ids, "logits": logits, "nothing": None, "power": power}


class Shared(nn.Module):
    """One block that runs four times, as ALBERT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for _ in range(4):
            x = x + self.block(x)
        return F.cross_entropy(self.head(x), labels)


class Tied(nn.Module):
    """Embedding and head are one, some of the parameters do not learn."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight
        self.layers[1].requires_grad_(False)
        self.layers[3].bias.requires_grad_(False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-1)


class FrozenStart(Tied):
    """Nothing before the third block learns, embedding and head are apart: early stages have no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())
        for module in (self.embed, *self.layers[:3]):
            module.requires_grad_(False)


def t5() -> nn.Module:
    """The encoder-decoder of transformers: one table of relative positions serves all blocks of a stack."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes))  # type: ignore[no-any-return]


def _pairs() -> dict[str, Tensor]:
    labels = torch.randint(2, 61, (8, 5))
    labels[0, 1:] = -100
    return {"input_ids": torch.randint(2, 61, (8, 7)), "labels": labels}


def _vectors(samples: int = 8) -> dict[str, Tensor]:
    return {"x": torch.randn(samples, 8), "labels": torch.randint(0, 5, (samples,))}


def _sequences(samples: int = 8) -> dict[str, Tensor]:
    return {"x": torch.randn(samples, 6, 8), "labels": torch.randint(0, 5, (samples, 6))}


def _tokens(vocabulary: int, samples: int = 8) -> dict[str, Tensor]:
    """Labels that each sample ignores another number of; two ignore all."""
    ids = torch.randint(0, vocabulary, (samples, 6))
    labels = ids.clone()
    labels[0, :5] = -1
    labels[1:3] = -1
    return {"ids": ids, "labels": labels}


MADE: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "unet": (UNet, images),
    "chain": (Chain, _vectors),
    "chain5": (lambda: Chain(5), _vectors),
    "chain8": (lambda: Chain(8), _vectors),
    "dropout": (lambda: Chain(dropout=0.3), _vectors),
    "batch_norm": (lambda: Chain(norm=True), _vectors),
    "bare": (Bare, _sequences),
    "one_stage": (OneStage, _sequences),
    "early_loss": (EarlyLoss, _vectors),
    "balanced": (Balanced, _vectors),
    "everywhere": (Everywhere, lambda: {**_tokens(11), "mask": None, "strict": True, "power": 2.5}),
    "shared": (Shared, _vectors),
    "t5": (t5, _pairs),
    "tied": (Tied, lambda: _tokens(13)),
    "frozen_start": (FrozenStart, lambda: _tokens(13)),
}


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model by name, and a global batch for it."""
    torch.manual_seed(3)
    model, batch = MADE[name]
    return model(), batch()
