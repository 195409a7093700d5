"""Moving tensors between divisions, slab by slab: one contiguous read per source chunk and one contiguous write per target chunk.

    global tensor          source chunks          target chunks
    +-------------+        +------+------+        +-------------+
    |### slab ####|        |######|######|        |#############|     A slab is a range of rows that fits the buffers. In every chunk,
    +-------------+   <-   |      |      |   ->   +-------------+     source or target, the rows of a slab are one stretch of bytes,
    |             |        |      |      |        |             |     and slabs meet every chunk from its first byte to its last,
    +-------------+        +------+------+        +-------------+     so checksums are computed on the way.

Small tensors travel many at a time, and what lies side by side in a file is read or written by one call; how their pieces meet is worked
out once for all tensors that are divided alike. Where a target stretch is made of
whole source stretches, it is written straight from the read buffer. Memory is the buffers of the workers, whatever the size of the model.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import numpy as np

from meshpar.checkpoint.boxes import Box, intersect, volume, whole
from meshpar.checkpoint.casts import Array, cast, word
from meshpar.checkpoint.faults import CorruptError, ImpossibleError
from meshpar.checkpoint.files import BLOCK, ITEMSIZE, BlockCrc, Disk
from meshpar.checkpoint.manifest import Chunk

ZERO = -1  # the file of a piece that is all zeros: read from nowhere, checked and dropped when it is a target
SLAB = 2 << 20  # the best of 256 KiB to 4 MiB in benchmarks/reshard
SHORT = 1 << 16  # longer pieces are worth a call of their own instead of a copy
MIN_MEMORY = 1 << 20


_Ints = np.ndarray[Any, np.dtype[np.int64]]
Piece = Chunk  # a box whose bytes lie row-major in a file, in the space of a transfer instead of that of a tensor


@dataclass(frozen=True, slots=True)
class Rearrange:
    """A change of order: split the dims into factors, transpose them, merge them again. Shapes in elements."""

    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def apply(self, array: Array) -> Array:
        return np.ascontiguousarray(array.reshape(self.split).transpose(self.order)).reshape(self.shape)


class Transfer(NamedTuple):
    """One tensor to move. Sources tile `shape`; targets tile it too, or the rearranged shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Piece, ...]
    targets: tuple[Piece, ...]
    target_dtype: str
    rearrange: Rearrange | None = None
    exact: bool = False  # a cast must not change any value

    @property
    def nbytes(self) -> int:
        """The larger of its bytes on either side."""
        return prod(self.shape) * max(ITEMSIZE[self.dtype], ITEMSIZE[self.target_dtype])


class Files(Protocol):
    """Where pieces are read from or written to."""

    def use(self, file: int) -> AbstractContextManager[int]: ...

    def name(self, file: int) -> str: ...


