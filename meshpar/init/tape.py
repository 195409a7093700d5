"""A tape of the operations that gave tensors their values, and its replay, one tensor at a time.

Tensors on a tape live on `meta`: they have a shape and a storage, but no memory. A tensor is named by its storage's number and its
geometry, so that views need no record: an operation on a view is an operation on a part of a storage.

    w = torch.empty(4, 8)         storage 0                       nothing to record
    w.uniform_(-1, 1)             writes all of 0, random         dead: overwritten below, but the generator moves on
    w.normal_()                   writes all of 0, random
    w[0].zero_()                  writes a part of 0

To compute w, walk back from its end to the last operation that overwrote all of it (here `normal_`) and run from there. Random numbers come
out as on a real run because every random operation is run in order, on scratch memory if nobody needs its result. A tensor whose value
changes once more later (a rescaling at the end, for instance) is computed when its last random operation is due, from saved generator
states, so that at no time more than one tensor and what it is made of are in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any

import torch

from meshpar._torch import pytree


@dataclass(frozen=True, slots=True)
class TapedView:
    """A tensor as a view of storage `number`."""

    number: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Dice:
    """A random generator among an operation's arguments."""

    key: int


@dataclass(frozen=True, slots=True)
class TapedOp:
    """One recorded operation. In `args` and `kwargs` taped tensors are `TapedView`s; other tensors are constants, and never written."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: tuple[int, ...]
    """Storages whose content matters to the result."""
    covers: tuple[int, ...]
    """Storages that hold nothing of their former content afterwards."""
    outputs: tuple[TapedView | None, ...]
    """New storages, by position in the flattened result; None for results that alias an argument."""
    dice: Dice | None
    """The generator that a random operation draws from."""
    reseed: torch.Tensor | None
    """The state that the generator was put in by hand just before."""


_LARGE = 2**20
DEFAULT = Dice(0)
"""torch's default generator on the CPU."""


@dataclass
class Tape:
    """Operations in the order they happened."""

    start: dict[Dice, torch.Tensor]
    """The state each generator was in when first used."""
    ops: list[TapedOp] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    """The size of every storage."""
    touched: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Storage -> the operations that wrote to it, in order."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tape:
        return self  # a copy of a model has the same history

    def new_storage(self, nbytes: int) -> int:
        """The number of one more storage."""
        self.nbytes.append(nbytes)
        return len(self.nbytes) - 1

    def append(self, op: TapedOp, writes: Sequence[int]) -> None:
        """Record `op`, which writes to the storages `writes` and to its outputs."""
        for number in dict.fromkeys((*writes, *(ref.number for ref in op.outputs if ref is not None))):
            self.touched[number].append(len(self.ops))
        self.ops.append(op)

    def needed(self, refs: Sequence[TapedView], before: int | None = None) -> frozenset[int]:
        """The operations, among those earlier than `before`, that the values of `refs` come from."""
        found: set[int] = set()
        seen: set[tuple[int, int]] = set()
        todo = [(ref.number, len(self.ops) if before is None else before) for ref in refs]
        while todo:
            number, end = todo.pop()
            for index in reversed(self.touched.get(number, ())):
                if index >= end:
                    continue
                if (number, index) in seen:
                    break
                seen.add((number, index))
                found.add(index)
                todo += [(read, index) for read in self.ops[index].reads if read != number or number in self.ops[index].covers]
                if number in self.ops[index].covers:
                    break
        return frozenset(found)

    def is_written(self, ref: TapedView) -> bool:
        """Whether anything ever gave the tensor a value."""
        return not self.nbytes[ref.number] or bool(self.touched.get(ref.number))


