"""Tokens that a parallel model generates, and losses over many batches, against the model on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import meshpar as mp
from tests.models import tiny
from tests.pool import Pool

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 8, "temperature": 0.8},
    "beams": {"num_beams": 3},
}


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Four prompts, two of them padded on the left."""
    ids = torch.randint(3, 60, (4, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :1] = 0
    return ids.masked_fill(mask == 0, 0), mask


def generates(spec: str) -> None:
    torch.manual_seed(0)
    model = tiny("llama").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 7
    ids, mask = prompts()
    mesh = mp.make_mesh(spec)
    own_ids, own_mask = mp.local_batch((ids, mask), mesh)
    pm = mp.parallelize(model, mesh, example={"input_ids": own_ids, "labels": own_ids}).eval()
    for name, way in WAYS.items():
        torch.manual_seed(5)
        wanted = model.generate(own_ids, attention_mask=own_mask, max_new_tokens=4, **way)
        torch.manual_seed(5)
        found = pm.generate(own_ids, attention_mask=own_mask, max_new_tokens=4, **way)
        assert torch.equal(found, wanted), f"{name} on {spec}: {found} {wanted}"
    if spec == "tp=2":
        torch.manual_seed(mesh.get_rank())
        with pytest.raises(mp.ConfigError, match="torch.manual_seed"):
            pm.generate(own_ids, max_new_tokens=2, do_sample=True)
        with pytest.raises(mp.ConfigError, match="no cache of keys and values"):
            pm.generate(own_ids, max_new_tokens=2, use_cache=True)


@pytest.mark.parametrize(("spec", "world"), [("pp=2", 2), ("dp=2,tp=2", 4)])
def test_tokens_are_the_models(gloo: Pool, spec: str, world: int) -> None:
    gloo.run(generates, spec, world=world, timeout=180)


def evaluates() -> tuple[float, float]:
    torch.manual_seed(0)
    model = tiny("llama").double().eval()
    ids = torch.randint(3, 60, (6, 2, 8), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :, 3:], labels[3, 1] = -100, -100  # uneven
    sums = [0.0, 0.0]
    for rows, targets in zip(ids, labels, strict=True):
        count = (targets[:, 1:] != -100).sum().item()
        with torch.no_grad():
            sums = [sums[0] + model(input_ids=rows, labels=targets).loss.item() * count, sums[1] + count]
    mesh = mp.make_mesh("dp=2")
    batches = [mp.local_batch({"input_ids": a, "labels": b}, mesh) for a, b in zip(ids, labels, strict=True)]
    pm = mp.parallelize(model, mesh, example=batches[0]).eval()
    weight = lambda batch: (batch["labels"][:, 1:] != -100).sum()  # noqa: E731
    with pytest.raises(mp.BatchError, match="1 of 2 data ranks have no more batches"):
        pm.evaluate(batches[: 3 + mesh.get_rank()], weight=weight)
    return pm.evaluate(batches, weight=weight), sums[0] / sums[1]


def test_the_loss_over_many_batches(gloo: Pool) -> None:
    for found, wanted in gloo.run(evaluates, world=2, timeout=120):
        assert found == pytest.approx(wanted, rel=1e-12)
