"""Microbatches of one sample: a graph of one shows nothing of samples that meet; that is looked for in a graph of several."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import meshpar as mp
from meshpar.compile import programs

Call = Callable[[Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.up, self.norm, self.down, self.call = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4), call

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(self.down(self.call(self.up(x))), y)


class Normed(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.up(x).unsqueeze(-1).expand(-1, -1, 3)
        return torch.nn.functional.mse_loss(self.down(self.norm(h).mean(-1)), y)


def last_written(h: Tensor) -> Tensor:
    h = h.clone()
    h[-1] = 1.0
    return h


def one_alone(h: Tensor) -> Tensor:
    assert len(h) == 1, "one at a time"
    return h


MIXING: dict[str, Call] = {
    "mean": lambda h: h - h.mean(0),
    "pairs": lambda h: (h @ h.t()).softmax(-1) @ h,
    "first": lambda h: h + h[0],
    "written": last_written,
    "next": lambda h: h + h.roll(1, 0),
}
ALONE: dict[str, Call] = {"elementwise": torch.relu, "its own mean": lambda h: h - h.mean(1, keepdim=True), "one": one_alone}


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Of each capture, the number of microbatches that it was made for."""
    made, real = list[int](), programs.capture
    monkeypatch.setattr(programs, "capture", lambda *args, **kwargs: (made.append(kwargs["divide"]), real(*args, **kwargs))[1])
    yield made


def batch(samples: int) -> dict[str, Tensor]:
    return {"x": torch.randn(samples, 6), "y": torch.randn(samples, 4)}


def told(net: nn.Module, samples: int, microbatches: int, axes: str = "tp=2") -> list[str]:
    """What parallelize says of samples that meet."""
    with mp.simulate(2), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mp.parallelize(net, mp.make_mesh(axes), example=batch(samples), config=mp.ParallelConfig(microbatches=microbatches))
    return [str(one.message).partition("whole batch: ")[2] for one in said if "the samples of a microbatch" in str(one.message)]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("microbatches", [3, 4])
def test_samples_that_meet_are_told_of(name: str, microbatches: int) -> None:
    assert len(told(Net(MIXING[name]), microbatches, microbatches)) == 1


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", ALONE)
def test_nothing_is_told_where_none_meet(name: str) -> None:
    assert told(Net(ALONE[name]), 4, 4) == []


def test_terms_that_are_no_sum_over_samples_are_told_of() -> None:
    class Root(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.nn.functional.mse_loss(self.down(self.up(x)), y).sqrt()

    with mp.simulate(2), pytest.warns(UserWarning, match="the mean of those of the microbatches"):
        mp.parallelize(Root(torch.relu), mp.make_mesh("tp=2"), example=batch(4), config=mp.ParallelConfig(microbatches=4))


def test_statistics_are_named_once() -> None:
    assert told(Normed(torch.relu), 4, 4) == ["norm."]


def test_one_capture_more_and_only_of_one_sample(captures: list[int]) -> None:
    told(Net(torch.relu), 8, 4)
    assert captures == [4], "two samples in each"
    told(Net(torch.relu), 4, 4, "dp=2")
    assert captures == [4, 4], "one of each rank"
    told(Net(torch.relu), 9, 9)
    assert captures == [4, 4, 9, 3]


def test_later_shapes_look_no_more(captures: list[int]) -> None:
    class Any(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.nn.functional.mse_loss(self.down(self.up(x)).mean(1), y)

    with mp.simulate(2):
        first = {"x": torch.randn(4, 5, 6), "y": torch.randn(4, 4)}
        pm = mp.parallelize(Any(torch.relu), mp.make_mesh("tp=2"), example=first, config=mp.ParallelConfig(microbatches=4))
        for length in (7, 9, 11):
            pm.train_step(x=torch.randn(4, length, 6), y=torch.randn(4, 4))
    assert captures == [4, 2, 4], "the second shape of a kind is captured, what samples do is known"


def test_an_attribute_that_changes_is_looked_at(captures: list[int]) -> None:
    class Switched(Net):
        mixes = False

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = self.up(x)
            return torch.nn.functional.mse_loss(self.down(h - h.mean(0) if self.mixes else h), y)

    with mp.simulate(2):
        pm = mp.parallelize(Switched(torch.relu), mp.make_mesh("tp=2"), example=batch(4), config=mp.ParallelConfig(microbatches=4))
        pm.train_step(**batch(4))
        pm.mixes = True
        with pytest.warns(UserWarning, match="the samples of a microbatch, not of the whole batch: the model"):
            pm.train_step(**batch(4))
    assert captures == [4, 2, 4, 2]
