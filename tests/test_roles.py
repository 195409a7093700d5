"""The table of axes, and the proof that it is the only place that knows them: axes that exist in this file alone run."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meshpar as mp
from meshpar import roles
from meshpar.errors import ConfigError
from meshpar.graph.op import Value
from meshpar.roles import Role
from meshpar.sharding.policy import POLICIES, Policy, Request
from meshpar.sharding.reading import Reading
from meshpar.sharding.types import I, Type
from meshpar.sharding.typings import Choice
from tests.source import nodes

PACKAGE = Path(mp.__file__).parent
NAMES_ARE_DATA = ("roles.py", "megatron.py", "cli/", "mesh.py", "planner/", "dry_run/")
"""Files that speak of axes by name to people: the table, another tool's names, the command line, examples of meshes in errors,
and the planner, whose mappings have one field an axis and two axes more (`etp`, `edp`) that are no axes of a mesh, with the dry run, which
tells it in its own names what a program does (`dry_run/reader.py` has the table, by role)."""


def test_values_are_typed_from_the_outside_in() -> None:
    assert roles.typed(roles.names()) == {"dp": ("dp", "dp_replicate", "dp_shard"), "cp": ("cp",), "ep": ("ep",), "tp": ("tp",)}
    assert roles.with_own_batches(roles.names(), without="experts") == ("dp", "dp_replicate", "dp_shard")
    assert roles.copying(roles.names()) == ("dp_replicate",)
    assert roles.stage_axis() == "pp"


def compared(path: Path) -> list[str]:
    """Where code compares something with the name of an axis, looks one up, or lists some."""
    found = []
    for node in nodes(path.read_text()):
        if not isinstance(node, (ast.Compare, ast.Subscript, ast.Tuple, ast.Set, ast.List, ast.Call)):
            continue
        names = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and n.value in roles.ROLES]
        if names and not isinstance(node, ast.Call):
            found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
        if (
            names
            and isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("get", "get_group", "index")
        ):
            found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    return found


def test_no_other_file_compares_an_axis_with_a_name() -> None:
    files = [f for f in PACKAGE.rglob("*.py") if not str(f.relative_to(PACKAGE)).startswith(NAMES_ARE_DATA)]
    assert [line for path in files for line in compared(path)] == []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.norm(self.up(x)))).square().mean()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("mesh", ["wp=2", "wp=2,tp=2", "dp=2,wp=2"])
def test_an_axis_more_that_divides_weights(mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second tensor axis, outside of the first."""
    last = roles.ROLES["tp"]
    monkeypatch.delitem(roles.ROLES, "tp")
    monkeypatch.setitem(roles.ROLES, "wp", Role("weights", typed="wp"))
    monkeypatch.setitem(roles.ROLES, "tp", last)
    mp.verify(Net(), mesh, {"x": torch.randn(8, 8)}).raise_if_failed()
    with mp.simulate(4 if "," in mesh else 2):
        pm = mp.parallelize(Net(), mp.make_mesh(mesh), example={"x": torch.randn(8, 8)})
        assert "wp" in pm.plan.parameters["up.weight"].placements


def test_a_second_axis_that_divides_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named where there is nothing to divide, and of no consequence to a mesh without it."""
    monkeypatch.setitem(roles.ROLES, "xp", Role("experts", own_batches=True, sums=True, shares_out=True, typed="xp"))
    with mp.simulate(2):
        mp.parallelize(Net(), mp.make_mesh("tp=2"), example={"x": torch.randn(8, 8)})
    with mp.simulate(2), pytest.raises(ConfigError, match="xp=2 divides experts among ranks, and the model has none"):
        mp.parallelize(Net(), mp.make_mesh("xp=2"), example={"x": torch.randn(8, 8)})


class Twins(Policy):
    """All ranks compute the same: nothing is cut."""

    even = True

    def __init__(self, request: Request, reading: Reading) -> None:
        self.reading = reading

    def crosses(self, value: Value, users: int) -> Type:
        return I

    def seeds(self, residual: Mapping[Value, Type]) -> Mapping[str | None, tuple[int, ...]]:
        return dict.fromkeys(self.reading.units.values(), ())

    def placements(self, node: Any, whole: float, seeds: Iterable[int]) -> tuple[Choice, ...]:
        return (Choice((), (I,), 0.0, "twins"),)


def test_a_role_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An axis that divides nothing that meshpar knows, with the policy for it."""
    monkeypatch.setitem(roles.ROLES, "twin", Role("redundancy", typed="twin"))  # type: ignore[arg-type]
    monkeypatch.setitem(POLICIES, "redundancy", Twins)  # type: ignore[arg-type]
    mp.verify(Net(), "dp=2,tp=2,twin=2", {"x": torch.randn(8, 8)}).raise_if_failed()
