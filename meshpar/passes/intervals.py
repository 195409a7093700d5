"""Which keys each query may see, where that is an interval that follows from numbers alone: found without a table of all pairs.

    arange(s)[:, None] >= arange(s)                                     query i sees the keys [0, i + 1)            causal
    ... & (arange(s) > arange(s)[:, None] - w)                          query i sees the keys [i + 1 - w, i + 1)    a sliding window

A mask is made of vectors, of one number for each query or key, by comparisons, which make it large. The vectors are computed; a comparison
with keys in ascending order is an interval for each query, by binary search, and `and` intersects intervals. So a mask of 131,072 x 131,072
costs a few sorted look-ups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import fx

from meshpar._torch import OpOverload, draws, without_modes
from meshpar.graph.facts import Info, facts, info_of
from meshpar.graph.op import op_name

SMALL = 2**22
"""Values of at most so many elements are computed; larger ones must be intervals."""


@dataclass(frozen=True)
class Intervals:
    """Query i sees the keys `start[i]` to `stop[i] - 1`; none where `stop[i] <= start[i]`."""

    start: torch.Tensor
    stop: torch.Tensor
    keys: int

    @property
    def is_causal(self) -> bool:
        """Whether every query sees its own position and all before it."""
        own = torch.arange(1, len(self.stop) + 1).clamp(max=self.keys)
        return bool((self.start <= 0).all() and (self.stop.clamp(max=self.keys) == own).all())

    @property
    def window(self) -> int | None:
        """w where every query sees its own position and the w - 1 before it, as far as there are any; None for anything else."""
        own = torch.arange(len(self.stop))
        width = int((own + 1 - self.start.clamp(min=0)).max())
        wanted = (own + 1 - width).clamp(min=0)
        right = bool((self.stop.clamp(max=self.keys) == (own + 1).clamp(max=self.keys)).all() and (self.start.clamp(min=0) == wanted).all())
        return width if right else None

    def __and__(self, other: Intervals) -> Intervals:
        return Intervals(torch.maximum(self.start, other.start), torch.minimum(self.stop, other.stop), self.keys)

    def others(self) -> Intervals | None:
        """Where each query sees just the other keys: of intervals that begin with the first key, or end with the last."""
        first, last = torch.zeros_like(self.start), torch.full_like(self.stop, self.keys)
        if bool((self.start <= 0).all()):
            return Intervals(self.stop.clamp(min=0), last, self.keys)
        if bool((self.stop >= self.keys).all()):
            return Intervals(first, self.start, self.keys)
        return None


def intervals(mask: fx.Node) -> Intervals | None:
    """The intervals of a mask of booleans `[..., queries, keys]`, equal in all leading dims; None for what is not known to be such."""
    info = info_of(mask)
    if info.dtype != torch.bool or len(info.shape) < 2:
        return None
    with without_modes(), torch.no_grad():
        found = _Reader(info.shape[-2], info.shape[-1]).read(mask)
    return found if isinstance(found, Intervals) else None


def shown(mask: fx.Node, never: float) -> Intervals | None:
    """The intervals of a mask of numbers to add, 0 where a query sees a key and at most `never` where not, or of booleans."""
    while op_name(mask.target) in ("expand", "_to_copy", "unsqueeze", "clone") and info_of(mask).dtype.is_floating_point:
        before = mask.args[0]
        if not isinstance(before, fx.Node) or info_of(before).shape[-2:] != info_of(mask).shape[-2:]:
            break
        mask = before
    if info_of(mask).dtype == torch.bool:
        return intervals(mask) or _evaluated(mask, lambda table: table)
    if op_name(mask.target) == "where" and len(mask.args) == 3 and isinstance(mask.args[0], fx.Node):
        zero, other = (_number(a) for a in mask.args[1:])
        wide = info_of(mask.args[0]).shape[-2:] == info_of(mask).shape[-2:]
        if zero == 0 and other is not None and other <= never and wide and (found := intervals(mask.args[0])) is not None:
            return found
    return _evaluated(mask, lambda table: (table == 0) if bool(((table == 0) | (table <= never)).all()) else None)


def unseen(mask: fx.Node) -> Intervals | None:
    """The intervals, where a mask of booleans says what a query does not see: `~seen`, `keys > query`, `triu`, and an `or` of such."""
    name, given = op_name(mask.target), [a for a in mask.args if isinstance(a, fx.Node)]
    if name in _NOT:
        return intervals(given[0])
    if name in _OR and len(given) == 2:
        one, other = map(unseen, given)
        return one & other if one is not None and other is not None else None
    if name in _ALIKE and info_of(given[0]).dtype == torch.bool and info_of(given[0]).shape[-2:] == info_of(mask).shape[-2:]:
        return unseen(given[0])
    found = intervals(mask)
    return _evaluated(mask, torch.logical_not) if found is None else found.others()


_NOT = ("bitwise_not", "logical_not")
_OR = ("__or__", "bitwise_or", "logical_or")
_ALIKE = ("expand", "clone", "alias", "detach", "unsqueeze")


def _number(value: Any) -> float | None:
    """What a number, or a tensor that is one number everywhere, is; None where that is not known."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node) or op_name(value.target) not in _ONE_NUMBER:
        return None
    place = _ONE_NUMBER[op_name(value.target)]
    found = value.args[place] if isinstance(place, int) else float(place)
    return float(found) if isinstance(found, int | float) else None


