"""The forward of a parallel model with a cache: one program for the prompt, one for a token after it, the same for all tokens.

    prompt   p p p p                        ──>  logits, keys and values of p p p p        (this rank's samples, heads and layers)
    room     . . . . p p p p . . .               one buffer for each layer's keys, and values
             [. . . p p p p]                ──>  a token attends to a window of it, and to itself ...
                                t                ... and its own keys and values are written behind
               [. . p p p p t]              ──>  the next token's window: as long, one further on

What a window has before the prompt is masked, as padding on the left is, so that a step does not depend on how many there were before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from meshpar._torch import pytree
from meshpar.capture.state.taken import without_autocast
from meshpar.compile.program import Program, restore
from meshpar.compile.programs import Programs
from meshpar.compile.signature import BatchSignature, flatten
from meshpar.consensus import check_batch
from meshpar.errors import CaptureError
from meshpar.graph.captured import Slot
from meshpar.graph.facts import Info, info_of
from meshpar.mesh import typed_axes
from meshpar.ops.collectives import i_to_s
from meshpar.roles import ROLES
from meshpar.runtime.borders import Passage
from meshpar.runtime.caching.keys import cache_name, handle, is_cache, keys_and_values
from meshpar.runtime.caching.shards import APART, AxisTypes, Settled, settled
from meshpar.runtime.engine import Engine
from meshpar.runtime.outputs import Leave, gathered
from meshpar.runtime.state.variants import Variant, Variants
from meshpar.sharding.types import I, Shard


class Settling:
    """Makes programs with a cache take and keep it in shards, and leaves others as they are: to be done before a program runs."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.axes = tuple(axis for axis in typed_axes(mesh) if axis.size > 1 and not ROLES[axis.name].own_batches)
        """Those whose ranks share a batch."""
        self.settled: dict[str, Settled] = {}
        """By the key of a program."""

    def __call__(self, program: Program, kwargs: Mapping[str, Any]) -> Program:
        """The program as it is run, made for these arguments."""
        name = next((name for name, value in kwargs.items() if is_cache(value)), None)
        if name is None:
            return program
        found = self.settled[program.key] = settled(program, _inputs_in(program, name), _outputs_in(program, name), self.axes)
        return found.program


def settling(programs: Programs, mesh: DeviceMesh) -> Settling:
    """The one of these programs."""
    if not isinstance(programs.finish, Settling):
        programs.finish = Settling(mesh)
    return programs.finish


def _inputs_in(program: Program, name: str) -> list[str]:
    """The inputs of a program that its argument `name` consists of."""
    _, kwargs = pytree.tree_unflatten(list(program.captured.in_leaves), program.captured.in_spec)
    return [str(leaf.key) for leaf in pytree.tree_leaves(kwargs[name]) if isinstance(leaf, Slot)]


def _outputs_in(program: Program, name: str) -> list[int | None]:
    """The outputs of a program that `name` of what the model returns consists of, in the order of its leaves; None for one that is none."""
    leaves = pytree.tree_leaves(restore(program, lambda i: Slot(i))[name])
    return [int(leaf.key) if isinstance(leaf, Slot) else None for leaf in leaves]


@dataclass
class _Buffer:
    """The keys, or the values, of one layer."""

    tensor: Tensor | None
    """[samples, heads, positions, width], as this rank has it; None where its stages have not the layer."""
    types: AxisTypes
    whole: Tensor
    """What a program for one token takes of it, as ranks that share the batch have it together: without memory."""


class KeptCache:
    """What one call of generate keeps. `room`: how many positions a forward of one token attends to, itself included."""

    def __init__(self, room: int) -> None:
        self.room, self.count = room, 0
        """`count`: how many positions there are."""
        self.buffers: list[_Buffer | None] = []
        self._begin = 0

    def handle(self) -> Any:
        """What stands for it in transformers' loop."""
        return handle()(lambda: self.count, self.reorder)

    def begin(self, prompt: int) -> None:
        """Make room before and behind a prompt of so many positions."""
        self.count, self._begin = prompt, self.room - 1 - prompt

    def roomy(self, prompt: Tensor) -> Tensor:
        """The keys or values of a prompt, with room before and behind."""
        return pad(prompt, (0, 0, self._begin, self._begin))

    def window(self, buffer: _Buffer) -> Tensor | None:
        """What the next token attends to, but for itself."""
        return None if buffer.tensor is None else buffer.tensor[:, :, self._begin + self.count - self.room + 1 : self._begin + self.count]

    def write(self, buffer: _Buffer, new: Tensor | None) -> None:
        """Keep the keys or values of one token."""
        if buffer.tensor is not None and new is not None:
            buffer.tensor[:, :, self._begin + self.count] = new[:, :, 0]

    def reorder(self, samples: Tensor) -> None:
        """Go on with these samples of the ones before, as beams do."""
        for buffer in self.buffers:
            if buffer is not None and buffer.tensor is not None:
                buffer.tensor = buffer.tensor.index_select(0, samples.to(buffer.tensor.device))


