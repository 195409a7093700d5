"""Dry runs: of small programs against what their plans say, and the two golden ones."""

from __future__ import annotations

import json
import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import meshpar as mp
from meshpar.cli.look import explained
from meshpar.dry_run.decoder import Decoder
from meshpar.planner import Transformer, flops_per_token
from meshpar.planner.hardware import GiB
from tests import models
from tests.dry_run.measured import DENSE, EXPERTS, SHALLOW, TOKENS, batch, measured, model_of, predicted
from tests.pool import Pool


def ids(samples: int, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    both = torch.zeros(samples, tokens, dtype=torch.long)
    return {"input_ids": both, "labels": both}


def dry(sizes: Transformer, mesh: str, samples: int, **options: Any) -> mp.DryRun:
    with torch.device("meta"):
        model = Decoder(sizes)
    return mp.dry_run(model, mesh, mp.ParallelConfig(**options), example=ids(samples))


@pytest.fixture(scope="module")
def pipeline() -> mp.DryRun:
    return dry(DENSE, "pp=2,dp=2,tp=2", 8, microbatches=4, data_parallel="zero1", precision="bf16", sequence_parallel=True)


def test_the_process_is_left_as_it_was(pipeline: mp.DryRun) -> None:
    assert not dist.is_initialized() and pipeline.gpus == 8


@pytest.mark.slow
def test_parameters_are_those_of_the_plan() -> None:
    with torch.device("meta"):
        model = Decoder(DENSE)
    config = mp.ParallelConfig(microbatches=4)
    pm = explained(model, {name: x.repeat(2, 1) for name, x in ids(4).items()}, "pp=2,dp=2,tp=2", config=config)
    assert dry(DENSE, "pp=2,dp=2,tp=2", 4, microbatches=4).ranks[0].parameters == pm.memory().parameters


def test_utilisation_is_of_the_models_own_flops(pipeline: mp.DryRun) -> None:
    for name, share in pipeline.mfu.items():
        flops = flops_per_token(DENSE, TOKENS, name) * pipeline.tokens  # type: ignore[arg-type]
        assert share == pytest.approx(flops / pipeline.time.seconds / 8 / 989e12, rel=1e-6)


def test_seconds_add_up(pipeline: mp.DryRun) -> None:
    assert sum(pipeline.seconds.values()) == pytest.approx(pipeline.time.seconds)
    low, high = pipeline.interval
    assert low < pipeline.time.seconds < high


def test_the_ledger_has_every_axis_with_its_level_and_frequency(pipeline: mp.DryRun) -> None:
    lines = {(line.axis, line.kind): line for line in pipeline.ledger}
    gather = next(line for line in pipeline.ledger if line.axis == "tp" and line.kind == "all_gather" and line.often == "every layer")
    assert gather.level == "inside the domain"
    assert lines["pp", "send"].often == "every microbatch" and lines["pp", "send"].count == 2 * 4
    assert {line.often for line in pipeline.ledger if line.axis == "dp" and line.message > 64} == {"once per step"}
    residual = 2 * 2 * TOKENS * DENSE.hidden  # bf16, 2 samples
    assert gather.message == pytest.approx(residual / 2)
    with torch.device("meta"):
        model = Decoder(DENSE)
    pm = explained(model, ids(16), "pp=2,dp=2,tp=2", config=pipeline.config)
    assert lines["pp", "send"].message == sum(c.nbytes for c in pm.comms() if c.kind == "send" and c.phase == "forward")


@pytest.mark.sweep(1)
@pytest.mark.parametrize("schedule", ["gpipe", "looped-bfs", "interleaved-1f1b", "zero-bubble", "zbv", "dualpipev"])
def test_every_schedule(schedule: str) -> None:
    found = dry(SHALLOW, "pp=2", 8, microbatches=4, schedule=schedule)
    assert found.fits and found.time.bubble >= 0 and len(found.ranks) == 2


@pytest.mark.slow
def test_experts_and_hybrid_sharding() -> None:
    found = dry(EXPERTS, "dp_replicate=2,dp_shard=2,ep=2", 4, microbatches=2, data_parallel="zero3")
    lines = {(line.axis, line.kind, line.often) for line in found.ledger}
    assert ("ep", "all_to_all", "every layer") in lines and ("dp_replicate", "all_reduce", "once per step") in lines
    assert ("dp_shard", "all_gather", "every layer") in lines and ("dp_shard", "reduce_scatter", "every layer") in lines


def test_json_text_and_picture(pipeline: mp.DryRun, tmp_path: Path) -> None:
    body = json.loads(pipeline.to_json())
    assert body["gpus"] == 8 and body["ranks"][1]["stages"] == [1] and set(body["mfu"]) == {"causal", "noncausal", "with-recompute"}
    assert body["seconds"]["step"] == pytest.approx(pipeline.time.seconds)
    text = str(pipeline)
    assert "of 70 GiB usable" in text and "MFU causal" in text and "every layer" in text
    pipeline.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "more, message",
    [
        ({"hardware": "h1000"}, "no accelerator 'h1000'. Did you mean h100"),
        ({"stack": "megatron"}, "no software stack 'megatron'"),
        ({"mesh": "dp=12"}, "gpus=12 is no whole number of servers: h100 comes 8 to a server. Nearest: 8 or 16"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(more: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        model = Decoder(DENSE)
    mesh = more.pop("mesh", "dp=2")
    with pytest.raises(mp.ConfigError) as caught:
        mp.dry_run(model, mesh, example=ids(4), **more)
    assert message in str(caught.value)
    assert not dist.is_initialized()


def test_a_sequence_that_is_cut() -> None:
    with torch.device("meta"):
        model = Decoder(DENSE)
    found = mp.dry_run(model, "cp=2,tp=2", example=ids(4))
    assert any("cp" in str(row) for row in found.ledger) and "cp" in str(found)


def test_bytes_that_go_round_are_those_of_the_ledger() -> None:
    batch = {"ids": models.numbers(53, 4, 32), "labels": models.numbers(53, 4, 32)}
    model, config = models.GPT(), mp.ParallelConfig(context="ring")
    found = mp.dry_run(model, "cp=4", config, example=batch)
    (hops,) = (line for line in found.ledger if line.kind == "all_to_all")
    with mp.simulate(4):
        ledger = mp.parallelize(model, mp.make_mesh("cp=4"), example=batch, config=config).comms()
    assert hops.total == pytest.approx(sum(one.nbytes * one.count for one in ledger if one.kind == "ring"), rel=1e-9)


# ---- memory against what ranks allocate --------------------------------------------------------------------------------------------------

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("experts", "dp=2,ep=2", {"data_parallel": "zero1", "recompute": "full"}),
    ("shallow", "cp=2,tp=2", {"data_parallel": "zero3", "recompute": "selective"}),
]


@pytest.mark.parametrize("kind, mesh, options", CASES, ids=[f"{mesh} {options['data_parallel']}" for _, mesh, options in CASES])
def test_memory_is_what_gloo_ranks_allocate(gloo: Pool, kind: str, mesh: str, options: dict[str, Any]) -> None:
    """`benchmarks/planner_here/memory.py` has every schedule, mode and recompute."""
    wanted = gloo.run(measured, kind, mesh, options, world=4, timeout=200)
    found = predicted(kind, mesh, options)
    ranks = len(wanted) // len(found)
    near = 0.05 if kind == "experts" else 0.02  # a dry run routes evenly, a router does not
    for at, size in enumerate(found):
        assert size == pytest.approx(max(wanted[at * ranks : (at + 1) * ranks]), rel=near)


@pytest.mark.slow
def test_memory_of_a_loss_in_chunks(gloo: Pool) -> None:
    """A megabyte of logits of a rank, of which a sixteenth is there at once; of all positions but the last, which is proved too."""
    warnings.filterwarnings("error", message="the static check")
    options = {"logits_bytes": 2**16}
    (found,), (whole,) = predicted("shallow", "dp=2", options), predicted("shallow", "dp=2", {})
    assert found < whole - 2**20
    assert found == pytest.approx(max(gloo.run(measured, "shallow", "dp=2", options, world=2, timeout=200)), rel=0.02)


def test_what_is_measured_is_a_whole_step() -> None:
    assert batch()["input_ids"].shape == (16, TOKENS) and sum(p.numel() for p in model_of("dense").parameters()) == DENSE.parameters


def test_what_runs_beside_collectives() -> None:
    """What the graph computes beside those of tp is counted; those over data ranks run beside all computation, as the runtime has it."""
    sizes = Transformer(layers=2, hidden=1024, heads=16, ffn=4096, vocab=1000)
    with torch.device("meta"):
        model = Decoder(sizes)
    config = mp.ParallelConfig(microbatches=4, sequence_parallel=True, data_parallel="zero3", precision="bf16")
    read = {stack: mp.dry_run(model, "dp=2,tp=2", config, example=ids(4, 2048), stack=stack) for stack in ("meshpar", "megatron-2024")}
    sent = {stack: [c for layer, _ in found.workload.stages[0].layers for c in layer.collectives] for stack, found in read.items()}
    for collectives in sent.values():
        data = [c for c in collectives if c.axis == "dp" and c.phase != "step"]
        assert data and all(c.behind == "compute" and not c.beside for c in data)
    ours, theirs = ([c for c in sent[stack] if c.axis == "tp"] for stack in ("meshpar", "megatron-2024"))
    assert all(c.beside for c in ours) and any(work > 1e9 for c in ours for _, work in c.beside)
    assert all(not c.beside and c.behind == "matrix" for c in theirs) and not any(c.kind == "all_to_all" for c in theirs)
    assert not any(c.kind == "all_to_all" for c in ours), "by the price of an accelerator no piece of these sizes pays"


# ---- golden ------------------------------------------------------------------------------------------------------------------------------

GPT = Transformer(layers=96, hidden=12288, heads=96, ffn=4 * 12288, vocab=51200, gated=False, tied=True, positions=2048)
MOE = Transformer(layers=4, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=32000, experts=64, top_k=8, expert_ffn=2048)


@pytest.fixture(scope="module")
def golden() -> Iterator[tuple[mp.DryRun, float]]:
    with torch.device("meta"):
        model = Decoder(GPT, dropout=0.1)
    config = mp.ParallelConfig(
        microbatches=192, schedule="interleaved-1f1b", virtual_stages=2, data_parallel="zero1", recompute="selective", precision="bf16"
    )
    begun = time.process_time()
    found = mp.dry_run(model, "pp=8,dp=8,tp=8", config, hardware="a100", example=ids(192, 2048), stack="megatron-2021")
    yield found, time.process_time() - begun


def test_175_billion_parameters_on_512(golden: tuple[mp.DryRun, float]) -> None:
    """arXiv 2205.05198 and the arithmetic of 2104.04473: 2.73 B parameters on a rank, 6 + 12 / 8 bytes each; 34 s b h / t a layer."""
    found, _ = golden
    copies = 2 * 51200 * 12288 / 8 * 7.5 - 51200 * 12288 / 8 * 7.5  # the tied embedding lies on the last stage too
    positions = 2048 * 12288 * 7.5
    mean = (sum(one.states for one in found.ranks) - copies - positions) / 8
    assert mean / GiB == pytest.approx(19.1, abs=0.1)
    assert found.ranks[0].activations / GiB == pytest.approx(13.7, abs=0.1)
    assert found.order is not None and found.time.bubble == pytest.approx(7 / (2 * 192), rel=0.1)


def test_it_takes_a_minute_and_three_gibibytes(golden: tuple[mp.DryRun, float]) -> None:
    assert golden[1] < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 < 3


def test_64_experts_on_1024() -> None:
    with torch.device("meta"):
        model = Decoder(MOE)
    config = mp.ParallelConfig(microbatches=8, data_parallel="zero1", precision="bf16")
    found = mp.dry_run(model, "pp=4,dp=8,ep=8,tp=4", config, hardware="h100", example=ids(8, 4096))
    exchange = next(line for line in found.ledger if line.axis == "ep" and line.kind == "all_to_all")
    rows = 4096 * 8 * 4096 * 2 * 7 / 8  # 8 copies of 4096 tokens in bf16, an eighth of which stays
    assert found.gpus == 1024 and exchange.level == "between domains" and exchange.often == "every layer"
    assert exchange.count == 4 * 1 * 8 and exchange.message == pytest.approx(rows)
    assert "experts split" in found.grids or "expert layers" in found.grids
