"""timm: a model of every family (module), with few layers and channels where the model can be told so, on small images."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from . import schemas
from .case import Made
from .case import made as case

schemas.define()

import timm  # noqa: E402
from timm.models import mvitv2  # noqa: E402
from timm.models._efficientnet_builder import round_channels  # noqa: E402

_TABLE: tuple[tuple[bool, int, dict[str, Any], str], ...] = (
    (
        True, 64, {"base_dims": (16, 16, 16), "depth": (1, 1, 1)},
            "pit_ti_224",
    ),
    (
        False, 64, {"block_config": (2, 2, 2)},
            "densenet121 densenetblur121d",
    ),
    (
        False, 64, {"channels": (16, 32, 48, 64), "depths": (1, 1, 1, 1)},
            "nf_regnet_b0",
    ),
    (
        False, 64, {"channels": (16, 32, 48, 64), "layers": (1, 1, 1, 1)},
            "res2next50 resnetblur18 seresnet18 ecaresnext26t_32x4d ecaresnet26t seresnext26t_32x4d resnetaa34d resnetv2_18 "
            "skresnet18 skresnext50_32x4d",
    ),
    (
        False, 64, {"channels": (16, 32, 48, 64)},
            "cspnext_tiny resnest14d resnet10t",
    ),
    (
        True, 64, {"depth": (1, 1, 1), "embed_dim": (32, 64, 96)},
            "efficientvit_m0 levit_128s",
    ),
    (
        False, 64, {"depth": (1, 1, 1), "embed_dim": (32, 64, 96)},
            "shvit_s1",
    ),
    (
        True, 64, {"depth": (1, 1, 1, 1), "embed_dim": (32, 64, 96)},
            "repvit_m1",
    ),
    (
        True, 64, {"depth": 2, "embed_dim": 24},
            "tnt_s_legacy_patch16_224",
    ),
    (
        True, 64, {"depth": 2, "embed_dim": 48, "num_heads": 3},
            "beit_base_patch16_224 beitv2_base_patch16_224 cait_xxs24_224 convit_tiny deit_tiny_patch16_224 "
            "vit_tiny_patch16_dinov3_qkvb eva02_tiny_patch14_224 naflexvit_base_patch16_parfac_gap qwen3_vit_88m visformer_tiny "
            "test_vit3 test_vit4 vit_tiny_patch16_224 flexivit_small beit3_base_patch16_224 vit_tiny_r_s16_p8_224 test_vit_relpos "
            "vit_srelpos_small_patch16_224 samvit_base_patch16_224 xcit_nano_12_p8_224",
    ),
    (
        True, 64, {"depth": 2},
            "vitamin_small_224",
    ),
    (
        False, 64, {"depths": (1, 1, 1), "embed_dim": (32, 64, 96)},
            "efficientvim_m1",
    ),
    (
        False, 64, {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},
            "convnext_zepto_rms convnextv2_atto edgenext_xx_small inception_next_atto mambaout_femto",
    ),
    (
        True, 64, {"depths": (1, 1, 1, 1), "embed_dim": (32, 64, 96, 128)},
            "maxvit_pico_rw_256 coatnet_pico_rw_224",
    ),
    (
        False, 64, {"depths": (1, 1, 1, 1), "embed_dim": 24},
            "fasternet_t0",
    ),
    (
        True, 64, {"depths": (1, 1, 1, 1), "embed_dim": 24},
            "swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224",
    ),
    (
        True, 64, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)},
            "efficientformerv2_s0 twins_svt_small",
    ),
    (
        False, 64, {"depths": (1, 1, 1, 1)},
            "davit_tiny efficientvit_b0 lcnetv2_small eca_nfnet_l0 nfnet_l0 dm_nfnet_f0 pvt_v2_b0 tiny_vit_5m_224",
    ),
    (
        True, 64, {"depths": (1, 1, 1, 1)},
            "coatnext_nano_rw_224 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256",
    ),
    (
        False, 64, {"dims": (16, 32, 48, 64)},
            "csatv2 iformer_t",
    ),
    (
        True, 64, {"embed_dim": 24},
            "gcvit_xxtiny",
    ),
    (
        True, 64, {"embed_dim": 48, "num_heads": 3, "stages": (1, 1, 1, 1)},
            "hiera_tiny_224",
    ),
    (
        False, 64, {"embed_dim": 48, "num_heads": 3, "stages": (1, 1, 1, 1)},
            "sam2_hiera_tiny hieradet_small",
    ),
    (
        False, 64, {"embed_dims": (16, 32, 64, 128), "layers": (1, 1, 1, 1)},
            "fastvit_t8",
    ),
    (
        True, 64, {"embed_dims": (16, 32, 64, 128), "layers": (1, 1, 1, 1)},
            "sequencer2d_s swiftformer_xs",
    ),
    (
        False, 64, {"layers": (1, 1, 1, 1)},
            "legacy_seresnet18 tresnet_m",
    ),
    (
        True, 64, {},
            "eca_botnext26ts_256 lambda_resnet26t botnet26t_256 sebotnet33ts_256 test_byobnet mobileone_s1 gernet_s repvgg_a0 "
            "regnetz_b16 resnext26ts eca_resnext26ts seresnext26ts coat_tiny test_coatnet test_maxvit gmlp_ti16_224 gmixer_12_224 "
            "resmlp_12_224 mixer_s16_224 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny test_vit test_vit2 volo_d1_224",
    ),
    (
        False, 64, {},
            "convmixer_768_32 test_convnext test_convnext3 test_convnext2 cpubone_nano crossvit_tiny_240 cs3darknet_focus_s "
            "darknet17 cspresnext50 sedarknet21 cspresnet50 cspdarknet53 darknetaa53 dla46x_c dpn48b test_efficientnet "
            "test_efficientnet_gn test_efficientnet_ln test_efficientnet_evos mobilenetv2_035 mnasnet_small tinynet_e semnasnet_050 "
            "focalnet_tiny_srf ghostnet_050 ghostnetv3_050 hardcorenas_b hgnetv2_b0 hgnet_tiny hrnet_w18_small lowformer_b0 "
            "test_mambaout poolformerv2_s12 poolformer_s12 caformer_s18 convformer_s18 mobilenetv3_small_050 lcnet_035 "
            "tf_mobilenetv3_small_075 fbnetv3_b mobilenetv5_base nasnetalarge nextvit_small test_nfnet pnasnet5large rdnet_tiny "
            "regnetx_002 regnety_002 regnetz_005 regnetv_040 repghostnet_050 test_resnet rexnet_100 rexnetr_100 selecsls42 "
            "starnet_s050 ese_vovnet19b_slim_dw vovnet39a eca_vovnet39b legacy_xception xception41p",
    ),
    (
        False, 96, {},
            "inception_resnet_v2 inception_v3 inception_v4",
    ),
    (
        True, 128, {},
            "lamhalobotnet50ts_256",
    ),
    (
        False, 224, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)},
            "efficientformer_l1",
    ),
    (
        False, 224, {},
            "haloregnetz_b",
    ),
    (
        False, 256, {},
            "halonet_h1 sehalonet33ts",
    ),
)  # fmt: skip
"""Whether the model is told the size of images, that size, its settings, and the models made with them."""

_CASES = {name: (settings | ({"img_size": size} if told else {}), size) for told, size, settings, names in _TABLE for name in names.split()}


def _thin(stages: Any) -> Any:
    """Of stages of blocks of a kind one block each, with a few channels."""
    return tuple(_thin(s) if isinstance(s, (tuple, list)) else _block(s) for s in stages)


def _block(block: Any) -> Any:
    return replace(block, d=1, c=max(32, block.c // 64 * 8), gs=min(block.gs, 8) if isinstance(block.gs, int) else block.gs)


def _byob(cfg: Any) -> Any:
    return replace(cfg, blocks=_thin(cfg.blocks), num_features=min(cfg.num_features, 64))


def _csp(cfg: Any) -> Any:
    few = {"depth": (1,) * len(cfg.stages.depth), "out_chs": tuple(max(32, c // 8) for c in cfg.stages.out_chs)}
    return replace(cfg, stages=replace(cfg.stages, groups=tuple(min(g, 4) for g in cfg.stages.groups), **few))


def _once(stages: Any) -> Any:
    """Of the blocks of each stage one of every kind."""
    return [list({b["block_type"]: b for b in reversed(blocks)}.values())[::-1] for blocks in stages]


def _eighth(value: Any) -> Any:
    """Nested rows of numbers with an eighth of what counts channels; the rest are flags and small counts."""
    if isinstance(value, dict):
        return {name: _eighth(v) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_eighth(v) for v in value)
    return max(8, value // 8) if type(value) is int and value >= 32 else value


def _from_stem(cfg: dict[str, Any], channels: int) -> dict[str, Any]:
    """The first block reads what the stem gives, which no setting changes."""
    (_, *first), *rest = cfg["features"]
    return cfg | {"features": [(channels, *first), *rest]}


def _strided(stages: Any) -> Any:
    """The stages that halve the image, the first and the last."""
    return [rows for i, rows in enumerate(stages) if rows[0][-1] == 2 or i in (0, len(stages) - 1)]


def _hrnet(cfg: dict[str, Any]) -> dict[str, Any]:
    return cfg | {n: s | {"num_blocks": (1,) * len(s["num_blocks"])} for n, s in cfg.items() if n.startswith("stage")} | {"stem_width": 16}


_LATE: dict[str, dict[str, Any]] = {
    "caformer_s18 convformer_s18 poolformer_s12 poolformerv2_s12": {"dims": (16, 32, 64, 96), "depths": (1, 1, 1, 1)},
    "coat_tiny": {"embed_dims": (32, 32, 32, 32), "serial_depths": (1, 1, 1, 1), "parallel_depth": 2},
    "convmixer_768_32": {"dim": 32, "depth": 2},
    "lowformer_b0": {"width_list": (8, 16, 32, 64, 128), "depth_list": (0, 1, 1, 1, 1)},
    "crossvit_tiny_240": {"embed_dim": (24, 48), "depth": ((1, 2, 0), (1, 2, 0))},
    "csatv2": {"depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)},
    "davit_tiny": {"embed_dims": (24, 48, 96, 192), "num_heads": (2, 4, 4, 4)},
    "dla46x_c": {"levels": (1, 1, 1, 2, 1, 1)},
    "dpn48b": {"k_sec": (1, 1, 1, 1)},
    "mobilenetv5_base": {"round_chs_fn": lambda _: partial(round_channels, multiplier=0.25), "stem_size": 16},
    "fbnetv3_b hardcorenas_b semnasnet_050 mnasnet_small mobilenetv2_035": {"block_args": _once},
    "mobilenetv3_small_050 tf_mobilenetv3_small_075 tinynet_e": {"block_args": _once},
    "focalnet_tiny_srf gcvit_xxtiny": {"embed_dim": 24, "depths": (1, 1, 1, 1)},
    "ghostnet_050 ghostnetv3_050 repghostnet_050": {"cfgs": _strided},
    "gmixer_12_224 gmlp_ti16_224 mixer_s16_224 resmlp_12_224": {"num_blocks": 2, "embed_dim": 48},
    "hgnet_tiny hgnetv2_b0": {"model_cfg": _eighth},
    "selecsls42": {"model_cfg": lambda cfg: _from_stem(_eighth(cfg), 32)},
    "eca_vovnet39b vovnet39a ese_vovnet19b_slim_dw": {
        "model_cfg": lambda cfg: _eighth(cfg) | {"layer_per_block": 2, "block_per_stage": [1] * 4}
    },
    "hrnet_w18_small": {"model_cfg": _hrnet},
    "iformer_t": {"depths": (1, 1, 4, 3), "attn_groups": (0, 0, 1, 1)},
    "mvitv2_tiny": {"model_cfg": mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=24)},
    "nasnetalarge": {"num_features": 24 * 8, "stem_size": 16},
    "nest_tiny": {"embed_dims": (24, 48, 96), "num_heads": (2, 4, 4), "depths": (1, 1, 1)},
    "nextvit_small": {"depths": (1, 2, 5, 2), "stem_chs": (16, 8, 16)},
    "volo_d1_224": {"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4)},
    "rdnet_tiny": {"num_init_features": 16, "growth_rates": (16,) * 7, "num_blocks_list": (1,) * 7},
    "regnetv_040 regnetx_002 regnety_002 regnetz_005": {"depth": 8, "w0": 24, "wa": 36.0, "wm": 2.5, "group_size": 8, "num_features": 0},
    "rexnet_100 rexnetr_100": {"depth_mult": 0.3},
    "tresnet_m": {"width_factor": 0.25},
    "xception41p": {"block_cfg": lambda rows: [*rows[:3], *rows[-3:]]},
    "dm_nfnet_f0 eca_nfnet_l0 nfnet_l0": {"channels": (64, 128, 192, 256), "group_size": 16},
    "cs3darknet_focus_s cspdarknet53 cspresnet50 cspresnext50 darknet17 darknetaa53 sedarknet21": {"model_cfg": _csp},
    "botnet26t_256 eca_botnext26ts_256 eca_resnext26ts gernet_s haloregnetz_b": {"model_cfg": _byob},
    "lambda_resnet26t lamhalobotnet50ts_256 regnetz_b16 repvgg_a0 resnext26ts sebotnet33ts_256": {"model_cfg": _byob},
    "halonet_h1 sehalonet33ts seresnext26ts": {"model_cfg": _byob},
    "coatnext_nano_rw_224": {"embed_dim": (32, 64, 96, 128), "stem_width": 32},
}
"""What is put in last, over what timm's function of that name says; a function is applied to that."""

