"""The parameters of a plan in words: where each kind of them lies, and why."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx

from meshpar.graph.facts import facts, infos_of
from meshpar.graph.operators import operator_of
from meshpar.plan import ParameterPlan, Plan
from meshpar.report.text import table
from meshpar.roles import ROLES, dividing
from meshpar.sharding.types import Shard, Type, local_shape

_DECIDERS = {"rule": "your rule", "pinned": "as it was placed before", "data": "", "not used by the graph": "the forward does not use it"}
_CUT = {
    "outputs": "each rank computes its share of the outputs",
    "inputs": "each rank sums over its share of the inputs",
    "rows": "each rank looks up its share of the rows",
    "features": "each rank looks up its share of the features",
    "experts": "each rank holds its share of the experts",
}


@dataclass(frozen=True)
class _Row:
    """Parameters that differ in nothing but the numbers in their names."""

    pattern: str
    names: tuple[str, ...]
    plan: ParameterPlan
    why: str


def unit_of(name: str) -> str:
    """The block of a list that the parameter of this name is in, by its path; empty outside of blocks."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if index is None else ".".join(parts[: index + 1])


def parameters(plan: Plan, graph: fx.Graph) -> list[str]:
    """The table of parameters: pattern of names, shape, what a rank holds, and why."""
    axes = [a.axis for a in plan.axes if not ROLES[a.axis].sums]
    sizes = dict(plan.mesh)
    rows = _rows(plan, graph)
    heading = ("parameter", "", "shape", *(("on a rank", *(f"over {a}" for a in axes), "because") if axes else ()))
    cells = [heading]
    for row in rows:
        times = f"x{len(row.names)}" if len(row.names) > 1 else ""
        rest: tuple[str, ...] = ()
        if axes:
            words = (_words(row.plan.shape, row.plan.placements.get(a)) for a in axes)
            rest = (_local(row.plan, axes, sizes), *words, row.why)
        cells.append((row.pattern, times, bracketed(row.plan.shape), *rest))
    numel = sum(prod(p.shape) for p in plan.parameters.values())
    lines = [
        f"Parameters: {numel:,} in {len(plan.parameters)} tensors (rows and columns are those of the tensor: rows are dim 0)",
        *table(cells),
    ]
    for axis in axes:
        whole = sum(prod(p.shape) for p in plan.parameters.values() if not isinstance(p.placements.get(axis), Shard))
        lines.append(f"  whole on every {axis} rank: {100 * whole / max(1, numel):.2g}% of all parameters")
    return lines


def _rows(plan: Plan, graph: fx.Graph) -> list[_Row]:
    reasons = _reasons(plan, graph)
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, one in plan.parameters.items():
        groups[pattern_of(name), one.shape, one.dtype, one.trainable, tuple(one.placements.items()), reasons[name]].append(name)
    patterns: Counter[str] = Counter(str(key[0]) for key in groups)
    layers: dict[str, set[tuple[object, ...]]] = defaultdict(set)
    for key, names in groups.items():
        for name in names:
            layers[pattern_of(name, 1)].add(key)
    rows = []
    for key, names in groups.items():
        for pattern, members in _by_pattern(names, 0 if patterns[str(key[0])] == 1 else 1).items():
            label = members[0] if len(members) == 1 else pattern if len(layers[pattern]) < 2 else enumerated(members)
            rows.append(_Row(label, tuple(members), plan.parameters[members[0]], str(key[-1])))
    return rows


