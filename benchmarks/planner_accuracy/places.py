"""Where published mappings stand in a search of their cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.planner_accuracy.runs import Run
from meshpar.planner import Candidate, Constants, Space, estimate, search
from meshpar.planner.mapping import DATA_PARALLEL
from meshpar.planner.search import shape

BEST = 5


def text(runs: Sequence[Run], constants: Constants) -> str:
    """The two bars, dense and with experts, and the mappings that missed them."""
    found = list(_placed(_one_each(runs), constants))
    lines = []
    for sparse in (False, True):
        mine = [(run, place, ratio, best) for run, place, ratio, best in found if run.sparse == sparse]
        five, near = sum(place <= BEST for _, place, _, _ in mine), sum(ratio <= 1.1 for _, _, ratio, _ in mine)
        kind, targets = ("experts", "40 and 70") if sparse else ("dense", "75 and 85")
        of = max(1, len(mine))
        lines.append(
            f"- {kind}, {len(mine)} configurations: among our best {BEST} {five} ({100 * five / of:.0f} %), within 10 % of our best "
            f"{near} ({100 * near / of:.0f} %); targets {targets} %"
        )
        families: dict[str, int] = {}
        for _, _, _, best in mine:
            families[best.family] = families.get(best.family, 0) + 1
        lines.append(f"  our best is {', '.join(f'{name} ({n})' for name, n in sorted(families.items(), key=lambda x: -x[1]))}")
    return "\n".join(lines) + "\n"


def _one_each(runs: Sequence[Run]) -> list[Run]:
    """Of every configuration the run on fewest GPUs."""
    found: dict[tuple[object, ...], Run] = {}
    for run in sorted(runs, key=lambda run: run.job.cluster.gpus):
        found.setdefault(run.key, run)
    return list(found.values())


def _placed(runs: Sequence[Run], constants: Constants) -> Iterator[tuple[Run, int, float, Candidate]]:
    for run in runs:
        modes = ("replicate", "zero1", "zero3") if run.mapping.data_parallel == "replicate" else DATA_PARALLEL[1:]
        found = search(run.job, Space(data_parallel=modes), constants, top=10_000)
        shapes = list(dict.fromkeys(shape(one.mapping) for one in found.ranked))
        mine = shape(run.mapping)
        place = shapes.index(mine) + 1 if mine in shapes else len(shapes) + 1
        yield run, place, estimate(run.job, run.mapping, constants).seconds / found.best.seconds, found.best
