"""Moving tensors between divisions, in bounded memory: jobs go to workers with two buffers each; what is finished is told in one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from meshpar.checkpoint.format.boxes import whole
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.format.table import Crcs, Ints
from meshpar.checkpoint.move import stacks
from meshpar.checkpoint.move.channel import Buffer, Channel, Files, Traffic
from meshpar.checkpoint.move.jobs import Batch, Job, Large, jobs
from meshpar.checkpoint.move.slabwise import Slabs, State
from meshpar.checkpoint.move.transfer import Options, Order, Transfers, check_memory


class Finished(NamedTuple):
    """Transfers that are done: a group, rows of it, and for each row the checksums of its targets, one after the other."""

    group: int
    rows: Ints
    crcs: Crcs


Done = Callable[[Finished], None]


def run(transfers: Sequence[Transfers], order: Order, source: Files, target: Files, options: Options, disk: Disk, done: Done) -> Traffic:
    """Move the transfers named by `order`. `done` is called, in one thread, with all that are finished.

    Raises CorruptError at the first source block that does not match its checksum.
    """
    check_memory(transfers, options)
    channel = Channel(source, target, options, disk)
    work = jobs(transfers, order, options)
    if options.workers == 1:
        worker = _Worker(transfers, channel)
        for job in work:
            for finished in worker.job(job):
                done(finished)
    else:
        _run_threads(transfers, work, channel, done)
    return channel.traffic


def _run_threads(transfers: Sequence[Transfers], work: Iterator[Job], channel: Channel, done: Done) -> None:
    lock, stop, count = threading.Lock(), threading.Event(), channel.options.workers
    results: queue.Queue[list[Finished] | BaseException | None] = queue.Queue()

    def act() -> None:
        try:
            worker = _Worker(transfers, channel)
            while not stop.is_set():
                with lock:
                    job = next(work, None)
                if job is None:
                    break
                results.put(worker.job(job, stop))
        except BaseException as error:
            stop.set()
            results.put(error)
        finally:
            results.put(None)

    threads = [threading.Thread(target=act, daemon=True) for _ in range(count)]
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
                for finished in item:
                    done(finished)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failure is not None:
        raise failure


class _Worker:
    """One thread's buffers, and what it does with a job."""

    def __init__(self, transfers: Sequence[Transfers], channel: Channel) -> None:
        self._transfers, self._channel = transfers, channel
        self._in, self._out = Buffer(channel.options.buffer), Buffer(channel.options.buffer)
        self._slabs = Slabs(channel, self._in, self._out)

    def job(self, job: Job, stop: threading.Event | None = None) -> list[Finished]:
        """Do a job; returns the transfers it finished."""
        return self._batch(job.order) if isinstance(job, Batch) else self._large(job, stop)

    def _batch(self, order: Order) -> list[Finished]:
        """Small transfers: in stacks where they are simple, else one by one."""
        simple: list[tuple[int, stacks.Stack]] = []
        rest: list[tuple[int, int, State]] = []
        for group in sorted(set(order.group.tolist())):
            t, rows = self._transfers[group], order.row[order.group == group]
            if len(rows) >= stacks.SOME and stacks.is_simple(t, self._channel.options):
                simple.append((group, stacks.Stack.of(t, rows)))
            else:
                rest += [(group, row, State(t.one(row), is_whole=True)) for row in rows.tolist()]
        out = []
        if simple:
            self._in.reset()
            self._out.reset()
            crcs = stacks.move([stack for _, stack in simple], self._channel, self._in, self._out)
            out += [Finished(group, stack.rows, found) for (group, stack), found in zip(simple, crcs, strict=True)]
        if rest:
            self._slabs.move([(state, whole(state.transfer.shape)) for _, _, state in rest])
            out += [_finished(group, row, state) for group, row, state in rest]
        return out

    def _large(self, job: Large, stop: threading.Event | None) -> list[Finished]:
        state = State(self._transfers[job.group].one(job.row), is_whole=len(job.slabs) == 1)
        for slab in job.slabs:
            if stop is not None and stop.is_set():
                return []
            if state.transfer.rearrange is not None:
                self._slabs.rearrange(state, slab)
            else:
                self._slabs.move([(state, slab)])
        return [_finished(job.group, job.row, state)]


def _finished(group: int, row: int, state: State) -> Finished:
    return Finished(group, np.array([row], np.int64), np.array([state.finish()], np.uint32))
