"""A loop in the source of a forward: where it is, what it reads and leaves behind, and the forward with the loop watched or replaced.

    def moe(self, x):                                  def moe(self, x):
        w, i = self.route(x)                               w, i = self.route(x)
        out = torch.zeros_like(x)          watched         out = torch.zeros_like(x)
        for e in self.experts: ...           ->            enter(locals())
        return out                                         for e in self.experts: ...
                                                           leave(locals())
                                                           return out

The other forward takes the place of the written one while the owner runs, and for it alone.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from meshpar._torch import as_traced
from meshpar.capture.experts.body import NotLifted

Local = Mapping[str, Any]
"""The local variables of a function that runs."""
Chain = tuple[tuple[types.CodeType, int], ...]
"""Functions of one module that were running, outermost first, and the line each was at."""


@dataclass(frozen=True)
class Loop:
    """Where a loop is: a method of its owner's class or of a base of it, lines that it holds, how many statements after it count to it."""

    kind: type
    function: str
    lines: tuple[int, ...]
    extension: int


_EXTENSIONS = 4
UNFIT = "what its loop computes is not a weighted sum over the experts that an index among its variables chooses"


def loops(owner: nn.Module, chains: Sequence[Chain]) -> Iterator[Loop]:
    """Where the loop may be that made the calls of `chains`: in the outermost function first."""
    for depth in range(min(map(len, chains))):
        codes = [chain[depth][0] for chain in chains]
        kind = defined_in(type(owner), codes[0])
        lines = tuple(sorted({chain[depth][1] for chain in chains}))
        if kind is not None and all(code is codes[0] for code in codes):
            yield from (Loop(kind, codes[0].co_name, lines, extension) for extension in range(_EXTENSIONS))


def defined_in(kind: type, code: types.CodeType) -> type | None:
    """The class, `kind` or a base of it, that has a method with this code."""
    return next((one for one in kind.__mro__ if getattr(one.__dict__.get(code.co_name), "__code__", None) is code), None)


def read_in(loop: Loop) -> set[str]:
    """The variables that the statements of the loop read."""
    found = _find(loop)
    return _loaded(found.body[found.first : found.last + 1])


def read_after(loop: Loop) -> set[str]:
    """The variables that statements after the loop read."""
    found = _find(loop)
    end = found.body[found.last].end_lineno or 0
    return _loaded(found.body[found.last + 1 :]) | _loaded([found.definition], after=end)


def watched(loop: Loop, enter: Callable[[Local], None], leave: Callable[[Local], None]) -> Any:
    """The function of the loop, which calls `enter` and `leave` with its local variables before and after the loop."""
    found = _find(loop)
    statements = found.body[found.first : found.last + 1]
    before, after = (ast.parse(f"{_SEAM}[{i}](locals())").body for i in range(2))
    return _compiled(loop, found, [*before, *statements, *after], (enter, leave))


def replaced(loop: Loop, names: Sequence[str], compute: Callable[[Local], Sequence[Any]]) -> Any:
    """The function of the loop, in which `compute` of its local variables gives the variables `names` in place of the loop."""
    found = _find(loop)
    made = ast.parse(f"{_VALUES} = {_SEAM}(locals())").body
    for position, name in enumerate(names):
        made += ast.parse(f"{name} = {_VALUES}[{position}]").body
    return _compiled(loop, found, made, compute)


