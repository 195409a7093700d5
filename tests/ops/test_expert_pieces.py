"""Experts in pieces on real ranks: values, and gradients of rows, matrices and tables, against all rows at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from meshpar.errors import ConfigError
from meshpar.ops import expert_pieces
from meshpar.ops.expert_all_to_all import return_rows, send_rows
from meshpar.ops.expert_pieces import through_experts
from tests.pool import Pool

JOINED = (("aten.silu.default", ("%0",), ()), ("aten.mul.Tensor", ("%1", "%0"), ()))
STEPS: Any = (
    ("meshpar.grouped_mm.default", ("%0", "%2", "%1"), ()),  # %5
    ("meshpar.row_expert.default", ("%0", "%1"), ()),
    ("aten.index.Tensor", ("%3", ("%6",)), ()),
    ("aten.add.Tensor", ("%5", "%7"), ()),
    ("aten.split_with_sizes.default", ("%8", (4, 4), 1), ()),
    ("_operator.getitem", ("%9", 0), ()),
    ("_operator.getitem", ("%9", 1), ()),
    ("meshpar.ops.again.computed", (JOINED, "%10"), ()),
    ("aten.mul.Tensor", ("%12", "%11"), ()),
    ("meshpar.grouped_mm.default", ("%13", "%4", "%1"), ()),
)


def rows_of(counts: list[int], seed: int) -> Tensor:
    return torch.randn(sum(counts), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def steps_by_hand(rows: Tensor, ends: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    h = torch.ops.meshpar.grouped_mm(rows, w, ends)
    gate, up = (h + b[torch.ops.meshpar.row_expert(rows, ends)]).split(4, 1)
    return torch.ops.meshpar.grouped_mm(torch.nn.functional.silu(gate) * gate * up, v, ends)


def compared(counts: list[list[int]], frozen: bool, packed: bool) -> tuple[float, int]:
    """The largest difference of values and gradients, in pieces and not, twice through the same graph; how many messages were started."""
    rank, size = dist.get_rank(), dist.get_world_size()
    where: Any = {"group": dist.group.WORLD.group_name, "size": size, "rank": rank}  # type: ignore[union-attr]
    own, local = counts[rank], len(counts[0]) // size
    ends = torch.tensor(own).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(7 + rank)
    shapes = ((local, 3, 8), (local, 8), (local, 4, 5))
    parameters = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    started, real = [0], expert_pieces._OnTheWay._start

    def start(flight: Any, gone: Any, come: Any) -> Any:
        started[0] += 1
        flight.apart = not packed
        return real(flight, gone, come)

    expert_pieces._OnTheWay._start = start  # type: ignore[method-assign]
    try:
        found = []
        for cut in (True, False):
            x = rows_of(own, rank).requires_grad_(not frozen)
            if cut:
                y = through_experts(STEPS, x, ends, *parameters, **where)
            else:
                rows, here, *route = send_rows(x, ends, **where)
                y = return_rows(steps_by_hand(rows, here, *parameters), *route, **where)
            wanted = [*parameters, *([] if frozen else [x])]
            once = torch.autograd.grad((y**2).sum(), wanted, retain_graph=True)
            twice = torch.autograd.grad((y**3).sum(), wanted)
            found.append([y, *once, *twice])
    finally:
        expert_pieces._OnTheWay._start = real  # type: ignore[method-assign]
    worst = max(((p - q).abs().max() / q.abs().max().clamp(min=1)).item() if p.numel() else 0.0 for p, q in zip(*found, strict=True))
    return worst, started[0]


EVEN = [[2, 3, 1, 4], [5, 0, 2, 3]]
CASES = {
    "two experts a rank": (EVEN, False, False, 12),
    "packed": (EVEN, False, True, 12),
    "rows need no gradient": (EVEN, True, False, 8),
    "one expert a rank": ([[2, 3], [5, 1]], False, False, 6),
    "all to the first rank": ([[2, 3, 0, 0], [5, 1, 0, 0]], False, False, 12),
    "a rank without rows": ([[2, 3, 1, 1], [0, 0, 0, 0]], False, False, 12),
    "one row": ([[0, 0, 0, 1], [0, 0, 0, 0]], False, False, 12),
    "three experts a rank": ([[1, 2, 3, 4, 5, 6], [2, 0, 2, 1, 1, 3]], False, False, 12),
    "three ranks": ([[1, 2, 3, 4, 5, 6], [2, 0, 2, 1, 1, 3], [0, 1, 0, 0, 2, 0]], False, False, 12),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(gloo: Pool, case: str) -> None:
    counts, frozen, packed, messages = CASES[case]
    for worst, started in gloo.run(compared, counts, frozen, packed, world=len(counts)):
        assert worst < 1e-12
        assert started == messages, "there and back, and twice backward: the gradients of results, and those of rows"


def without_gradients() -> tuple[float, bool, str]:
    where: Any = {"group": dist.group.WORLD.group_name, "size": 2, "rank": dist.get_rank()}  # type: ignore[union-attr]
    own = EVEN[dist.get_rank()]
    ends = torch.tensor(own).cumsum(0).to(torch.int32)
    parameters = [torch.ones(shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 8), (2, 8), (2, 4, 5))]
    with torch.no_grad():
        y = through_experts(STEPS, rows_of(own, 0), ends, *parameters, **where)
        rows, here, *route = send_rows(rows_of(own, 0), ends, **where)
        worst = (y - return_rows(steps_by_hand(rows, here, *parameters), *route, **where)).abs().max().item()
    try:
        through_experts(STEPS, rows_of([1, *own], 0), ends, *parameters, **where)
    except ConfigError as error:
        return worst, y.requires_grad, str(error)
    return worst, y.requires_grad, ""


def test_evaluation_and_rows_of_no_expert(gloo: Pool) -> None:
    for worst, differentiable, said in gloo.run(without_gradients, world=2):
        assert worst < 1e-12 and not differentiable
        assert "the offsets end at 10, x has 11 rows" in said
