"""A block, the embedding and the head of a transformer as layers of a workload."""

from __future__ import annotations

from functools import lru_cache

from meshpar.planner.collectives import around, context, exchange, gathered
from meshpar.planner.operators import attention, feed_forward, norms, product, routed_experts
from meshpar.planner.recompute import again, kept, replayed
from meshpar.planner.share import Portion
from meshpar.planner.transformer import Transformer
from meshpar.planner.workload import Collective, Layer, Operator

LOSS_PASSES = {"forward": 8.0, "input": 6.0}
"""Bytes per logit: written, read in fp32 for maximum and sum; then the gradient."""


@lru_cache(maxsize=20_000)
def block(share: Portion, experts: bool, windowed: bool, predicts: bool = False) -> Layer:
    """A block: norm, attention, norm, feed-forward part or experts."""
    model, t = share.model, share.tp
    operators = [*attention(share, windowed), *norms(share)]
    collectives = [*around(share, "attention"), *context(share, windowed)]
    if predicts:
        operators += product("joined", share, share.tokens / share.narrow, 2 * model.hidden, model.hidden)
    if experts:
        operators += routed_experts(share)
        collectives += [*exchange(share), *(around(share, "shared experts") if model.shared_ffn else [])]
        width = model.shared_ffn
    else:
        width = model.ffn
        collectives += around(share, "feed-forward")
    if width:
        operators += feed_forward(share, share.tokens, width / t)
    operators += again(share, operators)
    collectives += [replayed(c) for c in collectives if c.phase == "forward"] if share.recompute == "full" else []
    own = (model.attention_parameters + model.matrices * model.hidden * width) / t + 2 * model.hidden
    own += _whole(model) * (1 - 1 / t)
    own += model.hidden * model.experts if experts else 0
    own += 2 * model.hidden**2 if predicts else 0
    inner = model.expert_parameters / (share.ep * share.etp) if experts else 0.0
    if share.shares:
        collectives += gathered(share, own, inner)
    held, everything = kept(share, experts)
    name = "experts" if experts else "block"
    return Layer(name, tuple(operators), tuple(collectives), own, inner, held, everything - held)


@lru_cache(maxsize=20_000)
def embedding(share: Portion) -> Layer:
    """The look-up, vocabulary over tp; positions and dropout where there are some."""
    model = share.model
    size = share.tokens * model.hidden / share.narrow
    operators: list[Operator] = [Operator("embedding", "elementwise", "forward", bytes=4 * size, calls=2)]
    operators += [Operator("embedding", "elementwise", "weight", bytes=8 * size, calls=2)]
    kind = "reduce_scatter" if share.sequence_parallel else "all_reduce"
    sums = (Collective("embedding", kind, "tp", "forward", 2 * share.tokens * model.hidden),) if share.tp > 1 else ()
    own = model.hidden * model.vocab / share.tp + model.positions * model.hidden
    gathers = tuple(gathered(share, own, 0.0)) if share.shares else ()
    return Layer("embedding", tuple(operators), sums + gathers, own)


@lru_cache(maxsize=20_000)
def head(share: Portion, copies: bool) -> Layer:
    """The last norm, the product with the vocabulary in 16 bits, and the cross entropy. A tied weight is held here only if it `copies`."""
    model, t = share.model, share.tp
    logits = share.tokens * model.vocab / t
    operators = product("head", share, share.tokens, model.hidden, model.vocab / t, dtype=share.half)
    operators += [
        Operator("loss", "elementwise", "forward", bytes=LOSS_PASSES["forward"] * logits, calls=5),
        Operator("loss", "elementwise", "input", bytes=LOSS_PASSES["input"] * logits, calls=2),
    ]
    collectives = around(share, "head")[:1] if t > 1 else []
    collectives += [Collective("loss", "all_reduce", "tp", "forward", 4 * share.tokens, count=3)] if t > 1 else []
    own = model.hidden + (0 if model.tied and not copies else model.hidden * model.vocab / t)
    if share.shares:
        collectives += gathered(share, model.hidden * model.vocab / t, 0.0)
    kept = 2 * share.tokens * model.hidden / share.narrow
    return Layer("head", tuple(operators), tuple(collectives), own, kept=kept, peak=logits)


def _whole(model: Transformer) -> float:
    """Parameters of an attention that every tp rank holds: the products into narrow latents."""
    r = model.latent
    return 0.0 if r is None else model.hidden * (r.query_rank + r.key_value_rank + r.rotary)