_REPEATED = {"inception_resnet_v2": ("repeat", "repeat_1", "repeat_2"), "inception_v4": ("features",)}
"""Rows of blocks, all alike, of which one is left."""

TASKS = ("image",)


def kinds(task: str) -> list[str]:
    """The models, as timm calls them."""
    return sorted(_CASES)


def made(task: str, kind: str) -> Made:
    """A small model of a kind, ten classes."""
    settings, size = _CASES[kind]
    late = next((values for names, values in _LATE.items() if kind in names.split()), {})
    torch.manual_seed(0)
    home = sys.modules[timm.model_entrypoint(kind).__module__]
    with mock.patch.object(home, "build_model_with_cfg", partial(_told, home.build_model_with_cfg, late)):
        model = timm.create_model(kind, num_classes=10, **settings)
    for name in _REPEATED.get(kind, ()):
        setattr(model, name, _different(getattr(model, name)))
    return case(model, torch.randn(4, 3, size, size))


def _told(build: Callable[..., nn.Module], late: dict[str, Any], *args: Any, **said: Any) -> nn.Module:
    return build(*args, **said | {name: value(said[name]) if callable(value) else value for name, value in late.items()})


def _different(blocks: nn.Sequential) -> nn.Sequential:
    """Without the blocks of the kind of the one before, but for single convolutions."""
    return nn.Sequential(*[b for b, before in zip(blocks, [None, *blocks]) if type(b) is not type(before) or hasattr(b, "conv")])
