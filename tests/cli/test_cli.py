"""The command line: what it prints and the status it ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("transformers")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from meshpar.cli import cli  # noqa: E402

SMALL = ["--layers", "1", "--hidden", "32", "--heads", "4", "--kv-heads", "2", "--seq", "16", "--batch", "4"]


def call(*args: str) -> tuple[int, str]:
    """Exit status, and what was printed on either stream."""
    result = typer_testing.CliRunner().invoke(cli.application(), list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def own() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu()).pow(2).mean()

    return Net(), {"x": torch.randn(4, 8)}


def test_help_names_the_commands() -> None:
    status, text = call("--help")
    assert status == 0 and all(name in text for name in ("demo", "explain", "verify", "checkpoint", "Exit status: 0 done"))
    assert call("--version")[1].startswith("meshpar 0")


def test_explain() -> None:
    status, text = call("explain", *SMALL, "--mesh", "tp=2", "--code")
    assert status == 0, text
    assert "Mesh tp=2: 2 ranks" in text and "Memory of a rank" in text and "def forward" in text


def test_explain_at_a_size_nobody_has() -> None:
    status, text = call("explain", *SMALL[:-2], "--batch", "128", "--mesh", "dp=128,tp=2", "--no-memory")
    assert status == 0 and "256 ranks, 128 of them" in text and "Memory of a rank" not in text


def test_verify() -> None:
    status, text = call("verify", *SMALL, "--mesh", "dp=2,tp=2")
    assert status == 0 and "in float64: OK" in text


def test_verify_without_running_anything() -> None:
    status, text = call("verify", "--static", "--model", "tests.cli.test_cli:own", "--mesh", "dp=2,tp=2")
    assert status == 0 and "0 not proved, 0 faults" in text


def test_verify_fails_by_exit_status() -> None:
    status, text = call("verify", "--model", "tests.cli.test_cli:own", "--mesh", "tp=2", "--dtype", "float32", "--tolerance", "0")
    assert status == 1 and "FAILED" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("verify", "--mesh", "tq=2"), "unknown axis 'tq'"),
        (("verify", "--model", "lama"), "no model type 'lama'. Did you mean llama"),
        (("verify", "--model", "tests"), "A model of your own is package.module:function"),
        (("verify", "--model", "tests.cli.test_cli:nothing"), "package.module:function"),
        (("verify", "--model", "tests.cli.test_cli:onw"), "Did you mean own"),
        (("verify", "--model", "train.py:build"), "Did you mean train:build?"),
        (
            ("verify", "--model", "tests.cli.test_cli:own", "--seq", "8"),
            "--seq: tests.cli.test_cli:own returns a model and a batch of its own",
        ),
        (("demo", "--model", "tests.cli.test_cli:own"), "meshpar verify --model tests.cli.test_cli:own"),
        (("verify", "--model", "tests.cli.test_cli:call"), "must return (model, batch)"),
        (("verify", *SMALL, "--rule", "q_proj"), "write PATTERN=WHERE"),
        (("verify", *SMALL, "--rule", "*.q_pro.weight=tp:0"), "matches no parameter"),
        (("verify", *SMALL, "--dtype", "float16"), "one of float64, float32"),
        (("demo", "--batch", "6", "--mesh", "dp=4"), "Write --batch 8"),
        (("demo", "--data", "/nowhere/text"), "No such file"),
        (("demo", "--recompute", "some"), "none, selective, full"),
    ],
)
def test_what_cannot_be_meant_ends_with_2(args: tuple[str, ...], message: str) -> None:
    status, text = call(*args)
    assert status == 2 and message in text, text


def test_without_typer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "typer", None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and "pip install 'meshpar[demo]'" in capsys.readouterr().err


def test_demo(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"It was the best of times, it was the worst of times. " * 20)
    status, printed = call("demo", *SMALL, "--steps", "2", "--mesh", "tp=2", "--data", str(text))
    assert status == 0, printed


@pytest.mark.parametrize("command", ["explain", "verify"])
@pytest.mark.parametrize(
    "wrong", [("--mesh", "tp=2,xx=2"), ("--schedule", "1F1B"), ("--schedule", "zbv"), ("--virtual-stages", "2"), ("--rule", "q_proj")]
)
def test_what_is_wrong_is_told_before_a_model_is_built(monkeypatch: pytest.MonkeyPatch, command: str, wrong: tuple[str, str]) -> None:
    def built(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(cli, "_model_and_batch", built)
    assert typer_testing.CliRunner().invoke(cli.application(), [command, *wrong]).exit_code == 2


@pytest.mark.parametrize("command", ["demo", "explain", "verify"])
def test_a_schedule_wants_stages(command: str) -> None:
    status, text = call(command, "--mesh", "tp=2", "--schedule", "zbv", "--virtual-stages", "2")
    assert status == 2 and "--schedule zbv, --virtual-stages 2: of a pipeline, and the mesh tp=2 has no axis pp" in text


@pytest.mark.parametrize("command", ["demo", "explain", "verify", "dry-run", "plan", "calibrate"])
def test_help_has_an_example_that_can_be_typed_and_says_the_status(command: str) -> None:
    status, text = call(command, "--help")
    words = " ".join(text.split())
    assert status == 0 and f"Example: meshpar {command} " in words and "Exit status: 0 done, 1 the parallel program differs" in words
    assert "--json" in text


def test_json_is_one_object(tmp_path: Path) -> None:
    status, text = call("verify", *SMALL, "--mesh", "tp=2", "--steps", "1", "--json")
    found = json.loads(text)
    assert status == 0 and found["ok"] and found["mesh"] == {"tp": 2} and found["differences"][0]["ok"]
    status, text = call("verify", *SMALL, "--mesh", "tp=2", "--static", "--json")
    assert status == 0 and json.loads(text)["share"] == 1.0
    status, text = call("explain", *SMALL, "--mesh", "tp=2", "--json")
    found = json.loads(text)
    assert status == 0 and found["plan"]["mesh"] == [["tp", 2]] and found["memory"]["parameters"] > 0 and "Mesh tp=2" in found["text"]
    status, text = call("verify", "--mesh", "tq=2", "--json")
    assert status == 2 and json.loads(text)["status"] == 2 and "Did you mean" in json.loads(text)["error"]


def broken() -> None:
    raise KeyError("no such file of mine")


def test_what_fails_is_a_message_and_debug_shows_where() -> None:
    status, text = call("verify", "--model", f"{__name__}:broken")
    assert status == 3 and "KeyError: 'no such file of mine'" in text and "--debug" in text and "Traceback" not in text
    with pytest.raises(KeyError, match="no such file of mine"):
        call("--debug", "verify", "--model", f"{__name__}:broken")


def test_names_that_are_nearly_right() -> None:
    status, text = call("dry-run", "lama", "--mesh", "dp=2")
    assert status == 2 and "Did you mean" in text and "llama" in text and len(text) < 600
    status, text = call("verfy")
    assert status == 2 and "verify" in text
