"""Context parallelism on local gloo ranks: `python benchmarks/context/run.py --write`.

    time       a step of a Llama of two layers (8 query heads on 2 of keys and values): gather, heads, ring, and tensor parallelism with
               sequence parallelism on as many ranks, against one process
    memory     the most bytes of tensors that a rank has during a step beside parameters, their gradients and the optimizer's: how they grow
    longest    the longest sequence that stays under a limit of such bytes, of two wider layers
    balance    processor time of the ranks in causal attention, the largest against the mean, in one piece and from both ends
    documents  of documents packed into one sequence, causal in each: pairs of positions in the tiles that the rank with most computes in a
               ring, against the mean, in so many pieces a rank, and in as many as are chosen; counted
    planned    131,072 positions of a model of 70B (80 blocks of 8192, 64 heads) over cp=8 and tp=8, bf16, recompute="selective", on ranks
               that are not here: what is chosen, what a rank sends for a block, its memory, and how long the plan takes

A step is forward and backward in float32, each rank one thread. Contenders take turns; a step is timed between barriers, and the slowest
rank counts. Beside wall time stands the processor time of a rank, which waiting does not enter. Lengths are positions of one sample.
Memory is that of a dry run: the rank's program on tensors without memory, every byte counted as it comes and goes, so no clock enters it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.measuring import Times, in_turn, least_and_middle, line, machine, readme, table, write  # noqa: E402
from meshpar.compile.balance import fewest  # noqa: E402
from meshpar.dry_run.rehearsal import absent  # noqa: E402
from meshpar.ops.context import attention_at  # noqa: E402
from meshpar.ops.uneven import Visible, pairs  # noqa: E402
from meshpar.proof import launch  # noqa: E402
from meshpar.sharding.extents import dealt_out  # noqa: E402
from meshpar.sharding.types import Shard, plain  # noqa: E402

FORMS = ("gather", "heads", "ring")
CONTENDERS = (*FORMS, "tp")
ALONE = "one process"
PARTS = ("time", "memory", "longest", "balance", "documents", "planned")
CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128)
DOCUMENTS = ((400, 1.0), (1800, 1.2), (8100, 1.0))
"""The median of their lengths, which are log-normal, and sigma."""


def model(hidden: int = 256, heads: int = 8) -> nn.Module:
    """A Llama of two layers."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=2**20,
    )
    return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def batch(length: int) -> dict[str, Tensor]:
    """One sample."""
    torch.manual_seed(1)
    ids = torch.randint(0, 512, (1, length))
    return {"input_ids": ids, "labels": ids}


def wanted(name: str) -> mp.ParallelConfig:
    """The configuration of a contender."""
    return mp.ParallelConfig(context="auto" if name in ("tp", ALONE) else name, data_parallel="replicate")  # type: ignore[arg-type]


def mesh_of(name: str, world: int) -> str:
    return f"{'tp' if name == 'tp' else 'cp'}={world}"


def timed(lengths: Sequence[int], rounds: int) -> list[Times]:
    """Every step of every contender on each rank, by length."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for length in lengths:
        data, steps = batch(length), {}
        for name in CONTENDERS:
            mesh = mp.make_mesh(mesh_of(name, dist.get_world_size()))
            pm = mp.parallelize(model(), mesh, example=data, config=wanted(name))
            steps[name] = partial(pm.train_step, **data)
        found.append(in_turn(steps, **_rounds(length, rounds)))
    return found


def alone(lengths: Sequence[int], rounds: int) -> list[Times]:
    """The model itself, in one process of the same kind."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    whole = model()

    def step(data: dict[str, Tensor]) -> None:
        whole(**data).loss.backward()

    return [in_turn({ALONE: partial(step, batch(length))}, **_rounds(length, rounds)) for length in lengths]


