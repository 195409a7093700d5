"""Lightning's Fabric and Trainer over a parallel model train what one process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import meshpar as mp
from tests.integrations.training import Rows, assert_equal, collate, launched, model, parallel_model, whole
from tests.pool import Pool

BATCH, STEPS, MIDDLE, ACCUMULATED = 4, 20, 10, 2
Parameters = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], Parameters]:
    """Written by hand."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 / (1 + at / 10))
    loader, losses, done = DataLoader(Rows(), batch_size=BATCH, collate_fn=collate), [], 0
    while done < STEPS:
        for index, batch in enumerate(loader):
            loss = net(**batch).loss
            (loss / ACCUMULATED).backward()
            losses.append(loss.item())
            if index % ACCUMULATED == ACCUMULATED - 1:
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                done += 1
                if done == STEPS:
                    break
    return losses, {name: value.detach() for name, value in net.named_parameters()}


def fabric_loop(spec: str, folder: str, again: bool) -> tuple[list[float], Parameters]:
    from lightning.fabric import Fabric

    from meshpar.integrations.lightning import FabricStrategy

    with launched():
        pm = parallel_model(spec, BATCH)
        rank, ranks = mp.data_rank(pm.mesh)
        fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=FabricStrategy(pm.mesh))
        fabric.launch()
        optimizer = torch.optim.AdamW([{"params": pm.parameters()}], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 / (1 + at / 10))
        net, wrapped = fabric.setup(pm, optimizer)
        loader = fabric.setup_dataloaders(DataLoader(Rows(), batch_size=BATCH // ranks, collate_fn=collate))
        state: dict[str, Any] = {"model": net, "optimizer": wrapped, "step": 0, "schedule": scheduler.state_dict()}
        losses: list[float] = []
        if again:
            fabric.load(folder, state)
            scheduler.load_state_dict(state["schedule"])
        done, per_epoch = state["step"], len(loader) // ACCUMULATED
        while done < (STEPS if again else MIDDLE):
            for index, batch in enumerate(loader):
                if index < (done % per_epoch) * ACCUMULATED and index // ACCUMULATED < done % per_epoch:
                    continue
                last = index % ACCUMULATED == ACCUMULATED - 1
                with fabric.no_backward_sync(net, enabled=not last):
                    loss = net(**batch).loss
                    fabric.backward(loss / ACCUMULATED)
                losses.append(loss.item())
                if last:
                    fabric.clip_gradients(net, wrapped, max_norm=0.5)
                    wrapped.step()
                    scheduler.step()
                    wrapped.zero_grad()
                    done += 1
                    if done == (STEPS if again else MIDDLE):
                        break
        mean = fabric.all_reduce(torch.tensor(float(rank)), reduce_op="mean").item()
        assert mean == (ranks - 1) / 2 and fabric.all_gather(torch.tensor(float(rank))).flatten().tolist() == [
            float(i) for i in range(ranks)
        ]
        if not again:
            fabric.save(folder, {**state, "step": done, "schedule": scheduler.state_dict()})
        return losses, whole(pm)


def trainer_module(pm: Any, pipeline: bool, losses: list[float]) -> Any:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.pm, self.automatic_optimization, self.steps = pm, not pipeline, 0

        def training_step(self, batch: Any, index: int) -> Any:
            if self.automatic_optimization:
                loss = self.pm(**batch).loss
                losses.append(loss.item())
                return loss
            loss = self.pm.scaled_step(None, torch.tensor(1 / ACCUMULATED), (), batch)
            losses.append(loss.item())
            if index % ACCUMULATED == ACCUMULATED - 1:
                optimizer, scheduler = self.optimizers(), self.lr_schedulers()
                mp.clip_grad_norm_(self.pm.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            return None

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self.pm(**batch).loss, sync_dist=True)

        def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
            mp.clip_grad_norm_(self.pm.parameters(), 0.5)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW([{"params": self.pm.parameters()}], lr=1e-2)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 / (1 + at / 10))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


def trainer_loop(spec: str, folder: str, again: bool) -> tuple[list[float], Parameters, float]:
    from lightning.pytorch import Trainer

    from meshpar.integrations.lightning import TrainerStrategy

    with launched():
        pm, losses = parallel_model(spec, BATCH), []
        rank, ranks = mp.data_rank(pm.mesh)
        batches = mp.data.batches(48, pm.mesh, global_batch=BATCH, shuffle=False).start(MIDDLE * ACCUMULATED if again else 0)
        loader = DataLoader(Rows(), batch_sampler=batches, collate_fn=collate)  # (Lightning's own sampler shuffles)
        held_out = DataLoader(Rows(8), batch_sampler=mp.data.batches(8, pm.mesh, global_batch=BATCH, shuffle=False), collate_fn=collate)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        more = {} if "pp" in spec else {"accumulate_grad_batches": ACCUMULATED}
        trainer = Trainer(
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=TrainerStrategy(pm.mesh),
            max_steps=STEPS if again else MIDDLE,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            **quiet,
            **more,
        )
        assert trainer.strategy.distributed_sampler_kwargs == {"num_replicas": ranks, "rank": rank}
        module = trainer_module(pm, "pp" in spec, losses)
        trainer.fit(module, loader, held_out, ckpt_path=folder if again else None, weights_only=False)
        if not again:
            trainer.save_checkpoint(folder)
        (tested,) = trainer.validate(module, held_out, verbose=False)
        return losses, whole(pm), tested["val_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("specs", [("tp=2", "dp=2")])
def test_fabric_saved_on_one_mesh_and_resumed_on_another(gloo: Pool, alone: Any, tmp_path: Path, specs: tuple[str, str]) -> None:
    folder = str(tmp_path / "state")
    before = gloo.run(fabric_loop, specs[0], folder, False, world=2, timeout=180)
    after = gloo.run(fabric_loop, specs[1], folder, True, world=2, timeout=180)
    for (first, _), (second, parameters) in zip(before, after):
        torch.testing.assert_close(first + second, alone[0], rtol=1e-8, atol=0)
        assert_equal(parameters, alone[1])


@pytest.mark.parametrize("specs", [("tp=2", "dp=2")])
def test_the_trainer_saved_on_one_mesh_and_resumed_on_another(gloo: Pool, alone: Any, tmp_path: Path, specs: tuple[str, str]) -> None:
    folder = str(tmp_path / "state.ckpt")
    before = gloo.run(trainer_loop, specs[0], folder, False, world=2, timeout=180)
    after = gloo.run(trainer_loop, specs[1], folder, True, world=2, timeout=180)
    for (first, _, _), (second, parameters, tested) in zip(before, after):
        torch.testing.assert_close(first + second, alone[0], rtol=1e-8, atol=0)
        assert_equal(parameters, alone[1])
        assert tested == after[0][2]
