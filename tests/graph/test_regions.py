"""Regions: the repeated blocks of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshpar.capture.export import capture
from meshpar.graph.captured import Captured
from meshpar.graph.facts import facts


def regions(captured: Captured) -> list[str | None]:
    return list(dict.fromkeys(facts(node).region for node in captured.graph.nodes if node.op == "call_function"))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList([nn.Linear(4, 4)])
        self.stages = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2))
        self.table = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4)}) for _ in range(2))
        self.unused = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem[0](x)
        for stage in self.stages:
            for layer in stage:  # type: ignore[union-attr]
                x = layer(x).relu()
        for entry in self.table:
            x = entry["a"](x)  # type: ignore[index]
        return self.unused[0](x)


def test_outermost_lists_of_two_or_more() -> None:
    captured = capture(Outer(), (torch.randn(2, 4),))
    assert regions(captured) == [None, "stages.0", "stages.1", "table.0", "table.1"]
    weights = {str(node.target): facts(node).region for node in captured.graph.nodes if node.op == "get_attr"}
    assert (weights["stages.1.0.bias"], weights["stem.0.bias"], weights["table.0.a.weight"]) == ("stages.1", None, "table.0")


def test_operators_between_the_layers_belong_to_no_region_and_a_list_may_be_the_root() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.ReLU())
    assert regions(capture(model, (torch.randn(2, 4),))) == ["0", "1", "2"]


def test_a_shared_parameter_belongs_to_no_region() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
            self.layers[1].weight = self.layers[0].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x))

    captured = capture(Shared(), (torch.randn(2, 4),))
    assert [facts(node).region for node in captured.graph.nodes if node.op == "get_attr"] == [None]
    assert captured.parameters == ("layers.0.weight",) and captured.aliases == {"layers.1.weight": "layers.0.weight"}


def test_a_block_called_twice_keeps_its_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                for layer in self.layers:
                    x = layer(x)
            return x

    captured = capture(Twice(), (torch.randn(2, 4),))
    calls = [node for node in captured.graph.nodes if node.op == "call_function"]
    assert [facts(node).region for node in calls] == ["layers.0", "layers.1"] * 2
    assert [facts(node).module for node in calls] == ["layers.0", "layers.1"] * 2
