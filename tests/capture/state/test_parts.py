"""A forward that changes which modules or parameters the model has: refused, since the next step would run without the change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import meshpar as mp
from meshpar.errors import CaptureError
from meshpar.simulate import local_tensors


class Changing(nn.Module):
    """Does something to itself before it computes."""

    def __init__(self, change: Callable[[Changing], None]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head: nn.Module = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.change, self.done = change, False

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            self.done = True
            self.change(self)
        for part in self.parts:
            x = part(x) * self.scale
        return self.head(x).square().mean()


def replaces(net: Changing) -> None:
    net.head = nn.Sequential(net.head, nn.Tanh())


def replaces_one_of_a_list(net: Changing) -> None:
    net.parts[0] = nn.Sequential(net.parts[0], nn.Tanh())


def appends(net: Changing) -> None:
    net.parts.append(nn.Tanh())


def adds(net: Changing) -> None:
    net.head.add_module("more", nn.Tanh())


def takes_out(net: Changing) -> None:
    del net.parts[1]


def new_parameter(net: Changing) -> None:
    net.scale = nn.Parameter(net.scale.detach() * 2)


CHANGES = [replaces, replaces_one_of_a_list, appends, adds, takes_out, new_parameter]


@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_change_in_forward_are_refused(change: Callable[[Changing], None]) -> None:
    with mp.simulate(2), pytest.raises(CaptureError, match=r"The forward (puts a \w+ into|changes the module) (?s:.*)run the model once"):
        mp.parallelize(Changing(change), mp.make_mesh("tp=2"), example=(torch.randn(2, 4),))


@pytest.mark.sweep(4)
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_ran_once_is_exact(change: Callable[[Changing], None]) -> None:
    model = Changing(change)
    model(torch.randn(2, 4))
    assert mp.verify(model, "tp=2", (torch.randn(2, 4),)).ok


def test_putting_back_what_is_there_is_no_change() -> None:
    def same(net: Changing) -> None:
        net.head, net.scale, net.done = net.head, net.scale, False  # type: ignore[method-assign]

    assert mp.verify(Changing(same), "tp=2", (torch.randn(2, 4),)).ok


def test_a_tensor_put_back_in_the_dtype_that_it_has_is_no_change() -> None:
    class Anchored(nn.Module):
        """Keeps tensors in a list, which every forward makes anew."""

        def __init__(self) -> None:
            super().__init__()
            self.head, self.anchors = nn.Linear(4, 4), [torch.arange(4.0)]

        def forward(self, x: Tensor) -> Tensor:
            self.anchors = [anchor.to(x.dtype) for anchor in self.anchors]
            return (self.head(x) * self.anchors[0]).square().mean()

    model = Anchored()
    assert mp.verify(model, "tp=2", (torch.randn(2, 4),)).ok
    with mp.simulate(2):
        mp.parallelize(model, mp.make_mesh("tp=2"), example=(torch.randn(2, 4),))


class Growing(nn.Module):
    """Puts a number into a list that is the one that was there, and is another as soon as somebody makes it small."""

    def __init__(self, second: float | Tensor) -> None:
        super().__init__()
        self.head, self.scales = nn.Linear(4, 4), [1.0, second]

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x) * self.scales[0] * self.scales[1]
        self.scales = [min(2 * self.scales[0], 1.0), self.scales[1]]
        return y.square().mean()


@pytest.mark.parametrize("second", [2.0, torch.ones(4)], ids=["numbers", "a tensor beside it"])
def test_numbers_put_back_in_a_list_are_followed(second: float | Tensor) -> None:
    """Or refused as soon as they are others than before."""
    torch.manual_seed(0)
    model, x = Growing(second), torch.randn(2, 4)
    alone = copy.deepcopy(model)
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=(x,))
        for step in range(5):
            if step == 2:
                pm.scales[0] = alone.scales[0] = 0.25
                if isinstance(second, Tensor):
                    with pytest.raises(CaptureError, match="scales at .*a list with tensors"):
                        pm.train_step(x)
                    return
            assert float(local_tensors(pm.train_step(x))[0]) == pytest.approx(float(alone(x)), rel=1e-5), step


class Listening(nn.Module):
    """Puts a wrapper around the forward of a part for as long as it computes, as libraries do that record what parts return."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        own, heard = self.up.forward, list[Tensor]()

        def listened(x: Tensor) -> Tensor:
            heard.append(own(x))
            return heard[-1]

        self.up.forward = listened  # type: ignore[method-assign]
        try:
            x = self.down(self.up(x).relu())
        finally:
            self.up.forward = own  # type: ignore[method-assign]
        return x.square().mean() + 0.1 * heard[0].square().mean()


def test_a_wrapper_that_is_taken_off_again_is_no_change() -> None:
    batch = {"x": torch.randn(4, 4)}
    mp.verify(Listening(), "tp=2", batch).raise_if_failed()
    with mp.simulate(2):
        pm = mp.parallelize(Listening().double(), mp.make_mesh("tp=2"), example={"x": torch.randn(4, 4).double()})
        for _ in range(2):
            pm.train_step(x=torch.randn(4, 4).double())
        assert "1 graphs captured, 0 made" in pm.explain()
