"""diffusers: denoisers (UNets and transformers of images, video and sound), autoencoders and adapters, as small as can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import schemas
from .case import Made
from .case import made as case

schemas.define()

import diffusers as df  # noqa: E402

SAMPLES = 4


def _noise(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape)


def _steps() -> Tensor:
    return torch.arange(SAMPLES) * 200 + 10


def _ones(*shape: int) -> Tensor:
    return torch.ones(SAMPLES, *shape)


def _unet(down: str, up: str, name: str = "UNet2DModel", **settings: Any) -> Any:
    rest = "DownBlock3D UpBlock3D" if "3D" in name else "DownBlock2D UpBlock2D"
    plain = rest.split()
    widths: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16}
    return getattr(df, name)(**widths, down_block_types=(plain[0], down), up_block_types=(up, plain[1]), **settings)


def _condition(**settings: Any) -> Any:
    return _unet(
        "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNet2DConditionModel", cross_attention_dim=32, attention_head_dim=4, **settings
    )


def _adm(kind: str) -> Made:
    """Conditions beside the text."""
    if kind == "class":
        return case(
            _condition(num_class_embeds=10),
            sample=_noise(4, 16, 16),
            timestep=_steps(),
            encoder_hidden_states=_noise(6, 32),
            class_labels=torch.arange(SAMPLES),
        )
    model = _condition(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80, use_linear_projection=True
    )
    return case(
        model,
        sample=_noise(4, 16, 16),
        timestep=_steps(),
        encoder_hidden_states=_noise(6, 32),
        added_cond_kwargs={"text_embeds": _noise(32), "time_ids": torch.rand(SAMPLES, 6)},
    )


def _denoised(model: Any, *shape: int, text: int = 32, **more: Any) -> Made:
    return case(model, hidden_states=_noise(*shape), encoder_hidden_states=_noise(6, text), timestep=_steps(), **more)


_HEADS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}
_SMALL_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
_ROPE: dict[str, Any] = _SMALL_HEADS | {"axes_dims_rope": (4, 4, 8), "joint_attention_dim": 32}


def _ids(more: int = 3) -> dict[str, Tensor]:
    rows, columns = torch.arange(9) // 3, torch.arange(9) % 3
    places = torch.stack([torch.zeros(9), rows, columns, *[torch.zeros(9)] * (more - 3)], 1)
    return {"img_ids": places, "txt_ids": torch.zeros(6, more)}


def _flux() -> Made:
    model = df.FluxTransformer2DModel(in_channels=4, num_single_layers=2, pooled_projection_dim=32, **_ROPE)
    return _denoised(model, 9, 4, pooled_projections=_noise(32), **_ids())


def _flux_control() -> Made:
    model = df.FluxControlNetModel(in_channels=4, num_single_layers=1, pooled_projection_dim=32, **_ROPE)
    return _denoised(model, 9, 4, controlnet_cond=_noise(9, 4), pooled_projections=_noise(32), **_ids())


def _flux2() -> Made:
    model = df.Flux2Transformer2DModel(
        in_channels=4, num_single_layers=2, timestep_guidance_channels=16, guidance_embeds=False, **_ROPE | {"axes_dims_rope": (4, 4, 4, 4)}
    )
    places = {name: places.expand(SAMPLES, *places.shape).clone() for name, places in _ids(4).items()}
    return _denoised(model, 9, 4, **places)


def _chroma() -> Made:
    model = df.ChromaTransformer2DModel(
        in_channels=4, num_single_layers=2, approximator_num_channels=8, approximator_hidden_dim=32, approximator_layers=1, **_ROPE
    )
    return _denoised(model, 9, 4, **_ids())


def _bria() -> Made:
    model = df.BriaTransformer2DModel(in_channels=4, num_single_layers=2, **_ROPE)
    return _denoised(model, 9, 4, **_ids())


def _qwen() -> Made:
    model = df.QwenImageTransformer2DModel(in_channels=16, out_channels=4, **_ROPE)
    return _denoised(model, 9, 16, encoder_hidden_states_mask=_ones(6).long(), img_shapes=[(1, 3, 3)] * SAMPLES)


def _sd3(name: str = "SD3Transformer2DModel", **more: Any) -> Made:
    model = getattr(df, name)(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        **_HEADS,
    )
    return _denoised(model, 4, 8, 8, pooled_projections=_noise(16), **more)


def _dit() -> Made:
    model = df.DiTTransformer2DModel(in_channels=4, out_channels=8, sample_size=8, num_embeds_ada_norm=10, **_HEADS)
    return case(model, hidden_states=_noise(4, 8, 8), timestep=_steps(), class_labels=torch.arange(SAMPLES))


def _pixart() -> Made:
    model = df.PixArtTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, cross_attention_dim=32, caption_channels=16, use_additional_conditions=False, **_HEADS
    )
    return _denoised(model, 4, 8, 8, text=16, added_cond_kwargs={"aspect_ratio": None, "resolution": None})


def _transformer_2d() -> Made:
    model = df.Transformer2DModel(in_channels=32, norm_num_groups=8, cross_attention_dim=32, **_HEADS)
    return case(model, hidden_states=_noise(32, 8, 8), encoder_hidden_states=_noise(6, 32))


def _hunyuan_dit() -> Made:
    model = df.HunyuanDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        cross_attention_dim=16,
        cross_attention_dim_t5=8,
        pooled_projection_dim=8,
        text_len=4,
        text_len_t5=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        **_HEADS,
    )
    rotary = tuple(torch.randn(16, 8) for _ in range(2))
    return case(
        model,
        hidden_states=_noise(4, 8, 8),
        timestep=_steps().float(),
        encoder_hidden_states=_noise(4, 16),
        text_embedding_mask=_ones(4),
        encoder_hidden_states_t5=_noise(4, 8),
        text_embedding_mask_t5=_ones(4),
        image_meta_size=_ones(6) * 8,
        style=torch.zeros(SAMPLES).long(),
        image_rotary_emb=rotary,
    )


def _hunyuan_video() -> Made:
    model = df.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 8),
        **_SMALL_HEADS,
    )
    return _denoised(model, 4, 2, 4, 4, text=16, encoder_attention_mask=_ones(6).long(), pooled_projections=_noise(8), guidance=_ones() * 6)


def _wan() -> Made:
    model = df.WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=48, rope_max_seq_len=32, **_SMALL_HEADS
    )
    return _denoised(model, 4, 2, 8, 8, text=16)


def _ltx() -> Made:
    model = df.LTXVideoTransformer3DModel(in_channels=8, out_channels=8, cross_attention_dim=32, caption_channels=16, **_HEADS)
    return _denoised(model, 18, 8, text=16, encoder_attention_mask=_ones(6).long(), num_frames=2, height=3, width=3)


def _mochi() -> Made:
    model = df.MochiTransformer3DModel(
        in_channels=4, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=8, max_sequence_length=6, **_HEADS
    )
    return _denoised(model, 4, 2, 8, 8, text=16, encoder_attention_mask=_ones(6).bool())


def _cogvideox() -> Made:
    model = df.CogVideoXTransformer3DModel(
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        max_text_seq_length=6,
        **_HEADS,
    )
    return _denoised(model, 2, 4, 8, 8, text=16)


def _cogview3() -> Made:
    model = df.CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, text_embed_dim=16, time_embed_dim=16, condition_dim=4, pos_embed_max_size=8, sample_size=8, **_HEADS
    )
    sizes = {name: _ones(2) * 8 for name in ("original_size", "target_size", "crop_coords")}
    return _denoised(model, 4, 8, 8, text=16, **sizes)


def _cogview4() -> Made:
    model = df.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, text_embed_dim=16, time_embed_dim=16, condition_dim=4, rope_axes_dim=(8, 8), sample_size=8, **_HEADS
    )
    sizes = {name: _ones(2) * 8 for name in ("original_size", "target_size", "crop_coords")}
    return _denoised(model, 4, 8, 8, text=16, **sizes)


def _sana() -> Made:
    model = df.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        **_HEADS,
    )
    return _denoised(model, 4, 8, 8, text=16)


def _aura() -> Made:
    model = df.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        caption_projection_dim=32,
        joint_attention_dim=16,
        pos_embed_max_size=16,
    )
    return _denoised(model, 4, 8, 8, text=16)


def _allegro() -> Made:
    model = df.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        caption_channels=16,
        sample_height=8,
        sample_width=8,
        sample_frames=2,
    )
    grid = tuple(torch.arange(32)[None] % 4 for _ in range(3))
    rotary = (tuple((torch.randn(4, 8), torch.randn(4, 8)) for _ in range(3)), grid)
    return _denoised(model, 4, 2, 8, 8, text=16, image_rotary_emb=rotary)


def _latte() -> Made:
    model = df.LatteTransformer3DModel(
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        patch_size=2,
        video_length=2,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
        **_HEADS,
    )
    return _denoised(model, 4, 2, 8, 8, text=16)


def _lumina2() -> Made:
    model = df.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16),
        cap_feat_dim=16,
    )
    return _denoised(model, 4, 8, 8, text=16, encoder_attention_mask=_ones(6).bool())


def _lumina_next() -> Made:
    model = df.LuminaNextDiT2DModel(
        sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2, multiple_of=16, cross_attention_dim=16
    )
    rotary = torch.randn(24, 24, 4).to(torch.complex64)
    return _denoised(model, 4, 8, 8, text=16, encoder_mask=_ones(6), image_rotary_emb=rotary, cross_attention_kwargs={})


def _stable_audio() -> Made:
    model = df.StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=32,
        time_proj_dim=16,
        global_states_input_dim=16,
        cross_attention_input_dim=16,
        **_HEADS,
    )
    rotary = tuple(torch.randn(9, 4) for _ in range(2))
    return case(
        model,
        hidden_states=_noise(4, 8),
        timestep=_steps() / 1000.0,
        encoder_hidden_states=_noise(6, 16),
        global_hidden_states=_noise(1, 16),
        rotary_embedding=rotary,
    )


def _cosmos() -> Made:
    model = df.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, mlp_ratio=2.0, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 16, 16), **_SMALL_HEADS
    )
    return _denoised(model, 4, 2, 8, 8, text=16, padding_mask=torch.zeros(1, 1, 8, 8))


def _hidream() -> Made:
    model = df.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[16, 8],
        text_emb_dim=16,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=[0, 1],
        num_routed_experts=4,
        num_activated_experts=2,
    )
    return case(
        model,
        hidden_states=_noise(4, 8, 8),
        timesteps=_steps(),
        encoder_hidden_states_t5=_noise(6, 16),
        encoder_hidden_states_llama3=[_noise(6, 8) for _ in range(2)],
        pooled_embeds=_noise(16),
    )


def _prior() -> Made:
    model = df.PriorTransformer(embedding_dim=16, num_embeddings=6, additional_embeddings=4, **_HEADS)
    return case(model, hidden_states=_noise(16), timestep=_steps(), proj_embedding=_noise(16), encoder_hidden_states=_noise(6, 16))


def _uvit() -> Made:
    model = df.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=16,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=16,
        vocab_size=32,
        codebook_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        in_channels=32,
        block_out_channels=32,
        intermediate_size=48,
        block_num_heads=4,
        sample_size=8,
    )
    return case(
        model,
        input_ids=torch.randint(0, 24, (SAMPLES, 8, 8)),
        encoder_hidden_states=_noise(6, 16),
        pooled_text_emb=_noise(16),
        micro_conds=torch.rand(SAMPLES, 5),
    )


def _unet_3d() -> Made:
    model = _unet("CrossAttnDownBlock3D", "CrossAttnUpBlock3D", "UNet3DConditionModel", cross_attention_dim=32, attention_head_dim=4)
    return case(model, sample=_noise(4, 2, 8, 8), timestep=_steps(), encoder_hidden_states=_noise(6, 32))


def _unet_spatio_temporal() -> Made:
    model = df.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        cross_attention_dim=32,
        num_attention_heads=4,
        num_frames=2,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )
    return case(
        model, sample=_noise(2, 8, 8, 8), timestep=_steps(), encoder_hidden_states=_noise(1, 32), added_time_ids=torch.rand(SAMPLES, 3)
    )


def _unet_1d() -> Made:
    model = df.UNet1DModel(
        block_out_channels=(32, 32, 64),
        extra_in_channels=64,
        in_channels=14,
        out_channels=14,
        sample_size=32,
        layers_per_block=1,
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )
    return case(model, sample=_noise(14, 32), timestep=_steps())


def _controlnet() -> Made:
    model = df.ControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(8, 16),
    )
    return case(model, sample=_noise(4, 16, 16), timestep=_steps(), encoder_hidden_states=_noise(6, 32), controlnet_cond=_noise(3, 32, 32))


def _cascade() -> Made:
    model = df.StableCascadeUNet(
        block_out_channels=(16, 32),
        down_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_num_layers_per_block=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        num_attention_heads=(2, 4),
        conditioning_dim=16,
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        clip_image_in_channels=16,
        clip_seq=4,
        timestep_ratio_embedding_dim=16,
        switch_level=(False,),
        self_attn=True,
        in_channels=4,
        out_channels=4,
        dropout=(0.0, 0.0),
    )
    return case(
        model,
        sample=_noise(4, 8, 8),
        timestep_ratio=torch.rand(SAMPLES),
        clip_text_pooled=_noise(1, 16),
        clip_text=_noise(6, 16),
        clip_img=_noise(1, 16),
    )


_ENCODER: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4}
_BOTH: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def _autoencoder_dc() -> Made:
    model = df.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(16, 32),
        decoder_block_out_channels=(16, 32),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    return case(model, _noise(3, 16, 16))


def _wan_vae() -> Made:
    return case(
        df.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]),
        _noise(3, 5, 16, 16),
    )


def _cogvideox_vae() -> Made:
    model = df.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        temporal_compression_ratio=4,
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
    )
    return case(model, _noise(3, 8, 16, 16))


def _ltx_vae() -> Made:
    model = df.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        encoder_causal=True,
        decoder_causal=False,
    )
    return case(model, _noise(3, 9, 32, 32))


_CASES: dict[str, dict[str, Callable[[], Made]]] = {
    "unet": {
        "unet_2d": lambda: case(_unet("AttnDownBlock2D", "AttnUpBlock2D", attention_head_dim=8), _noise(3, 16, 16), _steps()),
        "unet_2d_skip": lambda: case(
            df.UNet2DModel(
                sample_size=16,
                layers_per_block=1,
                block_out_channels=(32, 32),
                norm_num_groups=8,
                attention_head_dim=8,
                down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
                up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            ),
            _noise(3, 16, 16),
            _steps(),
        ),
        "unet_2d_resnet": lambda: case(
            _unet("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", resnet_time_scale_shift="scale_shift", add_attention=False),
            _noise(3, 16, 16),
            _steps(),
        ),
        "unet_2d_condition": lambda: case(_condition(), _noise(4, 16, 16), _steps(), _noise(6, 32)),
        "unet_2d_condition_linear": lambda: case(_condition(use_linear_projection=True), _noise(4, 16, 16), _steps(), _noise(6, 32)),
        "unet_2d_class": lambda: _adm("class"),
        "unet_2d_text_time": lambda: _adm("text_time"),
        "unet_1d": _unet_1d,
        "unet_3d": _unet_3d,
        "unet_spatio_temporal": _unet_spatio_temporal,
        "uvit": _uvit,
        "stable_cascade": _cascade,
        "controlnet": _controlnet,
        "t2i_adapter": lambda: case(df.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=4), _noise(3, 16, 16)),
    },
    "transformer": {
        "dit": _dit,
        "transformer_2d": _transformer_2d,
        "pixart": _pixart,
        "sd3": _sd3,
        "sd3_control": lambda: _sd3("SD3ControlNetModel", controlnet_cond=_noise(4, 8, 8)),
        "flux": _flux,
        "flux_control": _flux_control,
        "flux2": _flux2,
        "chroma": _chroma,
        "bria": _bria,
        "qwen_image": _qwen,
        "hunyuan_dit": _hunyuan_dit,
        "hunyuan_video": _hunyuan_video,
        "wan": _wan,
        "ltx": _ltx,
        "mochi": _mochi,
        "cogvideox": _cogvideox,
        "cogview3": _cogview3,
        "cogview4": _cogview4,
        "sana": _sana,
        "aura_flow": _aura,
        "allegro": _allegro,
        "latte": _latte,
        "lumina2": _lumina2,
        "lumina_next": _lumina_next,
        "stable_audio": _stable_audio,
        "cosmos": _cosmos,
        "hidream": _hidream,
        "prior": _prior,
    },
    "autoencoder": {
        "kl": lambda: case(df.AutoencoderKL(**_ENCODER, **_BOTH), _noise(3, 16, 16)),
        "kl_asymmetric": lambda: case(
            df.AsymmetricAutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                down_block_out_channels=(16, 32),
                up_block_types=("UpDecoderBlock2D",) * 2,
                up_block_out_channels=(16, 32),
                latent_channels=4,
                norm_num_groups=8,
            ),
            _noise(3, 16, 16),
        ),
        "vq": lambda: case(df.VQModel(**_ENCODER, **_BOTH, num_vq_embeddings=16), _noise(3, 16, 16)),
        "tiny": lambda: case(
            df.AutoencoderTiny(
                encoder_block_out_channels=(16, 16),
                decoder_block_out_channels=(16, 16),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
                upsampling_scaling_factor=2,
            ),
            _noise(3, 16, 16),
        ),
        "temporal_decoder": lambda: case(
            df.AutoencoderKLTemporalDecoder(block_out_channels=(32, 64), latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2),
            sample=_noise(3, 16, 16),
            num_frames=1,
        ),
        "dc": _autoencoder_dc,
        "oobleck": lambda: case(
            df.AutoencoderOobleck(
                encoder_hidden_size=8,
                downsampling_ratios=[2, 4],
                channel_multiples=[1, 2],
                decoder_channels=8,
                decoder_input_channels=4,
                audio_channels=2,
            ),
            _noise(2, 32),
        ),
        "wan": _wan_vae,
        "cogvideox": _cogvideox_vae,
        "ltx": _ltx_vae,
    },
}

TASKS = tuple(_CASES)


def kinds(task: str) -> list[str]:
    """The models of a task."""
    return list(_CASES[task])


def made(task: str, kind: str) -> Made:
    """A small model of a kind."""
    torch.manual_seed(0)
    return _CASES[task][kind]()
