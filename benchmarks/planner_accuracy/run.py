"""The planner against published runs: `python benchmarks/planner_accuracy/run.py --write` fits, scores and writes the README's tables.

`--search` also searches the cluster of every published run for the place of its mapping, which takes minutes.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402

from benchmarks.planner_accuracy import places  # noqa: E402
from benchmarks.planner_accuracy.runs import Run, baselines, load, wider  # noqa: E402
from benchmarks.planner_accuracy.scores import (  # noqa: E402
    WAYS,
    Scored,
    constants_table,
    memory_errors,
    pairs,
    per_configuration,
    quantiles,
    scored,
    source_of,
    spread,
)
from meshpar.planner.fit import FREE  # noqa: E402

README = HERE / "README.md"
TARGETS = {False: "6 / 18", True: "12 / 35"}
NOISE = {False: "3 / 8", True: "4 / 53"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into the README")
    parser.add_argument("--search", action="store_true", help="search the cluster of every run")
    options = parser.parse_args()
    begun = time.perf_counter()
    runs, left = load()
    result = scored(runs)
    fitted = time.perf_counter() - begun
    sections = {
        "accuracy": accuracy(result)
        + f"\nFit and leave-one-out: {fitted:.0f} s ({platform.machine()}, Python {platform.python_version()}).\n",
        "sources": sources(result),
        "memory": memories(result),
        "constants": table(("constant", "meaning", "prior", "fitted", "source of the prior"), constants_table(result.whole)),
        "misses": misses(result),
        "left out": left_out(left),
        "baselines": unseen(result, [(str(run.row), strategy, run) for strategy, run in baselines()]),
        "worth": worths(runs),
        "wider": unseen(result, [("-", f"tp={run.mapping.tp}", run) for run in wider()]),
    }
    if options.search:
        sections["places"] = places.text(runs, result.errors["left out"], result.whole.constants)
    for name, text in sections.items():
        print(f"== {name}\n\n{text}")
    print("FITTED:", {name: float(f"{result.whole.constants[name]:.4g}") for name in FREE})
    for name, sparse in (("dense", False), ("experts", True)):
        print("SPREAD", name, [round(x, 2) for x in spread(runs, result.errors["left out"], sparse)])
    ratios = [1 / (1 + e) for _, e in memory_errors(runs, result.whole.constants)]
    print("SPREAD memory", [round(float(np.quantile(ratios, q)), 2) for q in (0.1, 0.9)])
    if options.write:
        write(sections)


def worths(runs: Sequence[Run]) -> str:
    """Errors with sources left out, by how many observations a source is worth at most."""
    rows = []
    for worth in (float("inf"), 8, 4, 2, 1, 0.5):
        result = scored(runs, worth)
        cells = [quantiles(list(per_configuration(runs, result.errors["left out"], sparse).values())) for sparse in (False, True)]
        off = [abs(run.estimate(result.whole.constants).seconds / run.seconds - 1) for _, run in baselines()]
        name = {float("inf"): "as many as it has configurations", 1: "1 (taken)"}.get(worth, f"{worth:g}")
        rows.append([name, *cells, quantiles(off)])
    return table(("observations a source is worth", "dense", "experts", "baselines that no fit saw"), rows)


def accuracy(result: Scored) -> str:
    rows = []
    for sparse in (False, True):
        errors = {way: list(per_configuration(result.runs, result.errors[way], sparse).values()) for way in WAYS}
        cells = [quantiles(values) for values in errors.values()]
        rows.append(["experts" if sparse else "dense", str(len(errors["fit"])), *cells, TARGETS[sparse], NOISE[sparse]])
    heading = ("step time, median / p90 error %", "configurations", *WAYS.values(), "target", "noise of the data")
    text = table(heading, rows) + "\n"
    lines = ["Pairs of mappings more than 10 % apart in the data, in the right order (target 85 %):\n"]
    for same in (True, False):
        right, of = pairs(result.runs, result.errors["left out"], same_cluster=same)
        what = "same model, GPUs and batch" if same else "same model, kind of GPU and precision"
        lines.append(f"- {what}: {right} of {of} ({100 * right / max(of, 1):.0f} %)")
    return text + "\n".join(lines) + "\n"


def sources(result: Scored) -> str:
    rows = []
    names = [source_of(run) for run in result.runs]
    for source in dict.fromkeys(names):
        mine = np.array([name == source for name in names])
        cells = [
            f"{100 * np.median(np.abs(result.errors[way][mine])):.1f} / {100 * np.abs(result.errors[way][mine]).max():.0f}" for way in WAYS
        ]
        bias = f"{100 * np.median(result.errors['left out'][mine]):+.1f}"
        rows.append([source, str(int(mine.sum())), *cells, bias])
    return table(("source", "rows", *(f"{way}: median / worst %" for way in WAYS.values()), "median with sign, left out"), rows)


def memories(result: Scored) -> str:
    found = memory_errors(result.runs, result.whole.constants)
    worst = sorted(found, key=lambda pair: -abs(pair[1]))[:5]
    text = f"{len(found)} rows, median / p90 error {quantiles([abs(e) for _, e in found])} % (target 5 / 15). Worst:\n\n"
    return text + table(
        ("row", "model", "mapping", "published GiB", "error %"),
        [[str(r.row), r.name, str(r.mapping), f"{(r.published_memory or 0) / 2**30:.1f}", f"{100 * e:+.0f}"] for r, e in worst],
    )


def misses(result: Scored) -> str:
    rows = []
    for run, e, inside in sorted(zip(result.runs, result.errors["left out"], result.errors["fit"]), key=lambda x: -abs(x[1])):
        limit = 0.35 if run.sparse else 0.18
        if abs(e) > min(limit, 0.18):
            recompute = "" if run.declared else " (recompute inferred)"
            where = f"{run.job.cluster.gpus} x {run.job.cluster.hardware.name}"
            rows.append(
                [str(run.row), source_of(run), run.name, where, f"{run.mapping}{recompute}", f"{100 * e:+.0f}", f"{100 * inside:+.0f}"]
            )
    return table(("row", "source", "model", "cluster", "mapping", "left out %", "fit %"), rows)


def unseen(result: Scored, runs: Sequence[tuple[str, str, Run]]) -> str:
    """`runs`: name of the row, strategy, run."""
    rows, errors = [], []
    for name, strategy, run in runs:
        error = run.estimate(result.whole.constants).seconds / run.seconds - 1
        errors.append(abs(error))
        rows.append([name, run.name, strategy, str(run.job.cluster.gpus), str(run.job.batch), f"{run.seconds:.3g}", f"{100 * error:+.0f}"])
    heading = ("row", "model", "strategy", "GPUs", "batch", "published step s", "error %")
    return f"{len(rows)} rows, median / p90 error {quantiles(errors)} %:\n\n" + table(heading, rows)


def left_out(left: dict[int, str]) -> str:
    reasons: dict[str, list[int]] = {}
    for row, reason in left.items():
        reasons.setdefault(reason, []).append(row)
    return "\n".join(f"- rows {', '.join(map(str, rows))}: {reason}" for reason, rows in reasons.items()) + "\n"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def write(sections: dict[str, str]) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end -->`."""
    text = README.read_text()
    for name, section in sections.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise SystemExit(f"{README} has no place for {name!r}")
        text = f"{before}<!-- {name} -->\n\n{section}\n{end}{after}"
    README.write_text(text)


if __name__ == "__main__":
    main()