class Replay:
    """Runs a tape. `seed` replaces the state that the default generator was in at the start."""

    def __init__(self, tape: Tape, seed: int | None = None) -> None:
        self.tape = tape
        self.position = 0
        self.states = dict(tape.start)
        """Of every generator, at `position`."""
        if seed is not None:
            self.states[DEFAULT] = torch.Generator().manual_seed(seed).get_state()
        self._saved: dict[int, torch.Tensor] = {}
        self._scratch = torch.UntypedStorage(0)

    def values(self, targets: Mapping[str, TapedView]) -> Iterator[tuple[str, torch.Tensor]]:
        """`(name, value)` of every target, each as soon as its last random operation is due: those without one come first."""
        slices = {name: self.tape.needed([ref]) for name, ref in targets.items()}
        last = {name: max((i for i in ops if self._is_random(i)), default=-1) for name, ops in slices.items()}
        keep = self._last_uses(slices, last)
        due: dict[int, list[str]] = defaultdict(list)
        for name, index in last.items():
            due[index].append(name)
        for index in sorted(due):
            self.advance(index, keep)
            for name in due[index]:
                yield name, self._evaluate([targets[name]], slices[name])[0]

    def evaluate(self, refs: Sequence[TapedView]) -> list[torch.Tensor]:
        """The values of `refs` at the present end of the tape; tensors of one storage share memory. Keeps every generator state."""
        ops = self.tape.needed(refs)
        self.advance(max((i for i in ops if self._is_random(i)), default=-1), None)
        return self._evaluate(refs, ops)

    def advance(self, until: int, keep: Mapping[int, int] | None) -> None:
        """Move the generators past all random operations before `until`.

        `keep`: random operation -> the last position at which its generator state is needed again; None keeps all.
        """
        while self.position < until:
            index = self.position
            if self._is_random(index):
                if keep is None or keep.get(index, -1) > index:
                    self._saved[index] = self._state_before(index)
                self._roll(index)
            self._forget(keep)
            self.position = index + 1

    def for_real(self, index: int, run: Callable[[], Any], generator: torch.Generator | None) -> Any:
        """Run the random operation `index`, the last on the tape, as `run` on real tensors, drawing from `generator` (None: torch's)."""
        self.advance(index, None)
        dice = self.tape.ops[index].dice
        assert dice is not None
        generator = generator or torch.default_generator
        lent = generator.get_state()
        generator.set_state(self._state_before(index))
        try:
            result = run()
            self.states[dice] = generator.get_state()
        finally:
            generator.set_state(lent)
        self.position = index + 1
        return result

    # ---- helpers

    def _is_random(self, index: int) -> bool:
        return self.tape.ops[index].dice is not None

    def _last_uses(self, slices: Mapping[str, frozenset[int]], last: Mapping[str, int]) -> dict[int, int]:
        uses: dict[int, int] = {}
        for name, ops in slices.items():
            for index in ops:
                if self._is_random(index):
                    uses[index] = max(uses.get(index, -1), last[name])
        for index, op in enumerate(self.tape.ops):
            if op.dice is not None and op.reads:
                for earlier in self._inputs(index):
                    uses[earlier] = max(uses.get(earlier, -1), index)
        return uses

    def _forget(self, keep: Mapping[int, int] | None) -> None:
        if keep is not None and self.position % 256 == 0:
            self._saved = {i: state for i, state in self._saved.items() if keep.get(i, -1) >= self.position}

    def _inputs(self, index: int) -> frozenset[int]:
        return self.tape.needed([ref for ref in _refs(self.tape.ops[index]) if ref.number in self.tape.ops[index].reads], index)

    def _state_before(self, index: int) -> torch.Tensor:
        op = self.tape.ops[index]
        assert op.dice is not None
        return self.states[op.dice] if op.reseed is None else op.reseed

    def _roll(self, index: int) -> None:
        """Run a random operation for its effect on the generator: on scratch memory, unless what it draws depends on what it reads."""
        op = self.tape.ops[index]
        assert op.dice is not None
        memory = self._run(self._inputs(index), {}) if op.reads else self._scratch_for(op)
        self.states[op.dice] = self._throw(op, memory, self._state_before(index))

    def _scratch_for(self, op: TapedOp) -> dict[int, torch.UntypedStorage]:
        """Memory for what `op` writes to, used again and again."""
        refs = _refs(op)
        if len(refs) != 1:
            return {}
        nbytes = self.tape.nbytes[refs[0].number]
        if self._scratch.nbytes() < nbytes:
            self._scratch = allocate(nbytes)
        return {refs[0].number: self._scratch}

    def _evaluate(self, refs: Sequence[TapedView], ops: frozenset[int]) -> list[torch.Tensor]:
        memory = self._run(ops, {})
        return [_view(memory, ref, self.tape.nbytes) for ref in refs]

    def _run(self, ops: frozenset[int], memory: dict[int, torch.UntypedStorage]) -> dict[int, torch.UntypedStorage]:
        for index in sorted(ops):
            op = self.tape.ops[index]
            if op.dice is None:
                _execute(op, memory, self.tape.nbytes, {})
            elif index == self.position:  # its turn has come: the generator moves on, and no second run is needed
                self._saved[index] = self._state_before(index)
                self.states[op.dice] = self._throw(op, memory, self._saved[index])
                self.position = index + 1
            else:
                self._throw(op, memory, self._saved[index])
        return memory

    def _throw(self, op: TapedOp, memory: dict[int, torch.UntypedStorage], state: torch.Tensor) -> torch.Tensor:
        """Run a random operation from a generator state; the state afterwards."""
        assert op.dice is not None
        with _generators({op.dice: state}) as (generators, states):
            _execute(op, memory, self.tape.nbytes, generators)
            return states()[op.dice]


