"""Small models for tests: plain PyTorch ones written here, and tiny transformers ones by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from benchmarks.pipeline_exactness.models import EncoderDecoder


class GPT(nn.Module):
    """Fused q|k|v of grouped heads, packed gate|up, tied head, learned positions, blocks that are ModuleDicts."""

    def __init__(self, *, heads: int = 8, kv: int = 8, width: int = 32, vocab: int = 53, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.kv, self.width, self.dropout = heads, kv, width, dropout
        d = width // heads
        self.embed, self.positions = nn.Embedding(vocab, width), nn.Embedding(32, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, (heads + 2 * kv) * d),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "gate_up": nn.Linear(width, 80),
                    "down": nn.Linear(40, width),
                }
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        b, t = ids.shape
        d = self.width // self.heads
        x = self.embed(ids) + self.positions(torch.arange(t, device=ids.device))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm1"](x)).split([self.heads * d, self.kv * d, self.kv * d], -1)
            q = q.view(b, t, self.heads, d).transpose(1, 2)
            k, v = (y.view(b, t, self.kv, d).transpose(1, 2).repeat_interleave(self.heads // self.kv, 1) for y in (k, v))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, self.width)
            x = x + F.dropout(block["out"](a), self.dropout, self.training)
            gate, up = block["gate_up"](block["norm2"](x)).chunk(2, -1)
            x = x + block["down"](F.silu(gate) * up)
        return F.cross_entropy(self.head(self.norm(x)).view(-1, self.embed.num_embeddings), labels.view(-1))


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        a = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.out(rearrange(a @ v, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """einops layers, a class token, 17 positions (uneven on 2 ranks)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Sequential(Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4), nn.Linear(48, 32))
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 17, 32))
        self.blocks = nn.Sequential(*[ViTBlock(32, 4) for _ in range(2)])
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 10))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.patch(images)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return F.cross_entropy(self.head(self.blocks(x)[:, 0]), labels)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(12, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(16),
                    "token1": nn.Linear(9, 20),
                    "token2": nn.Linear(20, 9),
                    "norm2": nn.LayerNorm(16),
                    "channel1": nn.Linear(16, 24),
                    "channel2": nn.Linear(24, 16),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.patch(x)
        for block in self.blocks:
            x = x + block["token2"](F.gelu(block["token1"](block["norm1"](x).transpose(1, 2)))).transpose(1, 2)
            x = x + block["channel2"](F.gelu(block["channel1"](block["norm2"](x))))
        return F.cross_entropy(self.head(x.mean(1)), labels)


class BatchNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 6), nn.BatchNorm1d(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).pow(3).mean()


class Contrastive(nn.Module):
    """Every sample against every other of the global batch, and a weight penalty, which must be counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 16)
        self.right = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 16))
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = F.normalize(self.left(x), dim=-1), F.normalize(self.right(y), dim=-1)
        logits = a @ b.T * self.scale.exp()
        labels = torch.arange(x.shape[0], device=x.device)
        penalty = sum((p**2).sum() for p in self.parameters())
        spread = F.relu(1 - torch.sqrt(a.var(dim=0) + 1e-4)).mean()
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2 + 0.01 * penalty + spread


def numbers(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


def plain(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A plain PyTorch model and its global batch of 4 (8 for the ones that mix samples), with uneven ignored labels."""
    torch.manual_seed(0)
    labels = numbers(53, 4, 12)
    labels[0, :5] = -100
    labels[1] = -100
    images = {"images": torch.randn(4, 3, 16, 16), "labels": numbers(10, 4)}
    tokens = {"ids": numbers(53, 4, 12), "labels": labels}
    pairs = {"x": torch.randn(8, 8), "y": torch.randn(8, 8)}
    made: dict[str, Any] = {
        "gpt": lambda: (GPT(), tokens),
        "gpt_kv2": lambda: (GPT(kv=2), tokens),
        "gpt_dropout": lambda: (GPT(dropout=0.2), tokens),
        "encoder_decoder": lambda: (
            EncoderDecoder(),
            {"source": numbers(37, 4, 8), "target": numbers(37, 4, 6), "labels": numbers(37, 4, 6)},
        ),
        "vit": lambda: (ViT(), images),
        "mixer": lambda: (Mixer(), {"x": torch.randn(4, 9, 12), "labels": numbers(10, 4)}),
        "batch_norm": lambda: (BatchNormNet(), {"x": torch.randn(8, 3, 8, 8)}),
        "contrastive": lambda: (Contrastive(), pairs),
    }
    return made[name]()  # type: ignore[no-any-return]


_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
_BART = {
    "d_model": 64,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 128,
}
_LATENT = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 8,
}
_BASE = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gptj": _GPT2,
    "bart": _BART,
    "opt": _BART,
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
    "gpt_neox": {**_BASE, "rotary_pct": 0.5},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4},
    "mixtral": {**_BASE, "num_local_experts": 4, "output_router_logits": True},
    "deepseek_v3": {**_BASE, **_LATENT},
}


def tiny(name: str, **changes: Any) -> nn.Module:
    """A tiny causal language model of transformers with random weights and a vocabulary of 131."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    sizes = {**_SIZES.get(name, _BASE), "vocab_size": 131, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, **changes}
    config = AutoConfig.for_model(name, **sizes)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager")  # type: ignore[no-any-return]


def text(samples: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Token ids and labels, of which each sample ignores another number."""
    torch.manual_seed(5)
    ids = torch.randint(2, 131, (samples, length))
    labels = ids.clone()
    labels[0, :7] = -100
    labels[1, 3] = -100
    return {"input_ids": ids, "labels": labels}
