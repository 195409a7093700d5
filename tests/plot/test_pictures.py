"""Pictures say what is so: the figures in them are computed again here, and the boxes counted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import meshpar as mp
from meshpar.errors import ConfigError
from meshpar.plan import Plan
from meshpar.plot import bytes_sent, canvas
from meshpar.plot.moves import MOVES
from meshpar.plot.work import HIDDEN
from meshpar.sharding.types import Shard

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def plan() -> Iterator[Plan]:
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
    with mp.simulate(8):
        mesh = mp.make_mesh("dp=2,tp=4")
        yield mp.parallelize(model, mesh, example=(torch.randn(4, 8),), loss_fn=lambda out, _: out.square().mean()).plan


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


# -- who holds what ------------------------------------------------------------------------------------------------------------------------


def test_a_mesh_has_every_rank_once_where_the_grid_says() -> None:
    ax = mp.plot.mesh("pp=2,dp=2,ep=2,tp=2")
    assert sorted(map(int, texts(ax))) == list(range(16)) and len(ax.patches) == 16
    places = {int(text.get_text()): text.get_position() for text in ax.texts}
    assert places[0][1] == places[1][1] == places[8][1] and places[8][0] > places[1][0]  # stages side by side, tp across
    colours = {int(text.get_text()): patch.get_facecolor()[:3] for text, patch in zip(ax.texts, ax.patches, strict=True)}
    assert colours[0] == colours[2] == colours[8] != colours[1]  # one part of a weight, one colour
    assert [label.get_text() for label in ax.get_yticklabels()] == ["dp 0  ep 0", "dp 0  ep 1", "dp 1  ep 0", "dp 1  ep 1"]


def test_the_expert_grid_is_coloured_by_experts() -> None:
    ax = mp.plot.mesh("dp=2,ep=2", experts=True)
    colours = {int(text.get_text()): patch.get_facecolor()[:3] for text, patch in zip(ax.texts, ax.patches, strict=True)}
    assert colours[0] == colours[2] != colours[1] == colours[3] and "experts" in ax.get_title(loc="left")
    with pytest.raises(ConfigError, match="has no axis that divides experts. Type for instance 'dp=2,ep=2'"):
        mp.plot.mesh("dp=4", experts=True)
    with pytest.raises(ConfigError, match="128 rows and 8 columns, more than 64"):
        mp.plot.mesh("dp=128,tp=8")


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_a_parameter_is_covered_by_what_its_ranks_hold(plan: Plan, name: str) -> None:
    ax = mp.plot.parameter(plan, name)
    found = plan.parameters[name]
    assert sum(patch.get_width() * patch.get_height() for patch in ax.patches) == pytest.approx(torch.Size(found.shape).numel())
    cut = {axis: type_ for axis, type_ in found.placements.items() if isinstance(type_, Shard)}
    assert len(ax.patches) == (4 if cut else 1)
    assert ("tp 0" if cut else "all ranks") in texts(ax)
    assert "the same on every rank of dp 2" in ax.get_title(loc="left")


def test_parts_of_parts(plan: Plan) -> None:
    """A dim that two axes cut, the first in stretches: what is drawn for each rank is what slicing gives."""
    from dataclasses import replace

    found = replace(plan.parameters["0.weight"], placements={"dp": Shard(0, 2, ((4, 3),)), "tp": Shard(0, 1, ((4, 3),))})
    ax = mp.plot.parameter(replace(plan, parameters={"w": found}), "w")
    rows = torch.arange(24)
    for (dp, tp), patch in zip(product(range(2), range(4)), _by_rank(ax), strict=True):
        mine = torch.cat([rows[a:b] for a, b in found.placements["dp"].ranges(2, dp)])  # type: ignore[union-attr]
        mine = torch.cat([mine[a:b] for a, b in found.placements["tp"].ranges(4, tp)])  # type: ignore[union-attr]
        assert sorted(row for low, high in patch for row in range(low, high)) == sorted(mine.tolist())


def _by_rank(ax: Any) -> list[list[tuple[int, int]]]:
    found: dict[Any, list[tuple[int, int]]] = {}
    for patch in ax.patches:
        found.setdefault(patch.get_facecolor(), []).append((int(patch.get_y()), int(patch.get_y() + patch.get_height())))
    return list(found.values())


def test_a_name_that_is_not_there(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="no parameter '0.wieght'. Nearest: 0.weight"):
        mp.plot.parameter(plan, "0.wieght")


# -- what moves ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MOVES)
def test_a_collective_is_drawn_as_it_is_done(kind: str) -> None:
    """Blocks that hold the sums of rank numbers, moved by torch's own definition."""
    n, move = 4, MOVES[kind]
    before = torch.stack([torch.tensor([float(sum(2**s for s in block)) for block in move.before(r, n)]) for r in range(n)])
    whole = before.sum(0)
    wanted = {
        "all_gather": lambda r: whole,
        "reduce_scatter": lambda r: torch.where(torch.arange(n) == r, whole, torch.zeros(n)),
        "all_reduce": lambda r: whole,
        "all_to_all": lambda r: before[:, r],
        "broadcast": lambda r: before[0],
        "send": lambda r: before[max(r - 1, 0)],
    }[kind]
    for r in range(n):
        assert [float(sum(2**s for s in block)) for block in move.after(r, n)] == wanted(r).tolist()
    ax = mp.plot.collective(kind, n, nbytes=4000)
    assert f"= {4000 * move.share(n):,.0f} bytes" in ax.get_title(loc="left")


