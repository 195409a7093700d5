"""What models write to move positions, as one operator; and what looks like it and is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meshpar.capture.export import capture
from meshpar.graph.run import run
from meshpar.ops.shifts import shifted
from meshpar.passes.shifts import AlignShifts


class _Moved(torch.nn.Module):
    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.move, self.scale = move, torch.nn.Parameter(torch.ones(3, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        return self.move(x * self.scale) * 2


def _written(x: Tensor, into: slice, taken: slice, start: float = 0.0) -> Tensor:
    out = torch.full_like(x, start)
    out[:, into] = x[:, taken]
    return out


def _zeros(x: Tensor, n: int, value: float = 0.0) -> Tensor:
    return torch.full_like(x[:, :n], value)


def _found(move: Callable[[Tensor], Tensor]) -> list[tuple[int, int]]:
    """(dim, by) of the shifts that are found; what is computed stays."""
    x, model = torch.rand(2, 5, 3, dtype=torch.double), _Moved(move)
    captured = capture(model, (x,))
    AlignShifts()(captured.graph)
    captured.graph.lint()
    (got,) = run(captured, {"scale": model.scale}, {"x": x})
    torch.testing.assert_close(got, model(x), rtol=0, atol=0)
    return [(n.kwargs["dim"], n.kwargs["by"]) for n in captured.graph.nodes if n.target is shifted]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("move", "by"),
    [
        (lambda x: F.pad(x, (0, 0, 1, -1)), 1),
        (torch.nn.ZeroPad2d((0, 0, -2, 2)), -2),
        (lambda x: F.pad(x, (0, 0, 2, 0))[:, :-2], 2),
        (lambda x: F.pad(x, (0, 0, 0, 1))[:, 1:], -1),
        (lambda x: F.pad(x, (0, 0, 3, 1))[:, 2:7], 1),
        (lambda x: torch.cat([_zeros(x, 1), x[:, :-1]], 1), 1),
        (lambda x: torch.cat([x.new_zeros(1, 1, 3).expand(2, 2, 3), x[:, :-2]], 1), 2),
        (lambda x: torch.cat([x[:, 1:], torch.zeros(2, 1, 3, dtype=x.dtype)], 1), -1),
        (lambda x: _written(x, slice(1, None), slice(None, -1)), 1),
        (lambda x: _written(x, slice(None, -2), slice(2, None)), -2),
    ],
)
def test_a_shift_is_found(move: Callable[[Tensor], Tensor], by: int) -> None:
    assert _found(move) == [(1, by)]


@pytest.mark.parametrize(
    "move",
    [
        lambda x: F.pad(x, (0, 0, 1, -1), value=1.0),
        lambda x: F.pad(x, (0, 0, 1, 0))[:, :-2],
        lambda x: F.pad(x, (1, -1, 1, -1)),
        lambda x: F.pad(x, (0, 0, -1, 0)),
        lambda x: F.pad(x, (0, 0, 1, 1))[:, 0:6:2],
        lambda x: torch.cat([_zeros(x, 1, 0.5), x[:, :-1]], 1),
        lambda x: torch.cat([_zeros(x, 1), x[:, 1:]], 1),
        lambda x: torch.cat([x[:, :-1], _zeros(x, 1)], 1),
        lambda x: torch.cat([x[:, :1], x[:, :-1]], 1),
        lambda x: _written(x, slice(1, None), slice(1, None)),
        lambda x: _written(x, slice(1, -1), slice(None, -2)),
        lambda x: _written(x, slice(1, None), slice(None, -1), 2.0),
        lambda x: torch.roll(x, 1, 1),
    ],
)
def test_another_move_is_none(move: Callable[[Tensor], Tensor]) -> None:
    assert _found(move) == []
