"""What one operator costs: a table from its name to floating-point operations, bytes, and, of a collective, what it moves.

FLOPs of products and attention are torch's own (`torch.utils.flop_counter`), with rows for what it lacks. Bytes are those of operands and
results, once each; a view has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from meshpar._torch import group_behind, is_view_operator, pytree
from meshpar.ops import tiles


@dataclass(frozen=True, slots=True)
class Kernel:
    """An operator's cost."""

    name: str
    kind: str
    """As `planner.Operator`, and "collective"."""
    dtype: str
    flops: float = 0.0
    read: int = 0
    """Bytes; of a collective, this rank's part."""
    written: int = 0
    collective: str = ""
    """As `planner.Collective`: "all_gather", ..."""
    moved: float = 0
    """Bytes of a collective as `planner.Collective` counts them."""
    group: str = ""
    """Name of the process group of a collective."""

    @property
    def bytes(self) -> int:
        return self.read + self.written


DTYPES: Mapping[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}
"""Names of precisions in the planner."""


def kernel_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Kernel | None:
    """The cost of a call that was made; None where nothing is computed or moved."""
    name = str(getattr(func, "_overloadpacket", func))
    if name.startswith(_NOTHING) or name in _FREE:
        return None
    if name.startswith(("_c10d_functional.", "c10d.")):
        return _collective(name.rpartition(".")[2].rstrip("_"), args, result)
    if isinstance(func, torch._ops.OpOverload) and is_view_operator(func):
        return None
    inputs, outputs = _all(args, kwargs), _all(result)
    floating = [t for t in (*inputs, *outputs) if t.is_floating_point()]
    dtype = DTYPES.get(floating[0].dtype, "bf16") if floating else "int"
    kind, flops = _work(name, func, args, kwargs, result)
    read, written = sum(map(_nbytes, inputs)), sum(map(_nbytes, outputs))
    if name in _ROWS_ONLY:
        read = written
    return Kernel(name, kind, dtype, flops, read, written)


def _work(name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> tuple[str, float]:
    packet = getattr(func, "_overloadpacket", None)
    if name in _TILES:
        return "attention", _TILES[name] * _of_tiles(args)
    if "attention" in name:
        return "attention", _attention(name, args, kwargs)
    if name in _GROUPED:
        return "grouped", float(_GROUPED[name](args, result))
    if packet in flop_registry:
        return "matrix", float(flop_registry[packet](*args, **kwargs, out_val=result))
    return "elementwise", 0.0


def _attention(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """A fused attention: two products of all pairs of positions, five in backward; half of them where the mask is causal."""
    backward = name.endswith("backward")
    query, key, value = args[1:4] if backward else args[:3]
    pairs = prod(query.shape[:-1]) * key.shape[-2]
    flops = 2 * pairs * (query.shape[-1] + value.shape[-1])
    return flops * (2.5 if backward else 1.0) * (0.5 if _is_causal(name, args, kwargs) else 1.0)


def _of_tiles(args: Sequence[Any]) -> float:
    """Attention in tiles: two products of the pairs of positions that are not passed over."""
    query, _, value, _, pairings, scoring = args[:6]
    area = tiles.area(pairings, tiles.Scoring.read(scoring))
    return 2.0 * prod(query.shape[:2]) * area * (query.shape[-1] + value.shape[-1])


_TILES: Mapping[str, float] = {"meshpar.attend_": 1.0, "meshpar.attend_backward_": 2.5}
"""Operators of `ops/tiles.py` -> how many times the products of a forward."""


def _is_causal(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    given = kwargs.get("is_causal", [a for a in args if isinstance(a, bool)][:1])
    return bool(given[0] if isinstance(given, list) and given else given)


_GROUPED: Mapping[str, Callable[[Sequence[Any], Any], int]] = {
    "meshpar.grouped_mm": lambda args, out: 2 * prod(out.shape) * args[0].shape[-1],
    "meshpar.grouped_outer": lambda args, out: 2 * prod(args[0].shape) * args[1].shape[-1],
    "aten._grouped_mm": lambda args, out: 2 * prod(out.shape) * args[0].shape[-1],
}
_NOTHING = ("prim.", "profiler.", "_c10d_functional.wait", "c10d.barrier", "c10d.monitored", "c10d.send", "c10d.recv")
_FREE = frozenset(
    """aten.empty aten.new_empty aten.empty_like aten.empty_strided aten.new_empty_strided aten.detach aten.alias aten.lift_fresh
    aten.is_same_size aten.set_ aten._unsafe_view
    aten.resize_ aten._local_scalar_dense aten.sym_size aten.sym_stride aten.sym_numel aten.record_stream""".split()
)
_ROWS_ONLY = frozenset(("aten.embedding", "aten.index_select", "aten.gather", "aten.index"))
"""Look-ups: they read what they return."""
_KINDS: Mapping[str, str] = {
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "_allgather_base": "all_gather",
    "allgather": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "allreduce": "all_reduce",
    "broadcast": "all_gather",
    "all_to_all_single": "all_to_all",
    "alltoall_base": "all_to_all",
}


def _collective(name: str, args: Sequence[Any], result: Any) -> Kernel | None:
    """`bytes` of a gather or sum are the whole tensor's; of an all-to-all what this rank gives away, with its own part."""
    if name not in _KINDS:
        raise KeyError(f"no row for the collective {name} in {__file__}")
    kind = _KINDS[name]
    named = [a for a in args if isinstance(a, torch.ScriptObject)] or [a for a in args if isinstance(a, str)][-1:]
    tensors = _all(args, result)
    sizes = [t.nbytes for t in tensors]
    given = sum(t.nbytes for t in _all(args[:1]))
    moved, group = max(sizes) if kind in ("all_gather", "reduce_scatter") else given, group_behind(named[0])
    if name == "all_to_all_single" and (rows := sum(args[2])):
        share = (rows - args[2][group.rank()]) / rows
        moved = given * share * group.size() / max(1, group.size() - 1)  # a hop of a ring sends all that it is given
    return Kernel(name, "collective", "", read=min(sizes), collective=kind, moved=moved, group=group.group_name)


def _all(*trees: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def _nbytes(tensor: torch.Tensor) -> int:
    """Of an expanded tensor, only what there is to read."""
    whole = tensor.numel() * tensor.element_size()
    return min(whole, tensor.untyped_storage().nbytes())
