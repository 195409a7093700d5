"""Whether a step can be meant, and what its loss says when it is used like that of a forward."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshpar.errors import BatchError, ConfigError
from meshpar.simulate import is_simulated

LONG = 3.0
"""Seconds that a step takes without a word."""


def check_ranks(simulated: bool) -> None:
    """Raise ConfigError where the ranks that a parallel model was made for are gone."""
    if is_simulated() != simulated:
        raise ConfigError(
            "this parallel model was made inside of `with mp.simulate(...)`, which has ended: its ranks are gone. Run its steps inside, or "
            "read its values there (mp.full_tensor) and load them into the model."
            if simulated
            else "this parallel model belongs to the processes of this job, and `with mp.simulate(...)` is for models made inside of it."
        )
    if not dist.is_initialized():
        raise ConfigError("the process group of this parallel model was destroyed: its steps end before destroy_process_group().")


def check_gradients() -> None:
    """Raise ConfigError where a training step would have no gradients."""
    if not torch.is_grad_enabled():
        raise ConfigError(
            "train_step computes gradients, and they are switched off here (torch.no_grad() or inference_mode()). For the loss alone: "
            "pm.eval_step(**batch)."
        )


def check_trained(loss: torch.Tensor) -> None:
    """Raise ConfigError for a loss that no gradient flows from."""
    if not loss.requires_grad:
        raise ConfigError(
            "the loss depends on no parameter that requires gradients: all are frozen (requires_grad=False), or the model detaches it. "
            "Unfreeze some before parallelize; for the loss alone: pm.eval_step(**batch)."
        )


def check_devices(tensors: list[torch.Tensor], names: tuple[str, ...], mesh: DeviceMesh) -> None:
    """Raise BatchError for a batch on other devices than those of the mesh."""
    wrong = [f"{name} is on {x.device}" for name, x in zip(names, tensors, strict=False) if x.device.type != mesh.device_type]
    if wrong:
        raise BatchError(
            f"the batch: {', '.join(wrong)}; this mesh computes on {mesh.device_type}. Move it first: "
            f'batch = {{name: value.to("{mesh.device_type}") for name, value in batch.items()}}.'
        )


def say_same_samples(data: int) -> None:
    """Warn that the data ranks were given the same samples."""
    warnings.warn(
        f"all {data} data ranks gave the same samples, so that each of them counts {data} times. If this is the global batch, give every "
        f"rank its share: mp.local_batch(batch, mesh); a data loader takes rank and size from mp.data_rank(mesh).",
        stacklevel=2,
    )


def kind_of(tensors: Sequence[torch.Tensor], training: bool) -> str:
    """A batch in few words."""
    shapes = dict.fromkeys(str(list(x.shape)) for x in tensors)
    return f"tensors of shape {', '.join(list(shapes)[:4])} {'in training' if training else 'in evaluation'}"


def say_capture(why: str, seconds: float) -> None:
    """Before a program is made for a step: say so where that takes long."""
    if seconds >= LONG and (not dist.is_initialized() or dist.get_rank() == 0):
        warnings.warn(
            f"the model is captured once more, for {why}: the first time took {seconds:.0f} s. Programs are kept, one for each kind of "
            "batch; batches of few different shapes (padded, or in buckets) need few.",
            stacklevel=2,
        )


class StepLoss(torch.Tensor):
    """The loss of a finished step, and what is computed of it: `backward` explains itself."""

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ConfigError: there is nothing left to do."""
        _explain()


def done(loss: torch.Tensor) -> torch.Tensor:
    """The loss of a finished step."""
    if type(loss) is torch.Tensor:
        return loss.as_subclass(StepLoss)  # type: ignore[no-any-return, unused-ignore]
    loss.backward = _explain  # type: ignore[method-assign]
    return loss


def _explain(*args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigError(
        "this loss is that of a finished step: train_step ran forward and backward, and the gradients are in .grad (an eval_step has "
        "none). Leave .backward() out; a loss over n accumulated steps has gradients n times as large: p.grad /= n before the optimizer's "
        "step; a scale is that of mp.GradScaler. For a loss of your own: loss_fn= of parallelize, or without a pipeline pm(**batch) and "
        "backward from what it returns."
    )
