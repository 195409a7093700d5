"""Where gradients flow: no_grad and autocast sections, frozen parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from meshpar.capture.export import capture
from meshpar.errors import CaptureError
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
    assert all(node.meta["source"].startswith("test_grad.py:") for node in calls)
    assert any(node.meta["info"].dtype == torch.bfloat16 for node in calls)
    assert not any("autocast" in str(node.target) or "grad" in str(node.target) for node in calls)


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
    assert [value.meta["info"].requires_grad for value in values] == [False, True, False, False, False, False, True]  # type: ignore[union-attr]


def test_an_input_that_needs_a_gradient() -> None:
    captured = capture(nn.ReLU(), (torch.ones(2, 4, requires_grad=True),))
    (values,) = captured.graph.output_node().args
    assert values[0].meta["info"].requires_grad  # type: ignore[union-attr,index]
