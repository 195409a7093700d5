"""transformers' Trainer, or any subclass of it, over a parallel model: `parallel(Trainer)` is that Trainer, with one more line.

    from meshpar.integrations.transformers import parallel

    pm = mp.parallelize(model, mesh, example=batch, config=mp.ParallelConfig(precision="bf16"))
    trainer = parallel(Trainer)(model=pm, args=TrainingArguments(..., bf16=True), train_dataset=dataset)
    trainer.train(resume_from_checkpoint=True)               # a checkpoint of any mesh

`per_device_train_batch_size` counts samples of a data rank. Losses, gradients, norms and logs are those of one process that is given the
global batch: with `num_items_in_batch`, the mean over all labels of all accumulated batches of all data ranks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from meshpar import checkpoint
from meshpar.errors import ConfigError, raise_all
from meshpar.integrations.accelerate import Accelerator, export
from meshpar.mesh import data_rank
from meshpar.runtime.model import ParallelModel
from meshpar.runtime.parameters.gradients import clip_grad_norm_

RUN, WEIGHTS = "meshpar", "meshpar-weights"
"""Folders inside of `checkpoint-N`: a whole run, or (save_only_model) the model alone."""
_RECOMPUTING = ("activation_checkpointing", "gradient_checkpointing")


def parallel(trainer: type) -> type:
    """The class of a trainer whose model is a parallel one. Raises ConfigError for classes that are no Trainer of transformers.

    >>> trainer = parallel(Trainer)(model=pm, args=args, train_dataset=dataset)                       # doctest: +SKIP
    """
    if not (isinstance(trainer, type) and issubclass(trainer, transformers.Trainer)):
        raise ConfigError(f"parallel takes a class, transformers.Trainer or one made of it, not {trainer!r}.")
    if any(base.__module__.partition(".")[0] == "trl" for base in trainer.__mro__) and not issubclass(trainer, OverMesh):
        raise ConfigError(
            f"{trainer.__name__}: TRL's trainers compute losses of their own. SFTTrainer is there as meshpar.integrations.trl.SFTTrainer, "
            f"to be subclassed too; of the others none is."
        )
    return trainer if issubclass(trainer, OverMesh) else type(trainer.__name__, (OverMesh, trainer), {"__module__": trainer.__module__})


class OverMesh:
    """What is different about a Trainer of a parallel model, mixed into its class by `parallel`.

    While it is made, the Trainer looks at the model that was parallelized (its signature, labels, loss); then it trains the parallel one.
    """

    args: Any
    model: Any

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **named: Any) -> None:
        if not isinstance(model, ParallelModel):
            raise ConfigError(
                f"model= is {type(model).__name__}: pm = mp.parallelize(model, mesh, example=batch) first, then model=pm. (model_init and "
                f"names of models are not taken.)"
            )
        check_arguments(model, args, named)
        self._parallel = model
        original = model.original_module
        before = dict(original.__dict__)
        super().__init__(original, args, *others, **named)  # type: ignore[call-arg]
        original.__dict__.update(before)
        for name in [n for n in original.__dict__ if n not in before]:
            del original.__dict__[name]  # what a trainer puts into the model is no part of the program
        self._set_signature_columns_if_needed()  # type: ignore[attr-defined]
        if self.model is not original:
            raise ConfigError(
                f"{type(self).__name__} wraps or replaces its model: do so before mp.parallelize (adapters, new tokens, quantisation)."
            )
        self.model = self.model_wrapped = self.callback_handler.model = model  # type: ignore[attr-defined]
        for name in _RECOMPUTING:  # as parallelize does
            if getattr(self.args, name, False):
                setattr(self.args, name, False)
        if self.label_smoother is not None and not self.model_accepts_loss_kwargs:  # type: ignore[attr-defined]
            raise ConfigError("label_smoothing_factor: labels of this model are not counted, so that ranks cannot be weighed by them.")

    # -- where data ranks are meant --------------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's accelerator, by data ranks."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.accelerator = Accelerator.adopt(self.accelerator, self._parallel.mesh, agrees=False)  # type: ignore[has-type]
        gather = self.accelerator.gather_for_metrics
        self.gather_function = partial(gather, use_gather_object=self.args.eval_use_gather_object)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples of a step."""
        return int(self._train_batch_size * args.gradient_accumulation_steps * data_rank(self._parallel.mesh)[1])  # type: ignore[attr-defined]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of a step, compared between ranks and padded to one length on all data ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        batches = [self.accelerator.agreed(batch) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """A batch of evaluation, compared between ranks."""
        return super().prediction_step(model, self.accelerator.agreed(inputs), prediction_loss_only, ignore_keys)  # type: ignore[misc]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Labels that count, of all data ranks and accumulated batches, as a number of the global batch."""
        with self._averaged(False):
            own = super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        return own if own is None else self.accelerator.reduce(torch.as_tensor(own, device=device))

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.train_sampling_strategy == "batch_rebalance":
            raise ConfigError('train_sampling_strategy="batch_rebalance" gives ranks unequal numbers of samples: take another one.')
        sampler = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        self._say_repeated(sampler)
        return sampler

    def _say_repeated(self, sampler: Any) -> None:
        size = self._train_batch_size * data_rank(self._parallel.mesh)[1]  # type: ignore[attr-defined]
        left = 0 if sampler is None or self.args.dataloader_drop_last else len(sampler) % size
        if left and data_rank(self._parallel.mesh)[1] > 1:
            warnings.warn(
                f"{len(sampler)} samples are not a whole number of global batches ({size}): the last one of an epoch is filled up with "
                f"{size - left} samples of its beginning, which count twice then. dataloader_drop_last=True leaves it out.",
                stacklevel=2,
            )

    # -- losses ----------------------------------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The model's own loss is that of the global batch already; one computed of outputs is scaled as in any data parallelism."""
        return self.scaled_loss(super().compute_loss.__func__, model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]

    def scaled_loss(self, compute: Any, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Any:
        """What a Trainer's `compute_loss` returns: a loss whose gradients, averaged over data ranks, are those of the global batch."""
        outside = self.compute_loss_func is not None or self.label_smoother is not None  # type: ignore[attr-defined]
        with self._averaged(outside):
            return compute(self, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

    @contextmanager
    def _averaged(self, by_trainer: bool) -> Iterator[None]:
        """Whether the Trainer multiplies a loss by the number of data ranks, whose mean is taken afterwards."""
        average, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, by_trainer
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = average

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Over a pipeline: a step of its schedule. Elsewhere the Trainer's own, with whatever loss it computes."""
        if self._parallel.schedule is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        model.train()
        inputs, counted = self._prepare_inputs(inputs), self.model_accepts_loss_kwargs and num_items_in_batch is not None  # type: ignore[attr-defined]
        scale = 1.0 if counted else 1.0 / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        more = {"num_items_in_batch": num_items_in_batch} if counted else {}
        loss = model.scaled_step(None, torch.tensor(scale, dtype=torch.float64), (), {**inputs, **more})
        return loss.detach() * scale

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return clip_grad_norm_(model.parameters(), math.inf) if grad_norm is None else grad_norm

    # -- what is asked of the model that was parallelized ----------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weights that decay, by the kinds of the model's own layers."""
        return list(super().get_decay_parameter_names(self._parallel.original_module))  # type: ignore[misc]

    def floating_point_ops(self, inputs: Any) -> float:
        """Of this data rank's batch, a share for each rank that has it."""
        count = getattr(self._parallel.original_module, "floating_point_ops", None)
        copies = self._parallel.mesh.size() // data_rank(self._parallel.mesh)[1]
        return 0.0 if count is None else float(count(inputs)) / copies

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Parallel models are where they are."""

    # -- checkpoints -----------------------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A folder that `from_pretrained` loads. Collective. (Checkpoints within training hold the run in parts, for any mesh.)"""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        self._save_around(folder)
        if not _internal_call:
            export(self._parallel, folder)
        elif self.args.save_only_model:
            checkpoint.save(folder / WEIGHTS, self._parallel)

    def _save_around(self, folder: Path) -> None:
        """The small files beside the weights."""
        if not self.args.should_save:
            return
        config = getattr(self._parallel.original_module, "config", None)
        holders = (config, self.processing_class or getattr(self.data_collator, "tokenizer", None))  # type: ignore[attr-defined]
        for holder in holders:
            if callable(save := getattr(holder, "save_pretrained", None)):
                save(str(folder))
        torch.save(self.args, folder / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoint.save(Path(output_dir) / RUN, self._parallel, self._own_optimizer(), scheduler=self.lr_scheduler)  # type: ignore[attr-defined]

    def _own_optimizer(self) -> torch.optim.Optimizer:
        """Not accelerate's wrapper of it."""
        made: Any = self.optimizer  # type: ignore[attr-defined]
        found: torch.optim.Optimizer = getattr(made, "optimizer", made)
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights; what else belongs to a run comes when the optimizer is made."""
        folder = Path(resume_from_checkpoint)
        names = [name for name in (RUN, WEIGHTS) if (folder / name).is_dir()]
        if not names:
            raise ConfigError(
                f"{folder} has neither {RUN} nor {WEIGHTS}: it was saved by a Trainer without a parallel model. Its weights load with "
                f"mp.parallelize(..., weights={str(folder)!r})."
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*were saved and are not asked for.*")
            checkpoint.load(folder / names[0], self._parallel, unexpected="skip")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (Path(checkpoint) / RUN).is_dir():
            _load_run(Path(checkpoint) / RUN, self._parallel, self._own_optimizer(), self.lr_scheduler)  # type: ignore[attr-defined]

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)  # type: ignore[attr-defined]


def _load_run(path: Path, model: ParallelModel, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    checkpoint.load(path, model, optimizer, scheduler=scheduler)


def check_arguments(model: ParallelModel, args: Any, named: dict[str, Any]) -> None:
    """Raise ConfigError for arguments of a Trainer that parallelize has in their place."""
    raise_all(ConfigError, "a Trainer of a parallel model:", [*_complaints(model, args, named)])


def _complaints(model: ParallelModel, args: Any, named: dict[str, Any]) -> Iterator[str]:
    if named.get("model_init") is not None:
        yield "model_init makes a new model: parallelize one, and give model=pm."
    if named.get("peft_config") is not None or named.get("quantization_config") is not None:
        yield "peft_config and quantization_config change the model: get_peft_model(model, config) comes before mp.parallelize."
    if any(getattr(args, name, False) for name in _RECOMPUTING) and model.parallel_config.recompute == "none":
        yield (
            'gradient_checkpointing is what parallelize does: config=mp.ParallelConfig(recompute="full"), or '
            "gradient_checkpointing=False to keep everything (SFTConfig asks for it unasked)."
        )
    named_ones: Sequence[str] = ("fsdp", "deepspeed", "torch_compile", "auto_find_batch_size", "use_liger_kernel", "neftune_noise_alpha")
    if asked := [name for name in named_ones if getattr(args, name, None)]:
        yield f"{', '.join(asked)}: not with a parallel model, whose axes, program and batch are those of parallelize. Leave it out."
    outside = [name for name in ("compute_loss_func",) if named.get(name) is not None]
    outside += ["label_smoothing_factor"] if getattr(args, "label_smoothing_factor", 0) else []
    if outside and model.schedule is not None:
        yield (
            f"{', '.join(outside)}: over a pipeline the loss is computed by the last stage: parallelize(..., loss_fn=lambda output, "
            f"batch: ...)."
        )


__all__ = ["OverMesh", "parallel"]
