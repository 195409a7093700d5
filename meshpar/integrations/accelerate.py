"""accelerate's loop over a parallel model: an Accelerator that reads data by data rank, and leaves the model as parallelize made it.

    mesh = mp.make_mesh("dp=2,tp=2")
    pm = mp.parallelize(model, mesh, example=batch)
    accelerator = Accelerator(mesh, gradient_accumulation_steps=4)
    pm, optimizer, loader = accelerator.prepare(pm, optimizer, loader)       # the loader as for one process
    for batch in loader:
        with accelerator.accumulate(pm):
            loss = accelerator.train_step(pm, **batch)                       # or accelerator.backward(pm(**batch).loss), without pp
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(pm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

Where accelerate speaks of processes (the cut of the data, `gather`, `num_processes`, how often a scheduler steps) it means data ranks here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from accelerate.scheduler import AcceleratedScheduler
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader

from meshpar import checkpoint
from meshpar.errors import ConfigError, raise_all
from meshpar.integrations.batches import PADDING, agreed, agreeing
from meshpar.mesh import check_mesh, data_rank, data_ranks
from meshpar.runtime.model import ParallelModel
from meshpar.runtime.parameters.gradients import clip_grad_norm_

_DTYPES = {"bf16": torch.bfloat16, "no": None}


class Accelerator(accelerate.Accelerator):
    """accelerate's Accelerator for parallel models on `mesh`; its other arguments are accelerate's.

    `padding`: name in a batch -> value, for batches of different lengths on data ranks (`meshpar.integrations.batches`). Raises ConfigError
    for what `parallelize` does in its place (fp16, plugins that shard, dispatch_batches).

    >>> accelerator = Accelerator(mesh, gradient_accumulation_steps=4)                                # doctest: +SKIP
    """

    mesh: DeviceMesh
    padding: Mapping[str, int]
    agrees: bool
    """Whether its loaders compare batches; a trainer may do so itself."""

    def __init__(self, mesh: DeviceMesh, *, padding: Mapping[str, int] | None = None, **options: Any) -> None:
        check_mesh(mesh)
        super().__init__(**options)
        self._take(mesh, padding, True)

    @classmethod
    def adopt(cls, made: accelerate.Accelerator, mesh: DeviceMesh, *, agrees: bool = True) -> Accelerator:
        """An Accelerator that another tool made, for a parallel model."""
        new = object.__new__(cls)
        new.__dict__ = made.__dict__
        new._take(mesh, None, agrees)
        return new

    def _take(self, mesh: DeviceMesh, padding: Mapping[str, int] | None, agrees: bool) -> None:
        self.mesh, self.padding, self.agrees = mesh, {**PADDING, **(padding or {})}, agrees
        raise_all(ConfigError, "accelerate over a parallel model:", [*self._complaints()])

    def _complaints(self) -> Iterator[str]:
        if self.state.num_processes != dist.get_world_size():
            yield (
                f"accelerate sees {self.state.num_processes} processes, and this job has {dist.get_world_size()}: start it with torchrun "
                f"or accelerate launch, and on CPUs say cpu=True (TrainingArguments: use_cpu=True)."
            )
        plugins = [n for n in ("fsdp_plugin", "deepspeed_plugin", "megatron_lm_plugin") if getattr(self.state, n, None) is not None]
        plugins += ["parallelism_config"] if self.parallelism_config is not None and self.parallelism_config.total_size > 1 else []
        if plugins:
            yield f"{', '.join(plugins)}: the axes of the mesh, and ParallelConfig(data_parallel=), divide the model already."
        if self.mixed_precision not in _DTYPES:
            yield (
                f'mixed_precision="{self.mixed_precision}" is not supported by this loop: parallelize(..., precision="bf16"), or steps '
                f"written by hand with mp.GradScaler."
            )
        if self.dispatch_batches:
            yield "dispatch_batches=True sends batches to ranks by global rank: leave it out, every data rank reads its own."
        if str(self.state.dynamo_plugin.backend).rpartition(".")[2] not in ("NO", "no"):
            yield "torch.compile of the whole model: leave dynamo_backend (torch_compile) out."

    # -- data ranks ------------------------------------------------------------------------------------------------------------------------

    @property
    def num_processes(self) -> int:
        """The number of data ranks."""
        return data_rank(self.mesh)[1]

    @property
    def process_index(self) -> int:
        """This process's data rank: the same on ranks that share a batch."""
        return data_rank(self.mesh)[0]

    def prepare_data_loader(self, data_loader: DataLoader, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None) -> Any:
        """The share of this data rank of a loader that is written for one process: the same batches on ranks that share them."""
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return super().prepare_data_loader(data_loader)
        rank, ranks = data_rank(self.mesh)
        worker = data_loader.worker_init_fn
        if isinstance(worker, partial) and "rank" in worker.keywords:  # workers of ranks that share a batch are seeded alike
            data_loader.worker_init_fn = partial(worker, rank=rank)
        prepared = prepare_data_loader(
            data_loader,
            self.device,
            num_processes=ranks,
            process_index=rank,
            split_batches=self.split_batches,
            put_on_device=self.device_placement if device_placement is None else device_placement,
            rng_types=[*dict.fromkeys([*self.rng_types, "torch"])],  # what samplers and collators draw is one process's on all ranks
            dispatch_batches=False,
            even_batches=self.even_batches,
            use_seedable_sampler=self.use_seedable_sampler,
            data_seed=self.dataloader_config.data_seed,
            non_blocking=self.non_blocking,
            use_stateful_dataloader=self.use_stateful_dataloader,
        )
        self._agreeing(prepared)
        self._dataloaders.append(prepared)
        return prepared

    def skip_first_batches(self, dataloader: DataLoader, num_batches: int = 0) -> Any:
        """As accelerate's: the rest of an epoch."""
        return self._agreeing(super().skip_first_batches(dataloader, num_batches))

    def _agreeing(self, loader: Any) -> Any:
        if self.agrees and isinstance(loader, DataLoaderShard):
            agreeing(loader, self.agreed)
        return loader

    def agreed(self, batch: Any) -> Any:
        """A batch that was compared with those of the other ranks, padded to the longest. Collective."""
        return agreed(batch, self.mesh, self.padding)

    def gather(self, tensor: Any) -> Any:
        """The values of all data ranks, concatenated: those of ranks that share a batch once."""
        return accelerate.utils.recursively_apply(self._of_data_ranks, super().gather(tensor))

    def _of_data_ranks(self, gathered: torch.Tensor) -> torch.Tensor:
        parts = gathered.chunk(dist.get_world_size())
        return torch.cat([parts[rank] for rank in self._firsts()]) if len(parts) > 1 else gathered

    def _firsts(self) -> list[int]:
        """One global rank of every data rank, in their order."""
        firsts = {index: rank for rank, index in sorted(data_ranks(self.mesh).items(), reverse=True)}
        return [firsts[index] for index in range(self.num_processes)]

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As accelerate's, of data ranks: what a loader repeated to fill its last batch is left out."""
        tensors = isinstance(input_data, torch.Tensor) or not use_gather_object
        if not tensors or use_gather_object:
            rows: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(rows, input_data)
            found = [one for rank in self._firsts() for one in (rows[rank] if isinstance(rows[rank], (list, tuple)) else [rows[rank]])]
            left = self.gradient_state.remainder if self.gradient_state.end_of_dataloader else 0
            return found[:left] if left > 0 else found
        return super().gather_for_metrics(input_data)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The sum or mean over data ranks."""
        if reduction not in ("sum", "mean"):
            return super().reduce(tensor, reduction, scale)
        return accelerate.utils.recursively_apply(lambda one: self._reduced(one, reduction) * scale, tensor)

    def _reduced(self, one: torch.Tensor, reduction: str) -> torch.Tensor:
        rows = self.gather(one.unsqueeze(0))
        return rows.sum(0) if reduction == "sum" else rows.mean(0, dtype=one.dtype if one.is_floating_point() else torch.float32)

    def check_trigger(self) -> bool:
        """Whether any rank set its trigger."""
        set_here: torch.Tensor | None = self.__dict__.get("flag_tensor")
        flag = torch.tensor(0, device=self.device) if set_here is None else set_here
        rows = super().gather(flag.unsqueeze(0))
        self.flag_tensor = torch.zeros_like(flag) if bool(rows.any()) else flag
        return bool(rows.any())

    # -- model, optimizer, steps -----------------------------------------------------------------------------------------------------------

    def prepare_model(self, model: torch.nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        """The parallel model as it is. Any other model is prepared for evaluation only."""
        if not isinstance(model, ParallelModel):
            if not evaluation_mode and any(p.requires_grad for p in model.parameters()):
                raise ConfigError(
                    f"a {type(model).__name__} is not a parallel model: pm = mp.parallelize(model, mesh, example=batch) first."
                )
            return super().prepare_model(model, device_placement, evaluation_mode=True)
        wanted, has = _DTYPES[self.mixed_precision], model.parallel_config.precision.compute_dtype
        if wanted is not None and wanted != has:
            raise ConfigError(
                f'mixed precision "{self.mixed_precision}" is asked for here (bf16=True of training arguments), and the parallel model '
                f'computes in {has or "the dtype of its parameters"}: parallelize(..., config=mp.ParallelConfig(precision="bf16")).'
            )
        if model not in self._models:
            self._models.append(model)
        model.__dict__["_is_accelerate_prepared"] = True
        return model

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> Any:
        """Stepped when gradients of all accumulated batches are there; its state is where the parameters are."""
        return super().prepare_optimizer(optimizer, device_placement=False)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """Stepped once for each data rank, as accelerate's is for each process."""
        prepared = super().prepare_scheduler(scheduler)
        if isinstance(prepared, AcceleratedScheduler):
            prepared.__class__ = _Scheduler
            prepared.meshpar_steps = self.num_processes
        return prepared

    def train_step(self, model: ParallelModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward on every mesh, pipelines too; gradients are divided by the number of accumulated batches. Returns the loss.

        The loss is that of the global batch, the same on every rank.
        """
        scale = torch.tensor(1.0 / self.gradient_accumulation_steps, dtype=torch.float64)
        return model.scaled_step(None, scale, args, kwargs)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        """`mp.clip_grad_norm_`: the norm of all gradients on the mesh."""
        return clip_grad_norm_(parameters, max_norm, norm_type, mesh=self.mesh)

    # -- saving ----------------------------------------------------------------------------------------------------------------------------

    def save_state(self, output_dir: str | None = None, **options: Any) -> str:
        """A checkpoint of the model, the optimizer, the scheduler and what was registered, for any other mesh. Collective.

        Raises ConfigError for more than one of them, and without a folder.
        """
        model, optimizer, scheduler = self._one_of_each(output_dir, options)
        extra = {"step": self.step, "registered": [one.state_dict() for one in self._custom_objects]}
        checkpoint.save(str(output_dir), model, optimizer, scheduler=scheduler, extra=extra)
        return str(output_dir)

    def load_state(self, input_dir: str | None = None, **options: Any) -> None:
        """What `save_state` saved, on this mesh. Collective."""
        model, optimizer, scheduler = self._one_of_each(input_dir, options)
        extra = checkpoint.load(str(input_dir), model, optimizer, scheduler=scheduler)
        self.step = extra["step"]
        for one, state in zip(self._custom_objects, extra["registered"], strict=True):
            one.load_state_dict(state)

    def _one_of_each(self, folder: str | None, options: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        complaints = [f"{len(them)} {what}: one is saved." for what, them in self._prepared().items() if len(them) > 1]
        complaints += [] if self._models else ["no model was prepared."]
        complaints += [] if folder else ["name the folder: save_state(folder)."]
        complaints += [f"{', '.join(options)}: not taken here."] if options else []
        raise_all(ConfigError, "state of a parallel model (mp.checkpoint.save does it by hand):", complaints)
        model, optimizer, scheduler = ((them or [None])[0] for them in self._prepared().values())
        return model, optimizer and optimizer.optimizer, scheduler and scheduler.scheduler

    def _prepared(self) -> dict[str, list[Any]]:
        return {"models": self._models, "optimizers": self._optimizers, "schedulers": self._schedulers}

    def save_model(self, model: torch.nn.Module, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """A folder of safetensors under the model's own names, as `from_pretrained` reads. Collective."""
        export(model, Path(save_directory))

    def get_state_dict(self, model: torch.nn.Module, unwrap: bool = True) -> Any:
        """Raise ConfigError: no rank holds the whole model."""
        raise ConfigError(
            "no rank holds the whole of a parallel model: accelerator.save_model(pm, folder) writes what from_pretrained loads, "
            "accelerator.save_state(folder) a checkpoint of the run; mp.full_tensor(parameter) is one whole parameter."
        )


class _Scheduler(AcceleratedScheduler):
    """A scheduler that steps as often as there are data ranks."""

    meshpar_steps: int
    split_batches: bool

    def step(self, *args: Any, **kwargs: Any) -> None:
        if self.split_batches or not self.step_with_optimizer:
            return super().step(*args, **kwargs)
        self.split_batches = True
        try:
            for _ in range(self.meshpar_steps):
                total = getattr(self.scheduler, "total_steps", None)
                if total is None or self.scheduler._step_count <= total:
                    super().step(*args, **kwargs)
        finally:
            self.split_batches = False


def export(model: torch.nn.Module, folder: Path) -> None:
    """Write the files that `from_pretrained` reads, into a folder that may exist. Collective; no rank holds the whole model."""
    made = folder / ".meshpar-export"
    checkpoint.save(made / "run", model)
    if dist.get_rank() == 0:
        checkpoint.to_hf(made / "run", made / "hf")
        for file in sorted((made / "hf").iterdir()):
            file.replace(folder / file.name)
        shutil.rmtree(made)
    dist.barrier()


__all__ = ["Accelerator", "export"]
