"""A loss scale for float16 that all ranks agree on: torch's GradScaler over every axis of the mesh.

float16 gradients underflow, so the loss is multiplied by a scale before backward and gradients are divided by it after; when any of them
overflows, the step is skipped and the scale is halved. On a mesh every rank sees its own shards, samples, experts and stages: whether
anything overflowed must be asked of all of them, or some ranks step while others skip.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshpar._torch import LocalTensor, amp_unscale, maybe_disable_local_tensor_mode, part_here, root_mesh
from meshpar.errors import ConfigError
from meshpar.runtime.model import ParallelModel
from meshpar.runtime.parameters.gradients import group_of


class GradScaler(torch.amp.GradScaler):
    """torch's `GradScaler` for parallel models: found infinities, and with them skipped steps and the scale, are those of the whole mesh.

    `scale` takes the model, whose `train_step` runs forward and backward; everything else is as in torch, `state_dict` too. `unscale_`,
    `step` and `update` are collective over the mesh: all ranks call them, also one without parameters. `device`: where the scale is kept,
    by default the GPU if there is one.

    Raises ConfigError in `unscale_` and `step` when the last `train_step` was not scaled.

        scaler = mp.GradScaler()
        for batch in batches:
            loss = scaler.scale(pm).train_step(**batch)    # the loss itself; gradients are scaled
            scaler.unscale_(optimizer)                     # for clipping; step() does it otherwise
            mp.clip_grad_norm_(pm.parameters(), 1.0)
            scaler.step(optimizer)                         # skipped on all ranks, or on none
            scaler.update()
            optimizer.zero_grad()
    """

    def __init__(self, device: str | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(device or ("cuda" if torch.cuda.is_available() else "cpu"), *args, **kwargs)
        self._models: list[ParallelModel] = []

    def scale(self, outputs: Any) -> Any:
        """The model with scaled steps, `scale(pm).train_step(**batch)`; of a loss from `pm(**batch)`, the loss times the scale."""
        if not isinstance(outputs, ParallelModel):
            return super().scale(outputs)
        if self._enabled and self._scale is None:
            self._lazy_init_scale_growth_tracker(torch.device(outputs.mesh.device_type))
        if not any(outputs is model for model in self._models):
            self._models.append(outputs)
        return ScaledModel(outputs, self, self._scale if self._enabled else None)

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        """Divide this rank's parts, and ask all ranks whether anything was infinite or not a number."""
        self._check_scaled()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [part_here(g) for p in parameters if (g := p.grad) is not None]
        if not allow_fp16 and any(grad.dtype == torch.float16 for grad in grads):
            raise ValueError("Attempting to unscale FP16 gradients.")  # torch's words
        with torch.no_grad():
            for dtype in dict.fromkeys(grad.dtype for grad in grads):
                amp_unscale([grad for grad in grads if grad.dtype == dtype], found_inf, inv_scale)
        _agree(found_inf, self._mesh(parameters))
        return {found_inf.device: found_inf}

    def _check_scaled(self) -> None:
        if any(model.scaled_by is not self for model in self._models):
            raise ConfigError(
                "the last train_step was not scaled, so its gradients must not be divided by the scale. Write "
                "scaler.scale(pm).train_step(**batch)."
            )

    def _mesh(self, parameters: list[torch.Tensor]) -> DeviceMesh | None:
        """The mesh over which ranks agree: that of the models, else the one that the parameters' meshes are part of."""
        meshes = [model.mesh for model in self._models] or [p.device_mesh for p in parameters if isinstance(p, DTensor)]
        if not meshes and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                "this rank's optimizer has no parameters, so the mesh over which ranks agree about the scale is not known, and the others "
                "would wait for this one: use scaler.scale(pm).train_step(**batch)."
            )
        return max((root_mesh(mesh) for mesh in meshes), key=lambda mesh: mesh.size(), default=None)


class ScaledModel:
    """A parallel model whose `train_step` scales gradients."""

    def __init__(self, model: ParallelModel, scaler: GradScaler, scale: torch.Tensor | None) -> None:
        self._model, self._scaler, self._scale = model, scaler, scale

    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`ParallelModel.train_step`: its gradients are multiplied by the scale, the loss it returns is not."""
        if self._scale is None:
            return self._model.train_step(*args, **kwargs)
        return self._model.scaled_step(self._scaler, self._scale, args, kwargs)


def _agree(found_inf: torch.Tensor, mesh: DeviceMesh | None) -> None:
    """What one rank found, all have found."""
    if isinstance(found_inf, LocalTensor):
        with maybe_disable_local_tensor_mode():
            found = torch.stack(list(found_inf._local_tensors.values())).max()
            for each in found_inf._local_tensors.values():
                each.copy_(found)
    elif mesh is not None and mesh.size() > 1:
        dist.all_reduce(found_inf, dist.ReduceOp.MAX, group=group_of(mesh))
