"""A program: what a rank runs for batches of one signature, and how batches go in and outputs come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from meshpar._torch import pytree
from meshpar.compile.signature import BatchSignature
from meshpar.compile.split import StageGraph
from meshpar.graph.captured import Captured, Slot
from meshpar.passes.inputs import ExtraInputs, extra_inputs
from meshpar.plan import Plan
from meshpar.proof.static.report import StaticReport


@dataclass(frozen=True)
class Program:
    """A lowered graph, and how batches go in and outputs come out."""

    signature: BatchSignature
    captured: Captured
    plan: Plan
    graph: fx.Graph
    counts: Program | None = None
    """Counts the denominators of one microbatch, where the loss has any and the step several microbatches."""
    averaged: tuple[str, ...] = ()
    """Terms of the loss that are averaged over microbatches."""
    within: tuple[str, ...] = ()
    """Where the samples of a microbatch are taken together: modules, and lines."""
    stages: tuple[StageGraph, ...] = ()
    """Where the mesh has a pipeline: the graph by stages, returning the loss alone."""
    all_stages: tuple[StageGraph, ...] = ()
    """The same, returning every output."""
    step: StageGraph | None = None
    """Without a pipeline: the graph of `train_step`, returning the loss alone, where that is another one."""
    proof: StaticReport = field(default_factory=lambda: StaticReport(0))
    """What was proved of it."""
    alone: bool = False
    """Whether no program of other sizes is made of it by numbers alone."""
    like: Program | None = None
    """Of a program that is another one with other numbers: that one. Its graphs are outlines, and trees alone have its code."""

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The names of the graph's placeholders, in order."""
        return tuple(str(n.target) for n in self.graph.nodes if n.op == "placeholder")

    @cached_property
    def extra(self) -> ExtraInputs:
        """What the graph takes beside the batch."""
        return extra_inputs(self.graph)

    @property
    def key(self) -> str:
        """The name under which the module tree runs this program."""
        return self.signature.key


def parts_of(captured: Captured, tensors: Sequence[torch.Tensor], count: int) -> list[list[torch.Tensor]]:
    """The tensors of a batch for each of `count` microbatches: those with samples are cut, the others are the same for all."""
    if count == 1:
        return [list(tensors)]
    dims, names = captured.batch_dims, captured.inputs[: len(tensors)]
    cut = [x.chunk(count, dims[n]) if n in dims else (x,) * count for n, x in zip(names, tensors, strict=True)]
    return [list(part) for part in zip(*cut, strict=True)]


def restore(program: Program, values: Callable[[int], Any]) -> Any:
    """The model's own output structure, with `values(i)` in the place of the i-th tensor."""
    leaves = [values(int(leaf.key)) if isinstance(leaf, Slot) else leaf for leaf in program.captured.out_leaves]
    return pytree.tree_unflatten(leaves, program.captured.out_spec)
