"""Step times as the planner says them, and as gloo ranks take them: `python benchmarks/planner_here/steps.py [--write]`.

Measures this machine (`mp.calibrate`), takes steps of every configuration in turn, and compares. At most ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import machine  # noqa: E402
from meshpar import calibrate  # noqa: E402
from meshpar.calibrate import SmallProgram, steps  # noqa: E402
from meshpar.planner import Hardware, Transformer  # noqa: E402
from meshpar.planner.hardware import hardware  # noqa: E402

SMALL = Transformer(layers=4, hidden=128, heads=4, kv_heads=2, ffn=384, vocab=1024)
LARGE = Transformer(layers=4, hidden=256, heads=8, kv_heads=4, ffn=768, vocab=2048)
DEEP = Transformer(layers=8, hidden=128, heads=4, ffn=512, vocab=512, gated=False)
EXPERTS = Transformer(layers=4, hidden=128, heads=4, kv_heads=2, ffn=384, vocab=1024, experts=4, top_k=2, expert_ffn=192)
MODES = ("replicate", "zero1", "zero2", "zero3")
PROGRAMS = [
    *(SmallProgram(sizes, "dp=1", 4, tokens) for sizes in (SMALL, LARGE, EXPERTS) for tokens in (64, 256)),
    SmallProgram(DEEP, "dp=1", 8, 128, {"microbatches": 4}),
    SmallProgram(LARGE, "dp=1", 4, 128, {"recompute": "full"}),
    *(SmallProgram(SMALL, "dp=2", 4, 128, {"data_parallel": mode}) for mode in MODES),
    *(SmallProgram(LARGE, "dp=2", 4, 128, {"data_parallel": mode, "microbatches": 2}) for mode in MODES),
    *(SmallProgram(sizes, "tp=2", 4, tokens) for sizes in (SMALL, LARGE) for tokens in (64, 256)),
    SmallProgram(LARGE, "tp=2", 4, 128, {"sequence_parallel": False}),
    SmallProgram(DEEP, "tp=2", 4, 128, {"recompute": "selective"}),
    *(
        SmallProgram(DEEP, "pp=2", 8, 128, {"microbatches": 8, "schedule": schedule})
        for schedule in ("gpipe", "1f1b", "looped-bfs", "interleaved-1f1b", "zero-bubble", "zbv", "dualpipev")
    ),
    SmallProgram(LARGE, "pp=2", 8, 128, {"microbatches": 4}),
    SmallProgram(EXPERTS, "ep=2", 4, 64),
    SmallProgram(EXPERTS, "ep=2", 4, 256),
    SmallProgram(SMALL, "cp=2", 4, 256),
    SmallProgram(LARGE, "cp=2", 2, 512),
    SmallProgram(LARGE, "dp=2,tp=2", 4, 128),
    SmallProgram(DEEP, "pp=2,dp=2", 8, 128, {"microbatches": 4, "data_parallel": "zero1"}),
    SmallProgram(DEEP, "pp=2,tp=2", 8, 128, {"microbatches": 4}),
    SmallProgram(EXPERTS, "dp=2,ep=2", 4, 128),
    SmallProgram(DEEP, "pp=4", 8, 128, {"microbatches": 8}),
    SmallProgram(LARGE, "tp=4", 4, 128),
]
"""Every axis, data-parallel mode and schedule, sizes where computation, calls and messages matter; most on two ranks."""


def compare(part: Hardware, programs: list[SmallProgram], rounds: int) -> list[tuple[SmallProgram, float, float]]:
    """Every program with its estimated and its measured seconds."""
    took = steps(programs, rounds)
    return [(one, one.predicted(part).time.seconds, seconds) for one, seconds in zip(programs, took)]


def text(found: list[tuple[SmallProgram, float, float]], spent: float) -> str:
    """The table, and what it comes to."""
    rows = ["| program | estimated ms | measured ms | error % |", "|---|---|---|---|"]
    rows += [f"| {one} | {1e3 * a:.1f} | {1e3 * b:.1f} | {100 * (a / b - 1):+.0f} |" for one, a, b in found]
    lines = [
        f"{who}: {len(errors)} programs, median {100 * median(errors):.1f} %, worst {100 * max(errors):.0f} %"
        for who, some in (("all", (1, 2, 4)), ("as many ranks as cores, or fewer", (1, 2)), ("4 ranks", (4,)))
        if (errors := [abs(a / b - 1) for one, a, b in found if one.world in some])
    ]
    return "\n".join([*(f"- {line}" for line in lines), "", f"{spent:.0f} s; {machine()}", "", *rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--rounds", type=int, default=10, help="how often everything is timed; the least counts")
    parser.add_argument("--only", default="", help="programs whose description contains this")
    parser.add_argument("--machine", default="", help="a file of meshpar calibrate, instead of measuring again")
    options = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        name = options.machine or f"{folder}/machine.json"
        if not options.machine:
            calibrate(name, rounds=options.rounds, say=lambda what: print(f"measuring {what} ...", flush=True))
        part = hardware(name)
    programs = [one for one in PROGRAMS if options.only in str(one)]
    body = text(compare(part, programs, options.rounds), time.perf_counter() - begun)
    print(body)
    if options.write:
        path = Path(__file__).with_name("README.md")
        before, _, after = path.read_text().partition("<!-- time -->")
        after = after.partition("<!-- end -->")[2]
        path.write_text(f"{before}<!-- time -->\n\n{body}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
