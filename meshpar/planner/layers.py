"""The workload of a transformer from its dimensions: what each product, kernel and collective of a block reads, computes and sends.

Sizes are those of one rank and one microbatch. Sources: products and kept activations arXiv 2205.05198, collectives 2104.04473 and
2205.05198, experts 2504.14960; element counts of fused kernels are derived, each a read or a write of its operands.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate

from meshpar.planner.flops import CONVENTIONS, flops_per_token
from meshpar.planner.mapping import Job, Mapping, check
from meshpar.planner.stack import Stack
from meshpar.planner.transformer import Latent, Transformer
from meshpar.planner.workload import Axis, Collective, Layer, Operator, Phase, Stage, Workload, group

SLOWNESS = {"bf16": 2, "fp16": 2, "fp8": 1, "nvfp4": 0.5}
"""Time of a FLOP by precision, relative: what balances stages."""
FLASH_BACKWARD = 2.5
"""A fused attention's backward over its forward: five products of scores instead of two (arXiv 2307.08691)."""
LOSS_PASSES = {"forward": 8.0, "input": 6.0}
"""Bytes per logit: written, read in fp32 for maximum and sum; then the gradient."""


@dataclass(frozen=True)
class Share:
    """The part of a microbatch and of the model that one rank has: what a layer's sizes depend on."""

    model: Transformer
    stack: Stack
    dtype: str
    half: str
    """The 16-bit precision of the head and the router."""
    seq: int
    samples: int
    tp: int
    cp: int
    ep: int
    etp: int
    sequence_parallel: bool
    recompute: str
    zero3: bool
    data: int
    """Data ranks; 0 where layers do not depend on them."""

    def __hash__(self) -> int:
        """Found once: shares are looked up often."""
        if "hash" not in self.__dict__:
            self.__dict__["hash"] = hash(tuple(getattr(self, f.name) for f in fields(self)))
        return int(self.__dict__["hash"])

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch on a rank, with sequence parallelism after the gather."""
        return self.samples * self.seq / self.cp

    @property
    def narrow(self) -> int:
        """By how much norms and residuals are divided."""
        return self.tp if self.sequence_parallel else 1

    @property
    def width(self) -> int:
        """Bytes of what products read."""
        return 1 if self.dtype in ("fp8", "nvfp4") else 2


def build(job: Job, mapping: Mapping) -> Workload:
    """The workload of a job under a mapping. Raises `ConfigError` with everything that does not fit.

    >>> from meshpar.planner.hardware import Cluster
    >>> gpt = Transformer(layers=96, hidden=12288, heads=96, ffn=49152, vocab=51200, gated=False, tied=True, positions=2048)
    >>> job = Job(gpt, Cluster("a100", 512), seq=2048, batch=1536, stack="megatron-2021")
    >>> work = build(job, Mapping(tp=8, pp=8, virtual=2, recompute="selective"))
    >>> len(work.stages), work.microbatches, round(work.stages[0].parameters / 1e9, 2)
    (16, 192, 1.46)
    """
    check(job, mapping)
    return assemble(job, mapping)


def assemble(job: Job, mapping: Mapping) -> Workload:
    """As `build`, for a mapping already checked."""
    gpus, data = job.cluster.gpus, mapping.data(job.cluster.gpus)
    replicas = data * mapping.cp
    etp = mapping.expert_tp
    edp = max(1, gpus // (mapping.pp * mapping.ep * etp))
    axes = {
        "tp": Axis("tp", mapping.tp, 1),
        "cp": Axis("cp", mapping.cp, mapping.tp),
        "dp": Axis("dp", replicas, mapping.tp),
        "etp": Axis("etp", etp, 1),
        "ep": Axis("ep", mapping.ep, etp),
        "edp": Axis("edp", edp, mapping.ep * etp),
        "pp": Axis("pp", mapping.pp, gpus // mapping.pp),
    }
    share = Share(
        *(job.model, job.software, job.dtype, job.half, job.seq, mapping.microbatch, mapping.tp, mapping.cp, mapping.ep, etp),
        *(
            mapping.sequence_parallel and mapping.tp > 1,
            mapping.recompute,
            mapping.data_parallel == "zero3",
            replicas if mapping.data_parallel == "zero3" else 0,
        ),
    )
    stages = tuple(
        _stage(layers, mapping.data_parallel, share.stack) for layers in _cut(share, mapping.pp * mapping.virtual, mapping.pp > 1)
    )
    return Workload(
        *(stages, mapping.pp, mapping.order, mapping.microbatches(job), axes),
        send=2 * share.tokens * job.model.hidden / mapping.tp,  # scattered over tp, gathered on the other side (2104.04473, 4.1)
        data_parallel=mapping.data_parallel,
        gpus=gpus,
        tokens=job.tokens,
        info=_conventions(job.model, job.seq),
    )


@lru_cache(maxsize=256)
def _conventions(model: Transformer, seq: int) -> dict[str, float]:
    return {name: flops_per_token(model, seq, name) for name in CONVENTIONS}  # type: ignore[arg-type]


@lru_cache(maxsize=100_000)
def _stage(layers: tuple[tuple[Layer, int], ...], data_parallel: str, stack: Stack) -> Stage:
    dense = sum(layer.parameters * times for layer, times in layers)
    experts = sum(layer.expert_parameters * times for layer, times in layers)
    found: list[Collective] = []
    for axis, size in (("dp", dense), ("edp", experts)):
        if not size or data_parallel == "zero3":
            continue
        if data_parallel == "replicate":
            found.append(Collective("gradients", "all_reduce", axis, "step", size * stack.gradient_sum, behind="compute"))
        else:
            found.append(Collective("gradients", "reduce_scatter", axis, "step", size * stack.gradient_sum, behind="compute"))
            found.append(Collective("parameters", "all_gather", axis, "step", size * 2, behind="compute"))
    return Stage(layers, tuple(found))


@lru_cache(maxsize=20_000)
def _cut(share: Share, stages: int, copies: bool) -> tuple[tuple[tuple[Layer, int], ...], ...]:
    """Layers in `stages` runs: evenly where they divide, else so that the longest run is shortest, embedding and head counted."""
    model = share.model
    made = {kind: block(share, *kind) for kind in set(_kinds(model))}
    blocks = [made[kind] for kind in _kinds(model)]
    ends = (embedding(share), head(share, copies))
    if model.layers % stages == 0 and not model.predicts:
        size = model.layers // stages
        runs = [blocks[i : i + size] for i in range(0, model.layers, size)]
        runs[0] = [ends[0], *runs[0]]
        runs[-1] = [*runs[-1], ends[1]]
    else:
        predicting = [layer for _ in range(model.predicts) for layer in (block(share, bool(model.experts), False, True), ends[1])]
        runs = _balanced([ends[0], *blocks, *predicting, ends[1]], stages)
    return tuple(group(run) for run in runs)


@lru_cache(maxsize=256)
def _kinds(model: Transformer) -> list[tuple[bool, bool]]:
    """For every layer: has it experts, does it attend to a window."""
    return [(bool(model.experts) and i >= model.dense_layers, model.window is not None and i % 2 == 1) for i in range(model.layers)]


def _balanced(layers: list[Layer], stages: int) -> list[list[Layer]]:
    """Runs cut where the cost so far is nearest to equal shares; every run gets a layer."""
    cost = {id(layer): sum(o.flops * SLOWNESS.get(o.dtype, 1) for o in layer.operators) for layer in set(layers)}
    costs = [cost[id(layer)] for layer in layers]
    sums = [0.0, *accumulate(costs)]
    cuts = [0]
    for stage in range(1, stages):
        share = sums[-1] * stage / stages
        low, high = cuts[-1] + 1, len(layers) - (stages - stage)
        after = min(max(bisect(sums, share), low), high)
        cuts.append(after - 1 if after > low and share - sums[after - 1] < sums[after] - share else after)
    return [layers[a:b] for a, b in zip(cuts, [*cuts[1:], len(layers)])]


@lru_cache(maxsize=20_000)
def block(share: Share, experts: bool, windowed: bool, predicts: bool = False) -> Layer:
    """A block: norm, attention, norm, feed-forward part or experts."""
    model, t = share.model, share.tp
    operators = [*_attention(share, windowed), *_norms(share)]
    collectives = [*_around(share, "attention"), *_context(share, windowed)]
    if predicts:
        operators += _product("joined", share, share.tokens / share.narrow, 2 * model.hidden, model.hidden)
    if experts:
        operators += _experts(share)
        collectives += [*_exchange(share), *(_around(share, "shared experts") if model.shared_ffn else [])]
        width = model.shared_ffn
    else:
        width = model.ffn
        collectives += _around(share, "feed-forward")
    if width:
        operators += _feed_forward(share, share.tokens, width / t)
    operators += _again(share, operators)
    collectives += [_replayed(c) for c in collectives if c.phase == "forward"] if share.recompute == "full" else []
    own = (model.attention_parameters + model.matrices * model.hidden * width) / t + 2 * model.hidden
    own += _whole(model) * (1 - 1 / t)
    own += model.hidden * model.experts if experts else 0
    own += 2 * model.hidden**2 if predicts else 0
    inner = model.expert_parameters / (share.ep * share.etp) if experts else 0.0
    if share.zero3:
        collectives += _gathered(share, own, inner)
    kept, everything = _kept(share, experts)
    name = "experts" if experts else "block"
    return Layer(name, tuple(operators), tuple(collectives), own, inner, kept, everything - kept)


@lru_cache(maxsize=20_000)
def embedding(share: Share) -> Layer:
    """The look-up, vocabulary over tp; positions and dropout where there are some."""
    model = share.model
    size = share.tokens * model.hidden / share.narrow
    operators: list[Operator] = [Operator("embedding", "elementwise", "forward", bytes=4 * size, calls=2)]
    operators += [Operator("embedding", "elementwise", "weight", bytes=8 * size, calls=2)]
    kind = "reduce_scatter" if share.sequence_parallel else "all_reduce"
    sums = (Collective("embedding", kind, "tp", "forward", 2 * share.tokens * model.hidden),) if share.tp > 1 else ()
    own = model.hidden * model.vocab / share.tp + model.positions * model.hidden
    gathers = tuple(_gathered(share, own, 0.0)) if share.zero3 else ()
    return Layer("embedding", tuple(operators), sums + gathers, own)


@lru_cache(maxsize=20_000)
def head(share: Share, copies: bool) -> Layer:
    """The last norm, the product with the vocabulary in 16 bits, and the cross entropy. A tied weight is held here only if it `copies`."""
    model, t = share.model, share.tp
    logits = share.tokens * model.vocab / t
    operators = _product("head", share, share.tokens, model.hidden, model.vocab / t, dtype=share.half)
    operators += [
        Operator("loss", "elementwise", "forward", bytes=LOSS_PASSES["forward"] * logits, calls=5),
        Operator("loss", "elementwise", "input", bytes=LOSS_PASSES["input"] * logits, calls=2),
    ]
    collectives = _around(share, "head")[:1] if t > 1 else []
    collectives += [Collective("loss", "all_reduce", "tp", "forward", 4 * share.tokens, count=3)] if t > 1 else []
    own = model.hidden + (0 if model.tied and not copies else model.hidden * model.vocab / t)
    if share.zero3:
        collectives += _gathered(share, model.hidden * model.vocab / t, 0.0)
    kept = 2 * share.tokens * model.hidden / share.narrow
    return Layer("head", tuple(operators), tuple(collectives), own, kept=kept, peak=logits)


def _product(name: str, share: Share, tokens: float, ins: float, outs: float, dtype: str = "", count: float = 1) -> list[Operator]:
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


def _both(name: str, forward: float, backward: float, calls: float = 1) -> list[Operator]:
    return [
        Operator(name, "elementwise", "forward", bytes=forward, calls=calls),
        Operator(name, "elementwise", "input", bytes=backward, calls=calls),
    ]


def _attention(share: Share, windowed: bool) -> list[Operator]:
    model, t, tokens = share.model, share.tp, share.tokens
    h, heads, d = model.hidden, model.heads / t, model.head
    if model.latent is None:
        keys = max(1.0, model.keys / t)
        queries = (heads + 2 * keys) * d
        found = [*_product("query-key-value", share, tokens, h, queries), *_product("projection", share, tokens, heads * d, h)]
    else:
        r = model.latent
        queries = heads * (2 * (r.plain + r.rotary) + r.value)
        found = [
            *_product("narrow", share, tokens / share.narrow, h, r.query_rank + r.key_value_rank + r.rotary),
            *_product("queries", share, tokens, r.query_rank, heads * (r.plain + r.rotary)),
            *_product("keys and values", share, tokens, r.key_value_rank, heads * (r.plain + r.value)),
            *_product("projection", share, tokens, heads * r.value, h),
        ]
    positions = 0 if model.positions else 4 * tokens * queries
    found += _both("bias and positions", 4 * tokens * queries / 2 + positions, 4 * tokens * queries / 2 + positions)
    return [*found, *(_fused(share, windowed) if share.stack.attention != "unfused" else _scores(share))]


def _fused(share: Share, windowed: bool) -> list[Operator]:
    """One kernel that never writes scores and skips what the mask forbids."""
    model = share.model
    pairs = share.tokens * model.attended(1 if windowed else 0, share.seq)
    flops = 2 * model.heads / share.tp * model.score_width * pairs
    return [
        Operator("attention", "attention", "forward", flops, calls=1),
        Operator("attention", "attention", "input", FLASH_BACKWARD * flops, calls=2),
    ]


def _scores(share: Share) -> list[Operator]:
    """Scores in memory: two products over all pairs, and softmax with its mask and dropout in between (bytes per score, fp16)."""
    model = share.model
    scores = model.heads / share.tp * share.tokens * share.seq
    flops, vectors = 2 * scores * model.score_width, 4 * share.tokens * model.heads / share.tp * model.score_width
    dropout = 5 if share.stack.dropout else 0
    return [
        Operator("scores", "matrix", "forward", flops, 4 * scores + vectors, share.half, 2),
        Operator("scores", "matrix", "input", 2 * flops, 8 * scores + 2 * vectors, share.half, 4),
        *_both("softmax", (4 + dropout) * scores, (6 + dropout) * scores, 2),
    ]


def _norms(share: Share) -> list[Operator]:
    """Two norms, two residual sums, and dropout's masks."""
    size = share.tokens * share.model.hidden / share.narrow
    dropout = 2 * 3 if share.stack.dropout else 0
    return _both("norms and residuals", (2 * 4 + 2 * 6 + dropout) * size, (2 * 8 + 2 * 2 + dropout) * size, 4)


