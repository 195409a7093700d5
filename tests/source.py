"""The source of the package as trees, parsed once for all tests that read it."""

from __future__ import annotations

import ast
from functools import cache


@cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    """Every node of a file's tree."""
    return tuple(ast.walk(ast.parse(source)))
