"""The workload of a transformer from its dimensions: layers cut into stages, groups of ranks, what is summed once per step."""

from __future__ import annotations

from bisect import bisect
from functools import lru_cache
from itertools import accumulate

from meshpar.planner import v_shaped
from meshpar.planner.blocks import block, embedding, head
from meshpar.planner.flops import CONVENTIONS, flops_per_token
from meshpar.planner.mapping import V_SHAPED, Job, Mapping, check
from meshpar.planner.share import Portion
from meshpar.planner.stack import Stack
from meshpar.planner.transformer import Transformer
from meshpar.planner.workload import AxisSpan, Collective, Layer, StageLoad, Workload, group

SLOWNESS = {"bf16": 2, "fp16": 2, "fp8": 1, "nvfp4": 0.5}
"""Time of a FLOP by precision, relative: what balances stages."""


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
        "tp": AxisSpan("tp", mapping.tp, 1),
        "cp": AxisSpan("cp", mapping.cp, mapping.tp),
        "dp": AxisSpan("dp", replicas, mapping.tp),
        "etp": AxisSpan("etp", etp, 1),
        "ep": AxisSpan("ep", mapping.ep, etp),
        "edp": AxisSpan("edp", edp, mapping.ep * etp),
        "pp": AxisSpan("pp", mapping.pp, gpus // mapping.pp),
    }
    mode = "zero1" if mapping.data_parallel == "zero2" and mapping.pp > 1 else mapping.data_parallel  # a pipeline sums at the end
    shares = mode if mode in ("zero2", "zero3") else ""
    share = Portion(
        *(job.model, job.software, job.dtype, job.half, job.seq, mapping.microbatch, mapping.tp, mapping.cp, mapping.ep, etp),
        *(
            mapping.sequence_parallel and mapping.tp > 1,
            mapping.recompute,
            shares,
            replicas if shares else 0,
        ),
    )
    stages = tuple(_stage(layers, mode, share.stack) for layers in _cut(share, mapping.pp * mapping.virtual, mapping.pp > 1))
    return Workload(
        *(stages, mapping.pp, mapping.order, mapping.microbatches(job), axes),
        send=2 * share.tokens * job.model.hidden / mapping.tp,  # scattered over tp, gathered on the other side (2104.04473, 4.1)
        data_parallel=mode,
        gpus=gpus,
        tokens=job.tokens,
        info=_conventions(job.model, job.seq),
        place=v_shaped.place(mapping.pp) if mapping.order in V_SHAPED else (),
    )


@lru_cache(maxsize=256)
def _conventions(model: Transformer, seq: int) -> dict[str, float]:
    return {name: flops_per_token(model, seq, name) for name in CONVENTIONS}  # type: ignore[arg-type]


@lru_cache(maxsize=100_000)
def _stage(layers: tuple[tuple[Layer, int], ...], data_parallel: str, stack: Stack) -> StageLoad:
    dense = sum(layer.parameters * times for layer, times in layers)
    experts = sum(layer.expert_parameters * times for layer, times in layers)
    found: list[Collective] = []
    for axis, size in (("dp", dense), ("edp", experts)):
        if not size or data_parallel == "zero3":
            continue
        if data_parallel == "zero2":
            found.append(Collective("parameters", "all_gather", axis, "step", size * 2, behind="compute"))
        elif data_parallel == "replicate":
            found.append(Collective("gradients", "all_reduce", axis, "step", size * stack.gradient_sum, behind="compute"))
        else:
            found.append(Collective("gradients", "reduce_scatter", axis, "step", size * stack.gradient_sum, behind="compute"))
            found.append(Collective("parameters", "all_gather", axis, "step", size * 2, behind="compute"))
    return StageLoad(layers, tuple(found))


@lru_cache(maxsize=20_000)
def _cut(share: Portion, stages: int, copies: bool) -> tuple[tuple[tuple[Layer, int], ...], ...]:
    """Layers in `stages` runs, as the stack cuts them; by cost where they do not divide."""
    model = share.model
    made = {kind: block(share, *kind) for kind in set(_kinds(model))}
    blocks = [made[kind] for kind in _kinds(model)]
    ends = (embedding(share), head(share, copies))
    if model.layers % stages == 0 and not model.predicts and share.stack.cuts == "evenly":
        size = model.layers // stages
        runs = [blocks[i : i + size] for i in range(0, model.layers, size)]
        runs[0] = [ends[0], *runs[0]]
        runs[-1] = [*runs[-1], ends[1]]
    else:
        predicting = [layer for _ in range(model.predicts) for layer in (block(share, bool(model.experts), False, True), ends[1])]
        runs = _balanced([ends[0], *blocks, *predicting, ends[1]], stages, share.stack.cuts == "past")
    return tuple(group(run) for run in runs)


@lru_cache(maxsize=256)
def _kinds(model: Transformer) -> list[tuple[bool, bool]]:
    """For every layer: has it experts, does it attend to a window."""
    return [(bool(model.experts) and i >= model.dense_layers, model.window is not None and i % 2 == 1) for i in range(model.layers)]


def _balanced(layers: list[Layer], stages: int, past: bool = False) -> list[list[Layer]]:
    """Runs cut where the cost so far is nearest to equal shares, or just `past` them; every run gets a layer."""
    cost = {id(layer): sum(o.flops * SLOWNESS.get(o.dtype, 1) for o in layer.operators) for layer in set(layers)}
    costs = [cost[id(layer)] for layer in layers]
    sums = [0.0, *accumulate(costs)]
    cuts = [0]
    for stage in range(1, stages):
        share = sums[-1] * stage / stages
        low, high = cuts[-1] + 1, len(layers) - (stages - stage)
        after = min(max(bisect(sums, share), low), high)
        nearer = after > low and not past and share - sums[after - 1] < sums[after] - share
        cuts.append(after - 1 if nearer else after)
    return [layers[a:b] for a, b in zip(cuts, [*cuts[1:], len(layers)])]
