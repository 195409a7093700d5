"""Where gradients flow: no_grad and autocast sections, frozen parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import meshpar as mp
from meshpar.capture.export import capture
from meshpar.errors import CaptureError
from meshpar.graph.facts import facts, info_of
from meshpar.graph.run import run
from tests.capture.models import assert_same


class Sections(nn.Module):
    """Sections inside sections, both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.a(x)
            with torch.autocast("cpu", enabled=False):
                h = h + self.b(h.float())
        with torch.no_grad():
            k = self.a(h)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                k = self.b(k)
            with torch.enable_grad():
                k = k + self.b(x)
            same = h
        return {"loss": (same + k).square().sum()}


def test_sections() -> None:
    torch.manual_seed(0)
    captured = assert_same(Sections(), (torch.randn(3, 4),), {})
    calls = [node for node in captured.graph.nodes if node.op == "call_function"]
    assert all(facts(node).source.startswith("test_grad.py:") for node in calls)
    assert any(info_of(node).dtype == torch.bfloat16 for node in calls)
    assert not any("autocast" in str(node.target) or "grad" in str(node.target) for node in calls)


def test_what_a_section_gives_back_as_it_was_keeps_its_gradient() -> None:
    """`x.to(x.dtype)` is x: later uses of x must not see the section."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.a(x)
            with torch.no_grad():
                k = self.b(h.to(x.dtype).contiguous()).flatten(0, 0) + F.dropout(h, 0.0)
                with torch.autocast("cpu", enabled=False):
                    k = k * h.double().mean()
                v = h.view(4, 3)
            return {"loss": (self.b(h) * k + v.view(3, 4)).square().sum()}

    assert_same(Model().double(), (torch.randn(3, 4, dtype=torch.double),), {})


def test_no_grad_inside_autocast_is_refused() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
                return self.a(x)

    with pytest.raises(CaptureError, match="switches gradients off inside an autocast section"):
        capture(Inside(), (torch.randn(3, 4),))


def test_frozen_parameters_and_integers() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = x * self.w
            return x * self.v, y, y > 0, y.argmax(), torch.zeros_like(y), y.detach() + 1, y.detach() + y

    captured = capture(Frozen(), (torch.ones(2, 4),))
    (values,) = captured.graph.output_node().args
    assert [info_of(value).requires_grad for value in values] == [False, True, False, False, False, False, True]  # type: ignore[union-attr]


def test_an_input_that_needs_a_gradient() -> None:
    captured = capture(nn.ReLU(), (torch.ones(2, 4, requires_grad=True),))
    (values,) = captured.graph.output_node().args
    assert info_of(values[0]).requires_grad  # type: ignore[union-attr,index]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


class Noisy(Doubled):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Holding(torch.autograd.Function):
    """Hides parameters in a module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.weight * 2, None


class Clipped(torch.autograd.Function):
    """A square root whose derivative stays below a limit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.sqrt()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / (ctx.saved_tensors[0] * 4).clamp(min=1 / ctx.limit**2).sqrt(), None


class Straight(torch.autograd.Function):
    """Two results, one of them whole numbers; a context that is set up apart."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, settings: dict[str, int]) -> tuple[Tensor, Tensor]:
        return (x * settings["levels"]).round() / settings["levels"] * scale, x.argmax(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, ctx.settings = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        return grads[0] * scale, (grads[0] * x).sum(0) if ctx.needs_input_grad[1] else None, None


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))


def test_what_would_lose_its_gradient_is_refused() -> None:
    class Own(One):
        def forward(self, x: Tensor) -> Tensor:
            return Noisy.apply(self.a(x)).sum()

    class Held(One):
        def forward(self, x: Tensor) -> Tensor:
            return Holding.apply(x.requires_grad_(), self.a).sum()

    class Overwritten(One):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            with torch.no_grad():
                h[:, :2] = 0
            return h.square().sum()

    with pytest.raises(
        CaptureError,
        match=r"Own cannot be captured at test_grad.py:[0-9]+ .*: Noisy .* whose backward is not the derivative of its forward.*it draws",
    ):
        capture(Own(), (torch.randn(3, 4),))
    with pytest.raises(CaptureError, match=r"Held cannot be captured at test_grad.py:[0-9]+ .*Holding .* is handed a Linear"):
        capture(Held(), (torch.randn(3, 4),))
    assert "apply" not in vars(torch.autograd.Function.__base__)
    with pytest.raises(
        CaptureError, match="at test_grad.py:[0-9]+ overwrites, inside torch.no_grad.., a value that gradients flow through"
    ):
        capture(Overwritten(), (torch.randn(3, 4),))


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0] * ctx.saved_tensors[0]