def test_collectives_that_cannot_be_drawn() -> None:
    with pytest.raises(ConfigError, match="'gather' is none of all_gather, reduce_scatter"):
        mp.plot.collective("gather")
    with pytest.raises(ConfigError, match="9 ranks cannot be drawn; 2 to 8 can"):
        mp.plot.collective("all_gather", 9)


def test_communication_adds_up_to_the_ledger(plan: Plan) -> None:
    ax = mp.plot.communication(plan)
    drawn = sum(bar.get_width() for bar in ax.patches)
    assert drawn == pytest.approx(sum(one.nbytes * one.count for one in plan.ledger)) and drawn > 0
    assert {label.get_text().split()[0] for label in ax.get_yticklabels()} == {one.axis for one in plan.ledger}


def test_traffic_is_what_devices_send_to_others_of_their_group(plan: Plan) -> None:
    sent = torch.tensor(bytes_sent._matrix(plan, 8))
    assert sent.diagonal().abs().sum() == 0
    assert torch.allclose(sent.sum(1), torch.full((8,), float(sum(one.nbytes * one.count for one in plan.ledger))))
    over = {axis: sum(one.nbytes * one.count for one in plan.ledger if one.axis == axis) for axis in ("dp", "tp")}
    assert sent[0, 4] == pytest.approx(over["dp"]) and sent[0, 1:4].sum() == pytest.approx(over["tp"]) and sent[0, 5:].sum() == 0
    assert mp.plot.traffic(plan).get_xlabel() == "receives"


# -- who computes how much -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("balanced", "window"), [(True, None), (False, None), (False, 16), (True, 16)])
def test_causal_work_is_counted(balanced: bool, window: int | None) -> None:
    length, ranks = 64, 4
    ax = mp.plot.causal_work(length, ranks, balanced=balanced, window=window)
    picture = torch.tensor(ax.images[0].get_array())
    owned = [int((picture == torch.tensor(canvas.colour(rank), dtype=picture.dtype)).all(-1).sum()) for rank in range(ranks)]
    assert sum(owned) == sum(min(q + 1, window or length) for q in range(length))
    spread = max(owned) / (sum(owned) / ranks)
    assert f"busiest {spread:.2f} x the mean" in ax.get_title(loc="left")
    assert (spread == 1.0) == (balanced and window is None)


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_work_of_packed_documents_is_counted_by_pieces(chunks: int) -> None:
    lengths, ranks = [5, 30, 17, 12], 2
    ax = mp.plot.causal_work(64, ranks, chunks=chunks, documents=lengths)
    visible = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril()
    rows = torch.arange(64).view(chunks, ranks, -1)
    rows[1::2] = rows[1::2].flip(1)
    work = [float(visible[rows[:, rank].flatten()].sum()) for rank in range(ranks)]
    assert f"4 documents: busiest {max(work) / (sum(work) / ranks):.2f} x the mean" in ax.get_title(loc="left")
    picture = torch.tensor(ax.images[0].get_array())
    assert int((picture != torch.tensor(HIDDEN, dtype=picture.dtype)).any(-1).sum()) == visible.sum()


def test_expert_load() -> None:
    ax = mp.plot.expert_load([30, 12, 9, 13], ranks=2)
    assert [bar.get_height() for bar in ax.patches] == [30, 12, 9, 13]
    assert f"{42 / 32:.2f} x the mean" in ax.get_title(loc="left")
    for counts, ranks in (([1, 2, 3], 2), ([], 1), ([0, 0], 1)):
        with pytest.raises(ConfigError, match="must divide evenly"):
            mp.plot.expert_load(counts, ranks=ranks)
    with pytest.raises(ConfigError, match="10 positions cannot be cut into 8 equal pieces. Type a multiple of 8"):
        mp.plot.causal_work(10, 4)
    with pytest.raises(ConfigError, match="one piece, or an even number. Type chunks=4"):
        mp.plot.causal_work(24, 2, chunks=3)
    with pytest.raises(ConfigError, match="documents of 20 positions in all, but the sequence has 24"):
        mp.plot.causal_work(24, 2, documents=[12, 8])


def test_drawn_into_axes_that_are_given(plan: Plan) -> None:
    from matplotlib.figure import Figure

    given = Figure().subplots(1, 3)
    assert mp.plot.mesh("dp=2", ax=given[0]) is given[0]
    assert mp.plot.collective("all_reduce", 2, ax=given[1]) is given[1]
    assert mp.plot.communication(plan, ax=given[2]) is given[2]


def test_expert_flow() -> None:
    ax = mp.plot.expert_flow([[3, 1, 0, 4], [2, 2, 2, 2]], ranks=2)
    assert texts(ax) == ["4", "4", "4", "4"] and "1.00 x the mean" in ax.get_title(loc="left")
    ax = mp.plot.expert_flow([[8, 0, 0, 0], [8, 0, 0, 0]], ranks=2)
    assert ax.images[0].get_array().tolist() == [[8, 0], [8, 0]] and "2.00 x the mean" in ax.get_title(loc="left")
    with pytest.raises(ConfigError, match="3 experts on 2 ranks, 1 ranks that send; they must divide evenly"):
        mp.plot.expert_flow([[1, 2, 3]], ranks=2)