def _rounds(length: int, rounds: int) -> dict[str, int]:
    """Long steps, which start no slower than they go on, are taken fewer times."""
    return {"rounds": max(1, min(rounds, rounds * 8192 // length)), "unmeasured": 3 if length <= 8192 else 1}


def most_bytes(name: str, world: int, length: int, hidden: int = 256) -> int:
    """The most bytes of a rank during a step beside parameters, gradients and optimizer: of a dry run."""
    rank = mp.dry_run(model(hidden), mesh_of(name, world), wanted(name), example=batch(length)).ranks[0]
    return int(rank.activations + rank.buffers)


def longest(name: str, world: int, limit: int, hidden: int, first: int = 2048) -> tuple[int, int]:
    """The longest sequence, among powers of two and the middles between them, of which a step stays under `limit`; and its bytes."""
    best, length = (0, 0), first
    while (used := most_bytes(name, world, length, hidden)) <= limit:
        best, length = (length, used), length * 2
    between = best[0] * 3 // 2
    if between and (used := most_bytes(name, world, between, hidden)) <= limit:
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


def documents(length: int, median: float, sigma: float) -> Visible:
    """Drawn documents that fill a sequence: each query sees those of its own before it, and itself."""
    starts, end = torch.empty(length, dtype=torch.long), 0
    while end < length:
        size = max(1, round(float(torch.empty(1).log_normal_(math.log(median), sigma))))
        starts[end : end + size] = end
        end += size
    keys = torch.arange(length)
    return Visible(length, any_of=lambda low, high: (keys >= starts[low]) & (keys < high))


def of_documents(size: int, length: int, median: float, sigma: float, draws: int) -> list[str]:
    """A row of the table: means over draws."""
    torch.manual_seed(0)
    uneven, computed, chosen = [list[float]() for _ in CHUNKS], list[float](), list[int]()
    whole = sum(pairs(Visible(length, causal=True), plain(0, length), 1))
    for _ in range(draws):
        shown = documents(length, median, sigma)
        counts = [pairs(shown, plain(0, length) if n == 1 else Shard(0, 1, dealt_out(length, n)), size) for n in CHUNKS]
        found = {n: max(one) * size / sum(one) for n, one in zip(CHUNKS, counts, strict=True)}
        for column, n in zip(uneven, CHUNKS, strict=True):
            column.append(found[n])
        chosen.append(fewest(found))
        computed.append(sum(counts[CHUNKS.index(chosen[-1])]) / whole)
    best = [uneven[CHUNKS.index(n)][at] for at, n in enumerate(chosen)]
    cells = [f"{median:g} (sigma {sigma:g})", str(size), *(f"{sum(column) / draws:.2f}" for column in uneven)]
    return [*cells, f"{sum(best) / draws:.3f}", f"{max(best):.2f}", f"{sum(chosen) / draws:.0f}", f"{sum(computed) / draws:.2f}"]


def planned(layers: int, kv: int, window: int | None, context: str, mesh: str = "cp=8,tp=8", length: int = 131072) -> list[str]:
    """A row of the table: a plan, made on `meta` and ranks that are not here."""
    config = transformers.MistralConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=kv,
        vocab_size=128256,
        max_position_embeddings=length,
        sliding_window=window,
    )
    with torch.device("meta"):
        large = transformers.MistralForCausalLM(config).bfloat16()
    ids = torch.empty(1, length, dtype=torch.long, device="meta")
    began = time.perf_counter()
    with absent(mesh) as there:
        wanted = mp.ParallelConfig(context=context, recompute="selective")  # type: ignore[arg-type]
        pm = mp.parallelize(large, there, config=wanted, example={"input_ids": ids, "labels": ids})
        took = time.perf_counter() - began
        form = next(row.split()[2] for row in str(pm.explain()).splitlines() if "layers.*.self_attn  x" in row)
        sent = [c for c in pm.comms() if c.module.startswith("model.layers.1.")]
        memory = pm.memory()
    over = [sum(c.nbytes for c in sent if c.axis == "cp" and c.phase == phase) / 2**20 for phase in ("forward", "backward")]
    cells = [str(kv), str(window or "-"), f'"{context}"', form, *(f"{n:.0f}" for n in over)]
    return [*cells, f"{memory.activations / 2**30:.1f}", f"{memory.total / 2**30:.1f}", f"{took:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--draws", type=int, default=50, help="of documents")
    parser.add_argument("--memory-lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--hidden", type=int, default=2048, help="the width of the layers of which the longest sequence is looked for")
    parser.add_argument("--blocks", type=int, default=80, help="of the model that is planned")
    parser.add_argument("--limit", type=float, default=2.0, help="GiB of such tensors on a rank")
    parser.add_argument("--write", action="store_true", help="write the tables to README.md beside this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    body: list[str] = []
    if "time" in options.parts:
        body += ["Milliseconds per step, minimum / median of wall time; then of processor time.", ""] + _times(options)
    if "memory" in options.parts:
        body += ["", "The most MiB of tensors on a rank during a step.", ""] + _memory(options)
    if "longest" in options.parts:
        body += ["", f"The longest sequence under {options.limit:g} GiB of layers of {options.hidden}, and its MiB.", ""] + _longest(
            options
        )
    if "balance" in options.parts:
        rows = [line(balance(max(options.lengths), size)) for size in options.worlds]
        body += ["", "Processor time of the ranks in causal attention, max / mean.", ""]
        body += table(("ranks", "length", "in one piece", "from both ends"), rows)
    if "documents" in options.parts:
        rows = [line(of_documents(size, max(options.lengths), *kind, options.draws)) for kind in DOCUMENTS for size in options.worlds]
        body += [
            "",
            f"Documents in {max(options.lengths)} positions: pairs in tiles, max / mean, by pieces a rank; {options.draws} draws.",
            "",
        ]
        chosen = ("chosen", "the worst draw", "pieces", "pairs of one causal sequence's")
        body += table(("median length", "ranks", *map(str, CHUNKS), *chosen), rows)
    if "planned" in options.parts:
        kinds = [(8, None, "auto"), (8, None, "ring"), (64, None, "auto"), (8, 4096, "auto")]
        rows = [line(planned(options.blocks, *kind)) for kind in kinds]
        body += ["", "131,072 positions over cp=8 and tp=8; MiB sent by a rank for a block over cp, GiB of a rank, seconds.", ""]
        heads = ("heads of keys", "window", "asked for", "chosen", "sent forward", "backward", "activations", "memory", "plan")
        body += table(heads, rows)
    where = machine(f"transformers {transformers.__version__}", "gloo", "all ranks share the cores")
    text = readme("Context parallelism", __doc__, *body, where=where, script="benchmarks/context/run.py")
    print(text)
    if options.write:
        write(HERE / "README.md", text)


def _times(options: argparse.Namespace) -> list[str]:
    single = launch.run(alone, options.lengths, options.rounds, world=1)[0]
    rows = []
    for world in options.worlds:
        for length, whole, found in zip(options.lengths, single, launch.run(timed, options.lengths, options.rounds, world=world)[0]):
            cells = [str(length), str(world)]
            for kind in (0, 1):
                least, middle = least_and_middle(whole | found, kind)
                cells += [f"{least[name]:.0f} / {middle[name]:.0f}" for name in (ALONE, *CONTENDERS)]
            rows.append(line(cells))
    return table(("length", "ranks", ALONE, *CONTENDERS, *(f"cpu: {name}" for name in (ALONE, *CONTENDERS))), rows)


def _memory(options: argparse.Namespace) -> list[str]:
    rows = []
    for length in options.memory_lengths:
        single = most_bytes(ALONE, 1, length)
        for world in options.worlds:
            used = [most_bytes(name, world, length) for name in CONTENDERS]
            rows.append(line([str(length), str(world), *(f"{n / 2**20:.0f}" for n in (single, *used))]))
    return table(("length", "ranks", ALONE, *CONTENDERS), rows)


def _longest(options: argparse.Namespace) -> list[str]:
    limit, hidden = int(options.limit * 2**30), options.hidden
    rows = [line(["1", ALONE, *_shown(longest(ALONE, 1, limit, hidden))])]
    for world in options.worlds:
        rows += [line([str(world), name, *_shown(longest(name, world, limit, hidden))]) for name in ("ring", "gather")]
    return table(("ranks", "form", "length", "MiB"), rows)


def _shown(found: tuple[int, int]) -> list[str]:
    return [str(found[0]), f"{found[1] / 2**20:.0f}"]


if __name__ == "__main__":
    main()
