"""A block as a graph, memory over a step, the front of a search: what is drawn is counted again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import meshpar as mp
from meshpar.errors import ConfigError

pytest.importorskip("matplotlib")


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def test_a_block_has_its_collectives_and_its_types() -> None:
    with mp.simulate(4):
        pm = mp.parallelize(Blocks(), mp.make_mesh("dp=2,tp=2"), example={"x": torch.randn(4, 16)})
        ax = mp.plot.block(pm, "layers.1")
        said = [text.split("\n") for text in [text.get_text() for text in ax.texts]]
        first = {box[0] for box in said}
        kinds = {
            one.kind.replace("_", "-") for one in pm.comms() if one.axis == "tp" and one.region == "layers.1" and one.phase == "forward"
        }
        assert kinds and all(any(box.startswith(f"{kind} /") for box in first) for kind in kinds)
        assert ["linear", "1: S(0)"] in said and any(box[0] == "linear" and box[1].startswith("3: S(1)") for box in said)
        assert {"R", "P"} <= first or {"P", "S(1)"} <= first  # what goes into the first product is whole, what leaves the second a sum
        assert ["gelu"] in said and ax.get_title(loc="left") == "layers.1, types on tp=2"
        assert "types on dp=2" in mp.plot.block(pm, "layers.0", axis="dp").get_title(loc="left")
        with pytest.raises(ConfigError, match="no block 'layer.1'. Nearest: layers.1"):
            mp.plot.block(pm, "layer.1")
        with pytest.raises(ConfigError, match="no typed axis 'cp' on this mesh; dp, tp"):
            mp.plot.block(pm, "layers.1", axis="cp")


# -- before a job starts -------------------------------------------------------------------------------------------------------------------


CASES = [("pp=2,dp=2", "1f1b", "meshpar"), ("dp=2", "1f1b", "meshpar"), ("pp=2", "zero-bubble", "megatron-2024")]


@pytest.mark.parametrize(("mesh", "schedule", "stack"), CASES)
def test_memory_over_a_step(mesh: str, schedule: str, stack: str) -> None:
    config = mp.ParallelConfig(microbatches=4, schedule=schedule)  # type: ignore[arg-type]
    found = mp.dry_run(Blocks(), mesh, config, example={"x": torch.randn(8, 16)}, stack=stack)
    for rank, one in enumerate(found.ranks):
        ax = mp.plot.memory(found, rank)
        highest = max(path.vertices[:, 1].max() for collection in ax.collections for path in collection.get_paths())
        assert highest * 2**30 == pytest.approx(one.peak)
        events = [event for event in found.timeline() if event.rank == rank and event.kind in ("F", "B", "I", "W")]
        assert len(one.course) == len(events) and all(most >= after >= 0 for most, after in one.course)
        assert one.always >= one.parameters + one.optimizer
    assert "course" not in found.to_dict()["ranks"][0]
    with pytest.raises(ConfigError, match=f"no rank 5 in a pipeline of {len(found.ranks)}"):
        mp.plot.memory(found, 5)


def test_the_front_of_a_search() -> None:
    from meshpar.planner import Transformer
    from meshpar.plot.ahead import pareto

    sizes = Transformer(layers=8, hidden=2048, heads=16, kv_heads=4, ffn=8192, vocab=32000)
    found = mp.search(sizes, ("h100", 16), global_batch=64, seq=4096)
    ax = mp.plot.frontier(found)
    xs, ys = ax.lines[0].get_data()
    points = [(one.seconds, one.memory.total / 2**30) for one in (*found.ranked, *found.found.shapes)]
    assert min(xs) == found.best.seconds and not any(x < a and y < b for a, b in zip(xs, ys) for x, y in points)
    assert pareto([(1.0, 2.0, "a"), (1.0, 1.0, "b"), (2.0, 1.0, "c")]) == [(1.0, 1.0, "b")]
