"""The device mesh: building and checking one, what this process is on each axis, and its share of the data.

Axis names, outermost first: the axis that talks most is innermost, inside the fastest links.

    pp | dp, or dp_replicate and dp_shard | cp | ep | tp

`ep` is a factor of the data: outside expert layers batches are split over `dp x ep`, inside them experts are split over `ep`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log2, prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshpar import roles
from meshpar._torch import LocalTensor, flatten_mesh, local_tensor_mode, maybe_disable_local_tensor_mode, pytree
from meshpar.errors import BatchError, ConfigError, near, raise_all
from meshpar.settings import is_file, read_mesh

SIMULATED = -1


@dataclass(frozen=True, slots=True)
class Axis:
    """One mesh axis as this process sees it: its size, this process's coordinate, and the name of its process group.

    `rank` is -1 when all ranks are simulated in this process. `group` is empty when the mesh does not have the axis (then `size` is 1).
    """

    name: str
    size: int
    rank: int
    group: str


def make_mesh(spec: str | Path | Mapping[str, int], device_type: str | None = None) -> DeviceMesh:
    """Build and check a `DeviceMesh` over all ranks of the job.

    Uses the process group that exists, or starts one: from torchrun's environment, or, without one, a group of this process alone.
    `device_type` defaults to "cuda" where every rank has a GPU of its own, else "cpu".

    Raises `ConfigError` for unknown or repeated names, a wrong order, and a mesh that does not fit the number of ranks.

    >>> mesh = make_mesh("pp=2,dp=2,tp=2")  # doctest: +SKIP
    """
    sizes = parse_mesh(spec)
    world = _world_size()
    if prod(sizes.values()) != world:
        raise ConfigError(_misfit(sizes, world))
    _start_process_group(device_type)
    with maybe_disable_local_tensor_mode():
        return init_device_mesh(device_type or _device_type(), tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def parse_mesh(spec: str | Path | Mapping[str, int]) -> dict[str, int]:
    """Axis sizes by name from "pp=2,dp=2,tp=2", a mapping, or a file that `meshpar plan` wrote ("plan.toml").

    Raises one `ConfigError` with everything that is wrong.

    >>> parse_mesh("dp=2, tp=4")
    {'dp': 2, 'tp': 4}
    """
    if not isinstance(spec, (str, Path, Mapping)):
        raise ConfigError(f'a mesh is written as "dp=2,tp=4", {{"dp": 2, "tp": 4}} or a file of `meshpar plan`; this is {spec!r}.')
    if isinstance(spec, Path) or is_file(spec):
        spec = read_mesh(spec)  # type: ignore[arg-type]
    pairs = list(spec.items()) if isinstance(spec, Mapping) else [_parse_pair(part) for part in spec.split(",")]
    complaints = [size for _, size in pairs if isinstance(size, str)]
    complaints += [f"{name}={size!r}: a size is a whole number." for name, size in pairs if not isinstance(size, (int, str))]
    complaints += [f"{name}={size}: a size is a whole number of at least 1." for name, size in pairs if isinstance(size, int) and size < 1]
    complaints += _name_complaints([name for name, size in pairs if not isinstance(size, str)])
    sizes = {name: size for name, size in pairs if isinstance(size, int)}
    if not complaints and (wanted := sorted(sizes, key=roles.names().index)) != list(sizes):
        complaints.append(f'axes are given outermost first. Write "{format_mesh({n: sizes[n] for n in wanted})}".')
    raise_all(ConfigError, f'mesh "{spec if isinstance(spec, str) else format_mesh(spec)}":', complaints)
    return sizes


def format_mesh(sizes: Mapping[str, int]) -> str:
    """The text that `make_mesh` reads: "pp=2,dp=2,tp=2"."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def mesh_sizes(mesh: DeviceMesh) -> dict[str, int]:
    """Axis sizes by name, outermost first."""
    return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))


