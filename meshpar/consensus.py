"""What all ranks of a mesh must have alike: plans, graphs and batches are compared by their digests before anything runs on them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshpar import roles
from meshpar._torch import LocalTensor, local_tensor_mode, pytree
from meshpar.errors import BatchError, MeshparError, PlanError, raise_all
from meshpar.mesh import data_ranks, listed, mesh_sizes


def agree(value: str, mesh: DeviceMesh, what: str, *, error: type[MeshparError] = PlanError) -> None:
    """Raise `error` on every rank of the mesh, naming the ranks that differ, unless all pass the same `value`.

    `what` names the value in the message ("the plan"). Collective over the mesh; free when ranks are simulated or fake.
    """
    table = gather_rows(_digest(value.encode()), mesh)
    odd = _odd_ones(table)
    if odd:
        common = next(digest for rank, digest in table.items() if rank not in odd)
        raise error(
            f"{what} differs between ranks: {listed(list(odd))} of {len(table)} differ from the rest. This is rank {dist.get_rank()}; "
            f"its fingerprint is {table[dist.get_rank()].hex()[:8]}, that of the rest {common.hex()[:8]}. "
            f"Every rank must pass the same model, mesh, configuration, rules and plan."
        )


def agree_on_lines(value: Sequence[str], shown: Callable[[], Sequence[str]], mesh: DeviceMesh, what: str, advice: str) -> None:
    """Raise `PlanError` on every rank of the mesh unless all pass the same lines; the message shows the first lines that differ.

    `shown`: for each line, how to show it. `advice` ends the message. Collective over the mesh; free when ranks are simulated or fake.
    """
    table = gather_rows(_digest("\n".join(value).encode()), mesh)
    odd = _odd_ones(table)
    if not odd:
        return
    pair = (next(rank for rank in table if rank not in odd), odd[0])
    texts = [_sent_by(rank, mesh, lambda: (list(value), list(shown()))) for rank in pair]
    raise PlanError(
        f"{what} differs between ranks: {listed(list(odd))} of {len(table)} differ from the rest.\n{_difference(pair, texts)}\n  {advice}"
    )


def _sent_by(rank: int, mesh: DeviceMesh, make: Callable[[], tuple[list[str], list[str]]]) -> tuple[list[str], list[str]]:
    """What one rank of the mesh makes, on all of them: handed on along one axis after the other."""
    sent: list[Any] = [make() if dist.get_rank() == rank else None]
    for dim, place in enumerate((mesh.mesh == rank).nonzero()[0].tolist()):
        if mesh.size(dim) > 1:
            dist.broadcast_object_list(sent, group_src=place, group=mesh.get_group(dim))
    found: tuple[list[str], list[str]] = sent[0]
    return found


def _difference(ranks: tuple[int, int], texts: Sequence[tuple[list[str], list[str]]], *, most: int = 3) -> str:
    """The first lines of two texts that differ, as they are shown."""
    (a, _), (b, _) = texts
    first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    parts = [
        f"    rank {rank}: {line}"
        for rank, (_, said) in zip(ranks, texts, strict=True)
        for line in said[first : first + most] or ["(ends)"]
    ]
    return "\n".join(["  The first lines that differ:", *parts])


def spread(mesh: DeviceMesh) -> Callable[[list[str]], list[str]]:
    """A function that turns what a rank has to say into what all ranks of the mesh have, in their order. Collective over the mesh."""

    def everyone(mine: list[str]) -> list[str]:
        if not is_real(mesh):
            return mine
        found = mine
        for dim in range(mesh.ndim):
            rows: list[Any] = [None] * mesh.size(dim)
            dist.all_gather_object(rows, found, group=mesh.get_group(dim))
            found = [text for row in rows for text in row]
        return found

    return everyone


def check_batch(batch: Any, mesh: DeviceMesh) -> bool:
    """Raise `BatchError` on every rank unless batches have one structure everywhere and one content outside the data axes.

    Returns whether there are several data ranks and all gave the same samples. Collective over the mesh: one exchange of 64 bytes per
    rank. Reads every tensor once, on its device's host copy.
    """
    several = prod(mesh_sizes(mesh)[n] for n in roles.with_own_batches(mesh.mesh_dim_names or ())) > 1
    if not is_real(mesh):
        leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        return several and local_tensor_mode() is not None and not any(isinstance(leaf, LocalTensor) for leaf in leaves)
    table = gather_rows(_structure_digest(batch) + content_digest(batch), mesh)
    odd = _odd_ones({rank: both[:32] for rank, both in table.items()})
    if odd:
        raise BatchError(
            f"the batch of {listed(list(odd))} has other names, shapes or dtypes than that of the other ranks. "
            f"This is rank {dist.get_rank()}, which has {_describe(batch)}. Every data rank passes a local batch of the same shapes. With "
            f"ParallelConfig(pad_to=1) they may have other numbers of samples and positions: they are filled up by what counts nothing."
        )
    complaints = []
    for ranks in same_batch_ranks(mesh):
        odd = _odd_ones({rank: table[rank][32:] for rank in ranks})
        if odd:
            complaints.append(f"{listed(list(odd))} of {listed(ranks)}.")
    same = [n for n in mesh.mesh_dim_names or () if not roles.ROLES[n].own_batches]
    raise_all(
        BatchError,
        f"ranks that differ only on {', '.join(same)} must be fed the same batch (give the data loader mp.data_rank(mesh), not the global "
        f"rank), but these differ:",
        complaints,
    )
    return several and len(set(table.values())) == 1


def check_whole(tensors: Mapping[str, torch.Tensor], mesh: DeviceMesh) -> None:
    """Raise `BatchError` on every rank unless these inputs, which hold nothing of single samples, are the same on all ranks.

    Collective over the mesh: one exchange of 32 bytes per rank and tensor.
    """
    if not tensors or not is_real(mesh):
        return
    table = gather_rows(b"".join(map(content_digest, tensors.values())), mesh)
    width = len(_digest(b""))
    rows = {name: {rank: row[i * width :][:width] for rank, row in table.items()} for i, name in enumerate(tensors)}
    complaints = [f"{name}: {listed(list(odd))} from the rest." for name, digests in rows.items() if (odd := _odd_ones(digests))]
    raise_all(
        BatchError,
        "inputs whose first dim is not that of the samples are one value for the whole batch, the same on every rank, but these differ:",
        complaints,
    )


def same_batch_ranks(mesh: DeviceMesh) -> list[list[int]]:
    """The sets of ranks that must be fed one batch."""
    sets: dict[int, list[int]] = defaultdict(list)
    for rank, index in sorted(data_ranks(mesh).items()):
        sets[index].append(rank)
    return list(sets.values())


def is_real(mesh: DeviceMesh) -> bool:
    """Whether other processes take part: not simulated, not the fake backend, more than one rank."""
    return local_tensor_mode() is None and mesh.size() > 1 and dist.get_backend() != "fake"


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def gather_rows(digest: bytes, mesh: DeviceMesh) -> dict[int, bytes]:
    """Every rank's bytes (equally many), by global rank: gathered axis by axis, innermost first, so that no new group is needed."""
    if not is_real(mesh):
        return {0: digest}
    table = torch.tensor(list(digest), dtype=torch.uint8, device=mesh.device_type)
    for dim in reversed(range(mesh.ndim)):
        if mesh.size(dim) > 1:
            parts = [torch.empty_like(table) for _ in range(mesh.size(dim))]
            dist.all_gather(parts, table, group=mesh.get_group(dim))
            table = torch.cat(parts)
    rows = table.view(-1, len(digest)).tolist()
    return dict(zip(mesh.mesh.flatten().tolist(), map(bytes, rows), strict=True))


def _odd_ones(table: Mapping[int, bytes]) -> tuple[int, ...]:
    """The ranks whose digest is not the most common one (of the lowest rank, in a tie)."""
    votes: dict[bytes, int] = defaultdict(int)
    for digest in table.values():
        votes[digest] += 1
    common = max(votes, key=lambda digest: votes[digest])
    return tuple(rank for rank, digest in table.items() if digest != common)


def _structure_digest(batch: Any) -> bytes:
    return _digest(_describe(batch).encode())


def _describe(batch: Any) -> str:
    leaves = pytree.tree_flatten_with_path(batch)[0]
    described = [
        f"{pytree.keystr(path)}: {leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else f"{pytree.keystr(path)}: {leaf!r}"
        for path, leaf in leaves
    ]
    return ", ".join(described)


def content_digest(batch: Any) -> bytes:
    content = hashlib.sha256()
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            content.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return content.digest()
