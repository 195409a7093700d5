"""Lightning: strategies for Fabric and for the Trainer that read data by data rank, and save for any mesh.

    mesh = mp.make_mesh("dp=2,tp=2")                                           # under torchrun
    fabric = Fabric(strategy=FabricStrategy(mesh), devices=4)
    fabric.launch()
    pm, optimizer = fabric.setup(pm, optimizer)
    loader = fabric.setup_dataloaders(loader)                                  # the loader as for one process, batches of a data rank

    class Module(LightningModule):
        def __init__(self, pm): super().__init__(); self.pm = pm               # every parameter is in one parallel model
        def training_step(self, batch, _): return self.pm(**batch).loss

    Trainer(strategy=TrainerStrategy(mesh), devices=4, use_distributed_sampler=True).fit(Module(pm), loader)

Over a pipeline the Trainer takes manual optimization and `pm.train_step(**batch)`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.pytorch.strategies import DDPStrategy as TrainerDDP
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshpar import checkpoint
from meshpar._torch import resolve_process_group
from meshpar.errors import ConfigError, raise_all
from meshpar.integrations.batches import agreed, agreeing
from meshpar.mesh import check_mesh, data_axis, data_rank
from meshpar.runtime.model import ParallelModel
from meshpar.runtime.parameters.gradients import clip_grad_norm_

RUN, REST = "meshpar", "rest.pt"
"""Inside of a checkpoint's folder: model and optimizer in parts, and what else Lightning keeps."""
_DTYPES: Mapping[str, torch.dtype] = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


class MeshEnvironment(ClusterEnvironment):
    """Processes as they are: those of the job's process group, whoever started them."""

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 0

    @staticmethod
    def detect() -> bool:
        """Whether there is a process group."""
        return dist.is_initialized()

    def world_size(self) -> int:
        """Of the process group."""
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        """Raise ConfigError where Lightning counts other processes."""
        if size != dist.get_world_size():
            raise ConfigError(
                f"Lightning counts {size} processes (devices x num_nodes), and this job has {dist.get_world_size()}: say devices="
                f"{os.environ.get('LOCAL_WORLD_SIZE', dist.get_world_size())} and num_nodes= as they were started."
            )

    def global_rank(self) -> int:
        """Of the process group."""
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        """It is what it is."""

    def local_rank(self) -> int:
        """What the launcher said, on one machine the global rank."""
        return int(os.environ.get("LOCAL_RANK", dist.get_rank()))

    def node_rank(self) -> int:
        """What the launcher said, on one machine 0."""
        return int(os.environ.get("GROUP_RANK", 0))


class _OverMesh:
    """What both strategies do by data ranks."""

    mesh: DeviceMesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks that share a batch read the same samples."""
        rank, ranks = data_rank(self.mesh)
        return {"num_replicas": ranks, "rank": rank}

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """The values of all data ranks."""
        axis = data_axis(self.mesh)
        if not _everyone(group):
            return super().all_gather(tensor, group, sync_grads)  # type: ignore[misc]
        if axis.size == 1:
            return tensor.unsqueeze(0)
        return super().all_gather(tensor, resolve_process_group(axis.group), sync_grads)  # type: ignore[misc]

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """All ranks, or any."""
        said = torch.tensor(int(decision), device=self.mesh.device_type)
        dist.all_reduce(said, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(said)

    def _of_data_ranks(self, tensor: Any, group: Any, op: Any, reduce: Any) -> Any:
        axis = data_axis(self.mesh)
        if not _everyone(group) or not isinstance(tensor, torch.Tensor):
            return reduce(tensor, group, op)
        return tensor if axis.size == 1 else reduce(tensor, resolve_process_group(axis.group), op)


def _everyone(group: Any) -> bool:
    """Whether Lightning means all processes."""
    return group is None or group is dist.group.WORLD


def check_module(module: nn.Module, precision: str) -> ParallelModel:
    """The parallel model in a module. Raises ConfigError unless there is one, with all parameters, in the precision that is asked for."""
    found = [m for m in module.modules() if isinstance(m, ParallelModel)]
    if len(found) != 1:
        raise ConfigError(
            f"{type(module).__name__} holds {len(found)} parallel models: pm = mp.parallelize(model, mesh, example=batch), one."
        )
    own = {id(p) for p in nn.Module.parameters(found[0])}
    raise_all(ConfigError, "Lightning over a parallel model:", [*_complaints(module, found[0], own, precision)])
    return found[0]


def _complaints(module: nn.Module, pm: ParallelModel, own: set[int], precision: str) -> Iterator[str]:
    outside = [name for name, p in module.named_parameters() if id(p) not in own]
    if outside:
        yield f"{', '.join(outside[:5])}: outside of the parallel model, every rank would train its own. Parallelize all in one model."
    has = pm.parallel_config.precision.compute_dtype
    if precision not in ("32-true", "64-true") and _DTYPES.get(precision) != (has or next(iter(pm.parameters())).dtype):
        yield (
            f'precision="{precision}": precision belongs to parallelize, config=mp.ParallelConfig(precision="bf16"); the model computes '
            f"in {has or 'the dtype of its parameters'}."
        )


class _NoSync(_BackwardSyncControl):
    """Gradients add up without more ado."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()


