"""The bubble of every pipeline schedule, measured against its closed form: `python benchmarks/pipeline_bubble/run.py --write`.

The stages run through `mp.parallelize` and `train_step` as any model does, on local gloo ranks; what they compute is a nap of known length,
one in forward, one for the gradient of the input and one for that of the weight, so that ranks do not fight over cores. `pm.timeline` says
when everything ran; `mp.timing.bubble` is the idle time as a fraction of the computing time, of the fastest of a few steps: the one that
other work on the machine disturbed least.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.measuring import line, machine, table  # noqa: E402
from meshpar.ops import deferred  # noqa: E402
from meshpar.pipeline.timing import bubble, expected_bubble  # noqa: E402
from meshpar.proof import launch  # noqa: E402

SCHEDULES = {"gpipe": 1, "1f1b": 1, "looped-bfs": 2, "interleaved-1f1b": 2, "zero-bubble": 1, "zbv": 2, "dualpipev": 2}
"""Schedule -> stages per rank."""
WITHIN = 0.10


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    schedule: str
    ranks: int
    microbatches: int

    @property
    def per_rank(self) -> int:
        return SCHEDULES[self.schedule]

    def expected(self) -> tuple[float, str]:
        """The bubble, and where it comes from."""
        closed = expected_bubble(self.schedule, self.ranks, self.microbatches, self.per_rank)
        if closed is not None:
            return closed, "closed form"
        order = mp.schedule.order(self.schedule, self.ranks, self.ranks * self.per_rank, self.microbatches)
        return bubble(mp.timing.simulate(order), self.ranks), "simulated order"


@torch.library.custom_op("pipeline_bubble::nap", mutates_args=())
def nap(x: Tensor, forward: float, backward: float) -> Tensor:
    """Sleep, and return a copy."""
    time.sleep(forward)
    return x.clone()


@nap.register_fake
def _(x: Tensor, forward: float, backward: float) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
    ctx.backward_seconds = inputs[2]


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    time.sleep(ctx.backward_seconds)
    return grad.clone(), None, None


nap.register_autograd(_back, setup_context=_keep)


class Layer(nn.Module):
    """A nap of `forward` seconds; in backward one of `backward`, and wherever the gradient of the weight is computed one more."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.linear, self.naps = nn.Linear(4, 4, bias=False), (forward, backward)

    def forward(self, x: Tensor) -> Tensor:
        return nap(self.linear(x), *self.naps)


class Model(nn.Module):
    """One layer per stage."""

    def __init__(self, layers: int, forward: float, backward: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(forward, backward) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.pow(2).mean()


def measure(cases: Sequence[Case], seconds: float, steps: int) -> list[tuple[float, float]]:
    """On a rank: per case, how long its fastest step took, and its bubble."""
    ready = deferred._now_or_later

    def with_a_nap(later: Any, weight: Tensor, gradient: Any) -> Tensor | None:
        def slowly() -> Tensor:
            time.sleep(seconds)
            return gradient()

        return ready(later, weight, slowly)

    deferred._now_or_later = with_a_nap
    try:
        found = []
        for case in cases:
            found.append(_measured(case, seconds, steps))
            if dist.get_rank() == 0:  # the table comes in the end: say meanwhile what there is
                print(f"{case}: bubble {found[-1][1]:.3f}, expected {case.expected()[0]:.3f}", file=sys.stderr, flush=True)
        return found
    finally:
        deferred._now_or_later = ready


def _measured(case: Case, seconds: float, steps: int) -> tuple[float, float]:
    stages = case.ranks * case.per_rank
    order = mp.schedule.order(case.schedule, case.ranks, stages, case.microbatches)
    halves = any(action.kind == "W" for row in order.actions for action in row)
    model = Model(stages, seconds, seconds if halves else 2 * seconds)  # in one piece, the backward naps for both gradients
    batch = {"x": torch.ones(case.microbatches, 4)}
    config: Any = {"microbatches": case.microbatches, "schedule": case.schedule, "stages": [1] * stages}
    pm = mp.parallelize(model, mp.make_mesh(f"pp={case.ranks}"), example=batch, config=mp.ParallelConfig(**config))
    pm.timeline(**batch)
    found = []
    for _ in range(steps):
        events = [event for event in pm.timeline(**batch) if event.kind in mp.schedule.COMPUTE]
        found.append((max(e.end for e in events) - min(e.start for e in events), bubble(events, case.ranks)))
    return min(found)


def _table(cases: Sequence[Case], found: Sequence[tuple[float, float]]) -> list[str]:
    lines = []
    for case, (length, idle) in zip(cases, found, strict=True):
        expected, source = case.expected()
        ratio = f"{idle / expected:.2f}" if expected else "-"
        cells = (case.schedule, case.ranks, case.per_rank, case.microbatches, f"{expected:.3f}", source, f"{idle:.3f}", ratio)
        lines.append(line([*map(str, cells), f"{length:.2f}"]))
    return table(("schedule", "p", "v", "m", "expected", "from", "measured", "measured : expected", "step (s)"), lines)


def main() -> None:
    """Measure, print, and with --write put the table into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.03, help="of every nap")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines: list[str] = []
    everything: list[Case] = []
    results: list[tuple[float, float]] = []
    for ranks in options.ranks:
        cases = [Case(s, ranks, m) for s in options.schedules for m in options.microbatches if s != "dualpipev" or m >= 2 * ranks]
        results += launch.run(measure, cases, options.seconds, options.steps, world=ranks)[0]
        everything += cases
    lines = _table(everything, results)
    print("\n".join(lines))
    closed = [(c, idle) for c, (_, idle) in zip(everything, results, strict=True) if c.expected()[1] == "closed form"]
    off = [f"{c.schedule} p={c.ranks} m={c.microbatches}" for c, b in closed if abs(b / c.expected()[0] - 1) > WITHIN]
    verdict = f"{len(closed) - len(off)} of {len(closed)} bubbles with a closed form are within {WITHIN:.0%} of it." + (
        f" Outside: {', '.join(off)}." if off else ""
    )
    print(verdict)
    if options.write:
        where = f"{machine()}. {date.today()}."
        readme = HERE / "README.md"
        head, _, rest = readme.read_text().partition("<!-- table -->")
        tail = rest.partition("<!-- end -->")[2]
        command = f"python benchmarks/pipeline_bubble/run.py --seconds {options.seconds} --steps {options.steps}"
        body = "\n".join(["", "", *lines, "", verdict, "", where, "", f"Command: `{command} --write`", "", ""])
        readme.write_text(f"{head}<!-- table -->{body}<!-- end -->{tail}")


if __name__ == "__main__":
    main()
