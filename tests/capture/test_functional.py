"""Programs without changes in place: the same graph as torch makes by tracing again, without tracing again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
    "to another tensor's": lambda m, x, i: x.to(i).float(),
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
}
TRACED: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "in place": lambda m, x, i: (x * 2).add_(1.0),
    "part of it": lambda m, x, i: torch.zeros_like(x).index_copy_(0, i, x),
    "a slice": lambda m, x, i: _sliced(x),
    "a buffer": lambda m, x, i: x + m.seen.add_(1.0),
    "statistics": lambda m, x, i: m.norm(x),
    "dropout": lambda m, x, i: m.drop(x),
    "autocast": lambda m, x, i: _cast(m, x),
    "windows": lambda m, x, i: x.contiguous().as_strided((2, 6), (6, 1)),
}


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


@pytest.mark.parametrize("body", PLAIN.values(), ids=PLAIN.keys())
def test_nothing_in_place_is_written_out_as_torch_does(body: Any, traces: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = _lines(body)
    assert not traces
    monkeypatch.setattr(functional, "_needs_a_trace", lambda node: True)
    assert ours == _lines(body)
    assert traces


@pytest.mark.parametrize("body", TRACED.values(), ids=TRACED.keys())
def test_the_rest_is_traced(body: Any, traces: list[str]) -> None:
    assert _lines(body)
    assert traces
