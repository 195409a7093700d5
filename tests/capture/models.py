"""Small models for capture tests: transformers architectures by configuration, and plain torch ones; and the comparison with eager mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar.capture.export import capture
from meshpar.graph.captured import Captured
from meshpar.graph.run import run

_COMMON = dict(vocab_size=131, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_LLAMA = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64
)
_MOE = dict(num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, n_group=2, topk_group=1)
_LATENT = dict(q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
_BART = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
)

TRANSFORMERS: dict[str, Mapping[str, Any]] = {
    "llama": _LLAMA | dict(tie_word_embeddings=True),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": _LLAMA | dict(num_key_value_heads=None),
    "qwen3": _LLAMA | dict(head_dim=16),
    "gemma2": _LLAMA | dict(head_dim=16, sliding_window=8),
    "olmo2": _LLAMA,
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "opt": dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64),
    "phi3": _LLAMA,
    "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "gptj": dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
    "mpt": dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
    "cohere": _LLAMA,
    "bart": _BART | dict(max_position_embeddings=64),
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=8),
}
"""Causal language models: model type -> the configuration that makes it small."""

MIXTURES: dict[str, Mapping[str, Any]] = {
    "mixtral": _LLAMA | dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True),
    "deepseek_v3": _LLAMA | _MOE | _LATENT | dict(num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1),
    "qwen3_moe": _LLAMA | _MOE | dict(num_experts=4, head_dim=8),
    "olmoe": _LLAMA | dict(num_experts=4, num_experts_per_tok=2, output_router_logits=True),
    "granitemoe": _LLAMA | dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True),
    "jetmoe": _LLAMA | dict(num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    "llama4_text": _LLAMA | dict(num_local_experts=4, intermediate_size_mlp=32, head_dim=8, interleave_moe_layer_step=1),
    "gpt_oss": _LLAMA | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8),
}
"""Those with experts."""


def causal_lm(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny causal model of transformers, and a batch with uneven ignored labels."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    config = without_dropout(CONFIG_MAPPING[kind](**(_COMMON | dict((TRANSFORMERS | MIXTURES)[kind]))))
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    ids = torch.randint(3, 131, (2, 12))
    labels = ids.clone()
    labels[0, 5:] = -100
    return model, {"input_ids": ids, "labels": labels}


def without_dropout(config: Any) -> Any:
    for name, value in vars(config).items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)
        elif type(value).__name__.endswith("Config"):
            without_dropout(value)
    return config


def perturbed(model: nn.Module) -> nn.Module:
    """The model in float64, every parameter moved: fresh ones (zero biases, unit norms) hide errors."""
    model = model.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def assert_same(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    loss: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    tolerance: float = 1e-10,
    **options: Any,
) -> Captured:
    """Capture; run the graph and the model; loss, outputs, every gradient and every buffer must agree in float64."""
    captured = capture(model, args, kwargs, **options)
    state = {name: p for name, p in model.named_parameters()} | {name: b.clone() for name, b in model.named_buffers()}
    assert set(captured.parameters) <= set(state)
    torch.manual_seed(seed)
    values = run(captured, state, inputs_of(captured, args, kwargs))
    torch.manual_seed(seed)
    output = model(*args, **kwargs)
    expected = loss(output) if loss is not None else output["loss"] if isinstance(output, Mapping) else output.loss
    assert captured.loss is not None
    torch.testing.assert_close(values[captured.loss], expected, rtol=tolerance, atol=tolerance)
    _same_gradients(model, values[captured.loss], expected, tolerance)
    live = dict(model.named_buffers())
    for name, value in zip(captured.mutations, values[len(values) - len(captured.mutations) :], strict=True):
        torch.testing.assert_close(value, live[name])
        state[name] = value
    for name, value in live.items():
        torch.testing.assert_close(state[name], value, msg=lambda text, name=name: f"{name}: {text}")
    return captured


def _same_gradients(model: nn.Module, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    got = torch.autograd.grad(ours, parameters, allow_unused=True)
    expected = torch.autograd.grad(theirs, parameters, allow_unused=True)
    for name, g, e, p in zip(names, got, expected, parameters, strict=True):
        g, e = (torch.zeros_like(p) if x is None else x for x in (g, e))
        scale = e.abs().max().item() + 1e-6
        assert (g - e).abs().max().item() <= tolerance * scale, f"{name}: {(g - e).abs().max().item():.2e} of {scale:.2e}"


def inputs_of(captured: Captured, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    from torch.utils import _pytree as pytree

    from meshpar.graph.captured import Slot

    leaves, spec = pytree.tree_flatten((args, kwargs))
    assert spec == captured.in_spec
    return {str(slot.key): leaf for slot, leaf in zip(captured.in_leaves, leaves, strict=True) if isinstance(slot, Slot)}


class Attention(nn.Module):
    """Fused q|k|v, one linear."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, w))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A GPT as people write it by hand; returns (logits, loss)."""

    def __init__(
        self, *, width: int = 16, heads: int = 4, layers: int = 3, vocab: int = 37, length: int = 12, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class Translator(nn.Module):
    """torch's own encoder-decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(23, 16), nn.Embedding(29, 16)
        self.core = nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 29)

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1] - 1, device=target.device, dtype=self.head.weight.dtype)
        y = self.core(self.source(source), self.target(target[:, :-1]), tgt_mask=mask, tgt_is_causal=True)
        logits = self.head(y)
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)}


class ConvNet(nn.Module):
    """Batch norm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).mean((2, 3)))


class ViT(nn.Module):
    """A vision transformer with einops layers."""

    def __init__(self) -> None:
        super().__init__()
        from einops.layers.torch import Rearrange, Reduce

        self.patches = nn.Sequential(Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4), nn.Linear(48, 16))
        self.blocks = nn.Sequential(Block(16, 2, causal=False), Block(16, 2, causal=False))
        self.head = nn.Sequential(Reduce("b n c -> b c", "mean"), nn.Linear(16, 5))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(image)))


class Odd(nn.Module):
    """What functional graphs get wrong: in-place sums, views written to, buffers updated, gradients switched off, a detached branch."""

    scale: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.register_buffer("scale", torch.ones(6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.a(x)
        h += x
        h[:, :3].mul_(2.0)
        h[:, 4] = 0.5
        with torch.no_grad():
            norm = self.b(h).abs().mean(0)
            self.scale.mul_(0.9).add_(0.1 * norm)
            self.steps += 1
            with torch.enable_grad():
                extra = self.b(h).square()
        h = self.b(h) * self.scale + extra + self.frozen + h.detach()
        table = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=h.dtype)
        return {"loss": ((h + norm) * table).square().mean(), "kind": "odd", "count": 3, "none": None, "hidden": [h, (h * 2,)]}
