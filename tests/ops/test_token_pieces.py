"""Experts beside the gathering of tokens, on real ranks: values and gradients, against all tokens at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from meshpar.ops import collectives, experts, load, token_pieces
from tests.ops.test_expert_pieces import STEPS, steps_by_hand
from tests.pool import Pool

EXPERTS, CHOICES, WIDTH = 4, 2, 3


def world() -> dict[str, Any]:
    return {"group": dist.group.WORLD.group_name, "size": dist.get_world_size(), "rank": dist.get_rank()}  # type: ignore[union-attr]


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def at_once(x: Tensor, index: Tensor, weights: Tensor, at: Any, *parameters: Tensor, dropping: bool, cut: Any, where: Any) -> Tensor:
    whole = collectives.s_to_r(x, 0, *cut, **where)
    rows, ends, perm = load.dispatch(whole, index, EXPERTS, at, dropping)
    return collectives.p_to_s(experts.combine(steps_by_hand(rows, ends, *parameters), perm, weights), 0, *cut, **where)


def compared(repeat: int, own: int, frozen: bool, dropping: bool) -> tuple[float, int, Tensor]:
    """The largest difference of values and gradients, in pieces and not, twice through the same graph; messages; numbers of rows."""
    where, started, real = world(), [0], token_pieces.start_shift
    size, rank = where["size"], where["rank"]
    tokens = repeat * own * size
    cut = (repeat, ((own * size, 1),))
    parameters = [drawn(shape, 7 + rank) for shape in ((EXPERTS, WIDTH, 8), (EXPERTS, 8), (EXPERTS, 4, 5))]
    generator = torch.Generator().manual_seed(3)
    index = torch.rand(tokens, EXPERTS + dropping, generator=generator).topk(CHOICES).indices
    counted = torch.where(index < EXPERTS, 1.0, 0.0)

    def start(*args: Any) -> Any:
        started[0] += 1
        return real(*args)

    token_pieces.start_shift = start  # type: ignore[assignment]
    try:
        found, ends = list[list[Tensor]](), list[Tensor]()
        for in_pieces in (True, False):
            tally = load.Tally()
            at = load.slot(tally, "experts", ())
            x, chosen = drawn((repeat * own, WIDTH), 20 + rank).requires_grad_(not frozen), drawn((tokens, CHOICES), 5)
            weights = chosen * counted
            if in_pieces:
                named = {"num_experts": EXPERTS, "dropping": dropping, "repeat": repeat, "segments": cut[1], **where}
                y = token_pieces.on_gathered_tokens(STEPS, x, index, weights, at, *parameters, **named)
            else:
                y = at_once(x, index, weights, at, *parameters, dropping=dropping, cut=cut, where=where)
            wanted = [*parameters, chosen, *([] if frozen else [x])]
            once = torch.autograd.grad((y**2).sum(), wanted, retain_graph=True)
            twice = torch.autograd.grad((y**3).sum(), wanted)
            found.append([y, *once, *twice])
            ends.append(tally.ends["experts"])
    finally:
        token_pieces.start_shift = real
    assert torch.equal(*ends)
    worst = max(((p - q).abs().max() / q.abs().max().clamp(min=1)).item() for p, q in zip(*found, strict=True))
    return worst, started[0], ends[0]


CASES: dict[str, tuple[int, int, bool, bool]] = {
    "one stretch": (1, 6, False, False),
    "of every sample": (3, 4, False, False),
    "an odd number": (3, 3, False, False),
    "one token a rank": (1, 1, False, False),
    "tokens need no gradient": (2, 4, True, False),
    "rows of no expert": (2, 5, False, True),
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(gloo: Pool, case: str, ranks: int) -> None:
    frozen = CASES[case][2]
    for worst, started, ends in gloo.run(compared, *CASES[case], world=ranks):
        assert worst < 1e-12
        sent = (ranks - 1) * (4 if frozen else 6)
        assert started == sent, "there and back, and twice backward: the gradients of results, and those of tokens"
        assert ends[-1] > 0


def without_gradients() -> tuple[float, bool]:
    where, cut = world(), (2, ((4, 1),))
    parameters = [drawn(shape, 1) for shape in ((EXPERTS, WIDTH, 8), (EXPERTS, 8), (EXPERTS, 4, 5))]
    index, weights, x = torch.arange(16).view(8, 2) % EXPERTS, drawn((8, 2), 2), drawn((4, WIDTH), where["rank"])
    with torch.no_grad():
        y = token_pieces.on_gathered_tokens(
            STEPS, x, index, weights, None, *parameters, num_experts=EXPERTS, dropping=False, repeat=2, segments=cut[1], **where
        )
        wanted = at_once(x, index, weights, load.slot(load.Tally(), "", ()), *parameters, dropping=False, cut=cut, where=where)
    return (y - wanted).abs().max().item(), y.requires_grad


def test_evaluation(gloo: Pool) -> None:
    for worst, differentiable in gloo.run(without_gradients, world=2):
        assert worst < 1e-12 and not differentiable
