"""A transformer as its dimensions: what the analytic workload, the flops and the search need to know of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshpar.errors import ConfigError, raise_all


@dataclass(frozen=True)
class Latent:
    """Attention whose queries, keys and values come through narrow projections. All fields are widths per token (ranks) or per head."""

    query_rank: int
    key_value_rank: int
    plain: int
    """Width per head of the part of queries and keys without positions."""
    rotary: int
    """Width of the part with positions; keys share one over all heads."""
    value: int
    """Width per head of the values."""


@dataclass(frozen=True)
class Transformer:
    """Dimensions of a decoder. Blocks are attention and a feed-forward part, dense or of experts.

    >>> round(Transformer(layers=96, hidden=12288, heads=96, ffn=49152, vocab=51200, gated=False, tied=True).parameters / 1e9)
    175
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    kv_heads: int | None = None
    """Key/value heads; None: as many as heads."""
    head_dim: int | None = None
    """Width of a head; None: hidden / heads."""
    gated: bool = True
    """Three matrices in the feed-forward part (gate, up, down) instead of two."""
    tied: bool = False
    """Embedding and head are one parameter."""
    positions: int = 0
    """Learned positions."""
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    """Width of the feed-forward part that every token passes beside its experts."""
    dense_layers: int = 0
    """The first layers of a model with experts that have none."""
    routed: float = 1.0
    """Share of the routed tokens that experts take: less than 1 with a capacity and token drop."""
    latent: Latent | None = None
    window: int | None = None
    """Every second layer attends to so many tokens only."""
    predicts: int = 0
    """Extra blocks, each with a head of its own, that predict further tokens."""

    def __post_init__(self) -> None:
        raise_all(ConfigError, "Transformer:", list(self._complaints()))

    def _complaints(self) -> Iterator[str]:
        for name in ("layers", "hidden", "heads", "ffn", "vocab"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                yield f"{name}={value!r}; give a whole number of at least 1."
        if isinstance(self.heads, int) and self.heads > 0:
            if self.head_dim is None and self.latent is None and isinstance(self.hidden, int) and self.hidden % self.heads:
                yield f"hidden={self.hidden} is not divisible by heads={self.heads}; give head_dim."
            if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
                yield f"kv_heads={self.kv_heads} does not divide heads={self.heads}."
        if self.experts and not 1 <= self.top_k <= self.experts:
            yield f"top_k={self.top_k} of experts={self.experts}; a token goes to between 1 and all of them."
        if self.experts and self.expert_ffn < 1:
            yield f"expert_ffn={self.expert_ffn}; give the width of an expert."
        if not self.experts and (self.top_k or self.expert_ffn or self.shared_ffn or self.dense_layers):
            yield "top_k, expert_ffn, shared_ffn and dense_layers mean something with experts only; give experts."
        if not 0 < self.routed <= 1:
            yield f"routed={self.routed}; a share above 0, at most 1."
        if not 0 <= self.dense_layers <= self.layers:
            yield f"dense_layers={self.dense_layers} of {self.layers} layers."

    @property
    def keys(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head(self) -> int:
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def expert_layers(self) -> int:
        """Layers with experts, predicting blocks included."""
        return self.layers + self.predicts - self.dense_layers if self.experts else 0

    @property
    def score_width(self) -> int:
        """Width per head of queries and keys, plus that of values: what a pair of tokens costs."""
        return 2 * self.head if self.latent is None else self.latent.plain + self.latent.rotary + self.latent.value

    @property
    def attention_parameters(self) -> int:
        """Parameters of the products around one attention."""
        h, a = self.hidden, self.heads
        if self.latent is None:
            return h * self.head * (2 * a + 2 * self.keys)
        r = self.latent
        query = h * r.query_rank + r.query_rank * a * (r.plain + r.rotary)
        return query + h * (r.key_value_rank + r.rotary) + r.key_value_rank * a * (r.plain + r.value) + a * r.value * h

    @property
    def matrices(self) -> int:
        """Matrices in a feed-forward part."""
        return 3 if self.gated else 2

    @property
    def block_parameters(self) -> int:
        """Parameters of a dense block's products and norms."""
        return self.attention_parameters + self.matrices * self.hidden * self.ffn + 2 * self.hidden

    @property
    def expert_parameters(self) -> int:
        """Parameters of the experts of one layer."""
        return self.experts * self.matrices * self.hidden * self.expert_ffn

    @property
    def expert_block_parameters(self) -> int:
        """Parameters of a block with experts, without the experts."""
        shared = self.matrices * self.hidden * self.shared_ffn
        return self.attention_parameters + self.hidden * self.experts + shared + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        dense = self.layers + self.predicts - self.expert_layers
        blocks = dense * self.block_parameters + self.expert_layers * (self.expert_block_parameters + self.expert_parameters)
        extra = self.predicts * 2 * self.hidden * self.hidden
        return blocks + extra + (1 if self.tied else 2) * self.hidden * self.vocab + self.positions * self.hidden + self.hidden

    @property
    def active_matrices(self) -> int:
        """Parameters of the products one token goes through, heads included, embedding not."""
        h = self.hidden
        dense = self.layers + self.predicts - self.expert_layers
        experts = self.matrices * h * (self.top_k * self.expert_ffn + self.shared_ffn) + h * self.experts
        blocks = dense * (self.attention_parameters + self.matrices * h * self.ffn)
        blocks += self.expert_layers * (self.attention_parameters + experts)
        return blocks + self.predicts * 2 * h * h + (1 + self.predicts) * h * self.vocab

    def attended(self, layer: int, seq: int, *, causal: bool = True) -> float:
        """How many tokens a token attends to on average in a layer."""
        if self.window is not None and layer % 2 and self.window < seq:
            return self.window * (1 - self.window / (2 * seq)) if causal else float(self.window)
        return seq / 2 if causal else float(seq)
