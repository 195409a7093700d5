"""The planner imports no torch, its examples run, and its public names are there."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from meshpar import planner

ROOM = Path(planner.__file__).parent
MODULES = sorted(path.stem for path in ROOM.glob("*.py") if path.stem != "__init__")
ALONE = """
import sys, types
root = types.ModuleType("meshpar")
root.__path__ = [sys.argv[1]]
sys.modules["meshpar"] = root
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is not here")
sys.meta_path.insert(0, Refuse())
from meshpar.planner import Cluster, Job, Mapping, Transformer, estimate
job = Job(Transformer(32, 4096, 32, 14336, 128256, kv_heads=8), Cluster("h100", 8), seq=8192, batch=16)
print(estimate(job, Mapping(tp=2)).seconds > 0, "torch" in sys.modules)
"""


def test_it_works_where_there_is_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE, str(ROOM.parent)], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_it_imports_numpy_scipy_and_errors_alone(module: str) -> None:
    allowed = {"numpy", "scipy", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse((ROOM / f"{module}.py").read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in filter(None, names):
            assert name.split(".")[0] in allowed or name == "meshpar.errors" or name.startswith("meshpar.planner"), (
                f"{module} imports {name}"
            )


@pytest.mark.sweep(18)
@pytest.mark.parametrize("module", [None, *MODULES])
def test_examples_run(module: str | None) -> None:
    name = "meshpar.planner" + (f".{module}" if module else "")
    importlib.import_module(name)
    assert doctest.testmod(sys.modules[name]).failed == 0


def test_public_names_exist() -> None:
    assert all(hasattr(planner, name) for name in planner.__all__)
