"""Random numbers, initialisation, checkpoints and memory on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import meshpar as mp
from tests.gpu.small import batch_of, each_rank, model_of

pytestmark = pytest.mark.gpu


def test_dropout_draws_the_numbers_of_one_device(device: torch.device) -> None:
    batch, losses = batch_of(device), []
    for mesh, ranks in (("tp=1", 1), ("cp=2", 2)):
        with mp.simulate(ranks):
            found = mp.make_mesh(mesh, device.type)
            local = mp.local_batch(batch, found)
            config = mp.ParallelConfig(seed=5)
            pm = mp.parallelize(model_of("gpt2", device, torch.float64).train(), found, example=local, config=config)
            losses.append(float(each_rank(pm.train_step(**local))[0]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_generators_are_left_as_they_were(device: torch.device) -> None:
    """A step draws from its own key, not from the generators of the process."""
    batch = batch_of(device)
    pm = mp.parallelize(model_of("gpt2", device, torch.float32).train(), mp.make_mesh("tp=1", device.type), example=batch)
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device.type == "cuda" else [])
    pm.train_step(**batch)
    after = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device.type == "cuda" else [])
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))


def test_initialisation_is_the_same_on_every_mesh(device: torch.device) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.gpu.small import SIZES

    batch, values = batch_of(device), []
    for mesh, ranks in (("tp=1", 1), ("tp=2", 2)):
        torch.manual_seed(0)
        with mp.meta():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES["llama"]))
        with mp.simulate(ranks):
            pm = mp.parallelize(model, mp.make_mesh(mesh, device.type), example=batch)
            values.append({name: each_rank(mp.full_tensor(p))[0].cpu() for name, p in pm.named_parameters()})
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoints(asynchronous: bool, device: torch.device, tmp_path: Path) -> None:
    """What is saved from a device is what it held when it was saved, whatever the next step does; loaded onto the device and the CPU."""
    batch = batch_of(device)
    pm = mp.parallelize(model_of("llama", device, torch.float32), mp.make_mesh("tp=1", device.type), example=batch)
    optimizer = torch.optim.AdamW(pm.parameters(), lr=0.1)
    held = {name: mp.full_tensor(p).clone() for name, p in pm.named_parameters()}
    saving = mp.checkpoint.save_async(tmp_path / "a", pm) if asynchronous else None
    if saving is None:
        mp.checkpoint.save(tmp_path / "a", pm)
    pm.train_step(**batch)
    optimizer.step()
    if saving is not None:
        saving.wait()
    moved = {name: mp.full_tensor(p).clone() for name, p in pm.named_parameters()}
    assert any(not torch.equal(moved[name], held[name]) for name in held)
    mp.checkpoint.load(tmp_path / "a", pm)
    assert all(torch.equal(mp.full_tensor(p), held[name]) for name, p in pm.named_parameters())
    assert {p.device.type for p in pm.parameters()} == {device.type}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_peak_memory_is_what_a_dry_run_says(recompute: str, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("torch counts the peak of GPUs alone; on CPUs see tests/dry_run")
    batch = batch_of(device, 4, 512)
    model = model_of("llama", device, torch.bfloat16)
    config = mp.ParallelConfig(recompute=recompute)  # type: ignore[arg-type]
    said = mp.dry_run(model, "tp=1", config=config, example=batch)
    pm = mp.parallelize(model, mp.make_mesh("tp=1", "cuda"), example=batch, config=config)
    optimizer = torch.optim.AdamW(pm.parameters())
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        pm.train_step(**batch)
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated()
    assert abs(said.ranks[0].peak / measured - 1) < 0.02, (said.ranks[0], measured)
