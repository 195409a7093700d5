"""A slow network between local gloo ranks: a collective takes a latency and its bytes over a bandwidth, and leaves the core free.

One message after the other, in the order in which they were started, as on one link. Two numbers come out of it: how long the network was
busy, and how much of that the program stood still for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from benchmarks.tensor_parallel import handwritten
from meshpar._torch import resolve_process_group
from meshpar.ops import expert_all_to_all, expert_pieces, primitives

SENT = {  # of the bytes of what is handed in, or comes out, the share that a device sends, with ring algorithms
    "all_reduce": lambda x, size: 2 * x.nbytes * (size - 1) / size,
    "all_reduce_": lambda x, size: 2 * x.nbytes * (size - 1) / size,
    "all_gather_into_tensor": lambda x, size: x.nbytes * (size - 1),
    "reduce_scatter_tensor": lambda x, size: x.nbytes * (size - 1) / size,
    "all_gather_single": lambda x, size: x.nbytes * (size - 1),
    "reduce_scatter_single": lambda x, size: x.nbytes * (size - 1) / size,
}


@dataclass
class Link:
    """The network as a clock: `latency` in seconds, `bandwidth` in bytes per second and device.

    Time is the processor time of this thread, and what it waited for the network by this clock; messages go one after the other. Nothing
    sleeps, so that other work on the machine, and ranks that are late, do not count.
    """

    latency: float
    bandwidth: float
    busy: float = 0.0
    exposed: float = 0.0
    _free: float = 0.0
    _begun: float = 0.0

    def clear(self) -> None:
        """Begin to count."""
        self.busy = self.exposed = self._free = 0.0
        self._begun = time.thread_time()

    @property
    def now(self) -> float:
        """Seconds since `clear`."""
        return time.thread_time() - self._begun + self.exposed

    def takes(self, nbytes: float) -> float:
        """Seconds of a message."""
        return self.latency + nbytes / self.bandwidth

    def carry(self, nbytes: float, arrive: Callable[[], Any]) -> Callable[[], Any]:
        """Send; `arrive` waits for gloo. What is returned waits until the network has done it, too."""
        takes = self.takes(nbytes)
        self.busy += takes
        self._free = done = max(self._free, self.now) + takes

        def wait() -> Any:
            self.exposed += max(0.0, done - self.now)
            return arrive()

        return wait


@dataclass
class Sleeping(Link):
    """The same on a real clock: a thread waits for gloo, then sleeps as long as the network takes."""

    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def clear(self) -> None:
        super().clear()
        self._begun = time.perf_counter()

    @property
    def now(self) -> float:
        return time.perf_counter() - self._begun

    def carry(self, nbytes: float, arrive: Callable[[], Any]) -> Callable[[], Any]:
        takes = self.takes(nbytes)
        self.busy += takes

        def travel() -> tuple[Any, float]:
            found, came = arrive(), self.now
            time.sleep(takes)
            return found, came

        flying = self._thread.submit(travel)

        def wait() -> Any:
            asked = self.now
            found, came = flying.result()
            self.exposed += min(takes, max(0.0, self.now - max(asked, came)))  # (not: for ranks that are late)
            return found

        return wait


@contextmanager
def slow(link: Link) -> Iterator[None]:
    """Inside, the collectives of graphs, those of `handwritten` and FSDP2, and what stages of pipelines receive, go over `link`."""
    begin, start, batched = primitives.begin, primitives.start_messages, dist.batch_isend_irecv

    def received(ops: list[dist.P2POp]) -> list[Any]:
        return [
            _Arriving(link.carry(op.tensor.nbytes, work.wait)) if op.op is dist.irecv else work
            for op, work in zip(ops, batched(ops), strict=True)
        ]

    def begun(op: Any, x: Tensor, *args: Any) -> Callable[[], Tensor]:
        name = op._schema.name.partition("::")[2]
        group = resolve_process_group(args[-1])
        sent = SENT[name](x, group.size()) if name in SENT else x.nbytes * (1 - args[1][group.rank()] / max(1, x.shape[0]))
        return link.carry(sent, begin(op, x, *args))

    def started(gone: Any, come: Any, group: str) -> Callable[[], None]:
        return link.carry(sum(x.nbytes for x, _, _ in gone), start(gone, come, group))

    def shared_out(name: str, real: Any) -> Any:
        def run(output: Tensor, input: Tensor, group: Any, async_op: bool = False, **more: Any) -> Any:
            work = real(output, input, group=group, async_op=True, **more)
            arrive = link.carry(SENT[name](input, group.size()), work.wait)
            return _Flying(arrive) if async_op else arrive() and None

        return run

    of_fsdp = {name: getattr(dist, name) for name in ("all_gather_single", "reduce_scatter_single")}
    for name, real in of_fsdp.items():
        setattr(dist, name, shared_out(name, real))
    primitives.begin = expert_all_to_all.begin = expert_pieces.begin = begun  # type: ignore[attr-defined]
    expert_all_to_all.start_messages = expert_pieces.start_messages = started  # type: ignore[attr-defined]
    handwritten.dist = _ByHand(link)  # type: ignore[attr-defined]
    dist.batch_isend_irecv = received
    try:
        yield
    finally:
        primitives.begin = expert_all_to_all.begin = expert_pieces.begin = begin  # type: ignore[attr-defined]
        expert_all_to_all.start_messages = expert_pieces.start_messages = start  # type: ignore[attr-defined]
        handwritten.dist = dist  # type: ignore[attr-defined]
        dist.batch_isend_irecv = batched
        for name, real in of_fsdp.items():
            setattr(dist, name, real)


@dataclass
class _Arriving:
    """A message to a stage, which is waited for."""

    arrive: Callable[[], Any]

    def wait(self) -> Any:
        return self.arrive()


class _Flying(dist.Work):
    """A collective of FSDP2's that was asked to run beside."""

    def __init__(self, arrive: Callable[[], Any]) -> None:
        super().__init__()
        self._arrive = arrive

    def wait(self, timeout: Any = None) -> bool:
        self._arrive()
        return True


@dataclass
class _ByHand:
    """What `handwritten` knows of torch.distributed: it waits for each collective where it is called."""

    link: Link
    get_rank = staticmethod(dist.get_rank)
    get_world_size = staticmethod(dist.get_world_size)

    def all_reduce(self, x: Tensor) -> None:
        self._run("all_reduce", x)

    def all_gather_into_tensor(self, out: Tensor, x: Tensor) -> None:
        self._run("all_gather_into_tensor", out, x)

    def reduce_scatter_tensor(self, out: Tensor, x: Tensor) -> None:
        self._run("reduce_scatter_tensor", out, x)

    def _run(self, name: str, *tensors: Tensor) -> None:
        nbytes = SENT[name](tensors[-1], dist.get_world_size())
        self.link.carry(nbytes, getattr(dist, name)(*tensors, async_op=True).wait)()