def check_mesh(mesh: DeviceMesh) -> None:
    """Raise `ConfigError` unless a mesh built elsewhere has axis names that meshpar knows, in order, and holds this rank."""
    if not isinstance(mesh, DeviceMesh):
        spec = mesh if isinstance(mesh, str) and "=" in mesh else "dp=2,tp=4"
        raise ConfigError(f'mesh is a {type(mesh).__name__}, not a DeviceMesh. Build one with mp.make_mesh("{spec}").')
    if not mesh.mesh_dim_names:
        names = ", ".join(f'"{n}"' for n in ("pp", "dp", "tp")[-mesh.ndim :])
        raise ConfigError(
            f"the mesh of shape {tuple(mesh.shape)} has no axis names. Build it with init_device_mesh(..., mesh_dim_names=({names})) "
            f"or with mp.make_mesh; names are {', '.join(roles.names())}."
        )
    parse_mesh(mesh_sizes(mesh))
    if local_tensor_mode() is None and mesh.get_coordinate() is None:
        raise ConfigError(
            f"rank {dist.get_rank()} is not in the mesh of ranks {listed(mesh.mesh.flatten().tolist())}; call it on those only."
        )


def axis(mesh: DeviceMesh, name: str) -> Axis:
    """This process on one axis; an axis the mesh does not have is one of size 1 without a group."""
    if name not in roles.ROLES:
        raise ConfigError(f"there is no mesh axis named {name!r}; axes are {', '.join(roles.names())}.{near(name, roles.names())}")
    names = mesh.mesh_dim_names or ()
    return _axis(mesh, name, name) if name in names else Axis(name, 1, 0, "")


def stage_axis(mesh: DeviceMesh) -> Axis:
    """This process on the axis whose ranks run different stages."""
    return axis(mesh, roles.stage_axis())


def data_axis(mesh: DeviceMesh) -> Axis:
    """The axis over which batches are split: all whose ranks have batches of their own as one, with a process group of its own."""
    names = roles.with_own_batches(mesh.mesh_dim_names or ())
    return joined_axis(mesh, names) if names else Axis("dp", 1, 0, "")


def typed_axes(mesh: DeviceMesh) -> tuple[Axis, ...]:
    """The axes on which values are typed, in the order in which they are lowered; those that are typed as one are one."""
    return tuple(replace(joined_axis(mesh, names), name=name) for name, names in roles.typed(mesh.mesh_dim_names or ()).items())


def joined_axis(mesh: DeviceMesh, names: Sequence[str]) -> Axis:
    """Several axes of a mesh as one, with a process group of its own."""
    with maybe_disable_local_tensor_mode():
        flat = mesh[names[0]] if len(names) == 1 else flatten_mesh(mesh[tuple(names)], "_".join(names))
    assert flat.mesh_dim_names is not None
    return _axis(flat, flat.mesh_dim_names[0], flat.mesh_dim_names[0])


def data_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """`(rank, size)`: which share of the global batch this process holds, of how many; the rank is -1 when ranks are simulated."""
    found = data_axis(mesh)
    return found.rank, found.size


