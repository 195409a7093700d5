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


FILES = {
    "BROKEN.json": "{",
    "OTHER.json": '{"a": 1}',
    "HALF.json": '{"meshpar": "machine", "memory": -1, "measured": {}}',
    "JOB.json": json.dumps(
        {"num_layers": "4", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 9, "seq_length": 8, "micro_batch_size": 0}
        | {"global_batch_size": 8, "world_size": 8}
    ),
}


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
    status, text = call("dry-run", SIZES, "--json", "--config", str(path))
    assert status == 0, text
    same = json.loads(text[text.index("{") :])  # the batch is the plan's, too
    assert (same["tokens"], same["precision"], same["bubble"] >= 0) == (64 * 512, "bf16", True)
    found = dry("--config", str(path))
    assert found["gpus"] == 16 and found["tokens"] == 64 * 256
    other = dry("--config", str(path), "--data-parallel", "replicate", "--microbatches", str(2 * config.microbatches))
    assert other["seconds"]["step"] > found["seconds"]["step"]  # type: ignore[index]


def test_a_plan_in_words() -> None:
    status, text = call(*PLAN)
    assert status == 0 and "torchrun" in text and 'mesh = "' in text and "srun --nodes=2" in text


@pytest.mark.sweep(9)
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("dry-run",), "dry-run wants a model and --mesh"),
        (("dry-run", "layers=4,hiden=256", "--mesh", "tp=2"), "'hiden' is no size of a model. Did you mean hidden"),
        (("dry-run", SIZES, "--mesh", "tp=2", "--gpu", "h1000"), "no accelerator 'h1000'. Did you mean h100"),
        (("dry-run", SIZES, "--mesh", "tq=2"), "tq"),
        (("dry-run", SIZES, "--mesh", "tp=2", "--schedule", "1fb1"), "schedule='1fb1': one of"),
        (
            ("dry-run", SIZES, "--mesh", "dp=2,tp=2", "--schedule", "zbv"),
            "the mesh dp=2,tp=2 has no axis pp. Add one (--mesh pp=2,dp=2,tp=2)",
        ),
        (("dry-run", SIZES, "--megatron", "job.yaml", "--microbatches", "2"), "--megatron FILE says what MODEL, --microbatches would"),
        (("plan", SIZES, "--gpus", "12", "--global-batch", "64", "--seq", "512"), "gpus=12 is no whole number of servers"),
        (("plan", SIZES, "--gpus", "8", "--seq", "512"), "Missing option '--global-batch'"),
        (("plan", SIZES, "--gpus", "0", "--global-batch", "64"), "Input should be greater than or equal to 1"),
        (
            ("plan", "layers=2,hidden=250,heads=8,ffn=4,vocab=9", "--gpus", "8", "--global-batch", "8"),
            "hidden=250 is not divisible by heads",
        ),
        (("plan", f"{SIZES},experts=8", "--gpus", "8", "--global-batch", "8"), "top_k=0 of experts=8; a token goes to between 1 and all"),
        (("plan", f"{SIZES},top_k=2", "--gpus", "8", "--global-batch", "8"), "mean something with experts only"),
        (("plan", "no_such_type", "--gpus", "8", "--global-batch", "8"), "Write sizes (layers=80"),
        (("plan", "no.module:here", "--gpus", "8", "--global-batch", "8"), "Write package.module:function"),
        ((*PLAN, "--precision", "fp6"), "precision='fp6'; h100 has bf16, fp16, fp8"),
        ((*PLAN, "--stack", "megatron"), "no software stack 'megatron'. Did you mean megatron-2024"),
        ((*PLAN, "--toml", "/no/folder/x.toml"), "--toml /no/folder/x.toml: there is no folder /no/folder"),
        ((*PLAN, "--hardware", "/no/folder/x.json"), "No such file or directory. `meshpar calibrate FILE` writes such a file"),
        ((*PLAN, "--hardware", "BROKEN.json"), "BROKEN.json is no JSON"),
        ((*PLAN, "--hardware", "OTHER.json"), "OTHER.json is no hardware. `meshpar calibrate FILE` writes such a file"),
        ((*PLAN, "--hardware", "HALF.json"), "memory=-1; a number above 0. measured.cores is missing"),
        (("plan", "layers=400,hidden=25600,heads=8,ffn=51200,vocab=9", "--gpus", "8", "--global-batch", "8"), "nothing fits. The least is"),
        (("dry-run", SIZES, "--mesh", "tp=x"), '"tp=x" is not name=size'),
        (("dry-run", SIZES, "--mesh", "dp=2", "--recompute", "some"), "recompute='some': one of none, selective, full"),
        (("dry-run", SIZES, "--mesh", "dp=2", "--data-parallel", "zero4"), "one of replicate, zero1, zero2, zero3"),
        (("dry-run", SIZES, "--mesh", "dp=2", "--precision", "fp7"), "precision='fp7'"),
        (("dry-run", SIZES, "--mesh", "dp=12"), "gpus=12 is no whole number of servers"),
        (("dry-run", SIZES, "--mesh", "dp=2", "--plot", "/no/folder/x.png"), "--plot /no/folder/x.png: there is no folder"),
        (("dry-run", SIZES, "--config", "/no/such.toml"), "`meshpar plan` writes such a file"),
        (("dry-run", "--megatron", "/no/such.yaml"), "--megatron /no/such.yaml: No such file or directory"),
        (("dry-run", "--megatron", "BROKEN.json"), "BROKEN.json is no JSON"),
        (("dry-run", "--megatron", "JOB.json"), "num_layers='4': a whole number of at least 1. micro_batch_size=0: a whole number"),
        (("calibrate", "here.toml"), "path='here.toml': a name that ends in .json"),
        (
            ("calibrate", "/no/folder/x.json", "--ranks", "0", "--rounds", "99"),
            "there is no folder /no/folder. ranks=0: a whole number from 1",
        ),
        (("calibrate", "x.json", "--step", "1"), "calibrate --step wants --model and --mesh"),
        (("calibrate", "x.toml", "--step", "1", "--model", SIZES, "--mesh", "dp=2"), "path='x.toml': a name that ends in .json"),
    ],
    ids=str,
)
def test_mistakes_end_with_one_sentence_and_no_trace(
    args: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, body in FILES.items():
        Path(name).write_text(body)
    status, text = call(*args)
    assert status != 0 and words in " ".join(text.split()) and "Traceback" not in text


@pytest.mark.slow
def test_one_measured_step_scales_what_follows(tmp_path: Path) -> None:
    """A step that took twice as long as estimated: every estimate with the file is twice as long."""
    before, path = dry("--mesh", "dp=2")["seconds"], tmp_path / "slow.json"
    asked = ("--model", SIZES, "--mesh", "dp=2", "--seq", "256", "--gpu", "h100")
    status, text = call("calibrate", str(path), "--step", str(2 * before["step"]), *asked)  # type: ignore[index]
    assert status == 0 and "scale 2.000" in text, text
    after = dry("--mesh", "dp=2", "--hardware", str(path))
    assert after["seconds"]["step"] == pytest.approx(2 * before["step"])  # type: ignore[index]
    assert after["hardware"] == "h100"
