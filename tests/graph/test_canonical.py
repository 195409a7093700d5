"""A captured graph does not depend on the order in which a process built it; and stays as near to the program as it can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from meshpar.capture.export import capture
from meshpar.graph.captured import Captured
from meshpar.graph.facts import facts
from meshpar.graph.text import fingerprint, lines, shown
from tests.capture.models import assert_same
from tests.graph.orders import NAMES, OTHER, SAME, Base, Dropouts, Names, Outputs, Tables


def captured(kind: type[Base], order: Names) -> Captured:
    torch.manual_seed(0)
    return capture(kind(order).double().train(), (torch.randn(4, 8, dtype=torch.float64),))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", SAME)
def test_every_order_gives_one_graph(kind: type[Base]) -> None:
    orders = (NAMES, NAMES[::-1], NAMES[1:] + NAMES[:1])
    texts = {"\n".join(lines(captured(kind, order))) for order in orders}
    assert len(texts) == 1


@pytest.mark.parametrize("kind", OTHER)
def test_other_computations_are_other_graphs(kind: type[Base]) -> None:
    assert len({fingerprint(captured(kind, order)) for order in (NAMES, NAMES[::-1])}) == 2


@pytest.mark.parametrize("kind", [Tables, Outputs])
def test_values_are_those_of_the_model(kind: type[Base]) -> None:
    torch.manual_seed(0)
    assert_same(
        kind(NAMES[::-1]).double(), (torch.randn(4, 8, dtype=torch.float64),), {}, loss=lambda x: x["loss"] if kind is Outputs else x
    )


def test_outputs_keep_their_keys() -> None:
    found = captured(Outputs, NAMES[::-1])
    assert list(found.out_spec.context) == ["loss", *NAMES[::-1]]
    assert found.out_leaves[1].key != 1  # in the graph they are in the order of their names


def test_dropouts_have_the_seed_of_what_uses_them() -> None:
    def users(order: Names) -> dict[int, str]:
        nodes = [node for node in captured(Dropouts, order).graph.nodes if facts(node).seed is not None]
        return {facts(node).seed: str(next(iter(node.users))) for node in nodes}

    assert users(NAMES) == users(NAMES[::-1]) and len(users(NAMES)) == 3


class Straight(nn.Module):
    """q, k and v first, then what is done with them; a number per layer that is used at the end; a table before the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.arange(8.0).cos()
        sizes = []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            a = q(x)
            b = k(x)
            c = v(x)
            b = b * table
            a = a.tanh()
            x = x + a * b + c
            sizes.append(x.abs().amax())
        return x.mean() + torch.stack(sizes).sum()


def test_the_order_is_that_of_the_program() -> None:
    graph = capture(Straight(), (torch.randn(4, 8),)).graph
    turn = ["linear", "linear", "linear", "mul", "tanh", "mul", "add", "add", "abs", "amax"]
    found = [str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function"]
    assert found == ["arange", "cos", *turn, *turn, "mean", "stack", "sum", "add"]
    assert [node.name for node in graph.nodes if node.target is torch.ops.aten.linear.default][:3] == ["linear", "linear_1", "linear_2"]


def test_lines_as_they_are_shown() -> None:
    line = next(line for line in shown(captured(Tables, NAMES)) if line.startswith("linear"))
    assert line.startswith("linear(x, first.weight, first.bias) -> float64 [4, 8] at orders.py:") and line.endswith(" in first")
