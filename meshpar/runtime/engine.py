"""What runs programs over the parameters of this rank: the whole model at once, or, in `pipeline`, its stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from meshpar.compile.program import Program
from meshpar.runtime.blocks import Tree
from meshpar.runtime.data_parallel import DataParallelism
from meshpar.runtime.steps import check_trained

Inputs = Mapping[str, Any]
"""What a graph is run on, by the names of its placeholders: the tensors of a microbatch, denominators, the random key."""
Functions = Mapping[tuple[str, int, tuple[str, ...]], fx.Graph]
"""For what ("step", "outputs", "counts"), in which tree, the blocks that share a function -> its graph; of all that a rank runs."""
OutsideLoss = Callable[[int, Mapping[int, torch.Tensor]], torch.Tensor]
"""The number of a microbatch and its outputs -> its loss."""


class Counting:
    """Counts the denominators of steps, in a tree of its own: that needs no parameters, so no rank gathers any for it."""

    def __init__(self, buffers: Mapping[str, torch.Tensor]) -> None:
        self._tree = Tree({}, dict(buffers))

    def learn(self, program: Program) -> None:
        """Learn to count for a program."""
        if program.counts is not None:
            self._tree.add_program(program.counts.key, program.counts.graph, constants=program.counts.captured.constants)

    def functions(self, program: Program) -> Functions:
        """What it runs for a program."""
        return {} if program.counts is None else {("counts", 0, at): g for at, g in self._tree.functions(program.counts.key).items()}

    def learn_like(self, program: Program, like: Program, functions: Functions) -> None:
        """Learn to count for a program that is one that is known, but for its functions."""
        if program.counts is not None and like.counts is not None:
            self._tree.add_like(program.counts.key, like.counts.key, _of(functions, "counts", 0))

    def forget(self, program: Program) -> None:
        """Forget a program: it will not run again."""
        if program.counts is not None:
            self._tree.remove_program(program.counts.key)

    def count(self, program: Program, parts: Sequence[Inputs]) -> dict[str, torch.Tensor]:
        """The denominators of a step, by the inputs that want them: sums over its microbatches, and over all data ranks."""
        if program.counts is None:
            return {}
        with torch.no_grad():
            counted = [self._tree.run(program.counts.key, *arguments(program.counts, part)) for part in parts]
        names = program.extra.denominators
        return {name: sum(values[1:], start=values[0]) for name, values in zip(names, zip(*counted, strict=True), strict=True)}


class Engine(ABC):
    """Runs programs. `trees` hold the parameters of this rank, one for each of its stages; they know the `first` program."""

    def __init__(self, trees: Mapping[int, Tree], first: Program) -> None:
        self.trees = trees
        self.counting = Counting({name: buffer for tree in trees.values() for name, buffer in tree.named_buffers()})
        self.counting.learn(first)

    def add(self, program: Program) -> None:
        """Learn a program."""
        teach(self.trees, program)
        self.counting.learn(program)

    def functions(self, program: Program) -> Functions:
        """The different functions that this rank runs for a program that it knows."""
        here = [held for held in _held(program) if held.tree in self.trees]
        own = {(one.purpose, one.tree, at): g for one in here for at, g in self.trees[one.tree].functions(one.key).items()}
        return {**own, **self.counting.functions(program)}

    def add_like(self, program: Program, like: Program, functions: Functions) -> None:
        """Learn a program that is `like`, a known one, but for its functions."""
        for one, other in zip(_held(program), _held(like), strict=True):
            if one.tree in self.trees:
                self.trees[one.tree].add_like(one.key, other.key, _of(functions, one.purpose, one.tree))
        self.counting.learn_like(program, like, functions)

    def forget(self, program: Program) -> None:
        """Forget a program: it will not run again."""
        for held in _held(program):
            if held.tree in self.trees:
                self.trees[held.tree].remove_program(held.key)
        self.counting.forget(program)

    @abstractmethod
    def run(self, program: Program, inputs: Inputs, stay: Collection[int] = ()) -> tuple[Any, ...]:
        """All outputs of a program for one batch, without gradients where there is a pipeline.

        Those of `stay` are on the ranks of the stages that return them; elsewhere they are None.
        """

    @abstractmethod
    def step(
        self,
        program: Program,
        parts: Sequence[Inputs],
        *,
        backward: bool,
        scale: torch.Tensor | None = None,
        outside: OutsideLoss | None = None,
    ) -> torch.Tensor:
        """The sum of the losses of all microbatches, the same on every rank; with `backward`, gradients are complete at the end.

        Gradients are those of the loss times `scale`. The loss is the program's, or what `outside` makes of its outputs (in float64).
        """


def teach(trees: Mapping[int, Tree], program: Program) -> None:
    """Add a program, or its share of every stage, to the trees."""
    for held in _held(program):
        if held.tree in trees:
            trees[held.tree].add_program(held.key, held.graph, constants=program.captured.constants, mutations=held.mutations)


@dataclass(frozen=True)
class _Held:
    """What a tree holds of a program: for what, under which key."""

    purpose: str
    key: str
    tree: int
    graph: fx.Graph
    mutations: tuple[str, ...]


def _held(program: Program) -> list[_Held]:
    if program.all_stages:
        ways = (("step", program.key, program.stages), ("outputs", every_output(program), program.all_stages))
        return [_Held(purpose, key, one.index, one.graph, one.mutations) for purpose, key, stages in ways for one in stages]
    found = [_Held("outputs", program.key, 0, program.graph, program.captured.mutations)]
    if (one := program.step) is not None:
        found.append(_Held("step", loss_alone(program), 0, one.graph, one.mutations))
    return found


def _of(functions: Functions, name: str, index: int) -> dict[tuple[str, ...], fx.Graph]:
    """Those of one tree for one key."""
    return {at: graph for (one, tree, at), graph in functions.items() if (one, tree) == (name, index)}


def every_output(program: Program) -> str:
    """The name under which the stages of a pipeline run a program for all its outputs."""
    return f"{program.key}_all"


def loss_alone(program: Program) -> str:
    """The name under which a program that is no pipeline's runs for its loss alone, where its logits are to be few at a time."""
    return f"{program.key}_loss"


