"""Seconds of collectives on this machine, by kind, group, ranks and size; and how much slower ranks compute when there are several.

Runs on every rank of a process group (`proof.launch`). All points are timed in turn, in several rounds; of a round the slowest rank
counts, of all rounds the least. Computation is timed on the processor: what ranks that share cores and caches cost each other, without
what they wait for a core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from meshpar._torch import functional
from meshpar.planner.measured import Curve, rising

BYTES = (2**10, 2**14, 2**17, 2**19, 2**21, 2**23)
Point = tuple[str, int]
"""Name of a curve, bytes."""


def measure(rounds: int) -> tuple[dict[str, Curve], float]:
    """Curves of this number of ranks, and seconds of one and the same computation on all of them at once."""
    world = dist.get_world_size()
    calls = {point: call for size in sizes(world) for point, call in _calls(_groups(world, size), size, world).items()}
    work = _work()
    points: dict[Point, float] = {}
    least = float("inf")
    for turn in range(rounds + 1):
        for point, call in calls.items():
            took = _slowest(call, _repeats(points.get(point))) / (2 if point[0].startswith("send") else 1)
            points[point] = took if turn <= 1 else min(points[point], took)  # the first round makes connections
        least = min(least, *(_busy(work) for _ in range(5)))
    found: dict[str, list[tuple[float, float]]] = {}
    for (name, size), seconds in points.items():
        found.setdefault(name, []).append((float(size), seconds))
    return {name: rising(sorted(pairs)) for name, pairs in found.items()}, least


def sizes(world: int) -> tuple[int, ...]:
    """The groups that are measured among so many ranks: powers of two, and all."""
    return tuple(sorted({world, *(2**i for i in range(1, world.bit_length()) if world % 2**i == 0 and 2**i <= world)} - {1}))


def _groups(world: int, size: int) -> dist.ProcessGroup:
    """This rank's group among neighbours of `size`."""
    if size == world:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    made = [dist.new_group(list(range(start, start + size))) for start in range(0, world, size)]
    return made[dist.get_rank() // size]


def _calls(group: dist.ProcessGroup, size: int, world: int) -> Mapping[Point, Callable[[], object]]:
    name = group.group_name
    found: dict[Point, Callable[[], object]] = {}
    for count in BYTES:
        whole, part = torch.zeros(count // 4), torch.zeros(count // 4 // size)
        splits = [whole.numel() // size] * size
        even = torch.zeros(splits[0] * size)
        for kind, call in _KINDS.items():
            found[f"{kind} {size} of {world}", count] = _bound(call, whole, part, even, splits, size, name)
        if size == 2:
            found[f"send 2 of {world}", count] = _sent(whole, group)
    return found


def _bound(call: Callable[..., Tensor], *args: object) -> Callable[[], object]:
    return lambda: functional.wait_tensor.default(call(*args))


_KINDS: Mapping[str, Callable[..., Tensor]] = {
    "all_reduce": lambda whole, part, even, splits, size, name: functional.all_reduce.default(whole, "sum", name),
    "all_gather": lambda whole, part, even, splits, size, name: functional.all_gather_into_tensor.default(part, size, name),
    "reduce_scatter": lambda whole, part, even, splits, size, name: functional.reduce_scatter_tensor.default(even, "sum", size, name),
    "all_to_all": lambda whole, part, even, splits, size, name: functional.all_to_all_single.default(even, splits, splits, name),
}
"""Kind -> the call. Bytes are those of the whole tensor, of an all-to-all those that a rank gives away."""


def _sent(whole: Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    """One way between neighbours, as pipelines send."""
    ranks = dist.get_process_group_ranks(group)
    sends = dist.get_rank() == ranks[0]
    peer = ranks[1] if sends else ranks[0]

    def call() -> None:
        for first in (True, False):  # there and back
            op = dist.isend if sends == first else dist.irecv
            for work in dist.batch_isend_irecv([dist.P2POp(op, whole, peer, group)]):
                work.wait()

    return call


def _repeats(seconds: float | None) -> int:
    return 1 if seconds is None else max(1, min(20, round(3e-3 / seconds)))


def _slowest(call: Callable[[], object], repeats: int) -> float:
    """Seconds of a call on the slowest rank, the ranks beginning together."""
    count = torch.tensor([repeats])
    dist.all_reduce(count, dist.ReduceOp.MIN)
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(int(count)):
        call()
    took = torch.tensor([(time.perf_counter() - begun) / int(count)], dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def _busy(call: Callable[[], object]) -> float:
    """Seconds of a processor for a call that all ranks make at once, of the rank that needs most."""
    dist.barrier()
    begun = time.process_time()
    call()
    took = torch.tensor([time.process_time() - begun], dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def _work() -> Callable[[], object]:
    """Products and traffic, a millisecond of each."""
    x, w, y = torch.randn(256, 256), torch.randn(256, 256), torch.randn(2**18)

    def call() -> None:
        for _ in range(4):
            x @ w
            y + y

    return call
