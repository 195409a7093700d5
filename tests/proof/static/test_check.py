"""Programs of whole models are proved, and a fault planted in one is found, on its axis and near its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from benchmarks.planted_faults.faults import (
    Fault,
    alone_draws,
    argument,
    bounds,
    drop,
    exchanged,
    extra,
    factor,
    group,
    keyword,
    named,
    operand,
    other_dim,
    other_keys,
    segments,
    swap,
    turned,
)
from benchmarks.planted_faults.run import _changed, _local, _read
from meshpar.compile.program import Program
from meshpar.compile.programs import Programs
from meshpar.config import Context, ParallelConfig
from meshpar.dry_run.rehearsal import absent
from meshpar.errors import ProgramFault
from meshpar.mesh import typed_axes
from meshpar.proof.static.report import StaticReport
from tests.models import plain, text, tiny

MADE: dict[tuple[str, str], tuple[Programs, Program]] = {}


class Repeated(torch.nn.Module):
    """Grouped heads that are repeated in one call, under a causal mask that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        q = self.q(h).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = [t.unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(2, 1) for t in self.kv(h).chunk(2, -1)]
        seen = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
        loss: torch.Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).pow(2).mean()
        return loss


def test_heads_that_are_repeated_in_one_call_are_those_of_the_model() -> None:
    with absent("dp=2") as there:
        program = Programs(Repeated(), there, ParallelConfig()).make((), {"h": torch.randn(2, 6, 16)}, training=True)
    assert any(n.kwargs.get("enable_gqa") for n in program.graph.nodes)
    assert program.proof.proved and not program.proof.faults and not program.proof.unproved


class Masked(torch.nn.Module):
    """Attention under a mask that is neither causal nor a window."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)

    def forward(self, h: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        loss: torch.Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :]).pow(2).mean()
        return loss


@pytest.mark.parametrize("context", ["ring", "gather"])
def test_a_mask_is_of_the_keys_of_all_ranks(context: Context) -> None:
    batch = {"h": torch.randn(2, 8, 8), "keep": torch.ones(2, 8, dtype=torch.bool)}
    with absent("cp=2") as there:
        program = Programs(Masked(), there, ParallelConfig(context=context)).make((), batch, training=True)
    assert program.proof.proved and not program.proof.faults and not program.proof.unproved


def test_pieces_in_another_order_are_told() -> None:
    """Also where only a mask, or only positions, are taken so."""
    model = tiny("llama")
    batch = {**text(2, 16), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    with absent("cp=2") as there:
        programs = Programs(model, there, ParallelConfig(context="ring", context_chunks=4))
        program = programs.make((), batch, training=True)
        assert program.proof.proved and not program.proof.faults and not program.proof.unproved
        for fault in (turned("ring_attention"), turned("i_to_s"), segments("i_to_s")):
            wrong, _, _ = _changed(program, fault, [(a.group, a.size, a.rank) for a in typed_axes(there)])
            assert _read(programs, wrong).faults, fault.name


class Weighted(torch.nn.Module):
    """A loss over classes that are cut, each of another weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(12, 8), torch.nn.Linear(8, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.embed(ids)).flatten(0, 1), ids.flatten(), weight=torch.linspace(0.5, 2, 12))


def test_weights_of_classes_are_handed_whole() -> None:
    with absent("tp=2") as there:
        program = Programs(Weighted(), there, ParallelConfig(), rules={"head.weight": "tp:0"}).make(
            (), {"ids": torch.arange(8).view(2, 4)}, training=True
        )
    assert any("vocab_parallel" in str(n.target.__module__) for n in program.graph.nodes if callable(n.target))
    assert program.proof.proved and not program.proof.faults


