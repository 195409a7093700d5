"""The blocks of code in docs/training.md run, one after the other, on two data ranks."""

from __future__ import annotations

import re
import warnings
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.training import launched
from tests.pool import Pool

PAGE = Path(__file__).parents[1] / "docs" / "training.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


def run(folder: str) -> list[str]:
    """Names that the blocks made."""
    names: dict[str, Any] = {"__name__": "page"}
    with launched(), chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, block in enumerate(blocks()):
            exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    return list(names)


@pytest.mark.slow
def test_the_page_runs(gloo: Pool, tmp_path: Path) -> None:
    assert len(blocks()) == 7
    for names in gloo.run(run, str(tmp_path), world=2, timeout=240):
        assert {"padded", "trainer", "accelerator", "fabric", "adapters"} <= set(names)
    made = {path.name for path in tmp_path.iterdir()}
    assert {"exported", "state", "fabric", "lightning.ckpt", "adapter"} <= made