class CachedForward:
    """Runs the forward with a cache. `inputs_of`: what a program takes beside its batch; `leave`: how what it returns leaves it."""

    def __init__(
        self,
        programs: Programs,
        variants: Variants,
        engine: Engine,
        mesh: DeviceMesh,
        *,
        inputs_of: Callable[[Program, list[Tensor]], dict[str, Any]],
        leave: Leave,
    ) -> None:
        name = cache_name(programs.skeleton)
        assert name is not None
        self._name, self._mesh, self._engine, self._variants, self._ordered = name, mesh, engine, variants, programs.ordered
        self._seen: set[BatchSignature] = set()
        found = settling(programs, mesh)
        self._axes, self._settled = found.axes, found.settled
        self._dtype, self._inputs_of, self._leave = programs.config.precision.compute_dtype, inputs_of, leave

    def cuts(self) -> str:
        """How keys and values lie on the ranks, in words."""
        found = [item for one in self._settled.values() for types in one.taken.values() for item in types.items()]
        cut = sorted({f"each rank of {axis} has those of its own {APART[t.dim]}" for axis, t in found if isinstance(t, Shard)})
        return " and ".join(cut) or "each rank has those of its samples"

    def prompt(self, batch: Mapping[str, Any], cache: KeptCache) -> Any:
        """What the model returns for prompts; their keys and values are in `cache` then."""
        variant, tensors = self._program({**batch, self._name: keys_and_values()(())}, compared=True)
        program, samples = variant.program, batch["input_ids"].shape[0]
        outputs = self._run(variant, self._inputs_of(program, tensors))
        cache.begin(batch["input_ids"].shape[1])
        for index in self._settled[program.key].outputs:
            info = None if index is None else _returned(program, index)
            if index is None or info is None:
                cache.buffers.append(None)
                continue
            types = self._types(program, index)
            kept = {axis: t if isinstance(t, Shard) and t.dim in APART else I for axis, t in types.items()}
            new = self._converted(outputs[index], types, kept)
            whole = torch.empty((samples, info.shape[1], cache.room - 1, info.shape[3]), dtype=info.dtype, device="meta")
            cache.buffers.append(_Buffer(None if new is None else cache.roomy(new), kept, whole))
        return self._said(program, outputs, cache)

    def token(self, batch: Mapping[str, Any], cache: KeptCache) -> Any:
        """What the model returns for one token of each sample, after those in `cache`; then it is in there too."""
        leaves = [None if one is None else one.whole for one in cache.buffers]
        variant, tensors = self._program({**batch, self._name: keys_and_values()(list(zip(leaves[::2], leaves[1::2], strict=True)))})
        program, known = variant.program, self._settled[variant.program.key]
        buffers = [one for one in cache.buffers if one is not None]
        inputs = self._inputs_of(program, tensors)
        for (name, types), buffer in zip(known.taken.items(), buffers, strict=True):
            self._retype(buffer, types)
            inputs[name] = cache.window(buffer)
        outputs = self._run(variant, inputs)
        for index, buffer in zip((i for i in known.outputs if i is not None), buffers, strict=True):
            cache.write(buffer, self._converted(outputs[index], self._types(program, index), buffer.types))
        cache.count += 1
        return self._said(program, outputs, cache)

    def _program(self, kwargs: Mapping[str, Any], *, compared: bool = False) -> tuple[Variant, list[Tensor]]:
        """The program for a batch, and the tensors of it; `compared`: whether ranks that share a batch are to compare its values."""
        ordered = self._ordered({**kwargs, "use_cache": True})
        tensors, signature = flatten((), dict(ordered), False)

        def closer() -> None:
            check_batch(((), ordered), self._mesh)

        key, found = self._variants.match(signature, 1, closer if compared and signature not in self._seen else None)
        if found is None:
            found = self._variants.make(key, (), ordered)
        self._seen.add(signature)
        if self._dtype is not None:
            tensors = [x.to(self._dtype) if x.is_floating_point() else x for x in tensors]
        return found, [*tensors, *found.held.inputs()]

    def _run(self, variant: Variant, inputs: dict[str, Any]) -> tuple[Tensor | None, ...]:
        program = variant.program
        with without_autocast():
            outputs = self._engine.run(program, inputs, stay=self._settled[program.key].stay)
        self._variants.done(variant)
        return outputs

    def _types(self, program: Program, index: int) -> AxisTypes:
        """The types of an output on the axes whose ranks share a batch. Raises CaptureError where it is not of this rank's samples."""
        for plan in program.plan.axes:
            if ROLES[plan.axis].own_batches and plan.size > 1 and not plan.samples[index]:
                raise CaptureError(f"what a layer keeps is not of single samples (over {plan.axis})")
        names = [axis.name for axis in self._axes]
        return {plan.axis: plan.outputs[index] for plan in program.plan.axes if plan.axis in names}

    def _retype(self, buffer: _Buffer, types: AxisTypes) -> None:
        """Hold a buffer as a program takes it."""
        buffer.tensor, buffer.types = self._converted(buffer.tensor, buffer.types, types), types

    def _converted(self, value: Tensor | None, before: AxisTypes, after: AxisTypes) -> Tensor | None:
        if value is None or before == after:
            return value
        for axis in reversed(self._axes):
            value = gathered(value, before[axis.name], axis)
        for axis in self._axes:
            if isinstance(cut := after[axis.name], Shard):
                where: dict[str, Any] = {"group": axis.group, "size": axis.size, "rank": axis.rank}
                value = i_to_s(value, cut.dim, cut.repeat, cut.segments, **where)
        return value

    def _said(self, program: Program, outputs: tuple[Tensor | None, ...], cache: KeptCache) -> Any:
        """What the model returns, with something that stands for the cache in its place."""
        stay = self._settled[program.key].stay
        out = restore(program, lambda i: _HERE if i in stay else self._leave(program, cast(Tensor, outputs[i]), i, Passage(1.0)))
        out[self._name] = cache.handle()
        return out


_HERE = Slot("")
"""In the place of what stays."""


def _returned(program: Program, index: int) -> Info:
    """What an output of a program looks like. Raises CaptureError where it is no keys or values."""
    values: Any = program.captured.graph.output_node().args[0]
    info = info_of(values[index])
    if len(info.shape) != 4:
        raise CaptureError(f"a layer keeps a tensor of shape {list(info.shape)}, no [samples, heads, positions, width]")
    return info
