"""torchvision: each of its architectures, with few layers and, where they can be told, few channels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import schemas
from .case import Made
from .case import made as case

schemas.define()

from torchvision import models as tv  # noqa: E402
from torchvision.models import detection, efficientnet, optical_flow, quantization, regnet, segmentation, video  # noqa: E402

SAMPLES = 4


def _images(model: nn.Module, size: int = 32) -> Made:
    return case(model, torch.randn(SAMPLES, 3, size, size))


def _pair(model: nn.Module, size: int = 128) -> Made:
    return case(model, torch.randn(SAMPLES, 3, size, size), torch.randn(SAMPLES, 3, size, size))


def _clip(model: nn.Module, frames: int = 8, size: int = 32) -> Made:
    return case(model, torch.randn(SAMPLES, 3, frames, size, size))


class _Stacked(nn.Module):
    """A detector that is handed its samples in one tensor of each kind: samples are cut along dim 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, **targets: Tensor) -> Any:
        rows = [dict(zip(targets, row, strict=True)) for row in zip(*targets.values(), strict=True)]
        return self.model(list(images), rows)


def _boxes(model: nn.Module, size: int = 64, more: Callable[[], dict[str, Tensor]] = dict) -> Made:
    box = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
    targets = {"boxes": box, "labels": torch.tensor([1, 2]), **more()}
    rows = {name: torch.stack([t] * SAMPLES) for name, t in targets.items()}
    return case(_Stacked(model), images=torch.randn(SAMPLES, 3, size, size), **rows)


def _masks() -> dict[str, Tensor]:
    return {"masks": torch.randint(0, 2, (2, 64, 64)).to(torch.uint8)}


def _keypoints() -> dict[str, Tensor]:
    return {"keypoints": torch.tensor([10.0, 12.0, 1.0]).expand(2, 17, 3).clone()}


class _Narrow(tv.ResNet):
    """A ResNet whose stages have a quarter of the channels."""

    def _make_layer(self, block: Any, planes: int, *args: Any, **settings: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 4, *args, **settings)


def _resnet(block: Any, **settings: Any) -> nn.Module:
    model = _Narrow(block, [1, 2, 1, 1], num_classes=10, **settings)
    model.fc = nn.Linear(128 * block.expansion, 10)
    return model


class _NarrowVideo(video.VideoResNet):
    """The same of a video ResNet, one block each."""

    def _make_layer(self, block: Any, conv_builder: Any, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        return super()._make_layer(block, conv_builder, planes // 4, 1, stride)


def _video(makers: list[Any], stem: Any = None) -> nn.Module:
    model = _NarrowVideo(video.resnet.BasicBlock, makers, [1, 1, 1, 1], stem or video.resnet.BasicStem, num_classes=10)
    model.fc = nn.Linear(128, 10)
    return model


def _bottleneck(**settings: Any) -> nn.Module:
    return _resnet(tv.resnet.Bottleneck, **settings)


def _vgg(batch_norm: bool) -> nn.Module:
    widths = [16, "M", 32, "M", 32, 32, "M", 64, "M"]
    model = tv.VGG(tv.vgg.make_layers(widths, batch_norm=batch_norm), num_classes=10, dropout=0.0)  # type: ignore[arg-type]
    model.classifier = _head(64 * 49)
    return model


def _alexnet() -> nn.Module:
    model = tv.AlexNet(num_classes=10, dropout=0.0)
    model.classifier = _head(256 * 36)
    return model


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(), nn.Linear(width, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Linear(64, 10)
    )


def _convnext() -> nn.Module:
    block = tv.convnext.CNBlockConfig
    return tv.ConvNeXt([block(16, 32, 1), block(32, 64, 2), block(64, None, 1)], num_classes=10)


def _efficientnet() -> nn.Module:
    rows = [efficientnet.MBConvConfig(*row, 1.0, 1.0) for row in ((1, 3, 1, 16, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2))]
    return tv.EfficientNet(rows, dropout=0.0, num_classes=10)


def _efficientnet_v2() -> nn.Module:
    rows = [efficientnet.FusedMBConvConfig(1, 3, 1, 16, 16, 1), efficientnet.FusedMBConvConfig(4, 3, 2, 16, 32, 2)]
    rows += [efficientnet.MBConvConfig(4, 3, 2, 32, 48, 2)]  # type: ignore[list-item]
    return tv.EfficientNet(rows, dropout=0.0, num_classes=10, last_channel=64)


def _regnet(se_ratio: float | None) -> nn.Module:
    return tv.RegNet(regnet.BlockParams.from_init_params(6, 24, 30.0, 2.5, group_width=8, se_ratio=se_ratio), num_classes=10)


def _swin(version: int) -> nn.Module:
    settings: dict[str, Any] = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    if version == 2:
        settings |= {"block": tv.swin_transformer.SwinTransformerBlockV2, "downsample_layer": tv.swin_transformer.PatchMergingV2}
    return tv.SwinTransformer(**settings, num_classes=10)


def _vit() -> nn.Module:
    return tv.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)


def _maxvit() -> nn.Module:
    return tv.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=10)


