"""Texts with images: as many image tokens in the ids as the model makes features of an image."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES, BEFORE, AFTER = 4, 3, 8


def pictured(config: Any, model: nn.Module) -> dict[str, Any]:
    """One image in every text, in the form that the model's own processor gives it."""
    takes = inspect.signature(model.forward).parameters
    images = _images(config, takes)
    token = _token(config)
    if token is None:
        ids = _ids(config, BEFORE + AFTER)
    else:
        count = _count(config, model, images)
        ids = _ids(config, BEFORE + count + AFTER)
        ids[:, BEFORE : BEFORE + count] = token
    labels = ids.clone()
    labels[:, : ids.shape[1] - AFTER] = -100
    labels[0, -3:] = -100
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **images}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in takes and token is not None:
            given[name] = (ids == token).long()
    if "image_embeds_position_mask" in takes:
        given["image_embeds_position_mask"] = (torch.arange(ids.shape[1]) < config.latent_query_num).long().expand(ids.shape).clone()
    return {name: value for name, value in given.items() if name in takes or name in images}


def _ids(config: Any, length: int) -> Tensor:
    return torch.randint(9, 120, (SAMPLES, length))


def _token(config: Any) -> int | None:
    for name in ("image_token_id", "image_token_index", "media_placeholder_token_id", "vision_token_id"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def _vision(config: Any) -> Any:
    for name in ("vision_config", "vision_tower_config", "vit_config", "vision"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def _images(config: Any, takes: Any) -> dict[str, Any]:
    vision = _vision(config)
    patch = getattr(vision, "patch_size", 8)
    patch = patch if isinstance(patch, int) else patch[0]
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 4 * patch
    size = size if isinstance(size, int) else size[0]
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    if "image_grid_thw" in takes:
        rows = getattr(vision, "spatial_merge_size", 2) * 2
        width = channels * getattr(vision, "temporal_patch_size", 1) * patch**2
        grid = torch.tensor([[1, rows, rows]] * SAMPLES)
        return {"pixel_values": torch.randn(SAMPLES * rows * rows, width), "image_grid_thw": grid}
    if "aspect_ratio_ids" in takes:
        tiles = vision.max_num_tiles
        shown = {"pixel_values": torch.randn(SAMPLES, 1, tiles, channels, size, size), "aspect_ratio_ids": torch.ones(SAMPLES, 1).long()}
        mask = torch.zeros(SAMPLES, 1, tiles).long()
        mask[..., 0] = 1
        return shown | {"aspect_ratio_mask": mask, "cross_attention_mask": mask[:, None].expand(SAMPLES, BEFORE + AFTER, 1, tiles).clone()}
    pixels = torch.randn(SAMPLES, channels, size, size)
    if "pixel_attention_mask" in takes:
        return {"pixel_values": pixels[:, None], "pixel_attention_mask": torch.ones(SAMPLES, 1, size, size).bool()}
    if "spatial_shapes" in takes:
        count = getattr(vision, "num_patches", 16)
        side = int(count**0.5)
        shown = {"pixel_values": torch.randn(SAMPLES, count, channels * patch**2), "spatial_shapes": torch.full((SAMPLES, 2), side)}
        return shown | {"pixel_attention_mask": torch.ones(SAMPLES, count).long()}
    if "flattened_patches" in takes:
        places = torch.stack(torch.meshgrid(torch.arange(1.0, 5), torch.arange(1.0, 5), indexing="ij"), -1).reshape(1, 16, 2)
        patches = torch.cat([places.expand(SAMPLES, 16, 2), torch.randn(SAMPLES, 16, channels * patch**2)], -1)
        return {"flattened_patches": patches, "attention_mask": torch.ones(SAMPLES, 16).long()}
    if "image_sizes" in takes and (hasattr(config, "image_grid_pinpoints") or getattr(vision, "model_type", "") == "pixtral"):
        tiles = 2 if getattr(config, "image_grid_pinpoints", None) else 0
        many = torch.randn(SAMPLES, tiles, channels, size, size) if tiles else pixels
        return {"pixel_values": many, "image_sizes": torch.tensor([[size, size]] * SAMPLES)}
    return {"pixel_values": pixels}


def _count(config: Any, model: nn.Module, images: dict[str, Any]) -> int:
    """How many features the model makes of one image."""
    owner = next((m for m in (model, getattr(model, "model", None)) if hasattr(m, "get_image_features")), None)
    if owner is None:
        return 0
    takes = inspect.signature(owner.get_image_features).parameters
    with torch.no_grad():
        found = owner.get_image_features(**{name: value for name, value in images.items() if name in takes or "kwargs" in takes})
    while not isinstance(found, Tensor) and not (isinstance(found, (list, tuple)) and all(isinstance(f, Tensor) for f in found)):
        found = getattr(found, "pooler_output", None) if getattr(found, "pooler_output", None) is not None else found[0]
    whole = found if isinstance(found, Tensor) else torch.cat([f.reshape(-1, f.shape[-1]) for f in found])
    return whole.numel() // whole.shape[-1] // SAMPLES
