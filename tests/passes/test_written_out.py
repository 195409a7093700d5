"""Attention that is written out, in the small: what is recognised, what it becomes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from meshpar.capture.export import capture
from meshpar.graph.facts import facts
from meshpar.graph.op import op_name, read
from meshpar.graph.operators import operator_of
from meshpar.passes import written_out
from meshpar.passes.written_out import recognise_attention

S = 6


class Layer(nn.Module):
    """Weights of `weigh(scores, bias)`, of three heads of four."""

    def __init__(self, weigh: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weigh, self.mix, self.bias = weigh, nn.Linear(12, 36), nn.Parameter(torch.zeros(3, S, S))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).view(*x.shape[:2], 3, 12).transpose(1, 2).chunk(3, -1)
        return (self.weigh(q @ k.transpose(-1, -2), self.bias) @ v).sum()


def recognised(weigh: Callable[[Tensor, Tensor], Tensor]) -> tuple[list[fx.Node], list[str | None]]:
    """The calls of attention, and what softmaxes that are left were told."""
    graph = capture(Layer(weigh), (torch.randn(2, S, 12),)).graph
    recognise_attention(graph)
    graph.lint()
    calls = [n for n in graph.nodes if n.op == "call_function"]
    softmaxes = [n for n in calls if operator_of(n.target).kind == "softmax"]
    return [n for n in calls if operator_of(n.target).kind == "attention"], [facts(n).unrecognised for n in softmaxes]


def added(seen: Tensor, number: float = -1e30) -> Tensor:
    return torch.where(seen, 0.0, number)


CAUSAL: dict[str, Callable[[], Tensor]] = {
    "where": lambda: added(torch.arange(S) <= torch.arange(S)[:, None]),
    "triu": lambda: torch.full((S, S), -torch.inf).triu(1),
    "masked_fill": lambda: torch.zeros(S, S).masked_fill(torch.ones(S, S).triu(1).bool(), -1e9),
}


@pytest.mark.parametrize("mask", CAUSAL)
def test_a_causal_mask_goes_without_a_table(mask: str) -> None:
    ((node,), left) = recognised(lambda z, _: (z / 2 + CAUSAL[mask]()).softmax(-1))
    found = read(node).arguments
    assert op_name(node.target) == "scaled_dot_product_attention" and not left
    assert found["is_causal"] and found["attn_mask"] is None and found["scale"] == 0.5


def test_a_window_and_everything() -> None:
    def windowed(z: Tensor, bias: Tensor) -> Tensor:
        behind = torch.arange(S)[:, None] - torch.arange(S)
        return (z + added((behind >= 0) & (behind < 3))).softmax(-1)

    ((node,), _) = recognised(windowed)
    assert op_name(node.target) == "meshpar.ops.halo.windowed_attention" and node.kwargs["window"] == 3
    ((node,), _) = recognised(lambda z, _: z.softmax(-1, dtype=torch.float64).to(z.dtype))
    assert op_name(node.target) == "scaled_dot_product_attention" and not read(node).arguments["is_causal"]


def causal() -> Tensor:
    return added(torch.arange(S) <= torch.arange(S)[:, None])


STEPS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[Any, ...], bool]] = {
    "capped": (lambda z, _: torch.tanh(z * 0.5 / 4) * 4 + causal(), (("tanh",), ("times", 4.0)), True),
    "biased": (lambda z, bias: z + bias + causal(), (("plus", 0),), True),
    "strong": (lambda z, bias: z * bias + causal(), (("by", 0),), True),
    "hidden twice": (lambda z, _: z + added(torch.arange(S) != 2) + causal(), (("plus", 0), ("plus", 1)), False),
    "less than never": (lambda z, _: z + added(torch.arange(S) <= torch.arange(S)[:, None], -1e4), (("plus", 0),), False),
    "multiplied after": (lambda z, _: (z + causal()) * 0.5, (("plus", 0), ("times", 0.5)), False),
    "kept": (lambda z, bias: torch.where(bias > 0, z, -3.0), (("keep", 0, -3.0),), False),
}


@pytest.mark.parametrize("case", STEPS)
def test_other_steps_are_kept_in_their_order(case: str) -> None:
    scores, steps, causal = STEPS[case]
    ((node,), left) = recognised(lambda z, bias: scores(z, bias).softmax(-1))
    assert op_name(node.target) == "meshpar.ops.scored.scored_attention" and not left
    assert node.kwargs["steps"] == steps and node.kwargs["is_causal"] == causal


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "rounded": (lambda z, _: z.round().softmax(-1), "its scores go through round"),
    "along queries": (lambda z, _: z.softmax(-2), ""),
    "weights": (lambda z, _: z.softmax(-1) + 1, "its weights go through add"),
    "read again": (lambda z, _: z.softmax(-1) * z.mean(), "its scores are read elsewhere too"),
    "twice": (lambda z, _: (z + z).softmax(-1), "attention gives something else for drawn values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_attention_is_left_and_told_why(case: str) -> None:
    weigh, why = REFUSED[case]
    calls, left = recognised(weigh)
    assert not calls and left == [why or None]


def test_what_is_read_wrongly_is_refused_by_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a mistake of matching might be: here a factor that is forgotten."""
    right = written_out._step

    def wrong(node: fx.Node, softmax: fx.Node) -> Any:
        step, before = right(node, softmax)
        return None if step is not None and step[0] == "times" else step, before

    monkeypatch.setattr(written_out, "_step", wrong)
    assert recognised(lambda z, _: (z * 3).softmax(-1)) == ([], ["attention gives something else for drawn values"])
