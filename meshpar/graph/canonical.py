"""The order of a captured graph: that of what is computed, not that in which a process happened to build it.

A forward that loops over a set of strings builds its graph in another order in every process, and all ranks must have one graph.

    rank 0: full, full_cos, near, near_cos, layers.0(near_cos), layers.1(full_cos)
    rank 1: near, near_cos, full, full_cos, layers.0(near_cos), layers.1(full_cos)
    both:   near, full, near_cos, full_cos, layers.0(near_cos), layers.1(full_cos)

What a module call computes stays together, and in each call the order is that of the source lines, then that in which values are asked
for by what is returned: both are the same in every process. Only where a loop hands on from one turn to the next (over layers, over time)
is the order of the turns that of the program, which cannot be another one, and what was computed between two turns stays between them.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

from torch import fx

_FRAME = re.compile(r'File "[^"]*?([^"/\\]+)", line (\d+)')

Line = tuple[str, int]


def arrange(calls: Sequence[fx.Node], roots: Iterable[fx.Node]) -> list[fx.Node]:
    """The `calls` of an exported graph that are needed, in canonical order: for what it returns (`roots`, in an order of theirs), or for
    their own effect."""
    asked = _asked(calls, roots)
    alive = [node for node in calls if node in asked]
    return [alive[place] for place in _Scopes(alive, asked).order()]


def _asked(calls: Sequence[fx.Node], roots: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """Every node that is needed -> when it is first asked for: what it is made of, in the order of its arguments, then itself.

    What is needed for its own effect (a check of values that others rely on) is asked for first.
    """
    asked: dict[fx.Node, int] = {}
    for root in roots:
        _ask(root, asked)
    effects = [node for node in calls if node not in asked and not _is_check(node) and node.is_impure()]
    if not effects:
        return asked
    known = {node: str(place) for node, place in asked.items()}
    effects.sort(key=lambda node: _digest(node, known))
    again: dict[fx.Node, int] = {}
    for root in (*effects, *asked):
        _ask(root, again)
    return again


def _ask(root: fx.Node, asked: dict[fx.Node, int]) -> None:
    stack = [root]
    while stack:
        node = stack[-1]
        if node in asked:
            stack.pop()
            continue
        missing = [source for source in node.all_input_nodes if source not in asked]
        if missing:
            stack += reversed(missing)
        else:
            asked[node] = len(asked)
            stack.pop()


def _is_check(node: fx.Node) -> bool:
    """Whether export wrote the call down to check what the graph knows."""
    return str(node.target).startswith(("aten._assert_", "aten.sym_constrain"))


def _digest(root: fx.Node, known: dict[fx.Node, str]) -> str:
    """What a node computes, as a hash: of its operator, its arguments and what these compute."""
    stack = [root]
    while stack:
        node = stack[-1]
        missing = [source for source in node.all_input_nodes if source not in known]
        if missing and node not in known:
            stack += missing
            continue
        stack.pop()
        if node not in known:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: f"<{known[source]}>")
            what = "constant" if node.op == "placeholder" and node.name.startswith("c_") else node.target  # (those have numbers)
            text = f"{what} {args} {kwargs} {_frames(_trace(node))}"
            known[node] = hashlib.sha256(text.encode()).hexdigest()[:20]
    return known[root]


def _trace(node: fx.Node) -> str:
    return node.meta.get("stack_trace") or ""


@lru_cache(maxsize=4096)
def _frames(trace: str) -> tuple[Line, ...]:
    """The lines that were running, outermost first: one for each forward."""
    return tuple((name, int(line)) for name, line in _FRAME.findall(trace))


class _Scopes:
    """The calls of modules, one in the other, each put in order by itself."""

    def __init__(self, nodes: Sequence[fx.Node], asked: dict[fx.Node, int]) -> None:
        place = {node: i for i, node in enumerate(nodes)}
        self.asked = [asked[node] for node in nodes]
        self.inputs = [[place[source] for source in node.all_input_nodes if source in place] for node in nodes]
        self.traces = [_frames(_trace(node)) for node in nodes]
        known: dict[tuple[str, ...], tuple[str, ...]] = {}
        stacks = (tuple(node.meta.get("nn_module_stack") or ()) for node in nodes)
        self.stacks = [known.setdefault(stack, stack) for stack in stacks]
        self.unread = [not node.users for node in nodes]
        self.owner = [-1] * len(nodes)

    def order(self) -> list[int]:
        found: list[int] = []
        self._scope(0, len(self.asked), 0, found)
        return found

    def _scope(self, low: int, high: int, depth: int, found: list[int]) -> None:
        """Put the nodes from `low` to `high` in order, which run in one call, `depth` modules deep."""
        items = self._items(low, high, depth)
        if len(items) > 1:
            keys = [self._key(*item, depth) for item in items]
            if any(a > b for a, b in pairwise(keys)):
                items = [items[i] for i in self._sorted(items, keys)]
        for first, end in items:
            if end - first == 1:
                found.append(first)
            else:
                self._scope(first, end, depth + 1, found)

    def _items(self, low: int, high: int, depth: int) -> list[tuple[int, int]]:
        """What a call runs: calls of other modules, from their first node to behind their last, and single nodes."""
        items, first = [], low
        while first < high:
            end, stack = first + 1, self.stacks[first]
            if len(stack) > depth:
                while end < high and (self.stacks[end] is stack or self.stacks[end][depth : depth + 1] == stack[depth : depth + 1]):
                    end += 1
            items.append((first, end))
            first = end
        return items

    def _key(self, first: int, end: int, depth: int) -> tuple[Line, int]:
        """The line of the call's own forward that runs an item, and when the item is first asked for; checks come as early as they can."""
        if end - first == 1 and self.unread[first]:
            return _NO_LINE, self.asked[first]
        frames = (self.traces[i] for i in range(first, end))
        return min(frame[depth - 1] if 0 < depth <= len(frame) else _NO_LINE for frame in frames), min(self.asked[first:end])

    def _sorted(self, items: Sequence[tuple[int, int]], keys: Sequence[tuple[Line, int]]) -> list[int]:
        """Each item after what it is made of: of those that may come next, the first by turn, line and demand."""
        needs = self._needs(items)
        turns = _turns(needs, [line for line, _ in keys])
        feeds: list[list[int]] = [[] for _ in items]
        for item, sources in enumerate(needs):
            for source in sources:
                feeds[source].append(item)
        waiting = [len(sources) for sources in needs]
        ready = [(turns[item], keys[item], item) for item, count in enumerate(waiting) if count == 0]
        heapq.heapify(ready)
        order = []
        while ready:
            item = heapq.heappop(ready)[2]
            order.append(item)
            for user in feeds[item]:
                waiting[user] -= 1
                if waiting[user] == 0:
                    heapq.heappush(ready, (turns[user], keys[user], user))
        return order

    def _needs(self, items: Sequence[tuple[int, int]]) -> list[set[int]]:
        """The items that each item reads."""
        low, high = items[0][0], items[-1][1]
        for item, (first, end) in enumerate(items):
            self.owner[first:end] = [item] * (end - first)
        return [
            {self.owner[source] for i in range(first, end) for source in self.inputs[i] if low <= source < high} - {item}
            for item, (first, end) in enumerate(items)
        ]


