"""Tokens that a parallel model generates, and losses over many batches, against the model on one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import meshpar as mp
from meshpar.runtime import generation
from meshpar.runtime.caching.forward import KeptCache
from meshpar.runtime.caching.proof import why_not
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


def made(spec: str, **changes: Any) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """A model, its parallel model, and this rank's prompts."""
    torch.manual_seed(0)
    model = tiny("llama", **changes).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 7
    mesh = mp.make_mesh(spec)
    ids, mask = mp.local_batch(prompts(), mesh)
    return model, mp.parallelize(model, mesh, example={"input_ids": ids, "labels": ids}).eval(), ids, mask


@contextmanager
def worked(pm: Any) -> Iterator[list[tuple[int, int]]]:
    """How many samples and positions each program runs, forward by forward."""
    rows: list[tuple[int, int]] = []
    run = pm._engine.run

    def counting(program: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(tuple(inputs["input_ids"].shape))
        return run(program, inputs, *args, **kwargs)

    pm._engine.run = counting
    yield rows
    pm._engine.run = run


def generates(spec: str, names: Iterable[str] = WAYS, **changes: Any) -> None:
    model, pm, ids, mask = made(spec, **changes)
    for name in names:
        way = WAYS[name]
        for new in ({}, {"use_cache": False})[: 2 if name == "greedy" else 1]:
            torch.manual_seed(5)
            wanted = model.generate(ids, attention_mask=mask, max_new_tokens=4, **way)
            torch.manual_seed(5)
            with worked(pm) as rows:
                found = pm.generate(ids, attention_mask=mask, max_new_tokens=4, **way, **new)
            assert torch.equal(found, wanted), f"{name} on {spec}: {found} {wanted}"
            samples = len(ids) * way.get("num_beams", 1)
            one_by_one = [(samples, 5), *[(samples, 1)] * 3]
            assert rows == ([(samples, 9)] * 4 if new else one_by_one), f"{name} on {spec}: {rows}"
            assert ("without a cache" in pm.generation) == bool(new), pm.generation
    if spec == "dp=2,tp=2":
        torch.manual_seed(torch.distributed.get_rank())
        with pytest.raises(mp.ConfigError, match="torch.manual_seed"):
            pm.generate(ids, max_new_tokens=2, do_sample=True)


def keeps(spec: str, kept: Any) -> None:
    """The shapes of keys and values on this rank, layer by layer: [samples, heads, positions, width]."""
    model, pm, ids, mask = made(spec)
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "KeptCache", lambda room: seen.append(KeptCache(room)) or seen[-1])
        assert torch.equal(
            pm.generate(ids, attention_mask=mask, max_new_tokens=4), model.generate(ids, attention_mask=mask, max_new_tokens=4)
        )
    (cache,) = seen
    rank = torch.distributed.get_rank()
    heads = [None if one.tensor is None else (one.tensor.shape[0], one.tensor.shape[1]) for one in cache.buffers]
    assert heads == kept[rank], heads
    assert ("each rank of tp has those of its own heads" in pm.generation) == ("tp" in spec), pm.generation


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("spec", "world", "names"), [("pp=2", 2, tuple(WAYS)), ("dp=2,tp=2", 4, ("beams",))])
def test_tokens_are_the_models(gloo: Pool, spec: str, world: int, names: tuple[str, ...]) -> None:
    gloo.run(generates, spec, names, world=world, timeout=180)


@pytest.mark.slow
def test_heads_that_are_fewer_than_the_ranks(gloo: Pool) -> None:
    gloo.run(generates, "tp=4", ("beams",), num_key_value_heads=2, world=4, timeout=180)


@pytest.mark.slow
def test_a_rank_keeps_its_own_samples_heads_and_layers(gloo: Pool) -> None:
    layers = [[(4, 2)] * 2 + [None] * 2, [(4, 2)] * 2 + [None] * 2, [None] * 2 + [(4, 2)] * 2, [None] * 2 + [(4, 2)] * 2]
    gloo.run(keeps, "pp=2,tp=2", layers, world=4, timeout=180)
    gloo.run(keeps, "dp=2,tp=2", [[(2, 2)] * 4] * 4, world=4, timeout=180)


def refuses() -> None:
    _, pm, ids, _ = made("dp=1")
    with pytest.warns(UserWarning, match="without a cache, .* call pm.eval"):
        pm.train().generate(ids, max_new_tokens=2)
    with pytest.raises(mp.ConfigError, match=r"use_cache=True.* call pm.eval"):
        pm.generate(ids, max_new_tokens=2, use_cache=True)
    pm.eval().generate(ids, max_new_tokens=2, use_cache=True)
    with pytest.raises(mp.ConfigError, match="a cache is made for each call"):
        pm.generate(ids, max_new_tokens=2, past_key_values=object())


def count_from_the_left(inner: Any) -> None:
    """Positions are places in the cache, padding included."""
    forward = inner.forward
    inner.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)


def test_what_is_proved() -> None:
    for name, says in (("llama", None), ("gpt2", None), ("mamba", "its forward"), ("bart", "its logits are others")):
        reason = why_not(tiny(name).eval())
        assert reason is None if says is None else says in (reason or ""), f"{name}: {reason}"
    for name in ("llama", "gpt2"):
        model = tiny(name).eval()
        count_from_the_left(model.get_decoder())
        assert "its logits are others" in (why_not(model) or ""), name


def test_no_cache_where_it_is_not_exact(gloo: Pool) -> None:
    gloo.run(refuses, world=1, timeout=120)


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
