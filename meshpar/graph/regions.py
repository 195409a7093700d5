"""Regions: the repeated blocks of a model, read from the modules that were on the stack when an operator ran."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import fx

from meshpar.graph.facts import facts, set_facts


def assign(graph: fx.Graph) -> None:
    """Set the `region` of every node: the outermost `<list>.<int>` on its module stack whose list has two or more members in the graph.

    Parameters and buffers get the region of all their users, or None where these differ. Reads and removes their `stack`.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    stacks = {node: facts(node).stack for node in calls}
    lists = _lists(set(stacks.values()))
    known: dict[tuple[str, ...], str | None] = {}
    for node in calls:
        stack = stacks[node]
        if stack not in known:
            known[stack] = _region(stack, lists)
        set_facts(node, replace(facts(node), region=known[stack], stack=()))
    _fill(calls)
    for node in graph.nodes:
        if node.op != "call_function":
            found = {facts(user).region for user in node.users}
            _put(node, found.pop() if node.op == "get_attr" and len(found) == 1 else None)


def _put(node: fx.Node, region: str | None) -> None:
    set_facts(node, replace(facts(node), region=region))


def _fill(calls: Sequence[fx.Node]) -> None:
    """What the root computes between two operators of a block belongs to the block: a `ModuleDict` is never called itself."""
    spans: dict[str, list[int]] = {}
    for place, node in enumerate(calls):
        if (own := facts(node).region) is not None:
            spans.setdefault(own, [place, place])[1] = place
    after = -1
    for region, (first, last) in spans.items():
        if first > after and all(facts(n).region in (None, region) for n in calls[first:last]):
            for node in calls[first:last]:
                _put(node, region)
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