def _turns(needs: Sequence[set[int]], lines: Sequence[Line]) -> list[tuple[int, bool]]:
    """Which turn of the loops each item belongs to, whose last item comes last.

    A loop is known by a line that runs several times and whose items are made of each other: their order is no accident.
    """
    found: dict[Line, list[int]] = {}
    for item, line in enumerate(lines):
        found.setdefault(line, []).append(item)
    times = _times(lines)
    loops = sorted((-len(members), _is_one_expression(members, needs), line) for line, members in found.items() if times[line] > 1)
    ends: list[int] = []
    for _, _, line in loops[:_MOST_LOOPS]:
        both = sorted((*ends, *found[line]))
        ends = both if _is_chain(both, needs) else ends
    last, turn, turns = set(ends), 0, []
    for item in range(len(needs)):
        turns.append((turn, item in last))
        turn += item in last
    return turns


def _times(lines: Sequence[Line]) -> Counter[Line]:
    """How many times each line ran: `x.exp().log()` runs once. Checks, which have no line, come anywhere."""
    ran = [line for line in lines if line != _NO_LINE]
    return Counter(line for before, line in zip([_NO_LINE, *ran], ran, strict=False) if line != before)


_NO_LINE: Line = ("", 0)
_MOST_LOOPS = 12
"""Each costs a look at all items of a call."""


def _is_one_expression(members: Sequence[int], needs: Sequence[set[int]]) -> bool:
    """Whether each member reads the one before, as `x.exp().sum()` does: perhaps no loop."""
    return all(a in needs[b] for a, b in pairwise(members))


def _is_chain(members: Sequence[int], needs: Sequence[set[int]]) -> bool:
    """Whether each member is made of the one before."""
    number = {item: i for i, item in enumerate(members)}
    reached: list[int] = []
    for item, sources in enumerate(needs):
        latest = max((reached[source] for source in sources), default=-1)
        own = number.get(item)
        if own is not None and latest < own - 1:
            return False
        reached.append(latest if own is None else own)
    return True


def name_of(node: fx.Node) -> str:
    """What a call is named after: its operator, in small letters as fx writes names."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.partition("::")[2] if schema is not None else getattr(node.target, "__name__", "call")
    return (name.strip("_") if name.startswith("__") else name).lower()
