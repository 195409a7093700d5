"""A batch of four samples with a loss, for every task: `batch(task, config, model)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 131
SAMPLES, LENGTH = 4, 12

Batch = dict[str, Any]


def batch(task: str, config: Any, model: nn.Module) -> Batch:
    """What the model of a task is called with: tensors of four samples each, uneven where they may be."""
    return BATCHES[task](config, model)


# ---- text ------------------------------------------------------------------------------------------------------------------------------


def _ids(length: int = LENGTH, low: int = 3, high: int = VOCABULARY) -> Tensor:
    return torch.randint(low, high, (SAMPLES, length))


def _labels(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[0, : ids.shape[1] // 2] = -100
    labels[1, 3] = -100
    return labels


def _lengths() -> Tensor:
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
    mask[0, 9:] = 0
    return mask


def _text(config: Any, model: nn.Module) -> Batch:
    ids = _ids()
    return {"input_ids": ids, "labels": _labels(ids)}


def _translation(config: Any, model: nn.Module) -> Batch:
    if not config.is_encoder_decoder:
        return _text(config, model)
    longer = config.model_type in ("fsmt",)  # (shifts the input, not the labels)
    return {"input_ids": _ids(), "attention_mask": _lengths(), "labels": _labels(_ids(LENGTH if longer else 8))}


def _masked(config: Any, model: nn.Module) -> Batch:
    if config.model_type == "perceiver":  # predicts every position there is
        ids = _ids(config.max_position_embeddings)
        return {"inputs": ids, "labels": _labels(ids)}
    ids = _ids()
    return {"input_ids": ids, "attention_mask": _lengths(), "labels": _labels(ids)}


def _padded(model: nn.Module) -> Batch:
    """Ids that end in padding in one sample (who classifies a text by its last token looks for it), and what else a layout needs."""
    ids = _ids()
    ids[:, [1, 3, -1]] = 2
    ids[0, 9:] = 0
    ids[0, 8] = 2
    given: Batch = {"input_ids": ids, "attention_mask": _lengths()}
    takes = inspect.signature(model.forward).parameters
    if "bbox" in takes:
        corner = torch.randint(0, 16, (SAMPLES, LENGTH, 2))
        given["bbox"] = torch.cat([corner, corner + torch.randint(1, 12, (SAMPLES, LENGTH, 2))], -1)
    return given


def _one_label(config: Any, model: nn.Module) -> Batch:
    return _padded(model) | {"labels": torch.randint(0, config.num_labels, (SAMPLES,))}


def _token_labels(config: Any, model: nn.Module) -> Batch:
    return _padded(model) | {"labels": _labels(torch.randint(0, config.num_labels, (SAMPLES, LENGTH)))}


def _span(config: Any, model: nn.Module) -> Batch:
    """Where the answer starts and ends; past the end for one of them (not in this text), which is ignored."""
    return _padded(model) | {"start_positions": torch.tensor([1, 3, 2, LENGTH]), "end_positions": torch.tensor([4, 3, 7, 5])}


def _choice(config: Any, model: nn.Module) -> Batch:
    ids = torch.randint(3, VOCABULARY, (SAMPLES, 3, LENGTH))
    return {"input_ids": ids, "attention_mask": _lengths()[:, None].expand_as(ids).contiguous(), "labels": torch.randint(0, 3, (SAMPLES,))}


# ---- images ----------------------------------------------------------------------------------------------------------------------------


def _side(config: Any) -> int:
    for holder in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        size = getattr(holder, "image_size", None)
        if size:
            return size if isinstance(size, int) else size[0]
    return 64 if hasattr(config, "backbone_config") else 32


def _pixels(config: Any) -> Tensor:
    size = _side(config)
    channels = getattr(config, "num_channels", None) or getattr(getattr(config, "vision_config", None), "num_channels", None) or 3
    return torch.randn(SAMPLES, channels, size, size)


def _image(config: Any, model: nn.Module) -> Batch:
    if model.main_input_name == "input_ids" and "pixel_values" not in inspect.signature(model.forward).parameters:
        return {"input_ids": _ids(), "labels": torch.randint(0, config.num_labels, (SAMPLES,))}
    labels = {"labels": torch.randint(0, config.num_labels, (SAMPLES,))}
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if token is not None and "input_ids" in inspect.signature(model.forward).parameters:
        return _with_images(config, model) | labels
    patches = getattr(getattr(config, "vision_config", None), "num_patches", None)
    if patches:
        return _packed_patches(config.vision_config) | labels
    name = "pixel_values" if model.main_input_name == "input_ids" else model.main_input_name
    return {name: _pixels(config), **labels}


def _packed_patches(config: Any) -> Batch:
    side = int(config.num_patches**0.5)
    values = torch.randn(SAMPLES, config.num_patches, 3 * config.patch_size**2)
    places = {"pixel_attention_mask": torch.ones(SAMPLES, config.num_patches).long(), "spatial_shapes": torch.full((SAMPLES, 2), side)}
    return {"pixel_values": values, **places}


def _segments(config: Any, model: nn.Module) -> Batch:
    pixels = _pixels(config)
    labels = torch.randint(0, config.num_labels, (SAMPLES, *pixels.shape[-2:]))
    labels[0, :5] = 255
    return {"pixel_values": pixels, "labels": labels}


def _patches(config: Any, model: nn.Module) -> Batch:
    """Some patches are hidden, the same number of each image where the model counts them."""
    pixels = _pixels(config)
    takes = inspect.signature(model.forward).parameters
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[-1]
    count = (pixels.shape[-1] // patch) ** 2
    if "noise" in takes:
        return {"pixel_values": pixels, "noise": torch.rand(SAMPLES, count)}
    hidden = torch.rand(SAMPLES, count).argsort(1) < count * 2 // 5
    if "video" in config.model_type:
        frames = torch.randn(SAMPLES, config.num_frames, 3, config.image_size, config.image_size)
        order = torch.rand(SAMPLES, count * config.num_frames // config.tubelet_size).argsort(1)
        return {"pixel_values": frames, "bool_masked_pos": order < 5}
    if "labels" in takes:
        return {"pixel_values": pixels, "bool_masked_pos": hidden, "labels": torch.randint(0, config.vocab_size, (int(hidden.sum()),))}
    return {"pixel_values": pixels, "bool_masked_pos": hidden}


def _video(config: Any, model: nn.Module) -> Batch:
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 4)
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", 32)
    name = model.main_input_name if model.main_input_name.startswith("pixel") else "pixel_values"
    return {name: torch.randn(SAMPLES, frames, 3, size, size), "labels": torch.randint(0, config.num_labels, (SAMPLES,))}


def _depth(config: Any, model: nn.Module) -> Batch:
    pixels = _pixels(config)
    return {"pixel_values": pixels, "labels": torch.rand(SAMPLES, *pixels.shape[-2:]) + 0.1}


def _boxes(config: Any, model: nn.Module) -> Batch:
    """As the processors give them: a list with the boxes of each image, which may be many or few."""
    boxes = [torch.rand(n, 4) * 0.4 + 0.1 for n in (2, 1, 3, 2)]
    labels = [{"class_labels": torch.randint(0, config.num_labels, (len(b),)), "boxes": b} for b in boxes]
    return {"pixel_values": _pixels(config), "labels": labels}


def _masks(config: Any, model: nn.Module) -> Batch:
    pixels = _pixels(config)
    masks = [(torch.rand(n, *pixels.shape[-2:]) < 0.4).float() for n in (2, 1, 3, 2)]
    classes = [torch.randint(0, config.num_labels, (len(m),)) for m in masks]
    if "mask_labels" in inspect.signature(model.forward).parameters:
        return {"pixel_values": pixels, "mask_labels": masks, "class_labels": classes}
    labels = [{"class_labels": c, "boxes": torch.rand(len(c), 4) * 0.4 + 0.1, "masks": m} for c, m in zip(classes, masks, strict=True)]
    return {"pixel_values": pixels, "labels": labels}


# ---- sound -----------------------------------------------------------------------------------------------------------------------------


def _sound(config: Any, model: nn.Module) -> Tensor:
    if model.main_input_name == "input_values" and "max_length" not in vars(config):
        return torch.randn(SAMPLES, 1600)
    bins = next(
        (getattr(config, n) for n in ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim") if hasattr(config, n)), 16
    )
    if getattr(config, "model_type", "") == "whisper":
        return torch.randn(SAMPLES, bins, 2 * config.max_source_positions)
    return torch.randn(SAMPLES, getattr(config, "max_length", 32) if model.main_input_name == "input_values" else 32, bins)


def _ctc(config: Any, model: nn.Module) -> Batch:
    sound = _sound(config, model)
    labels = torch.randint(1, 20, (SAMPLES, 3))
    labels[0, 2] = -100 if sound.dim() == 2 else labels[0, 2]
    mask = {} if sound.dim() == 2 else {"attention_mask": torch.ones(sound.shape[:2]).long()}
    return {model.main_input_name: sound, **mask, "labels": labels}


def _speaker(config: Any, model: nn.Module) -> Batch:
    sound = _sound(config, model)
    longer = sound.repeat(1, 6, *(1 for _ in sound.shape[2:]))
    return {model.main_input_name: longer, "labels": torch.randint(0, config.num_labels, (SAMPLES,))}


def _audio(config: Any, model: nn.Module) -> Batch:
    return {model.main_input_name: _sound(config, model), "labels": torch.randint(0, config.num_labels, (SAMPLES,))}


def _frames(config: Any, model: nn.Module) -> Batch:
    """A class of every frame, one-hot."""
    sound = _sound(config, model)
    with torch.no_grad():
        count = model(**{model.main_input_name: sound}).logits.shape[1]
    labels = nn.functional.one_hot(torch.randint(0, config.num_labels, (SAMPLES, count)), config.num_labels)
    return {model.main_input_name: sound, "labels": labels}


def _speech(config: Any, model: nn.Module) -> Batch:
    if model.main_input_name == "input_ids":
        return _text(config, model)
    return {model.main_input_name: _sound(config, model), "labels": _labels(_ids(8))}


def _spectrogram(config: Any, model: nn.Module) -> Batch:
    ids = _ids(high=20)
    if config.model_type == "speecht5":
        sound = torch.randn(SAMPLES, 10, config.num_mel_bins)
        sound[::2, 6:] = -100.0  # (not there)
        shorter = torch.ones(SAMPLES, LENGTH).long()
        shorter[::2, 9:] = 0
        return {"input_ids": ids, "attention_mask": shorter, "speaker_embeddings": torch.randn(SAMPLES, 512), "labels": sound}
    lasting = torch.ones(SAMPLES, LENGTH).long()
    each = {f"{n}_labels": torch.randn(SAMPLES, LENGTH, 1) for n in ("pitch", "energy")}
    sound = torch.randn(SAMPLES, LENGTH, config.num_mel_bins)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "spectrogram_labels": sound, "duration_labels": lasting, **each}


# ---- images or sound, with text ----------------------------------------------------------------------------------------------------------


def _contrast(config: Any, model: nn.Module) -> Batch:
    takes = inspect.signature(model.forward).parameters
    ids = _ids(8)
    ids[:, -1] = 2
    given: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "input_features" in takes:
        side = config.audio_config.spec_size
        given |= {
            "input_features": torch.randn(SAMPLES, 1, side, config.audio_config.num_mel_bins),
            "is_longer": torch.zeros(SAMPLES, 1).bool(),
        }
    elif "spatial_shapes" in takes:
        given |= _packed_patches(config.vision_config)
    elif config.model_type == "xclip":
        given["pixel_values"] = torch.randn(SAMPLES, config.vision_config.num_frames, 3, *[config.vision_config.image_size] * 2)
    else:
        given["pixel_values"] = _pixels(config)
    return {k: v for k, v in given.items() if k in takes} | {"return_loss": True}


def _with_images(config: Any, model: nn.Module) -> Batch:
    """One image in every text: as many image tokens as the model makes features of it."""
    from .pictures import pictured

    return pictured(config, model)


def _asked(config: Any, model: nn.Module) -> Batch:
    ids = _ids(8)
    given: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _pixels(config)}
    if config.model_type == "vilt":
        return given | {"labels": torch.rand(SAMPLES, config.num_labels)}
    return given | {"labels": _labels(ids)}


# ---- numbers over time -------------------------------------------------------------------------------------------------------------------


def _series(config: Any, model: nn.Module) -> Batch:
    takes = inspect.signature(model.forward).parameters
    if "past_time_features" in takes:
        past = config.context_length + max(config.lags_sequence)
        rest = {"past_values": (past,), "past_time_features": (past, config.num_time_features)}
        rest |= {"future_values": (config.prediction_length,), "future_time_features": (config.prediction_length, config.num_time_features)}
        given: Batch = {k: torch.rand(SAMPLES, *shape) + 0.1 for k, shape in rest.items()}
        seen = torch.ones(SAMPLES, past)
        seen[0, :4] = 0.0
        given |= {"past_observed_mask": seen, "future_observed_mask": torch.ones(SAMPLES, config.prediction_length)}
        given["future_observed_mask"][1, 0] = 0.0
        return given
    if "freq" in takes or config.model_type.startswith("timesfm"):
        given = {"past_values": torch.randn(SAMPLES, config.context_length), "future_values": torch.randn(SAMPLES, config.horizon_length)}
        return given | ({"freq": torch.zeros(SAMPLES, 1).long()} if "freq" in takes else {})
    channels = config.num_input_channels
    given = {"past_values": torch.randn(SAMPLES, config.context_length, channels)}
    if "future_values" in takes:
        given["future_values"] = torch.randn(SAMPLES, config.prediction_length, channels)
    return given


BATCHES: dict[str, Callable[[Any, nn.Module], Batch]] = {
    "causal": _text,
    "seq2seq": _translation,
    "masked": _masked,
    "image": _image,
    "segmentation": _segments,
    "ctc": _ctc,
    "audio": _audio,
    "speech": _speech,
    "multimodal": _text,
    "pictured": _with_images,
    "sequence": _one_label,
    "token": _token_labels,
    "question": _span,
    "choice": _choice,
    "contrastive": _contrast,
    "patches": _patches,
    "video": _video,
    "depth": _depth,
    "detection": _boxes,
    "panoptic": _masks,
    "frames": _frames,
    "speaker": _speaker,
    "spectrogram": _spectrogram,
    "visual_question": _asked,
    "forecast": _series,
}
