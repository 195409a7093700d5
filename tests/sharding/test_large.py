"""Models at their real widths, on `meta`, over tp=8: what stays whole on every rank is next to nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import meshpar as mp
from meshpar._torch import FakeStore
from meshpar.compile.programs import Programs
from meshpar.plan import Plan
from meshpar.sharding.types import Shard

MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
    "gpt2": dict(n_embd=12288, n_head=96, vocab_size=51200, n_positions=2048),
    "mixtral": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000),
}
"""Llama 3 8B, GPT-3 175B and Mixtral 8x7B, of two layers each."""


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield mp.make_mesh("tp=8")
    dist.destroy_process_group()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", MODELS)
def test_at_most_one_percent_of_the_parameters_stays_whole(mesh: DeviceMesh, name: str) -> None:
    warnings.filterwarnings("error", message="the static check")
    parameters = _plan(name, mesh).parameters
    sizes = {n: prod(p.shape) for n, p in parameters.items()}
    whole = [n for n, p in parameters.items() if not isinstance(p.placements["tp"], Shard)]
    assert sum(sizes[n] for n in whole) < 0.01 * sum(sizes.values())
    assert not [n for n in whole if len(parameters[n].shape) > 1]


def _plan(name: str, mesh: DeviceMesh) -> Plan:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **MODELS[name], **{"n_layer" if name == "gpt2" else "num_hidden_layers": 2})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tokens = torch.zeros(1, 2048, dtype=torch.long)
    return Programs(model, mesh, mp.ParallelConfig()).make((), {"input_ids": tokens, "labels": tokens}, training=True).plan
