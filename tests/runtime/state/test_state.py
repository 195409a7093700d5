"""State that a program was captured with: attributes, modes, flags and settings that change between steps act, or are refused by name."""

from __future__ import annotations

import collections
import contextvars
import copy
import gc
import inspect
import itertools
import math
import os
import random
import re
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshpar as mp
from meshpar.capture.state.ambient import TABLE, keyed, place_of
from meshpar.capture.state.places import Place, described
from meshpar.capture.state.surroundings import Surroundings
from meshpar.compile.state.bound import Bound
from meshpar.compile.state.following import Following
from meshpar.compile.state.leaves import describe
from meshpar.simulate import local_tensors
from tests.pool import Pool

WEIGHT = 0.5
X, Y = (torch.linspace(-1, 1, 64, dtype=torch.double).view(8, 8).roll(i, 0) for i in (0, 3))
BATCH = {"x": X, "y": Y}


class Net(nn.Module):
    """Two layers, and a loss that `rule` makes of their output, with the state of this module."""

    def __init__(self, rule: Callable[[Net, Tensor, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.drop, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.0), nn.Linear(8, 8)
        self.rule = rule
        self.__dict__.update(attributes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rule(self, self.b(torch.tanh(self.drop(self.norm(self.a(x))))), y)


def counting(net: Net, h: Tensor, y: Tensor) -> Tensor:
    net.step += 1
    return F.mse_loss(h, y) * (0.1 * net.step)


def every_second(net: Net, h: Tensor, y: Tensor) -> Tensor:
    net.step += 1
    return F.mse_loss(h, y) * (3 if net.step % 2 == 0 else 1)


def annealed(net: Net, h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(h, y) + (net.beta * h.square().mean() if net.beta > 0 else 0)


def cosine(net: Net, h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(h, y) * (1 + 0.5 * math.cos(net.beta))


def by_config(net: Net, h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(h, y) * (net.config_.alpha if net.config_.on else 1) * net.table["w"]


def sized(net: Net, h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(h, y, reduction=net.kind) + h[:, : net.width].sum()


def typed(net: Net, h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(h, y) * (3 if net.flag is True else 2 if isinstance(net.flag, float) else 1)


def around(net: Net, h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(h, y) * WEIGHT * float(os.environ.get("MESHPAR_TEST_STATE", "1")) * (2 if torch.is_grad_enabled() else 1)


def cached(net: Net, h: Tensor, y: Tensor) -> Tensor:
    if h.shape[1] not in net.cache:
        net.cache[h.shape[1]] = torch.arange(h.shape[1], dtype=h.dtype)
    net.seen = h.shape[0]
    return F.mse_loss(h * net.cache[h.shape[1]], y)


def tabled(net: Net, h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(net.act(h), y) * net.scale


def tallied(net: Net, h: Tensor, y: Tensor) -> Tensor:
    """Three counters that are written where no `__setattr__` is asked."""
    net.__dict__["step"] = net.__dict__["step"] + 1
    vars(net.norm)["calls"] = vars(net.norm).get("calls", 0) + 1
    object.__setattr__(net.holder, "n", net.holder.n + 1)
    return F.mse_loss(h, y) * (0.1 * net.step + net.norm.calls + 0.5 * net.holder.n)


def peeked(net: Net, h: Tensor, y: Tensor) -> Tensor:
    """Attributes read where no `__getattribute__` of the model is asked, or all at once."""
    settings = copy.copy(net.holder)
    return F.mse_loss(h, y) * (
        vars(net)["beta"] + settings.n + inspect.getattr_static(net, "gamma") + object.__getattribute__(net, "delta")
    )


LEVEL, LOCAL = contextvars.ContextVar("level", default=1.0), threading.local()
LOCAL.level = 1.0


def opaque(net: Net, h: Tensor, y: Tensor) -> Tensor:
    """Values in objects that show none of them as an attribute."""
    return F.mse_loss(h, y) * (float(net.array[0]) + LEVEL.get() + 10 * LOCAL.level + 100 * net.bytes_[0])


ACT = torch.tanh


class Scaler:
    @staticmethod
    def scale() -> float:
        return 1.0


def called(net: Net, h: Tensor, y: Tensor, weights: list[float] = [1.0]) -> Tensor:  # noqa: B006
    """A function that a name of the file is for, a method of a class, a default that is a list."""
    return F.mse_loss(ACT(h), y) * weights[0] * Scaler.scale() * net.rate()


class Rated(Net):
    def rate(self) -> float:
        return 1.0


def swapped(net: Any, i: int) -> None:
    globals()["ACT"] = [torch.tanh, torch.relu, F.gelu, lambda h: h][i % 4]
    assert called.__defaults__ is not None
    called.__defaults__[0][0] = 1.0 + i // 2
    Scaler.scale = staticmethod(lambda: 1.0 + i // 3)  # type: ignore[method-assign]
    Rated.rate = lambda _: 1.0 + i  # type: ignore[assignment,method-assign]


class Table(dict[str, float]):
    """A dict of the user's own."""


class Pair(NamedTuple):
    a: float
    b: list[float]


def collected(net: Net, h: Tensor, y: Tensor) -> Tensor:
    """Classes that are made from containers."""
    return F.mse_loss(h, y) * net.counter["n"] * net.pair.a * net.pair.b[0] * net.settings["w"]


def recounted(net: Any, i: int) -> None:
    net.counter.update(n=1), net.pair.b.__setitem__(0, 1.0 + i // 2), net.settings.__setitem__("w", 1.0 + i // 3)
    net.pair = net.pair._replace(a=1.0 + i)


@dataclass(frozen=True, slots=True)
class Fixed:
    rate: float = 1.0


class Common:
    scale = 1.0
    only: Any = None

    @classmethod
    def get(cls) -> Any:
        if cls.only is None:
            cls.only = cls()
            cls.only.v = 1.0
        return cls.only


class Special(Common):
    made: Any = None

    def __new__(cls) -> Any:
        if cls.made is None:
            cls.made = super().__new__(cls)
            cls.made.w = 1.0
        return cls.made


def single(net: Net, h: Tensor, y: Tensor) -> Tensor:
    """An object that a class keeps, one that a class always makes, a value of a base class, a frozen object, an optimizer's rate."""
    return F.mse_loss(h, y) * Common.get().v * Special().w * Special.scale * net.fixed.rate * net.optimizer.param_groups[0]["lr"]


def singled() -> Net:
    net = Net(single, fixed=Fixed(), optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    specified(net, 0)
    return net


def specified(net: Any, i: int) -> None:
    Common.get().v, Special().w, Common.scale = 1.0 + i, 1.0 + i // 2, 1.0 + i // 3
    net.fixed, net.optimizer.param_groups[0]["lr"] = Fixed(1.0 + 0.5 * i), 1.0 + 2 * i


RATE = [1.0]


class Factor:
    def __init__(self) -> None:
        self.k = 1.0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.k

    def again(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + self.k


def hooked() -> Net:
    """Forward hooks that are functions, objects and methods of objects."""
    net = Net(annealed, beta=0.0, hook=Factor(), other=Factor())
    net.b.register_forward_hook(net.hook)
    net.b.register_forward_hook(net.other.again)
    net.b.register_forward_hook(lambda module, args, output: output * RATE[0])
    rehooked(net, 0)
    return net


def rehooked(net: Any, i: int) -> None:
    net.hook.k, net.other.k, RATE[0] = 1.0 + i, 1.0 + i // 2, 1.0 + i // 3


def closed() -> Net:
    net = Net(opaque, array=np.array([1.0]), bytes_=bytearray(b"\1"))
    opened(net, 0)
    return net


def opened(net: Any, i: int) -> None:
    net.array[0], net.bytes_[0] = 1.0 + i // 2, 1 + i // 3
    LEVEL.set(1.0 + i // 2), setattr(LOCAL, "level", 1.0 + i // 3)


class Holder:
    """An object of the user's own."""


def held(**attributes: Any) -> Holder:
    found = Holder()
    found.__dict__.update(attributes)
    return found


def set_(**values: Any) -> Callable[[Any, int], None]:
    """Sets attributes of a model to the i-th of their values."""

    def change(net: Any, i: int) -> None:
        for name, given in values.items():
            setattr(net, name, given[i % len(given)])

    return change


def configured(net: Any, i: int) -> None:
    net.config_.alpha, net.config_.on, net.table["w"] = 1 + 0.5 * i, i != 1, 1.0 + i


def surrounded(net: Any, i: int) -> None:
    globals()["WEIGHT"] = 0.5 + i
    os.environ["MESHPAR_TEST_STATE"] = str(1 + i)


def overwritten(net: Any, i: int) -> None:
    net.act = [F.relu, torch.tanh][i % 2]
    net.scale.add_(1)


def parts(net: Any, i: int) -> None:
    net.train()
    net.drop.p = 0.0
    if i:
        net.get_submodule("norm").eval()
        net.get_submodule("norm").momentum = 0.1 * i


def config() -> dict[str, Any]:
    return {"config_": types.SimpleNamespace(alpha=1.0, on=True), "table": {"w": 1.0}}


MEMBERS: dict[str, tuple[Callable[[], Net], Callable[[Any, int], None] | None, int]] = {
    "a counter": (lambda: Net(counting, step=0), None, 2),
    "a counter that decides": (lambda: Net(every_second, step=0), None, 3),
    "a weight": (lambda: Net(annealed, beta=0.0), set_(beta=(0.0, 0.5, 1.0, 1.5)), 2),
    "a schedule": (lambda: Net(cosine, beta=0.0), set_(beta=(0.0, 0.5, 1.0, 1.5)), 2),
    "a configuration": (lambda: Net(by_config, **config()), configured, 4),
    "a size and a word": (lambda: Net(sized, width=2, kind="mean"), set_(width=(2, 3), kind=("mean", "sum")), 2),
    "True, 1 and 1.0": (lambda: Net(typed, flag=1), set_(flag=(1, True, 1.0)), 3),
    "globals and the environment": (lambda: Net(around), surrounded, 5),
    "a cache that is made again": (lambda: Net(cached, cache={}, seen=0), None, 1),
    "a function and a tensor": (lambda: Net(tabled, act=F.relu, scale=torch.tensor(1.0).double()), overwritten, 5),
    "written past __setattr__": (lambda: Net(tallied, step=0, holder=held(n=0)), None, 2),
    "read past __getattribute__": (
        lambda: Net(peeked, beta=1.0, gamma=1.0, delta=1.0, holder=held(n=1.0)),
        set_(beta=(1.0, 2.0), gamma=(1.0, 2.0, 3.0), delta=(1.0, 1.0, 5.0), **{"holder": [held(n=1.0), held(n=2.0)]}),
        3,
    ),
    "arrays and variables of a context": (closed, opened, 3),
    "functions": (lambda: Rated(called), swapped, 5),
    "classes made from containers": (
        lambda: Net(collected, counter=collections.Counter(n=1), pair=Pair(1.0, [1.0]), settings=Table(w=1.0)),
        recounted,
        5,
    ),
    "what classes keep": (singled, specified, 4),
    "forward hooks": (hooked, rehooked, 4),
    "modes of parts": (lambda: Net(annealed, beta=0.0), parts, 4),
}


def steps(
    pm: Any, one: nn.Module, change: Callable[[], None] = lambda: None, *, count: int = 1, batch: Any = BATCH, alone: Any = BATCH
) -> float:
    """The largest difference of losses and gradients from those of the model on one device."""
    worst, original = 0.0, dict(one.named_parameters())
    for _ in range(count):
        change()
        pm.zero_grad(), one.zero_grad()
        loss, right = pm.train_step(**batch), one(**alone)
        right.backward()
        worst = max([worst, *(abs(part.item() - right.item()) for part in local_tensors(loss).values())])
        for name, parameter in pm.named_parameters():
            ours, theirs = mp.full_grad(parameter), original[name].grad
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                worst = max([worst, *(float((part - theirs).abs().max()) for part in local_tensors(ours).values())])
    return worst


ORIGINAL = ("a weight", "a configuration", "a function and a tensor")
PLACES = (
    [(name, "the model") for name in MEMBERS]
    + [(name, "pm") for name in [*MEMBERS][::2]]
    + [(name, "pm.original_module") for name in ORIGINAL]
)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("name", "where"), PLACES)
def test_what_changes_between_steps_acts(name: str, where: str) -> None:
    build, change, captures = MEMBERS[name]
    if (where != "the model" and (change is None or change in (surrounded, swapped))) or (where == "the model" and change is parts):
        pytest.skip("nobody sets it there")
    model, one = build().double(), build().double()
    moment = itertools.count()
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=BATCH)
        target = {"the model": model, "pm": pm, "pm.original_module": pm.original_module}[where]

        def both() -> None:
            i = next(moment)
            if change is not None:
                change(target, i)
                if change is not surrounded:
                    change(one, i)

        assert steps(pm, one, both, count=4) < 1e-13
        assert len(pm._variants.programs()) == captures, "what only enters arithmetic is captured once more, and no more"
        if name == "a counter":
            assert pm.step == one.step == 4 and model.step == 0
            with pytest.raises(mp.MeshparError):
                pm.train_step(x=X, y=Y[:, :3].expand(8, 3)[:5])
            assert pm.step == 4, "a step that failed leaves nothing behind"
            twin, other = copy.deepcopy(pm), copy.deepcopy(one)
            pm.load_state_dict(pm.state_dict())
            assert steps(twin, other, count=2) < 1e-13 and steps(pm, one) < 1e-13 and (twin.step, pm.step) == (6, 5)


def remembering(net: Net, h: Tensor, y: Tensor) -> Tensor:
    loss = F.mse_loss(h, y)
    net.mean = 0.9 * net.mean + 0.1 * loss.detach()
    return loss * net.mean


def remembering_quietly(net: Net, h: Tensor, y: Tensor) -> Tensor:
    if "mean" in net.__dict__:
        h = h + net.__dict__["mean"]
    net.__dict__["mean"] = h.detach()
    return F.mse_loss(h, y)


def counting_in_a_tensor(net: Net, h: Tensor, y: Tensor) -> Tensor:
    net.count = net.count + 1
    return F.mse_loss(h, y) * net.count


def counting_in_a_tuple(net: Net, h: Tensor, y: Tensor) -> Tensor:
    net.counts = (net.counts[0], net.counts[1] * 2)
    return F.mse_loss(h, y) * net.counts[1]


def collecting(net: Net, h: Tensor, y: Tensor) -> Tensor:
    net.losses.append(F.mse_loss(h, y))
    return net.losses[-1]


def drawing(net: Net, h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(h, y) * random.random()


def drawing_from(net: Net, h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(h, y) * torch.rand((), generator=net.generator)


def filling(net: Net, h: Tensor, y: Tensor) -> Tensor:
    net.array[0] += 1
    return F.mse_loss(h, y) * float(net.array[0])


def setting(net: Net, h: Tensor, y: Tensor) -> Tensor:
    LOCAL.level += 1
    return F.mse_loss(h, y) * LOCAL.level


def iterating(net: Net, h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(h, y) * next(net.numbers)


@pytest.mark.parametrize(
    ("rule", "attributes", "said"),
    [
        (remembering, {"mean": 1.0}, r"mean at test_state.py.*register_buffer"),
        (remembering_quietly, {}, r"mean past __setattr__: forward reads it and puts a tensor there.*register_buffer"),
        (counting_in_a_tensor, {"count": torch.tensor(0)}, r"count at test_state.py.*forward reads it and puts a tensor there"),
        (counting_in_a_tuple, {"counts": (1, torch.tensor(1))}, r"counts at test_state.py.*puts a tuple with tensors or objects there"),
        (collecting, {"losses": []}, "losses, a list: forward changes what is in it"),
        (drawing, {}, "draws from random"),
        (drawing_from, {"generator": torch.Generator()}, "draws with a torch.Generator at test_state.py"),
        (filling, {"array": np.array([1.0])}, "array: it changes while forward runs"),
        (setting, {}, "LOCAL of test_state.py: it changes while forward runs"),
        (iterating, {"numbers": itertools.count()}, "numbers, an iterator"),
    ],
)
def test_what_a_graph_does_not_carry_over_is_refused(rule: Any, attributes: dict[str, Any], said: str) -> None:
    model = Net(rule, **attributes).double()
    with mp.simulate(2), pytest.raises(mp.CaptureError, match=said):
        mp.parallelize(model, mp.make_mesh("tp=2"), example=BATCH)
    assert attributes.get("losses", []) == [], "a capture changes nothing"


def keeping(net: Net, h: Tensor, y: Tensor) -> Tensor:
    print("seen")
    assert Path(__file__).read_text()
    net.hidden = h
    return F.mse_loss(net.hidden, y)


def test_what_only_happens_at_capture_is_said(capsys: Any) -> None:
    with mp.simulate(2):
        with pytest.warns(
            UserWarning, match=r"(?s)prints at test_state.py.*opens a file at test_state.py.*puts a tensor into hidden at test_state.py"
        ):
            pm = mp.parallelize(Net(keeping).double(), mp.make_mesh("tp=2"), example=BATCH)
        pm.train_step(**BATCH)
        with pytest.raises(AttributeError, match="return it from forward"):
            pm.hidden  # noqa: B018


def mean_of_squares(net: Net, h: Tensor, y: Tensor) -> Tensor:
    net.aux = h.square().mean()
    return h


def test_losses_read_what_changes_and_not_the_model() -> None:
    weight, box = 1.0, {"w": 1.0}
    model, one = Net(lambda net, h, y: h).double(), Net(lambda net, h, y: h).double()

    def loss_fn(output: Tensor, batch: Any) -> Tensor:
        return output.square().mean() * weight * box["w"]

    with mp.simulate(2):
        mesh = mp.make_mesh("tp=2")
        pm = mp.parallelize(model, mesh, example=BATCH, loss_fn=loss_fn)
        for i in range(3):
            weight, box["w"] = 1.0 + i, 0.5 * i
            right = loss_fn(one(**BATCH), None).item()
            assert all(abs(part.item() - right) < 1e-14 for part in local_tensors(pm.train_step(**BATCH)).values())
        assert len(pm._variants.programs()) == 3, "one number, then both"
        kept = Net(mean_of_squares, aux=0.0).double()
        for reads in (lambda output, batch: output.mean() + kept.aux, lambda output, batch: output.mean() + kept.a.weight.sum()):
            with pytest.raises(mp.CaptureError, match="of the model itself is read at test_state.py"):
                mp.parallelize(kept, mesh, example=BATCH, loss_fn=reads)


class Labelled(nn.Module):
    """A mean over valid labels, of which microbatches have different numbers, times a counter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.step = nn.Linear(8, 8), 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.step += 1
        valid = (y >= 0).sum()
        return F.cross_entropy(self.a(x), y) * self.step + 0.5 / self.step * F.cross_entropy(self.a(x), y, reduction="sum") / valid


def test_a_counter_counts_steps_and_leaves_denominators_alone() -> None:
    model, one = Labelled().double(), Labelled().double()
    batch = {"x": X, "y": torch.tensor([1, -100, 2, -100, 3, 4, 5, 6])}
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch, config=mp.ParallelConfig(microbatches=2))
        assert max(steps(pm, one, batch=batch, alone=batch) for _ in range(3)) < 1e-13
        assert pm.step == 3 and len(pm._variants.programs()) == 2


def test_requires_grad_may_change() -> None:
    model, one = (Net(annealed, beta=0.5).double() for _ in range(2))
    model.a.requires_grad_(False), one.a.requires_grad_(False)
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=BATCH)
        assert steps(pm, one) < 1e-13
        for flags in ({"a.weight": True}, {"b.weight": False, "b.bias": False}, {"a.weight": False, "b.weight": True, "b.bias": True}):
            for net in (pm, one):
                for name, parameter in net.named_parameters():
                    parameter.requires_grad_(flags.get(name, parameter.requires_grad))
            assert steps(pm, one) < 1e-13
        assert len(pm._variants.programs()) == 3, "the last flags are the first"


def test_parameters_and_modules_stay() -> None:
    with mp.simulate(2):
        pm = mp.parallelize(Net(annealed, beta=0.5).double(), mp.make_mesh("tp=2"), example=BATCH)
        with pytest.raises(mp.ConfigError, match="a of a parallel model cannot be replaced"):
            pm.a = nn.Linear(8, 8)
        with pytest.raises(mp.ConfigError, match="weight: a parallel model takes no other parameters"):
            pm.get_submodule("a").weight = nn.Parameter(torch.zeros(8, 8))
        pm.get_submodule("a")._parameters["weight"] = nn.Parameter(torch.zeros(8, 8))
        with pytest.raises(mp.ConfigError, match=r"a\.weight: parameters of a parallel model cannot be replaced"):
            pm.train_step(**BATCH)
        pm = mp.parallelize(Net(annealed, beta=0.5).double(), mp.make_mesh("tp=2"), example=BATCH)
        with pytest.raises(mp.ConfigError, match="extra of a parallel model cannot be replaced"):
            pm.get_submodule("a").extra = nn.Linear(2, 2)
        dict.__setitem__(pm.get_submodule("a")._modules, "extra", nn.Linear(2, 2))
        with pytest.raises(mp.ConfigError, match="replaced, added or removed"):
            pm.train_step(**BATCH)
        model = Net(annealed, beta=0.5).double()
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=BATCH)
        model.beta, pm.beta = 1.0, 2.0
        with pytest.raises(mp.ConfigError, match=r"beta is 1\.0 there and 2\.0 here"):
            pm.train_step(**BATCH)


def deeper(net: Net, h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(net.inner(h), y)


@pytest.mark.sweep(4)
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda net: setattr(net, "b", nn.Linear(8, 8).double()), "b"),
        (lambda net: setattr(net.inner, "0", nn.ReLU()), "inner.0"),
        (lambda net: net.inner.append(nn.ReLU()), "inner.1"),
        (lambda net: delattr(net, "drop"), "drop"),
        (lambda net: setattr(net, "late", nn.ReLU()), "late"),
    ],
)
def test_modules_of_the_model_given_stay_too(change: Callable[[Any], Any], name: str) -> None:
    model = Net(deeper).double()
    model.inner = nn.Sequential(nn.Tanh())
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=BATCH)
        pm.train_step(**BATCH)
        change(model)
        for one in (pm, copy.deepcopy(pm)):
            with pytest.raises(mp.ConfigError, match=rf"^{name} of the model given to parallelize: replaced, added or removed since"):
                one.train_step(**BATCH)


def test_values_of_a_class_are_those_of_the_base_that_has_them_until_a_nearer_one_does() -> None:
    class Base:
        rate = 1.0

    class Derived(Base):
        pass

    bound = Bound({Place("Derived", (("attr", "rate"),)): 1.0}, {}, {"Derived": Derived})
    assert bound.holds() and bound.holds()  # the second time by identity
    Derived.rate = 2.0
    assert not bound.holds()
    del Derived.rate
    assert bound.holds() and bound.holds()
    Base.rate = 3.0
    assert not bound.holds()


def test_classes_of_one_name_are_two_roots_however_often_they_are_met() -> None:
    def made() -> Any:
        class Settings:
            rate = 1.0

            @classmethod
            def get(cls) -> float:
                return cls.rate

            @classmethod
            def twice(cls) -> float:
                return cls.get() + cls.get() + cls.rate

        return Settings

    first, second, roots, read = made(), made(), dict[str, Any](), dict[Place, Any]()
    surroundings = Surroundings(read.__setitem__, roots)
    for _ in range(3):
        surroundings.walk(lambda: (first.twice(), second.twice(), first.rate))
    classes = [root for root in roots.values() if isinstance(root, type)]
    assert classes.count(first) == classes.count(second) == 1
    assert {place.owner(roots) for place in read if place.steps[-1][1] == "rate"} == {first, second}


def trained(net: Any) -> None:
    net(X, Y).backward()
    torch.optim.SGD(net.parameters(), 0.1).step()


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda net: net.norm.eval(), r"changed \(norm.eval\(\)\), the parallel model was not"),
        (lambda net: net.eval(), r"the model.eval\(\), a.eval\(\), norm.eval\(\), and 2 more"),
        (lambda net: net.load_state_dict(net.state_dict()), "a.weight overwritten, a.bias overwritten"),
        (lambda net: net.norm.running_mean.zero_(), "norm.running_mean overwritten"),
        (lambda net: setattr(net.a, "bias", nn.Parameter(net.a.bias * 2)), "a.bias replaced"),
        (lambda net: net.b.requires_grad_(False), "b.weight requires_grad=False"),
        (lambda net: None, ""),
        (trained, ""),  # beside the parallel one
        (lambda net: net.to("meta"), ""),  # to make room
    ],
)
def test_what_is_the_parallel_models_own_is_not_changed_elsewhere_in_silence(change: Callable[[Any], Any], said: str) -> None:
    model = Net(annealed, beta=0.0).double()
    with mp.simulate(2), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=BATCH)
        pm.train_step(**BATCH)
        found.clear()
        change(model)
        for _ in range(3):  # (said once)
            pm.train_step(**BATCH)
    told = [str(one.message) for one in found if "given to parallelize" in str(one.message)]
    assert len(told) == bool(said) and all(re.search(said, one) for one in told)


def test_following_keeps_nothing_alive() -> None:
    model = Net(deeper)
    following, part = Following(model, copy.deepcopy(model)), weakref.ref(model.a)
    del model
    gc.collect()
    assert part() is None and following.follow() is None


def test_captures_again_and_again_are_said() -> None:
    with mp.simulate(2), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pm = mp.parallelize(Net(sized, width=1, kind="mean").double(), mp.make_mesh("tp=2"), example=BATCH)
        for i in range(9):
            pm.width = 1 + i
            pm.train_step(**BATCH)
    assert [str(w.message) for w in said if "captured 8 times more because width changed" in str(w.message)]
    assert len(pm._variants.programs()) == 8


def test_leaves_of_a_batch_are_told_apart() -> None:
    values = [True, 1, 1.0, 0.0, -0.0, math.nan, None, "1", torch.zeros(2), torch.zeros(2, dtype=torch.double), torch.zeros(4)[::2]]
    values += [torch.zeros(2, requires_grad=True), torch.zeros(2, dtype=torch.cfloat), torch.zeros(2, dtype=torch.cfloat).conj()]
    keys = [describe(value) for value in values]
    assert len(set(keys)) == len(values) and keys == [describe(copy.copy(value)) for value in values]
    with pytest.raises(mp.BatchError, match="an object of type SimpleNamespace"):
        describe(types.SimpleNamespace(a=1))


def _default_dtype() -> Any:
    return torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)


def _entered(context: Any) -> Any:
    context.__enter__()
    return None, lambda: context.__exit__(None, None, None)


def _deterministic() -> Any:
    return torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)


def _precision() -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    return None, lambda: torch.set_float32_matmul_precision(before)


CHANGES: dict[str, Callable[[], Any]] = {
    "default dtype": _default_dtype,
    "default device": lambda: _entered(torch.device("meta")),
    "autocast": lambda: _entered(torch.autocast("cpu", torch.bfloat16)),
    "deterministic algorithms": _deterministic,
    "float32 matmul precision": _precision,
    "grad mode": lambda: _entered(torch.no_grad()),
    "transforms of torch.func": lambda: None,
    "TorchFunctionMode, TorchDispatchMode": lambda: None,
}


def test_every_row_of_the_list_is_read() -> None:
    read = {row.what: row for row in TABLE if row.read is not None}
    assert set(read) == set(CHANGES) and len({row.what for row in TABLE}) == len(TABLE) and all(row.why for row in TABLE)
    for what, change in CHANGES.items():
        before = read[what].read()
        if (changed := change()) is None:
            assert not before
            continue
        try:
            assert read[what].read() != before, what
            assert (place_of(what) in keyed()) == (read[what].done == "key") and described(before)
        finally:
            changed[1]()
        assert read[what].read() == before


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_settings_of_torch_around_a_step() -> None:
    model, one = (Net(annealed, beta=0.5) for _ in range(2))
    batch = {name: value.float() for name, value in BATCH.items()}
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch)
        losses = []
        for enabled in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                ours, right = pm.train_step(**batch), one(**batch)
            losses.append(right.item())
            assert all(abs(part.item() - right.item()) < (1e-3 if enabled else 1e-6) for part in local_tensors(ours).values())
        assert len(pm._variants.programs()) == 2 and losses[0] != losses[1]
        with pytest.raises(mp.ConfigError, match=r"does not run inside of torch\.func"):
            torch.vmap(lambda x: pm.eval_step(x=x, y=batch["y"]))(torch.stack([batch["x"]] * 2))
        with Mode(), pytest.warns(UserWarning, match="Mode around a step"):
            pm.train_step(**batch)


# ---- ranks -----------------------------------------------------------------------------------------------------------------------------


def on_ranks(spec: str, microbatches: int) -> tuple[float, str, str]:
    """The largest difference in 3 steps with a counter and a weight; what a rank is told whose weight alone differs; about its flags."""
    model, one = (Chain().double() for _ in range(2))
    mesh = mp.make_mesh(spec)
    local = mp.local_batch(BATCH, mesh)
    pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(microbatches=microbatches))
    moment = itertools.count()

    def change() -> None:
        pm.beta = one.beta = 0.5 * next(moment)

    worst = steps(pm, one, change, count=3, batch=local)
    assert pm.step == 3
    told = []
    for act in (lambda: setattr(pm, "beta", 2.0 + (mesh.get_rank() == 1)), lambda: pm.requires_grad_(False)):
        act()
        try:
            pm.train_step(**local)
        except mp.MeshparError as error:
            told.append(f"{type(error).__name__}: {error}")
    return worst, *told  # type: ignore[return-value]


class Chain(nn.Module):
    """Four layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.step, self.beta = 0, 0.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.step += 1
        for layer in self.layers:
            x = torch.tanh(layer(x)) * (1 + self.beta)
        return F.mse_loss(x, y) * (0.1 * self.step)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("spec", "microbatches"), [("dp=2,tp=2", 1), ("pp=2,tp=2", 2)])
def test_ranks_change_together_or_are_told(gloo: Pool, spec: str, microbatches: int) -> None:
    for worst, numbers, flags in gloo.run(on_ranks, spec, microbatches, world=4, timeout=300):
        assert worst < 1e-13
        said = "numbers that forward reads differ between ranks: beta"
        assert f"{said} (2.0 on this rank). Set" in numbers or f"{said} (3.0 on this rank). Set" in numbers
        assert "was changed after parallelize" in flags