def _by_pattern(names: Sequence[str], numbers: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[pattern_of(name, numbers)].append(name)
    return found


def pattern_of(name: str, numbers: int = 0) -> str:
    """The name with its first `numbers` numbers (0: all) as stars."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name, count=numbers)


def enumerated(names: Sequence[str]) -> str:
    """Names that differ in numbers as one: "layers.{0-2,5}.weight".

    >>> enumerated(["layers.0.weight", "layers.1.weight", "layers.3.weight"])
    'layers.{0-1,3}.weight'
    """
    parts = [name.split(".") for name in names]
    joined = []
    for column in zip(*parts, strict=True):
        values = sorted(set(column), key=lambda v: (len(v), v))
        joined.append(values[0] if len(values) == 1 else "{" + ",".join(_ranges([int(v) for v in values])) + "}")
    return ".".join(joined)


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    start = last = numbers[0]
    for n in [*numbers[1:], None]:
        if n is not None and n == last + 1:
            last = n
            continue
        yield str(start) if start == last else f"{start}-{last}"
        if n is not None:
            start = last = n


def bracketed(shape: Sequence[int]) -> str:
    """A shape as "[64, 32]"."""
    return "[" + ", ".join(map(str, shape)) + "]"


def _local(plan: ParameterPlan, axes: Sequence[str], sizes: Mapping[str, int]) -> str:
    """The shape on a rank; where ranks differ, the largest and the smallest."""
    first, last = plan.shape, plan.shape
    for axis in axes:
        type_ = plan.placements.get(axis)
        if isinstance(type_, Shard):
            first, last = local_shape(first, type_, sizes[axis], 0), local_shape(last, type_, sizes[axis], sizes[axis] - 1)
    return "[" + ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in zip(first, last, strict=True)) + "]"


def _words(shape: Sequence[int], type_: Type | None) -> str:
    if not isinstance(type_, Shard):
        return "whole"
    where = "split" if len(shape) == 1 else ("rows", "columns")[type_.dim] if len(shape) == 2 else f"dim {type_.dim}"
    units = [f"{u}" if z == 1 else f"{u} x {z}" for u, z in type_.segments]
    if len(units) == 1 and type_.repeat == 1:
        return where if type_.segments[0][1] == 1 else f"{where} ({units[0]})"
    return f"{where} of {'each of ' + str(type_.repeat) + ' parts ' if type_.repeat > 1 else ''}{'|'.join(units)}"


def _reasons(plan: Plan, graph: fx.Graph) -> dict[str, str]:
    """Parameter -> who decided, and what for."""
    matrices = {str(n.target): _matrix(n) for n in graph.nodes if n.op == "get_attr"}
    blocks = _block_sizes(plan)
    return {
        name: _reason(one, matrices.get(name, ()), prod(one.shape) / max(1, blocks[_block(name)])) for name, one in plan.parameters.items()
    }


def _reason(plan: ParameterPlan, matrix: tuple[str, ...], share: float) -> str:
    types = (plan.placements.get(name) for name in dividing("weights"))
    type_ = next((type_ for type_ in types if isinstance(type_, Shard)), None)
    if plan.why in _DECIDERS:
        return _DECIDERS[plan.why]
    if type_ is not None:
        return _CUT[matrix[type_.dim]] if type_.dim < len(matrix) else "cut like the values it is used with"
    if len(plan.shape) < 2:
        return "a vector: little to gain"
    return f"cutting it costs more than it saves ({100 * share:.1g}% of its block)"


def _matrix(node: fx.Node) -> tuple[str, ...]:
    """What the dims of a parameter are to the operator that consumes it, seen through conversions and views."""
    seen = node
    while (user := next((u for u in seen.users if u.op == "call_function"), None)) is not None:
        row = operator_of(user.target)
        if row.matrix:
            return row.matrix
        if facts(user).joined:  # several values at once: go on with this one's result
            index = user.args.index(seen)
            user = next((u for u in user.users if u.args[1] == index), user)
        elif facts(user).conversion is None and row.kind not in ("view", "copy"):
            return ()
        seen = user
    return ()


def _block(name: str) -> str:
    found = re.match(r"(.*?\.\d+)\.", name)
    return found.group(1) if found else ""


def _block_sizes(plan: Plan) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for name, one in plan.parameters.items():
        sizes[_block(name)] += prod(one.shape)
    return sizes


def differentiable(node: fx.Node) -> bool:
    """Whether gradients flow through a value."""
    return any(i is not None and i.requires_grad for i in infos_of(node))
