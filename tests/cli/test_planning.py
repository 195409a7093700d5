"""`meshpar dry-run` and `meshpar plan`: what they print, what they write, and what they say of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshpar.config import ParallelConfig
from meshpar.mesh import parse_mesh

pytest.importorskip("typer.testing")
pytest.importorskip("transformers")

from tests.cli.test_cli import call

SIZES = "layers=4,hidden=256,heads=8,ffn=1024,vocab=4096"
PLAN = ("plan", SIZES, "--gpus", "16", "--global-batch", "64", "--seq", "512")


def dry(*args: str) -> dict[str, object]:
    status, text = call("dry-run", SIZES, "--seq", "256", "--json", *args)
    assert status == 0, text
    found: dict[str, object] = json.loads(text[text.index("{") :])
    return found


def test_a_dry_run_in_words() -> None:
    status, text = call("dry-run", SIZES, "--seq", "256", "--mesh", "pp=2,dp=2,tp=2", "--microbatches", "4")
    assert status == 0, text
    assert "8 x h100 as pp=2,dp=2,tp=2" in text and "Communication of a rank in a step" in text and "MFU" in text


def test_the_best_mapping_is_written_and_read_again(tmp_path: Path) -> None:
    """The file is one for --config, parse_mesh and ParallelConfig; options beside it replace what it says."""
    path = tmp_path / "best.toml"
    status, text = call(*PLAN, "--toml", str(path), "--json")
    assert status == 0, text
    best = json.loads(text[text.index("{") :])["ranked"][0]
    config = ParallelConfig.from_toml(path)
    sizes = parse_mesh(path)
    assert sizes.get("tp", 1) == best["tp"] and sizes.get("pp", 1) == best["pp"]
    found = dry("--config", str(path))
    assert found["gpus"] == 16
    other = dry("--config", str(path), "--data-parallel", "replicate", "--microbatches", str(2 * config.microbatches))
    assert other["seconds"]["step"] > found["seconds"]["step"]  # type: ignore[index]


def test_a_plan_in_words() -> None:
    status, text = call(*PLAN)
    assert status == 0 and "torchrun" in text and 'mesh = "' in text and "srun --nodes=2" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("dry-run",), "dry-run wants a model and --mesh"),
        (("dry-run", "layers=4,hiden=256", "--mesh", "tp=2"), "'hiden' is no size of a model. Did you mean hidden"),
        (("dry-run", SIZES, "--mesh", "tp=2", "--gpu", "h1000"), "no accelerator 'h1000'. Did you mean h100"),
        (("dry-run", SIZES, "--mesh", "tq=2"), "tq"),
        (("dry-run", SIZES, "--mesh", "tp=2", "--schedule", "1fb1"), "schedule='1fb1': one of"),
        (("dry-run", SIZES, "--megatron", "job.yaml", "--microbatches", "2"), "--megatron FILE says what MODEL, --microbatches would"),
        (("plan", SIZES, "--gpus", "12", "--global-batch", "64", "--seq", "512"), "gpus=12 is no whole number of servers"),
    ],
)
def test_mistakes_end_with_one_sentence_and_no_trace(args: tuple[str, ...], words: str) -> None:
    status, text = call(*args)
    assert status != 0 and words in " ".join(text.split()) and "Traceback" not in text
