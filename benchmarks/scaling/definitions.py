"""The scaling table that users quote, and what the planner's best mapping does under each definition its columns could have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from meshpar.errors import ConfigError
from meshpar.planner import Candidate, Cluster, Constants, Job, Space, Transformer, flops_per_token, search

GPUS = (8, 64, 512, 2048)
EFFICIENCY: Mapping[int, tuple[int, int]] = {8: (85, 95), 64: (75, 85), 512: (70, 80), 2048: (65, 75)}
MFU: Mapping[int, tuple[int, int]] = {8: (45, 50), 64: (48, 55), 512: (50, 58), 2048: (52, 60)}
"""GPUs -> percent, as quoted."""
SPACE = Space(cp=(1,), microbatch=(1, 2, 4), data_parallel=("zero1",), schedules=("1f1b", "interleaved-1f1b"))
"""What the software of the published runs could do."""
SEQ = 2048


def gpt(layers: int, hidden: int, heads: int) -> Transformer:
    return Transformer(layers, hidden, heads, 4 * hidden, 51200, gated=False, tied=True, positions=SEQ)


SMALL, MIDDLE, LARGE, HUGE = gpt(32, 4096, 32), gpt(48, 8192, 64), gpt(96, 12288, 96), gpt(105, 20480, 128)
"""7B, 39B, 175B, 530B."""
STACKS = {"a100": "megatron-2021", "h100": "megatron-2024"}
"""The software that published runs on each were measured with."""


@dataclass(frozen=True)
class Definition:
    """What grows with the cluster: GPUs -> model, and samples of a step."""

    name: str
    model: Callable[[int], Transformer]
    batch: Callable[[int], int]


DEFINITIONS = (
    Definition("strong: 175B, 512 samples", lambda gpus: LARGE, lambda gpus: 512),
    Definition("strong: 7B, 2048 samples", lambda gpus: SMALL, lambda gpus: 2048),
    Definition("weak: 175B, 3 samples a GPU", lambda gpus: LARGE, lambda gpus: 3 * gpus),
    Definition(
        "growing: 7B, 39B, 175B, 530B and their batch",
        lambda gpus: {8: SMALL, 64: MIDDLE, 512: LARGE, 2048: HUGE}[gpus],
        lambda gpus: {8: 128, 64: 512, 512: 1536, 2048: 2560}[gpus],
    ),
)


@dataclass(frozen=True)
class Point:
    """The best mapping on so many GPUs. Shares of 1."""

    gpus: int
    best: Candidate
    computing: float
    """Of a step, the part in which the busiest rank computes: efficiency against one device that could hold the model."""
    mfu: float
    """Model FLOPs, all pairs of tokens counted, of the peak."""


def points(definition: Definition, part: str, constants: Constants, gpus: tuple[int, ...] = GPUS) -> dict[int, Point]:
    """Every number of GPUs on which the model fits."""
    found = {}
    for n in gpus:
        job = Job(definition.model(n), Cluster(part, n), SEQ, definition.batch(n), "bf16", STACKS[part])
        try:
            best = search(job, SPACE, constants, top=1).best
        except ConfigError:
            continue
        parts, rate = best.time.parts, job.tokens / n / best.seconds
        computing = sum(parts[name] for name in ("matrices", "attention", "elementwise", "host")) / best.seconds
        share = rate * flops_per_token(job.model, job.seq, "noncausal") / job.cluster.hardware.peak("bf16")
        found[n] = Point(n, best, computing, share)
    return found


def efficiencies(found: Mapping[int, Point]) -> dict[str, dict[int, float]]:
    """What "efficiency" can mean: against one device, against the fewest GPUs, against the row before."""
    order = sorted(found)
    first = found[order[0]].mfu if order else 1.0
    return {
        "one device": {n: found[n].computing for n in order},
        "fewest GPUs": {n: found[n].mfu / first for n in order},
        "row before": {n: found[n].mfu / found[before].mfu for before, n in pairwise(order)},
    }


def implied(gpus: int) -> float:
    """The share of peak that one device would reach if both quoted columns held: MFU / efficiency, middles of the ranges."""
    return sum(MFU[gpus]) / sum(EFFICIENCY[gpus])


def inside(value: float, quoted: tuple[int, int]) -> bool:
    """Whether a share is in a quoted range, rounded as it is printed."""
    return quoted[0] <= round(100 * value) <= quoted[1]
