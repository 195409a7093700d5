"""Trains with each fault of `beside.py` on gloo processes, and says what sees it: `python benchmarks/planted_faults/run_beside.py`.

The faults in the order of a pipeline (`orders.py`) are handed to the check of schedules; nothing runs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.planted_faults import orders  # noqa: E402
from benchmarks.planted_faults.beside import FAULTS, BesideFault  # noqa: E402
from benchmarks.random_programs.compare import Found, Shapes, outcome, trained  # noqa: E402
from benchmarks.random_programs.programs import Program  # noqa: E402
from benchmarks.random_programs.settings import Setting  # noqa: E402
from benchmarks.random_programs.stacks import KEEP  # noqa: E402
from meshpar.proof.reference import Reference  # noqa: E402
from tests.pool import Pool  # noqa: E402

_BLOCK = """class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, h):
        q, k, v = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, -1)]
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return h + self.down(torch.tanh(self.up(h)))
"""
_SUNK = """class Sunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out, self.sinks = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Parameter(torch.randn(2))
        self.then, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, h):
        q, k, v = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, -1)]
        p = (q @ k.transpose(-1, -2) / 2).masked_fill(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1), float('-inf'))
        p = torch.cat([p, self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], -1).softmax(-1)[..., :-1]
        h = h + self.out((p @ v).transpose(1, 2).flatten(2))
        gate, up = self.up(self.then(h)).chunk(2, -1)
        return h + self.down(F.silu(gate) * up)
"""
_MADE = (
    "self.embed = nn.Embedding(17, 8)",
    "self.a, self.b, self.c, self.d = Block(), Block(), Block(), Block()",
    "self.last = nn.LayerNorm(8)",
    "self.register_buffer('mean', torch.zeros(8, dtype=torch.double))",
)
_LABELS = f"torch.where({KEEP}, torch.randint(0, 17, (b, n)), -100)"
_MEAN = ("self.mean.mul_(0.9).add_(h.detach().mean((0, 1)))", "h = h - self.mean")
_MIXTURE = ("y, p = self.moe(h)", "h = h + y")
_LINES = ("h = self.a(self.embed(ids))", "s = h", "h = self.c(self.b(h)) * keep[..., None]", "h = self.d(h + s)")
_LOSS = (
    "z = F.linear(self.last(h), self.embed.weight)",
    "loss = F.cross_entropy(z.flatten(0, 1), labels.flatten())",
)
_INPUTS = (("ids", "torch.randint(0, 17, (b, n))"), ("labels", _LABELS), ("keep", KEEP))

_LISTED = ("self.embed = nn.Embedding(17, 8)", "self.blocks = nn.ModuleList([Sunk(), Sunk()])", "self.last = nn.LayerNorm(8)",
           "self.head = nn.Linear(8, 18)")  # fmt: skip
_THROUGH = ("h = self.embed(ids)", "h = self.blocks[1](self.blocks[0](h))")
_CHUNKED = ("z = self.head(self.last(h))", _LOSS[1])

MODELS = {
    "stack": Program(0, _MADE, (*_LINES, *_LOSS), _INPUTS, (8, 8), _BLOCK),
    "buffer": Program(0, _MADE, (*_LINES, *_MEAN, *_LOSS), _INPUTS, (8, 8), _BLOCK),
    "experts": Program(
        0, (*_MADE, "self.moe = MoE('mixtral', width=8)"), (*_LINES, *_MIXTURE, *_LOSS[:1], _LOSS[1] + " + 0.01 * p"),
        _INPUTS, (8, 8), _BLOCK,
    ),
    "kept less": Program(0, _LISTED, (*_THROUGH, *_CHUNKED), _INPUTS[:2], (8, 8), _SUNK),
}  # fmt: skip
"""A tied embedding, a skip over two blocks, labels and a mask of which some are padding; with a running mean, and with experts.

"kept less": blocks in a list, of attention with sinks and a gate."""
SHAPES = ((8, 8), (8, 12), (16, 10), (8, 14))


@dataclass(frozen=True)
class Seen:
    """What saw a fault: `right` says whether all is well without it."""

    fault: BesideFault
    right: str
    wrong: str
    told: str

    @property
    def caught(self) -> bool:
        return self.right == "ok" and self.wrong in ("wrong", "refused", "crash")


def with_fault(number: int | None, program: Program, how: Setting, shapes: Shapes, right: Reference) -> Found:
    """`trained`, with a fault planted on this rank."""
    if number is None:
        return trained(program, how, shapes, right)
    with FAULTS[number].planted():
        return trained(program, how, shapes, right)


def seen(number: int, pool: Any) -> Seen:
    """Train without a fault and with it."""
    fault = FAULTS[number]
    how = Setting(fault.mesh, fault.config, processes=True, eager=fault.eager)
    shapes = SHAPES if fault.shapes > 1 else (SHAPES[0],) * 2
    found = [outcome(MODELS[fault.model], how, shapes, _Planting(pool, at)) for at in (None, number)]
    return Seen(fault, found[0].status, found[1].status, _first_words(found[1].text))


class _Planting:
    """A pool that plants a fault in what it runs."""

    def __init__(self, pool: Any, number: int | None) -> None:
        self.pool, self.number = pool, number

    def run(self, fn: Any, *args: Any, **how: Any) -> Any:
        return self.pool.run(with_fault, self.number, *args, **how)


def _first_words(text: str) -> str:
    """The quantities that failed, or the error."""
    failed = [line.split("  ")[1].strip() for line in text.splitlines() if "FAILED" in line and line.startswith("  ")]
    return ", ".join(failed) or text.splitlines()[0][:100]


def table(rows: Sequence[Seen]) -> str:
    """The results, as the README has them."""
    lines = ["| fault | mesh | configuration | `verify` | what it names |", "|---|---|---|---|---|"]
    for row in rows:
        config = ", ".join(f"{k}={v}" for k, v in row.fault.config.items())
        words = "caught" if row.caught else row.fault.equivalent or f"**missed** (without it: {row.right})"
        lines.append(f"| {row.fault.name} | {row.fault.mesh} | {config} | {words} | {row.told} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name holds this")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    told = orders.planted()
    print(f"orders of a pipeline: {len(told)} faults, {sum(t is not None for t in told.values())} refused by the check of schedules")
    pool, rows = Pool(4), list[Seen]()
    try:
        for number in (i for i, fault in enumerate(FAULTS) if options.only in fault.name):
            rows.append(seen(number, pool))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    finally:
        pool.close()
    print(table(rows))
    print(Counter(row.caught for row in rows))
    return 0 if all(row.caught or row.fault.equivalent for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
