"""Every block of code in docs/ runs: Python in the order of the page, commands, scripts on two ranks; and links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest
from torch.distributed import run as torchrun

import meshpar as mp
from meshpar.graph.operators import OPERATORS
from tests.integrations.training import launched
from tests.pool import Pool

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
ELSEWHERE = {"training.md"}
"""Pages whose blocks `tests/test_docs.py` runs."""
RUN = [name for name in PAGES if name not in ELSEWHERE and "```python\n" in (DOCS / name).read_text()]


@pytest.fixture(autouse=True)
def operators_as_before() -> Iterator[None]:
    before = dict(OPERATORS)
    yield
    OPERATORS.clear()
    OPERATORS.update(before)


KINDS = {
    "python": "runs, in the order of the page",
    'python title="X.py"': "a script, which ranks run",
    "console": "commands that run",
    'console title="X"': "commands that are read: they take long, want files that are not here, or install",
    "ipython": "cells of a notebook that runs",
    "bash": "a script of a shell, which is read",
}
"""What comes after the fence of a block; anything else is indented, and a drawing."""
SMALLER = {
    "large.md": {
        "layers=96": "layers=4",
        "layers=8": "layers=2",
        '"pp=8,': '"pp=2,',
        '"pp=4,': '"pp=2,',
        "192": "12",
        "experts=64": "experts=8",
    }
}
"""Sizes that a page is run with here (`tests/dry_run` has those that it names)."""
INSTALLED = {"pip", "tox"}
"""Programs that change an environment: what they are told is compared with the project's file."""


