"""accelerate's loop over a parallel model trains what one process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import meshpar as mp
from tests.integrations.training import Rows, assert_equal, collate, launched, model, parallel_model, whole
from tests.pool import Pool

BATCH, STEPS, MIDDLE, ACCUMULATED = 4, 20, 10, 2
Result = tuple[list[float], dict[str, torch.Tensor]]


def loop(accelerator: Any, net: Any, step: Any, ranks: int, first: int = 0, last: int = STEPS, start: str = "") -> list[float]:
    """Accumulation, clipping, a schedule (accelerate steps it once for every rank), the rest of an epoch: the losses of all batches."""
    optimizer = torch.optim.AdamW([{"params": net.parameters()}], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 / (1 + (at // ranks) / 10))
    loader = DataLoader(Rows(), batch_size=BATCH // ranks, collate_fn=collate)
    net, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, loader, scheduler)
    if start:
        accelerator.load_state(start)
    done, losses = first * ACCUMULATED, []
    while done < last * ACCUMULATED:
        for batch in accelerator.skip_first_batches(loader, done % len(loader)):
            with accelerator.accumulate(net):
                losses.append(float(step(accelerator, net, batch)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            done += 1
            if done == last * ACCUMULATED:
                break
    return losses


def backward(accelerator: Any, net: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = net(**batch).loss
    accelerator.backward(loss)
    return loss.detach()


def train_step(accelerator: Any, net: Any, batch: Any) -> torch.Tensor:
    found: torch.Tensor = accelerator.train_step(net, **batch)
    return found


def over_mesh(spec: str, folder: str, again: bool = False) -> Result:
    from meshpar.integrations.accelerate import Accelerator

    with launched():
        pm = parallel_model(spec, BATCH)
        accelerator = Accelerator(pm.mesh, cpu=True, gradient_accumulation_steps=ACCUMULATED)
        step, ranks = (train_step if "pp" in spec else backward), mp.data_rank(pm.mesh)[1]
        if again:
            losses = loop(accelerator, pm, step, ranks, MIDDLE, STEPS, folder)
        else:
            losses = loop(accelerator, pm, step, ranks, 0, MIDDLE)
            accelerator.save_state(folder)
        return losses, whole(pm)


@pytest.fixture(scope="module")
def alone() -> Result:
    from accelerate import Accelerator

    with launched():
        net = model()
        losses = loop(Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED), net, backward, 1)
        return losses, {name: value.detach() for name, value in net.named_parameters()}


@pytest.mark.parametrize("specs", [("tp=2", "pp=2")])
def test_a_loop_saved_on_one_mesh_and_resumed_on_another(gloo: Pool, alone: Result, tmp_path: Path, specs: tuple[str, str]) -> None:
    folder = str(tmp_path / "state")
    before = gloo.run(over_mesh, specs[0], folder, world=2, timeout=180)
    after = gloo.run(over_mesh, specs[1], folder, True, world=2, timeout=180)
    for (first, _), (second, parameters) in zip(before, after):
        torch.testing.assert_close(first + second, alone[0], rtol=1e-8, atol=0)
        assert_equal(parameters, alone[1])


def of_data_ranks(spec: str) -> dict[str, Any]:
    """What accelerate calls processes, and gradients of data ranks with batches of different lengths."""
    from meshpar.integrations.accelerate import Accelerator

    with launched():
        pm = parallel_model(spec, BATCH)
        accelerator = Accelerator(pm.mesh, cpu=True, gradient_accumulation_steps=ACCUMULATED)
        rank, ranks = mp.data_rank(pm.mesh)
        own = torch.tensor([[float(rank)]])
        loader = accelerator.prepare(DataLoader(Rows(10), batch_size=BATCH // ranks, shuffle=True, collate_fn=collate))
        seen = [accelerator.gather_for_metrics(batch["input_ids"][:, :4]) for batch in loader]
        found = {
            "ranks": (accelerator.num_processes, accelerator.process_index),
            "gathered": accelerator.gather(own).flatten().tolist(),
            "sum": accelerator.reduce(own).item(),
            "rows": sorted(map(tuple, torch.cat(seen).tolist())),
            "objects": accelerator.gather_for_metrics([f"rank {rank}"], use_gather_object=True),
        }
        if dist.get_rank() == 1:
            accelerator.set_trigger()
        return {**found, "trigger": accelerator.check_trigger()}


@pytest.mark.slow
def test_processes_are_data_ranks(gloo: Pool) -> None:
    rows = sorted(tuple(Rows()[i]["input_ids"][:4].tolist()) for i in range(10))
    for rank, found in enumerate(gloo.run(of_data_ranks, "dp=2,tp=2", world=4, timeout=120)):
        assert found["ranks"] == (2, rank // 2) and found["gathered"] == [0.0, 1.0] and found["sum"] == 1.0
        assert found["rows"] == rows and found["objects"] == ["rank 0", "rank 1"] and found["trigger"]


REFUSED = {
    "plain": "meshpar.integrations",
    "bf16": 'precision="bf16"',
    "state": "save_state",
    "model": "mp.parallelize",
    "dispatch": "every data rank reads its own",
    "sampler": "ranks that share a batch must be given the same one in every step",
}


def refused() -> dict[str, str]:
    with launched():
        pm, told = parallel_model("tp=2", BATCH), {}
        for case in REFUSED:
            with launched():
                try:
                    told[case] = str(_asked(case, pm))
                except mp.MeshparError as error:
                    told[case] = str(error)
        return told


def _asked(case: str, pm: Any) -> Any:
    import accelerate

    from meshpar.integrations.accelerate import Accelerator

    if case == "plain":
        return accelerate.Accelerator(cpu=True).prepare(pm, torch.optim.SGD(pm.parameters(), lr=0.1))
    if case == "bf16":
        return Accelerator(pm.mesh, cpu=True, mixed_precision="bf16").prepare(pm)
    if case == "state":
        return Accelerator(pm.mesh, cpu=True).get_state_dict(pm)
    if case == "model":
        return Accelerator(pm.mesh, cpu=True).prepare(model())
    if case == "dispatch":
        return Accelerator(pm.mesh, cpu=True, dataloader_config=accelerate.utils.DataLoaderConfiguration(dispatch_batches=True))
    rows = [torch.tensor([float(dist.get_rank()), i]) for i in range(8)]  # each rank reads rows of its own
    return list(Accelerator(pm.mesh, cpu=True).prepare(DataLoader(rows, batch_size=2)))  # type: ignore[arg-type]


def test_what_is_refused(gloo: Pool) -> None:
    for told in gloo.run(refused, world=2, timeout=120):
        for case, words in REFUSED.items():
            assert words in told[case], case
