"""explain(): what it says is what the plan says."""

from __future__ import annotations

import pytest
import torch

from meshpar.cli.look import explained
from meshpar.config import ParallelConfig
from meshpar.plan import ParameterPlan, Plan
from meshpar.report.parameters import _local, _words, enumerated
from meshpar.report.text import Readable, count, table
from meshpar.runtime.model import ParallelModel
from meshpar.sharding.types import I, R, Shard, plain
from tests.capture.models import GPT


def gpt(mesh: str = "dp=2,tp=2", *, rules: dict[str, str] | None = None, **options: object) -> ParallelModel:
    torch.manual_seed(0)
    model = GPT(width=16, heads=4, layers=2, vocab=38, length=8)
    ids = torch.randint(0, 38, (8, 8))
    return explained(model, (ids, ids), mesh, config=ParallelConfig(**options), rules=rules)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def described() -> str:
    return gpt(microbatches=2).explain()


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(name))


def test_the_mesh(described: str) -> None:
    assert described.splitlines()[0] == "Mesh dp=2 x tp=2: 4 ranks, 2 of them with samples of their own"
    assert "data parallel zero3" in described and "2 microbatch(es)" in described


def test_equal_layers_are_one_row(described: str) -> None:
    fused = row(described, "blocks.*.attention.qkv.weight")
    assert "x2" in fused and "[48, 16]" in fused and "[24, 16]" in fused and "rows of" in fused
    assert "columns" in row(described, "blocks.*.attention.out.weight") and "sums over" in row(described, "blocks.*.attention.out.weight")
    assert "like the values" in row(described, "positions")
    assert "x2" in row(described, "blocks.*.mlp.0.weight") and "x2" in row(described, "blocks.*.mlp.2.weight")
    assert "whole" in row(described, "norm.weight") and "a vector" in row(described, "norm.weight")


def test_what_blocks_hand_on(described: str) -> None:
    assert "[2, 4, 16] cut along dim 1, the sequence" in row(described, "Blocks hand on")
    assert "[2, 8, 16] whole" in row(gpt("tp=2", microbatches=4, sequence_parallel=False).explain(), "Blocks hand on")


def test_communication_adds_up(described: str) -> None:
    pm = gpt(microbatches=2)
    total = sum(c.count * c.nbytes for c in pm.comms())
    assert f"Communication of one microbatch: {count(total, 'B')} sent by a rank" in described
    assert "blocks.*, each of 2" in described and "reduce-scatter" in described
    assert "per step over the data ranks (zero3)" in described


def test_a_rule_is_named_as_the_reason() -> None:
    text = gpt("tp=2", rules={"blocks.0.mlp.0.weight": "replicate"}).explain()
    assert "your rule" in row(text, "blocks.0.mlp.0.weight") and "whole" in row(text, "blocks.0.mlp.0.weight")
    assert "rows" in row(text, "blocks.1.mlp.0.weight")


def test_without_a_tensor_axis() -> None:
    text = gpt("dp=2", data_parallel="zero2").explain()
    assert "over tp" not in text and "Repeated" not in text and "zero2" in text


def test_it_shows_as_it_reads() -> None:
    assert repr(Readable("a\nb")) == "a\nb" and isinstance(Readable("a"), str)


def test_words() -> None:
    assert _words((8, 4), I) == "whole"
    assert _words((8, 4), plain(0, 8)) == "rows" and _words((8, 4), plain(1, 4)) == "columns" and _words((8,), plain(0, 8)) == "split"
    assert _words((8, 4, 2), plain(2, 2)) == "dim 2"
    assert _words((64, 4), Shard(0, 1, ((8, 8),))) == "rows (8 x 8)"
    assert _words((96, 4), Shard(0, 1, ((8, 8), (2, 8), (2, 8)))) == "rows of 8 x 8|2 x 8|2 x 8"
    assert _words((4, 96), Shard(1, 3, ((32, 1),))) == "columns of each of 3 parts 32"


def test_uneven_parts() -> None:
    plan = ParameterPlan((5, 3), "float32", True, {"dp": R, "tp": plain(0, 5)}, "matrix")
    assert _local(plan, ["tp"], {"tp": 2}) == "[3..2, 3]"


def test_numbers_in_names() -> None:
    assert enumerated(["a.0.b.1.w", "a.2.b.1.w", "a.3.b.1.w", "a.10.b.1.w"]) == "a.{0,2-3,10}.b.1.w"


def test_counts_and_tables() -> None:
    assert [count(n, "B") for n in (0, 1023, 1024, 5 * 2**20, 200 * 2**30)] == ["0 B", "1023 B", "1 KiB", "5 MiB", "200 GiB"]
    assert count(12) == "12" and count(1.5e9) == "1.5 billion"
    assert table([("a", "bb"), ("ccc", "d")], right=(1,)) == ["  a    bb", "  ccc   d"]


def test_an_empty_plan() -> None:
    text = gpt("tp=1").explain()
    assert "Communication: none" in text and isinstance(Plan, type)