_ONE_NUMBER: Mapping[str, int | str] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), "0"),
    **dict.fromkeys(("full", "full_like"), 1),
    "scalar_tensor": 0,
    "new_full": 2,
}
"""Operators whose result is one number everywhere -> the place of it among the arguments, or the number."""


def least(node: fx.Node) -> float | None:
    """The smallest of some numbers; None where they are not known, or many."""
    if prod(info_of(node).shape) > SMALL:
        return None
    with without_modes(), torch.no_grad():
        value = _Reader(0, 0).read(node)
        return float(value.min()) if isinstance(value, torch.Tensor) and value.numel() else None


def _evaluated(mask: fx.Node, seen_in: Callable[[torch.Tensor], torch.Tensor | None]) -> Intervals | None:
    """The intervals of a small mask, of which all numbers are computed. `seen_in`: where a table of them says that keys are seen."""
    shape = info_of(mask).shape
    if len(shape) < 2 or prod(shape) > SMALL:
        return None
    with without_modes(), torch.no_grad():
        value = _Reader(0, 0).read(mask)
        if not isinstance(value, torch.Tensor):
            return None
        table = value.reshape(-1, *shape[-2:])
        seen = seen_in(table[0])
        if seen is None or not bool((table == table[:1]).all()):
            return None
        counts, start = seen.sum(-1), seen.long().argmax(-1)
        stop, places = start + counts, torch.arange(shape[-1])
        right = bool((seen == ((places >= start[:, None]) & (places < stop[:, None]))).all())
    return Intervals(start, stop, shape[-1]) if right else None


class _Apart(NamedTuple):
    """A table of sums of whole numbers, one of each query and one of each key."""

    queries: torch.Tensor
    keys: torch.Tensor


