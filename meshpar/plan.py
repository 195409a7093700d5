"""The Plan: every decision about a parallel model as plain data, hashable, comparable across ranks, and readable from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .sharding.types import Type


@dataclass(frozen=True, slots=True)
class NodePlan:
    """How one operator runs on one axis: the type each operand is used at, the type of each result, and the reason."""

    uses: tuple[Type, ...]
    outs: tuple[Type, ...]
    why: str
    handed: tuple[Type | None, ...] = ()
    """The type in which each result goes to other blocks, where one does."""


@dataclass(frozen=True)
class AxisPlan:
    """The types of all values of the graph on one mesh axis."""

    axis: str
    size: int
    nodes: Mapping[str, NodePlan]
    outputs: tuple[Type, ...]
    """The type of every value the graph returns."""
