"""Faults beside the program: in what runs it. Each replaces one function while a model is built and trained.

    tied gradients   norms and clipping   pipelines   FSDP2's sums   microbatches and denominators   the insides of an operator

The static check reads programs: of what runs them it can say nothing. `run_beside.py` trains with each fault and compares with one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import meshpar.ops.again as again
import meshpar.ops.chunked_loss as chunked_loss
import meshpar.ops.expert_pieces as expert_pieces
import meshpar.ops.expert_steps as expert_steps
import meshpar.ops.pieces as pieces
import meshpar.ops.ring as ring
import meshpar.pipeline.run as run
import meshpar.pipeline.ties as ties
import meshpar.runtime.blocks as blocks
import meshpar.runtime.data_parallel as data_parallel
import meshpar.runtime.engine as engine
import meshpar.runtime.parameters.gradients as gradients
from meshpar.compile.shapes.numbers import NewNumbers

Instead = Callable[[Any], Any]
"""What takes the place of a function, given that function."""


@dataclass(frozen=True)
class BesideFault:
    """One function replaced. `mesh` and `config` are those on which it is a fault; `model` is one of `run_beside.MODELS`."""

    name: str
    owner: Any
    function: str
    instead: Instead
    mesh: str
    config: Mapping[str, Any] = field(default_factory=dict)
    model: str = "stack"
    shapes: int = 1
    """How many shapes the batches have."""
    eager: bool = False
    """Whether passes that are for megabytes take what is small."""
    equivalent: str = ""
    """Why the results are right with it, where they are."""

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Inside, the fault is there."""
        before = getattr(self.owner, self.function)
        setattr(self.owner, self.function, self.instead(before))
        try:
            yield
        finally:
            setattr(self.owner, self.function, before)


# -- norms -------------------------------------------------------------------------------------------------------------------------------


def _only_over(axis: str) -> Instead:
    return lambda _: lambda mesh: mesh.get_group(axis)


def _all(_: Any) -> Any:
    return lambda layout, mesh, place: True


# -- parameters of several stages --------------------------------------------------------------------------------------------------------


def _doubled(local_grad: Any) -> Any:
    return lambda parameter: 2 * local_grad(parameter)


# -- pipelines ---------------------------------------------------------------------------------------------------------------------------


def _stale_values(forward: Any) -> Any:
    def late(self: Any, action: Any) -> None:
        if action.stage > 0:
            before = self.__dict__.setdefault("stale", {})
            now = self.values[action.stage, action.microbatch]
            self.values[action.stage, action.microbatch] = before.get(action.stage, now)
            before[action.stage] = tuple(value.detach().clone() for value in now)
        forward(self, action)

    return late


def _other_inputs(forward: Any) -> Any:
    def changed(self: Any, action: Any) -> None:
        parts = self.parts
        if action.stage > 0:
            self.parts = [*parts[1:], parts[0]]
        forward(self, action)
        self.parts = parts

    return changed


def _stale_gradients(backward: Any) -> Any:
    def late(self: Any, action: Any) -> None:
        at = action.stage, action.microbatch
        if at in self.grads:
            before = self.__dict__.setdefault("stale_gradients", {})
            now = self.grads[at]
            self.grads[at] = before.get(action.stage, now)
            before[action.stage] = now
        backward(self, action)

    return late


def _without_last(backward: Any) -> Any:
    def changed(self: Any, action: Any) -> None:
        scale, last = self.scale, action.microbatch == len(self.parts) - 1
        self.scale = torch.zeros(()) if last else scale
        backward(self, action)
        self.scale = scale

    return changed


def _unclean_gradients(backward: Any) -> Any:
    """A skipped value's gradient is left out on the way back."""

    def changed(self: Any, action: Any) -> None:
        at = action.stage, action.microbatch
        if at in self.grads:
            self.grads[at] = (*self.grads[at][:-1], None)
        backward(self, action)

    return changed


# -- gradients summed over data ranks ----------------------------------------------------------------------------------------------------


def _never_synchronised(microbatch: Any) -> Any:
    def changed(self: Any, index: int, count: int) -> None:
        microbatch(self, index, count)
        self.root.set_requires_gradient_sync(False)

    return changed


def _not_over_copies(microbatch: Any) -> Any:
    def changed(self: Any, index: int, count: int) -> None:
        microbatch(self, index, count)
        self.root.set_requires_all_reduce(False)

    return changed


def _first_microbatch_only(microbatch: Any) -> Any:
    """As if it were the last."""
    return lambda self, index, count: microbatch(self, count - 1, count) if index == 0 else self.root.set_requires_gradient_sync(False)


def _without_context(summing: Any) -> Any:
    return lambda among, **options: tuple(name for name in summing(among, **options) if name != "cp")


def _mean(_: Any) -> Any:
    return lambda self, factor: None


# -- microbatches, losses, buffers -------------------------------------------------------------------------------------------------------


def _times(factor: float) -> Instead:
    def instead(times: Any) -> Any:
        def changed(scale: Tensor | None, loss: Tensor) -> Tensor:
            right = times(scale, loss)
            return factor * (torch.ones_like(loss) if right is None else right)

        return changed

    return instead


