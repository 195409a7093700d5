"""Peak memory of a step as a dry run says it, and as gloo ranks allocate it: `python benchmarks/planner_here/memory.py [--write]`.

Every data-parallel mode, recompute, schedule, and experts, on four processes of this machine. Measured by the tape that the dry run itself
reads (`meshpar/dry_run/tape.py`), on real tensors: storages from the operator that makes one until nobody holds it, of the second step.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import machine  # noqa: E402
from tests.dry_run.measured import measured, predicted  # noqa: E402
from tests.pool import Pool  # noqa: E402

Case = tuple[str, str, dict[str, Any]]
SCHEDULES = ("gpipe", "1f1b", "looped-bfs", "interleaved-1f1b", "zero-bubble", "zbv", "dualpipev")
MODES = ("replicate", "zero1", "zero2", "zero3")
CASES: list[Case] = [
    *(("dense", "pp=4", {"schedule": schedule, "microbatches": 8}) for schedule in SCHEDULES),
    *(("dense", "dp=4", {"data_parallel": mode, "recompute": r, "microbatches": 4}) for mode in MODES for r in ("none", "full")),
    *(("dense", "dp=4", {"data_parallel": mode}) for mode in MODES),
    *(("dense", "tp=4", {"recompute": r}) for r in ("none", "selective", "full")),
    *(("dense", "pp=2,dp=2", {"data_parallel": mode, "microbatches": 4}) for mode in MODES),
    ("dense", "dp_replicate=2,dp_shard=2", {"microbatches": 2}),
    ("dense", "dp=2,tp=2", {"precision": "bf16", "microbatches": 2}),
    *(("dense", "cp=4", {"recompute": r}) for r in ("none", "selective", "full")),
    ("dense", "cp=2,tp=2", {"data_parallel": "zero3", "recompute": "selective"}),
    ("dense", "pp=2,cp=2", {"microbatches": 4, "data_parallel": "zero1"}),
    ("experts", "ep=4", {"microbatches": 2}),
    ("experts", "dp=2,ep=2", {"microbatches": 2, "data_parallel": "zero1"}),
    ("experts", "ep=2,tp=2", {"recompute": "full"}),
    ("experts", "cp=2,ep=2", {}),
    ("experts", "pp=2,ep=2", {"microbatches": 4, "schedule": "zero-bubble"}),
]


def compare(pool: Pool, case: Case) -> tuple[list[int], list[int]]:
    """Predicted and measured bytes, by pipeline rank."""
    found = predicted(*case)
    real = pool.run(measured, *case, world=4, timeout=400)
    ranks = len(real) // len(found)
    return found, [max(real[i * ranks : (i + 1) * ranks]) for i in range(len(found))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--only", default="", help="cases whose mesh or options contain this")
    options = parser.parse_args()
    rows, errors = ["| model | mesh | options | predicted KiB | measured KiB | error % |", "|---|---|---|---|---|---|"], []
    pool = Pool()
    for case in CASES:
        if options.only not in f"{case[1]} {case[2]}":
            continue
        found, real = compare(pool, case)
        errors += [100 * (a / b - 1) for a, b in zip(found, real)]
        said = ", ".join(f"{name}={value}" for name, value in case[2].items()) or "-"
        cells = (" / ".join(f"{x / 1024:.0f}" for x in column) for column in (found, real))
        worst = max(errors[-len(found) :], key=abs)
        rows.append(f"| {case[0]} | {case[1]} | {said} | {' | '.join(cells)} | {worst:+.1f} |")
        print(rows[-1], flush=True)
    summary = f"{len(errors)} ranks: median {median(map(abs, errors)):.2f} %, worst {max(map(abs, errors)):.2f} % ({machine()})"
    print(summary)
    if options.write:
        path = Path(__file__).with_name("README.md")
        before, _, after = path.read_text().partition("<!-- memory -->")
        after = after.partition("<!-- end -->")[2]
        path.write_text(f"{before}<!-- memory -->\n\n{summary}\n\n" + "\n".join(rows) + f"\n\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
