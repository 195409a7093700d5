"""What tools ask of a parallel model on processes, and what it answers; and what they may do with it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import meshpar as mp
from tests.models import GPT
from tests.pool import Pool
from tests.runtime.state.test_shapes import batch


def said(act: Callable[[], Any]) -> str:
    """The words of a refusal."""
    try:
        act()
    except mp.MeshparError as error:
        return str(error)
    return "nothing"


def on_processes(spec: str, microbatches: int) -> dict[str, str]:
    torch.manual_seed(0)
    model, mesh = GPT().double(), mp.make_mesh(spec)
    local = mp.local_batch(batch(4, 8), mesh)
    pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(microbatches=microbatches))
    loss = pm.train_step(**local)
    assert float(loss / 2) * 2 == loss.item() and (loss + 1).detach().numpy() == loss.item() + 1
    found = {
        "divided": said(lambda: (loss / 2).backward()),
        "summed": said(lambda: (0 + loss + loss).backward()),
        "scaled": said(lambda: torch.amp.GradScaler("cpu").scale(loss).backward()),
        "fully_shard": said(lambda: fully_shard(pm)),
        "compile": said(lambda: torch.compile(pm, backend="eager")(**local)),
        "DDP": said(lambda: nn.parallel.DistributedDataParallel(pm)),
    }
    torch.save(pm.state_dict(), io.BytesIO())
    assert float(copy.deepcopy(pm).eval_step(**local)) == float(pm.eval_step(**local))
    return found


def test_refusals_on_processes(gloo: Pool) -> None:
    words = {
        **dict.fromkeys(("divided", "summed", "scaled"), "Leave .backward() out"),
        "fully_shard": "fully_shard does not take a parallel model",
        "compile": "not compiled as a whole",
        "DDP": "not wrapped in DistributedDataParallel",
    }
    for spec, microbatches in (("pp=2", 2), ("dp=2", 1)):
        for found in gloo.run(on_processes, spec, microbatches, world=2, timeout=300):
            assert all(text in found[name] for name, text in words.items()), found


def test_a_module_around_it_and_other_values_in_it_are_exact() -> None:
    model = GPT().double()
    with mp.simulate(2):
        one = batch(2, 8)
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=one)

        class Around(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner, self.scale = inner, nn.Parameter(torch.tensor(3.0, dtype=torch.double))

            def forward(self, **given: Any) -> Any:
                return self.scale * self.inner(**given)

        around, wanted = Around(pm), Around(model)
        around(**one).backward()
        wanted(**one).backward()
        for name, parameter in pm.named_parameters():
            grad, own = mp.full_grad(parameter), model.get_parameter(name).grad
            assert grad is not None and own is not None
            assert (grad - own).abs().max() < 1e-12, name
        doubled = {name: p.detach() * 2 for name, p in pm.named_parameters()}
        found = torch.func.functional_call(pm, doubled, (), one)
        expected = torch.func.functional_call(model, {name: p.detach() * 2 for name, p in model.named_parameters()}, (), one)
        assert (found - expected).abs().max() < 1e-12
