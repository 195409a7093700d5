"""Structures: what is a loss, what is kept, what is dropped; and stand-ins without memory."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from meshpar._torch import FakeTensorMode
from meshpar.capture import structure
from meshpar.capture.fake import fake_of, faked

ONE, MANY = torch.tensor(1.0), torch.ones(3)


@pytest.mark.parametrize(
    ("output", "loss"),
    [
        (ONE, ONE),
        (MANY, None),
        (torch.tensor(1), None),
        ({"loss": ONE}, ONE),
        ({"loss": MANY}, None),
        ({"logits": ONE}, None),
        (SimpleNamespace(loss=ONE), ONE),
        ((MANY, ONE), ONE),
        ([ONE, MANY], ONE),
        ((ONE, ONE.clone()), None),
        ("text", None),
    ],
)
def test_find_loss(output: Any, loss: Tensor | None) -> None:
    assert structure.find_loss(output) is loss


class Table(Mapping[str, Any]):
    def __init__(self, items: Mapping[str, Any]) -> None:
        self.items_ = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


@dataclasses.dataclass
class Pair:
    first: Any
    second: Any = None


def test_known_structures_come_back_as_they_were() -> None:
    value = OrderedDict(a=[1, "x", None], b=Pair(ONE, (MANY,)), c=Table({"k": ONE}), d=Pair)
    leaves, spec, dropped = structure.flatten(value)
    back = pytree.tree_unflatten(leaves, spec)
    assert type(back) is OrderedDict and back["a"] == [1, "x", None] and back["b"] == Pair(ONE, (MANY,))
    assert isinstance(back["c"], Table) and back["c"]["k"] is ONE
    assert back["d"] is None and dropped == ("['d']: type",)


def test_stand_ins_keep_ties_strides_and_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model[0].weight.data = model[0].weight.data.t()
    before = {name: id(tensor) for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    mode = FakeTensorMode()
    with pytest.raises(RuntimeError, match="on purpose"), faked(model, torch.device("cpu"), mode) as names:
        assert model[0].weight is model[1].weight and model[0].weight.stride() == (1, 4)
        assert names[id(model[1].weight)] == "0.weight" and names[id(model[2].running_mean)] == "2.running_mean"
        model.extra = 1  # type: ignore[assignment]
        model[2].running_mean = torch.zeros(4)
        raise RuntimeError("on purpose")
    after = {name: id(tensor) for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    assert after == before and not hasattr(model, "extra")


def test_a_stand_in_may_have_another_shape() -> None:
    fake = fake_of(torch.ones(2, 3, requires_grad=True), torch.device("cpu"), FakeTensorMode(), shape=(8, 3))
    assert (tuple(fake.shape), fake.requires_grad, type(fake).__name__) == ((8, 3), True, "FakeTensor")
