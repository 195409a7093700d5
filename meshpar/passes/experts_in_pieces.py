"""Experts beside the exchange of their rows: what lies between sending rows and returning them becomes one call, in pieces.

before                                                    after
  r, e, *route = send_rows(x, ends, ...)                    y = through_experts(((grouped_mm, ("%0", "%2", "%1")), (silu, ("%4",)), ...),
  h = silu(grouped_mm(r, w, e))                                                  x, ends, w, v, ...)
  y = return_rows(grouped_mm(h, v, e), *route, ...)

Only where all of it is known to treat rows one by one, by their expert alone, and nothing else reads any of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from meshpar.graph.facts import Exchange, facts, info_of, set_facts
from meshpar.ops import expert_all_to_all, expert_pieces
from meshpar.passes import worth
from meshpar.passes.again import ComputeAgain
from meshpar.passes.rows_of_experts import between, items, joined, steps
from meshpar.sharding.price import Price


@dataclass(frozen=True)
class CutExpertsIntoPieces:
    """Compute with the rows of experts while others travel. Changes the graph in place.

    `price`: the constants of the machine that will run, which tell where it takes less (`passes/worth.py`). Without them, `least_bytes`: of
    the rows of a rank; fewer are not worth their pieces.
    """

    least_bytes: int = 2**21
    price: Price | None = None

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        for node in list(graph.nodes):
            exchange = facts(node).exchange
            if node.target is not expert_all_to_all.send_rows or exchange is None:
                continue
            back = _back(node)
            inside = between(node, back) if back is not None else None
            if back is not None and inside is not None and self._is_worth(node, exchange, inside):
                ComputeAgain(within=frozenset(inside))(graph)
                _join(graph, node, back)
        return graph

    def _is_worth(self, sent: fx.Node, exchange: Exchange, inside: Sequence[fx.Node]) -> bool:
        if self.price is None:
            return exchange.rows.nbytes >= self.least_bytes
        experts = info_of(items(sent)[1]).shape[0]
        return worth.through_experts(exchange, experts, worth.products_of(inside), self.price)


def _back(sent: fx.Node) -> fx.Node | None:
    """The call that returns what was sent, if it is the only one that reads the route."""
    results = items(sent)
    if sent.kwargs.get("dropping") or len(results) != len(sent.users) or set(results) != set(range(5)):
        return None
    readers = {user for k in range(2, 5) for user in results[k].users}
    back = readers.pop() if len(readers) == 1 else None
    route = tuple(results[k] for k in range(2, 5))
    same = back is not None and back.target is expert_all_to_all.return_rows and back.args[1:] == route and back.kwargs == sent.kwargs
    return back if same else None


def _join(graph: fx.Graph, sent: fx.Node, back: fx.Node) -> None:
    inside = joined(sent, back)
    done, given = steps(sent, inside)
    known = (facts(sent), *(facts(items(sent)[k]) for k in range(5)), *(facts(node) for node in inside))
    back.target, back.args = expert_pieces.through_experts, (done, *sent.args, *given)
    set_facts(back, replace(facts(back), inside=known))
    for node in (*reversed(inside), *items(sent).values(), sent):
        graph.erase_node(node)
