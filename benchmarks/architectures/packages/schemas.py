"""torchvision beside a build of torch that its library was not made for: what its import asks to be defined, and one operator in Python."""

from __future__ import annotations

import torch
from torch import Tensor

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def define() -> None:
    """Let torchvision be imported."""
    try:
        import torchvision
    except RuntimeError:
        _LIBRARY.extend([torch.library.Library("torchvision", "FRAGMENT")])
        for schema in _SCHEMAS:
            _LIBRARY[0].define(schema)
        _LIBRARY[0].impl("nms", _nms, "CPU")
        import torchvision

        torchvision.ops.boxes._assert_has_ops = lambda: None


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    from torchvision.ops import box_iou

    left, kept = scores.argsort(descending=True), []
    while len(left):
        kept.append(left[0])
        overlap = box_iou(boxes[left[:1]], boxes[left[1:]])[0]
        left = left[1:][overlap <= iou_threshold]
    return torch.stack(kept) if kept else left


_LIBRARY: list[torch.library.Library] = []
