"""Bytes on the fullest rank of every pipeline position: states, activations in flight, the loss, what is gathered, buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshpar.planner.constants import Constants
from meshpar.planner.hardware import GiB
from meshpar.planner.mapping import V_SHAPED
from meshpar.planner.schedule import kept
from meshpar.planner.stack import Stack
from meshpar.planner.workload import Workload


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one pipeline rank at its fullest."""

    rank: int
    states: float
    """Parameters, gradients and optimizer states."""
    activations: float
    loss: float
    """Logits and what the cross entropy needs beside them."""
    transient: float
    """Gathered parameters, and one layer's recomputed activations."""
    buffers: float

    @property
    def total(self) -> float:
        return self.states + self.activations + self.loss + self.transient + self.buffers

    def parts(self) -> Mapping[str, float]:
        """GiB by part.

        >>> PeakMemory(0, 2.0**30, 0, 0, 0, 0).parts()["states"]
        1.0
        """
        return {name: getattr(self, name) / GiB for name in ("states", "activations", "loss", "transient", "buffers")}


def state_bytes(stack: Stack, data_parallel: str, data: float) -> float:
    """Bytes per parameter of a rank's states, with `data` ranks to share them among (arXiv 1910.02054, 2104.04473).

    >>> from meshpar.planner.stack import STACKS
    >>> [state_bytes(STACKS["megatron-2024"], mode, 8) for mode in ("replicate", "zero1", "zero2", "zero3")]
    [18.0, 7.5, 4.0, 2.25]
    """
    whole = stack.parameter + stack.gradient
    if data_parallel == "replicate":
        return float(whole + stack.optimizer)
    if data_parallel == "zero1":
        return whole + stack.optimizer / data
    if data_parallel == "zero2":
        return stack.parameter + (stack.gradient + stack.optimizer) / data
    return (whole + stack.optimizer) / data


def memory(work: Workload, stack: Stack, constants: Constants) -> tuple[PeakMemory, ...]:
    """What every pipeline rank holds at its fullest."""
    held = kept(work.schedule, work.ranks, work.microbatches, [one.kept for one in work.stages])
    return tuple(_of_rank(work, rank, held[rank], stack, constants) for rank in range(work.ranks))


def roughly(work: Workload, stack: Stack, constants: Constants) -> PeakMemory:
    """As `fullest`, the microbatches in flight by closed form: min(p, m) on the first rank, more with virtual stages."""
    p, v, m = work.ranks, work.virtual, work.microbatches
    mean = [one.kept for one in work.stages]
    found = []
    for rank in range(p) if p < 3 else (0, 1, p - 1):
        ahead = m if work.schedule in ("gpipe", "looped-bfs") else min(p if work.schedule in ("zero-bubble", *V_SHAPED) else p - rank, m)
        if v > 1 and work.schedule == "interleaved-1f1b":
            ahead_of_all = min(2 * (p - rank - 1) + (v - 1) * min(p, m) + 1, m * v)
            found.append(_of_rank(work, rank, ahead_of_all * max(mean[rank::p]), stack, constants))
        else:
            found.append(_of_rank(work, rank, ahead * sum(work.pick(mean, rank)), stack, constants))
    return max(found, key=lambda one: one.total)


def fullest(work: Workload, stack: Stack, constants: Constants) -> PeakMemory:
    """The pipeline rank that needs the most."""
    return max(memory(work, stack, constants), key=lambda one: one.total)


def _of_rank(work: Workload, rank: int, held: float, stack: Stack, constants: Constants) -> PeakMemory:
    stages = work.of_rank(rank)
    layers = [layer for one in stages for layer, _ in one.layers]
    states = sum(
        one.parameters * state_bytes(stack, work.data_parallel, work.axes["dp"].size)
        + one.expert_parameters * state_bytes(stack, work.data_parallel, work.axes["edp"].size)
        for one in stages
    )
    loss = stack.logits * max((x.peak for x in layers if x.name == "head"), default=0.0)
    again = max((x.peak for x in layers if x.name != "head"), default=0.0)
    transient = again
    if work.data_parallel == "zero2":  # the gradients of a layer before they are scattered
        transient += stack.gradient_sum * max((x.parameters + x.expert_parameters for x in layers), default=0.0)
    if work.data_parallel == "zero3":
        sizes = sorted(
            {x.parameters + x.expert_parameters for x in layers}, reverse=True
        )  # the largest at work, the next one gathered ahead
        transient += (2 + stack.gradient_sum) * sizes[0] + 2 * sizes[min(1, len(sizes) - 1)]
    used = states + held + loss + transient
    return PeakMemory(rank, states, held, loss, transient, constants["memory buffers"] * GiB + (constants["memory fragments"] - 1) * used)