def _densenet() -> nn.Module:
    return tv.DenseNet(8, (2, 2, 2), 16, 2, num_classes=10)


def _mobilenet_v3() -> nn.Module:
    row = partial(tv.mobilenetv3.InvertedResidualConfig, width_mult=1.0)
    rows = [row(16, 3, 16, 16, True, "RE", 2, 1), row(16, 3, 48, 24, False, "RE", 2, 1), row(24, 5, 64, 40, True, "HS", 2, 1)]
    return tv.MobileNetV3(rows, 64, num_classes=10)


def _mvit(v2: bool) -> nn.Module:
    stride, none = [1, 2, 2], [1, 1, 1]
    block = partial(video.mvit.MSBlockConfig, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3])
    blocks = [block(1, 16, 16 if v2 else 32, stride_q=none, stride_kv=stride)]
    blocks += [block(2, 16 if v2 else 32, 32, stride_q=stride, stride_kv=[1, 1, 1])]
    settings: dict[str, Any] = {"residual_pool": v2, "residual_with_cls_embed": False, "rel_pos_embed": v2, "proj_after_attn": v2}
    return video.MViT((32, 32), 4, blocks, num_classes=10, attention_dropout=0.0, stochastic_depth_prob=0.0, dropout=0.0, **settings)


def _swin3d() -> nn.Module:
    return video.SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [4, 4, 4], num_classes=10)


def _trunk() -> nn.Module:
    from torchvision.models._utils import IntermediateLayerGetter

    net = _bottleneck(replace_stride_with_dilation=[False, True, True])
    return IntermediateLayerGetter(net, {"layer4": "out", "layer3": "aux"})


def _pyramid() -> nn.Module:
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    return _resnet_fpn_extractor(_resnet(tv.resnet.BasicBlock), 3)


def _stock(name: str) -> Made:
    """As torchvision makes it by name."""
    return _images(tv.get_model(name, num_classes=10, **({"image_size": 64} if name.startswith("vit") else {})), 64)


_STOCK = "resnet18 mobilenet_v2 mobilenet_v3_small efficientnet_b0 shufflenet_v2_x0_5 regnet_y_400mf densenet121 mnasnet0_5".split()
_STOCK += ["swin_t", "vit_b_32"]
_SIZES: dict[str, Any] = {"min_size": 64, "max_size": 64, "_skip_resize": True}

