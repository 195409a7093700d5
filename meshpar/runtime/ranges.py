"""After a look-up failed: which number of the batch was outside of which table. Costs nothing while all is well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx

from meshpar.errors import BatchError, StageError
from meshpar.graph.captured import Captured
from meshpar.graph.facts import facts, info_of
from meshpar.graph.op import op_name
from meshpar.simulate import local_tensors


@dataclass(frozen=True, slots=True)
class _LookUp:
    """One operator that looks numbers up: the table's and the numbers' positions, the table's dim, and the number that means none."""

    table: int
    numbers: int
    dim: Callable[[int], int]
    what: str
    ignored: int | None = None


_LOOK_UPS: Mapping[str, _LookUp] = {
    "embedding": _LookUp(0, 1, lambda ndim: 0, "rows"),
    "cross_entropy_loss": _LookUp(0, 1, lambda ndim: min(ndim - 1, 1), "classes", ignored=4),
    "nll_loss_forward": _LookUp(0, 1, lambda ndim: min(ndim - 1, 1), "classes", ignored=4),
    "nll_loss_nd": _LookUp(0, 1, lambda ndim: min(ndim - 1, 1), "classes", ignored=4),
}


@contextmanager
def explaining(captured: Captured, tensors: Sequence[torch.Tensor], microbatches: int = 1) -> Iterator[None]:
    """Raise BatchError that names input, number and table in the place of the error of a look-up inside.

    Where no number of the batch is outside of a table, and it is cut into microbatches: what a look-up of samples finds in one of them.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        said = str(error.__cause__ if isinstance(error, StageError) and error.__cause__ is not None else error)
        if "out of range" not in said and "out of bounds" not in said:
            raise
        found = _outside(captured, dict(zip(captured.inputs, tensors, strict=False)))
        if not found and microbatches > 1:
            raise BatchError(
                f"{said}\n  Each of the {microbatches} microbatches runs by itself, with its own samples: a forward that looks samples up "
                "by their number (x[torch.arange(4)]) finds fewer there. Count what it is given (x.shape[0]), or use microbatches=1."
            ) from error
        if not found:
            raise
        raise BatchError("\n  ".join(["the batch holds numbers that a table of the model does not have:", *found])) from error


def _outside(captured: Captured, inputs: Mapping[str, torch.Tensor]) -> list[str]:
    found: list[str] = []
    for node in captured.graph.nodes:
        row = _LOOK_UPS.get(op_name(node.target)) if node.op == "call_function" else None
        if row is None:
            continue
        shape = info_of(node.args[row.table]).shape
        size = shape[row.dim(len(shape))]
        ignored = -100 if row.ignored is None or len(node.args) <= row.ignored else int(node.args[row.ignored])
        for name in _sources(node.args[row.numbers]):
            if (text := _worst(inputs[name], size, ignored if row.ignored is not None else None)) if name in inputs else "":
                known = facts(node)
                where = known.module or f"the {op_name(node.target)}"
                where += f" ({known.source})" if known.source else ""
                found.append(f"{name}{text}, and {where} has {size} {row.what}, 0 to {size - 1}.")
    return list(dict.fromkeys(found))


def _sources(node: fx.Node) -> Iterator[str]:
    """The inputs of whole numbers that a value comes from."""
    seen, todo = set[fx.Node](), [node]
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.op == "placeholder":
            yield str(one.target)
        todo += one.all_input_nodes


def _worst(tensor: torch.Tensor, size: int, ignored: int | None) -> str:
    """The first number that is outside, and where it is."""
    if tensor.is_floating_point():
        return ""
    for rank, own in local_tensors(tensor).items():
        outside = (own < 0) | (own >= size)
        if ignored is not None:
            outside &= own != ignored
        if outside.any():
            place = outside.nonzero()[0].tolist()
            who = f" of rank {rank}" if len(local_tensors(tensor)) > 1 else ""
            return f"{who} is {own[tuple(place)].item()} at {place}"
    return ""
