"""Operators of a transformer's parts on one rank: FLOPs and bytes of products, attention, traffic, experts.

Sources: products arXiv 2205.05198; bytes are each a read or a write of an operand (derived).
"""

from __future__ import annotations

from meshpar.planner.share import Portion
from meshpar.planner.workload import Operator

FLASH_BACKWARD = 2.5
"""A fused attention's backward over its forward: five products of scores instead of two (arXiv 2307.08691)."""


def product(name: str, share: Portion, tokens: float, ins: float, outs: float, dtype: str = "", count: float = 1) -> list[Operator]:
    """`count` products x [tokens, ins] w [ins, outs] with both their gradients; in fp8 also the casts of what they read."""
    dtype = dtype or share.dtype
    w = share.width if dtype == share.dtype else 2
    flops, x, y, weight = 2 * tokens * ins * outs * count, tokens * ins * count, tokens * outs * count, ins * outs * count
    gradient = 2 * share.stack.gradient if share.stack.gradient > 2 else 2
    found = [
        Operator(name, "matrix", "forward", flops, w * (x + weight) + 2 * y, dtype, count),
        Operator(name, "matrix", "input", flops, w * (y + weight) + 2 * x, dtype, count),
        Operator(name, "matrix", "weight", flops, w * (x + y) + gradient * weight, dtype, count),
    ]
    if w == 1:  # written twice, as it is and transposed, by the kernel that makes it; gradients by one of their own, read in 16 bits
        found += [
            Operator(f"{name} cast", "elementwise", "forward", bytes=2 * x, calls=0),
            Operator(f"{name} cast", "elementwise", "input", bytes=4 * y, calls=count),
        ]
    return found


def both(name: str, forward: float, backward: float, calls: float = 1) -> list[Operator]:
    return [
        Operator(name, "elementwise", "forward", bytes=forward, calls=calls),
        Operator(name, "elementwise", "input", bytes=backward, calls=calls),
    ]


def attention(share: Portion, windowed: bool) -> list[Operator]:
    model, t, tokens = share.model, share.tp, share.tokens
    h, heads, d = model.hidden, model.heads / t, model.head
    if model.latent is None:
        keys = max(1.0, model.keys / t)
        queries = (heads + 2 * keys) * d
        found = [*product("query-key-value", share, tokens, h, queries), *product("projection", share, tokens, heads * d, h)]
    else:
        r = model.latent
        queries = heads * (2 * (r.plain + r.rotary) + r.value)
        found = [
            *product("narrow", share, tokens / share.narrow, h, r.query_rank + r.key_value_rank + r.rotary),
            *product("queries", share, tokens, r.query_rank, heads * (r.plain + r.rotary)),
            *product("keys and values", share, tokens, r.key_value_rank, heads * (r.plain + r.value)),
            *product("projection", share, tokens, heads * r.value, h),
        ]
    positions = 0 if model.positions else 4 * tokens * queries
    found += both("bias and positions", 4 * tokens * queries / 2 + positions, 4 * tokens * queries / 2 + positions)
    return [*found, *(_fused(share, windowed) if share.stack.attention != "unfused" else _scores(share))]


def _fused(share: Portion, windowed: bool) -> list[Operator]:
    """One kernel that never writes scores and skips what the mask forbids."""
    model = share.model
    pairs = share.tokens * model.attended(1 if windowed else 0, share.seq)
    flops = 2 * model.heads / share.tp * model.score_width * pairs
    return [
        Operator("attention", "attention", "forward", flops, calls=1),
        Operator("attention", "attention", "input", FLASH_BACKWARD * flops, calls=2),
    ]


def _scores(share: Portion) -> list[Operator]:
    """Scores in memory: two products over all pairs, and softmax with its mask and dropout in between (bytes per score, fp16)."""
    model = share.model
    scores = model.heads / share.tp * share.tokens * share.seq
    flops, vectors = 2 * scores * model.score_width, 4 * share.tokens * model.heads / share.tp * model.score_width
    dropout = 5 if share.stack.dropout else 0
    return [
        Operator("scores", "matrix", "forward", flops, 4 * scores + vectors, share.half, 2),
        Operator("scores", "matrix", "input", 2 * flops, 8 * scores + 2 * vectors, share.half, 4),
        *both("softmax", (4 + dropout) * scores, (6 + dropout) * scores, 2),
    ]


def norms(share: Portion) -> list[Operator]:
    """Two norms, two residual sums, and dropout's masks."""
    size = share.tokens * share.model.hidden / share.narrow
    dropout = 2 * 3 if share.stack.dropout else 0
    return both("norms and residuals", (2 * 4 + 2 * 6 + dropout) * size, (2 * 8 + 2 * 2 + dropout) * size, 4)


def feed_forward(share: Portion, tokens: float, width: float, count: float = 1) -> list[Operator]:
    gates, h = (2 if share.model.gated else 1), share.model.hidden
    size = tokens * width
    return [
        *product("up", share, tokens, h, gates * width),
        *both("activation", 2 * (gates + 1) * size, 2 * (2 * gates + 1) * size),
        *product("down", share, tokens, width, h),
    ]


def routed_experts(share: Portion) -> list[Operator]:
    """Router, permutations to the experts and back, grouped products over this rank's experts."""
    model, h = share.model, share.model.hidden
    own = share.tokens / share.narrow
    routed = own * model.top_k * model.routed * share.etp
    local, width = model.experts / share.ep, model.expert_ffn / share.etp
    gates = 2 if model.gated else 1
    moved = 2 * 2 * share.stack.permutations * routed * h
    found = [*product("router", share, own, h, model.experts, dtype=share.half)]
    found += both("permutations", moved, moved, 6)
    found += both("activation", 2 * (gates + 1) * routed * width, 2 * (2 * gates + 1) * routed * width)
    for name, ins, outs in (("expert up", h, gates * width), ("expert down", width, h)):
        found += [_grouped(o, local) for o in product(name, share, routed / local, ins, outs, count=local)]
    return [*found, *(Operator("dispatcher", "host", phase, calls=1) for phase in ("forward", "input"))]


def _grouped(operator: Operator, local: float) -> Operator:
    kind = "grouped" if operator.kind == "matrix" else operator.kind
    return Operator(operator.name, kind, operator.phase, operator.flops, operator.bytes, operator.dtype, 1)