_CASES: dict[str, dict[str, Callable[[], Made]]] = {
    "image": {
        "alexnet": lambda: _images(_alexnet(), 64),
        "vgg": lambda: _images(_vgg(False)),
        "vgg_bn": lambda: _images(_vgg(True)),
        "resnet": lambda: _images(_resnet(tv.resnet.BasicBlock)),
        "resnet_bottleneck": lambda: _images(_bottleneck()),
        "resnext": lambda: _images(_bottleneck(groups=8, width_per_group=4)),
        "wide_resnet": lambda: _images(_bottleneck(width_per_group=128)),
        "resnet_group_norm": lambda: _images(_resnet(tv.resnet.BasicBlock, norm_layer=partial(nn.GroupNorm, 8))),
        "squeezenet1_0": lambda: _images(tv.SqueezeNet("1_0", num_classes=10, dropout=0.0), 64),
        "squeezenet1_1": lambda: _images(tv.SqueezeNet("1_1", num_classes=10, dropout=0.0), 64),
        "densenet": lambda: _images(_densenet(), 64),
        "googlenet": lambda: _images(tv.GoogLeNet(num_classes=10, init_weights=False, dropout=0.0, dropout_aux=0.0), 64),
        "inception_v3": lambda: _images(tv.Inception3(num_classes=10, aux_logits=False, init_weights=False, dropout=0.0), 96),
        "shufflenet_v2": lambda: _images(tv.ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], num_classes=10)),
        "mobilenet_v2": lambda: _images(tv.MobileNetV2(10, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]], dropout=0.0)),
        "mobilenet_v3": lambda: _images(_mobilenet_v3()),
        "mnasnet": lambda: _images(tv.MNASNet(0.25, num_classes=10, dropout=0.0), 64),
        "efficientnet": lambda: _images(_efficientnet()),
        "efficientnet_v2": lambda: _images(_efficientnet_v2()),
        "regnet_x": lambda: _images(_regnet(None), 64),
        "regnet_y": lambda: _images(_regnet(0.25), 64),
        "convnext": lambda: _images(_convnext()),
        "vit": lambda: _images(_vit()),
        "swin": lambda: _images(_swin(1)),
        "swin_v2": lambda: _images(_swin(2)),
        "maxvit": lambda: _images(_maxvit(), 64),
    },
    "stock": {name: partial(_stock, name) for name in _STOCK},
    "quantized": {
        "quantized_mobilenet_v2": lambda: _images(quantization.mobilenet_v2(quantize=False, num_classes=10), 64),
        "quantized_resnet18": lambda: _images(quantization.resnet18(quantize=False, num_classes=10), 64),
    },
    "segmentation": {
        "fcn": lambda: _images(segmentation.FCN(_trunk(), segmentation.fcn.FCNHead(512, 5), segmentation.fcn.FCNHead(256, 5))),
        "deeplabv3": lambda: _images(segmentation.DeepLabV3(_trunk(), segmentation.deeplabv3.DeepLabHead(512, 5, (2, 3))), 48),
        "lraspp": lambda: _images(segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=5), 64),
    },
    "video": {
        "r3d": lambda: _clip(_video([video.resnet.Conv3DSimple] * 4)),
        "mc3": lambda: _clip(_video([video.resnet.Conv3DSimple] + [video.resnet.Conv3DNoTemporal] * 3)),
        "r2plus1d": lambda: _clip(_video([video.resnet.Conv2Plus1D] * 4, video.resnet.R2Plus1dStem)),
        "s3d": lambda: _clip(video.S3D(10, dropout=0.0), 16, 224),
        "mvit_v1": lambda: _clip(_mvit(False), 4),
        "mvit_v2": lambda: _clip(_mvit(True), 4),
        "swin3d": lambda: _clip(_swin3d(), 4),
    },
    "flow": {
        "raft_small": lambda: _pair(optical_flow.raft_small()),
        "raft_large": lambda: _pair(optical_flow.raft_large()),
    },
    "detection": {
        "fasterrcnn": lambda: _boxes(detection.FasterRCNN(_pyramid(), 5, **_SIZES)),
        "maskrcnn": lambda: _boxes(detection.MaskRCNN(_pyramid(), 5, **_SIZES), more=_masks),
        "keypointrcnn": lambda: _boxes(detection.KeypointRCNN(_pyramid(), 5, num_keypoints=17, **_SIZES), more=_keypoints),
        "retinanet": lambda: _boxes(detection.RetinaNet(_pyramid(), 5, **_SIZES)),
        "fcos": lambda: _boxes(detection.FCOS(_pyramid(), 5, **_SIZES)),
        "ssd300": lambda: _boxes(detection.ssd300_vgg16(weights_backbone=None, num_classes=5)),
        "ssdlite": lambda: _boxes(detection.ssdlite320_mobilenet_v3_large(weights_backbone=None, num_classes=5)),
    },
}

TASKS = tuple(_CASES)


def kinds(task: str) -> list[str]:
    """The architectures of a task."""
    return list(_CASES[task])


def made(task: str, kind: str) -> Made:
    """A small model of a kind."""
    torch.manual_seed(0)
    return _CASES[task][kind]()