def _feed_forward(share: Share, tokens: float, width: float, count: float = 1) -> list[Operator]:
    gates, h = (2 if share.model.gated else 1), share.model.hidden
    size = tokens * width
    return [
        *_product("up", share, tokens, h, gates * width),
        *_both("activation", 2 * (gates + 1) * size, 2 * (2 * gates + 1) * size),
        *_product("down", share, tokens, width, h),
    ]


def _experts(share: Share) -> list[Operator]:
    """Router, permutations to the experts and back, grouped products over this rank's experts."""
    model, h = share.model, share.model.hidden
    own = share.tokens / share.narrow
    routed = own * model.top_k * model.routed * share.etp
    local, width = model.experts / share.ep, model.expert_ffn / share.etp
    gates = 2 if model.gated else 1
    moved = 2 * 2 * share.stack.permutations * routed * h
    found = [*_product("router", share, own, h, model.experts, dtype=share.half)]
    found += _both("permutations", moved, moved, 6)
    found += _both("activation", 2 * (gates + 1) * routed * width, 2 * (2 * gates + 1) * routed * width)
    for name, ins, outs in (("expert up", h, gates * width), ("expert down", width, h)):
        found += [_grouped(o, local) for o in _product(name, share, routed / local, ins, outs, count=local)]
    return [*found, *(Operator("dispatcher", "host", phase, calls=1) for phase in ("forward", "input"))]


