"""Operators that are written out say the same, and no longer where values lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import meshpar as mp
from meshpar.capture.decompositions import as_strided
from meshpar.capture.export import capture
from meshpar.errors import CaptureError
from tests.capture.models import assert_same

aten = torch.ops.aten

STRIDED: list[tuple[Callable[[], Tensor], tuple[int, ...], tuple[int, ...], int | None, bool]] = [
    (lambda: torch.randn(3, 12, 4), (3, 5, 4, 4), (48, 8, 4, 1), None, True),  # windows of 4 rows, every 2
    (lambda: torch.randn(3, 12, 4), (3, 2, 4, 4), (48, 8, 4, 1), None, True),  # not all of them
    (lambda: torch.randn(3, 4, 12).transpose(1, 2), (3, 5, 4, 3), (48, 2, 12, 1), None, False),
    (lambda: torch.randn(4, 3, 5).permute(2, 0, 1), (5, 4, 3), (1, 15, 5), None, True),
    (lambda: torch.randn(6, 1, 4), (6, 1, 2, 1), (4, 77, 2, 9), None, True),  # dims of one element lie anywhere
    (lambda: torch.randn(6, 4), (3, 2), (8, 1), None, True),
    (lambda: torch.randn(6, 4), (5, 4), (3, 2), None, False),  # across rows
    (lambda: torch.randn(6, 4), (3, 3), (1, 1), 2, False),
    (lambda: torch.randn(6, 4)[2:], (2, 3), (4, 1), None, True),
    (lambda: torch.randn(6, 4)[2:], (2, 3), (4, 1), 12, False),
    (lambda: torch.randn(6, 4), (2, 3, 4), (0, 4, 1), None, False),  # repeated
    (lambda: torch.randn(6, 4), (), (), 5, False),
    (lambda: torch.randn(6, 4), (0, 3), (4, 1), None, False),
]


@pytest.mark.parametrize("make, size, stride, offset, sliced", STRIDED)
def test_as_strided(make: Callable[[], Tensor], size: tuple[int, ...], stride: tuple[int, ...], offset: int | None, sliced: bool) -> None:
    x = make()
    wanted = x.as_strided(size, stride, offset)
    assert torch.equal(as_strided(x, size, stride, offset), wanted)
    if sliced:
        assert "index" not in _called(lambda: as_strided(x, size, stride, offset))


def _called(function: Callable[[], Tensor]) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return " ".join(event.key for event in profile.key_averages())


def test_gaps_are_refused() -> None:
    with pytest.raises(CaptureError, match="does not fill its memory"):
        as_strided(torch.randn(6, 4)[:, :2], (2, 2), (4, 1))


class Windows(nn.Module):
    """Overlapping windows of what a linear layer makes, by heads that lie inside positions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, _ = x.shape
        heads = self.up(x).view(samples, length, 4, 4).transpose(1, 2)  # [n, 4, l, 4]
        strides = (heads.stride(0), heads.stride(1), heads.stride(2) * 2, heads.stride(2), 1)
        windows = heads.as_strided((samples, 4, length // 2 - 1, 4, 4), strides)
        return self.down(windows.tanh().sum(3).transpose(1, 2).reshape(samples, -1, 16)).pow(2).mean()


def test_windows_in_a_model() -> None:
    captured = assert_same(Windows().double(), (torch.randn(2, 8, 8, dtype=torch.double),), {}, loss=lambda output: output)
    assert not any(node.target is aten.as_strided.default for node in captured.graph.nodes)


def test_windows_over_a_mesh() -> None:
    report = mp.verify(Windows(), "dp=2,tp=2", {"x": torch.randn(4, 8, 8)})
    assert report.ok, report


def test_writing_through_as_strided_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y.as_strided((2,), (3,)).add_(1)
            return y.sum()

    with pytest.raises(CaptureError, match="writes through as_strided"):
        capture(Model(), (torch.randn(2, 3),))


class Balanced(nn.Module):
    """A router whose loss counts how often every expert was chosen; counts of integers, or of what the choices weigh."""

    def __init__(self, weighted: bool) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Embedding(16, 8), nn.Linear(8, 5), nn.Linear(8, 16)
        self.weighted = weighted

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        scores = self.router(x).softmax(-1)
        weights, chosen = scores.topk(2, -1)
        if self.weighted:
            load = chosen.flatten().bincount(weights.detach().flatten(), minlength=5)
        else:
            load = torch.bincount(chosen.flatten(), minlength=5)
        return nn.functional.cross_entropy(self.head(x).transpose(1, 2), labels) + (load * scores.mean((0, 1))).sum()


@pytest.mark.parametrize("weighted", [False, True])
def test_counts_of_a_known_number_of_kinds(weighted: bool) -> None:
    torch.manual_seed(0)
    model = Balanced(weighted).double()
    batch = {"ids": torch.randint(16, (4, 6)), "labels": torch.randint(16, (4, 6))}
    mp.verify(model, "dp=2,tp=2", batch).raise_if_failed()


def test_counts_of_more_kinds_than_were_said() -> None:
    class Counts(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.bincount(ids.flatten(), minlength=5) * 2

    ids = torch.tensor([[0, 4], [3, 3]])
    with mp.simulate(2):
        pm = mp.parallelize(Counts(), mp.make_mesh("dp=2"), example=(ids,))
        with pytest.raises(mp.BatchError, match="minlength=5"):
            pm(ids + 1)