class _Reader:
    def __init__(self, queries: int, keys: int) -> None:
        self.queries, self.keys = queries, keys
        self.known: dict[fx.Node, Any] = {}

    def read(self, last: fx.Node) -> Any:
        """A tensor for a small value, Intervals for a large one, None for what is not known. (Without recursion: masks may be deep.)

        What is large is true, or 1, in the intervals, and false, or 0, elsewhere.
        """
        stack = [last]
        while stack:
            node = stack[-1]
            waiting = [n for n in node.all_input_nodes if n not in self.known] if _is_plain(node) else []
            if waiting:
                stack += waiting
                continue
            stack.pop()
            if node not in self.known:
                self.known[node] = self._value(node) if _is_plain(node) else None
        return self.known[last]

    def _value(self, node: fx.Node) -> Any:
        inputs = [self.known[n] for n in node.all_input_nodes]
        if any(value is None for value in inputs):
            return None
        info = info_of(node)
        if all(isinstance(value, torch.Tensor) for value in inputs) and prod(info.shape) <= SMALL and not self._is_table(info):
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.known.__getitem__)
            return node.target(*args, **({**kwargs, "device": "cpu"} if "device" in kwargs else kwargs))  # type: ignore[operator]
        handler = _LARGE.get(op_name(node.target)) if self._is_table(info) else None
        return handler(self, node, inputs) if handler else None

    def _is_table(self, info: Info) -> bool:
        return info.shape[-2:] == (self.queries, self.keys) and self.queries > 1 and self.keys > 1

    def all_keys(self) -> Intervals:
        """Every query sees every key."""
        return Intervals(torch.zeros(self.queries, dtype=torch.int64), torch.full((self.queries,), self.keys), self.keys)

    def compared(self, node: fx.Node, inputs: list[Any]) -> Intervals | None:
        """A vector over queries against one over keys, in ascending order."""
        name = op_name(node.target)
        if isinstance(inputs[0], Intervals):
            return self.equal(name, node, inputs[0])
        if isinstance(inputs[0], _Apart):
            number = node.args[1]
            if not isinstance(number, int) or name not in _SWAPPED:
                return None
            return self.against(_SWAPPED[name], number - inputs[0].queries, inputs[0].keys)
        if name not in _SWAPPED or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
            return None
        left, right = (self.known[a] for a in node.args)  # type: ignore[index]
        over_queries, over_keys = _vector(left, -2, self.queries), _vector(right, -1, self.keys)
        if over_queries is None or over_keys is None:
            over_queries, over_keys, name = _vector(right, -2, self.queries), _vector(left, -1, self.keys), _SWAPPED[name]
        if over_queries is None or over_keys is None or over_queries.dtype != over_keys.dtype:
            return None
        if over_keys.dtype == torch.bool:
            over_queries, over_keys = over_queries.long(), over_keys.long()
        return self.against(name, over_queries, over_keys)

    def against(self, name: str, over_queries: torch.Tensor, over_keys: torch.Tensor) -> Intervals | None:
        """One number of each query against those of the keys, which ascend or descend."""
        if bool((over_keys[1:] <= over_keys[:-1]).all()):
            over_queries, over_keys, name = -over_queries, -over_keys, _SWAPPED[name]
        if not bool((over_keys[1:] >= over_keys[:-1]).all()):
            return None
        below = torch.searchsorted(over_keys, over_queries)
        through = torch.searchsorted(over_keys, over_queries, right=True)
        none, every = torch.zeros_like(below), torch.full_like(below, self.keys)
        seen = {"ge": (none, through), "gt": (none, below), "le": (below, every), "lt": (through, every), "eq": (below, through)}
        return Intervals(*seen[name], self.keys)

    def apart(self, node: fx.Node, inputs: list[Any]) -> _Apart | None:
        """`queries - keys`, or `keys - queries`."""
        if len(inputs) != 2 or len(node.args) != 2 or node.kwargs:
            return None
        left, right = (self.known[a] for a in node.args)  # type: ignore[index]
        if not all(isinstance(x, torch.Tensor) and x.dtype == torch.int64 for x in (left, right)):
            return None
        for first, second, sign in ((left, right, 1), (right, left, -1)):
            over_queries, over_keys = _vector(first, -2, self.queries), _vector(second, -1, self.keys)
            if over_queries is not None and over_keys is not None:
                return _Apart(sign * over_queries, -sign * over_keys)
        return None

    def equal(self, name: str, node: fx.Node, table: Intervals) -> Intervals | None:
        """A table of zeros and ones against a number."""
        number = node.args[1] if len(node.args) == 2 else None
        if not isinstance(number, int | float):
            return None
        if (name, number) in (("eq", 0), ("lt", 1)):
            return table.others()
        return table if (name, number) in (("ne", 0), ("gt", 0), ("eq", 1), ("ge", 1)) else None

    def opposite(self, node: fx.Node, inputs: list[Any]) -> Intervals | None:
        """`not`."""
        return inputs[0].others() if isinstance(inputs[0], Intervals) and info_of(node).dtype == torch.bool else None

    def both(self, node: fx.Node, inputs: list[Any]) -> Intervals | None:
        """What both see."""
        found = self.all_keys()
        for value in (self.known[n] for n in node.args if isinstance(n, fx.Node)):
            if isinstance(value, torch.Tensor) and value.dtype == torch.bool and bool(value.all()):
                continue
            if not isinstance(value, Intervals):
                return None
            found = found & value
        return found

    def same(self, node: fx.Node, inputs: list[Any]) -> Intervals | None:
        """The same for more samples or heads."""
        if isinstance(inputs[0], _Apart):
            return None
        if isinstance(inputs[0], Intervals):
            return inputs[0]
        return self.all_keys() if inputs[0].dtype == torch.bool and bool(inputs[0].all()) else None

    def ones(self, node: fx.Node, inputs: list[Any]) -> Intervals | None:
        """Nothing is hidden."""
        return self.all_keys()

    def below_diagonal(self, node: fx.Node, inputs: list[Any]) -> Intervals | None:
        """`tril`."""
        diagonal = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        if not isinstance(inputs[0], Intervals):
            return None
        stop = (torch.arange(self.queries) + 1 + diagonal).clamp(0, self.keys)
        return inputs[0] & Intervals(torch.zeros_like(stop), stop, self.keys)

    def above_diagonal(self, node: fx.Node, inputs: list[Any]) -> Intervals | None:
        """`triu`."""
        diagonal = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        if not isinstance(inputs[0], Intervals):
            return None
        start = (torch.arange(self.queries) + diagonal).clamp(0, self.keys)
        return inputs[0] & Intervals(start, torch.full_like(start, self.keys), self.keys)


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is an operator of torch on numbers that are known: neither the batch, nor a parameter, nor drawn."""
    target = node.target
    return (
        node.op == "call_function"
        and isinstance(target, OpOverload)
        and target.namespace == "aten"
        and not draws(target)
        and facts(node).seed is None
        and isinstance(facts(node).info, Info)
    )


def _vector(value: Any, dim: int, size: int) -> torch.Tensor | None:
    """The numbers along one of the last two dims of a tensor that varies along no other, by value; None for another tensor."""
    if not isinstance(value, torch.Tensor) or value.dim() < -dim or value.shape[dim] != size:
        return None
    along = value.movedim(dim, -1).reshape(-1, size)
    return along[0].contiguous() if bool((along == along[:1]).all()) else None


_SWAPPED = {"ge": "le", "gt": "lt", "le": "ge", "lt": "gt", "eq": "eq"}
"""Comparisons of which a row is an interval; the same from the other side."""
_LARGE: Mapping[str, Callable[[_Reader, fx.Node, list[Any]], Intervals | _Apart | None]] = {
    **dict.fromkeys((*_SWAPPED, "ne"), _Reader.compared),
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and"), _Reader.both),
    **dict.fromkeys(("expand", "clone", "alias", "detach", "_to_copy"), _Reader.same),
    **dict.fromkeys(_NOT, _Reader.opposite),
    "sub": _Reader.apart,
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _Reader.ones),
    "tril": _Reader.below_diagonal,
    "triu": _Reader.above_diagonal,
}
"""Operators that make a large mask, and what each query sees then."""
