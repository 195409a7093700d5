"""Bytes that a layer keeps from forward to backward, beside the closed forms: `python benchmarks/memory/run.py --write`.

Measured on local gloo ranks: the storages that are alive after a forward (`meshpar/dry_run/tape.py`, from the operator that makes one
until nobody holds it), of a model of three layers less those of two: whatever lies outside of layers falls out, and whatever anybody holds
counts, saved by autograd or not. bfloat16, as it is trained; fused attention; of the first rank.

The closed forms, in bytes per token and hidden width, of tensor parallelism over t (arXiv 2205.05198, there 10 + 24/t and 34/t for GPT;
b = 2 bytes a value, f: width of the MLP over the hidden one, g: key and value heads over heads, k: experts of a token):

    gpt       2 norms in and out 4b, 2 masks 2;       q, k, v, attention 4b/t, gelu in and out 2bf/t
    llama     2 norms in and out 4b;                  q, k, v, attention (2 + 2g)b/t, gate, up and their product 3bf/t
    mixtral   2 norms in and out 4b, rows 2kb;        q, k, v, attention (2 + 2g)b/t, gate, up and their product 3kbf/t

With sequence parallelism what stands before the semicolon is divided by t too, but for the rows of experts: every rank of tp multiplies all
rows by its part of the matrices. Numbers of which there is one for each token, or token and head (of norms, of attention, of the router)
are not in the closed forms.

"Without the passes": as autograd keeps what the model calls (`passes/again.py` and `passes/pieces.py` switched off): float32 copies of
norms that are written out, the results of activations and gates, sequences that were gathered. Here the passes take what is small, too, so
that few tokens tell; in a model they take what gains megabytes.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.measuring import line, machine, readme, table, write  # noqa: E402
from meshpar._torch import local_of  # noqa: E402
from meshpar.dry_run.tape import MachineTape, alive, levels  # noqa: E402
from meshpar.passes import order  # noqa: E402
from meshpar.proof import launch  # noqa: E402

Kept = dict[str, int]
"""What made it, and its shape -> bytes."""


@dataclass(frozen=True)
class Shape:
    """A layer, and how many tokens go through it."""

    hidden: int = 512
    heads: int = 8
    kv: int = 4
    ffn: int = 1536
    samples: int = 2
    length: int = 256
    experts: int = 4
    choices: int = 2

    @property
    def unit(self) -> int:
        """Tokens times hidden width."""
        return self.samples * self.length * self.hidden


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    ranks: int
    sequence: bool

    def __str__(self) -> str:
        return f"{self.model}, tp={self.ranks}" + (", sequence parallel" if self.sequence else "")


MODELS = ("gpt", "llama", "mixtral")
CASES = tuple(Case(m, t, s) for m in MODELS for t, s in ((1, False), (2, False), (2, True), (4, False), (4, True)))


def closed_form(case: Case, shape: Shape) -> float:
    """Bytes of a layer on a rank."""
    b, t, g, f = 2, case.ranks, shape.kv / shape.heads, shape.ffn / shape.hidden
    whole, rows, cut = 4.0 * b, 0.0, b * (2 + 2 * g + 3 * f)
    if case.model == "gpt":
        whole, cut = whole + 2, b * (4 + 2 * 4)
    if case.model == "mixtral":
        rows, cut = 2.0 * b * shape.choices, b * (2 + 2 * g + 3 * f * shape.choices)
    return shape.unit * (whole / (t if case.sequence else 1) + rows + cut / t)


def model_of(name: str, layers: int, shape: Shape, vocabulary: int = 256) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": vocabulary, "use_cache": False, "attn_implementation": "sdpa"}
    if name == "gpt":
        config = AutoConfig.for_model(
            "gpt2", n_layer=layers, n_embd=shape.hidden, n_head=shape.heads, n_positions=shape.length, attn_pdrop=0.0, **common
        )
    else:
        experts = {"num_local_experts": shape.experts, "num_experts_per_tok": shape.choices} if name == "mixtral" else {}
        config = AutoConfig.for_model(
            name,
            num_hidden_layers=layers,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv,
            max_position_embeddings=shape.length,
            **experts,
            **common,
        )
    return AutoModelForCausalLM.from_config(config).train().bfloat16()


@contextmanager
def passes(on: bool) -> Iterator[None]:
    """Inside, with or without what keeps less than autograd asks for, of whatever size."""
    real = order.ComputeAgain, order.CutIntoPieces
    least = 0 if on else 2**60
    try:
        order.ComputeAgain, order.CutIntoPieces = (partial(one, least_bytes=least) for one in real)  # type: ignore[misc, assignment]
        yield
    finally:
        order.ComputeAgain, order.CutIntoPieces = real  # type: ignore[misc]


def kept(case: Case, layers: int, shape: Shape) -> Kept:
    """What is alive after a forward and was not before it."""
    mesh = mp.make_mesh(f"tp={case.ranks}")
    ids = torch.randint(256, (shape.samples, shape.length), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    config = mp.ParallelConfig(sequence_parallel=case.sequence)
    pm = mp.parallelize(model_of(case.model, layers, shape), mesh, example=batch, config=config)
    pm(**batch)  # what is made once and stays is made here
    with MachineTape() as tape:
        for tensor in (*batch.values(), *pm.parameters(), *pm.buffers()):
            tape.number(local_of(tensor) if isinstance(tensor, DTensor) else tensor)
        before = alive(tape.storages.changes)
        loss = pm(**batch).loss
        _let_go()
        after = alive(tape.storages.changes)
        made = {number: call.kernel for call in reversed(tape.calls) for number in call.writes}
        found: Counter[str] = Counter()
        for number, size in after.items():
            if number not in before:
                found[f"{made[number].name if number in made else '?'}, {size / shape.unit:.3f}"] += size
        del loss
    dist.barrier()
    return dict(found)


def _let_go() -> None:
    """Return when gloo's threads do not hold anymore what they sent: a collective is over for its caller a moment before that."""
    for _ in range(4):
        dist.barrier()
        time.sleep(0.05)