class FabricStrategy(_OverMesh, FabricDDP):
    """Fabric's strategy for parallel models on `mesh`.

    >>> fabric = Fabric(strategy=FabricStrategy(mesh), devices=4)                                     # doctest: +SKIP
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        check_mesh(mesh)
        super().__init__(cluster_environment=MeshEnvironment())
        self.mesh, self._backward_sync_control = mesh, _NoSync()

    def setup_module(self, module: nn.Module) -> nn.Module:
        """The module as it is, once it is fit."""
        check_module(module, self.precision.precision)
        return module

    def module_to_device(self, module: nn.Module) -> None:
        """Parallel models are where they are."""

    def process_dataloader(self, dataloader: Any) -> Any:
        """A loader whose batches are compared between ranks and padded to one length."""
        return agreeing(dataloader, lambda batch: agreed(batch, self.mesh))

    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The mean or sum over data ranks."""
        return self._of_data_ranks(tensor, group, reduce_op, super().all_reduce)

    def clip_gradients_norm(
        self, module: nn.Module, optimizer: Any, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = True
    ) -> torch.Tensor:
        """`mp.clip_grad_norm_`."""
        return clip_grad_norm_(nn.Module.parameters(module), max_norm, norm_type, error_if_nonfinite, mesh=self.mesh)

    def save_checkpoint(self, path: Any, state: dict[str, Any], storage_options: Any = None, filter: Any = None) -> None:
        """A folder with the model, the optimizer and the rest of `state`, for any mesh. Collective."""
        module, optimizer, rest = _divided(state)
        if storage_options is not None or filter is not None:
            raise ConfigError("storage_options= and filter= are not taken: mp.checkpoint.save has disk= and writes whole runs.")
        _save(Path(self.broadcast(path)), check_module(module, "32-true"), optimizer, rest)

    def load_checkpoint(self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill model and optimizer of `state`, saved on any mesh; what else was saved is put into it. Collective."""
        module, optimizer, rest = _divided(state if isinstance(state, dict) else {"model": state})
        saved = _load(Path(self.broadcast(path)), check_module(module, "32-true"), optimizer)
        for name in rest:
            if name not in saved:
                raise ConfigError(f"{path} holds no {name}; it holds {', '.join(saved) or 'nothing'} beside model and optimizer.")
            state[name] = saved.pop(name)
        return saved


class TrainerStrategy(_OverMesh, TrainerDDP):
    """The Trainer's strategy for a LightningModule whose parameters are all in one parallel model on `mesh`.

    >>> Trainer(strategy=TrainerStrategy(mesh), devices=4).fit(module, loader)                        # doctest: +SKIP
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        check_mesh(mesh)
        super().__init__(cluster_environment=MeshEnvironment())
        self.mesh = mesh

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Model and optimizer are filled where they are."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The checkpoint fills it."""
        return False

    def setup(self, trainer: Any) -> None:
        """The module as it is, once it is fit; its optimizers."""
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self._pm = check_module(self.model, str(self.precision_plugin.precision))
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def model_to_device(self) -> None:
        """Parallel models are where they are."""

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """The batch, compared between ranks and padded to one length."""
        return super().batch_to_device(agreed(batch, self.mesh), device, dataloader_idx)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The mean or sum over data ranks."""
        return self._of_data_ranks(tensor, group, reduce_op, super().reduce)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: `save_checkpoint` writes parts."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: `save_checkpoint` writes parts."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """`load_checkpoint` did."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """`load_checkpoint` did."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder with the model, the optimizer and the Trainer's own state, for any mesh. Collective."""
        _save(Path(self.broadcast(filepath)), self._pm, self._own_optimizer(), checkpoint)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill model and optimizer from a checkpoint of any mesh; returns the Trainer's own state. Collective."""
        return _load(Path(self.broadcast(checkpoint_path)), self._pm, self._own_optimizer())

    def _own_optimizer(self) -> Any:
        if len(self.optimizers) > 1:
            raise ConfigError(f"{len(self.optimizers)} optimizers: checkpoints of a parallel model hold one. Make groups of one instead.")
        return self.optimizers[0] if self.optimizers else None


def _divided(state: Mapping[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer | None, dict[str, Any]]:
    """The module, the optimizer, and everything else of a state."""
    modules = [value for value in state.values() if isinstance(value, nn.Module)]
    optimizers = [value for value in state.values() if isinstance(value, torch.optim.Optimizer)]
    if len(modules) != 1 or len(optimizers) > 1:
        raise ConfigError(
            f"a checkpoint holds one parallel model and one optimizer at most: these are {len(modules)} and {len(optimizers)}."
        )
    rest = {name: value for name, value in state.items() if not isinstance(value, (nn.Module, torch.optim.Optimizer))}
    return modules[0], next(iter(optimizers), None), rest


def _save(path: Path, pm: ParallelModel, optimizer: Any, rest: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        torch.save(rest, path / REST)
    dist.barrier()
    checkpoint.save(path / RUN, pm, optimizer)


def _load(path: Path, pm: ParallelModel, optimizer: Any) -> dict[str, Any]:
    if not (path / RUN).is_dir():
        raise ConfigError(f"{path} was not saved by a strategy of meshpar: its weights load with pm.load_state_dict(...).")
    if optimizer is None:
        checkpoint.load(path / RUN, pm, unexpected="skip")
    else:
        checkpoint.load(path / RUN, pm, optimizer)
    found: dict[str, Any] = torch.load(path / REST, map_location="cpu", weights_only=False)
    return found


__all__ = ["FabricStrategy", "MeshEnvironment", "TrainerStrategy", "check_module"]
