"""Loss terms over microbatches: a mean over valid labels divides by the count of the whole step, others are summed or averaged (`terms`).

A model's loss is a sum of terms. A term `sum(...) / count`, whose count depends on the batch alone, must be divided by the count over all
microbatches and data ranks, or uneven numbers of ignored labels give the wrong mean. Sums add up, and of any other term (a mean over
samples, a weight penalty, a router's load-balancing loss) the step takes the mean over its microbatches.

    before                              after
      s = cross_entropy(..., sum)         denominator = placeholder          (counted over all microbatches before the first forward)
      n = sum(labels != -100)             s = cross_entropy(..., sum)
      loss = s / n + penalty              loss = s / denominator + penalty * (1 / microbatches)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from meshpar.compile.terms import Terms, place
from meshpar.graph.captured import Captured
from meshpar.graph.facts import Extra, facts, info_of, set_facts
from meshpar.ops.expect import EXPECT
from meshpar.passes.batch_norm import takes_statistics
from meshpar.passes.inputs import add_input, extra_inputs
from meshpar.passes.own_terms import share_out
from meshpar.passes.samples import Samples, mixing

aten = torch.ops.aten


@dataclass(frozen=True)
class Split:
    """A captured graph for one of several microbatches, and the graph that counts its denominators."""

    captured: Captured
    counts: Captured | None
    """Returns the denominators of one microbatch, in the order in which the other graph takes them; None when there are none."""
    averaged: tuple[str, ...]
    """Terms of the loss that are averaged over microbatches, by the submodule, or the source line, that computes them."""
    within: tuple[str, ...] = ()
    """Submodules, with lines where they are not known for it, that take the samples they see together: those of a microbatch."""


def split_denominators(captured: Captured, microbatches: int) -> Split:
    """Rewrite the loss of `captured` for a step of `microbatches` (a copy: the given graph is left alone)."""
    assert captured.loss is not None
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in captured.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    samples = Samples(graph, captured.batch_dims)
    added, together = share_out(graph, microbatches, samples)
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    mixed = mixing(samples, graph, [output.args[0][captured.loss]])
    terms = Terms(graph, microbatches, samples, frozenset(captured.state.inputs))
    values = list(output.args[0])
    loss = terms.rewrite(values[captured.loss])
    values[captured.loss] = loss
    output.args = (tuple(values),)
    counts = _counting(captured, graph, terms.denominators) if terms.denominators else None
    for node, users in terms.denominators.items():
        slot = add_input(graph, Extra.DENOMINATOR, facts(node).beside(info_of(node)).outside())
        for user in users:
            user.replace_input_with(node, slot)
    graph.eliminate_dead_code(lambda node: _is_kept(node) or node.target is EXPECT)
    graph.lint()
    names = (*captured.inputs, *extra_inputs(graph).denominators)
    within = [*_statistics([n for n in graph.nodes if takes_statistics(n)], mixed), *together]
    within = list(dict.fromkeys([*within, *_updated(captured.mutations, within)]))
    averaged = tuple(dict.fromkeys([*terms.averaged, *added]))
    return Split(replace(captured, graph=graph, inputs=names), counts, averaged, tuple(within))


def _statistics(known: Sequence[fx.Node], mixed: Sequence[fx.Node]) -> list[str]:
    """Where samples are taken together: submodules known for it, and the lines of others."""
    places = list(dict.fromkeys(map(place, known)))
    lines: dict[str, dict[str, None]] = {}
    for node in mixed:
        if place(node) not in places:
            lines.setdefault(str(facts(node).module or "the model"), {})[str(facts(node).source or node.name)] = None
    return [*places, *(f"{module} ({', '.join(found)})" for module, found in lines.items())]


def _updated(buffers: Sequence[str], known: Collection[str]) -> list[str]:
    """Modules that every microbatch updates, but for those that are known to see a microbatch."""
    found: dict[str, list[str]] = {}
    for name in buffers:
        module, _, buffer = name.rpartition(".")
        if module not in known:
            found.setdefault(module or "the model", []).append(buffer)
    return [f"{module} (every microbatch updates {', '.join(names)})" for module, names in found.items()]


def _counting(captured: Captured, graph: fx.Graph, denominators: dict[fx.Node, list[fx.Node]]) -> Captured:
    counts = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            counts.output(tuple(mapping[n] for n in denominators))
            continue
        mapping[node] = set_facts(counts.node_copy(node, lambda n: mapping[n]), facts(node).outside())
    counts.eliminate_dead_code(_is_kept)
    return replace(captured, graph=counts, mutations=(), loss=None, out_leaves=())


def _is_kept(node: fx.Node) -> bool:
    """Functional graphs have no side effects: only inputs and outputs stay without users (torch counts random operators as impure)."""
    return node.op in ("placeholder", "output")
