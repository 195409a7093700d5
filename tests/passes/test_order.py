"""The sequence of passes: what is done before anything is decided, and that a captured graph outlives lowering."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar._torch import without_modes
from meshpar.capture.export import capture
from meshpar.compile.decide import Decision, decide
from meshpar.graph.captured import Captured
from meshpar.graph.op import op_name
from meshpar.mesh import Axis, parse_mesh
from meshpar.passes import order


class Net(nn.Module):
    """A batch norm and a causal attention whose mask is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.up(x).transpose(1, 2)).transpose(1, 2).unsqueeze(1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(h, h, h, attn_mask=mask).square().mean()


def captured() -> Captured:
    torch.manual_seed(0)
    with without_modes():
        return capture(Net().double(), (torch.randn(2, 8, 8, dtype=torch.float64),), {})


def axes_of(mesh: str) -> tuple[Axis, ...]:
    return tuple(Axis(name, size, 0, name) for name, size in parse_mesh(mesh).items())


def names(found: Captured) -> list[str]:
    return [op_name(node.target) for node in found.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("mesh", "written_out"), [("tp=2", False), ("cp=2", False), ("dp=2", True), ("dp=2,cp=2", True), ("ep=2", True)])
def test_batch_norms_are_written_out_where_ranks_have_samples_of_their_own(mesh: str, written_out: bool) -> None:
    found = captured()
    assert any("batch_norm" in name for name in names(found))
    order.before(found.graph, axes_of(mesh))
    assert any("batch_norm" in name for name in names(found)) is not written_out


def test_a_captured_graph_outlives_lowering() -> None:
    """Programs of other shapes, and the pipeline, begin with it again."""
    found, axes = captured(), axes_of("dp=2,tp=2")
    order.before(found.graph, axes)
    before = [node.format_node() for node in found.graph.nodes]
    parameters = frozenset(found.parameters)
    plan = decide(found, Decision((("dp", 2), ("tp", 2)), (("dp", 2), ("tp", 2))))
    for plans in ({}, {a.axis: a for a in plan.axes}):
        graph = order.lowered(found.graph, plans, axes, parameters, {"dp": parameters})
        order.finished(order.deferred(graph, parameters), results=True, overlap=False)
        assert graph is not found.graph and [node.format_node() for node in found.graph.nodes] == before


def test_gradients_are_summed_in_the_graph_for_the_parameters_named() -> None:
    found, axes = captured(), axes_of("dp=2")
    order.before(found.graph, axes)
    plan = decide(found, Decision((("dp", 2),), (("dp", 2),)))

    def sums(*summed: str) -> int:
        graph = order.lowered(found.graph, {a.axis: a for a in plan.axes}, axes, frozenset(found.parameters), {"dp": frozenset(summed)})
        return sum("i_to_r" in op_name(node.target) for node in graph.nodes)

    own = sums()  # (those of the statistics)
    assert (sums("up.weight"), sums("up.weight", "up.bias", "no parameter")) == (own + 1, own + 1)
