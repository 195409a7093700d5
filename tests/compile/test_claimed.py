"""Rules of `add_rule` against their operators: what holds is used and exact, what does not is refused with the typing that shows it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshpar as mp
from meshpar.compile import claimed
from meshpar.errors import PlanError
from meshpar.graph.operators import OPERATORS, add_rule

Backward = Callable[[Any, Tensor], Any]


ONE, TWO = "(Tensor x) -> Tensor", "(Tensor x, Tensor y) -> Tensor"


def operator(name: str, forward: Callable[..., Tensor], backward: Backward, schema: str) -> None:
    made = torch.library.custom_op(f"claimed::{name}", forward, mutates_args=(), schema=schema)
    made.register_fake(forward)
    made.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def rows(x: Tensor, n: Tensor) -> Tensor:
    return x * n[:, None]


def far(x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and type(x) is Tensor and not bool((x.detach() > 1e6).all()):
        raise ValueError("wants large numbers")
    return x.clone()


operator("unit", lambda x: x * 2, lambda ctx, g: g / g.norm(dim=-1, keepdim=True), ONE)
operator("mixes", lambda x: x * 2, lambda ctx, g: g.mean(0, keepdim=True).expand_as(g).clone(), ONE)
operator("softmax", lambda x: x.softmax(-1), lambda ctx, g: g * ctx.saved_tensors[0], ONE)
operator("positive", far, lambda ctx, g: g, ONE)
operator("rows", rows, lambda ctx, g: (g * ctx.saved_tensors[1][:, None], (g * ctx.saved_tensors[0]).sum(1)), TWO)
operator("product", lambda x, w: x @ w, lambda ctx, g: (g @ ctx.saved_tensors[1].mT, ctx.saved_tensors[0].mT @ g), TWO)
operator("forgets", lambda x, w: x @ w, lambda ctx, g: (g @ ctx.saved_tensors[1].mT, torch.zeros_like(ctx.saved_tensors[1])), TWO)


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.last, self.w, self.n = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Parameter(torch.randn(8, 8)),
            nn.Parameter(torch.randn(4)),
        )
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        second = {"rows": (self.n,), "product": (self.w,), "forgets": (self.w,)}.get(self.name, ())
        return (self.last(getattr(torch.ops.claimed, self.name)(self.first(x), *second)) ** 2).mean()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = dict(OPERATORS)
    yield
    OPERATORS.clear()
    OPERATORS.update(before)


HOLD = [
    ("unit", "n [c] -> n [c]", ()),
    ("mixes", "[n] c -> [n] c", ()),
    ("rows", "n c, n -> n c", [(0,), (1,)]),
    ("rows", "n c, [n] -> n c", ()),
    ("product", "n i, i o -> n o", [(0,), (1,)]),
    ("forgets", "n i, i o -> n o", [(0,), (1,)]),
]
BREAK = [
    ("unit", "n c -> n c", (), "unit.* as S\\(1\\) -> S\\(1\\) the gradient of operand 0"),
    ("mixes", "n c -> n c", (), "mixes.* as S\\(0\\) -> S\\(0\\) the gradient of operand 0"),
    ("softmax", "n c -> n c", (), "softmax.* as S\\(1\\) -> S\\(1\\) result 0 is not a part"),
    ("softmax", "n [c] -> n [c]", [(0,)], "softmax.* as P -> P result 0 is not a part of the whole one \\(or a share"),
    ("rows", "n c, n -> n c", [(0, 1)], "rows.* as P, P -> P result 0"),
    ("rows", "n c, m -> n c", (), "rows.* it raises"),
    ("product", "n i, i o -> n o", [(0, 1)], "product.* as P, P -> P result 0"),
    ("product", "n i, o i -> n o", (), "product.* it raises|product.* result 0"),
]


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("name", "rule", "linear"), HOLD)
def test_what_holds_is_exact(name: str, rule: str, linear: Any) -> None:
    add_rule(f"claimed.{name}", rule, linear=linear)
    for mesh in ("tp=2", "dp=2"):
        report = mp.verify(Model(name), mesh, {"x": torch.randn(4, 8)}, steps=1)
        assert report.ok, report


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("name", "rule", "linear", "said"), BREAK)
def test_what_does_not_hold_is_refused(name: str, rule: str, linear: Any, said: str, simulated: Any) -> None:
    add_rule(f"claimed.{name}", rule, linear=linear)
    with simulated(2), pytest.raises(PlanError, match=f"(?s)add_rule that do not hold: claimed.{said}.*\\[brackets\\]"):
        mp.parallelize(Model(name), mp.make_mesh("tp=2"), example={"x": torch.randn(4, 8)})


def test_torchs_own_operators_too(simulated: Any) -> None:
    add_rule("softmax", "a b -> a b")
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1))
    with simulated(2), pytest.raises(PlanError, match="aten.softmax.int in 1 .*'a b -> a b'"):
        mp.parallelize(model, mp.make_mesh("tp=2"), example=(torch.randn(4, 8),), loss_fn=lambda out, batch: out.square().mean())


def test_what_takes_no_drawn_value_is_told(simulated: Any) -> None:
    add_rule("claimed.positive", "n c -> n c")
    with simulated(2), pytest.warns(UserWarning, match="claimed.positive.default: its rule could not be tried"):
        mp.parallelize(Model("positive"), mp.make_mesh("tp=2"), example={"x": torch.randn(4, 8)})


def test_a_call_is_tried_once(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    add_rule("claimed.rows", "n c, n -> n c")
    runs: list[str] = []
    whole = claimed._whole

    def counted(*args: Any) -> Any:
        runs.append("whole")
        return whole(*args)

    monkeypatch.setattr(claimed, "_tried", {})
    monkeypatch.setattr(claimed, "_whole", counted)
    with simulated(2), warnings.catch_warnings():
        for _ in range(2):
            mp.parallelize(Model("rows"), mp.make_mesh("tp=2"), example={"x": torch.randn(4, 8)})
    assert len(runs) == 4
