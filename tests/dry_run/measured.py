"""What a step really allocates on a rank, and what a dry run says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import meshpar as mp
from meshpar._torch import local_of
from meshpar.dry_run.decoder import Decoder
from meshpar.dry_run.tape import MachineTape, levels
from meshpar.planner import Transformer

DENSE = Transformer(layers=8, hidden=64, heads=4, kv_heads=2, ffn=192, vocab=512)
SHALLOW = Transformer(layers=4, hidden=64, heads=4, kv_heads=2, ffn=192, vocab=512)
EXPERTS = Transformer(layers=4, hidden=64, heads=4, kv_heads=2, ffn=192, vocab=512, experts=4, top_k=2, expert_ffn=64)
SAMPLES, TOKENS = 16, 64


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Decoder({"experts": EXPERTS, "dense": DENSE, "shallow": SHALLOW}[kind])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 512, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def measured(kind: str, mesh: str, options: Mapping[str, Any]) -> int:
    """Peak bytes of a step on this rank, parameters included, optimizer states not: the second step, which makes no lasting buffers."""
    there = mp.make_mesh(mesh, "cpu")
    local = mp.local_batch(batch(), there)
    pm = mp.parallelize(model_of(kind), there, example=local, config=mp.ParallelConfig(**options))
    pm.train_step(**local)
    for parameter in pm.parameters():
        parameter.grad = None
    with MachineTape() as tape:
        given = {tape.number(x) for x in local.values()}
        for tensor in (*pm.parameters(), *pm.buffers()):
            tape.number(local_of(tensor) if isinstance(tensor, DTensor) else tensor)
        pm.train_step(**local)
    dist.barrier()
    return max(levels(tape.storages.changes, without=given))


def predicted(kind: str, mesh: str, options: Mapping[str, Any]) -> list[int]:
    """The same by pipeline rank."""
    from math import prod

    from meshpar.mesh import parse_mesh

    data = prod(size for name, size in parse_mesh(mesh).items() if name.startswith("dp") or name == "ep")
    part = {name: x[: SAMPLES // data] for name, x in batch().items()}
    found = mp.dry_run(model_of(kind), mesh, mp.ParallelConfig(**options), example=part)
    return [round(one.peak - one.optimizer - one.reserve) for one in found.ranks]
