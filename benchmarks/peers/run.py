"""Step time beside what torch and transformers have themselves: `python benchmarks/peers/run.py --write`.

Two local gloo ranks of one thread each; a Llama of transformers of 4 layers. A step is forward and backward of the same 4 samples in
float32: all of them on both ranks over `tp`, two on each over `dp`, one at a time through a pipeline of two stages (1F1B). Others
(`others.py`) are used as their documentation has it, meshpar by `mp.parallelize(model, mesh)` and one option. In every round each
contender takes one step, in turn, so that whatever else the machine does hits all alike; a step is timed between barriers, the slowest
rank counts. Before any timing all must give the loss and the norm of gradients of the model in one process, to 1e-6: in float64, but for
the loss, which transformers takes in float32.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from others import Batch, Contender, ddp, fsdp, own_tensor_parallelism, pipeline, whole_norm  # noqa: E402
from torch import nn  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.measuring import Times, in_turn, least_and_middle, line, machine, readme, table, write  # noqa: E402
from meshpar.proof import launch  # noqa: E402

SAMPLES, LENGTH, VOCABULARY, LAYERS, MICROBATCHES = 4, 128, 1024, 4, 4
OURS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "meshpar tp": ("tp=2", {"sequence_parallel": False}),
    "meshpar tp, sequence": ("tp=2", {"sequence_parallel": True}),
    "meshpar dp, replicate": ("dp=2", {"data_parallel": "replicate"}),
    "meshpar dp, zero1": ("dp=2", {"data_parallel": "zero1"}),
    "meshpar dp, zero2": ("dp=2", {"data_parallel": "zero2"}),
    "meshpar dp, zero3": ("dp=2", {"data_parallel": "zero3"}),
    "meshpar pp": ("pp=2", {"microbatches": MICROBATCHES, "schedule": "1f1b"}),
}
"""Contender -> mesh and options."""
GROUPS: Mapping[str, tuple[str, ...]] = {
    "tensor parallel": ("transformers tp_plan", "meshpar tp", "meshpar tp, sequence"),
    "data parallel": ("DDP", "FSDP2 by hand", *(name for name in OURS if " dp" in name)),
    "pipeline": ("torch.distributed.pipelining", "meshpar pp"),
}
"""What is compared with what: the first of each is what the others are compared with."""


@dataclass(frozen=True)
class Size:
    """One problem."""

    hidden: int
    rounds: int

    def model(self, dtype: torch.dtype) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama",
            num_hidden_layers=LAYERS,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_attention_heads=self.hidden // 32,
            num_key_value_heads=self.hidden // 64,
            vocab_size=VOCABULARY,
            use_cache=False,
        )
        model: nn.Module = AutoModelForCausalLM.from_config(config).train()
        return model.to(dtype)


SIZES = (Size(128, 24), Size(256, 16), Size(512, 8))


def batch_of() -> Batch:
    ids = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def ours(size: Size, name: str, dtype: torch.dtype) -> Contender:
    axes, options = OURS[name]
    mesh = mp.make_mesh(axes)
    local = mp.local_batch(batch_of(), mesh)
    pm = mp.parallelize(size.model(dtype), mesh, example=local, config=mp.ParallelConfig(**options))
    return Contender(lambda: pm.train_step(**local), pm.parameters, lambda: float(mp.clip_grad_norm_(pm.parameters(), math.inf)))


def contenders(size: Size, dtype: torch.dtype, folder: Path) -> dict[str, Contender]:
    """All of them, on equal weights and data."""
    saved, whole = folder / f"{size.hidden}-{dtype}".replace("torch.", ""), batch_of()
    if dist.get_rank() == 0:
        size.model(dtype).save_pretrained(saved)  # type: ignore[operator]
    dist.barrier()
    own = {name: part.chunk(2)[dist.get_rank()] for name, part in whole.items()}
    made = {
        "transformers tp_plan": lambda: own_tensor_parallelism(saved, whole, dtype),
        "DDP": lambda: ddp(size.model(dtype), own),
        "FSDP2 by hand": lambda: fsdp(size.model(dtype), own),
        "torch.distributed.pipelining": lambda: pipeline(size.model(dtype), whole, MICROBATCHES),
        **{name: partial(ours, size, name, dtype) for name in OURS},
    }
    return {name: make() for name, make in made.items()}


def check(folder: Path) -> dict[str, float]:
    """The largest difference of the loss, or of the norm of gradients, from those of one process, relative to them."""
    size = SIZES[0]
    model = size.model(torch.float64)
    loss = model(**batch_of()).loss
    loss.backward()
    norm = whole_norm(model)()
    worst = {}
    for name, contender in contenders(size, torch.float64, folder).items():
        found = contender.step()
        said = torch.tensor([0.0 if found is None else float(found), 0.0 if found is None else 1.0], dtype=torch.float64)
        dist.all_reduce(said)
        worst[name] = max(abs(float(said[0] / said[1]) / loss.item() - 1), abs(contender.norm() / norm - 1))
        if worst[name] > 1e-6:  # (transformers takes its loss in float32)
            raise SystemExit(f"{name}: loss or gradients differ by {worst[name]:.1e}")
    return worst


def measure(size: Size, rounds: int, folder: Path) -> Times:
    """Every step of every contender."""
    running = contenders(size, torch.float32, folder)
    return in_turn({name: one.step for name, one in running.items()}, rounds, before=lambda name: running[name].clear(), unmeasured=2)


def worker(hidden: list[int], rounds: int | None, folder: str) -> dict[int, Times]:
    """What every rank runs."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    worst = check(Path(folder))
    if dist.get_rank() == 0:
        print("  differences from one process:", {name: f"{w:.0e}" for name, w in worst.items()}, flush=True)
    results = {}
    for size in SIZES:
        if size.hidden in hidden:
            results[size.hidden] = times = measure(size, rounds or size.rounds, Path(folder))
            if dist.get_rank() == 0:
                print("\n".join(rows(size, times)), flush=True)
    return results


