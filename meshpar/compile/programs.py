"""From a model and a batch to a program: capture, plan, lower. One program per batch structure and state of Python."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshpar._torch import quick_nodes, without_modes
from meshpar.capture.aliases import buffers_in_shared_memory, refuse_written
from meshpar.capture.calls import check_call
from meshpar.capture.copies import copied, memories, refuse_originals, refuse_unreadable
from meshpar.capture.export import capture
from meshpar.capture.hooks.models import ModelHooks
from meshpar.capture.state.places import Place
from meshpar.capture.state.taken import Ask, say
from meshpar.capture.structure import order_of
from meshpar.capture.symbolic import BatchSizes, Formulas, follow, sizes_of
from meshpar.capture.witness import Witness, read_again, testify, without_memory
from meshpar.collection import uncollected
from meshpar.compile.balance import ExampleBatch
from meshpar.compile.denominators import Split, split_denominators
from meshpar.compile.given import ParameterFacts
from meshpar.compile.hooks import check_microbatches
from meshpar.compile.ledger import staged_ledger
from meshpar.compile.lowering import Lowering
from meshpar.compile.planning import Planner
from meshpar.compile.priced import priced
from meshpar.compile.program import Program, parts_of
from meshpar.compile.proved import proved, proved_loss
from meshpar.compile.shapes.classes import KnownShapes, kind_of
from meshpar.compile.signature import BatchSignature, flatten
from meshpar.compile.state.following import Following
from meshpar.compile.state.held import variant
from meshpar.config import ParallelConfig
from meshpar.errors import CaptureError
from meshpar.graph.captured import Captured
from meshpar.graph.facts import info_of
from meshpar.mesh import data_axis, typed_axes
from meshpar.passes import order
from meshpar.pipeline.order import Schedule
from meshpar.plan import Plan
from meshpar.proof.static.report import StaticReport
from meshpar.simulate import local_tensors


@dataclass(frozen=True)
class Seen:
    """What was captured for one batch, as a step of several microbatches runs it."""

    signature: BatchSignature
    parts: Split
    loss: StaticReport
    """What was proved of its loss."""
    tensors: Sequence[torch.Tensor] = ()
    """Those of the batch."""
    microbatches: int = 1

    @property
    def example(self) -> ExampleBatch | None:
        """Its first microbatch, if it has values."""
        captured = self.parts.captured
        first = parts_of(captured, [local_tensors(x)[min(local_tensors(x))] for x in self.tensors], self.microbatches)[:1]
        values = dict(zip(captured.inputs, first[0], strict=False)) if first else {}
        real = values and all(type(x) is torch.Tensor and not x.is_meta for x in values.values())
        return ExampleBatch(values, captured.constants) if real else None


@dataclass(frozen=True)
class _Together:
    """Where the samples of a microbatch are taken together: `averaged` and `within` of `Split`."""

    averaged: tuple[str, ...] = ()
    within: tuple[str, ...] = ()


class Programs:
    """Makes programs for one model on one mesh: `make` is `lowered(planned(seen(batch)))`."""

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        config: ParallelConfig,
        *,
        rules: Mapping[str, str] | None = None,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        plan: Plan | None = None,
    ) -> None:
        self.hooks = ModelHooks(model)
        self.skeleton = _skeleton(model)
        self.following = Following(model, self.skeleton)
        self.originals = memories(model)
        self._in_one_memory = buffers_in_shared_memory(model)
        self.ordered = order_of(model)
        self.mesh, self.config, self.loss_fn = mesh, config, loss_fn
        self.parameters = dict(parameter_facts(model))
        """As programs are made for them; `first`: as parallelize saw them."""
        self.first: ParameterFacts = dict(self.parameters)
        self.planner = Planner(mesh, config, rules, plan)
        self.lowering = Lowering(mesh, config, self.planner.schedule, mesh.device_type)
        self.seconds = 0.0
        """How long the first program took to make."""
        self.shapes = KnownShapes()
        self.together: dict[Hashable, _Together] = {}
        """Of kinds of batches of which a microbatch has one sample."""
        self.finish: Callable[[Program, Mapping[str, Any]], Program] = lambda program, kwargs: program
        """What is done to a program, made for these keyword arguments, before it runs."""

    @property
    def schedule(self) -> Schedule | None:
        """The pipeline's schedule, if the mesh has one."""
        return self.planner.schedule

    def copy(self) -> Programs:
        """The same for another copy of the model, whose attributes and modes are its own."""
        new = copy.copy(self)
        new.skeleton = _skeleton(self.skeleton)
        new.following = self.following.copy(new.skeleton)
        new.parameters, new.planner, new.shapes, new.together = dict(self.parameters), self.planner.copy(), KnownShapes(), {}
        return new

    def set_trainable(self, flags: Mapping[str, bool]) -> None:
        """From now on, programs are made for parameters of which these require gradients, or do not."""
        for name, flag in flags.items():
            self.skeleton.get_parameter(name).requires_grad_(flag)
            self.parameters[name] = (*self.parameters[name][:2], flag)

    def make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool, microbatches: int = 1, **state: Any) -> Program:
        """The program for a batch like this one, and for the state of this moment. Collective over the mesh the first time.

        `state`: see `seen`.
        """
        with uncollected(), quick_nodes():
            seen = self.seen(args, kwargs, training=training, microbatches=microbatches, **state)
            made = self.lowered(seen, self.planned(seen))
            finished = self.finish(made, kwargs)
            return made if finished is made else replace(finished, alone=True)

    def seen(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        training: bool,
        microbatches: int = 1,
        numbers: Sequence[Place] = (),
        roots: Mapping[str, Any] | None = None,
        trainable: str = "",
    ) -> Seen:
        """What the model computes for a batch like this one, for each of `microbatches`.

        `numbers`: places whose numbers become inputs, `roots`: where those begin that are not in the model. `trainable`: a name for which
        parameters require gradients.
        """
        check_call(self.skeleton, args, kwargs)
        tensors, signature = flatten(args, self.ordered(kwargs), training)
        ask = Ask(self.following.original, tuple(numbers), roots or {}, torch.is_grad_enabled())
        kind = kind_of(signature, microbatches, trainable, ask.gradients)
        captured = self._captured(args, kwargs, microbatches, ask, kind)
        refuse_originals(captured.constants, self.originals)
        refuse_written(self._in_one_memory, captured.mutations)
        self.originals = {}  # (the model may be gone when the next program is made, and its memory somebody else's)
        say(captured.state.notes, self.skeleton)
        parts = _parted(captured, microbatches, lambda: self._of_several(args, kwargs, microbatches, ask, (kind, variant(captured.state))))
        loss = proved_loss(captured, parts, microbatches if captured.loss is not None else 1)
        return Seen(replace(signature, state=f"{variant(captured.state)}{trainable} {microbatches}"), parts, loss, tensors, microbatches)

    def sizes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], like: Captured, microbatches: int) -> BatchSizes:
        """The shapes of a batch as `like`, a capture of another one, has them. Raises Unseen, BatchError."""
        return sizes_of(read_again(self.skeleton, args, kwargs, like, **self._about(microbatches)))

    def formulas(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], like: Captured, microbatches: int, symbol_of: Any, hints: Sequence[int]
    ) -> Formulas:
        """What the forward computes with, as formulas of the sizes of a batch: see `capture.symbolic`. Raises Unseen."""
        about = self._about(microbatches)
        with without_modes(), uncollected():
            batch = read_again(self.skeleton, args, kwargs, like, **about)
            ask = Ask(self.following.original, (), {}, torch.is_grad_enabled())
            return follow(self.skeleton, batch, symbol_of, hints, like, ask=ask, **about)

    def planned(self, seen: Seen) -> Plan:
        """Where values and parameters lie, and what moves: decided on the first rank of the mesh for all. Collective."""
        return self.planner.plan(seen.parts.captured, self.parameters, seen.example)

    def lowered(self, seen: Seen, plan: Plan) -> Program:
        """What this rank runs. Collective where a pipeline's ledger or a loss's denominators are to be agreed on."""
        parts, counts = seen.parts, None
        if parts.counts is not None:
            counting = self.planner.plan_counts(parts.counts, self.parameters)
            counts = proved(self.lowering.whole(seen.signature.counting, parts.counts, counting), self.mesh, self.config)
        program = proved(self._with_ledger(self.lowering.program(seen.signature, parts.captured, plan)), self.mesh, self.config)
        proof = program.proof + seen.loss
        return replace(program, counts=counts, averaged=parts.averaged, within=parts.within, proof=proof)

    def _captured(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], microbatches: int, ask: Ask, kind: Hashable) -> Captured:
        about = {**self._about(microbatches), "ask": ask}

        def captured() -> Captured:
            return capture(self.skeleton, args, kwargs, given=self.hooks.given, **about)

        with without_modes():
            if ask.numbers:
                found = captured()
            else:
                later = without_memory((args, dict(kwargs)))

                def witness(batch: tuple[Any, ...], like: Captured) -> Witness:
                    return testify(self.skeleton, *batch, like=like, **about)

                found = self.shapes.captured(
                    kind,
                    captured,
                    partial(witness, (args, kwargs)),
                    partial(witness, later),
                )
        order.before(found.graph, typed_axes(self.mesh))
        return found

    def _of_several(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], microbatches: int, ask: Ask, kind: Hashable) -> _Together:
        """What the model does with samples together: of a microbatch of one nothing shows that, so several of them are looked at."""
        if kind not in self.together:
            several = next(n for n in range(2, microbatches + 1) if microbatches % n == 0)
            about = {**self._about(microbatches // several), "ask": ask}
            try:
                with without_modes():
                    captured = capture(self.skeleton, args, kwargs, given=self.hooks.given, **about)
            except CaptureError:  # (a forward of one sample alone: nothing of it would be other without microbatches)
                self.together[kind] = _Together()
            else:
                parts = split_denominators(captured, microbatches)
                self.together[kind] = _Together(parts.averaged, parts.within)
        return self.together[kind]

    def _about(self, microbatches: int) -> dict[str, Any]:
        """How a batch is read and the forward is run."""
        return {
            "device": torch.device(self.mesh.device_type),
            "scale": data_axis(self.mesh).size,
            "divide": microbatches,
            "loss_fn": self.loss_fn,
            "dtype": self.config.precision.compute_dtype,
        }

    def _with_ledger(self, program: Program) -> Program:
        """With the communication of a pipeline as the first rank has it: where values are cut unevenly, no rank sends more."""
        if not program.stages:
            return program
        ranks = [stage.rank for stage in program.plan.stages]
        sent = self.planner.from_first_rank(lambda: staged_ledger(program.stages, ranks, priced(self.config, self.mesh)))
        return replace(program, plan=replace(program.plan, ledger=sent))


def parameter_facts(model: nn.Module) -> ParameterFacts:
    """The shape, the dtype and whether it is trained, of every parameter."""
    return {n: (tuple(p.shape), str(p.dtype).removeprefix("torch."), p.requires_grad) for n, p in model.named_parameters()}


def _parted(captured: Captured, microbatches: int, of_several: Callable[[], _Together]) -> Split:
    """`of_several`: what a graph of several samples tells, where one of a single sample does not."""
    if microbatches == 1 or captured.loss is None:  # (a step says so, unless its loss is computed outside)
        return Split(captured, None, ())
    check_microbatches(captured)
    parts = split_denominators(captured, microbatches)
    if _is_of_one_sample(captured):
        more = of_several()
        averaged, within = dict.fromkeys([*parts.averaged, *more.averaged]), dict.fromkeys([*parts.within, *more.within])
        parts = replace(parts, averaged=(*averaged,), within=(*within,))
    told = [f"these terms of the loss are the mean of those of the microbatches: {', '.join(parts.averaged)}."] if parts.averaged else []
    told += [f"these see the samples of a microbatch, not of the whole batch: {', '.join(parts.within)}."] if parts.within else []
    if told:
        heading = f"microbatches={microbatches} computes, as any gradient accumulation, not quite what microbatches=1 does:"
        warnings.warn("\n  ".join([heading, *told]), stacklevel=2)
    return parts


def _is_of_one_sample(captured: Captured) -> bool:
    dims = captured.batch_dims
    inputs = [n for n in captured.graph.nodes if n.op == "placeholder" and str(n.target) in dims]
    return {info_of(node).shape[dims[str(node.target)]] for node in inputs} == {1}


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters have no memory, so that new shapes can be captured when the model is gone."""
    refuse_unreadable(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copied(model, memo)
