"""What a rank reads of a sequence that is cut, however it is cut: convolutions and cumulative operators of parts, against the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import meshpar as mp
from meshpar.ops.convolution import around, convolved, halo_convolution
from meshpar.ops.near import Near, _way
from meshpar.ops.scans import cumulated
from meshpar.ops.shifts import halo_shifted, shifted
from meshpar.sharding.types import Shard, plain
from meshpar.simulate import local_tensors, per_rank

S, SIZE = 16, 4
BALANCED = Shard(2, 1, ((8, 1), (-8, 1)))
LAYOUTS = [plain(2, S), BALANCED]


def taken(x: Tensor, cut: Shard, rank: int) -> Tensor:
    return torch.cat([x.detach()[:, :, low:high] for low, high in cut.ranges(SIZE, rank)], 2)


def differences(op: Callable[..., Tensor], right: Callable[..., Tensor], inputs: Sequence[Tensor], cut: Shard, out: Shard) -> list[float]:
    """Of results and gradients of `op`, whose first operand and result are cut, from those of `right`."""
    inputs = [x.double().requires_grad_() for x in inputs]
    wanted = right(*inputs)
    grad = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, inputs, grad)
    with mp.simulate(SIZE):
        where = {"group": mp.make_mesh(f"cp={SIZE}").get_group("cp").group_name, "size": SIZE, "rank": -1}
        x = per_rank(lambda rank: taken(inputs[0], cut, rank)).requires_grad_()
        others = [per_rank(lambda rank, x=x: x.detach()).requires_grad_() for x in inputs[1:]]
        y = op(x, *others, where)
        of_x, *sums = torch.autograd.grad(y, [x, *others], per_rank(lambda rank: taken(grad, out, rank)))
        found = [float((part - taken(wanted, out, rank)).abs().max()) for rank, part in local_tensors(y).items()]
        found += [float((part - taken(gradients[0], cut, rank)).abs().max()) for rank, part in local_tensors(of_x).items()]
        return found + [float((sum(local_tensors(s).values()) - g).abs().max()) for s, g in zip(sums, gradients[1:], strict=True)]


@pytest.mark.parametrize("cut", LAYOUTS, ids=["contiguous", "head-tail"])
@pytest.mark.parametrize("kernel, left, dilation", [(4, 3, 1), (3, 1, 1), (3, 0, 1), (3, 4, 2), (9, 8, 1), (1, 1, 1), (2, -1, 1)])
def test_a_part_of_a_convolution(cut: Shard, kernel: int, left: int, dilation: int) -> None:
    """Causal, around, ahead, dilated, wider than a part, one position late and one too early."""
    torch.manual_seed(0)
    how = {"left": left, "dilation": dilation}

    def op(x: Tensor, w: Tensor, b: Tensor, where: dict[str, object]) -> Tensor:
        return halo_convolution(x, w, b, 2, 1, cut.segments, out=cut.segments, groups=3, **how, **where)  # type: ignore[arg-type]

    inputs = [torch.randn(2, 3, S), torch.randn(6, 1, kernel), torch.randn(6)]
    assert max(differences(op, lambda x, w, b: convolved(x, w, b, groups=3, **how), inputs, cut, cut)) < 1e-13


@pytest.mark.parametrize("cut", LAYOUTS, ids=["contiguous", "head-tail"])
def test_fewer_results_may_lie_otherwise(cut: Shard) -> None:
    torch.manual_seed(0)
    out = plain(2, S // 2)

    def op(x: Tensor, w: Tensor, where: dict[str, object]) -> Tensor:
        return halo_convolution(x, w, None, 2, 1, cut.segments, out=out.segments, left=1, stride=2, **where)  # type: ignore[arg-type]

    inputs = [torch.randn(2, 3, S), torch.randn(5, 3, 4)]
    assert max(differences(op, lambda x, w: convolved(x, w, left=1, stride=2), inputs, cut, out)) < 1e-13


@pytest.mark.parametrize("cut", LAYOUTS, ids=["contiguous", "head-tail"])
@pytest.mark.parametrize("by", [1, 3, 6, -1, -5])
def test_a_part_of_a_shift(by: int, cut: Shard) -> None:
    """Later and earlier, by less and more than a part."""
    torch.manual_seed(0)

    def op(x: Tensor, where: dict[str, object]) -> Tensor:
        return halo_shifted(x, 2, 1, cut.segments, dim=2, by=by, **where)  # type: ignore[arg-type]

    assert max(differences(op, lambda x: shifted(x, dim=2, by=by), [torch.randn(2, 3, S)], cut, cut)) < 1e-13


@pytest.mark.parametrize("cut", LAYOUTS, ids=["contiguous", "head-tail"])
@pytest.mark.parametrize("how", ["cumsum", "cumprod"])
def test_a_part_of_a_cumulative_operator(how: str, cut: Shard) -> None:
    """Also after a zero, where the gradient of a product is no quotient."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, S)
    x[0, 0, 5] = x[0, 1, 2] = x[0, 1, 13] = 0.0

    def op(x: Tensor, where: dict[str, object]) -> Tensor:
        return cumulated(x, how, None, 2, 1, cut.segments, **where)  # type: ignore[arg-type]

    assert max(differences(op, lambda x: getattr(torch, how)(x, 2), [x], cut, cut)) < 1e-12


def test_a_sum_that_overflows_late_leaves_what_comes_before() -> None:
    x = torch.zeros(1, 1, S)
    x[..., 9] = torch.inf
    with mp.simulate(SIZE):
        where = {"group": mp.make_mesh(f"cp={SIZE}").get_group("cp").group_name, "size": SIZE, "rank": -1}
        y = cumulated(per_rank(lambda rank: taken(x, BALANCED, rank)), "cumsum", None, 2, 1, BALANCED.segments, **where)  # type: ignore[arg-type]
        assert all(torch.equal(part, taken(x.cumsum(2), BALANCED, rank)) for rank, part in local_tensors(y).items())


def test_a_position_is_sent_once_to_a_rank_of_which_two_pieces_read_it() -> None:
    near = around(BALANCED, BALANCED, 16, 15, 1, 1, SIZE)  # each piece reads all positions before it
    assert _way(near, 0).sent == ((), ((0, 2),), ((0, 2),), ((0, 2),))  # (14 and 15 are read by nobody else)
    assert _way(near, 0).received == (0, 4, 4, 4)
    assert _way(near, 1).received == (2, 0, 4, 4)
    assert near.most_sent() == 12  # rank 3, whose 6 to 9 all others read


def test_beyond_the_ends_are_zeros() -> None:
    near = Near(plain(2, 4), (((-2, 3),), ((1, 6),)))
    assert _way(near, 0).made_of == ((2, 0, 2), (0, 0, 2), (1, 0, 1))
    assert _way(near, 1).made_of == ((1, 0, 1), (0, 0, 2), (2, 0, 2))
