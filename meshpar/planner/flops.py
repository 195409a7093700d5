"""Model FLOPs per token, in the three conventions that published utilisations use."""

from __future__ import annotations

from typing import Literal

from meshpar.errors import ConfigError
from meshpar.planner.transformer import Transformer

Convention = Literal["causal", "noncausal", "with-recompute"]
CONVENTIONS: dict[str, str] = {
    "causal": "attention counts the pairs of tokens that may see each other (arXiv 2504.14960, Megatron-Bridge)",
    "noncausal": "attention counts all pairs (arXiv 2205.05198, torchtitan, nanotron, NeMo, dgxc-benchmarking)",
    "with-recompute": "noncausal, and the forward of every block counts twice (the percentage of peak of arXiv 2104.04473)",
}


def flops_per_token(model: Transformer, seq: int, convention: Convention = "causal") -> float:
    """FLOPs of forward and backward for one token of a sequence of `seq`.

    6 per parameter of a product, plus 6 per pair of tokens and width for attention; under "with-recompute" blocks count 8 instead of 6.
    Raises `ConfigError` for another convention.

    >>> m = Transformer(layers=96, hidden=12288, heads=96, ffn=49152, vocab=51200, gated=False, tied=True, positions=2048)
    >>> h, l, V, s = 12288, 96, 51200, 2048
    >>> closed = 96 * l * h**2 * (1 + s / (6 * h) + V / (16 * l * h))
    >>> abs(flops_per_token(m, 2048, "with-recompute") / closed - 1) < 1e-9
    True
    """
    if convention not in CONVENTIONS:
        raise ConfigError(f"no convention {convention!r} of counting FLOPs. Known: {', '.join(CONVENTIONS)}.")
    causal = convention == "causal"
    pairs = sum(model.attended(layer, seq, causal=causal) for layer in range(model.layers + model.predicts))
    attention = 2 * model.heads * model.score_width * pairs
    heads = 2 * (1 + model.predicts) * model.hidden * model.vocab
    blocks = 2 * model.active_matrices - heads + attention
    return blocks * (4 if convention == "with-recompute" else 3) + heads * 3


def mfu(model: Transformer, seq: int, tokens_per_second: float, peak: float, convention: Convention = "causal") -> float:
    """Share of an accelerator's peak FLOP/s that a rate of tokens per accelerator and second is, in a convention.

    >>> m = Transformer(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256)
    >>> round(mfu(m, 8192, 10682.4, 989e12, "noncausal"), 3)
    0.626
    """
    return tokens_per_second * flops_per_token(model, seq, convention) / peak
