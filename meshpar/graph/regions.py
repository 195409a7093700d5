"""Regions: the repeated blocks of a model, read from the modules that were on the stack when an operator ran."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from torch import fx


def assign(graph: fx.Graph) -> None:
    """Set `node.meta["region"]`: the outermost `<list>.<int>` on its module stack whose list has two or more members in the graph.

    Parameters and buffers get the region of all their users, or None where these differ. Reads and removes `meta["stack"]`.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    stacks = {node: node.meta.pop("stack", ()) for node in calls}
    lists = _lists(set(stacks.values()))
    known: dict[tuple[str, ...], str | None] = {}
    for node in calls:
        stack = stacks[node]
        if stack not in known:
            known[stack] = _region(stack, lists)
        node.meta["region"] = known[stack]
    _fill(calls)
    for node in graph.nodes:
        if node.op != "call_function":
            found = {user.meta.get("region") for user in node.users}
            node.meta["region"] = found.pop() if node.op == "get_attr" and len(found) == 1 else None


def _fill(calls: Sequence[fx.Node]) -> None:
    """What the root computes between two operators of a block belongs to the block: a `ModuleDict` is never called itself."""
    spans: dict[str, list[int]] = {}
    for place, node in enumerate(calls):
        if node.meta["region"] is not None:
            spans.setdefault(node.meta["region"], [place, place])[1] = place
    after = -1
    for region, (first, last) in spans.items():
        if first > after and all(n.meta["region"] in (None, region) for n in calls[first:last]):
            for node in calls[first:last]:
                node.meta["region"] = region
        after = max(after, last)


def members(name: str) -> Iterator[tuple[str, str]]:
    """Every `(list, member)` on a module path, outermost first.

    >>> list(members("encoder.layers.3.mlp.1"))
    [('encoder.layers', 'encoder.layers.3'), ('encoder.layers.3.mlp', 'encoder.layers.3.mlp.1')]
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            yield ".".join(parts[:i]), ".".join(parts[: i + 1])


def _lists(stacks: set[tuple[str, ...]]) -> Mapping[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for path in {path for stack in stacks for path in stack}:
        for owner, member in members(path):
            found[owner].add(member)
    return found


def _region(stack: Sequence[str], lists: Mapping[str, set[str]]) -> str | None:
    for path in stack:
        for owner, member in members(path):
            if len(lists[owner]) > 1:
                return member
    return None
