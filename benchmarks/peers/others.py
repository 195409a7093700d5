"""What one would use without meshpar, on two ranks: transformers' own tensor parallelism, FSDP2, DDP, torch's pipeline runtime.

Each as its documentation has it, on the same Llama. `step()` is a forward and a backward, and returns the loss of the whole batch on the
rank that has it; `parameters()` are those of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Batch = dict[str, Tensor]


@dataclass
class Contender:
    """A step, and what it leaves gradients on."""

    step: Callable[[], Tensor | None]
    parameters: Callable[[], Iterator[nn.Parameter]]
    norm: Callable[[], float]
    """Of all gradients."""
    module: nn.Module | None = None
    averages: bool = False
    """Whether a rank's loss is that of its own samples."""

    def clear(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None


def whole_norm(module: nn.Module, *, spread: bool = False) -> Callable[[], float]:
    """The norm of the gradients of a module; `spread`: other ranks have others."""

    def norm() -> float:
        total = torch.zeros((), dtype=torch.float64)
        for parameter in module.parameters():
            if parameter.grad is not None:
                grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                total += grad.double().pow(2).sum()
        if spread:
            dist.all_reduce(total)
        return float(total.sqrt())

    return norm


def _trained(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    def step() -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()
        return loss.detach()

    return step


def own_tensor_parallelism(saved: Path, batch: Batch, dtype: torch.dtype) -> Contender:
    """transformers: the plan that the model comes with."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(saved, distributed_config=DistributedConfig(tp_size=2), dtype=dtype).train()
    return Contender(_trained(model, batch), model.parameters, whole_norm(model))


def fsdp(model: Any, batch: Batch) -> Contender:
    """FSDP2 by hand: every layer a unit, and the rest one."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Contender(_trained(model, batch), model.parameters, whole_norm(model), averages=True)


def ddp(model: nn.Module, batch: Batch) -> Contender:
    wrapped = DistributedDataParallel(model)
    return Contender(_trained(wrapped, batch), wrapped.parameters, whole_norm(wrapped), averages=True)


class Half(nn.Module):
    """The first or the last half of a Llama's layers, and what stands before or after them."""

    def __init__(self, model: Any, last: bool) -> None:
        super().__init__()
        inner, half = model.model, len(model.model.layers) // 2
        self.layers = nn.ModuleList(inner.layers[half:] if last else inner.layers[:half])
        self.rotary = inner.rotary_emb
        self.embed = None if last else inner.embed_tokens
        self.norm, self.head = (inner.norm, model.lm_head) if last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        places = torch.arange(x.shape[1], device=x.device)[None]
        turned = self.rotary(x, places)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=places, position_embeddings=turned, use_cache=False)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def pipeline(model: nn.Module, batch: Batch, microbatches: int) -> Contender:
    """torch.distributed.pipelining on halves cut by hand, 1F1B."""
    rank = dist.get_rank()
    half = Half(model, last=rank == 1)
    stage = PipelineStage(half, rank, 2, torch.device("cpu"))

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    schedule = Schedule1F1B(stage, microbatches, loss_fn=loss_of)

    def step() -> Tensor | None:
        if rank == 0:
            schedule.step(batch["input_ids"])
            return None
        losses: list[Tensor] = []
        schedule.step(target=batch["labels"], losses=losses)
        return torch.stack(losses).mean().detach()

    return Contender(step, half.parameters, whole_norm(half, spread=True), half)