def rows(size: Size, times: Times) -> list[str]:
    """The lines of one size."""
    found = []
    (least, middle), (cpu, _) = least_and_middle(times, 0), least_and_middle(times, 1)
    for group, names in GROUPS.items():
        for name in names:
            ratio = f"{least[name] / least[names[0]]:.2f} / {middle[name] / middle[names[0]]:.2f}"
            found.append(line([str(size.hidden), group, name, f"{least[name]:.1f} / {middle[name]:.1f}", ratio, f"{cpu[name]:.1f}"]))
    return found


HEAD = ("hidden", "kind", "contender", "ms", "to the first of its kind", "processor ms")


def report(lines: list[str], hidden: list[int], rounds: int | None) -> str:
    """The README's text."""
    import transformers

    counts = ", ".join(f"hidden {size.hidden}: {rounds or size.rounds} rounds" for size in SIZES if size.hidden in hidden)
    legend = "Milliseconds per step and ratios, minimum / median; processor time of a rank, minimum."
    sizes = f"{LAYERS} layers, width 3 times hidden, heads of 32, vocabulary {VOCABULARY}, {SAMPLES} x {LENGTH} tokens; {counts}."
    where = machine("gloo", "both ranks share the cores", f"transformers {transformers.__version__}")
    body = (sizes, "", legend, "", *table(HEAD, lines))
    return readme("Beside what torch and transformers have", __doc__, *body, where=where, script="benchmarks/peers/run.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[size.hidden for size in SIZES])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--write", action="store_true", help="write the table to README.md beside this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = launch.run(worker, options.hidden, options.rounds, folder, world=2)[0]
    text = report(
        [text for size in SIZES if size.hidden in found for text in rows(size, found[size.hidden])], options.hidden, options.rounds
    )
    if options.write:
        write(HERE / "README.md", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
