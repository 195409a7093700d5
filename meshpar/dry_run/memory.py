"""What every pipeline rank holds at its fullest: the passes of its stages, put one after the other in the order of the schedule.

    F   + what backward reads again (+ gathered parameters, the first time)        peak: the forward of a pass
    B   - what backward read  + gradients                                          peak: its backward
    I, W   the two halves of B: what the gradients of weights read stays until W

Under another stack (`planner.Stack`) states are its bytes per parameter, and activations what the program keeps, as that stack would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from meshpar.dry_run.rehearsal import Pass, Rehearsed
from meshpar.pipeline.schedule import COMPUTE, Order
from meshpar.planner import Constants, Stack
from meshpar.planner.hardware import GiB


@dataclass(frozen=True)
class RankNeeds:
    """Bytes of the ranks at one place of the pipeline at their fullest; the others of a place hold no more."""

    rank: int
    stages: tuple[int, ...]
    parameters: float
    gradients: float
    """Those that are there when memory is fullest."""
    optimizer: float
    """Two moments of Adam, and what else the stack keeps."""
    activations: float
    """Of all microbatches in flight: what backward reads again."""
    buffers: float
    """Gathered parameters, and what the running microbatch takes for itself, communication included."""
    logits: float
    """One copy of what the loss reads; part of `buffers`, or of `activations`."""
    reserve: float
    """Workspaces of libraries, and what an allocator loses to fragments."""
    in_flight: tuple[int, ...]
    """Of each stage, the most microbatches between forward and the end of their backward."""
    course: tuple[tuple[float, float], ...] = field(default=(), repr=False)
    """For each computation in order, bytes above those that are always there: the most while it runs, and after it."""

    @property
    def states(self) -> float:
        return self.parameters + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """All of it."""
        return self.states + self.activations + self.buffers + self.reserve

    @property
    def always(self) -> float:
        """What is there all the time: the peak without what comes and goes."""
        return self.peak - max((most for most, _ in self.course), default=0.0)


def needs(
    stages: Sequence[Rehearsed],
    order: Order | None,
    microbatches: int,
    *,
    stack: Stack | None,
    data: tuple[str, int, int],
    constants: Constants | None,
) -> tuple[RankNeeds, ...]:
    """Memory of every pipeline rank. `stack`: None for this runtime itself. `data`: the mode, data ranks, data ranks of experts.

    `constants`: for the reserve that an accelerator wants; None for none.
    """
    ranks = range(1 if order is None else order.ranks)
    found = []
    for rank in ranks:
        own = stages if order is None else [stages[i] for i in order.stages_of(rank)]
        actions = list(_actions(order, rank, microbatches))
        one = _own(rank, own, actions) if stack is None else _of_stack(rank, own, actions, stack, data)
        if constants is not None:
            reserve = constants["memory buffers"] * GiB + (constants["memory fragments"] - 1) * one.peak
            one = RankNeeds(**{**vars(one), "reserve": reserve})
        found.append(one)
    return tuple(found)


def _actions(order: Order | None, rank: int, microbatches: int) -> Iterator[tuple[str, int]]:
    if order is None:
        for _ in range(min(microbatches, 3)):  # the first, one between, the last
            yield from (("F", 0), ("B", 0))
        return
    yield from ((a.kind, a.stage) for a in order.actions[rank] if a.kind in _ACTS)


_ACTS = ("F", "B", "I", "W", "RECV_F", "RECV_B", "SEND_F", "SEND_B")


class _Level:
    """Bytes of a rank above its states, action by action."""

    def __init__(self, stages: Iterable[Rehearsed], microbatches: int) -> None:
        self.stages = {one.index: one for one in stages}
        self.last = microbatches - 1
        self.done: Counter[tuple[str, int]] = Counter()
        self.activations = self.gathered = self.gradients = 0
        self.moving = 0
        """What has arrived and is not used yet, or is made and not sent yet."""
        self.flying: Counter[int] = Counter()
        self.most: Counter[int] = Counter()
        self.peak = (0, 0, 0)
        """Total, activations, gradients when it is fullest."""
        self.highest = 0
        """The most since the last computation ended."""
        self.course: list[tuple[float, float]] = []

    @property
    def total(self) -> int:
        return self.activations + self.gathered + self.gradients + self.moving

    def act(self, kind: str, stage: int) -> None:
        if "_" in kind:
            self._move(kind, self.stages[stage])
            return
        one, turn = self.stages[stage], self.done[kind, stage]
        p = one.first if turn == 0 else one.last if turn == self.last else one.middle
        self.done[kind, stage] += 1
        {"F": self._forward, "B": self._backward, "I": self._inputs, "W": self._weights}[kind](one, p)
        self._note(0)
        self.course.append((self.highest, self.total))
        self.highest = self.total

    def _note(self, above: int) -> None:
        self.highest = max(self.highest, self.total + above)
        self.peak = max(self.peak, (self.total + above, self.activations, self.gradients))

    def _move(self, kind: str, one: Rehearsed) -> None:
        """A send lets go what a stage made, a receive makes room before it is wanted."""
        values, sending = kind.endswith("F"), kind.startswith("SEND")
        size = one.sent if values == sending else one.received
        self.moving += -size if sending else size
        self._note(0)

    def _meets(self, stage: int) -> bool:
        """Whether a neighbouring stage is on this rank: then nothing moves."""
        return stage in self.stages

    def _forward(self, one: Rehearsed, p: Pass) -> None:
        self.moving -= 0 if self._meets(one.index - 1) else one.received
        self._note(one.received + p.forward_peak)
        self.moving += 0 if self._meets(one.index + 1) else one.sent
        self.activations += one.received + one.middle.forward.rest
        self.gathered += p.forward.gathered
        self.flying[one.index] += 1
        self.most[one.index] = max(self.most[one.index], self.flying[one.index])

    def _gradients_move(self, one: Rehearsed, p: Pass) -> None:
        """Gradients of what was sent arrived before, those of what was received go on."""
        self.moving -= 0 if self._meets(one.index + 1) else one.sent
        self._note(p.backward_peak - p.forward.total)
        self.moving += 0 if self._meets(one.index - 1) else one.received

    def _backward(self, one: Rehearsed, p: Pass) -> None:
        self._gradients_move(one, p)
        self.activations -= one.received + one.middle.forward.rest
        self._settle(one, p)

    def _inputs(self, one: Rehearsed, p: Pass) -> None:
        self._gradients_move(one, p)
        self.activations += p.waiting - p.forward.total - one.received

    def _weights(self, one: Rehearsed, p: Pass) -> None:
        self.activations -= p.waiting - p.forward.total + one.middle.forward.rest
        self._settle(one, p)

    def _settle(self, one: Rehearsed, p: Pass) -> None:
        self.gathered += p.backward.gathered - p.forward.gathered
        self.gradients += p.backward.rest
        self.flying[one.index] -= 1
        self._note(0)


def _own(rank: int, stages: Sequence[Rehearsed], actions: Sequence[tuple[str, int]]) -> RankNeeds:
    level = _Level(stages, sum(action == ("F", stages[0].index) for action in actions))
    for kind, stage in actions:
        level.act(kind, stage)
    total, activations, gradients = level.peak
    return RankNeeds(
        rank,
        tuple(one.index for one in stages),
        parameters=sum(one.parameters for one in stages),
        gradients=gradients,
        optimizer=sum(2 * one.trained for one in stages),
        activations=activations,
        buffers=total - activations - gradients + sum(one.buffers for one in stages),
        logits=sum(one.logits for one in stages),
        reserve=0.0,
        in_flight=tuple(level.most[one.index] for one in stages),
        course=tuple(level.course),
    )


def _of_stack(
    rank: int, stages: Sequence[Rehearsed], actions: Sequence[tuple[str, int]], stack: Stack, data: tuple[str, int, int]
) -> RankNeeds:
    kept = {one.index: one.received + one.middle.forward.scattered for one in stages}
    flying: Counter[int] = Counter()
    most, top = Counter[int](), 0
    course: list[tuple[float, float]] = []
    for kind, stage in actions:
        flying[stage] += {"F": 1, "B": -1, "W": -1}.get(kind, 0)
        most[stage] = max(most[stage], flying[stage])
        now = sum(kept[s] * n for s, n in flying.items())
        top = max(top, now)
        if kind in COMPUTE:
            course.append((max(now, course[-1][1] if course else 0), now))
    mode, ranks, of_experts = data
    parts = [0.0, 0.0, 0.0]
    for elements, shared in ((sum(o.elements for o in stages), ranks), (sum(o.expert_elements for o in stages), of_experts)):
        for i, size in enumerate((stack.parameter, stack.gradient, stack.optimizer)):
            parts[i] += elements * size / (shared if mode in _SHARES[i] else 1)
    logits = sum(one.logits for one in stages)
    again = max(one.middle.backward_peak - one.middle.forward.total for one in stages)
    return RankNeeds(
        rank,
        tuple(one.index for one in stages),
        parameters=parts[0],
        gradients=parts[1],
        optimizer=parts[2],
        activations=float(top),
        buffers=max(0.0, logits * stack.logits / 2, float(again) if mode == "zero3" else 0.0),
        logits=logits,
        reserve=0.0,
        in_flight=tuple(most[one.index] for one in stages),
        course=tuple(course),
    )


_SHARES = (("zero3",), ("zero2", "zero3"), ("zero1", "zero2", "zero3"))
"""Parameters, gradients, optimizer states: the modes that share them out over data ranks."""
