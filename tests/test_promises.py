"""What is said is kept: fields of the configuration are obeyed; documents name files that exist."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import meshpar as mp
from meshpar.config import ParallelConfig, Precision
from meshpar.plan import AxisPlan, Comm, NodePlan, ParameterPlan, Plan, StagePlan
from tests.source import nodes

ROOT = Path(__file__).resolve().parents[1]
SAYING = {"config.py", "megatron.py", "explain.py"}
"""Files that only say what fields mean."""


def reads(*, outside: set[str]) -> set[str]:
    """The names of attributes that the package reads, outside of files of these names."""
    trees = (nodes(path.read_text()) for path in (ROOT / "meshpar").rglob("*.py") if path.name not in outside)
    return {n.attr for tree in trees for n in tree if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def test_every_field_of_the_configuration_is_obeyed() -> None:
    fields = {field.name for field in dataclasses.fields(ParallelConfig)} - {"translation", "virtual_stages"}
    found = reads(outside=SAYING)
    assert "stages_per_rank" in found, "virtual_stages is read as a number"
    assert not fields - found


@pytest.mark.parametrize("kind", [Precision, Plan, AxisPlan, NodePlan, ParameterPlan, StagePlan, Comm, mp.Weights])
def test_every_field_of_public_data_is_read(kind: type) -> None:
    here = {"config.py", "plan.py"} if kind is not mp.Weights else set()
    unread = {field.name for field in dataclasses.fields(kind)} - reads(outside=here)
    assert not unread


def test_what_other_names_become_is_said() -> None:
    given = {"tp_comm_overlap": False, "tp_comm_overlap_ag": True, "overlap_p2p_comm": False}
    said = {line.name: str(line) for line in ParallelConfig.from_megatron(given).translation}
    assert "overlap_tensor_parallel=False" in said["tp_comm_overlap"] and "overlap_p2p=False" in said["overlap_p2p_comm"]
    assert "switches all of it" in said["tp_comm_overlap_ag"]
    assert "stages=[8, 8, 8, 6]" in str(ParallelConfig.from_megatron({"num_layers_in_first_pipeline_stage": 3}).translation[0])


@pytest.mark.sweep(13)
@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_documents_name_files_and_names_that_exist(document: Path) -> None:
    text = document.read_text()
    paths = {path for path in re.findall(r"`([\w/]+\.py)`", text)}
    places = [ROOT, ROOT / "meshpar", *(p for p in (ROOT / "meshpar").rglob("*") if p.is_dir())]
    assert paths and not {path for path in paths if not any((place / path).exists() for place in places)}
    package = "".join(path.read_text() for path in (ROOT / "meshpar").rglob("*.py"))
    package += "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))  # (a page may name what its own code does)
    for name in set(re.findall(r"`([A-Za-z_]\w+)`", text)):
        assert re.search(rf"\b{name}\b", package), name