def arguments(program: Program, inputs: Inputs) -> list[Any]:
    """The values of a graph's placeholders, in their order."""
    return [inputs[name] for name in program.inputs]


def times(scale: torch.Tensor | None, loss: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a loss times `scale` with respect to the loss, in its dtype; what backward starts from."""
    return None if scale is None else torch.ones_like(loss) * scale.to(loss.device, loss.dtype)


def loss_in(program: Program, outputs: Sequence[torch.Tensor], microbatch: int, outside: OutsideLoss | None) -> torch.Tensor:
    """The loss of a microbatch, of all outputs of its program."""
    if outside is not None:
        return outside(microbatch, dict(enumerate(outputs)))
    assert program.captured.loss is not None
    return outputs[program.captured.loss]


class Whole(Engine):
    """Every rank runs the whole model: microbatches one after the other."""

    def __init__(self, tree: Tree, data: DataParallelism, first: Program) -> None:
        super().__init__({0: tree}, first)
        self._tree, self._data = tree, data

    def run(self, program: Program, inputs: Inputs, stay: Collection[int] = ()) -> tuple[Any, ...]:
        """All outputs of a program for one batch."""
        self._data.microbatch(0, 1)
        with self._forgetting():
            return self._tree.run(program.key, *arguments(program, inputs))

    def step(
        self,
        program: Program,
        parts: Sequence[Inputs],
        *,
        backward: bool,
        scale: torch.Tensor | None = None,
        outside: OutsideLoss | None = None,
    ) -> torch.Tensor:
        """The sum of the losses of all microbatches."""
        with self._forgetting():
            found = [self._part(program, part, i, len(parts), backward, scale, outside) for i, part in enumerate(parts)]
        total = found[0]
        for loss in found[1:]:
            total = total + loss
        return total

    def _part(
        self,
        program: Program,
        part: Inputs,
        index: int,
        count: int,
        backward: bool,
        scale: torch.Tensor | None,
        outside: OutsideLoss | None,
    ) -> torch.Tensor:
        """The loss of one microbatch, and its backward."""
        self._data.microbatch(index, count)
        loss = self._loss(program, part, index, outside)
        if backward:
            check_trained(loss)
            self._data.alone()
            loss.backward(times(scale, loss))
            self._data.done(index, count)
        return loss.detach() if outside is None else loss.detach().double()

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """What raises inside leaves no step half done behind: parameters are those of an optimizer again, and the next step trains them."""
        try:
            yield
        except BaseException:
            self._data.reset()
            raise

    def _loss(self, program: Program, part: Inputs, index: int, outside: OutsideLoss | None) -> torch.Tensor:
        if program.step is not None and outside is None:
            return self._tree.run(loss_alone(program), *(part[name] for name in program.step.inputs))[0]
        return loss_in(program, self._tree.run(program.key, *arguments(program, part)), index, outside)
