"""Models that are no list of equal blocks, each with a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """Skips over all depths, convolutions, a bottleneck; uneven levels."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)])
        self.middle = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.up = nn.ModuleList([nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(32, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)])
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        skips = []
        for level in self.down:
            x = F.gelu(level(x))
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for level in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = F.gelu(level(torch.cat([x, skips.pop()], 1)))
        return F.cross_entropy(self.head(x), labels, ignore_index=-1)


def images(samples: int = 8) -> dict[str, Tensor]:
    """A batch for `UNet`, with pixels that have no label."""
    labels = torch.randint(0, 2, (samples, 16, 16))
    labels[0, :9] = -1
    return {"x": torch.randn(samples, 3, 16, 16), "labels": labels}


class EncoderDecoder(nn.Module):
    """torch's own transformer: the encoder's result goes to every layer of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 16)
        self.transformer = nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 37)

    def forward(self, source: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        hidden = self.transformer(self.embed(source), self.embed(target), tgt_is_causal=False)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


def pairs(samples: int = 8) -> dict[str, Tensor]:
    """A batch for `EncoderDecoder`."""
    lengths = {"source": 8, "target": 6, "labels": 6}
    return {name: torch.randint(37, (samples, length)) for name, length in lengths.items()}
