"""Batch norm written out in sums is batch norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from meshpar.graph.op import op_name
from meshpar.graph.run import run
from meshpar.passes.batch_norm import expand_batch_norm
from tests.sharding.models import captured_of


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).pow(3).mean()


CASES = {
    "2d": (lambda: nn.BatchNorm2d(3), (6, 3, 4, 5)),
    "1d": (lambda: nn.BatchNorm1d(3, momentum=0.3, eps=1e-2), (6, 3)),
    "not affine": (lambda: nn.BatchNorm1d(3, affine=False), (6, 3, 4)),
    "no statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_running_statistics(case: str) -> None:
    make, shape = CASES[case]
    model = Net(make().double())
    for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        tensor.data.uniform_(0.5, 1.5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    captured = captured_of(model, {"x": x.detach()})
    assert expand_batch_norm(captured.graph) == 1
    captured.graph.lint()
    assert not any("batch_norm" in op_name(n.target) for n in captured.graph.nodes if n.op == "call_function")

    state = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
    state |= {n: b.clone() for n, b in model.named_buffers()}
    mine = x.detach().clone().requires_grad_()
    loss, *buffers = run(captured, state, {"x": mine})
    loss.backward()
    want = model(x)
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(mine.grad, x.grad)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state[name].grad, parameter.grad, msg=name)
    assert len(buffers) == len(list(model.buffers()))
    for name, value in zip(captured.mutations, buffers, strict=True):
        torch.testing.assert_close(value, model.get_buffer(name), msg=name)
        assert not value.requires_grad


def test_statistics_that_are_given_stay_as_they_are() -> None:
    captured = captured_of(Net(nn.BatchNorm2d(3)).eval(), {"x": torch.randn(2, 3, 4, 4)})
    assert expand_batch_norm(captured.graph) == 0
