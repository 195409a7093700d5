"""The README: what its tables say works is made and proved, its example runs, its second command is that of continuous integration."""

from __future__ import annotations

import re
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshpar as mp
from meshpar.config import SCHEDULES
from meshpar.proof.alone import static_report
from tests.integrations.training import launched
from tests.pool import Pool

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
AXES = ("pp", "dp", "cp", "ep", "tp")


class Experts(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(experts, width, width)) for _ in range(2))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.up.shape[0]):
            token, choice = torch.where(index == number)
            out.index_add_(0, token, (x[token] @ self.up[number]).relu() @ self.down[number] * weights[token, choice, None])
        return out


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.router, self.experts = nn.Linear(width, 4), Experts(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = (y.view(b, s, 4, -1).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, w))
        weights, index = self.router(x.flatten(0, 1)).softmax(-1).topk(2, -1)
        return x + self.experts(x.flatten(0, 1), index, weights).view_as(x)


class Model(nn.Module):
    """Attention, experts and a vocabulary: there is something to cut on every axis."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, width), nn.Linear(width, 32)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Plain(nn.Module):
    """Four layers: what schedules with two stages on a rank want."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.square().mean()


def pairs() -> set[tuple[str, str]]:
    """The cells of the first table that say yes."""
    heading, *rows = re.findall(r"^\|(.*)\|$", README[README.index("| | `dp` |") :].split("\n\n")[0], re.MULTILINE)
    columns = re.findall(r"`(\w+)`", heading)
    cells = {re.findall(r"`(\w+)`", row)[0]: [cell.strip() for cell in row.split("|")[1:]] for row in rows if "`" in row}
    return {(axis, column) for axis, row in cells.items() for column, cell in zip(columns, row) if cell == "yes"}


def modes() -> dict[str, list[str]]:
    """The rows of the second table."""
    table = README[README.index("| on pp=2 x dp=2 x tp=2") :].split("\n\n")[0]
    return {name: values.split(", ") for name, values in re.findall(r"^\| (\w+) \| (.*) \|$", table, re.MULTILINE)}


def proved(model: nn.Module, mesh: str, batch: dict[str, Tensor], **config: Any) -> None:
    found = static_report(model, mesh, batch, config=mp.ParallelConfig(**config))
    assert not found.faults and found.share == 1.0, found


def test_the_tables_name_all_there_is() -> None:
    assert pairs() == set(combinations(AXES, 2))
    assert set(modes()["schedule"]) == set(SCHEDULES) and len(modes()) == 4


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("one", "other"), sorted(pairs()))
def test_two_axes_together(one: str, other: str) -> None:
    ids = torch.randint(32, (8, 8))
    proved(Model(), f"{one}=2,{other}=2", {"ids": ids, "labels": ids}, microbatches=2 if one == "pp" else 1)


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in modes().items() for value in values])
def test_a_mode_on_three_axes(field: str, value: str) -> None:
    proved(Plain(), "pp=2,dp=2,tp=2", {"x": torch.randn(16, 8)}, microbatches=4, **{field: value})


def example() -> list[float]:
    """The README's example, on these ranks."""
    script = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[0]
    names: dict[str, Any] = {"__name__": "__main__"}
    with launched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = script.replace("hidden_size=256, num_hidden_layers=4", "hidden_size=64, intermediate_size=128, num_hidden_layers=1")
        exec(compile(small.replace('"dp=2,tp=2"', '"tp=2"'), "README.md", "exec"), names)
    return [names["step"], names["loss"].item()]


def test_the_example_runs(gloo: Pool) -> None:
    found = gloo.run(example, world=2, timeout=240)
    assert found[0] == found[1] and found[0][0] == 9 and found[0][1] < 5.6


def test_jobs_before_they_start_are_those_of_a_page_that_runs() -> None:
    """`tests/test_pages.py` runs them there, and `tests/dry_run` knows what comes out."""
    jobs = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "mp.dry_run(" in block]
    page = (ROOT / "docs" / "large.md").read_text()
    assert len(jobs) == 2 and all(f"```python\n{job}```" in page for job in jobs)


def test_the_second_command_is_what_continuous_integration_runs() -> None:
    commands = re.findall(r"^    (pip install .*)$", README, re.MULTILINE)
    assert commands[:2] == [
        "pip install 'torch<2.14' '.[demo]' && meshpar demo",
        "pip install 'torch<2.14' '.[test]' && python -m pytest -n 2 --dist worksteal",
    ]
    assert commands[1] in (ROOT / ".ci" / "run").read_text()
