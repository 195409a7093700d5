"""A machine as it was measured: seconds of kernels, collectives and of the runtime itself, where a data sheet would have rates.

    seconds of a kernel      a curve over FLOPs (products, attention) or bytes (everything else)
    seconds of a collective  a curve over bytes, for every kind, group and number of ranks on the machine
    crowd                    how much slower a rank computes while others do, from 1 to more ranks than cores

`meshpar calibrate` makes one (`Hardware.measured`), `meshpar.planner.files` reads and writes it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log

from meshpar.errors import ConfigError
from meshpar.planner.comm import RankGroup
from meshpar.planner.constants import Constants
from meshpar.planner.stack import Stack
from meshpar.planner.workload import Operator

RUNTIME = {
    "call": "seconds of a call beside its kernel: Python's share, and autograd's",
    "data": "seconds of a collective over data ranks beside its transfer: what FSDP2's hooks do",
    "action": "seconds of a forward or backward of a pipeline's stage beside its calls",
    "microbatch": "seconds of a microbatch beside its calls",
    "step": "seconds of a step that belong to no part",
    "tensor": "seconds of a step for a tensor that is trained: the optimizer's, and what every parameter costs besides",
    "element": "seconds of the optimizer for an element",
}
"""What the runtime takes beside kernels and transfers."""


@dataclass(frozen=True)
class Curve:
    """Seconds by size, both rising. Between two sizes a power law, below the first a constant, beyond the last proportional.

    >>> round(Curve((1e3, 1e6), (1e-6, 1e-3)).at(1e5), 9), Curve((1e3,), (2e-6,)).at(10)
    (0.0001, 2e-06)
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, size: float) -> float:
        """Seconds of something of a size."""
        if size <= self.sizes[0]:
            return self.seconds[0]
        if size >= self.sizes[-1]:
            return self.seconds[-1] * size / self.sizes[-1]
        i = bisect_left(self.sizes, size)
        share = log(size / self.sizes[i - 1]) / log(self.sizes[i] / self.sizes[i - 1])
        return exp((1 - share) * log(self.seconds[i - 1]) + share * log(self.seconds[i]))

    @property
    def rate(self) -> float:
        """Size per second of the largest."""
        return self.sizes[-1] / self.seconds[-1]


def rising(points: Sequence[tuple[float, float]]) -> Curve:
    """A curve from points in the order of their sizes. What takes longer than something larger was disturbed: it counts as that.

    >>> rising([(1, 3.0), (2, 2.0), (4, 5.0)]).seconds
    (2.0, 2.0, 5.0)
    """
    seconds = [min(after for _, after in points[i:]) for i in range(len(points))]
    return Curve(tuple(float(size) for size, _ in points), tuple(seconds))


@dataclass(frozen=True)
class Measured:
    """One machine. `kernels`: by "matrix fp32", "attention forward fp32", an operator's name, or "elementwise" for all others.

    `collectives`: by "all_reduce 2 of 4", a group of 2 while all 4 ranks of the machine talk in groups of 2.
    """

    cores: int
    crowd: tuple[float, ...]
    """Entry k - 1: how much slower a rank computes while k ranks do."""
    kernels: Mapping[str, Curve]
    collectives: Mapping[str, Curve]
    runtime: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(RUNTIME, 0.0))
    spread: tuple[float, float] = (0.8, 1.25)
    """Measured / estimated, 10th and 90th percentile, of the programs that it was calibrated with."""

    @property
    def ranks(self) -> int:
        """The most ranks that were measured at once."""
        return len(self.crowd)

    def operator(self, o: Operator) -> float:
        """Seconds of an operator's kernels, all its calls."""
        if not o.calls or o.kind == "host":
            return 0.0
        curve, by_flops = self._curve(o)
        return curve.at((o.flops if by_flops else o.bytes) / o.calls) * o.calls

    def _curve(self, o: Operator) -> tuple[Curve, bool]:
        if o.kind == "elementwise":
            return self.kernels.get(o.name, self.kernels["elementwise"]), False
        phase = "forward" if o.phase in ("forward", "recompute") else "backward"
        kind = {"matrix": "matrix", "grouped": "grouped", "attention": f"attention {phase}"}[o.kind]
        for name in (f"{kind} {o.dtype}", *sorted(n for n in self.kernels if n.startswith(f"{kind} "))):
            if name in self.kernels:
                return self.kernels[name], True
        raise ConfigError(f"the machine was measured without {kind}. It has {', '.join(self.kernels)}.")

    def seconds(self, operators: Iterable[Operator]) -> tuple[float, float, float]:
        """Seconds of kernels: products, attention, the rest."""
        found = [0.0, 0.0, 0.0]
        for o in operators:
            found[{"matrix": 0, "grouped": 0, "attention": 1}.get(o.kind, 2)] += self.operator(o)
        return found[0], found[1], found[2]

    def slower(self, ranks: float) -> float:
        """How much slower a rank computes while `ranks` do; beyond those measured, cores are shared evenly."""
        if ranks <= 1:
            return self.crowd[0]
        if ranks > self.ranks:
            return self.crowd[-1] * ranks / self.ranks
        below = int(ranks)
        above = min(below + 1, self.ranks)
        return self.crowd[below - 1] + (ranks - below) * (self.crowd[above - 1] - self.crowd[below - 1])

    def constants(self, constants: Constants) -> Constants:
        """Constants of a machine where nothing hides behind anything, and all else was measured."""
        whole = {"overlap window": 0.0, "overlap slowdown": 0.0, "exposed tp": 1.0, "exposed ep": 1.0, "exposed ep fused": 1.0}
        known = constants.changed({**whole, "doubling": 0.0, "step": self.runtime["step"]})
        return replace(known, spread={**known.spread, "dense": self.spread, "experts": self.spread})

    def stack(self, stack: Stack) -> Stack:
        """A stack that hides nothing."""
        return replace(stack, hides_tp=False, hides_dp=False, hides_p2p=False, hides_ep=False)


@dataclass(frozen=True, slots=True)
class MeasuredFabric:
    """Collectives of a measured machine, as `comm.Fabric` has those of a data sheet."""

    measured: Measured
    world: int
    """Ranks on the machine."""

    def seconds(self, kind: str, group: RankGroup, size: float, copies: int = 1) -> float:
        """The time of one collective of `size` bytes; nothing for a group of one."""
        if group.size == 1 or size == 0:
            return 0.0
        if kind == "ring":
            return (group.size - 1) * self.transfer(size / group.size, inside=True)
        curve, known = self._nearest(kind, group.size)
        return curve.at(size) * max(1.0, (group.size - 1) / (known - 1))

    def transfer(self, size: float, *, inside: bool) -> float:
        """Seconds of `size` bytes from one rank to another."""
        return self._nearest("send", 2)[0].at(size)

    def _nearest(self, kind: str, group: int) -> tuple[Curve, int]:
        """The curve of a group and a number of ranks, or of the nearest that were measured."""
        found = []
        for name, curve in self.measured.collectives.items():
            what, size, _, world = name.split()
            if what == kind:
                found.append((abs(log(int(size) / group)), abs(log(int(world) / self.world)), int(size), curve))
        if not found:
            raise ConfigError(f"the machine was measured without {kind}: it has {', '.join(sorted(self.measured.collectives)) or 'none'}.")
        best = min(found, key=lambda one: one[:2])
        return best[3], best[2]