def _grouped(operator: Operator, local: float) -> Operator:
    kind = "grouped" if operator.kind == "matrix" else operator.kind
    return Operator(operator.name, kind, operator.phase, operator.flops, operator.bytes, operator.dtype, 1)


def _around(share: Share, name: str) -> list[Collective]:
    """Column-parallel product in, row-parallel product out: with sequence parallelism a gather and a scatter, else one sum."""
    size = 2 * share.tokens * share.model.hidden
    if share.tp == 1:
        return []
    if not share.sequence_parallel:
        return [
            Collective(name, "all_reduce", "tp", "forward", size, behind="matrix"),
            Collective(name, "all_reduce", "tp", "input", size, behind="matrix"),
        ]
    pairs: list[tuple[str, Phase]] = [
        ("all_gather", "forward"),
        ("reduce_scatter", "forward"),
        ("all_gather", "input"),
        ("reduce_scatter", "input"),
    ]
    again = Collective(f"{name} again", "all_gather", "tp", "weight", size, behind="compute")
    return [*(Collective(name, kind, "tp", phase, size, behind="matrix") for kind, phase in pairs), again]


def _context(share: Share, windowed: bool) -> list[Collective]:
    """Keys and values of the other parts of the sequence, and their gradients back."""
    if share.cp == 1:
        return []
    model = share.model
    per_token = 2 * max(1.0, model.keys / share.tp) * model.head if model.latent is None else model.heads / share.tp * model.score_width
    size = 2 * share.samples * share.seq * per_token
    return [
        Collective("keys and values", "ring", "cp", "forward", size, behind="attention"),
        Collective("keys and values", "ring", "cp", "input", 2 * size, behind="attention"),
    ]


