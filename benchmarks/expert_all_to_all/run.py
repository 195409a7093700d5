"""Throughput of the expert all-to-all, three ways: `python benchmarks/expert_all_to_all/run.py --write`.

    meshpar       mp.ops.expert_all_to_all: dispatch, then combine (the experts between them return their rows)
    bare          the two all_to_all_single calls alone, on the same bytes with the same splits, nothing sorted, counted or added up
    all-gather    every rank gathers all tokens, takes those of its experts by a mask, adds up, and a reduce-scatter brings sums home

Forward only, float32, top-2 routing, on local gloo ranks of one thread each. In every round each contender moves the
rows there and back once, in turn, so that whatever else the machine does hits all alike; a round is timed between barriers, and the slowest
rank counts. Beside it stands the processor time of a rank (all its threads, gloo's included), which waiting and other work on the machine
do not enter. Balanced routing draws experts at random; in skewed routing three of four tokens choose the experts of the first rank.
Before any timing meshpar and all-gather must give the result of one device, in float64.

With `--networks` rows go over a network that is a clock beside the processor time of a rank (`benchmarks/overlap/link.py`): so many GiB/s
of a device, 20 us a message, leaving the core free.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed import _functional_collectives as gathering  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.measuring import Times, in_turn, least_and_middle, line, machine, readme, table, write  # noqa: E402
from benchmarks.overlap.link import Link, slow  # noqa: E402
from meshpar._torch import functional  # noqa: E402
from meshpar.ops import experts, primitives  # noqa: E402
from meshpar.proof import launch  # noqa: E402

MESHPAR, BARE, GATHER = CONTENDERS = ("meshpar", "bare", "all-gather")
CHOICES = 2
ROUTINGS = ("balanced", "skewed")


@dataclass(frozen=True)
class Size:
    """One problem: tokens of each rank, hidden size, experts of each rank."""

    name: str
    tokens: int
    hidden: int
    rounds: int
    local: int = 2

    @property
    def megabytes(self) -> float:
        """What a rank sends each way, its own share included."""
        return self.tokens * CHOICES * self.hidden * 4 / 2**20

    def __str__(self) -> str:
        each = f"{self.tokens} tokens and {self.local} expert{'s' * (self.local > 1)} per rank, hidden {self.hidden}"
        return f"{self.name}: {each}: {self.megabytes:g} MiB of rows per rank and direction"


SIZES = (
    Size("small", 64, 256, 40),
    Size("medium", 512, 1024, 30),
    Size("large", 2048, 1024, 20),
    Size("large, one expert", 2048, 1024, 20, local=1),
)


def routed(size: Size, routing: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens, their experts and weights."""
    world = dist.get_world_size()
    torch.manual_seed(dist.get_rank())
    score = torch.rand(size.tokens, size.local * world)
    if routing == "skewed":
        score[: size.tokens * 3 // 4, : size.local] += 1
    weights, index = score.topk(CHOICES)
    order = torch.randperm(size.tokens)
    return torch.randn(size.tokens, size.hidden, dtype=dtype), index[order], weights[order].to(dtype)


def by_all_gather(hidden: Tensor, index: Tensor, weights: Tensor, local: int) -> Tensor:
    """What one writes without an all-to-all."""
    group = dist.group.WORLD
    assert group is not None
    whole, chosen, weight = (gathering.all_gather_tensor(x, 0, group) for x in (hidden, index, weights))
    first = dist.get_rank() * local
    token, slot = ((chosen >= first) & (chosen < first + local)).nonzero(as_tuple=True)
    rows = whole.index_select(0, token) * weight[token, slot].unsqueeze(1)
    return gathering.reduce_scatter_tensor(torch.zeros_like(whole).index_add_(0, token, rows), "sum", 0, group)


def contenders(hidden: Tensor, index: Tensor, weights: Tensor, local: int) -> dict[str, Callable[[], Tensor]]:
    group, total = dist.group.WORLD, local * dist.get_world_size()
    assert group is not None
    operator = mp.ops.expert_all_to_all
    sorted_, _, dispatched = operator.dispatch(hidden, index, total)
    sent, received = dispatched.route.splits[:, :-1].unflatten(1, (dist.get_world_size(), -1)).sum(2).tolist()
    there = hidden.repeat_interleave(CHOICES, 0)

    def ours() -> Tensor:
        rows, _, dispatched = operator.dispatch(hidden, index, total)
        return operator.combine(rows, dispatched, weights)

    def bare() -> Tensor:
        primitives.call(functional.all_to_all_single.default, there, received, sent, group.group_name)
        return primitives.call(functional.all_to_all_single.default, sorted_, sent, received, group.group_name)

    return {MESHPAR: ours, BARE: bare, GATHER: lambda: gathering.wait_tensor(by_all_gather(hidden, index, weights, local))}


def check() -> dict[str, float]:
    """The largest difference from one device in float64."""
    worst = dict.fromkeys((MESHPAR, GATHER), 0.0)
    for routing in ROUTINGS:
        hidden, index, weights = routed(SIZES[0], routing, torch.float64)
        x, _, perm = experts.dispatch(hidden, index, SIZES[0].local * dist.get_world_size())
        expected = experts.combine(x, perm, weights)
        for name in worst:
            worst[name] = max(worst[name], (contenders(hidden, index, weights, SIZES[0].local)[name]() - expected).abs().max().item())
    if worst[MESHPAR] > 0 or worst[GATHER] > 1e-12:
        raise SystemExit(f"results differ from one device's: {worst}")
    return worst


def profile(size: Size, routing: str) -> str:
    """Where meshpar's time goes, by operator."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    ours = contenders(*routed(size, routing, torch.float32), size.local)[MESHPAR]
    for _ in range(3):
        ours()
    with profiler(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(10):
            dist.barrier()
            ours()
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)


def worker(sizes: list[str], rounds: int | None, profiled: bool) -> dict[tuple[str, str], Times] | str:
    """What every rank runs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[tuple[str, str], Times] = {}
    with torch.no_grad():
        if profiled:
            return profile(next(s for s in SIZES if s.name == sizes[0]), ROUTINGS[0])
        worst = check()
        if dist.get_rank() == 0:
            print("  differences from one device:", {n: f"{w:.1e}" for n, w in worst.items()}, flush=True)
        for size in SIZES:
            for routing in ROUTINGS if size.name in sizes else ():
                steps = contenders(*routed(size, routing, torch.float32), size.local)
                results[size.name, routing] = times = in_turn(steps, rounds or size.rounds)
                if dist.get_rank() == 0:
                    print("  " + row(dist.get_world_size(), size, routing, times), flush=True)
    return results


def over(network: float, rounds: int) -> dict[str, dict[str, float]]:
    """By routing and contender: the median seconds of large messages over a network of so many GiB/s; the slowest rank counts."""
    torch.set_num_threads(1)
    size, link, found = SIZES[2], Link(2e-5, network * 2**30), dict[str, dict[str, float]]()
    for routing in ROUTINGS:
        steps = contenders(*routed(size, routing, torch.float32), size.local)
        taken = {name: list[float]() for name in (MESHPAR, BARE)}
        with slow(link), torch.no_grad():
            for turn in range(rounds + 2):
                for name, times in taken.items():
                    dist.barrier()
                    link.clear()
                    steps[name]()
                    longest = torch.tensor(link.now)
                    dist.all_reduce(longest, dist.ReduceOp.MAX)
                    if turn > 1:
                        times.append(longest.item())
        found[routing] = {name: statistics.median(times) for name, times in taken.items()}
    return found


def networks(speeds: Sequence[float], rounds: int) -> list[str]:
    """The table over networks that are clocks, two ranks."""
    lines = []
    for speed in speeds:
        for routing, found in launch.run(over, speed, rounds, world=2)[0].items():
            ms = [f"{found[name] * 1e3:.1f}" for name in (MESHPAR, BARE)]
            lines.append(line([f"{speed:g}", routing, *ms, f"{found[BARE] / found[MESHPAR]:.2f}"]))
    return table(("network, GiB/s", "routing", MESHPAR, BARE, "of bare"), lines)


def row(world: int, size: Size, routing: str, times: Times) -> str:
    """One line of the table."""
    cells = [str(world), size.name, routing]
    for kind in (0, 1):
        least, middle = least_and_middle(times, kind)
        if kind == 0:
            cells += [f"{2 * size.megabytes / 1024 / least[MESHPAR] * 1e3:.2f}"]
        cells += [f"{least[name]:.1f} / {middle[name]:.1f}" for name in CONTENDERS]
        cells += [f"{least[other] / least[MESHPAR]:.2f} / {middle[other] / middle[MESHPAR]:.2f}" for other in (BARE, GATHER)]
    return line(cells)


_COLUMNS = (*CONTENDERS, "of bare", "of all-gather")
HEAD = ("ranks", "size", "routing", "GiB/s", *_COLUMNS, *(f"cpu: {name}" for name in _COLUMNS))


def report(rows: list[str], rounds: int | None) -> str:
    """The README's text."""
    sizes = [f"- {size}, {rounds or size.rounds} rounds" for size in SIZES]
    legend = (
        "Milliseconds there and back, minimum / median, wall time first, then processor time. GiB/s: a rank's rows in both directions over "
        "meshpar's least wall time. Of bare, of all-gather: meshpar's throughput over theirs, by minima / by medians; 1 is as fast as the "
        "other, more is faster."
    )
    where = machine("gloo", "all ranks share the cores")
    script = "benchmarks/expert_all_to_all/run.py"
    return readme("Expert all-to-all: throughput", __doc__, *sizes, "", legend, "", *table(HEAD, rows), where=where, script=script)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--sizes", nargs="+", default=[size.name for size in SIZES])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--profile", action="store_true", help="print where meshpar spends its time instead (rank 0, first size)")
    parser.add_argument("--write", action="store_true", help="write the table to README.md beside this file")
    parser.add_argument("--networks", type=float, nargs="+", help="GiB/s of a device: print large messages over such networks instead")
    options = parser.parse_args()
    if options.networks:
        print("\n".join(networks(options.networks, options.rounds or 20)))
        return
    rows = []
    for world in options.worlds:
        print(f"{world} ranks", flush=True)
        found = launch.run(worker, options.sizes, options.rounds, options.profile, world=world)[0]
        if options.profile:
            print(found)
            continue
        chosen = [size for size in SIZES if size.name in options.sizes]
        rows += [row(world, size, routing, found[size.name, routing]) for size in chosen for routing in ROUTINGS]
    if rows:
        text = report(rows, options.rounds)
        print(text)
        if options.write:
            write(HERE / "README.md", text)


if __name__ == "__main__":
    main()
