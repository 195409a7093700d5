"""Runs the stages of a pipeline on this rank, action by action, in the order of a schedule.

    F   receive ──> stage's program ──> send; what has arrived is let go, only its place in the autograd graph is kept
    B   receive gradients ──> backward from those places ──> send gradients of what was received
    I   the same, with the weight gradients of matrix products put off
    W   what was put off

The order of computation and of messages is torch's (`meshpar.pipeline.schedule`); shapes are known from the graph, so nothing is
negotiated. Every
stage reads integer inputs (ids, masks, labels) from the batch itself. A microbatch in flight holds what autograd saved, its received values
and nothing else: at most `stages - index` of them with 1F1B (Narayanan et al., arXiv 2104.04473).
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.graph import GradientEdge, get_gradient_edge

from meshpar._torch import resolve_process_group
from meshpar.compile.program import Program
from meshpar.compile.split import StageGraph
from meshpar.errors import MeshparError, StageError
from meshpar.graph.facts import Info, facts
from meshpar.mesh import Axis
from meshpar.ops.deferred import WeightGradients
from meshpar.pipeline.order import Schedule
from meshpar.pipeline.schedule import COMPUTE, Action, Event, Order
from meshpar.pipeline.sends import Sends
from meshpar.pipeline.ties import Ties
from meshpar.runtime.blocks import Tree
from meshpar.runtime.data_parallel import DataParallelism
from meshpar.runtime.engine import Engine, Inputs, OutsideLoss, every_output, times
from meshpar.runtime.failures import looks_lost
from meshpar.runtime.steps import check_trained


class Pipelined(Engine):
    """The stages of this rank. `trees` and `data`: by stage index; `axis`: this rank's place among the ranks of the pipeline.

    `overlaps`: whether what is received may arrive while this rank computes; else it waits for each message when it begins to receive it.
    (What is sent is never waited for: two neighbours that send to each other would wait for ever.)
    """

    def __init__(
        self,
        trees: Mapping[int, Tree],
        first: Program,
        data: Mapping[int, DataParallelism],
        ties: Ties,
        schedule: Schedule,
        axis: Axis,
        device: torch.device,
        *,
        overlaps: bool = True,
    ) -> None:
        super().__init__(trees, first)
        self.overlaps = overlaps
        self.data, self.ties, self.schedule, self.axis, self.device = data, ties, schedule, axis, device
        self.events: list[Event] | None = None
        """Where the times of computations go while they are measured."""
        dist.all_reduce(torch.zeros(1, device=device), group=_group(axis))  # NCCL wants all ranks in a group's first communication

    def run(self, program: Program, inputs: Inputs, stay: Collection[int] = ()) -> tuple[Any, ...]:
        """All outputs of a program, without gradients; the last stage computes them and hands them to all, but for those that stay."""
        with torch.no_grad():
            actions = self.schedule.order(1, backward=False)
            run = self._run(program.all_stages, every_output(program), [inputs], actions, backward=False, keeps=True)
        last = program.all_stages[-1]
        handed = [(i, info) for i, info in zip(last.outputs, last.returned, strict=True) if i not in stay]
        values = [run.outputs[i] for i, _ in handed if i in run.outputs]
        found = run.outputs | dict(zip((i for i, _ in handed), self._from_last_stage(values, [info for _, info in handed]), strict=True))
        return tuple(found.get(i) for i in range(max((*found, *stay)) + 1))

    def step(
        self,
        program: Program,
        parts: Sequence[Inputs],
        *,
        backward: bool,
        scale: torch.Tensor | None = None,
        outside: OutsideLoss | None = None,
    ) -> torch.Tensor:
        """The sum of the losses of all microbatches, on every rank; with `backward`, gradients are complete at the end."""
        actions = self.schedule.order(len(parts), backward=backward)
        cuts, key = (program.stages, program.key) if outside is None else (program.all_stages, every_output(program))
        with torch.set_grad_enabled(backward), self.ties.summing() if backward else nullcontext():
            run = self._run(cuts, key, parts, actions, backward=backward, scale=scale, outside=outside)
        infos = cuts[-1].returned if outside is None else (Info((), torch.float64, requires_grad=False),)
        (total,) = self._from_last_stage([] if run.total is None else [run.total], infos)
        return total

    @contextmanager
    def measuring(self) -> Iterator[list[Event]]:
        """Inside, steps are measured; afterwards the list holds the events of all ranks of the pipeline. Collective over them."""
        gathered: list[Event] = []
        group = _group(self.axis)
        dist.barrier(group)
        zero, self.events = time.perf_counter(), []
        try:
            yield gathered
            own = [replace(event, start=event.start - zero, end=event.end - zero) for event in self.events]
        finally:
            self.events = None
        everyone: list[Any] = [None] * self.axis.size
        dist.all_gather_object(everyone, own, group=group)
        gathered += sorted((event for events in everyone for event in events), key=lambda event: (event.start, event.rank))

    def _run(
        self,
        cuts: Sequence[StageGraph],
        key: str,
        parts: Sequence[Inputs],
        actions: Order,
        *,
        backward: bool,
        scale: torch.Tensor | None = None,
        keeps: bool = False,
        outside: OutsideLoss | None = None,
    ) -> _Run:
        """One pass; the last stage adds up the losses, its own or those of `outside`, or `keeps` what it returns."""
        defers = actions.defers()
        run = _Run(self, cuts, key, parts, actions.place, backward, defers, scale, keeps, outside)
        try:
            run.perform(actions.actions[self.axis.rank])
        except BaseException:
            for data in self.data.values():
                data.reset()
            raise
        return run

    def _from_last_stage(self, values: Sequence[torch.Tensor], infos: Sequence[Info]) -> tuple[torch.Tensor, ...]:
        """What the ranks of the last stage computed, on every rank of the pipeline."""
        source = self.schedule.order(1, backward=False).place[-1]
        found = []
        for i, info in enumerate(infos):
            value = values[i].contiguous() if values else torch.empty(info.shape, dtype=info.dtype, device=self.device)
            dist.broadcast(value, group=_group(self.axis), group_src=source)
            found.append(value)
        return tuple(found)


def _group(axis: Axis) -> dist.ProcessGroup:
    return resolve_process_group(axis.group)


@dataclass
class _Flight:
    """One microbatch on one stage between its forward and its backward."""

    received: tuple[torch.Tensor, ...] = ()
    edges: tuple[GradientEdge | None, ...] = ()
    loss: torch.Tensor | None = None
    later: WeightGradients = field(default_factory=WeightGradients)


ActionPlace = tuple[int, int]
"""(stage, microbatch)."""


class _Run:
    """One pass of a schedule: what is under way."""

    def __init__(
        self,
        engine: Pipelined,
        cuts: Sequence[StageGraph],
        key: str,
        parts: Sequence[Inputs],
        place: Sequence[int],
        backward: bool,
        defers: bool,
        scale: torch.Tensor | None,
        keeps: bool,
        outside: OutsideLoss | None,
    ) -> None:
        self.scale, self.keeps, self.outside = scale, keeps, outside
        self.engine, self.cuts, self.key, self.parts, self.place = engine, cuts, key, parts, place
        self.backward, self.defers = backward, defers
        self.outputs: dict[int, torch.Tensor] = {}
        self.total: torch.Tensor | None = None
        self.flights: dict[ActionPlace, _Flight] = {}
        self.values: dict[ActionPlace, tuple[torch.Tensor, ...]] = {}
        """Values on their way: made here and not sent yet, or received and not used yet."""
        self.grads: dict[ActionPlace, tuple[torch.Tensor | None, ...]] = {}
        self.waiting: dict[tuple[str, ActionPlace], list[dist.Work]] = {}
        self.sends = Sends(engine.device)
        self.done: Counter[int] = Counter()
        self.acts = {
            "F": self._forward,
            "B": self._backward,
            "I": self._backward,
            "W": self._weights,
            "SEND_F": self._send_values,
            "RECV_F": self._receive_values,
            "SEND_B": self._send_grads,
            "RECV_B": self._receive_grads,
            "REDUCE_GRAD": self._reduce,
        }

    def perform(self, actions: Sequence[Action]) -> None:
        """All actions of this rank, in order."""
        for action in actions:
            self._arrive(action)
            measuring = self.engine.events is not None and action.kind in (*COMPUTE, "REDUCE_GRAD")
            begun = _now(self.engine.device) if measuring else 0.0
            try:
                self.acts[action.kind](action)
            except MeshparError:
                raise
            except Exception as error:
                if looks_lost(error):  # another rank's failure
                    raise
                raise StageError(_explain(action, self.cuts[action.stage], error)) from error
            if measuring and self.engine.events is not None:
                rank, ended = self.engine.axis.rank, _now(self.engine.device)
                self.engine.events.append(Event(rank, action.stage, action.microbatch, action.kind, begun, ended))
        self.sends.finish()

    # -- computing -----------------------------------------------------------------------------------------------------------------------

    def _forward(self, action: Action) -> None:
        stage, at = action.stage, (action.stage, action.microbatch)
        cut, flight = self.cuts[stage], _Flight()
        if stage > 0:
            infos = cut.received
            flight.received = tuple(
                value.requires_grad_(self.backward and info.requires_grad) for value, info in zip(self.values.pop(at), infos, strict=True)
            )
        inputs = dict(self.parts[action.microbatch])
        if cut.extra.weight_gradients is not None:
            inputs[cut.extra.weight_gradients] = flight.later if self.defers else None
        outputs = self.engine.trees[stage].run(self.key, *flight.received, *(inputs[name] for name in cut.inputs))
        sends, own = outputs[: len(cut.sends)], outputs[len(cut.sends) :]
        if self.backward:
            flight.edges = tuple(get_gradient_edge(value) if value.requires_grad else None for value in sends)
            self.flights[at] = flight
        if self.keeps:
            self.outputs |= zip(cut.outputs, own, strict=False)
        if stage < len(self.cuts) - 1:
            self._hand("F", (stage + 1, action.microbatch), tuple(value.detach() for value in sends))
        elif not self.keeps:
            loss = own[0] if self.outside is None else self.outside(action.microbatch, dict(zip(cut.outputs, own, strict=False)))
            flight.loss = loss if self.backward else None
            found = loss.detach() if self.outside is None else loss.detach().double()
            self.total = found if self.total is None else self.total + found

    def _backward(self, action: Action) -> None:
        stage, at = action.stage, (action.stage, action.microbatch)
        flight, last = self.flights[at], stage == len(self.cuts) - 1
        if action.kind == "I":
            flight.later.open()
        else:
            del self.flights[at]
        self.done[stage] += action.kind == "B"
        self.engine.data[stage].backward(last=not self.defers and self.done[stage] == len(self.parts))
        if last:
            assert flight.loss is not None
            check_trained(flight.loss)
            flight.loss.backward(times(self.scale, flight.loss))
            flight.loss = None
        else:
            pairs = [(e, g) for e, g in zip(flight.edges, self.grads.pop(at), strict=True) if e is not None and g is not None]
            torch.autograd.backward([e for e, _ in pairs], [g for _, g in pairs])
        flight.later.close()
        flight.edges = ()
        if stage > 0:
            grads = tuple(
                (torch.zeros_like(value) if value.grad is None else value.grad) if info.requires_grad else None
                for value, info in zip(flight.received, self.cuts[stage].received, strict=True)
            )
            flight.received = ()
            self._hand("B", (stage - 1, action.microbatch), grads)

    def _weights(self, action: Action) -> None:
        self.flights.pop((action.stage, action.microbatch)).later.run()
        self.engine.data[action.stage].accumulate()

    def _reduce(self, action: Action) -> None:
        data = self.engine.data[action.stage]
        if self.defers or not data.beside:
            data.reduce()

    # -- moving --------------------------------------------------------------------------------------------------------------------------

    def _hand(self, kind: str, to: ActionPlace, values: tuple[torch.Tensor | None, ...]) -> None:
        """Keep what the neighbouring stage needs, until it is sent there, or used here if that stage is on this rank."""
        table: dict[ActionPlace, Any] = self.values if kind == "F" else self.grads
        table[to] = values

    def _send_values(self, action: Action) -> None:
        self._send(self.values.pop((action.stage + 1, action.microbatch)), action.stage + 1)

    def _send_grads(self, action: Action) -> None:
        self._send(self.grads.pop((action.stage - 1, action.microbatch)), action.stage - 1)

    def _receive_values(self, action: Action) -> None:
        self._receive("F", action, self.values, [(i, True) for i in self.cuts[action.stage].received], action.stage - 1)

    def _receive_grads(self, action: Action) -> None:
        self._receive("B", action, self.grads, [(i, i.requires_grad) for i in self.cuts[action.stage].sent], action.stage + 1)

    def _send(self, values: Sequence[torch.Tensor | None], stage: int) -> None:
        tensors = tuple(value.contiguous() for value in values if value is not None)
        self.sends.add(self._batched(dist.isend, tensors, stage), tensors)

    def _receive(self, kind: str, action: Action, table: dict[ActionPlace, Any], infos: Sequence[tuple[Info, bool]], stage: int) -> None:
        at = (action.stage, action.microbatch)
        device = self.engine.device
        buffers = tuple(torch.empty(i.shape, dtype=i.dtype, device=device) if wanted else None for i, wanted in infos)
        table[at] = buffers
        self.waiting[kind, at] = self._batched(dist.irecv, [b for b in buffers if b is not None], stage)
        if not self.engine.overlaps:
            _wait(self.waiting.pop((kind, at)))

    def _batched(self, op: Any, tensors: Sequence[torch.Tensor], stage: int) -> list[dist.Work]:
        group = _group(self.engine.axis)
        ops = [dist.P2POp(op, tensor, group=group, group_peer=self.place[stage]) for tensor in tensors]
        return dist.batch_isend_irecv(ops) if ops else []

    def _arrive(self, action: Action) -> None:
        """Wait for what an action of computation was sent, if it was sent anything."""
        kind = "F" if action.kind == "F" else "B" if action.kind in "BI" else ""
        _wait(self.waiting.pop((kind, (action.stage, action.microbatch)), ()))


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


def _now(device: torch.device) -> float:
    """The time at which what was started has been done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


_WORDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward for its inputs",
    "W": "backward for its weights",
    "SEND_F": "sending its results",
    "RECV_F": "receiving its inputs",
    "SEND_B": "sending gradients",
    "RECV_B": "receiving gradients",
    "REDUCE_GRAD": "summing gradients",
}


def _explain(action: Action, cut: StageGraph, error: Exception) -> str:
    modules = list(dict.fromkeys(m for n in cut.graph.nodes if n.op == "call_function" and (m := facts(n).region or facts(n).module)))
    where = f" ({modules[0]}{f' to {modules[-1]}' if len(modules) > 1 else ''})" if modules else ""
    trace = "".join(traceback.format_exception(error)).rstrip().replace("\n", "\n  ")
    return f"stage {action.stage}{where}, microbatch {action.microbatch}, {_WORDS[action.kind]}: {type(error).__name__}: {error}\n  {trace}"