def _exchange(share: Share) -> list[Collective]:
    """Tokens to their experts and back; with tp inside experts, gathers and scatters over it too."""
    model = share.model
    size = 2 * share.tokens / share.narrow * model.top_k * model.routed * model.hidden
    copies = model.top_k if share.stack.dedups else 1
    found: list[Collective] = []
    phases: tuple[Phase, Phase] = ("forward", "input")
    if share.ep > 1:
        found += [Collective("dispatch, combine", "all_to_all", "ep", phase, size, 2, "compute", copies) for phase in phases]
    if share.etp > 1:
        kinds = ("all_gather", "reduce_scatter")
        found += [Collective("experts", kind, "etp", phase, size * share.etp) for phase in phases for kind in kinds]
    return found


def _gathered(share: Share, own: float, inner: float) -> list[Collective]:
    """Fully sharded parameters: gathered for forward and again for backward, gradients scattered, for every microbatch."""
    found = []
    for axis, size in (("dp", own), ("edp", inner)):
        if size:
            found += [
                Collective("parameters", "all_gather", axis, "forward", 2 * size, behind="compute"),
                Collective("parameters", "all_gather", axis, "input", 2 * size, behind="compute"),
                Collective("gradients", "reduce_scatter", axis, "input", share.stack.gradient_sum * size, behind="compute"),
            ]
    return found


