"""Extra inputs are known by what they are: the tensors of a batch may have their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import meshpar as mp
from meshpar.graph.facts import Extra
from meshpar.passes.inputs import ExtraInputs, add_input, extra_inputs
from meshpar.simulate import local_tensors
from tests.passes.graphs import info, put
from tests.pool import Pool


def test_names_that_are_taken() -> None:
    graph = fx.Graph()
    for name in ("random_key", "denominator_0", "x"):
        put(graph, "placeholder", name, (), info(4))
    assert extra_inputs(graph) == ExtraInputs()
    for kind in (Extra.DENOMINATOR, Extra.RANDOM_KEY, Extra.EXPERT_TALLY, Extra.DENOMINATOR):
        add_input(graph, kind)
    assert extra_inputs(graph) == ExtraInputs(("denominator_1", "denominator_2"), "random_key_1", "expert_tally")
    assert [n.name for n in graph.nodes] == [n.target for n in graph.nodes]


class Named(nn.Module):
    """Its inputs are called as ours are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.head = nn.Linear(4, 8)

    def forward(
        self, random_key: Tensor, denominator_0: Tensor, weight_gradients: Tensor, expert_tally: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        x = random_key + 0.0 * torch.rand_like(random_key)
        for layer in self.layers:
            x = torch.tanh(layer(x)) * weight_gradients + expert_tally
        return {"loss": F.cross_entropy(self.head(x) * denominator_0, labels)}


def made() -> tuple[Named, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The model, its batch, its gradients and its loss."""
    torch.manual_seed(0)
    model = Named().double()
    names = {"random_key": 4, "denominator_0": 1, "weight_gradients": 4, "expert_tally": 4}
    batch = {name: torch.randn(8, width, dtype=torch.float64) for name, width in names.items()}
    batch["labels"] = torch.tensor([0, 1, -100, 3, 4, -100, -100, 7])
    loss = model(**batch)["loss"]
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return model, batch, gradients, loss.detach()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_batch_with_names_like_ours(microbatches: int, simulated: Any) -> None:
    model, batch, gradients, loss = made()
    with simulated(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch, config=mp.ParallelConfig(microbatches=microbatches))
        found = pm.train_step(**batch)
        for part in local_tensors(found).values():
            torch.testing.assert_close(part, loss, rtol=1e-12, atol=0)
        for name, parameter in pm.named_parameters():
            whole = mp.full_grad(parameter)
            for part in local_tensors(whole).values() if hasattr(whole, "_local_tensors") else [whole]:
                torch.testing.assert_close(part, gradients[name], rtol=1e-10, atol=1e-14)


def pipelined() -> dict[str, Any]:
    model, batch, gradients, loss = made()
    config = mp.ParallelConfig(microbatches=4, schedule="zero-bubble")
    pm = mp.parallelize(model, mp.make_mesh("pp=2"), example=batch, config=config)
    found = pm.train_step(**batch)
    gaps = {n: float((mp.full_grad(p) - gradients[n]).abs().max()) for n, p in pm.named_parameters()}
    return {"loss": abs(float(found - loss)), **gaps}


def test_a_batch_with_names_like_ours_over_stages(gloo: Pool) -> None:
    """Where gradients of weights wait, and the loss is divided by a count of the step."""
    for gaps in gloo.run(pipelined, world=2, timeout=120):
        assert max(gaps.values()) < 1e-12, gaps
