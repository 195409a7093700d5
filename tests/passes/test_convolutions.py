"""Convolutions with what models put before and after them, as convolutions that give one result for each position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from meshpar.passes.convolutions import AlignConvolutions
from tests.passes.graphs import calls, info, put

aten = torch.ops.aten


def made(*, pad: list[int] | None = None, kernel: int = 4, value: float = 0.0, keep: tuple[int, int] | None = None, **how: Any) -> fx.Graph:
    """A convolution of 8 positions, perhaps with a padding before it and a slice after it."""
    graph = fx.Graph()
    x = put(graph, "placeholder", "x", (), info(2, 3, 8))
    w = put(graph, "get_attr", "w", (), info(3, 1, kernel))
    run = torch.nn.functional.conv1d
    given = torch.zeros(2, 3, 8)
    if pad is not None:
        given = torch.nn.functional.pad(given, pad)
        x = put(graph, "call_function", aten.constant_pad_nd.default, (x, pad, value), info(*given.shape))
    y = run(given, torch.zeros(3, 1, kernel), groups=3, **how)
    stride, padding, dilation = (how.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)))
    target = aten.conv1d.padding if isinstance(padding, str) else aten.conv1d.default
    listed = padding if isinstance(padding, str) else [padding]
    node = put(graph, "call_function", target, (x, w, None, [stride], listed, [dilation], 3), info(*y.shape))
    if keep is not None:
        node = put(graph, "call_function", aten.slice.Tensor, (node, 2, *keep), info(2, 3, keep[1] - keep[0]))
    graph.output((node,))
    AlignConvolutions()(graph)
    graph.lint()
    return graph


@pytest.mark.parametrize(
    "left, how",
    [
        (3, {"padding": 3, "keep": (0, 8)}),  # causal: what comes too late is cut off
        (1, {"padding": 3, "keep": (2, 10)}),
        (3, {"pad": [3, 0]}),
        (2, {"pad": [2, 1]}),
        (4, {"pad": [3, 0], "padding": 1, "keep": (0, 8)}),
        (1, {"padding": 1, "kernel": 3}),
        (1, {"padding": "same"}),  # of an odd number of zeros the last one comes after
        (6, {"padding": 6, "dilation": 2, "keep": (0, 8)}),
        (1, {"padding": 1, "stride": 2}),
    ],
)
def test_one_result_for_each_position(left: int, how: dict[str, Any]) -> None:
    graph = made(**how)
    (node,) = (n for n in graph.nodes if n.op == "call_function")
    assert calls(graph) == ["convolved = convolved(x, w)"]
    assert (node.kwargs["left"], node.kwargs["stride"], node.kwargs["dilation"]) == (left, how.get("stride", 1), how.get("dilation", 1))


@pytest.mark.parametrize(
    "how",
    [
        {"padding": 3},  # more results than positions
        {"padding": 0},
        {"padding": 3, "keep": (0, 7)},
    ],
)
def test_others_stay(how: dict[str, Any]) -> None:
    assert any("conv1d" in line for line in calls(made(**how)))


@pytest.mark.parametrize(
    "how",
    [{"pad": [3, 0], "value": 1.0}, {"kernel": 3, "padding": 1, "pad": [3, -3]}],
    ids=["no zeros", "zeros where something is cut off"],
)
def test_paddings_that_are_more_than_zeros_around_stay(how: dict[str, Any]) -> None:
    assert calls(made(**how))[0].startswith("constant_pad_nd")
