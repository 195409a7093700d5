"""Pipelines against one device: loss, every gradient, gradient norm and three optimizer steps, in float64, to 1e-9.

`python benchmarks/pipeline_exactness/run.py` runs every model with every schedule.
"""

from __future__ import annotations

from typing import Any

import pytest

import meshpar as mp
from tests.models import plain, text, tiny
from tests.pipeline.models import MADE, made
from tests.pool import Pool

Case = tuple[str, str, dict[str, Any], dict[str, Any]]
"""Model, mesh, fields of ParallelConfig, changes of the model."""

SCHEDULES: list[Case] = [
    ("chain", "pp=2", {"microbatches": 1}, {}),
    ("chain5", "pp=2", {"microbatches": 8, "schedule": "gpipe"}, {}),
    ("chain5", "pp=2", {"microbatches": 4, "schedule": "looped-bfs"}, {}),
    ("chain8", "pp=2", {"microbatches": 8, "schedule": "interleaved-1f1b", "virtual_stages": 3}, {}),
    ("chain5", "pp=2", {"microbatches": 4, "schedule": "zero-bubble", "virtual_stages": 2}, {}),
    ("tied", "pp=2", {"microbatches": 8, "schedule": "zbv"}, {}),
    ("tied", "pp=2", {"microbatches": 4, "schedule": "dualpipev", "recompute": "full"}, {}),
]
SHAPES: list[Case] = [
    ("frozen_start", "pp=2", {"microbatches": 4, "schedule": "zbv"}, {}),
    ("early_loss", "pp=2", {"microbatches": 2}, {}),
    ("everywhere", "pp=2", {"microbatches": 4, "schedule": "interleaved-1f1b"}, {}),
    ("one_stage", "pp=2", {"microbatches": 2}, {}),
    ("shared", "pp=2", {"microbatches": 4, "schedule": "interleaved-1f1b"}, {}),
    ("batch_norm", "pp=2", {"microbatches": 1}, {}),
    ("unet", "pp=2", {"microbatches": 4, "schedule": "zero-bubble"}, {}),
]
FOUR: list[Case] = [
    ("chain5", "pp=4", {"microbatches": 2}, {}),
    ("bare", "pp=4", {"microbatches": 4, "schedule": "zero-bubble"}, {}),
    ("shared", "pp=2,dp=2", {"microbatches": 4, "schedule": "zbv", "data_parallel": "zero2"}, {}),
    ("tied", "pp=2,dp=2", {"microbatches": 4, "schedule": "zbv", "data_parallel": "zero3"}, {}),
    ("tied", "pp=2,dp=2", {"microbatches": 2, "data_parallel": "replicate", "recompute": "selective"}, {}),
    ("batch_norm", "pp=2,dp=2", {"microbatches": 1}, {}),
    ("vit", "pp=2,tp=2", {"microbatches": 2}, {}),
]
LANGUAGE: list[Case] = [
    ("llama", "pp=2,tp=2", {"microbatches": 4, "schedule": "zbv"}, {}),
    ("t5", "pp=2,dp=2", {"microbatches": 4, "schedule": "zero-bubble", "data_parallel": "zero2"}, {"num_hidden_layers": 2}),
]


def model_and_batch(name: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    """One of the models of the tests, by name."""
    if name in MADE:
        return made(name)
    if name in ("gpt", "gpt_kv2", "encoder_decoder", "vit", "mixer"):
        return plain(name)
    return tiny(name, **{"num_hidden_layers": 4, **changes}), text(8)


def verify(cases: list[Case]) -> list[str]:
    """On a rank: the report of every case that is not exact."""
    failed = []
    for name, mesh, fields, changes in cases:
        model, batch = model_and_batch(name, changes)
        report = mp.verify(model, mp.make_mesh(mesh), batch, config=mp.ParallelConfig(**fields), steps=2)
        if not report.ok:
            failed.append(f"{fields} {changes}\n{report}")
    return failed


def test_every_schedule(gloo: Pool) -> None:
    assert gloo.run(verify, SCHEDULES, world=2, timeout=240) == [[]] * 2


@pytest.mark.slow
def test_models_of_every_shape(gloo: Pool) -> None:
    assert gloo.run(verify, SHAPES, world=2, timeout=240) == [[]] * 2


@pytest.mark.slow
def test_four_ranks(gloo: Pool) -> None:
    assert gloo.run(verify, FOUR, world=4, timeout=300) == [[]] * 4


@pytest.mark.sweep(1)
@pytest.mark.parametrize("case", LANGUAGE, ids=lambda case: f"{case[0]} {case[1]}")
def test_language_models(gloo: Pool, case: Case) -> None:
    assert gloo.run(verify, [case], world=4, timeout=240) == [[]] * 4
