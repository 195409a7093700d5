"""The dimensions of a model, read off its captured graph: what the planner's search needs to know, with no attribute's name looked at.

    blocks      the largest list of alike modules           heads       the queries, keys and values that attention is given
    hidden      what the loss' product with the vocabulary reads        widths    the products of a block, and the stacks of its experts

Whoever is no decoder of that kind is told what does not add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from meshpar.api import Example, example_of
from meshpar.compile.programs import Programs
from meshpar.config import ParallelConfig
from meshpar.dry_run.rehearsal import absent
from meshpar.errors import ConfigError
from meshpar.graph.captured import Captured
from meshpar.graph.facts import Info, facts, info_of
from meshpar.planner import Transformer

NEAR = 0.02
"""Parameters that the dimensions may leave unexplained: norms, biases, positions."""


def sizes_of(model: nn.Module, example: Example | None = None) -> tuple[Transformer, int]:
    """The dimensions of a decoder with a loss, and the tokens of a sample in `example`.

    Raises ConfigError where the graph is no stack of attention and feed-forward parts, or has parameters that dimensions do not explain.

    >>> sizes_of(model, batch)[0].kv_heads                                 # doctest: +SKIP
    8
    """
    args, kwargs = example_of(model, example)
    with absent("dp=1") as mesh:
        program = Programs(model, mesh, ParallelConfig()).make(args, kwargs, training=model.training)
    found = _read(program.captured)
    held = sum(p.numel() for p in model.parameters())
    if abs(found.parameters / held - 1) > NEAR:
        raise ConfigError(
            f"search: {type(model).__name__} has {held:,} parameters, its dimensions as a decoder explain {found.parameters:,}: {found}. "
            f"Give a planner.Transformer instead of the model, or compare meshes with mp.dry_run, which reads any model."
        )
    return found, _sequence(program.captured)


def _read(captured: Captured) -> Transformer:
    attentions = [n for n in captured.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    blocks = list(dict.fromkeys(region for n in captured.graph.nodes if (region := facts(n).region)))
    losses = [n for n in captured.graph.nodes if "cross_entropy" in str(n.target)]
    missing = [
        what
        for what, there in (
            ("attention (scaled_dot_product_attention)", attentions),
            ("a list of blocks", blocks),
            ("a cross entropy", losses),
        )
        if not there
    ]
    if missing:
        raise ConfigError(f"search: the model has no {', no '.join(missing)}. Give a planner.Transformer instead of the model.")
    query, key = (_shape(attentions[0].args[i]) for i in (0, 1))
    vocab = _shape(losses[0].args[0])[-1]
    hidden = _hidden(captured, vocab)
    parts = [_Part(captured, block, hidden) for block in blocks]
    routed = [part for part in parts if part.experts]
    dense = next((part for part in parts if not part.experts), parts[0])
    first = routed[0] if routed else dense
    return Transformer(
        layers=len(attentions),
        hidden=hidden,
        heads=query[1],
        kv_heads=_own_heads(captured, key[1], query[1], blocks[0], query[-1]),
        head_dim=query[-1],
        ffn=dense.width or first.expert_width,
        vocab=vocab,
        gated=first.gated,
        tied=_tied(captured, vocab),
        positions=_positions(captured, hidden, vocab),
        experts=first.experts,
        top_k=first.choices,
        expert_ffn=first.expert_width,
        shared_ffn=first.width if first.experts else 0,
        dense_layers=len(parts) - len(routed) if routed else 0,
    )


class _Part:
    """A block: the width of its feed-forward part, and its experts."""

    def __init__(self, captured: Captured, block: str, hidden: int) -> None:
        held = _parameters(captured, block)
        nodes = [n for n in captured.graph.nodes if facts(n).region == block]
        grouped = [n for n in nodes if n.target is torch.ops.meshpar.grouped_mm.default]
        self.experts, self.choices, self.expert_width = 0, 0, 0
        if grouped:
            stack = _shape(grouped[-1].args[1])  # [experts, width, hidden]
            self.experts, self.expert_width = stack[0], stack[1]
            send = next(n for n in nodes if n.target is torch.ops.meshpar.dispatch.default)
            self.choices = _shape(send.args[1])[-1]
        outs = Counter(_shape(n)[-1] for n in nodes if n.target in _PRODUCTS)
        self.width, inner = _feed_forward(nodes, hidden, self.experts)
        stacked = sum(_numel(shape) for shape in held.values() if len(shape) == 3)
        per_expert = stacked / max(1, self.experts) / max(1, hidden * self.expert_width)
        self.gated = per_expert > 2.5 if self.experts and stacked else inner >= 2 * self.width or outs[self.width] >= 2


def _feed_forward(nodes: Sequence[fx.Node], hidden: int, experts: int) -> tuple[int, int]:
    """The width of the last product back to `hidden` after attention that is none of its own, and what the products before it give."""
    after = [n for n in nodes if n.target in _PRODUCTS]
    seen = [i for i, n in enumerate(nodes) if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    last = max(seen, default=0)
    products = [n for n in after if nodes.index(n) > last][1:]  # the first is attention's own
    downs = [n for n in products if _shape(n)[-1] == hidden and _inner(n) != hidden]
    width = _inner(downs[-1]) if downs else 0
    ups = sum(_shape(n)[-1] for n in products if n not in downs and _shape(n)[-1] != experts)
    return width, ups


_PRODUCTS = (torch.ops.aten.linear.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.matmul.default)


def _inner(node: fx.Node) -> int:
    return _shape(node.args[1 if node.target is torch.ops.aten.addmm.default else 0])[-1]


def _hidden(captured: Captured, vocab: int) -> int:
    heads = [n for n in captured.graph.nodes if n.target in _PRODUCTS and _shape(n)[-1] == vocab]
    if not heads:
        raise ConfigError(f"search: no product gives the {vocab} logits of the loss. Give a planner.Transformer instead of the model.")
    return _inner(heads[-1])


def _own_heads(captured: Captured, keys: int, queries: int, block: str, width: int) -> int:
    """Heads of keys before they are repeated for the queries: from the products of a block, where attention is given repeated ones."""
    if keys != queries:
        return keys
    nodes = [n for n in captured.graph.nodes if facts(n).region == block and n.target in _PRODUCTS]
    outs = [_shape(n)[-1] for n in nodes[:3]]
    if len(outs) == 3 and outs[0] == queries * width and outs[1] == outs[2] and outs[1] < outs[0]:
        return outs[1] // width
    if outs and queries * width < outs[0] < 3 * queries * width:  # one product for all three
        return max(1, (outs[0] // width - queries) // 2)
    return keys


def _tied(captured: Captured, vocab: int) -> bool:
    tables = [n for n in captured.graph.nodes if n.op == "get_attr" and isinstance(facts(n).info, Info) and vocab in _shape(n)[:1]]
    return len([n for n in tables if len(_shape(n)) == 2]) == 1


def _positions(captured: Captured, hidden: int, vocab: int) -> int:
    looked = [n for n in captured.graph.nodes if n.target is torch.ops.aten.embedding.default]
    tables = [_shape(n.args[0]) for n in looked]
    return max((rows for rows, width in tables if width == hidden and rows != vocab), default=0)


def _sequence(captured: Captured) -> int:
    shapes = [_shape(n) for n in captured.graph.nodes if n.op == "placeholder" and isinstance(facts(n).info, Info)]
    return max((shape[1] for shape in shapes if len(shape) > 1), default=1)


def _parameters(captured: Captured, block: str) -> Mapping[str, tuple[int, ...]]:
    nodes = [n for n in captured.graph.nodes if n.op == "get_attr" and str(n.target).startswith(f"{block}.")]
    return {str(n.target): _shape(n) for n in nodes if isinstance(facts(n).info, Info)}


def _shape(value: Any) -> tuple[int, ...]:
    info = info_of(value)
    return tuple((next(i for i in info if i is not None) if isinstance(info, tuple) else info).shape)


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
