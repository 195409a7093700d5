"""timm: a model of every family (module), with few layers and channels where the model can be told so, on small images."""

from __future__ import annotations

from typing import Any

import torch

from . import schemas
from .case import Made
from .case import made as case

schemas.define()

import timm  # noqa: E402

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

TASKS = ("image",)


def kinds(task: str) -> list[str]:
    """The models, as timm calls them."""
    return sorted(_CASES)


def made(task: str, kind: str) -> Made:
    """A small model of a kind, ten classes."""
    settings, size = _CASES[kind]
    torch.manual_seed(0)
    return case(timm.create_model(kind, num_classes=10, **settings), torch.randn(4, 3, size, size))