def _twice_the_first(step: Any) -> Any:
    return lambda self, program, parts, **how: step(self, program, [parts[0], *parts[:-1]], **how)


def _all_but_last(step: Any) -> Any:
    return lambda self, program, parts, **how: step(self, program, parts[:-1], **how)


def _count_of(change: Callable[[Any, Any, Any], Any]) -> Instead:
    return lambda count: lambda self, program, parts: change(lambda those: count(self, program, those), program, parts)


def _one_more(count: Any, program: Any, parts: Any) -> Any:
    return {name: value + 1 for name, value in count(parts).items()}


def _of_first(count: Any, program: Any, parts: Any) -> Any:
    return count([parts[0]] * len(parts))


def _of_one(count: Any, program: Any, parts: Any) -> Any:
    return count(parts[:1])


def _every_other_time(write: Any) -> Any:
    calls: dict[int, int] = {}

    def changed(self: Any, outputs: Any) -> Any:
        calls[id(self)] = calls.get(id(self), 0) + 1
        return write(self, outputs) if calls[id(self)] % 2 else tuple(outputs[: len(outputs) - len(self.mutations)])

    return changed


# -- the insides of an operator ----------------------------------------------------------------------------------------------------------


def _exchanged(backward: Any) -> Any:
    def changed(ctx: Any, grad: Tensor) -> Any:
        query, key, value, rest = backward(ctx, grad)
        return query, value, key, rest

    return staticmethod(changed)


def _stays(rotated: Any) -> Any:
    return lambda held, axis: held


def _first_known(now: Any) -> Any:
    return lambda self, key: key[0]


def _nothing(inner: Any) -> Any:
    return lambda *_: None


def _twice(inner: Any) -> Any:
    def changed(*given: Any) -> None:
        inner(*given)
        inner(*given)

    return changed


def _of_the_step_before(run: Any) -> Any:
    """What is computed again in backward reads what was there the time before."""
    kept: dict[Any, tuple[Tensor, ...]] = {}

    def changed(steps: Any, operands: Any) -> Any:
        again = torch.is_grad_enabled()  # (in forward it is not, within a function of autograd)
        key = steps, tuple(x.shape for x in operands)
        if again and key in kept:
            stale = kept[key]
            kept[key] = tuple(x.detach() for x in operands)
            return run(steps, [old + (x - x.detach()) if x.is_floating_point() else old for x, old in zip(operands, stale, strict=True)])
        if again:
            kept[key] = tuple(x.detach() for x in operands)
        return run(steps, operands)

    return changed


def _all_but_the_last(of: Any) -> Any:
    """In backward, where more is handed along than rows and labels, the last rows are left out."""

    def changed(self: Any, *tensors: Tensor) -> Any:
        found = list(of(self, *tensors))
        return found[:-1] if len(tensors) > 2 else found

    return changed


def _padding_too(loss_of: Any) -> Any:
    def changed(how: Any, at: Any, sums: Tensor, labels: Tensor, *classes: Tensor) -> Any:
        losses, weight = loss_of(how, at, sums, labels, *classes)
        return losses, torch.ones_like(weight)

    return changed


def _own_alone(start: Any) -> Any:
    """The own part as often as there are ranks: what a group of others would bring."""

    def changed(x: Tensor, layout: Any, axis: Any) -> Any:
        return lambda: torch.cat([x] * axis[1], layout[0])

    return changed


def _of_last(add: Any) -> Any:
    """The gradient of matrices that pieces add to, as the last of them leaves it."""

    def changed(self: Any, *rows: Any) -> None:
        self._pieces.clear()
        add(self, *rows)

    return changed


def _first_half_twice(forward: Any) -> Any:
    """Half of a rank's own rows in the place of the other half, as far as they go."""

    def changed(ctx: Any, *given: Any) -> Any:
        first, last, *others = forward(ctx, *given)
        return first, torch.cat([first, last])[: len(last)].clone(), *others

    return staticmethod(changed)


class _Starts(dict[Any, Any]):
    """Ways to start a collective, of which that of an all-gather is another one."""


def _with_gather(starts: Any) -> Any:
    return _Starts({**starts, pieces.all_gather: _own_alone(starts[pieces.all_gather])})


TWO = {"microbatches": 2}
PIPELINE = {"microbatches": 4, "schedule": "1f1b"}
HALVES = {"microbatches": 4, "schedule": "zero-bubble"}
CHUNKS = {"logits_bytes": 500}
DATA = data_parallel.DataParallelism

