"""Where published mappings stand in a search of their cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.planner_accuracy.runs import Run
from benchmarks.planner_accuracy.scores import apart, source_of
from meshpar.planner import Candidate, Constants, Space, estimate, search
from meshpar.planner.mapping import RECOMPUTE
from meshpar.planner.search import shape

BEST = 5
DRAWS = 400
MODES = {
    "megatron-2020": ("replicate",),
    "megatron-2021": ("replicate",),
    "deepspeed-2021": ("zero3",),
    "megatron-2024": ("zero1",),
    "nemo-2024": ("zero1",),
    "torchtitan": ("zero3",),
    "torchtitan-eager": ("zero3",),
    "nanotron": ("replicate", "zero1"),
}
"""Stack -> how its parameters could be shared out over data ranks."""
RECOMPUTED = {
    "megatron-2024": ("none", "selective", "full"),
    "nemo-2024": ("none", "selective", "full"),
    "nanotron": ("none",),
}
"""Stack -> what it could compute once more: norms and activation functions alone since Megatron Core of 2025 (--recompute-modules); the
grid of the heatmap had no recompute (huggingface/nanotron, scripts/scaling_benchmarks.py)."""
UNCUT = ("megatron-2020", "megatron-2021", "deepspeed-2021", "nanotron")
"""Stacks without context parallelism. The one of 2020 has no pipelines (arXiv 1909.08053), nanotron runs 1F1B without virtual stages."""


def text(runs: Sequence[Run], errors: np.ndarray, constants: Constants) -> str:
    """The two bars, dense and with experts, and the mappings that missed them. `errors`: of the steps, with their sources left out."""
    found = list(_placed(_one_each(runs), constants))
    lines = []
    for sparse in (False, True):
        mine = [(run, place, ratio, best) for run, place, ratio, best, _ in found if run.sparse == sparse]
        five, near = sum(place <= BEST for _, place, _, _ in mine), sum(ratio <= 1.1 for _, _, ratio, _ in mine)
        kind, targets = ("experts", "40 and 70") if sparse else ("dense", "75 and 85")
        of = max(1, len(mine))
        lines.append(
            f"- {kind}, {len(mine)} configurations: among our best {BEST} {five} ({100 * five / of:.0f} %), within 10 % of our best "
            f"{near} ({100 * near / of:.0f} %); targets {targets} %"
        )
        lines.append(_limit([times for run, *_, times in found if run.sparse == sparse], *apart(runs, errors, sparse=sparse)))
        families: dict[str, int] = {}
        for _, _, _, best in mine:
            families[best.family] = families.get(best.family, 0) + 1
        lines.append(f"  our best is {', '.join(f'{name} ({n})' for name, n in sorted(families.items(), key=lambda x: -x[1]))}")
        for run, place, ratio, best in sorted(mine, key=lambda x: -x[2])[:6]:
            lines.append(f"  row {run.row}: {run.mapping} is {ratio:.2f} of our best, place {place}: {best.mapping}")
    lines.append("- by source, configurations / among our best five / within 10 %:")
    for source in dict.fromkeys(source_of(run) for run, *_ in found):
        mine = [(place, ratio) for run, place, ratio, *_ in found if source_of(run) == source]
        lines.append(f"  {source}: {len(mine)} / {sum(place <= BEST for place, _ in mine)} / {sum(ratio <= 1.1 for _, ratio in mine)}")
    return "\n".join(lines) + "\n"


def _limit(searches: Sequence[np.ndarray], deviation: float, pairs: int) -> str:
    """What a publisher would reach who had run every mapping and published the fastest: estimates that deviate so much hide it."""
    drawn = np.random.default_rng(0)
    five = near = 0.0
    for times in searches:
        fastest = (times * np.exp(deviation * drawn.standard_normal((DRAWS, len(times))))).argmin(axis=1)
        five += (fastest < BEST).mean()
        near += (times[fastest] <= 1.1 * times[0]).mean()
    of = max(1, len(searches))
    return (
        f"  the fastest of all mappings, were it published: {100 * five / of:.0f} and {100 * near / of:.0f} %, if estimates of mappings "
        f"of one job deviate by {100 * deviation:.1f} % each ({pairs} pairs say so)"
    )


def _one_each(runs: Sequence[Run]) -> list[Run]:
    """Of every configuration the run on fewest GPUs."""
    found: dict[tuple[object, ...], Run] = {}
    for run in sorted(runs, key=lambda run: run.job.cluster.gpus):
        found.setdefault(run.key, run)
    return list(found.values())


def space_of(run: Run) -> Space:
    """What the software of a row could do, and the recompute that it states.

    ZeRO-3 of 2104.04473 is a baseline without tp and pp; experts of 2504.14960 are split like the rest of the model before it folds them.
    """
    name = run.job.software.name
    recompute = (run.mapping.recompute,) if run.declared else RECOMPUTED.get(name, RECOMPUTE)
    space = Space(
        schedules=("1f1b",) if name == "nanotron" else ("1f1b", "interleaved-1f1b"),
        data_parallel=MODES.get(name, ("zero1", "zero3")),
        recompute=recompute,
        fold_experts=name != "megatron-2024" or run.mapping.expert_tp == 1,
    )
    if name in UNCUT:
        space = replace(space, cp=(1,))
    if name == "nanotron":
        space = replace(space, virtual=(1,))
    if name == "deepspeed-2021":
        space = replace(space, tp=(1,))
    return replace(space, pp=(1,)) if name in ("deepspeed-2021", "megatron-2020") else space


def _placed(runs: Sequence[Run], constants: Constants) -> Iterator[tuple[Run, int, float, Candidate, np.ndarray]]:
    """Runs with their place among the mappings of the search, their time in that of the best, the best, and the times of all."""
    for run in runs:
        found = search(run.job, space_of(run), constants, top=10_000)
        shapes = [shape(one.mapping) for one in found.shapes]
        mine = shape(run.mapping)
        place = shapes.index(mine) + 1 if mine in shapes else len(shapes) + 1
        times = np.array([one.seconds for one in found.shapes])
        yield run, place, estimate(run.job, run.mapping, constants).seconds / found.best.seconds, found.best, times