@dataclass(frozen=True)
class Options:
    """How to move: bytes of memory, threads, whether source checksums are verified and target ones computed."""

    memory: int = 256 << 20
    workers: int = 1
    verify: bool = True
    checksums: bool = True
    source_block: int = BLOCK
    slab: int = SLAB
    smallest: int = 1 << 16

    @property
    def buffer(self) -> int:
        """Bytes of each of the two buffers of a worker."""
        return max(min(self.slab, self.memory // (4 * self.workers)), self.smallest)

    @property
    def spare(self) -> int:
        """Bytes for tensors that must be rearranged in memory."""
        return self.memory - 2 * self.workers * self.buffer


@dataclass
class Traffic:
    """Bytes and calls as they happened."""

    read: int = 0
    written: int = 0
    reads: int = 0
    writes: int = 0


Done = Callable[[int, tuple[tuple[int, ...], ...]], None]


class _State:
    """A transfer on its way: the running checksums of its pieces, and how many slabs are left."""

    __slots__ = ("index", "left", "source_crc", "target_crc", "transfer", "whole")

    def __init__(self, index: int, transfer: Transfer, slabs: int) -> None:
        self.index, self.transfer, self.left, self.whole = index, transfer, slabs, slabs == 1
        self.source_crc: dict[int, BlockCrc] = {}
        self.target_crc: list[tuple[int, ...] | BlockCrc | None] = [None] * len(transfer.targets)


class _Part(NamedTuple):
    """The stretch of a piece that lies in the slab at hand."""

    file: int
    offset: int
    nbytes: int
    state: _State
    piece: int
    box: Box


def check_memory(transfers: Sequence[Transfer], options: Options) -> None:
    """Refuse before any I/O what could only be done with more memory."""
    if options.memory < MIN_MEMORY:
        raise ImpossibleError(f"--max-memory is {options.memory} bytes; at least {MIN_MEMORY} are needed.")
    for t in [t for t in transfers if t.rearrange is not None]:
        step = 3 * _step_bytes(t)
        if step > options.spare:
            need = min(2 * step, step + 2 * options.workers * options.slab)  # the buffers take half of it, or less
            raise ImpossibleError(
                f"{t.name} {list(t.shape)} must be transposed in memory: --max-memory {-(-need >> 20)}MiB or more would do."
            )


def _step_bytes(t: Transfer) -> int:
    """The bytes a rearranged transfer needs at once: a row where dim 0 stays in front, else the whole tensor."""
    return t.nbytes // max(t.shape[0], 1) if _keeps_rows(t) else t.nbytes


def _keeps_rows(t: Transfer) -> bool:
    r = t.rearrange
    return r is not None and bool(t.shape) and bool(r.shape) and r.order[0] == 0 and r.split[0] == t.shape[0] == r.shape[0]


def slabs(shape: tuple[int, ...], itemsize: int, limit: int) -> Iterator[Box]:
    """Cut a tensor into row ranges of at most `limit` bytes, in the order of its bytes.

    >>> [str(b) for b in slabs((3, 4), 1, 8)]
    ['[0:2, 0:4]', '[2:3, 0:4]']
    """
    dim = 0
    while dim < len(shape) - 1 and prod(shape[dim + 1 :]) * itemsize > limit:
        dim += 1
    if not shape or prod(shape) * itemsize <= limit:
        yield whole(shape)
        return
    rows = max(limit // (prod(shape[dim + 1 :]) * itemsize), 1)
    for lead in product(*(range(n) for n in shape[:dim])):
        for start in range(0, shape[dim], rows):
            size = min(rows, shape[dim] - start)
            yield Box((*lead, start, *(0,) * (len(shape) - dim - 1)), ((1,) * dim + (size, *shape[dim + 1 :])))


def run(transfers: Sequence[Transfer], source: Files, target: Files, options: Options, disk: Disk, done: Done) -> Traffic:
    """Move everything. `done(index, checksums of its targets)` is called, in one thread, for every finished transfer.

    Raises CorruptError at the first source block that does not match its checksum.
    """
    check_memory(transfers, options)
    mover = _Mover(source, target, options, disk)
    if options.workers == 1:
        worker = mover.worker()
        for job in mover.jobs(transfers):
            for index, crcs in worker.job(job):
                done(index, crcs)
    else:
        _run_threads(mover, transfers, options.workers, done)
    return mover.traffic


def _run_threads(mover: _Mover, transfers: Sequence[Transfer], count: int, done: Done) -> None:
    jobs, lock, stop = mover.jobs(transfers), threading.Lock(), threading.Event()
    results: queue.Queue[list[tuple[int, tuple[tuple[int, ...], ...]]] | BaseException | None] = queue.Queue()

    def work() -> None:
        try:
            worker = mover.worker()
            while not stop.is_set():
                with lock:
                    job = next(jobs, None)
                if job is None:
                    break
                results.put(worker.job(job, stop))
        except BaseException as error:
            stop.set()
            results.put(error)
        finally:
            results.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    failure: BaseException | None = None
    try:
        for thread in threads:
            thread.start()
        left = count
        while left:
            item = results.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                failure = failure or item
            elif failure is None:
                for index, crcs in item:
                    done(index, crcs)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failure is not None:
        raise failure


Job = list[list[tuple[_State, Box]]]


@dataclass
class _Mover:
    source: Files
    target: Files
    options: Options
    disk: Disk
    traffic: Traffic = field(default_factory=Traffic)
    rearranging: threading.Lock = field(default_factory=threading.Lock)
    counting: threading.Lock = field(default_factory=threading.Lock)

    def worker(self) -> _Worker:
        return _Worker(self)

    def jobs(self, transfers: Sequence[Transfer]) -> Iterator[Job]:
        """Work that must stay in one thread, in order: the slabs of a large tensor, or a batch of small ones."""
        limit = self.options.buffer
        batch: list[tuple[_State, Box]] = []
        filled = 0
        for index, t in enumerate(transfers):
            room = t.nbytes + 16 * (len(t.sources) + len(t.targets))
            if t.rearrange is None and room <= limit:
                if filled + room > limit:
                    yield [batch]
                    batch, filled = [], 0
                batch.append((_State(index, t, 1), whole(t.shape)))
                filled += room
                continue
            yield self._large(index, t)
        if batch:
            yield [batch]

    def _large(self, index: int, t: Transfer) -> Job:
        if t.rearrange is not None:
            limit = max(self.options.spare // 3, 1)
            boxes = list(slabs(t.shape, _itemsize(t), limit)) if _keeps_rows(t) else [whole(t.shape)]
        else:
            # every stretch may need up to 15 bytes of alignment in a buffer
            slack = 16 * (len(t.sources) + len(t.targets))
            boxes = list(slabs(t.shape, _itemsize(t), max(self.options.buffer - slack, self.options.buffer // 2)))
        state = _State(index, t, len(boxes))
        return [[(state, box)] for box in boxes]


def _itemsize(t: Transfer) -> int:
    return max(ITEMSIZE[t.dtype], ITEMSIZE[t.target_dtype])


class _Worker:
    """One thread's buffers and the steps of moving one unit of work through them."""

    def __init__(self, mover: _Mover) -> None:
        self._m, self._disk, self._options = mover, mover.disk, mover.options
        self._in = _Buffer(self._options.buffer)
        self._out = _Buffer(self._options.buffer)
        self._recipes: dict[tuple[tuple[int, ...], int], list[tuple[tuple[list[Box], list[Box]], _Recipe]]] = {}

    def job(self, job: Job, stop: threading.Event | None = None) -> list[tuple[int, tuple[tuple[int, ...], ...]]]:
        """Run the units of a job in order; returns the transfers it finished."""
        finished = []
        for unit in job:
            if stop is not None and stop.is_set():
                break
            if unit[0][0].transfer.rearrange is not None:
                self._rearranged(*unit[0])
            elif unit[0][0].whole:
                simple, rest = self._sorted_out(unit)
                if simple:
                    self._simple(simple)
                if rest:
                    self._unit(rest)
            else:
                self._unit(unit)
            for state, _ in unit:
                state.left -= 1
                if state.left == 0:
                    finished.append((state.index, _finish(state)))
        return finished

    def _sorted_out(self, unit: Sequence[tuple[_State, Box]]) -> tuple[list[tuple[_State, _Recipe]], list[tuple[_State, Box]]]:
        """Whole transfers that only put stretches of bytes side by side, and the others."""
        simple: list[tuple[_State, _Recipe]] = []
        rest: list[tuple[_State, Box]] = []
        limit = min(self._options.source_block, SHORT)
        for state, box in unit:
            t = state.transfer
            recipe = self._recipe(t)
            if recipe.parts is None or t.dtype != t.target_dtype or recipe.longest > limit or _has_zeros(t):
                rest.append((state, box))
            else:
                simple.append((state, recipe))
        return simple, rest

    def _recipe(self, t: Transfer) -> _Recipe:
        boxes = [p.box for p in t.sources], [p.box for p in t.targets]
        known = self._recipes.setdefault((t.shape, ITEMSIZE[t.dtype]), [])
        for seen, recipe in known:
            if seen == boxes:  # mostly the very same objects, which is quick
                return recipe
        made = _recipe(t)
        if len(known) < 8:
            known.append((boxes, made))
        return made

    def _simple(self, batch: Sequence[tuple[_State, _Recipe]]) -> None:
        """`_unit` for many small transfers: what is divided alike moves by one strided copy per stretch, not by an object for each."""
        self._in.reset()
        self._out.reset()
        alike: dict[int, list[tuple[_State, _Recipe]]] = {}
        for row in batch:
            alike.setdefault(id(row[1]), []).append(row)
        stacks = [_stack([state for state, _ in rows], rows[0][1]) for rows in alike.values()]
        starts = self._place([s.sources for s in stacks], self._in, self._fill)
        for stack, begins in zip(stacks, starts, strict=True):
            if self._options.verify:
                self._verify_small(stack, begins)
        writes: list[tuple[int, int, memoryview]] = []
        places = self._place([s.targets for s in stacks], self._out, lambda *run: writes.append(run))
        for stack, begins, ends in zip(stacks, starts, places, strict=True):
            self._gather(stack, begins, ends)
        for file, begin, view in writes:
            self._put(file, begin, [view], len(view))

    def _place(self, groups: Sequence[_Spans], buffer: _Buffer, act: Callable[[int, int, memoryview], None]) -> list[_Ints]:
        """Give every stretch its place in the buffer, neighbours in a file side by side; `act(file, begin, view)` on every row of them."""
        file, begin, nbytes = (np.concatenate(parts) for parts in zip(*((g.file, g.begin, g.nbytes) for g in groups), strict=True))
        if not len(file):
            return [begin for _ in groups]
        order = np.lexsort((nbytes, begin, file))
        f, b, n = file[order], begin[order], nbytes[order]
        breaks = np.flatnonzero((f[1:] != f[:-1]) | (b[1:] != b[:-1] + n[:-1])) + 1
        first, last = np.concatenate(([0], breaks)), np.concatenate((breaks - 1, [len(f) - 1]))
        shift = np.zeros(len(first), np.int64)
        for k, (i, j) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            base, end = int(b[i]), int(b[j] + n[j])
            if end > base:
                act(int(f[i]), base, buffer.take(end - base, base))
                shift[k] = buffer.used - end
        placed = np.empty(len(f), np.int64)
        placed[order] = b + np.repeat(shift, last - first + 1)
        return np.split(placed, np.cumsum([len(g.file) for g in groups])[:-1])

    def _verify_small(self, stack: _Stack, begins: _Ints) -> None:
        data, at = self._in.data, begins.tolist()
        for k, (start, nbytes, piece) in enumerate(zip(at, stack.sources.nbytes.tolist(), stack.pieces, strict=True)):
            if piece.crcs and crc32(data[start : start + nbytes]) != piece.crcs[0]:
                name, found = stack.states[k // len(stack.recipe.nbytes)].transfer.name, crc32(data[start : start + nbytes])
                _mismatch(self._m.source.name(piece.file), name, piece, (found,), self._options.source_block)

    def _gather(self, stack: _Stack, begins: _Ints, ends: _Ints) -> None:
        """Copy the stretches of all targets of transfers divided alike, and note the targets' checksums."""
        recipe, count = stack.recipe, len(stack.states)
        assert recipe.parts is not None
        sources, targets = begins.reshape(count, -1), ends.reshape(count, -1)
        data, reuse = self._out.data, self._options.verify and self._options.source_block == BLOCK
        for index, parts in enumerate(recipe.parts):
            at = targets[:, index]
            for s, start, stop in parts:
                _copy(data, at, self._in.data, sources[:, s] + start, stop - start)
                at = at + (stop - start)
            if not self._options.checksums:
                continue
            lone = parts[0][0] if len(parts) == 1 and parts[0][1:] == (0, recipe.nbytes[parts[0][0]]) else None
            for state, low, high in zip(stack.states, targets[:, index].tolist(), at.tolist(), strict=True):
                known = state.transfer.sources[lone].crcs if reuse and lone is not None else ()
                state.target_crc[index] = known or ((crc32(data[low:high]),) if high > low else ())

    def _unit(self, unit: Sequence[tuple[_State, Box]]) -> None:
        self._in.reset()
        self._out.reset()
        sources = [_parts(state, state.transfer.sources, ITEMSIZE[state.transfer.dtype], slab) for state, slab in unit]
        views = self._read([part for parts in sources for part in parts], self._in)
        writes: list[tuple[int, int, list[memoryview]]] = []
        for (state, slab), parts in zip(unit, sources, strict=True):
            held = [(part.box, *views[id(part)]) for part in parts]
            for part in _parts(state, state.transfer.targets, ITEMSIZE[state.transfer.target_dtype], slab):
                out, crcs = self._assemble(state.transfer, part, held)
                self._emit(state, part, out, crcs, writes)
        self._write(writes)

    def _read(self, parts: list[_Part], buffer: _Buffer) -> dict[int, tuple[memoryview, tuple[int, ...] | None]]:
        """Fill the buffer with the parts, neighbours in one call; per part its bytes, and its checksums where it is a whole piece."""
        views: dict[int, tuple[memoryview, tuple[int, ...] | None]] = {}
        ordered = sorted(parts, key=lambda p: (p.file, p.offset))
        at = 0
        while at < len(ordered):
            first = ordered[at]
            end, stop = first.offset + first.nbytes, at + 1
            while stop < len(ordered) and ordered[stop].file == first.file and ordered[stop].offset == end and first.file != ZERO:
                end += ordered[stop].nbytes
                stop += 1
            view = buffer.take(end - first.offset, first.offset)
            self._fill(first.file, first.offset, view)
            for part in ordered[at:stop]:
                start = part.offset - first.offset
                piece = view[start : start + part.nbytes]
                views[id(part)] = (piece, self._verify(part, piece))
            at = stop
        return views

    def _fill(self, file: int, offset: int, view: memoryview) -> None:
        if file == ZERO:
            np.frombuffer(view, np.uint8)[:] = 0
        elif len(view):
            with self._m.source.use(file) as fd:
                self._disk.read(fd, [view], offset)
            with self._m.counting:
                self._m.traffic.read += len(view)
                self._m.traffic.reads += 1

    def _verify(self, part: _Part, view: memoryview) -> tuple[int, ...] | None:
        """Compare with the recorded checksums once a piece is complete; the checksums when this was all of it."""
        piece = part.state.transfer.sources[part.piece]
        if not self._options.verify or not piece.crcs:
            return None
        full = part.box is piece.box or part.box == piece.box
        if full and part.nbytes <= self._options.source_block:
            found: tuple[int, ...] = (crc32(view),) if part.nbytes else ()
            return self._matching(part, piece, found)
        running = (
            BlockCrc(self._options.source_block)
            if full
            else part.state.source_crc.setdefault(part.piece, BlockCrc(self._options.source_block))
        )
        running.feed(view)
        if part.offset + part.nbytes < piece.begin + volume(piece.box.size) * ITEMSIZE[part.state.transfer.dtype]:
            return None
        used = self._matching(part, piece, running.finish())
        return used if full else None

    def _matching(self, part: _Part, piece: Piece, found: tuple[int, ...]) -> tuple[int, ...] | None:
        """The checksums found, if they are the recorded ones and can be used for the target as well."""
        if found != piece.crcs:
            _mismatch(self._m.source.name(piece.file), part.state.transfer.name, piece, found, self._options.source_block)
        return found if self._options.source_block == BLOCK else None

    def _assemble(
        self, t: Transfer, part: _Part, held: Sequence[tuple[Box, memoryview, tuple[int, ...] | None]]
    ) -> tuple[list[memoryview], tuple[int, ...] | None]:
        """The bytes of one target stretch: pieces of the read buffer where they fit, else copied together."""
        if t.dtype == t.target_dtype:
            if len(held) == 1 and held[0][0] == part.box:
                return [held[0][1]], held[0][2]
            shared = _shared(part.box, held, part.state.whole and len(t.targets) == 1)
            direct = _direct(part.box, shared, ITEMSIZE[t.dtype])
            if direct is not None:
                return direct, None
        else:
            shared = _shared(part.box, held, part.state.whole and len(t.targets) == 1)
        view = self._out.take(part.nbytes, part.offset)
        target = np.frombuffer(view, word(t.target_dtype)).reshape(part.box.size)
        for both, box, data in shared:
            source = np.frombuffer(data, word(t.dtype)).reshape(box.size)[_inside(both, box)]
            target[_inside(both, part.box)] = cast(source, t.dtype, t.target_dtype, t.name, exact=t.exact).reshape(both.size)
        return [view], None

    def _emit(
        self,
        state: _State,
        part: _Part,
        out: list[memoryview],
        crcs: tuple[int, ...] | None,
        writes: list[tuple[int, int, list[memoryview]]],
    ) -> None:
        """Add a target stretch to the writes and to the running checksum of its piece."""
        t = state.transfer
        if part.file == ZERO:
            if any(np.frombuffer(view, np.uint8).any() for view in out):
                raise CorruptError(f"{t.name} {part.box} should be padding, but holds values other than zero.")
            return
        writes.append((part.file, part.offset, out))
        if not self._options.checksums:
            return
        if crcs is not None and part.box == t.targets[part.piece].box:
            state.target_crc[part.piece] = crcs
            return
        running = state.target_crc[part.piece]
        if not isinstance(running, BlockCrc):
            running = state.target_crc[part.piece] = BlockCrc()
        for view in out:
            running.feed(view)

    def _write(self, writes: list[tuple[int, int, list[memoryview]]]) -> None:
        writes.sort(key=lambda w: w[:2])
        at = 0
        while at < len(writes):
            file, offset, views = writes[at]
            end = offset + sum(map(len, views))
            views, stop = list(views), at + 1
            while stop < len(writes) and writes[stop][0] == file and writes[stop][1] == end:
                views += writes[stop][2]
                end += sum(map(len, writes[stop][2]))
                stop += 1
            self._put(file, offset, views, end - offset)
            at = stop

    def _put(self, file: int, offset: int, views: Sequence[memoryview], nbytes: int) -> None:
        with self._m.target.use(file) as fd:
            self._disk.write(fd, views, offset)
        with self._m.counting:
            self._m.traffic.written += nbytes
            self._m.traffic.writes += 1

    def _rearranged(self, state: _State, slab: Box) -> None:
        """Assemble a slab whole, change its order, and write its parts; one at a time, since it uses the spare memory."""
        t = state.transfer
        assert t.rearrange is not None
        with self._m.rearranging:
            parts = _parts(state, t.sources, ITEMSIZE[t.dtype], slab)
            buffer = _Buffer(sum(p.nbytes + 16 for p in parts))
            views = self._read(parts, buffer)
            full = np.empty(slab.size, word(t.dtype))
            for part in parts:
                full[_inside(part.box, slab)] = np.frombuffer(views[id(part)][0], word(t.dtype)).reshape(part.box.size)
            del views, buffer
            rows = slab.size[0] if slab.size else 1
            change = (
                t.rearrange
                if slab == whole(t.shape)
                else Rearrange((rows, *t.rearrange.split[1:]), t.rearrange.order, (rows, *t.rearrange.shape[1:]))
            )
            full = change.apply(full)
            place = whole(t.rearrange.shape) if slab == whole(t.shape) else Box((slab.offset[0], *(0,) * (full.ndim - 1)), full.shape)
            for part in _parts(state, t.targets, ITEMSIZE[t.target_dtype], place):
                bits = cast(np.ascontiguousarray(full[_inside(part.box, place)]), t.dtype, t.target_dtype, t.name, exact=t.exact)
                writes: list[tuple[int, int, list[memoryview]]] = []
                self._emit(state, part, [np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data], None, writes)
                self._write(writes)


class _Buffer:
    """A reused stretch of memory, handed out front to back, as aligned as the file offsets are."""

    def __init__(self, size: int) -> None:
        self.data = np.empty(size + 64, np.uint8).data.cast("B")
        self.used = 0

    def reset(self) -> None:
        self.used = 0

    def take(self, nbytes: int, offset: int) -> memoryview:
        start = self.used + (offset - self.used) % 16
        self.used = start + nbytes
        if self.used > len(self.data):
            # only hundreds of stretches in one slab get here: alignment took more than the slack
            return np.empty(nbytes, np.uint8).data.cast("B")
        return self.data[start : self.used]


def _parts(state: _State, pieces: Sequence[Piece], itemsize: int, slab: Box) -> list[_Part]:
    """The stretches of pieces that lie in a slab."""
    if state.whole:
        return [_Part(p.file, p.begin, volume(p.box.size) * itemsize, state, k, p.box) for k, p in enumerate(pieces)]
    out = []
    for index, piece in enumerate(pieces):
        box = piece.box
        shared = intersect(box, slab)
        if shared is None:
            continue
        offset, stride = 0, itemsize
        for start, base, length in zip(reversed(shared.offset), reversed(box.offset), reversed(box.size), strict=True):
            offset += (start - base) * stride
            stride *= length
        out.append(_Part(piece.file, piece.begin + offset, volume(shared.size) * itemsize, state, index, shared))
    return out


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How the bytes of transfers divided alike meet: the length of each source, and per target what it is made of, in order.

    `parts` is None when rows interleave, so that bytes must be copied together.
    """

    nbytes: tuple[int, ...]
    target_nbytes: tuple[int, ...]
    parts: tuple[tuple[tuple[int, int, int], ...], ...] | None  # per target: source, first byte, byte after the last
    longest: int  # bytes of the largest piece on either side


def _recipe(t: Transfer) -> _Recipe:
    item = ITEMSIZE[t.dtype]
    nbytes = tuple(volume(p.box.size) * item for p in t.sources)
    made = tuple(volume(p.box.size) * item for p in t.targets)
    longest = max((*nbytes, *made), default=0)
    targets = []
    for target in t.targets:
        parts = []
        for s, source in enumerate(t.sources):
            both = intersect(source.box, target.box)
            if both is None:
                continue
            if not (_one_stretch(both, source.box) and _one_stretch(both, target.box)):
                return _Recipe(nbytes, made, None, longest)
            start = _position(both, source.box) * item
            parts.append((_position(both, target.box), s, start, start + volume(both.size) * item))
        targets.append(tuple((s, start, stop) for _, s, start, stop in sorted(parts)))
    return _Recipe(nbytes, made, tuple(targets), longest)


class _Spans(NamedTuple):
    """Stretches of files, one entry of each array per stretch."""

    file: _Ints
    begin: _Ints
    nbytes: _Ints


class _Stack(NamedTuple):
    """Transfers divided alike, their stretches as arrays: all of the first transfer, all of the second, ..."""

    states: Sequence[_State]
    recipe: _Recipe
    pieces: Sequence[Piece]
    sources: _Spans
    targets: _Spans


def _stack(states: Sequence[_State], recipe: _Recipe) -> _Stack:
    pieces = [p for state in states for p in state.transfer.sources]
    targets = [p for state in states for p in state.transfer.targets]
    return _Stack(states, recipe, pieces, _spans(pieces, recipe.nbytes), _spans(targets, recipe.target_nbytes))


def _spans(pieces: Sequence[Piece], nbytes: Sequence[int]) -> _Spans:
    file, begin = np.array([p.file for p in pieces], np.int64), np.array([p.begin for p in pieces], np.int64)
    return _Spans(file, begin, np.tile(np.array(nbytes, np.int64), len(pieces) // max(len(nbytes), 1)))


def _copy(target: memoryview, to: _Ints, source: memoryview, at: _Ints, nbytes: int) -> None:
    """Copy `nbytes` bytes from each place to each other place; by one call where the places are evenly spaced."""
    if len(to) > 2 and _even(to) and _even(at):
        _rows(target, to, nbytes)[:] = _rows(source, at, nbytes)
        return
    for a, b in zip(to.tolist(), at.tolist(), strict=True):
        target[a : a + nbytes] = source[b : b + nbytes]


def _even(places: _Ints) -> bool:
    steps = np.diff(places)
    return bool(steps[0] > 0 and (steps == steps[0]).all())


def _rows(data: memoryview, places: _Ints, nbytes: int) -> Array:
    """A view of evenly spaced stretches, as wide words as fit."""
    first, step = int(places[0]), int(places[1] - places[0])
    size = next(n for n in (8, 4, 2, 1) if not nbytes % n)
    return np.ndarray((len(places), nbytes // size), f"u{size}", data, first, (step, size))


def _has_zeros(t: Transfer) -> bool:
    return ZERO in [p.file for p in t.sources] or ZERO in [p.file for p in t.targets]


def _shared(
    target: Box, held: Sequence[tuple[Box, memoryview, tuple[int, ...] | None]], whole_target: bool
) -> list[tuple[Box, Box, memoryview]]:
    """What the target stretch shares with each source stretch; all of each, where the target is the whole slab."""
    if whole_target:
        return [(box, box, view) for box, view, _ in held]
    out = []
    for box, view, _ in held:
        both = intersect(target, box)
        if both is not None:
            out.append((both, box, view))
    return out


def _direct(target: Box, shared: list[tuple[Box, Box, memoryview]], itemsize: int) -> list[memoryview] | None:
    """The target's bytes as stretches of the source buffers, in order, or None when rows interleave."""
    out = []
    for both, box, view in shared:
        if not ((both is box or _one_stretch(both, box)) and _one_stretch(both, target)):
            return None
        start = _position(both, box) * itemsize if both is not box else 0
        out.append((_position(both, target), view[start : start + volume(both.size) * itemsize]))
    return [view for _, view in sorted(out, key=lambda row: row[0])]


def _one_stretch(inner: Box, outer: Box) -> bool:
    """Whether the elements of `inner` follow each other in the row-major order of `outer`."""
    dim = 0
    while dim < len(inner.size) and inner.size[dim] == 1:
        dim += 1
    return inner.size[dim + 1 :] == outer.size[dim + 1 :]


def _position(inner: Box, outer: Box) -> int:
    at = 0
    for start, base, length in zip(inner.offset, outer.offset, outer.size, strict=True):
        at = at * length + start - base
    return at


def _inside(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(o - base, o - base + n) for o, n, base in zip(inner.offset, inner.size, outer.offset, strict=True))


def _finish(state: _State) -> tuple[tuple[int, ...], ...]:
    return tuple(crc.finish() if isinstance(crc, BlockCrc) else crc or () for crc in state.target_crc)


def _mismatch(file: str, name: str, piece: Piece, found: tuple[int, ...], block: int) -> None:
    bad = next(i for i, (a, b) in enumerate(zip(found, piece.crcs, strict=True)) if a != b)
    start = piece.begin + bad * block
    raise CorruptError(
        f"{file}, tensor {name} {piece.box}, bytes from {start} (block {bad}): "
        f"crc32 is {found[bad]:08x}, the manifest says {piece.crcs[bad]:08x}. Copy this file again from where it was written."
    )