def fenced(name: str) -> list[tuple[str, str, str]]:
    """`(kind, title, text)` of every block of a page, also of those in lists."""
    found = re.findall(r"^( *)```(\w+)(?: title=\"(.*?)\")?\n(.*?)^\1```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)
    return [(kind, title, dedent(text)) for _, kind, title, text in found]


def blocks(name: str, kind: str, *, titled: bool = False) -> list[str]:
    return [text for found, title, text in fenced(name) if found == kind and bool(title) == titled]


def test_every_block_has_a_kind_that_is_run() -> None:
    found = {line for name in PAGES for line in re.findall(r"^ *```(\S.*)$", (DOCS / name).read_text(), re.MULTILINE)}
    titles = [(r'(?<=python )title="\w+\.py"', 'title="X.py"'), (r'(?<=console )title="[\w ]+"', 'title="X"')]
    assert {re.sub(*titles[0], re.sub(*titles[1], kind)) for kind in found} == set(KINDS)  # type: ignore[call-overload]
    assert len(RUN) >= 15


@pytest.mark.parametrize("page", [*(DOCS / name for name in PAGES), ROOT / "README.md"], ids=lambda path: path.name)
def test_what_is_indented_is_no_code(page: Path) -> None:
    """Nor a command, but for the README's two that install."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for block in re.findall(r"(?<=\n\n)(?:(?: {4}.*)?\n)+(?=\S|\Z)", text):
        assert not is_code(dedent(block)), f"{page.name}: put this into a block that runs:\n{block}"
        assert page.name == "README.md" or not re.match(r"\s*(\$ |meshpar |torchrun |pip |python )", block), block


def is_code(text: str) -> bool:
    try:
        return bool(ast.parse(text).body)
    except SyntaxError:
        return text.lstrip().startswith(">>>")


def test_what_would_be_found_is() -> None:
    assert is_code("pm = mp.parallelize(model, mesh)   # so\n") and is_code(">>> 1\n") and not is_code("S -> R  all-gather\n")


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", RUN)
def test_a_page_runs(name: str, tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    with chdir(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, block in enumerate(blocks(name, "python")):
            for large, small in SMALLER.get(name, {}).items():
                block = block.replace(large, small)
            _run(block, tmp_path / f"{Path(name).stem}_{number}.py", names)
        for line in "".join(blocks(name, "console")).splitlines():
            _command(line)


def _run(text: str, path: Path, names: dict[str, Any]) -> None:
    """As a file, whose lines can be read by what reads a model's code."""
    path.write_text(text)
    exec(compile(text, str(path), "exec"), names)


def _command(line: str) -> None:
    testing = pytest.importorskip("typer.testing")
    from meshpar.cli import cli

    program, *arguments = shlex.split(line)
    assert program == "meshpar"
    found = testing.CliRunner().invoke(cli.application(), arguments)
    assert found.exit_code == 0, f"{line}\n{found.output}"


@pytest.mark.parametrize(
    ("name", "line"), [(name, line) for name in PAGES for block in blocks(name, "console", titled=True) for line in block.splitlines()]
)
def test_a_command_that_is_not_run_can_be_typed(name: str, line: str) -> None:
    for command in line.split(" && "):
        program, *arguments = shlex.split(command)
        if program == "meshpar":
            _parse(arguments)
        elif program == "torchrun":
            given = torchrun.parse_args(arguments)
            assert given.training_script in [title for _, title, _ in fenced(name)]
        else:
            assert program in INSTALLED, program
            extras = {extra for argument in arguments for extra in re.findall(r"^\.\[(\w+)\]$", argument)}
            assert extras <= set(PROJECT["project"]["optional-dependencies"]) and "tox" in PROJECT["tool"]


def _parse(arguments: list[str]) -> None:
    """Read the options of a command, and of commands of commands, without running it."""
    typer = pytest.importorskip("typer")
    from meshpar.cli import cli

    command, rest = typer.main.get_command(cli.application()), list(arguments)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    command.make_context("meshpar", rest)


def test_cells_are_those_of_notebooks_that_run() -> None:
    cells = [cell["source"] for path in (ROOT / "notebooks").glob("*.ipynb") for cell in json.loads(path.read_text())["cells"]]
    known = {line.rstrip("\n") for source in cells for line in source}
    found = [line for name in PAGES for block in blocks(name, "ipython") for line in block.splitlines()]
    assert len(found) > 2 and set(found) <= known


SCRIPTS = {
    "recipes.md": [("train.py", ()), ("resume.py", ()), ("big.py", ())],
    "pipelines.md": [("pipeline.py", ())],
    "loop.md": [("train.py", ("dp=2", "2")), ("train.py", ("tp=2", "4"))],
}
"""The scripts of a page as they are run: with what arguments, one after the other."""


def scripts(name: str, folder: str) -> list[dict[str, Any]]:
    """What the scripts of a page leave, on this rank: numbers and text."""
    found = {title: text for kind, title, text in fenced(name) if kind == "python" and title}
    left = []
    with launched(), chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for title, arguments in SCRIPTS[name]:
            names: dict[str, Any] = {"__name__": "__main__"}
            before, sys.argv = sys.argv, [title, *arguments]
            try:
                _run(found[title], Path(folder, f"{os.environ['RANK']}_{title}"), names)
            finally:
                sys.argv = before
            left.append({key: value for key, value in names.items() if isinstance(value, (int, float, str))})
    return left


def test_all_scripts_are_known() -> None:
    assert {name: {title for kind, title, _ in fenced(name) if kind == "python" and title} for name in SCRIPTS} == {
        name: {title for title, _ in runs} for name, runs in SCRIPTS.items()
    }
    assert {name for name in PAGES if blocks(name, "python", titled=True)} == set(SCRIPTS)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_of_a_page_run_on_ranks(name: str, gloo: Pool, tmp_path: Path) -> None:
    one, other = gloo.run(scripts, name, str(tmp_path), world=2, timeout=240)
    if name == "recipes.md":
        assert (tmp_path / "run" / "manifest.json").exists()
    if name == "loop.md":
        assert [run["step"] for run in one] == [2, 4] and one[1]["valid"] == other[1]["valid"] < one[0]["valid"] < 4
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"step-2", "step-4"}


def test_scripts_of_a_shell_are_well_formed() -> None:
    found = [block for name in PAGES for block in blocks(name, "bash")]
    for block in found:
        assert subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True).returncode == 0
    assert len(found) == 1


@pytest.mark.parametrize("page", [*(DOCS / name for name in PAGES), ROOT / "README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if place.startswith("https://"):
            continue
        there = (page.parent / place) if place else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, f"{page.name} links to {target}"


def test_the_reference_has_every_public_name() -> None:
    """And each of them is where the package says: modules by what is public in them."""
    named = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    for place in named:
        module, _, name = place.rpartition(".")
        getattr(importlib.import_module(module), name)
    found = {place.rpartition(".")[2] for place in named}
    modules = {name for name in mp.__all__ if isinstance(getattr(mp, name), ModuleType)}
    assert set(mp.__all__) - modules <= found
    assert {name for name in modules if not any(place == f"meshpar.{name}" or f".{name}." in place for place in named)} == set()


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert {name for name in PAGES if name not in menu} == set()
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb") if path.name not in menu} == set()