_CHEAP = ("norms and residuals", "activation", "queries", "keys and values")
"""Traffic, and the widening products of latent attention, whose results are large for what they cost."""
_CORE = ("attention", "scores", "softmax")


def _again(share: Share, operators: list[Operator]) -> list[Operator]:
    """What is computed once more before backward."""
    forward = [o for o in operators if o.phase == "forward"]
    if share.recompute == "none":
        return []
    if share.recompute == "selective" and share.stack.selective == "products":
        products = [_replay(o, 0.5) for o in forward if o.kind in ("matrix", "grouped")]
        return products + [_replay(o) for o in forward if o.kind == "elementwise"]
    if share.recompute == "selective" and share.stack.attention != "unfused":
        return [_replay(o) for o in forward if o.name in (*_CHEAP, "attention")]
    wanted = {"activations": _CHEAP, "selective": _CORE, "full": tuple(o.name for o in forward)}[share.recompute]
    return [_replay(o) for o in forward if o.name in wanted]


def _replay(o: Operator, part: float = 1.0) -> Operator:
    return Operator(o.name, o.kind, "recompute", part * o.flops, part * o.bytes, o.dtype, part * o.calls)


def _replayed(c: Collective) -> Collective:
    return Collective(c.name, c.kind, c.axis, "recompute", c.bytes, c.count, c.behind)


SELECTIVE = 0.45
"""Share of a block's activations that stay when every second product is computed again (measured on torchtitan's memory, the trial)."""


def _kept(share: Share, experts: bool) -> tuple[float, float]:
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
    elif share.stack.attention != "unfused":
        selective = first + rest
    found = {"none": everything, "activations": first + rest + core, "selective": selective, "full": first}[share.recompute]
    return tokens * found * share.stack.activations, tokens * everything * share.stack.activations


def _whole(model: Transformer) -> float:
    """Parameters of an attention that every tp rank holds: the products into narrow latents."""
    r = model.latent
    return 0.0 if r is None else model.hidden * (r.query_rank + r.key_value_rank + r.rotary)


def _wide(r: Latent, heads: int) -> int:
    """Width of all queries, keys and values that come out of narrow ones."""
    return heads * (2 * (r.plain + r.rotary) + r.value)
