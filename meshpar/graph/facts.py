"""What is known of the values of a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx


@dataclass(frozen=True, slots=True)
class Info:
    """One tensor of the graph: `shape`, `dtype`, and whether a gradient flows through it. Stored as `node.meta["info"]`.

    A node with several results holds a tuple of these (None for a result that is not a tensor).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    rows: bool = False
    """Whether it holds rows sorted by expert (or says where those of each expert end, or which is which): see `graph.rows`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True, slots=True)
class DataSized:
    """A tensor with a size that depends on data: its symbol stands where the number would."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> tuple[str, int] | None:
        """The symbol and its dim, if there is one."""
        found = [(n, d) for d, n in enumerate(self.shape) if isinstance(n, str)]
        return found[0] if len(found) == 1 else None


def info_of(node: fx.Node) -> Info:
    """The one tensor that a node gives."""
    info = node.meta["info"]
    assert isinstance(info, Info), f"{node.format_node()} gives {info}"
    return info


def infos_of(node: fx.Node) -> tuple[Info | None, ...]:
    """All that a node gives, in order; (None,) where nothing of it is known."""
    info = node.meta.get("info")
    return info if isinstance(info, tuple) else (info,)


def gives_several(node: fx.Node) -> bool:
    """Whether the results of a node are picked by `getitem`."""
    return isinstance(node.meta.get("info"), tuple)
