"""The loss of a step of microbatches beside that of the whole batch: what is changed of it is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from meshpar.capture.export import capture
from meshpar.compile.denominators import Split, split_denominators
from meshpar.graph.captured import Captured
from meshpar.graph.facts import Extra, facts
from meshpar.graph.op import op_name
from meshpar.proof.static.denominators import check_loss

M = 4


class TwoHeads(nn.Module):
    """A mean over valid labels, another over all, and a penalty of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 7)

    def forward(self, x: Tensor, labels: Tensor, others: Tensor) -> Tensor:
        first = F.cross_entropy(self.a(x).flatten(0, 1), labels.flatten())
        second = F.cross_entropy(self.b(x).flatten(0, 1), others.flatten())
        return first + 0.5 * second + 0.1 * self.a.weight.square().sum()


@pytest.fixture(scope="module")
def made() -> tuple[Captured, Split]:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 3, 6), "labels": torch.randint(0, 5, (8, 3)), "others": torch.randint(0, 7, (8, 3))}
    captured = capture(TwoHeads(), (), batch, divide=M)
    return captured, split_denominators(captured, M)


def test_the_loss_of_a_step_is_proved(made: tuple[Captured, Split]) -> None:
    captured, split = made
    report = check_loss(captured, split.captured, split.counts, M)
    assert report.proved == 1 and not report.faults and not report.unproved


def changed(captured: Captured, change: Callable[[fx.Graph], None]) -> Captured:
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in captured.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    change(graph)
    return replace(captured, graph=graph)


def share(value: float) -> Callable[[fx.Graph], None]:
    def change(graph: fx.Graph) -> None:
        node = next(n for n in graph.nodes if op_name(n.target) == "mul" and n.args[1:] == (1.0 / M,))
        node.args = (node.args[0], value)

    return change


def left_out(graph: fx.Graph) -> None:
    node = next(n for n in graph.nodes if op_name(n.target) == "mul" and n.args[1:] == (1.0 / M,))
    node.replace_all_uses_with(node.args[0])


def exchanged(graph: fx.Graph) -> None:
    slots = [n for n in graph.nodes if n.op == "placeholder" and facts(n).extra is Extra.DENOMINATOR]
    users = [next(iter(slot.users)) for slot in slots]
    users[0].replace_input_with(slots[0], slots[1])
    users[1].replace_input_with(slots[1], slots[0])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (share(1.0 / (M * M)), "enters with"),
        (share(0.5), "enters with"),
        (left_out, "counts once for every microbatch"),
        (exchanged, "count of something else"),
    ],
    ids=["twice", "wrong", "left out", "exchanged"],
)
def test_what_is_wrong_is_found(made: tuple[Captured, Split], change: Callable[[fx.Graph], None], told: str) -> None:
    captured, split = made
    report = check_loss(captured, changed(split.captured, change), split.counts, M)
    assert [told in str(fault) for fault in report.faults] == [True]


def test_padding_that_is_counted_is_found(made: tuple[Captured, Split]) -> None:
    captured, split = made
    assert split.counts is not None

    def all_of_them(graph: fx.Graph) -> None:
        node = next(n for n in graph.nodes if op_name(n.target) == "ne")
        node.args = (node.args[0], -1)

    report = check_loss(captured, split.captured, changed(split.counts, all_of_them), M)
    assert "count of something else" in str(report.faults[0])


def test_another_number_of_microbatches_is_found(made: tuple[Captured, Split]) -> None:
    captured, split = made
    assert check_loss(captured, split.captured, split.counts, 2).faults
