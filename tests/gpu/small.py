"""Small models on a device, and what one device computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import meshpar as mp
from meshpar._torch import LocalTensor

SIZES: Mapping[str, Mapping[str, float]] = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 256,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "attn_pdrop": 0.0},
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
UNITS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 6e-2}
"""What gradients may differ by, of the largest one: rotary tables and norms are computed in float32 whatever the dtype."""


def model_of(kind: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A causal language model with the same values wherever it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES[kind])
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    return model.to(device)


def batch_of(device: torch.device, samples: int = 4, length: int = 64) -> dict[str, torch.Tensor]:
    tokens = torch.randint(256, (samples, length), generator=torch.Generator().manual_seed(1)).to(device)
    return {"input_ids": tokens, "labels": tokens}


def expected(model: nn.Module, batch: Mapping[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the model itself."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


def farthest(pm: nn.Module, right: Mapping[str, torch.Tensor]) -> float:
    """How far gradients are from `right`, in the largest of each."""
    found = 0.0
    for name, parameter in pm.named_parameters():
        grad = mp.full_grad(parameter)
        assert grad is not None, name
        for one in each_rank(grad):
            assert one.device.type == parameter.device.type
            found = max(found, distance(one, right[name]))
    return found


def distance(value: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, in the largest element of what is right."""
    return float((value.double().cpu() - right).abs().max() / right.abs().max())


def each_rank(value: torch.Tensor) -> list[torch.Tensor]:
    """The value on every simulated rank; of a process, its own."""
    return list(value._local_tensors.values()) if isinstance(value, LocalTensor) else [value]
