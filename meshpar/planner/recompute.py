"""What is kept from forward to backward, and what is computed once more instead."""

from __future__ import annotations

from meshpar.planner.share import Portion
from meshpar.planner.transformer import Latent
from meshpar.planner.workload import Collective, Operator

_CHEAP = ("norms and residuals", "activation", "queries", "keys and values")
"""Traffic, and the widening products of latent attention, whose results are large for what they cost."""
_CORE = ("attention", "scores", "softmax")


def again(share: Portion, operators: list[Operator]) -> list[Operator]:
    """What is computed once more before backward."""
    forward = [o for o in operators if o.phase == "forward"]
    if share.recompute == "none":
        return []
    if share.recompute == "selective" and share.stack.selective == "products":
        products = [_replay(o, 0.5) for o in forward if o.kind in ("matrix", "grouped")]
        return products + [_replay(o) for o in forward if o.kind == "elementwise"]
    if share.recompute == "selective" and share.stack.selective == "cheap":
        return [_replay(o) for o in forward if o.kind == "elementwise"]
    if share.recompute == "selective" and share.stack.attention != "unfused":
        return [_replay(o) for o in forward if o.name in (*_CHEAP, "attention")]
    wanted = {"activations": _CHEAP, "selective": _CORE, "full": tuple(o.name for o in forward)}[share.recompute]
    return [_replay(o) for o in forward if o.name in wanted]


def _replay(o: Operator, part: float = 1.0) -> Operator:
    return Operator(o.name, o.kind, "recompute", part * o.flops, part * o.bytes, o.dtype, part * o.calls)


def replayed(c: Collective) -> Collective:
    return Collective(c.name, c.kind, c.axis, "recompute", c.bytes, c.count, c.behind)


SELECTIVE = 0.45
"""Share of a block's activations that stay when every second product is computed again (measured on torchtitan's memory, the trial)."""


def kept(share: Portion, experts: bool) -> tuple[float, float]:
    """Bytes a block keeps for backward, and what it keeps without recompute (arXiv 2205.05198, table 2, generalised)."""
    model, n, t, w = share.model, share.narrow, share.tp, share.width
    h, tokens = model.hidden, share.tokens
    first = 2 * h / n
    cheap = 2 * w * h / n  # what the norms give
    rest = 2 * h / n  # what the second norm reads
    if model.latent is None:
        rest += 2 * (model.heads + 2 * max(model.keys, t)) * model.head / t
    else:
        narrow = model.latent.query_rank + model.latent.key_value_rank + model.latent.rotary
        rest += 2 * narrow
        cheap += 2 * _wide(model.latent, model.heads) / t
    values = model.heads * (model.head if model.latent is None else model.latent.value)
    rest += 2 * values / t
    rest += 2 * h / n if share.stack.dropout else 0  # two masks of a byte
    core = 5 * model.heads * share.seq / t if share.stack.attention == "unfused" else 4 * model.heads / t
    gates = 2 if model.gated else 1
    width = (model.top_k * model.expert_ffn / n + model.shared_ffn / t) if experts else model.ffn / t
    rest += 2 * gates * width
    cheap += w * width
    if experts:
        rest += w * model.top_k * h / n
    everything = first + cheap + rest + core
    selective = first + cheap + rest
    if share.stack.selective == "products":
        selective = SELECTIVE * everything
    elif share.stack.selective == "cheap":
        selective = first + core + _results(share, values, gates * width, experts)
    elif share.stack.attention != "unfused":
        selective = first + rest
    found = {"none": everything, "activations": first + rest + core, "selective": selective, "full": first}[share.recompute]
    return tokens * found * share.stack.activations, tokens * everything * share.stack.activations


def _results(share: Portion, values: float, wide: float, experts: bool) -> float:
    """Bytes of the results of a block's products, attention and collectives: sums over tp, and what was gathered, are whole."""
    model, n, t = share.model, share.narrow, share.tp
    queries = (model.heads + 2 * max(model.keys, t)) * model.head if model.latent is None else _wide(model.latent, model.heads) / 2
    rows = (1 + model.top_k / n) if experts else 2
    sums = rows * model.hidden
    sent = 0.0 if t == 1 else 2 * model.hidden * (1 + 1 / n if n > 1 else 1)
    return 2 * (queries / t + values / t + wide + sums + sent)


def _wide(r: Latent, heads: int) -> int:
    """Width of all queries, keys and values that come out of narrow ones."""
    return heads * (2 * (r.plain + r.rotary) + r.value)