class MaskedSoftmax(torch.autograd.Function):
    """Writes into what it would have to save."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        y = x.masked_fill(~mask, -1e9).softmax(-1)
        y.masked_fill_(~mask, 0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return y * (grads[0] - (y * grads[0]).sum(-1, keepdim=True)), None


class MaskedSoftmaxOnce(MaskedSoftmax):
    """Forgets the sum, which shows only where something is not masked."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grads[0], None


def test_a_function_that_agrees_with_its_derivative_is_kept() -> None:
    class Own(One):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": Squared.apply(self.a(x)).sum()}

    class Masked(One):
        function: Any = MaskedSoftmax

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.function.apply(self.a(x), x > 0) * x).sum()}

    assert_same(Own(), (torch.randn(3, 4),), {}, tolerance=1e-6)
    assert "meshpar_function" not in _operators(assert_same(Masked(), (torch.randn(3, 4),), {}, tolerance=1e-6))
    Masked.function = MaskedSoftmaxOnce
    assert "meshpar_function.MaskedSoftmaxOnce" in _operators(assert_same(Masked(), (torch.randn(3, 4),), {}, tolerance=1e-6))


def _operators(captured: Any) -> str:
    return " ".join(str(node.target) for node in captured.graph.nodes)


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(4, 8), nn.Linear(8, 4), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.down(Clipped.apply(self.up(x).square() + 1e-3, 2.0))
        rounded, best = Straight.apply(x, self.scale, {"levels": 8})
        return {"loss": (Doubled.apply(x) * rounded + best[:, None]).square().sum()}


def test_a_function_with_a_backward_of_its_own_becomes_an_operator() -> None:
    torch.manual_seed(0)
    captured = assert_same(Functions().double(), (torch.randn(3, 4).double(),), {})
    assert all(f"meshpar_function.{name}" in _operators(captured) for name in ("Clipped", "Straight", "Doubled"))
    pointwise = {op.name().split("::")[1].split("_")[0] for op in _targets(captured) if torch.Tag.pointwise in op.tags}
    assert pointwise == {"Clipped", "Doubled"}


def _targets(captured: Any) -> list[Any]:
    return [node.target for node in captured.graph.nodes if "meshpar_function" in str(node.target)]


def test_functions_over_a_mesh() -> None:
    report = mp.verify(Functions(), "dp=2,tp=2", {"x": torch.randn(4, 4)})
    assert report.ok, report


def test_checkpointing_inside_the_model_is_transparent() -> None:
    class Checkpointed(One):
        reentrant: bool

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": checkpoint(self.a, self.a(x), use_reentrant=self.reentrant).square().sum()}

    for Checkpointed.reentrant in (False, True):
        model = Checkpointed()
        captured = capture(model, (torch.randn(3, 4),))
        assert [str(node.target) for node in captured.graph.nodes if node.op == "call_function"].count("aten.linear.default") == 2
        assert all(info_of(node).requires_grad for node in captured.graph.nodes if node.op == "call_function")
    Checkpointed.reentrant = False
    assert_same(Checkpointed(), (torch.randn(3, 4),), {})


def test_a_table_that_grows_or_is_cast_is_made_again() -> None:
    class Table(One):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", self.made(2), persistent=False)

        def made(self, n: int) -> Tensor:
            table = torch.zeros(n, 4)
            table[:, 0::2] = torch.arange(n)[:, None].float()
            return table

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            if len(self.steps) < len(x):
                self.steps = self.made(len(x))
            elif self.steps.dtype != x.dtype:
                self.steps = self.steps.to(x.dtype)
            return {"loss": (self.a(x) * self.steps[: len(x)]).square().sum()}

    for model, rows in ((Table(), 3), (Table().double(), 2)):
        model.steps = model.steps.float()
        x = torch.randn(rows, 4).to(model.a.weight.dtype)
        captured = capture(model, (x,))
        assert captured.mutations == ()
        state = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        torch.testing.assert_close(run(captured, state, {"x": x})[0], model(x)["loss"])
    report = mp.verify(Table(), "dp=2,tp=2", {"x": torch.randn(4, 4)})
    assert report.ok, report


def test_an_assigned_buffer_is_an_update() -> None:
    class Assigns(One):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.a(x)
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            return {"loss": (h * self.mean).square().sum()}

    class Reshapes(One):
        def forward(self, x: Tensor) -> Tensor:
            self.mean = self.a(x).detach()
            return x.sum()

    captured = assert_same(Assigns(), (torch.randn(3, 4),), {})
    assert captured.mutations == ("mean",)
    with pytest.raises(CaptureError, match="Reshapes assigns a tensor of another shape or type to its buffer 'mean'"):
        capture(Reshapes(), (torch.randn(3, 4),))
