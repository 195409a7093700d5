"""Where stages begin: even, at narrow places, between blocks where that is nearly as even, or as told."""

from __future__ import annotations

import time
from functools import lru_cache
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor, fx, nn

from meshpar.compile.ground import Budget, Staging
from meshpar.compile.split import mark, shared_parameters, split
from meshpar.compile.stages import choose
from meshpar.errors import PlanError
from meshpar.graph.captured import Captured
from meshpar.graph.facts import facts, gives_several, info_of
from meshpar.sharding.price import Price
from tests.compile.staged import captured_model
from tests.models import tiny
from tests.sharding.models import captured_of

COMPUTE = Price(flops=1e9, memory=1e30)
"""Only arithmetic costs anything."""


class Layers(nn.Module):
    """Residual layers of given widths."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 8)) for w in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for layer in self.layers:
            x = x + layer(x)
        return x.sum()


@lru_cache(maxsize=32)
def captured(*widths: int) -> Captured:
    return captured_of(Layers(*widths), {"x": torch.randn(4, 8)})


def test_equal_layers_give_equal_stages() -> None:
    found = choose(captured(*[32] * 8), 4, price=COMPUTE)
    assert found.begins == ("the start", "layers.2", "layers.4", "layers.6")
    assert len(set(found.seconds)) == 1 and found.imbalance == 1.0
    assert found.crossing == (4 * 8 * 4,) * 3
    assert "between blocks" in found.why


def test_uneven_layers_are_balanced_by_cost_not_by_count() -> None:
    found = choose(captured(64, 16, 16, 16, 16), 2, price=COMPUTE)
    assert found.begins == ("the start", "layers.1")
    assert found.seconds[0] == pytest.approx(found.seconds[1])


def test_depth_that_stages_do_not_divide() -> None:
    found = choose(captured(*[32] * 7), 3, price=COMPUTE)
    spread = sorted(round(s / min(found.seconds), 3) for s in found.seconds)
    assert spread == [1, 1, 1.5], "2, 2 and 3 layers: none is lost"


def test_the_smallest_largest_stage_is_found() -> None:
    """Against all cuts between blocks."""
    widths = (8, 40, 16, 24, 64, 8, 8, 32, 16)
    graph = captured(*widths)
    for stages in (2, 3, 4, 5):
        found = choose(graph, stages, price=COMPUTE)
        sums = []
        for cuts in combinations(range(1, len(widths)), stages - 1):
            ends = (0, *cuts, len(widths))
            sums.append(max(sum(widths[a:b]) for a, b in pairwise(ends)))
        assert found.imbalance <= 1.05 * min(sums) * stages / sum(widths)


def test_a_heavy_head_gets_fewer_layers() -> None:
    """The vocabulary costs as much as one and a half layers."""
    model = tiny("llama", num_hidden_layers=4, vocab_size=800)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    graph = captured_of(model, {"input_ids": ids, "labels": ids})
    found = choose(graph, 2, wanted=[graph.loss or 0], price=COMPUTE)
    layers = choose(graph, 2, wanted=[graph.loss or 0], price=COMPUTE, where=[2, 2])
    assert layers.imbalance > 1.2 > 1.1 > found.imbalance
    assert all(size == 8 * 64 * 4 for size in found.crossing), "the hidden state alone"


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "albert"])
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_no_cut_inside_attention(name: str, stages: int) -> None:
    _, _, graph = captured_model(name)
    found = choose(graph, stages, wanted=[graph.loss or 0])
    mark(graph.graph, found.starts, graph.parameters)
    for part in split(graph.graph, stages, parameters=graph.parameters, wanted=[graph.loss or 0]):
        names = {n.name: n for n in graph.graph.nodes}
        for sent in part.sends:
            assert len(info_of(names[sent]).shape) != 4 or info_of(names[sent]).shape[0] == 1, f"{sent} is split into heads"


@pytest.mark.parametrize("stages", [2, 3, 4, 6])
@pytest.mark.parametrize("name", ["unet", "uneven"])
def test_models_without_a_list_of_equal_blocks(name: str, stages: int) -> None:
    _, _, graph = captured_model(name)
    found = choose(graph, stages)
    assert len(found.starts) == stages - 1 and min(found.seconds) > 0
    assert found.imbalance < (1.5 if stages < 6 else 1.65)  # (penalties of weights stay with these)
    mark(graph.graph, found.starts, graph.parameters)
    parts = split(graph.graph, stages, parameters=graph.parameters, mutations=graph.mutations)
    sizes = {n.name: info_of(n).nbytes for n in graph.graph.nodes if n.op == "call_function" and not gives_several(n)}
    assert tuple(sum(sizes[name] for name in part.sends) for part in parts[:-1]) == found.crossing


def test_deterministic_and_printable() -> None:
    graph = captured(*[32] * 5)
    one, two = choose(graph, 3), choose(graph, 3)
    assert one == two and isinstance(hash(one), int)
    assert str(one).splitlines()[0].startswith("3 stages, balanced by cost")
    assert "stage 1 from layers." in str(one) and "hands on 128 B" in str(one)


def test_another_cost() -> None:
    def cost(node: fx.Node) -> float:
        return float(facts(node).module.startswith("layers.0") and node.target is torch.ops.aten.linear.default)

    found = choose(captured(32, 32, 32), 2, cost=cost)
    assert found.seconds == (1.0, 1.0) and found.starts[0] in ("relu", "linear_1"), "inside the only layer that costs anything"


# -- memory --------------------------------------------------------------------------------------------------------------------------------


def test_memory_counts_state_and_microbatches_in_flight() -> None:
    graph = captured(*[32] * 4)
    parameters = 4 * (2 * 8 * 32 + 32 + 8)  # of a layer
    plain, twice = (choose(graph, 2, price=COMPUTE, memory=Budget(state=s, microbatches=8)) for s in (1.0, 2.0))
    assert [b - a for a, b in zip(plain.memory, twice.memory)] == [2 * parameters + 4 * 8, 2 * parameters]
    once = choose(graph, 2, price=COMPUTE, memory=Budget(state=1.0, microbatches=1))
    activations = once.memory[0] - 2 * parameters - 4 * 8
    assert [b - a for a, b in zip(once.memory, plain.memory)] == [activations, 0], "the first stage holds two microbatches"


def test_shared_parameters_are_counted_once_per_stage() -> None:
    _, _, graph = captured_model("albert")
    found = choose(graph, 3, memory=Budget(state=1.0, microbatches=1))
    mark(graph.graph, found.starts, graph.parameters)
    parts = split(graph.graph, 3, parameters=graph.parameters)
    assert len(shared_parameters(parts, graph.parameters)) >= 16
    no_state = choose(graph, 3, memory=Budget(state=0.0, microbatches=1))
    for part, with_state, without in zip(parts, found.memory, no_state.memory):
        reads = {str(n.target): info_of(n).nbytes for n in part.graph.nodes if n.op == "get_attr" and n.target in graph.parameters}
        assert with_state - without == sum(reads.values())


def test_a_limit_moves_the_cuts() -> None:
    graph = captured(*[32] * 8)
    free = choose(graph, 2, price=COMPUTE, memory=Budget(microbatches=64, state=0.0))
    assert free.memory[0] > 1.8 * free.memory[1]
    tight = choose(graph, 2, price=COMPUTE, memory=Budget(limit=0.75 * free.memory[0], microbatches=64, state=0.0))
    assert max(tight.memory) <= 0.75 * free.memory[0] and tight.seconds[0] < tight.seconds[1]


def test_a_limit_that_cannot_be_met_names_one_that_can() -> None:
    graph = captured(*[32] * 8)
    with pytest.raises(
        PlanError, match=r"no cuts into 2 stages keep every stage within 1000 B: the best take (.*) KiB. Use more stages"
    ) as e:
        choose(graph, 2, memory=Budget(limit=1000.0))
    least = float(str(e.value).partition("best take ")[2].partition(" KiB")[0]) * 1024
    assert max(choose(graph, 2, memory=Budget(limit=least * 1.001)).memory) <= least * 1.001


# -- as told -------------------------------------------------------------------------------------------------------------------------------


def begins(found: Staging) -> tuple[str, ...]:
    return found.begins[1:]


def test_layers_per_stage() -> None:
    graph = captured(*[32] * 6)
    assert begins(choose(graph, 3, where=[1, 3, 2])) == ("layers.1", "layers.4")
    assert begins(choose(graph, 3, where=[3, 3, 0]))[1].endswith("(the model itself)"), "the last stage: what comes after the layers"


@pytest.mark.parametrize(
    ("where", "stages", "message"),
    [
        ([2, 2], 3, r"layers per stage:\n  \[2, 2\] has 2 entries for 3 stages: one per stage.\n  \[2, 2\] is 4 blocks, but layers has 6"),
        ([3, 4], 2, r"\[3, 4\] is 7 blocks, but layers has 6. The numbers must add up to one of these."),
        ([3, 0, 3], 3, "the stage that begins after 3 blocks would begin no later than the one before it"),
    ],
)
def test_layers_that_do_not_fit(where: list[int], stages: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        choose(captured(*[32] * 6), stages, where=where)


def test_layers_of_encoder_and_decoder_together() -> None:
    _, _, graph = captured_model("t5")
    assert begins(choose(graph, 2, where=[3, 1])) == ("decoder.block.1",)
    with pytest.raises(PlanError, match=r"encoder.block has 2, decoder.block has 2, together 4"):
        choose(graph, 2, where=[3, 3])


def test_named_modules() -> None:
    graph = captured(*[32] * 6)
    assert begins(choose(graph, 3, where=["layers.1", "layers.5"])) == ("layers.1", "layers.5")
    inside = choose(graph, 2, where=["layers.3.2"])
    assert inside.begins[1].endswith("(layers.3.2)")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["layers.1", "layer.4"], "'layer.4' is no module that computes anything. Did you mean layers.4"),
        (["layers.1"], r"\['layers.1'\] has 1 names for 3 stages: name where stages 1 to 2 begin."),
        (["layers.4", "layers.1"], "the stage that begins at 'layers.1' would begin no later than the one before it."),
    ],
)
def test_names_that_do_not_fit(where: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        choose(captured(*[32] * 6), 3, where=where)


def test_more_stages_than_places() -> None:
    with pytest.raises(
        PlanError, match=r"stages=40: this graph has (\d+) places to cut .*, so at most (\d+) stages are possible."
    ) as error:
        choose(captured(8, 8), 40)
    most = int(str(error.value).split("at most ")[1].split()[0])
    assert len(choose(captured(8, 8), most).seconds) == most


def test_no_stages() -> None:
    with pytest.raises(PlanError, match="stages=0: at least 1."):
        choose(captured(8), 0)
    assert choose(captured(8), 1).starts == ()


def test_large_graphs_are_quick() -> None:
    graph = captured(*[8] * 48)
    start = time.process_time()
    found = choose(graph, 16)
    assert time.process_time() - start < 1.0
    assert found.imbalance < 1.05