def local_batch(global_batch: Any, mesh: DeviceMesh) -> Any:
    """This data rank's share of dim 0 of every tensor in a tensor, tuple, list or dict; other values pass through.

    Under simulation the tensors returned hold each simulated rank's own share. Raises `BatchError` if dim 0 does not divide.
    """
    if not isinstance(mesh, DeviceMesh):
        raise ConfigError(f"the mesh is a {type(mesh).__name__}: write mp.local_batch(global_batch, mesh).")
    rank, size = data_rank(mesh)
    leaves = pytree.tree_flatten_with_path(global_batch)[0]
    tensors = [(pytree.keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
    wrong = [f"{path or 'the batch'} has {leaf.shape[0]} samples." for path, leaf in tensors if leaf.shape[0] % size]
    raise_all(
        BatchError,
        f"dim 0 of every tensor of the global batch holds samples and must be divisible by the {size} data ranks (of a list with a tensor "
        f"for each sample make one: torch.stack(images), and wrap the model in a module that calls it with list(images)):",
        wrong,
    )

    ranks = data_ranks(mesh)

    def share(leaf: Any) -> Any:
        if size == 1 or not isinstance(leaf, torch.Tensor) or not leaf.ndim:
            return leaf
        if rank != SIMULATED:
            return leaf.chunk(size)[rank]
        return _each_rank(leaf, lambda tensor, r: tensor.chunk(size)[ranks[r]].clone())

    return pytree.tree_map(share, global_batch)


def rank_grid(mesh: DeviceMesh) -> str:
    """The rank grids as text: dense layers (data = dp x ep), and, with an `ep` axis, expert layers (experts split over ep)."""
    grid = _ranks(mesh)
    sizes = mesh_sizes(mesh)
    data = roles.with_own_batches(sizes)
    lines = [f"{format_mesh(sizes)}: {grid.numel()} ranks", *_grid_lines("dense layers", grid, sizes, data)]
    if any(sizes[n] > 1 for n in roles.dividing("experts", sizes)):
        lines += _grid_lines("expert layers", grid, sizes, roles.with_own_batches(sizes, without="experts"))
    return "\n".join(lines)


def _parse_pair(part: str) -> tuple[str, int | str]:
    name, equals, size = (piece.strip() for piece in part.partition("="))
    if not name or not equals or not size.lstrip("-").isdigit():
        return name, f'"{part.strip()}" is not name=size, as in "dp=2,tp=4".'
    return name, int(size)


def _name_complaints(names: Sequence[str]) -> list[str]:
    known = roles.names()
    complaints = [f"unknown axis {n!r}; axes are {', '.join(known)}.{near(n, known)}" for n in names if n not in known]
    complaints += [f"axis {n!r} is given {names.count(n)} times." for n in dict.fromkeys(names) if names.count(n) > 1]
    for one, axes in roles.typed(n for n in names if n in known).items():
        if one in axes and len(set(axes)) > 1:
            others = [n for n in known if n != one and roles.ROLES[n].typed == one]
            complaints.append(f"{one} and {' / '.join(others)} are two ways to say the same; use one of the two.")
    return complaints


def _world_size() -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def _launched() -> bool:
    """Whether torchrun, or a launcher with the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def _start_process_group(device_type: str | None) -> None:
    if dist.is_initialized():
        return
    cuda = (device_type or _device_type()) == "cuda"
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if not _launched():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend)


def _device_type() -> str:
    if dist.is_initialized():
        return "cuda" if "nccl" in str(dist.get_backend_config()) else "cpu"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= here else "cpu"


def _misfit(sizes: Mapping[str, int], world: int) -> str:
    asked = prod(sizes.values())
    found = f"there are {world} ranks" if world > 1 else "this is one process"
    fits = " or ".join(f'"{format_mesh(s)}"' for s in nearest_meshes(sizes, world))
    start = f"start {asked} processes with `torchrun --nproc-per-node {asked} ...`, or simulate them with `with mp.simulate({asked}):`"
    return f'mesh "{format_mesh(sizes)}" needs {asked} ranks, but {found}. Meshes that fit: {fits}. Or {start}.'


def nearest_meshes(sizes: Mapping[str, int], world: int, *, count: int = 3) -> tuple[dict[str, int], ...]:
    """The meshes over exactly `world` ranks that are nearest to `sizes`: fewest axes changed, then the smallest factors.

    >>> nearest_meshes({"dp": 2, "tp": 4}, 4)
    ({'dp': 1, 'tp': 4}, {'dp': 2, 'tp': 2}, {'dp': 4, 'tp': 1})
    """
    names = list(sizes)
    if not roles.with_own_batches(names):
        names = sorted([*names, roles.dividing("samples")[0]], key=roles.names().index)

    def distance(found: Sequence[int]) -> tuple[int, float]:
        pairs = [(f, sizes.get(n, 1)) for n, f in zip(names, found, strict=True)]
        return sum(f != s for f, s in pairs), sum(abs(log2(f / s)) for f, s in pairs)

    best = sorted(_factorisations(world, len(names)), key=distance)[:count]
    return tuple({n: f for n, f in zip(names, found, strict=True) if f > 1 or n in sizes} for found in best)


def _factorisations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            for rest in _factorisations(n // first, parts - 1):
                yield (first, *rest)


def _axis(mesh: DeviceMesh, dim: str, name: str) -> Axis:
    simulated = local_tensor_mode() is not None
    with maybe_disable_local_tensor_mode():
        rank = SIMULATED if simulated else mesh.get_local_rank(dim)
        return Axis(name, mesh.size((mesh.mesh_dim_names or ()).index(dim)), int(rank), mesh.get_group(dim).group_name)


def _ranks(mesh: DeviceMesh) -> torch.Tensor:
    with maybe_disable_local_tensor_mode():
        return mesh.mesh


def data_ranks(mesh: DeviceMesh) -> dict[int, int]:
    """Global rank -> its rank on the data axis."""
    names = mesh.mesh_dim_names or ()
    own, others = ([n for n in names if roles.ROLES[n].own_batches is wanted] for wanted in (True, False))
    with maybe_disable_local_tensor_mode():
        rows = rearrange(mesh.mesh, f"{' '.join(names)} -> ({' '.join(own)}) ({' '.join(others)})").tolist()
    return {rank: index for index, row in enumerate(rows) for rank in row}


def _each_rank(tensor: torch.Tensor, cut: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """`cut(tensor, rank)` for every simulated rank, as one tensor that holds them all."""
    mode = local_tensor_mode()
    assert mode is not None
    if isinstance(tensor, LocalTensor):
        return mode.tensor_map(tensor, lambda rank, own: cut(own, rank))
    return mode.rank_map(lambda rank: cut(tensor, rank))


def _grid_lines(title: str, grid: torch.Tensor, sizes: Mapping[str, int], data: tuple[str, ...], *, most: int = 8) -> list[str]:
    """One table per pipeline stage: a row per data coordinate (and cp, ep), a column per tp rank."""
    names = list(sizes)
    columns, tables = list(roles.dividing("weights", names)), list(roles.dividing("stages", names))
    kept = [n for n in names if n not in (*data, *columns, *tables)]
    label = "edp" if title.startswith("expert") else "data"
    count = prod(sizes[n] for n in data)
    shown = {n: s for n, s in [*((n, sizes[n]) for n in tables), (label, count), *((n, sizes[n]) for n in (*kept, *columns))]}
    lines = [f"{title}: {' x '.join(f'{n}={s}' for n, s in shown.items())}" + (f"   ({label} = {' x '.join(data)})" if data else "")]
    rows = rearrange(grid, f"{' '.join(names)} -> ({' '.join(tables)}) ({' '.join((*data, *kept))}) ({' '.join(columns)})").tolist()
    labels = _row_labels([(label, count), *((n, sizes[n]) for n in kept)])
    width = len(str(grid.max().item()))
    for stage, table in enumerate(rows):
        if tables:
            lines.append(f"  pp {stage}")
        texts = [f"    {text}: {' '.join(f'{rank:>{width}}' for rank in row)}" for text, row in zip(labels, table, strict=True)]
        lines += texts if len(texts) <= most else [*texts[: most // 2], f"    ... {len(texts) - most} more", *texts[-most // 2 :]]
    return lines


def _row_labels(sizes: Sequence[tuple[str, int]]) -> list[str]:
    labels = [""]
    for name, size in sizes:
        if size > 1 or len(sizes) == 1:
            labels = [f"{label} {name} {i:>{len(str(size - 1))}}".strip() for label in labels for i in range(size)]
    return labels


def listed(ranks: Sequence[int], *, most: int = 8) -> str:
    """ "rank 3" or "ranks 0, 1, ... (12 of them)"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    text = ", ".join(map(str, ranks[:most]))
    return f"ranks {text}" + (f", ... ({len(ranks)} of them)" if len(ranks) > most else "")
