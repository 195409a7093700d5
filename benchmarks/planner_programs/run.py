"""The planner's closed forms against the programs: `python benchmarks/planner_programs/run.py [--gpus 64] [--write]`.

The same mapping twice: as `mp.search` estimates it (`planner.search.estimate`), and as `mp.dry_run` reads it off the program.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import meshpar as mp
from meshpar.dry_run.decoder import Decoder
from meshpar.planner import Cluster, Job, Mapping, Transformer
from meshpar.planner.search import estimate

README = Path(__file__).parent / "README.md"
SIZES = Transformer(layers=16, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=32000)
SEQ, GiB = 4096, 2.0**30
MAPPINGS = (
    *(Mapping(data_parallel="zero3", microbatch=2, recompute=recompute) for recompute in ("none", "selective", "full")),
    *(Mapping(tp=4, data_parallel="zero1", microbatch=2, recompute=recompute) for recompute in ("none", "selective", "full")),
    Mapping(tp=4, data_parallel="zero2", microbatch=2, recompute="full"),
    Mapping(tp=8, data_parallel="replicate", microbatch=2, recompute="none"),
    *(Mapping(tp=4, pp=4, recompute=recompute) for recompute in ("none", "selective", "full")),
    Mapping(tp=4, pp=4, virtual=2, schedule="interleaved-1f1b", recompute="none"),
    Mapping(tp=4, pp=4, virtual=2, schedule="zbv", recompute="none"),
    Mapping(tp=4, pp=4, schedule="zero-bubble", recompute="none"),
    Mapping(tp=1, pp=8, recompute="none"),
)


@dataclass(frozen=True)
class Row:
    """One mapping: GiB on the fullest rank and seconds of a step, by closed form and by program."""

    mapping: Mapping
    memory: tuple[float, float]
    seconds: tuple[float, float]

    def __str__(self) -> str:
        (a, b), (s, t) = self.memory, self.seconds
        return f"| {self.mapping} | {a:.1f} | {b:.1f} | {a / b:.2f} | {s:.3f} | {t:.3f} | {s / t:.2f} |"


def row(mapping: Mapping, gpus: int, accelerator: str) -> Row:
    """A mapping both ways, with 8 microbatches in a pipeline and 2 without."""
    microbatches, data = 8 if mapping.pp > 1 else 2, mapping.data(gpus)
    samples = mapping.microbatch * microbatches
    job = Job(SIZES, Cluster(accelerator, gpus), seq=SEQ, batch=data * samples, stack="meshpar")
    guessed = estimate(job, mapping)
    with torch.device("meta"):
        model = Decoder(SIZES)
    ids = torch.zeros(samples, SEQ, dtype=torch.long)
    config = mp.ParallelConfig(
        microbatches=microbatches,
        schedule=mapping.order,
        virtual_stages=mapping.virtual,
        data_parallel=mapping.data_parallel,
        recompute=mapping.recompute,
        sequence_parallel=mapping.tp > 1,
        precision="bf16",
    )
    axes = {"pp": mapping.pp, "dp": data, "tp": mapping.tp}
    mesh = ",".join(f"{name}={size}" for name, size in axes.items() if size > 1)
    read = mp.dry_run(model, mesh, config, hardware=accelerator, example={"input_ids": ids, "labels": ids})
    memory = guessed.memory.total / GiB, max(rank.peak for rank in read.ranks) / GiB
    return Row(mapping, memory, (guessed.seconds, read.time.seconds))


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown, with the middle and the farthest of each ratio."""
    yield "| mapping | closed form, GiB | program, GiB | ratio | closed form, s | program, s | ratio |"
    yield "|---|---|---|---|---|---|---|"
    yield from map(str, rows)
    yield ""
    for what, ratios in (("Memory", [a / b for a, b in (r.memory for r in rows)]), ("Time", [a / b for a, b in (r.seconds for r in rows)])):
        yield f"{what}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--accelerator", default="h100")
    parser.add_argument("--write", action="store_true", help="into the README beside this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for mapping in MAPPINGS:
        rows.append(row(mapping, options.gpus, options.accelerator))
        print(rows[-1], flush=True)
    text = "\n".join(table(rows))
    print(text)
    if options.write:
        before, _, rest = README.read_text().partition("<!-- table -->\n")
        README.write_text(f"{before}<!-- table -->\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")


if __name__ == "__main__":
    main()
