"""The scaling table that users quote, under every definition: `python benchmarks/scaling/run.py [--write]`, about a minute.

Each cell is the planner's best mapping; "*" marks a value inside the quoted range.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.planner_accuracy.runs import load  # noqa: E402
from benchmarks.scaling.definitions import DEFINITIONS, EFFICIENCY, GPUS, MFU, STACKS, efficiencies, implied, inside, points  # noqa: E402
from meshpar.planner import Constants, flops_per_token  # noqa: E402

PUBLISHED = (
    ("a model and batch that grow (2104.04473 table 1)", tuple(range(10))),
    ("fixed model and batch, 175B (2104.04473 table 2)", (16, 17, 18)),
    ("fixed model, a batch that grows (70B, dgxc-benchmarking)", (32, 33, 34, 35, 36, 37)),
    ("fixed model and batch, experts (2504.14960)", (89, 90, 91, 92)),
)
"""Series of rows of published_runs.csv in which only the number of GPUs, and what goes with it, differs."""


def table(part: str, constants: Constants) -> Iterator[str]:
    """One accelerator: a row per definition and meaning of efficiency."""
    yield f"| {part}, {STACKS[part]} | " + " | ".join(f"{n} GPUs" for n in GPUS) + " |"
    yield "|---|" + "---|" * len(GPUS)
    yield _line("quoted: efficiency %", [f"{a}-{b}" for a, b in EFFICIENCY.values()])
    yield _line("quoted: MFU %", [f"{a}-{b}" for a, b in MFU.values()])
    yield _line("one device, by both columns %", [f"{100 * implied(n):.0f}" for n in GPUS])
    for definition in DEFINITIONS:
        found = points(definition, part, constants)
        for meaning, values in efficiencies(found).items():
            cells = [_cell(values.get(n), EFFICIENCY[n]) for n in GPUS]
            yield _line(f"{definition.name}: efficiency against {meaning}", cells)
        yield _line(f"{definition.name}: MFU", [_cell(found[n].mfu if n in found else None, MFU[n]) for n in GPUS])


def published() -> Iterator[str]:
    """What was measured: noncausal MFU, and relative to the fewest GPUs of the series."""
    yield "| measured | GPUs: MFU % (of the fewest GPUs) |"
    yield "|---|---|"
    runs = {run.row: run for run in load()[0]}
    for name, rows in PUBLISHED:
        mine = sorted((runs[row] for row in rows if row in runs), key=lambda run: run.job.cluster.gpus)
        shares = [
            run.job.tokens
            / run.job.cluster.gpus
            / run.seconds
            * flops_per_token(run.job.model, run.job.seq, "noncausal")
            / run.job.cluster.hardware.peak(run.job.precision)
            for run in mine
        ]
        cells = [f"{run.job.cluster.gpus}: {100 * s:.1f} ({100 * s / shares[0]:.0f})" for run, s in zip(mine, shares)]
        yield f"| {name} | {', '.join(cells)} |"


def _cell(value: float | None, quoted: tuple[int, int]) -> str:
    return "-" if value is None else f"{100 * value:.0f}{'*' if inside(value, quoted) else ''}"


def _line(name: str, cells: Sequence[str]) -> str:
    return "| " + " | ".join([name, *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    options = parser.parse_args()
    constants = Constants.default()
    body = "\n\n".join("\n".join(lines) for lines in (*(list(table(part, constants)) for part in STACKS), list(published())))
    print(body)
    if options.write:
        path = HERE / "README.md"
        before, _, after = path.read_text().partition("<!-- tables -->")
        path.write_text(f"{before}<!-- tables -->\n\n{body}\n\n<!-- end -->{after.partition('<!-- end -->')[2]}")


if __name__ == "__main__":
    main()
