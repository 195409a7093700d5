"""Context parallelism on local gloo ranks: `python benchmarks/context/run.py --write`.

    time       a step of a Llama of two layers (8 query heads on 2 of keys and values): gather, heads, ring, and tensor parallelism with
               sequence parallelism on as many ranks, against one process
    memory     the most bytes of tensors that a rank has during a step, counted (not the process's): how they grow with the length
    longest    the longest sequence that stays under a limit of such bytes
    balance    processor time of the ranks in causal attention, the largest against the mean, in one piece and from both ends

A step is forward and backward in float32, each rank one thread. Contenders take turns; a step is timed between barriers, and the slowest
rank counts. Beside wall time stands the processor time of a rank, which waiting does not enter. Lengths are positions of one sample.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.measuring import Times, in_turn, least_and_middle, line, machine, readme, table, write  # noqa: E402
from meshpar.dry_run.tape import MachineTape, levels  # noqa: E402
from meshpar.ops.context import attention_at  # noqa: E402
from meshpar.proof import launch  # noqa: E402
from meshpar.sharding.types import Shard  # noqa: E402

FORMS = ("gather", "heads", "ring")
CONTENDERS = (*FORMS, "tp")
PARTS = ("time", "memory", "longest", "balance")


def model(layers: int = 2, hidden: int = 256) -> nn.Module:
    """A Llama with heads of 32."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(2, hidden // 128),
        vocab_size=512,
        max_position_embeddings=2**20,
    )
    return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def batch(length: int) -> dict[str, Tensor]:
    """One sample."""
    torch.manual_seed(1)
    ids = torch.randint(0, 512, (1, length))
    return {"input_ids": ids, "labels": ids}


def parallel(name: str, length: int, recompute: str = "none") -> Any:
    """The model by one of the contenders."""
    axis = "tp" if name == "tp" else "cp"
    form: Any = "auto" if name == "tp" else name
    config = mp.ParallelConfig(context=form, data_parallel="replicate", recompute=recompute)  # type: ignore[arg-type]
    return mp.parallelize(model(), mp.make_mesh(f"{axis}={dist.get_world_size()}"), example=batch(length), config=config)


def timed(length: int, rounds: int) -> Times:
    """Every step of every contender, on each rank."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = batch(length)
    made = {name: parallel(name, length) for name in CONTENDERS}
    return in_turn({name: (lambda pm=pm: pm.train_step(**data)) for name, pm in made.items()}, rounds)


def alone(length: int, rounds: int) -> Times:
    """The model itself, in one process of the same kind."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    whole, data = model(), batch(length)
    return in_turn({"one process": lambda: whole(**data).loss.backward()}, rounds)


def most_bytes(name: str, length: int) -> int:
    """The most bytes of tensors during a second step."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = batch(length)
    if name == "one process":
        whole = model()

        def step() -> object:
            return whole(**data).loss.backward()
    else:
        pm = parallel(name, length)

        def step() -> object:
            return pm.train_step(**data)

    step()
    with MachineTape() as tape:
        step()
    return max(levels(tape.storages.changes))


def longest(name: str, world: int, limit: int, first: int = 512) -> tuple[int, int]:
    """The longest sequence, by halves of powers of two, of which a step stays under `limit` bytes; and its bytes."""
    best, length = (0, 0), first
    while (used := max(launch.run(most_bytes, name, length, world=world))) <= limit:
        best, length = (length, used), length * 2
    between = best[0] * 3 // 2
    if between and (used := max(launch.run(most_bytes, name, between, world=world))) <= limit:
        best = (between, used)
    return best


def balance(length: int, size: int) -> list[str]:
    """Processor time of each rank's queries, one after the other in this process."""
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 4, length, 32) for _ in range(3))
    cells = [str(size), str(length)]
    for segments in (((length, 1),), ((length // 2, 1), (-length // 2, 1))):
        spent = []
        for rank in range(size):
            ranges = Shard(2, 1, segments).ranges(size, rank)
            own = torch.cat([q[:, :, low:high] for low, high in ranges], 2)
            least = []
            for _ in range(5):
                start = time.process_time()
                attention_at(own, k, v, ranges)
                least.append(time.process_time() - start)
            spent.append(min(least))
        cells.append(f"{max(spent) * size / sum(spent):.2f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--limit", type=float, default=2.0, help="GiB of tensors on a rank")
    parser.add_argument("--write", action="store_true", help="write the tables to README.md beside this file")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    body: list[str] = []
    if "time" in options.parts:
        body += ["Milliseconds per step, minimum / median of wall time; then of processor time.", ""] + _times(options)
    if "memory" in options.parts:
        body += ["", "The most MiB of tensors on a rank during a step.", ""] + _memory(options)
    if "longest" in options.parts:
        body += ["", f"The longest sequence under {options.limit:g} GiB, and its MiB.", ""] + _longest(options)
    if "balance" in options.parts:
        rows = [line(balance(max(options.lengths), size)) for size in options.worlds]
        body += ["", "Processor time of the ranks in causal attention, max / mean.", ""]
        body += table(("ranks", "length", "in one piece", "from both ends"), rows)
    where = machine(f"transformers {transformers.__version__}", "gloo", "all ranks share the cores")
    text = readme("Context parallelism", __doc__, *body, where=where, script="benchmarks/context/run.py")
    print(text)
    if options.write:
        write(HERE / "README.md", text)


def _times(options: argparse.Namespace) -> list[str]:
    rows = []
    for length in options.lengths:
        single = launch.run(alone, length, options.rounds, world=1)[0]
        for world in options.worlds:
            found = single | launch.run(timed, length, options.rounds, world=world)[0]
            cells = [str(length), str(world)]
            for kind in (0, 1):
                least, middle = least_and_middle(found, kind)
                cells += [f"{least[name]:.0f} / {middle[name]:.0f}" for name in ("one process", *CONTENDERS)]
            rows.append(line(cells))
    names = ("one process", *CONTENDERS)
    return table(("length", "ranks", *names, *(f"cpu: {name}" for name in names)), rows)


def _memory(options: argparse.Namespace) -> list[str]:
    rows = []
    for length in options.lengths:
        single = launch.run(most_bytes, "one process", length, world=1)[0]
        for world in options.worlds:
            used = [max(launch.run(most_bytes, name, length, world=world)) for name in CONTENDERS]
            rows.append(line([str(length), str(world), *(f"{n / 2**20:.0f}" for n in (single, *used))]))
    return table(("length", "ranks", "one process", *CONTENDERS), rows)


def _longest(options: argparse.Namespace) -> list[str]:
    limit = int(options.limit * 2**30)
    rows = [line(["1", "one process", *_shown(longest("one process", 1, limit))])]
    rows += [line([str(world), name, *_shown(longest(name, world, limit))]) for world in options.worlds for name in ("ring", "gather")]
    return table(("ranks", "form", "length", "MiB"), rows)


def _shown(found: tuple[int, int]) -> list[str]:
    return [str(found[0]), f"{found[1] / 2**20:.0f}"]


if __name__ == "__main__":
    main()
