"""Every notebook runs from top to bottom."""

from __future__ import annotations

import os
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import pytest

from tests import cells

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_PER_CELL = 240
"""A busy machine needs a while to import torch."""
LARGEST = 700_000
"""Bytes of a notebook."""

nbformat = pytest.importorskip("nbformat", reason="the notebooks extra is not installed")
nbclient = pytest.importorskip("nbclient", reason="the notebooks extra is not installed")


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


IN_A_KERNEL = "08_real_ranks"
"""Its ranks are copies of a kernel, which it interrupts; the others are run by IPython without one, in less time."""


@pytest.mark.sweep(2)
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem != IN_A_KERNEL], ids=lambda p: p.stem)
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    failed = cells.run([cell.source for cell in notebook.cells if cell.cell_type == "code"], path.parent, timeout=SECONDS_PER_CELL)
    assert failed is None, failed


@pytest.mark.parametrize(
    ("source", "said"), [("x = 1\nx +", "SyntaxError"), ("assert False, 'so'", "so"), ("import os; os._exit(1)", "died")]
)
def test_a_cell_that_fails_is_told(source: str, said: str, tmp_path: Path) -> None:
    failed = cells.run(["y = 1", source], tmp_path, timeout=SECONDS_PER_CELL)
    assert failed is not None and said in failed


@pytest.mark.slow
def test_notebook_runs_in_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "notebooks" / f"{IN_A_KERNEL}.ipynb"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        startup_timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_committed(path: Path) -> None:
    """With at least one picture, no error, and no folder of the machine that ran it; small enough to read in a browser."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "run it from top to bottom before it is committed"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    said = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work)/", said)
    assert path.stat().st_size < LARGEST


DEFAULT = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40))
"""matplotlib's own blue, orange, green and red, two of which many people cannot tell apart: pictures are drawn in `mp.plot.COLOURS`."""


@pytest.mark.sweep(4)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_pictures_have_the_colours_of_the_package_on_white(path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    every = nbformat.read(path, as_version=4).cells
    for text in [o.data["image/png"] for cell in every for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]:
        pixels = (255 * pyplot.imread(BytesIO(b64decode(text)))).round().reshape(-1, 4)
        assert pixels[0].tolist() == [255, 255, 255, 255]  # (a dark page shows it as it was drawn)
        assert not any((pixels[:, :3] == colour).all(1).any() for colour in DEFAULT)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_says_what_one_will_see_and_what_to_try(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    first, last = notebook.cells[0], notebook.cells[-1]
    assert first.cell_type == last.cell_type == "markdown"
    assert "you will see" in first.source.replace("\n", " ") and "**Try next.**" in last.source
    assert "assert" in "".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


CELLS = (
    "import torch\nfrom torch import nn\nimport meshpar as mp",
    "class Net(nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))\n"
    "        self.act = lambda x: x.tanh()\n"
    "    def forward(self, x):\n"
    "        for layer in self.layers:\n"
    "            x = x + self.act(layer(x))\n"
    "        return x.square().mean()\n"
    "torch.manual_seed(0)\nmodel, batch = Net(), {'x': torch.randn(4, 8)}\nmodel(**batch).backward()",
    "print(mp.verify(model, 'pp=2', batch, config=mp.ParallelConfig(microbatches=2)))",
    "print(mp.verify(model, 'dp=2,tp=2', batch, processes=True))",
)
"""A model of the notebook's own, which cannot be pickled, and ranks that are processes."""


@pytest.mark.slow
def test_verify_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=SECONDS_PER_CELL, startup_timeout=SECONDS_PER_CELL, kernel_name="python3", resources=resources
    ).execute()
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]
    assert "on pp=2 (2 gloo processes) against one device, in float64: OK" in said[2], said
    assert "on dp=2,tp=2 (4 gloo processes) against one device, in float64: OK" in said[3], said
