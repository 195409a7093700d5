"""Programs without changes in place: the same graph as torch makes by tracing again, without tracing again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from meshpar.capture import functional
from meshpar.capture.export import capture
from meshpar.graph.text import lines


class Written(nn.Module):
    """A forward of one expression. `x` is float32 [4, 6], `i` int64 [4], `w` a parameter [6, 6], `seen` a buffer [6]."""

    def __init__(self, body: Callable[[Written, Tensor, Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.body, self.w, self.norm, self.drop = body, nn.Parameter(torch.ones(6, 6)), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor, i: Tensor) -> Any:
        found = self.body(self, x @ self.w, i)
        return found if isinstance(found, Tensor) else sum(one.double().sum() * (k + 1) for k, one in enumerate(found))


PLAIN: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "to its own dtype": lambda m, x, i: x.to(torch.float32) * 2,
    "to a device": lambda m, x, i: x.to("cpu").relu(),
    "to another tensor's": lambda m, x, i: (x, x.to(i).float()),
    "to a wider dtype": lambda m, x, i: x.to(torch.float64, copy=True),
    "to with a memory format": lambda m, x, i: x.mT.to(torch.float64, memory_format=torch.contiguous_format),
    "the result is the operand": lambda m, x, i: x.float(),
    "float, bool, long": lambda m, x, i: (x.double(), x.bool(), x.long(), x.type(torch.bfloat16), x.type_as(i)),
    "contiguous": lambda m, x, i: (x.contiguous(), x.mT.contiguous()),
    "chunks": lambda m, x, i: (*x.chunk(3, 1), *x.unsafe_chunk(2, 0), *x.tensor_split(4, 1)),
    "unequal chunks": lambda m, x, i: (*x.chunk(4, 1), *x.hsplit(2), *x.vsplit([1])),
    "reshapes": lambda m, x, i: (x.reshape(-1), x.mT.reshape(-1), x.flatten(), x.unflatten(0, (2, 2)), x.ravel()),
    "like others": lambda m, x, i: (x.expand_as(x), x.view_as(x), x.reshape_as(m.w[:4])),
    "turned": lambda m, x, i: (x.T, x.mH, x.moveaxis(0, 1), x.swapaxes(0, 1), x.adjoint()),
    "narrow and meshgrid": lambda m, x, i: (x.narrow(1, 1, 2), *torch.meshgrid(x[0], x[1], indexing="ij")),
    "broadcast": lambda m, x, i: tuple(torch.broadcast_tensors(x, x[0])),
    "at least": lambda m, x, i: (torch.atleast_2d(x), torch.atleast_3d(x)),
    "without gradients": lambda m, x, i: (x.detach().float(), x.float()),
    "an einsum": lambda m, x, i: torch.einsum("bi,oi->bo", x.contiguous(), m.w),
    "attention": lambda m, x, i: nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], is_causal=True),
    "dropout": lambda m, x, i: (m.drop(x), m.drop(x.relu()) + nn.functional.dropout(x, 0.0), nn.functional.dropout(x, 0.3, False)),
    "in place": lambda m, x, i: (x * 2).add_(1.0).mul_(x),
    "of what is not read again": lambda m, x, i: _read_before(x),
    "a view afterwards": lambda m, x, i: (x * 2).masked_fill_(x > 0, 0.5).T.contiguous(),
    "filled and scattered": lambda m, x, i: torch.zeros_like(x).scatter_(1, i[:, None], 1.0) * x,
    "copied over": lambda m, x, i: torch.zeros_like(x).copy_(x[0]),
    "the same dtype, then in place": lambda m, x, i: (x * 2).to(torch.float32).div_(x.detach().abs().sum(-1, keepdim=True)),
    "a constant": lambda m, x, i: x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    "index_add": lambda m, x, i: torch.zeros_like(x).index_add_(0, i, x),
}
SIMPLER: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "a part that is all that is read": lambda m, x, i: (x * 2)[1:].clamp_(min=0.0),
}
"""Where torch writes the part back into a whole that nobody reads."""
TRACED: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "what a view sees": lambda m, x, i: _seen_by_a_view(x),
    "what the same value in another name sees": lambda m, x, i: _seen_by_itself(x),
    "a constant that is counted up": lambda m, x, i: x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).add_(1.0),
    "a slice": lambda m, x, i: _sliced(x),
    "drawn": lambda m, x, i: x * torch.empty_like(x).bernoulli_(0.5),
    "a buffer": lambda m, x, i: x + m.seen.add_(1.0),
    "statistics": lambda m, x, i: m.norm(x),
    "dropout of features": lambda m, x, i: nn.functional.dropout1d(x, 0.5) + nn.functional.alpha_dropout(x, 0.5, True),
    "autocast": lambda m, x, i: _cast(m, x),
    "windows": lambda m, x, i: x.contiguous().as_strided((2, 6), (6, 1)),
}


def _read_before(x: Tensor) -> Tensor:
    y = x * 2
    part = y[:2].sum()
    return y.add_(1.0) * part


def _seen_by_a_view(x: Tensor) -> Tensor:
    y = x * 2
    part = y[:2]
    y.add_(1.0)
    return y.sum() + part.sum() * 3


def _seen_by_itself(x: Tensor) -> Tensor:
    y = x * 2
    same, part = y.float(), y.T
    part.mul_(3.0)
    return same.sum() * 5 + part.sum()


def _sliced(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 2:] = 3.0
    return y


def _cast(m: Written, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.mm(x, m.w)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each program that torch traced again."""
    seen: list[str] = []
    original = ExportedProgram.run_decompositions

    def counted(self: ExportedProgram, *args: Any) -> ExportedProgram:
        seen.append("traced")
        return original(self, *args)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    return seen


