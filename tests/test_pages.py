"""Every block of code in docs/ runs: Python in the order of the page, commands, scripts on two ranks; and links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from meshpar.graph.operators import OPERATORS
from tests.integrations.training import launched
from tests.pool import Pool

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
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


def blocks(name: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)


def test_every_block_has_a_kind_that_is_run() -> None:
    """Python, Python with a title (a script for ranks), commands, and scripts of a shell; the rest is indented, and text."""
    found = {line for name in PAGES for line in re.findall(r"^```(\S.*)$", (DOCS / name).read_text(), re.MULTILINE)}
    assert {re.sub(r'title="\w+\.py"', 'title=""', kind) for kind in found} <= {"python", 'python title=""', "console", "bash"}
    assert len(RUN) >= 10


@pytest.mark.parametrize("name", RUN)
def test_a_page_runs(name: str, tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    with chdir(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, block in enumerate(blocks(name, "python")):
            exec(compile(block, f"{name}, block {number}", "exec"), names)
        for line in "".join(blocks(name, "console")).splitlines():
            _command(line)


def _command(line: str) -> None:
    testing = pytest.importorskip("typer.testing")
    from meshpar.cli import cli

    program, *arguments = shlex.split(line)
    assert program == "meshpar"
    found = testing.CliRunner().invoke(cli.application(), arguments)
    assert found.exit_code == 0, f"{line}\n{found.output}"


def scripts(folder: str) -> list[str]:
    """The scripts of the page of recipes, one after the other, as ranks run them."""
    found = re.findall(r'^```python title="(\w+\.py)"\n(.*?)^```', (DOCS / "recipes.md").read_text(), re.DOTALL | re.MULTILINE)
    with launched(), chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, script in found:
            exec(compile(script, name, "exec"), {"__name__": "__main__"})
    return [name for name, _ in found]


def test_the_scripts_of_the_recipes_run_on_ranks(gloo: Pool, tmp_path: Path) -> None:
    for names in gloo.run(scripts, str(tmp_path), world=2, timeout=240):
        assert names == ["train.py", "resume.py", "big.py"]
    assert (tmp_path / "run" / "manifest.json").exists()


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


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert {name for name in PAGES if name not in menu} == set()
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb") if path.name not in menu} == set()
