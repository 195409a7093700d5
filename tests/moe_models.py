"""Mixtures of experts in plain PyTorch for tests of expert parallelism: experts in a list of modules, and stacked ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.moe import MoE


class ListModel(nn.Module):
    """Two layers with experts in a list, a router's loss beside the task's."""

    def __init__(self, style: str = "mixtral", *, width: int = 8, experts: int = 4, penalty: float = 0.01) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, width)
        self.layers = nn.ModuleList(MoE(style, width=width, experts=experts) for _ in range(2))
        self.head = nn.Linear(width, 31)
        self.penalty = penalty

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x, penalty = self.embed(ids), 0.0
        for layer in self.layers:
            y, extra = layer(F.rms_norm(x, x.shape[-1:]))
            x, penalty = x + y, penalty + extra
        loss = F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)
        return loss + self.penalty * penalty


def experts_in_a_list(style: str = "mixtral", **options: float) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(7)
    ids = torch.randint(0, 31, (8, 6))
    labels = ids.clone()
    labels[0, :4] = -100
    return ListModel(style, **options), {"ids": ids, "labels": labels}  # type: ignore[arg-type]
