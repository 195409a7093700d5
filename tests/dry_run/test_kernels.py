"""Costs of single operators against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from meshpar.dry_run.kernels import Kernel
from meshpar.dry_run.tape import MachineTape
from meshpar.ops import experts


def kernels(run: Any) -> list[Kernel]:
    with MachineTape() as tape:
        run()
    return [call.kernel for call in tape.calls]


def test_a_product() -> None:
    x, w = torch.zeros(4, 8), torch.zeros(16, 8)
    (found,) = kernels(lambda: F.linear(x, w))
    assert (found.kind, found.flops, found.dtype) == ("matrix", 2 * 4 * 8 * 16, "fp32")
    assert found.read == 4 * (4 * 8 + 16 * 8) and found.written == 4 * 4 * 16


@pytest.mark.parametrize("causal", [True, False])
def test_attention_counts_the_pairs_that_may_see_each_other(causal: bool) -> None:
    q = torch.zeros(2, 3, 16, 8, requires_grad=True)

    def run() -> None:
        F.scaled_dot_product_attention(q, q, q, is_causal=causal).sum().backward()

    forward, backward = (k for k in kernels(run) if k.kind == "attention")
    assert forward.flops == 2 * 2 * 3 * 16 * 16 * 2 * 8 * (0.5 if causal else 1)
    assert backward.flops == 2.5 * forward.flops


def test_views_cost_nothing_and_look_ups_what_they_return() -> None:
    x = torch.zeros(4, 8)
    assert kernels(lambda: x.view(8, 4).t()[0]) == []
    (found,) = kernels(lambda: F.embedding(torch.zeros(3, dtype=torch.long), torch.zeros(1000, 8)))[-1:]
    assert found.bytes == 2 * 3 * 8 * 4


def test_products_of_experts() -> None:
    x, w, ends = torch.zeros(6, 8), torch.zeros(2, 8, 16), torch.tensor([2, 6], dtype=torch.int32)
    found = [k for k in kernels(lambda: experts.grouped_mm(x, w, ends)) if k.kind == "grouped"]
    assert [k.flops for k in found] == [2 * 6 * 8 * 16]