def _lines(body: Any) -> list[str]:
    torch.manual_seed(0)
    return lines(
        capture(
            Written(body).train(), (), {"x": torch.randn(4, 6), "i": torch.tensor([2, 0, 1, 3])}, loss_fn=lambda out, _: out.double().sum()
        )
    )


@pytest.mark.sweep(2)
@pytest.mark.parametrize("body", PLAIN.values(), ids=PLAIN.keys())
def test_nothing_in_place_is_written_out_as_torch_does(body: Any, traces: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = _lines(body)
    assert not traces
    monkeypatch.setattr(functional, "_needs_a_trace", lambda node: True)
    monkeypatch.setattr(functional, "only_composites", lambda called: nullcontext())
    assert ours == _lines(body) and traces


@pytest.mark.sweep(2)
@pytest.mark.parametrize("body", TRACED.values(), ids=TRACED.keys())
def test_the_rest_is_traced(body: Any, traces: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph as where torch prepares all operators there are, not only those of the program."""
    ours = _lines(body)
    assert traces
    monkeypatch.setattr(functional, "only_composites", lambda called: nullcontext())
    assert ours == _lines(body)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("body", (PLAIN | SIMPLER | TRACED).values(), ids=(PLAIN | SIMPLER | TRACED).keys())
def test_values_and_gradients(body: Any) -> None:
    if body in (TRACED["drawn"], TRACED["dropout of features"]):
        return  # (numbers that are drawn have tests of their own)
    torch.manual_seed(0)
    model, batch = Written(body).eval(), {"x": torch.randn(4, 6), "i": torch.tensor([2, 0, 1, 3])}
    wanted = model(**batch).double().square().mean()
    captured = capture(model, (), batch, loss_fn=lambda out, _: out.double().square().mean())
    model.get_buffer("seen").zero_()
    assert captured.loss is not None
    found = _Run(captured.graph, {**dict(model.named_parameters()), **dict(model.named_buffers()), **captured.constants, **batch}).run()
    torch.testing.assert_close(found[captured.loss], wanted)
    for ours, theirs in zip(*(torch.autograd.grad(loss, [model.w]) for loss in (found[captured.loss], wanted)), strict=True):
        torch.testing.assert_close(ours, theirs)


class _Run(fx.Interpreter):
    """Runs a captured graph on these tensors, by name."""

    def __init__(self, graph: fx.Graph, tensors: dict[str, Tensor]) -> None:
        super().__init__(fx.GraphModule(nn.Module(), fx.Graph()), graph=graph)
        self.tensors = tensors

    def fetch_attr(self, target: str) -> Tensor:
        return self.tensors[target]

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.tensors[target]
