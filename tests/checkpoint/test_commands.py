"""The commands: what they print, with and without --json, and their exit status."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from meshpar.checkpoint import inspection
from meshpar.checkpoint.commands import app, parse_size
from meshpar.errors import ConfigError
from tests.checkpoint.making import flip, load, same, sample, save, save_folder


def call(*args: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def call_json(*args: object, status: int = 0) -> Any:
    return json.loads(call(*args, "--json", status=status))


def test_the_whole_way(tmp_path: Path) -> None:
    hf, a, b, back = (tmp_path / n for n in ("hf", "a", "b", "back"))
    save_folder(hf, sample(), 2, {"config.json": "{}"})
    assert "wrote" in call("from-hf", hf, a, "--mesh", "tp=2,dp=2")
    assert "would write" in call("reshard", a, b, "--mesh", "tp=4,pp=2,dp=2,ep=8", "--dry-run", "--max-memory", "256MiB", "--workers", "2")
    assert not b.exists()
    report = call_json("reshard", a, b, "--mesh", "tp=4,pp=2,dp=2,ep=8")
    assert report["mesh"] == "pp=2,dp=2,ep=8,tp=4" and report["bytes_read"] == report["nbytes"] == report["bytes_written"]
    assert "embed.weight" in call("inspect", b)
    assert call_json("inspect", b)["tensors"]["embed.weight"]["shape"] == [131, 8]
    assert call_json("verify", b)["ok"] is True and "ok" in call("verify", b)
    assert call_json("diff", a, b)["same"] is True
    assert "the structure is right, values were not checked" in " ".join(call("verify", hf).split())
    call("to-hf", b, back)
    assert same(load(back), sample()) and "the same" in call("diff", hf, back)
    assert {row["name"]: row["state"] for row in call_json("ls", tmp_path)["checkpoints"]} == dict.fromkeys(
        ("hf", "a", "b", "back"), "complete"
    )
    assert call_json("gc", tmp_path) == {"removed": [], "dry_run": False}


@pytest.mark.parametrize("name", [command.name for command in app.registered_commands])
def test_help_has_an_example_that_can_be_typed_and_says_the_status(name: str) -> None:
    words = " ".join(call(name, "--help").split())
    example = words.partition("Example: meshpar checkpoint ")[2].partition(" Exit status: 0 done, 1 differs")[0]
    command, *arguments = shlex.split(example)
    assert command == name and "--json" in words
    typer.main.get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_names_that_are_nearly_right(tmp_path: Path) -> None:
    (tmp_path / "step-100").mkdir()
    assert "Did you mean 'inspect'" in call("inspekt", status=2)
    assert "--mesh" in call("reshard", "a", "b", "--mash", "tp=2", status=2)
    assert "Did you mean step-100?" in call("inspect", tmp_path / "step-10", status=2)
    assert "Did you mean step-100?" in call("ls", tmp_path / "step100", status=2)
    assert "Did you mean step-100?" in call("from-dcp", tmp_path / "step_100", "b", "--mesh", "tp=2", status=2)
    save(tmp_path / "ours", sample(), "tp=2")
    assert "is a meshpar checkpoint already" in call("from-dcp", tmp_path / "ours", "b", "--mesh", "tp=2", status=2)
    assert "file 'rules.txt' does not exist" in call("to-hf", tmp_path, "b", "--map", "rules.txt", status=2)


def test_what_goes_wrong_unforeseen_is_a_message_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(inspection, "inspect", broken)
    assert call("inspect", tmp_path, status=3) == "RuntimeError: out of luck (meshpar --debug checkpoint ... shows where)\n"
    assert call_json("inspect", tmp_path, status=3)["kind"] == "RuntimeError"
    assert isinstance(CliRunner().invoke(app, ["inspect", str(tmp_path)], obj=True).exception, RuntimeError)


def test_exit_statuses(tmp_path: Path) -> None:
    save(tmp_path / "a", sample(), "tp=2")
    save(tmp_path / "other", sample(5), "tp=2")
    found = call_json("diff", tmp_path / "a", tmp_path / "other", status=1)
    assert found["same"] is False and found["differences"][0]["kind"] == "values"
    call("reshard", tmp_path / "a", status=2)
    assert call_json("reshard", tmp_path / "a", tmp_path / "b", "--mesh", "tq=2", status=2)["error"].startswith("Mesh 'tq=2'")
    call("reshard", tmp_path / "a", tmp_path / "b", status=2)
    call("reshard", tmp_path / "no", tmp_path / "b", "--mesh", "tp=2", status=2)
    call("reshard", tmp_path / "a", tmp_path / "b", "--mesh", "tp=2", "--max-memory", "1kB", status=4)
    assert call_json("reshard", tmp_path / "a", tmp_path / "other", "--mesh", "tp=2", status=5)["kind"] == "StorageError"
    (tmp_path / "other" / "stray.txt").write_text("x")
    assert call_json("verify", tmp_path / "other", status=1)["unexpected"]
    path = tmp_path / "a" / "rank-00001.safetensors"
    flip(path, path.stat().st_size - 1)
    assert "crc32" in call_json("verify", tmp_path / "a", status=3)["corrupt"][0]
    assert call_json("reshard", tmp_path / "a", tmp_path / "b", "--mesh", "tp=1", status=3)["kind"] == "CorruptError"
    (tmp_path / "a" / "manifest.json").write_text("{}")
    for command in (("inspect",), ("verify",), ("diff", tmp_path / "other"), ("to-hf", tmp_path / "b")):
        call(command[0], tmp_path / "a", *command[1:], status=3)
    assert call_json("ls", tmp_path)["checkpoints"][0]["state"] == "corrupt"


def test_key_maps_and_dtype_on_the_command_line(tmp_path: Path) -> None:
    save_folder(tmp_path / "hf", sample())
    (tmp_path / "map.txt").write_text("# names\nlayers.{rest*} -> blocks.{rest*}\n")
    call(
        "from-hf",
        tmp_path / "hf",
        tmp_path / "a",
        "--mesh",
        "tp=2",
        "--map",
        tmp_path / "map.txt",
        "--rule",
        "wide [a b] -> wide [b a]",
        "--dtype",
        "bf16",
    )
    facts = call_json("inspect", tmp_path / "a")
    assert facts["tensors"]["wide"]["shape"] == [17, 3] and facts["tensors"]["blocks.1.down.weight"]["dtype"] == "BF16"
    call("to-hf", tmp_path / "a", tmp_path / "back")
    found = call_json("diff", tmp_path / "hf", tmp_path / "back", "--tolerance", "0.05")
    assert found["same"], found
    assert call_json("diff", tmp_path / "hf", tmp_path / "back", status=1)["differences"][0]["kind"] == "dtype"


@pytest.mark.parametrize(("text", "size"), [("256MiB", 256 << 20), ("1GB", 10**9), ("4096", 4096), ("1.5 KiB", 1536), ("2g", 2 * 10**9)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_sizes_that_mean_nothing() -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size("lots")


def test_help_names_every_command() -> None:
    text = call("--help")
    for name in ("inspect", "verify", "diff", "reshard", "to-hf", "from-hf", "from-dcp", "to-dcp", "ls", "gc"):
        assert name in text