def calling(owner: nn.Module, loop: Loop, instead: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the owner's forward while the method of the loop is another: for the owner only, in the class, where `super()` finds it too."""
    written, seen = _function(loop), as_traced(owner)

    def either(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (instead if self is owner or self is seen else written)(self, *args, **kwargs)

    setattr(loop.kind, loop.function, either)
    try:
        return type(owner).forward(seen, *args, **kwargs)
    finally:
        setattr(loop.kind, loop.function, written)


_RETURNED, _SEAM, _VALUES = "_meshpar_returned", "_meshpar_seam", "_meshpar_values"


# ---- in the syntax tree -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LoopTree:
    """A function's tree, and the statements of the loop: `body[first]` to `body[last]`."""

    definition: ast.FunctionDef
    body: list[ast.stmt]
    first: int
    last: int


def _find(loop: Loop) -> _LoopTree:
    definition = _parsed(_function(loop))
    body = _located(definition, loop.lines)
    _name_what_is_returned(body)
    ast.fix_missing_locations(definition)
    inside = [i for i, statement in enumerate(body) if _holds(statement, loop.lines) and not isinstance(statement, ast.Return)]
    last = inside[-1] + loop.extension
    if last >= len(body) or isinstance(body[last], ast.Return):
        raise NotLifted(UNFIT)
    return _LoopTree(definition, body, inside[0], last)


def _function(loop: Loop) -> types.FunctionType:
    function = loop.kind.__dict__[loop.function]
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        raise NotLifted(f"its {loop.function} is decorated")
    return function


def _parsed(function: types.FunctionType) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise NotLifted("its source is not to be had") from error
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        raise NotLifted(f"its {function.__name__} is decorated")
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    return definition


def _located(definition: ast.FunctionDef, lines: Sequence[int]) -> list[ast.stmt]:
    """The innermost list of statements outside any loop that holds all `lines`."""
    body = definition.body
    while True:
        holding = [statement for statement in body if _holds(statement, lines)]
        inner = _blocks(holding[0]) if len(holding) == 1 else []
        deeper = [block for block in inner if all(any(_holds(statement, [line]) for statement in block) for line in lines)]
        if not deeper:
            return body
        body = deeper[0]


def _holds(statement: ast.stmt, lines: Sequence[int]) -> bool:
    return any(statement.lineno <= line <= (statement.end_lineno or statement.lineno) for line in lines)


def _blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    if isinstance(statement, ast.If):
        return [statement.body, statement.orelse]
    return [statement.body] if isinstance(statement, ast.With) else []


def _name_what_is_returned(body: list[ast.stmt]) -> None:
    """return value  ->  _returned = value; return _returned"""
    for position, statement in reversed([*enumerate(body)]):
        if isinstance(statement, ast.Return) and statement.value is not None:
            kept = ast.Assign([ast.Name(_RETURNED, ast.Store())], statement.value)
            given = ast.Return(ast.Name(_RETURNED, ast.Load()))
            body[position : position + 1] = [ast.copy_location(kept, statement), ast.copy_location(given, statement)]


def _loaded(statements: Sequence[ast.stmt], after: int = 0) -> set[str]:
    """The names read in `statements`, on lines after `after`."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.lineno > after}


def _compiled(loop: Loop, found: _LoopTree, statements: Sequence[ast.stmt], seam: Any) -> Any:
    """The function with `statements` in place of the loop, in which the name `_SEAM` is `seam`."""
    where = found.body[found.first]
    kept = found.body[found.first : found.last + 1]
    for statement in statements:
        if statement not in kept:
            for node in ast.walk(statement):
                ast.copy_location(node, where)
    found.body[found.first : found.last + 1] = statements
    function = _function(loop)
    free = function.__code__.co_freevars
    factory = ast.parse(f"def _factory({', '.join([_SEAM, *free])}):\n    return {found.definition.name}").body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body.insert(0, _without_signature(found.definition))
    names: dict[str, Any] = {}
    module = ast.fix_missing_locations(ast.Module([factory], []))
    exec(compile(module, inspect.getfile(function), "exec"), function.__globals__, names)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    made = names["_factory"](seam, *cells)
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made


def _without_signature(definition: ast.FunctionDef) -> ast.FunctionDef:
    """The definition without defaults and annotations, whose names may mean nothing where it is compiled."""
    definition = copy.deepcopy(definition)
    definition.args.defaults, definition.args.kw_defaults = [], [None for _ in definition.args.kwonlyargs]
    definition.returns = None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return definition