def _execute(
    op: TapedOp, memory: dict[int, torch.UntypedStorage], nbytes: Sequence[int], generators: Mapping[Dice, torch.Generator | None]
) -> None:
    def real(leaf: Any) -> Any:
        if isinstance(leaf, TapedView):
            return _view(memory, leaf, nbytes)
        return generators[leaf] if isinstance(leaf, Dice) else leaf

    with torch.no_grad():
        results = pytree.tree_leaves(op.run(*pytree.tree_map(real, op.args), **pytree.tree_map(real, dict(op.kwargs))))
    for ref, result in zip(op.outputs, results, strict=True):
        if ref is not None:
            _store(memory, ref, result, nbytes)


def _view(memory: dict[int, torch.UntypedStorage], ref: TapedView, nbytes: Sequence[int]) -> torch.Tensor:
    if ref.number not in memory:
        memory[ref.number] = allocate(nbytes[ref.number])
    return torch.empty(0, dtype=ref.dtype).set_(memory[ref.number], ref.offset, ref.size, ref.stride)


def allocate(nbytes: int) -> torch.UntypedStorage:
    """Memory that goes back to the system when it is freed: from the heap, small things kept in between would leave holes behind."""
    if nbytes < _LARGE:
        return torch.UntypedStorage(nbytes)
    return torch.frombuffer(mmap(-1, nbytes), dtype=torch.uint8).untyped_storage()


def _store(memory: dict[int, torch.UntypedStorage], ref: TapedView, result: torch.Tensor, nbytes: Sequence[int]) -> None:
    fits = (tuple(result.size()), tuple(result.stride()), result.storage_offset()) == (ref.size, ref.stride, ref.offset)
    if fits and result.untyped_storage().nbytes() == nbytes[ref.number]:
        memory[ref.number] = result.untyped_storage()
    else:  # the kernel on the CPU chose other strides than the one on meta
        _view(memory, ref, nbytes).copy_(result)


def _refs(op: TapedOp) -> list[TapedView]:
    return [leaf for leaf in pytree.tree_leaves((op.args, dict(op.kwargs))) if isinstance(leaf, TapedView)]


@contextmanager
def _generators(
    states: Mapping[Dice, torch.Tensor],
) -> Iterator[tuple[Mapping[Dice, torch.Generator | None], Callable[[], dict[Dice, torch.Tensor]]]]:
    """Generators put in `states` for the operations inside, and a function that tells their states afterwards.

    torch's default generator is lent: operations without a generator draw from it.
    """
    generators: dict[Dice, torch.Generator | None] = {dice: None if dice == DEFAULT else torch.Generator() for dice in states}
    lent = torch.get_rng_state() if DEFAULT in states else None
    for dice, state in states.items():
        generator = generators[dice] or torch.default_generator
        generator.set_state(state)
    try:
        yield generators, lambda: {dice: (g or torch.default_generator).get_state() for dice, g in generators.items()}
    finally:
        if lent is not None:
            torch.set_rng_state(lent)
