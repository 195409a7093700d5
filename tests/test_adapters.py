"""Adapters as they are built around a model's own layers: frozen bases, low-rank pairs, magnitudes, scales, virtual tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import meshpar as mp
from meshpar.simulate import local_tensors
from tests.models import GPT
from tests.pool import Pool


class LoRA(nn.Module):
    """y = base(x) + B A x; with magnitudes (DoRA) the columns of W + B A have lengths of their own."""

    def __init__(self, base: nn.Linear, *, magnitudes: bool = False) -> None:
        super().__init__()
        self.base_layer, self.magnitudes = base, magnitudes
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base.out_features, bias=False)})
        self.scaling = {"default": 2.0}
        if magnitudes:
            self.lora_magnitude_vector = nn.ParameterDict({"default": nn.Parameter(base.weight.detach().norm(dim=1) * 1.1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        for name in self.lora_A:
            a, b, scale = self.lora_A[name], self.lora_B[name], self.scaling[name]
            if not self.magnitudes:
                result = result + b(a(x)) * scale
                continue
            weight = self.base_layer.weight
            length = (weight + scale * b.weight @ a.weight).norm(p=2, dim=1).detach()
            m = (self.lora_magnitude_vector[name] / length).view(1, -1)
            result = result + (m - 1) * F.linear(x, weight) + m * b(a(x)) * scale
        return result


class IA3(nn.Module):
    """Scales of what a layer gives, or of what it is given."""

    def __init__(self, base: nn.Linear, *, inputs: bool = False) -> None:
        super().__init__()
        self.base_layer, self.inputs = base, inputs
        self.ia3_l = nn.ParameterDict(
            {"default": nn.Parameter(torch.rand((1, base.in_features) if inputs else (base.out_features, 1)) + 0.5)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.ia3_l["default"].flatten()
        found: torch.Tensor = self.base_layer(x * scale) if self.inputs else self.base_layer(x) * scale
        return found


class LoRAEmbedding(nn.Module):
    """Low-rank pairs of an embedding, whose table may be the head's too."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base_layer, self.num_embeddings = base, base.num_embeddings
        self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.randn(4, base.num_embeddings))})
        self.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(torch.randn(base.embedding_dim, 4))})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (
            self.base_layer(ids) + F.embedding(ids, self.lora_embedding_A["default"].T) @ self.lora_embedding_B["default"].T
        )
        return found


class Virtual(nn.Module):
    """Virtual tokens before the embedded ones, cut off again behind the layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.prompt_encoder = nn.ModuleDict({"default": nn.Embedding(4, base.in_features)})
        self.register_buffer("prompt_tokens", torch.arange(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        prompt = self.prompt_encoder["default"](self.prompt_tokens).unsqueeze(0).expand(x.shape[0], -1, -1)
        y = self.base_layer(torch.cat([prompt, x], 1))
        found: torch.Tensor = y[:, 4:] + y[:, :4].mean(1, keepdim=True)
        return found


KINDS: dict[str, dict[str, Callable[[Any], nn.Module]]] = {
    "lora": {"qkv": LoRA, "out": LoRA, "gate_up": LoRA, "down": LoRA, "head": LoRA, "embed": LoRAEmbedding},
    "dora": dict.fromkeys(("qkv", "out", "gate_up", "down"), lambda base: LoRA(base, magnitudes=True)),
    "ia3": {"qkv": IA3, "down": lambda base: IA3(base, inputs=True), "out": IA3},
    "prompt": {"qkv": Virtual},
}
NAMES = {"lora": 20, "dora": 24, "ia3": 6, "prompt": 4}
"""How many tensors the adapters alone have."""


def adapted(kind: str, kv: int = 8) -> nn.Module:
    """A model with fused projections and a tied head, frozen, and adapters around its layers."""
    torch.manual_seed(3)
    model = GPT(kv=kv).requires_grad_(False)
    for path, module in list(model.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if leaf in KINDS[kind]:
            model.get_submodule(parent).add_module(leaf, KINDS[kind][leaf](module))
    return model.double()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(53, (4, 12), generator=torch.Generator().manual_seed(4))
    return {"ids": ids, "labels": ids.roll(1, 1)}


def trains(kind: str, spec: str, kv: int = 8, **config: Any) -> None:
    """Loss and gradients of the adapters, and the parameters after a step: those of one device. Bases get none, and stay."""
    model, whole = adapted(kind, kv), batch()
    alone = copy.deepcopy(model)
    loss = alone(**whole)
    loss.backward()
    mesh = mp.make_mesh(spec)
    local = mp.local_batch(whole, mesh)
    pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(**config))
    for found in local_tensors(pm.train_step(**local)).values():
        torch.testing.assert_close(found, loss.detach(), rtol=1e-11, atol=0)
    wanted = dict(alone.named_parameters())
    for name, parameter in pm.named_parameters():
        if wanted[name].grad is None:
            assert parameter.grad is None and not parameter.requires_grad, name
            continue
        for grad in local_tensors(mp.full_grad(parameter)).values():
            torch.testing.assert_close(grad, wanted[name].grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    for parameters in (pm.parameters(), alone.parameters()):
        torch.optim.AdamW([{"params": [p for p in parameters if p.requires_grad]}], lr=1e-2).step()
    for name, parameter in pm.named_parameters():
        for value in local_tensors(mp.full_tensor(parameter)).values():
            torch.testing.assert_close(value, wanted[name].detach(), rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    state = pm.state_dict()
    if "pp" not in (mesh.mesh_dim_names or ()):
        own = [name for name in state if any(word in name for word in ("lora_", "ia3_", "prompt_"))]
        assert own == [name for name in model.state_dict() if any(word in name for word in ("lora_", "ia3_", "prompt_"))]
        assert len(own) == NAMES[kind]


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("kind", "spec"), [(kind, "tp=2") for kind in KINDS] + [("dora", "dp=2,tp=2")])
def test_adapters_on_simulated_ranks(kind: str, spec: str) -> None:
    with mp.simulate(2 * spec.count("=")):
        trains(kind, spec)


@pytest.mark.slow
def test_adapters_where_the_sequence_is_cut() -> None:
    with mp.simulate(4):
        trains("dora", "cp=2,tp=2")


def test_fewer_keys_in_a_fused_layer() -> None:
    with mp.simulate(2):
        trains("lora", "tp=2", kv=2)


@pytest.mark.slow
def test_adapters_over_stages_and_shared_out(gloo: Pool) -> None:
    gloo.run(trains, "lora", "pp=2", world=2, microbatches=2, timeout=120)
    gloo.run(trains, "dora", "dp=2,tp=2", world=4, timeout=120)


def test_quantised_bases_are_refused() -> None:
    class Params4bit(nn.Parameter):
        quant_state = "blocks of 64"

    model = adapted("lora")
    base = model.get_submodule("blocks.0.qkv.base_layer")
    base.weight = Params4bit(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with mp.simulate(2), pytest.raises(mp.ConfigError, match=r"blocks.0.qkv.base_layer.weight: quantised weights(.|\n)*bfloat16"):
        mp.parallelize(model, mp.make_mesh("tp=2"), example=batch())