FAULTS: tuple[BesideFault, ...] = (
    BesideFault("the norm is not summed over tp", gradients, "group_of", _only_over("pp"), "pp=2,tp=2"),
    BesideFault("the norm is not summed over pp", gradients, "group_of", _only_over("tp"), "pp=2,tp=2"),
    BesideFault("the norm is not summed over dp", gradients, "group_of", _only_over("tp"), "dp=2,tp=2"),
    BesideFault("the norm is not summed over ep", gradients, "group_of", _only_over("tp"), "ep=2,tp=2", model="experts"),
    BesideFault("the norm counts every copy", gradients, "_counts_here", _all, "dp=2,tp=2", {"data_parallel": "replicate"}),
    BesideFault("a tied gradient is added twice", ties, "_local_grad", _doubled, "pp=2", PIPELINE),
    BesideFault("a tied gradient is not added", ties.Ties, "sum", lambda _: lambda self, before: None, "pp=2", PIPELINE),
    BesideFault("a stage reads the value of the microbatch before", run._Run, "_forward", _stale_values, "pp=2", PIPELINE),
    BesideFault("a stage reads mask and labels of another microbatch", run._Run, "_forward", _other_inputs, "pp=2", PIPELINE),
    BesideFault("a stage gets the gradient of the microbatch before", run._Run, "_backward", _stale_gradients, "pp=2", PIPELINE),
    BesideFault("a skipped value has no gradient", run._Run, "_backward", _unclean_gradients, "pp=2", PIPELINE),
    BesideFault("the optimizer steps before the last backward", run._Run, "_backward", _without_last, "pp=2", PIPELINE),
    BesideFault("the same with a schedule in halves", run._Run, "_backward", _without_last, "pp=2", HALVES),
    BesideFault("gradients times the microbatches, pp", run, "times", _times(4.0), "pp=2", PIPELINE),
    BesideFault("gradients times the microbatches", engine, "times", _times(2.0), "dp=2", TWO),
    BesideFault("gradients times dp", engine, "times", _times(2.0), "dp=2"),
    BesideFault("gradients times cp", engine, "times", _times(2.0), "cp=2"),
    BesideFault("gradients by dp", engine, "times", _times(0.5), "dp=2"),
    BesideFault("a mean over data ranks, not a sum", data_parallel.FSDPModule, "set_gradient_divide_factor", _mean, "dp=2"),
    BesideFault("gradients are not summed over dp", DATA, "microbatch", _never_synchronised, "dp=2"),
    BesideFault("gradients are not summed over copies", DATA, "microbatch", _not_over_copies, "dp_replicate=2,dp_shard=2"),
    BesideFault("only the first microbatch is summed", DATA, "microbatch", _first_microbatch_only, "dp=2",
                {"microbatches": 2, "data_parallel": "zero1"}),
    BesideFault("gradients are not summed over cp", data_parallel.roles, "summing", _without_context, "dp=2,cp=2"),
    BesideFault("a microbatch runs twice, another never", engine.Whole, "step", _twice_the_first, "dp=2", TWO),
    BesideFault("a microbatch runs twice, another never, pp", run.Pipelined, "step", _twice_the_first, "pp=2", PIPELINE),
    BesideFault("the step ends before the last microbatch", engine.Whole, "step", _all_but_last, "tp=2", TWO),
    BesideFault("padding is counted once", engine.Counting, "count", _count_of(_one_more), "dp=2", TWO),
    BesideFault("the count is that of the first microbatch, often", engine.Counting, "count", _count_of(_of_first), "dp=2", TWO),
    BesideFault("the count is that of one microbatch", engine.Counting, "count", _count_of(_of_one), "pp=2", PIPELINE),
    BesideFault("every other update of a buffer is lost", blocks.ModuleCall, "_write_back", _every_other_time, "tp=2", model="buffer"),
    BesideFault("ring: gradients of keys and values exchanged", ring._RingAttention, "backward", _exchanged, "cp=2", {"context": "ring"}),
    BesideFault("ring: keys and values are not sent on", ring, "rotated", _stays, "cp=2", {"context": "ring"}),
    BesideFault("ring: the gradient of sinks is left out", ring, "add_of_sink", _nothing, "cp=2", {"context": "ring"}, "kept less"),
    BesideFault("ring: the gradient of sinks is added twice", ring, "add_of_sink", _twice, "cp=2", {"context": "ring"}, "kept less"),
    BesideFault("what is computed again is of the step before", again, "_run", _of_the_step_before, "tp=2", model="kept less", eager=True),
    BesideFault("gathered again from the wrong ranks", pieces, "STARTS", _with_gather, "tp=2", {"sequence_parallel": True}, "kept less",
                eager=True),
    BesideFault("experts in pieces: the gradient of the last piece alone", expert_steps._MatrixGradient, "add", _of_last, "ep=2",
                model="experts", eager=True),
    BesideFault("experts in pieces: some own rows twice, others never", expert_pieces._SetOut, "forward", _first_half_twice, "ep=2",
                model="experts", eager=True),
    BesideFault("a loss in chunks, less its last rows", chunked_loss._Parts, "of", _all_but_the_last, "tp=2", CHUNKS, "kept less"),
    BesideFault("a loss in chunks that counts padding", chunked_loss.vocab_parallel, "loss_of", _padding_too, "tp=2", CHUNKS, "kept less"),
    BesideFault("numbers of the first shape stay", NewNumbers, "now", _first_known, "dp=2", shapes=4,
                equivalent="the graph with these numbers does not take the new sizes, so it is captured"),
)  # fmt: skip