@lru_cache(maxsize=8)
def model_of(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    return plain(name) if name in ("gpt_kv2", "gpt_dropout", "batch_norm") else (tiny(name), text(8, 16))


def with_fault(name: str, mesh: str, fault: Fault | None, config: ParallelConfig | None = None) -> StaticReport:
    """What the check says of a program with a fault in it."""
    config, (model, batch) = config or ParallelConfig(), model_of(name)
    with absent(mesh) as there:
        if (name, mesh) not in MADE:
            programs = Programs(model, there, config)
            program = programs.make((), _local(batch, mesh), training=True, microbatches=config.microbatches)
            MADE[name, mesh] = programs, program
        programs, program = MADE[name, mesh]
        programs.mesh = there
        if fault is None:
            return program.proof
        axes = [a for a in typed_axes(there) if a.size > 1]
        wrong, _, _ = _changed(program, fault, [(a.group, a.size, a.rank) for a in axes])
        return _read(programs, wrong)


PIPELINE = ParallelConfig(microbatches=2)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("name", "mesh", "config"),
    [
        ("llama", "dp=2,tp=2", None),
        ("gpt_kv2", "dp=2,tp=2", None),
        ("gpt_dropout", "dp=2,tp=2", None),
        ("mixtral", "ep=2,tp=2", None),
        ("llama", "cp=2,tp=2", None),
        ("llama", "pp=2,dp=2,tp=2", PIPELINE),
    ],
    ids=str,
)
def test_whole_programs_are_proved(name: str, mesh: str, config: ParallelConfig | None) -> None:
    report = with_fault(name, mesh, None, config)
    assert report.proved > 50 and not report.faults
    assert not report.unproved, str(report)
    assert report.share == 1.0


FAULTS = [
    ("llama", "dp=2,tp=2", drop("p_to_s", 1), "tp", "pending sum"),
    ("llama", "dp=2,tp=2", drop("i_to_r_many"), "tp", "nothing adds it up"),
    ("llama", "dp=2,tp=2", group("s_to_r", 1), "dp", "put"),
    ("llama", "dp=2,tp=2", swap("s_to_r", "s_to_i", 1), "tp", "pending sum"),
    ("llama", "dp=2,tp=2", segments("s_to_r"), "tp", "told that ranks have"),
    ("llama", "dp=2,tp=2", other_dim("s_to_r", 1), "tp", "dim"),
    ("llama", "dp=2,tp=2", drop("p_to_i", 1), "dp", "pending sum"),
    ("llama", "dp=2,tp=2", bounds(), "", "slice"),
    ("llama", "dp=2,tp=2", extra("i_to_r", "rsqrt"), "tp", "takes what is the same"),
    ("llama", "dp=2,tp=2", exchanged("scaled_dot_product_attention", 1, 2), "", "keys and values"),
    ("batch_norm", "dp=2", factor(0), "", "the mean of the whole"),
    ("gpt_dropout", "dp=2,tp=2", alone_draws(1), "", "draw"),
    ("mixtral", "ep=2,tp=2", named(operand("return_rows", 1, 1), "another way back"), "", "way"),
    ("mixtral", "ep=2,tp=2", group("send_rows"), "tp", "several times"),
    ("llama", "cp=2,tp=2", segments("gathered_attention"), "cp", "positions"),
    ("llama", "cp=2,tp=2", keyword("gathered_attention", "window", 4), "cp", "sees"),
    ("llama", "cp=2,tp=2", other_keys(), "cp", "it gathers"),
    ("llama", "pp=2,dp=2,tp=2", operand("linear", 2), "", "another value"),
    ("llama", "pp=2,dp=2,tp=2", argument("scaled_dot_product_attention", 5, False), "", "mask"),
]


@pytest.mark.sweep(12)
@pytest.mark.parametrize(("name", "mesh", "fault", "axis", "told"), FAULTS, ids=lambda v: v.name if isinstance(v, Fault) else None)
def test_a_planted_fault_is_found(name: str, mesh: str, fault: Fault, axis: str, told: str) -> None:
    report = with_fault(name, mesh, fault, PIPELINE if "pp" in mesh else None)
    assert report.faults
    said = " ".join(str(found) for found in report.faults)
    assert told in said and axis in said
    with pytest.raises(ProgramFault, match="please report it"):
        report.check()


def test_a_gradient_that_data_parallelism_does_not_sum_is_found() -> None:
    with_fault("llama", "dp=2,tp=2", None)
    programs, program = MADE["llama", "dp=2,tp=2"]
    with absent("dp=2,tp=2") as there:
        programs.mesh = there
        programs.config = ParallelConfig()
        wrong = replace(
            program, plan=replace(program.plan, parameters={n: replace(p, trainable=False) for n, p in program.plan.parameters.items()})
        )
        report = _read(programs, wrong)
    assert {f.axis for f in report.faults} == {"dp"} and "nothing adds it up" in str(report.faults[0])


@pytest.fixture(autouse=True, scope="module")
def forget() -> Iterator[None]:
    yield
    MADE.clear()
    model_of.cache_clear()
