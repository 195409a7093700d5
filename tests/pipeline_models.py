"""Models for tests of pipelines that are not a list of equal blocks."""

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


def unet() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(3)
    labels = torch.randint(0, 2, (8, 16, 16))
    labels[0, :9] = -1
    return UNet(), {"x": torch.randn(8, 3, 16, 16), "labels": labels}
