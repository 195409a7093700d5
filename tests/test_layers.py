"""Imports run downward only, and private torch names enter through one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import meshpar
from tests.source import nodes

PACKAGE = Path(__file__).parents[1] / "meshpar"
LAYERS = (
    ("errors", "waiting", "collection", "settings", "config", "megatron", "roles", "report.text", "sharding.types", "planner"),
    (
        "_torch",
        "generators",
        "simulate",
        "mesh",
        "consensus",
        "data",
        "plan",
        "pipeline.schedule",
        "pipeline.timing",
        "pipeline.order",
        "ops",
    ),
    ("graph", "capture", "sharding"),
    ("passes", "proof.static"),
    ("compile", "init"),
    ("report",),
    ("runtime", "pipeline.run", "pipeline.sends", "pipeline.ties"),
    ("checkpoint",),
    ("arguments", "api", "pipeline"),
    ("proof",),
    ("plot", "dry_run", "calibrate", "integrations", "notebook", "cli", ""),
)
"""Modules and folders, lowest first; the longest name that fits a module decides. "" is the package itself."""
FILES = sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> int:
    """The layer of a module, named without the package: "sharding.types"."""
    fits = [
        (len(name), level)
        for level, names in enumerate(LAYERS)
        for name in names
        if module == name or (name and module.startswith(name + "."))
    ]
    assert fits, f"{module} has no layer: add it to LAYERS in {__file__}"
    return max(fits)[1]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports(path: Path, source: str) -> Iterator[tuple[int, str, str]]:
    """`(line, module, name)` of every import, relative ones resolved; `name` is empty for `import module`."""
    package = ["meshpar", *path.relative_to(PACKAGE).parts[:-1]]
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from ((node.lineno, ".".join([*base, *filter(None, [node.module])]), alias.name) for alias in node.names)


def upward(path: Path, source: str) -> list[str]:
    """The imports of a file that run to a higher layer, as "file:line imports module"."""
    own = layer(name_of(path))
    found = []
    for line, module, name in imports(path, source):
        if module.split(".")[0] != "meshpar":
            continue
        target = module.removeprefix("meshpar").removeprefix(".")
        inner = f"{target}.{name}".removeprefix(".")
        if (PACKAGE / (inner.replace(".", "/") + ".py")).exists() or (PACKAGE / inner.replace(".", "/")).is_dir():
            target = inner
        if layer(target) > own:
            found.append(f"{path}:{line} imports {module}{f'.{name}' if name else ''}, which is above it")
    return found


def private(path: Path, source: str) -> list[str]:
    """The imports of private torch names, as "file:line imports name"."""
    allowed = ("torch.utils._pytree",)  # private by name only: what export's own documentation tells to use
    found = []
    for line, module, name in imports(path, source):
        full = f"{module}.{name}" if name else module
        parts = full.split(".")
        if parts[0] == "torch" and any(p.startswith("_") and not p.startswith("__") for p in parts) and not full.startswith(allowed):
            found.append(f"{path}:{line} imports {full}: private names come from meshpar/_torch.py")
    return found


@pytest.mark.sweep(83)
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downward(path: Path) -> None:
    assert not upward(path, path.read_text())


@pytest.mark.sweep(362)
@pytest.mark.parametrize("path", [p for p in FILES if p.name != "_torch.py"], ids=name_of)
def test_private_torch_names_enter_through_one_file(path: Path) -> None:
    assert not private(path, path.read_text())


def defined(path: Path) -> list[str]:
    """The classes, and names of types (`Name = ...`), that a file defines for all of it."""
    body = ast.parse(path.read_text()).body
    names = [node.targets[0].id for node in body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    return [node.name for node in body if isinstance(node, ast.ClassDef)] + [n for n in names if n[:1].isupper() and not n.isupper()]


def test_no_two_files_define_classes_of_one_name() -> None:
    """Outside of `checkpoint`, which is read on its own."""
    found: dict[str, list[str]] = {}
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] != "checkpoint":
            for name in defined(path):
                found.setdefault(name, []).append(name_of(path))
    assert not {name: files for name, files in found.items() if len(files) > 1}


def test_the_check_sees_what_it_is_for() -> None:
    path = PACKAGE / "passes" / "example.py"
    assert upward(path, "from ..runtime.model import ParallelModel\n")[0].endswith(
        "example.py:1 imports meshpar.runtime.model.ParallelModel, which is above it"
    )
    assert upward(path, "def f():\n    import meshpar.api\n")[0].endswith("example.py:2 imports meshpar.api, which is above it")
    assert upward(path, "from meshpar import runtime\n")
    assert not upward(path, "from meshpar.sharding import types\nfrom . import lower\n")
    assert "torch.distributed._local_tensor" in private(path, "import torch.distributed._local_tensor as x\n")[0]
    assert private(path, "from torch._ops import OpOverload\n")


def test_the_package_is_this_one() -> None:
    assert meshpar.__file__