def per_layer(case: Case, shape: Shape) -> list[Kept]:
    """What one layer more keeps, with the passes and without."""
    warnings.simplefilter("ignore")
    found = []
    for on in (True, False):
        with passes(on):
            fewer, more = (Counter(kept(case, layers, shape)) for layers in (2, 3))
        more.subtract(fewer)
        found.append({name: size for name, size in more.items() if size})
    return found


VOCABULARY, TOKENS = 16384, 2048
SHARES = (None, 8, 32)
"""What the logits of a step are divided by for `logits_bytes`."""


def peak(share: int | None, ranks: int) -> tuple[int, float]:
    """The most bytes that a step takes above those that are there before it, and its loss, of a model that is little but its head."""
    warnings.simplefilter("ignore")
    shape = Shape(hidden=64, heads=2, kv=2, ffn=64, samples=4, length=TOKENS // 4)
    mesh = mp.make_mesh(f"tp={ranks}")
    model = model_of("llama", 1, shape, VOCABULARY).float()
    ids = torch.randint(VOCABULARY, (shape.samples, shape.length), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    least = None if share is None else TOKENS * VOCABULARY * 4 // ranks // share
    pm = mp.parallelize(model, mesh, example=batch, config=mp.ParallelConfig(logits_bytes=least))
    pm.train_step(**batch)
    with MachineTape() as tape:
        for tensor in (*batch.values(), *pm.parameters(), *(p.grad for p in pm.parameters()), *pm.buffers()):
            tape.number(local_of(tensor) if isinstance(tensor, DTensor) else tensor)  # type: ignore[arg-type]
        before = sum(alive(tape.storages.changes).values())
        loss = pm.train_step(**batch)
        most = max(levels(tape.storages.changes)) - before
    return most, float(loss)


def rows_of_logits() -> list[str]:
    """The lines of the second table."""
    found = []
    for ranks in (1, 2):
        losses = set()
        for share in SHARES:
            most, loss = launch.run(peak, share, ranks, world=ranks)[0]
            losses.add(round(loss, 4))
            logits = TOKENS * VOCABULARY * 4 / ranks
            said = "all at once" if share is None else f"1/{share}"
            found.append(line([f"tp={ranks}", said, f"{logits / 2**20:.0f}", f"{most / 2**20:.1f}", f"{most / logits:.2f}"]))
            print(found[-1], flush=True)
        if len(losses) > 1:
            raise SystemExit(f"losses differ: {losses}")
    return found


def row(case: Case, shape: Shape, found: Sequence[Kept]) -> str:
    """One line of the table."""
    measured, without = (sum(one.values()) for one in found)
    closed = closed_form(case, shape)
    numbers = (f"{x / shape.unit:.2f}" for x in (closed, measured, without))
    return line([str(case), *numbers, f"{measured / closed:.2f}", f"{without / closed:.2f}"])


HEAD = ("case", "closed form", "measured", "without the passes", "measured : closed form", "without : closed form")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--detail", action="store_true", help="print what made the bytes, too")
    parser.add_argument("--write", action="store_true", help="write the table to README.md beside this file")
    options = parser.parse_args()
    shape, rows = Shape(), []
    for case in CASES:
        if options.only not in str(case):
            continue
        found = launch.run(per_layer, case, shape, world=case.ranks)[0]
        rows.append(row(case, shape, found))
        print(rows[-1], flush=True)
        for name, size in sorted(found[0].items(), key=lambda item: -abs(item[1])) if options.detail else ():
            print(f"    {size / shape.unit:7.3f}  {name}")
    size = f"hidden {shape.hidden}, {shape.heads} heads ({shape.kv} of keys and values), width {shape.ffn} (gpt: {4 * shape.hidden}), "
    size += f"{shape.experts} experts of which {shape.choices}, {shape.samples} x {shape.length} tokens. Bytes per token and hidden width."
    logits = [
        f"Of a step of a model that is little but its head, {TOKENS} tokens, {VOCABULARY} words, float32, with all logits at once or",
        "`ParallelConfig(logits_bytes=...)`: MiB of a rank's logits, and the most bytes above those that are there before the step.",
        "",
        *table(("mesh", "logits at once", "logits, MiB", "peak, MiB", "peak : logits"), rows_of_logits() if not options.only else []),
    ]
    text = readme(
        "Memory of a layer", __doc__, size, "", *table(HEAD, rows), "", *logits, where=machine("gloo"), script="benchmarks/memory/run.py"
    )
    if options.write:
        write(HERE / "README.md", text)


if __name__ == "__main__":
    main()
