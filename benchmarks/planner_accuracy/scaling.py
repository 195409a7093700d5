"""The scaling table that users quote, under the definitions that each of its columns allows."""

from __future__ import annotations

from meshpar.planner import Candidate, Cluster, Constants, Job, Space, Transformer, flops_per_token, search

GPUS = (8, 64, 512, 2048)
QUOTED_EFFICIENCY = {8: (85, 95), 64: (75, 85), 512: (70, 80), 2048: (65, 75)}
QUOTED_MFU = {8: (45, 50), 64: (48, 55), 512: (50, 58), 2048: (52, 60)}
SPACE = Space(cp=(1,), microbatch=(1, 2, 4), data_parallel=("zero1",), schedules=("1f1b", "interleaved-1f1b"))


def gpt(layers: int, hidden: int, heads: int) -> Transformer:
    return Transformer(layers, hidden, heads, 4 * hidden, 51200, gated=False, tied=True, positions=2048)


ONE = gpt(96, 12288, 96)
"""175B."""
GROWING = {8: gpt(32, 4096, 32), 64: gpt(48, 8192, 64), 512: gpt(96, 12288, 96), 2048: gpt(105, 20480, 128)}
"""GPUs -> a model as large as is usual there: 7B, 39B, 175B, 530B."""
BATCH = {8: 128, 64: 512, 512: 1536, 2048: 2560}
FIXED = 512
"""Samples of a step in strong scaling: a million tokens."""
STACKS = {"a100": "megatron-2021", "h100": "megatron-2024"}
"""The software that published runs on each were measured with."""


def utilisation(job: Job, one: Candidate) -> float:
    """Model FLOPs utilisation, noncausal."""
    rate = job.tokens / job.cluster.gpus / one.seconds
    return rate * flops_per_token(job.model, job.seq, "noncausal") / job.cluster.hardware.peak(job.precision)


def without_communication(one: Candidate) -> float:
    """Share of a step in which the busiest rank computes: efficiency against one device that could hold the model."""
    parts = one.time.parts
    return sum(parts[name] for name in ("matrices", "attention", "elementwise", "host")) / one.seconds


def rows(part: str, constants: Constants) -> list[list[str]]:
    """The table: quoted columns, strong scaling of one model, a model that grows, and what both columns together imply."""
    found = []
    for gpus in GPUS:
        cells = [str(gpus), "{}-{}".format(*QUOTED_EFFICIENCY[gpus]), "{}-{}".format(*QUOTED_MFU[gpus])]
        low, high = QUOTED_EFFICIENCY[gpus], QUOTED_MFU[gpus]
        implied = sum(high) / sum(low)
        for model, batch in ((ONE, FIXED), (GROWING[gpus], BATCH[gpus])):
            job = Job(model, Cluster(part, gpus), 2048, batch, "bf16", STACKS[part])
            try:
                best = search(job, SPACE, constants, top=1).best
            except ValueError:
                cells += ["does not fit", "-"]
                continue
            cells += [f"{100 * without_communication(best):.0f} %", f"{100 * utilisation(job, best):.0f} %"]
        found.append([*cells, f"{100 * implied:.0f} %"])
    return found
