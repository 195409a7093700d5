"""A model as one rank of a mesh would hold it, without the mesh: to look at its plan, its memory and its code."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch.distributed as dist
from torch import nn

from meshpar._torch import FakeStore
from meshpar.api import parallelize
from meshpar.config import ParallelConfig
from meshpar.errors import ConfigError
from meshpar.mesh import local_batch, make_mesh, parse_mesh
from meshpar.runtime.model import ParallelModel


def explained(
    model: nn.Module,
    batch: Mapping[str, Any] | tuple[Any, ...],
    mesh: str | Mapping[str, int],
    *,
    config: ParallelConfig | None = None,
    rules: Mapping[str, str] | None = None,
) -> ParallelModel:
    """`parallelize(model, mesh)` as rank 0 of a mesh whose other ranks do not exist: to look at, not to run. `batch` is the global batch.

    >>> print(explained(model, batch, "dp=64,tp=8").explain())  # doctest: +SKIP
    """
    if dist.is_initialized():
        raise ConfigError("this process is a rank already: call parallelize and look at what it returns.")
    sizes = parse_mesh(mesh)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=prod(sizes.values()))
    try:
        there = make_mesh(sizes, "cpu")
        return parallelize(model, there, example=local_batch(batch, there), config=config, rules=rules)
    finally:
        dist.destroy_process_group()
