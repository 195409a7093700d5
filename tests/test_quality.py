"""The tools that read the code: format, lint, types, and what no file may say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODELS = r"\b(llama|mi[sx]tral|gpt2|gpt_?neox?|gptj|qwen|gemma|bloom|falcon|deepseek|olmo|phi3|mamba|cohere|starcoder|stablelm)\d*\b"


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_format() -> None:
    run("ruff", "format", "--check", ".")


def test_ruff_check() -> None:
    run("ruff", "check", ".")


def test_mypy() -> None:
    run("mypy")


@pytest.mark.sweep(330)
@pytest.mark.parametrize("path", sorted((ROOT / "meshpar").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_names_no_model(path: Path) -> None:
    if path.name in ("cli.py", "demo.py"):
        pytest.skip("the demo chooses a model by name")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert not re.search(MODELS, line, re.IGNORECASE), f"{path}:{number} names a model: {line.strip()}"
