"""Whether a call says the same as the one of the model's graph that it stands for: operator, operands and arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from meshpar.graph.op import op_name
from meshpar.proof.static.actions import literal
from meshpar.proof.static.moves import says_sizes
from meshpar.proof.static.report import Contradiction

_FAMILIES: tuple[frozenset[str], ...] = (
    frozenset("view reshape _unsafe_view flatten unflatten".split()),
    frozenset("split split_with_sizes chunk".split()),
    frozenset("expand broadcast_to".split()),
    frozenset("sum mean".split()),
)
_IRRELEVANT = frozenset("device pin_memory layout memory_format non_blocking".split())
_SIZES = frozenset("size sizes shape repeats split_size split_sizes chunks start_dim end_dim start end".split())


def is_same_operator(target: Any, origin: Any) -> bool:
    """Whether two operators do the same, but for how they are told sizes."""
    a, b = op_name(target), op_name(origin)
    return target == origin or (a == b and says_sizes(a)) or any(a in family and b in family for family in _FAMILIES)


def check_arguments(name: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise Contradiction where arguments differ that are no sizes."""
    skipped = _IRRELEVANT | (_SIZES if says_sizes(name) or name in ("slice", "repeat_interleave") else frozenset())
    skipped |= {"groups"} if "conv" in name else frozenset()  # as many as channels: the weight's shape tells
    if name == "squeeze":
        return  # the shape of what it gives tells which dims went
    for key, value in here.items():
        if key in there and key not in skipped and not _equal(key, literal(value), literal(there[key])):
            raise Contradiction(f"{key} is {_short(value)}, the model says {_short(there[key])}")


def _equal(key: str, a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int) and key == "dim" and (a < 0) != (b < 0):
        return True  # counted from the other end: the shapes tell
    return bool(a == b)


def _short(value: Any) -> str:
    return "a tensor" if isinstance(value, fx.Node) else str(value)
