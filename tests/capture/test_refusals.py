"""Forwards that no graph can hold are refused by the reason, and what they do to their inputs is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.capture import check
from meshpar.capture.export import capture
from meshpar.errors import CaptureError

Make = Callable[[], nn.Module]


class Penalised(nn.Module):
    """The gradient with respect to the input is a part of the loss."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).square().mean() + self.how(self.up, x)


def by_autograd(up: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(up(x).tanh().sum(), x, create_graph=True)[0].square().mean()


def by_func(up: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: up(y).tanh().sum())(x).square().mean()


def by_backward(up: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    up(x).tanh().sum().backward()
    return x.grad.square().mean()  # type: ignore[union-attr]


@pytest.mark.parametrize("how", [by_autograd, by_func, by_backward])
def test_gradients_inside_of_a_forward(how: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with mp.simulate(2), pytest.raises(CaptureError, match=r"asks for gradients at test_refusals.py:\d+ .*(?s:.*)torch.func.jvp"):
        mp.parallelize(Penalised(how), mp.make_mesh("tp=2"), example=(torch.randn(2, 4),))


def scripted() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))


def traced() -> nn.Module:
    return nn.Sequential(torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4)), nn.Linear(4, 4))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (scripted, "Sequential: 1 is a module of TorchScript, whose code cannot be read"),
        (traced, "Sequential: 0 is a module of TorchScript"),
        (lazy, "Sequential: 0.weight, 0.bias have no shape yet: call the model once on a batch before"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Lazy modules")
@pytest.mark.parametrize("verify", [False, True])
def test_modules_that_cannot_be_read(make: Make, words: str, verify: bool) -> None:
    model, batch = make(), (torch.randn(2, 4),)
    with pytest.raises(CaptureError, match=words):
        if verify:
            mp.verify(model, "tp=2", batch)
        with mp.simulate(2):
            mp.parallelize(model, mp.make_mesh("tp=2"), example=batch)


class Doubles(nn.Module):
    """Doubles what it is given, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return F.mse_loss(self.up(x), y)


@pytest.mark.filterwarnings("ignore:The forward of Doubles")
def test_a_batch_that_the_model_changes_in_place() -> None:
    """The program sees the new values, the caller's tensor stays, and that is said; verify gives both the same batch."""
    batch = {name: torch.randn(4, 4, dtype=torch.float64) for name in ("x", "y")}
    assert mp.verify(Doubles(), "dp=2", batch).ok
    with mp.simulate(2):
        before = batch["x"].clone()
        with pytest.warns(UserWarning, match="changes x of the batch in place: the tensor that is passed keeps its values"):
            pm = mp.parallelize(Doubles().double(), mp.make_mesh("tp=2"), example=batch)
        pm.train_step(**batch)
        assert torch.equal(before, batch["x"])


class Centred(nn.Module):
    """A running mean in float32, which enters what a layer multiplies."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        self.up, self.down, self.cast = nn.Linear(4, 4), nn.Linear(4, 4), cast
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x) - self.mean
        return self.down(h.to(self.down.weight.dtype) if self.cast else h).square().mean()


def test_dtypes_that_torch_does_not_multiply() -> None:
    config = mp.ParallelConfig(precision=mp.Precision(compute_dtype=torch.bfloat16))
    given = {"x": torch.randn(4, 4)}
    with mp.simulate(2):
        mesh = mp.make_mesh("tp=2")
        with pytest.raises(
            CaptureError, match=r"aten.linear.default in down .*torch does not multiply float32 by bfloat16.* x.to\(weight.dtype\)"
        ):
            mp.parallelize(Centred(cast=False), mesh, example=given, config=config)
        mp.parallelize(Centred(cast=True), mesh, example=given, config=config).train_step(**given)
        mp.parallelize(Centred(cast=False), mesh, example=given).train_step(**given)


def _operands(name: str) -> list[Any]:
    m, b, v, image = torch.randn(4, 4), torch.randn(2, 4, 4), torch.randn(4), torch.randn(2, 4, 4, 4, 4)
    several = {"mm": [m, m], "bmm": [b, b], "mv": [m, v], "dot": [v, v], "matmul": [b, m], "addmm": [m, m, m], "baddbmm": [b, b, b]}
    several |= {"addbmm": [m, b, b], "addmv": [v, m, v], "linear": [b, m, v], "scaled_dot_product_attention": [b, b, b]}
    several |= {"_grouped_mm": [torch.randn(16, 16), torch.randn(2, 16, 16), torch.tensor([8, 16], dtype=torch.int32)]}
    several |= {
        f"{kind}{n}d": [image[(0,) * (3 - n)], torch.randn([4, 4, 1, 1, 1][: 2 + n]), v]
        for n in (1, 2, 3)
        for kind in ("conv", "conv_transpose")
    }
    several |= {"convolution": [image[0, 0], torch.randn(4, 4, 1), v, [1], [0], [1], False, [0], 1]}
    return several[name]


@pytest.mark.parametrize("packet", [p for p in check._ONE_DTYPE if p is not torch.ops.aten.einsum], ids=str)
def test_torch_refuses_them_itself(packet: Any) -> None:
    """What is refused at capture fails in every step: for each operand, alone in another dtype."""
    operands = _operands(packet.__name__)
    packet(*operands)
    for i in range(check._ONE_DTYPE[packet]):
        mixed = [one.double() if i == n else one for n, one in enumerate(operands)]
        with pytest.raises((RuntimeError, ValueError)):
            packet(*mixed)


class Chooses(nn.Module):
    """Something is made of the rows that a mask chooses, which what was computed leads to."""

    def __init__(self, of: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.up, self.of = nn.Linear(4, 4), of

    def forward(self, x: Tensor) -> Any:
        y = self.up(x)
        return self.of(y, y.sum(-1) > 0)


def classes(y: Tensor, mask: Tensor) -> Tensor:
    """Ones at the class of every row that is chosen."""
    rows, ones = mask.nonzero()[:, 0], torch.zeros_like(y)
    ones[rows, rows % 4] = 1.0
    return (ones * y).sum()


NUMBER = "makes a Python number .* of how many rows a mask chooses"


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("of", "reason", "way_out"),
    [
        (lambda y, mask: y[mask].sum() / len(y[mask]), NUMBER, r"mask.sum\(\), or as a size, x\[mask\].shape\[0\]"),
        (lambda y, mask: y[mask].sum() / float(y[mask].shape[0]), NUMBER, r"mask.sum\(\), or as a size"),
        (lambda y, mask: sum(y[mask][i].sum() for i in range(len(y[mask]))), NUMBER, "a loop over rows as one call on all"),
        (lambda y, mask: y.sum() / int(mask.nonzero().shape[0]), NUMBER, r"mask.sum\(\)"),
        (
            lambda y, mask: y[mask].mean() if y[mask].numel() > 3 else y.sum(),
            "goes one of two ways by how many rows a mask chooses",
            r"torch.where\(mask.sum\(\) > n, one, other\)",
        ),
        (lambda y, mask: y.sum() if y.max().item() > 3 else y.mean(), "into Python numbers, by which it goes", r"torch.where\(condition"),
        (lambda y, mask: y.sum() * y.max().item(), "makes a Python number of a value that the model computes", "leave it a tensor"),
        (lambda y, mask: y[mask].topk(1, 0).values.sum(), "topk.* mixes rows", r"torch.where\(mask, value, -torch.inf\)"),
        (lambda y, mask: y[mask].softmax(0)[0], "softmax.* mixes rows", "with -inf in those that are not chosen"),
        (lambda y, mask: torch.cat([y[mask], y]).sum(), "cat.* mixes rows", "Put all rows together, and their masks"),
        (lambda y, mask: y[mask.nonzero()[:, 0]][mask.nonzero()[:, 0] % 2].sum(), "index.* mixes rows", "Look up for all rows"),
        (classes, "index_put.* mixes rows", r"Write for all rows, .*one_hot for ones"),
    ],
)
def test_sizes_that_depend_on_data(of: Callable[[Tensor, Tensor], Any], reason: str, way_out: str) -> None:
    with pytest.raises(CaptureError, match=f"(?s){reason}.*{way_out}"):
        capture(Chooses(of), (torch.randn(6, 4),))


def test_what_the_way_out_says_is_captured() -> None:
    for of in (
        lambda y, mask: y[mask].sum() / y[mask].shape[0],
        lambda y, mask: torch.where(mask[:, None], y, 0).sum() / mask.sum(),
        lambda y, mask: torch.where(mask.sum() > 3, y.sum(), y.mean()),
        lambda y, mask: torch.where(mask[:, None], y, -torch.inf).topk(1, 0).values.sum(),
    ):
        capture(Chooses(of), (torch.randn(6, 4),))


class Pyramid(nn.Module):
    """A loop over equal modules that are no experts: what they compute is mixed."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.parts, self.inside = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), inside

    def forward(self, x: Tensor) -> Tensor:
        weights, index = x.softmax(-1)[:, :3].topk(2, -1)
        y = sum((weights * (index == e)).sum(-1, keepdim=True) * part(x - x.mean(0)) for e, part in enumerate(self.parts))
        return y[y.sum(-1) > 0].topk(1, 0).values if self.inside else y


class Detects(nn.Module):
    def __init__(self, inside: bool, number: bool) -> None:
        super().__init__()
        self.body, self.number = Pyramid(inside), number

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        chosen = y[y.sum(-1) > 0]
        return chosen.sum() / (len(chosen) if self.number else 1) + chosen.topk(1, 0).values.sum()


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("inside", "number"), [(False, False), (False, True), (True, False)])
def test_experts_are_spoken_of_where_they_are_at_fault(inside: bool, number: bool) -> None:
    with pytest.raises(CaptureError) as error:
        capture(Detects(inside, number), (torch.randn(6, 4),))
    assert ("Expert layers of a form that is not recognised" in str(error.value)) == inside
