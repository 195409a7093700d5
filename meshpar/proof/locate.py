"""Where a parallel program and its model part first: the captured graph on one device and the lowered one on simulated ranks, side by side.

    captured (one device)          lowered (every rank)                   compared
      y = linear(x, w)               y = linear(x, w)       tp: P          sum over tp of the ranks' y   =  y
      z = y + r                      c = p_to_i(y)          tp: I          c on every rank               =  y
                                     z = c + r              tp: I          z on every rank               =  z

Every value of the lowered program says whose value it is and with which types (`passes.lower`), so each can be compared with what it
should be. The first that differs, in the order of the forward, was computed from operands that are right: what computed it is the place.
Gradients are compared edge by edge (of a value towards one of its uses), in the order of the backward; the first that is wrong came out of
a use whose own gradient was right.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from meshpar._torch import LocalTensor, maybe_disable_local_tensor_mode
from meshpar.compile.program import Program
from meshpar.graph.facts import Change, facts, gives_several, info_of
from meshpar.graph.op import op_name
from meshpar.proof.static.expanded import separated
from meshpar.roles import typed
from meshpar.runtime.engine import Inputs
from meshpar.runtime.model import ParallelModel
from meshpar.sharding.types import Invariant, Owned, Partial, Ragged, Replicate, Shard, Type
from meshpar.simulate import local_tensors

FAR = 1e-7
"""Relative differences in float64 that no rounding makes, whatever cancels."""
FLOOR = 1e-3

Typed = tuple[tuple[str, int, tuple[Type, ...]], ...]
Edge = tuple[str, str]
HeldValue = tuple[torch.Tensor, "Typed", int]
"""A whole value, and how ranks hold it: the types of all results of what made it, and which of them it is."""


def first_difference(pm: ParallelModel, state: Mapping[str, torch.Tensor], batch: Mapping[str, Any] | tuple[Any, ...]) -> str | None:
    """The first operation of a step whose result, or gradient, is not the captured graph's; None when all agree.

    Runs the first microbatch of `batch` (the simulated ranks' local batches) through both graphs with the parameters and buffers of
    `state` (whole, by name). Call inside `simulate`, in float64.
    """
    program, inputs = _first_microbatch(pm, batch)
    if program.extra.random_key is not None:
        return None
    program = replace(program, graph=separated(program.graph))
    both = _Both(program, _coordinates(pm), inputs, state)
    return _forward(both) or _backward(both) or _sums(both)


def _first_microbatch(pm: ParallelModel, batch: Mapping[str, Any] | tuple[Any, ...]) -> tuple[Program, Inputs]:
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch, {})
    count = pm.parallel_config.microbatches
    tensors, variant = pm._program(args, kwargs, count)
    program = variant.program
    return program, pm._parts(program, tensors, count)[0]


def _coordinates(pm: ParallelModel) -> dict[int, dict[str, int]]:
    """Rank -> its coordinate on every typed axis; data axes are one, as when they are typed."""
    with maybe_disable_local_tensor_mode():
        names, grid = pm.mesh.mesh_dim_names or (), pm.mesh.mesh
        sizes = dict(zip(names, grid.shape, strict=True))
        found = {}
        for place in product(*(range(n) for n in grid.shape)):
            at = dict(zip(names, place, strict=True))
            found[int(grid[place])] = {one: _place_on(axes, at, sizes) for one, axes in typed(names).items()}
        return found


def _place_on(axes: Sequence[str], at: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """The place on several axes as one."""
    place = 0
    for name in axes:
        place = place * sizes[name] + at[name]
    return place


# ---- the two runs ----------------------------------------------------------------------------------------------------------------------


@dataclass
class _Both:
    """A program and its captured graph on the same inputs: all values, and the gradient of every edge."""

    program: Program
    at: Mapping[int, Mapping[str, int]]
    inputs: Inputs
    state: Mapping[str, torch.Tensor]
    edges: dict[Edge, torch.Tensor] = field(default_factory=dict)
    """Of the captured graph: (value, use) -> gradient."""
    local_edges: dict[Edge, dict[int, torch.Tensor]] = field(default_factory=dict)
    """Of the lowered graph, by rank."""
    leaves: dict[fx.Node, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def captured(self) -> dict[str, fx.Node]:
        """The nodes of the captured graph, by name."""
        return {node.name: node for node in self.program.captured.graph.nodes}

    @cached_property
    def right(self) -> dict[str, Any]:
        """The values of the captured graph, by node."""
        with maybe_disable_local_tensor_mode():
            constants = self.program.captured.constants

            def leaf(node: fx.Node) -> Any:
                if node.op == "placeholder":
                    return self._whole(node)
                found = self.state.get(str(node.target), constants.get(str(node.target)))
                assert found is not None
                return found.detach().clone().requires_grad_(info_of(node).requires_grad)

            def keep(edge: Edge, gradient: torch.Tensor) -> None:
                self.edges[edge] = self.edges[edge] + gradient if edge in self.edges else gradient.clone()

            return _run(self.program.captured.graph, leaf, keep, self.program.captured.loss)

    @cached_property
    def ranks(self) -> dict[str, Any]:
        """The values of the lowered graph, by node, each by rank."""
        constants = self.program.captured.constants

        def leaf(node: fx.Node) -> Any:
            name = str(node.target)
            if node.op == "placeholder":
                return self.inputs[name]
            if name not in self.state:
                return constants[name]
            parts = {rank: self.part(self.state[name], _typed(node), rank, 0) for rank in self.at}
            found = _joined(parts).requires_grad_(info_of(node).requires_grad)
            self.leaves[node] = found
            return found

        def keep(edge: Edge, gradient: torch.Tensor) -> None:
            parts = _parts(gradient)
            before = self.local_edges.get(edge)
            self.local_edges[edge] = parts if before is None else {rank: before[rank] + part for rank, part in parts.items()}

        return _run(self.program.graph, leaf, keep, self.program.captured.loss, kept=_parts)

    def _whole(self, node: fx.Node) -> Any:
        """An input of all ranks together."""
        value = self.inputs[str(node.target)]
        lowered = next(n for n in self.program.graph.nodes if n.op == "placeholder" and n.target == node.target)
        if not isinstance(value, torch.Tensor):
            return value
        parts, shape = local_tensors(value), info_of(node).shape
        whole = torch.empty(shape, dtype=value.dtype)
        places = torch.arange(whole.numel()).reshape(shape)
        for rank, part in parts.items():
            whole.view(-1)[self.part(places, _typed(lowered), rank, 0).reshape(-1)] = part.reshape(-1)
        return whole

    def part(self, whole: torch.Tensor, typed: Typed, rank: int, index: int) -> torch.Tensor:
        """What `rank` holds of a whole value."""
        for axis, size, types in typed:
            type_ = _one(types, index)
            if isinstance(type_, Shard):
                with maybe_disable_local_tensor_mode():
                    pieces = [whole.narrow(type_.dim, a, b - a) for a, b in type_.ranges(size, self.at[rank][axis])]
                    whole = torch.cat(pieces, type_.dim) if pieces else whole.narrow(type_.dim, 0, 0)
        return whole

    def distance(self, held: HeldValue, parts: Mapping[int, torch.Tensor], summed: type, floor: float) -> float:
        """How far the ranks' parts are from the whole they are parts of; those of type `summed` are added up over their axis first."""
        right, typed, index = held
        add = [axis for axis, _, types in typed if isinstance(_one(types, index), summed)]
        worst = 0.0
        with maybe_disable_local_tensor_mode(), torch.no_grad():
            right = right.double()
            scale = right.abs().max().item() + floor if right.numel() else 1.0
            for rank in parts:
                others = [r for r in parts if all(self.at[r][a] == self.at[rank][a] for a in self.at[rank] if a not in add)]
                found = sum(parts[r].double() for r in others)
                wanted = self.part(right, typed, rank, index).double()
                assert isinstance(found, torch.Tensor)
                if found.shape != wanted.shape:
                    return float("inf")
                if wanted.numel():
                    gap = torch.where(found == wanted, 0.0, found - wanted).abs().max().item()
                    worst = max(worst, gap / scale if scale else gap) if gap == gap else float("inf")
        return worst


def _one(types: Sequence[Type], index: int) -> Type:
    return types[index] if len(types) > 1 else types[0]


def _run(
    graph: fx.Graph,
    leaf: Callable[[fx.Node], Any],
    keep: Callable[[Edge, torch.Tensor], None],
    loss: int | None,
    *,
    kept: Callable[[torch.Tensor], Any] = lambda x: x.detach().clone(),
) -> dict[str, Any]:
    """Run a graph node by node, forward and backward: the tensors of its nodes; gradients of edges go to `keep`."""
    values: dict[fx.Node, Any] = {}
    found: dict[str, Any] = {}
    with torch.enable_grad():
        for node in graph.nodes:
            if node.op == "output":
                outputs = node.args[0]
                assert loss is not None
                values[outputs[loss]].sum().backward()
            elif node.op != "call_function":
                values[node] = leaf(node)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), partial(_used, values, node, keep))
                values[node] = node.target(*args, **kwargs)
            if isinstance(values.get(node), torch.Tensor):
                found[node.name] = kept(values[node])
    return found


def _used(values: Mapping[fx.Node, Any], user: fx.Node, keep: Callable[[Edge, torch.Tensor], None], node: fx.Node) -> Any:
    """A value on its way to one use: its gradient there is kept."""
    value = values[node]
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return value
    way = value.view_as(value)
    way.register_hook(lambda gradient: keep((node.name, user.name), gradient))
    return way


def _parts(x: torch.Tensor) -> dict[int, torch.Tensor]:
    with maybe_disable_local_tensor_mode():
        return {rank: part.detach().clone() for rank, part in local_tensors(x).items()}


def _joined(parts: Mapping[int, torch.Tensor]) -> torch.Tensor:
    with maybe_disable_local_tensor_mode():
        return LocalTensor({rank: part.detach().clone().contiguous() for rank, part in parts.items()})


# ---- the comparison --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Whose value a node of the lowered graph holds: the captured node, and how ranks hold it."""

    node: fx.Node
    typed: Typed
    index: int


def _place(both: _Both, node: fx.Node) -> _Place | None:
    """Where the value of a lowered node comes from; None where that is not known, or ranks hold it in no simple way."""
    part = facts(node).part_of
    if part is None:
        return None
    origin, typed, index = both.captured.get(part.origin), part.typed, part.index
    if origin is None or any(isinstance(_one(types, index), Ragged | Owned) for _, _, types in typed):
        return None
    if gives_several(origin):
        origin = next((u for u in origin.users if u.target is operator.getitem and u.args[1] == index), None)
    return None if origin is None else _Place(origin, typed, index)


def _typed(node: fx.Node) -> Typed:
    """How ranks hold the value of a node, where that is known."""
    part = facts(node).part_of
    return () if part is None else part.typed


def _origin(both: _Both, node: fx.Node) -> fx.Node | None:
    """The captured node whose value a node holds."""
    part = facts(node).part_of
    return None if part is None else both.captured.get(part.origin)


def _before(typed: Typed, change: Change) -> Typed:
    """The types before a conversion."""
    return tuple((axis, size, (change.before,) if axis == change.axis else types) for axis, size, types in typed)


def _forward(both: _Both) -> str | None:
    for node in both.program.graph.nodes:
        place = _place(both, node)
        if node.op != "call_function" or place is None or not isinstance(both.ranks.get(node.name), dict):
            continue
        right = both.right.get(place.node.name)
        if right is None:
            continue
        floor = FLOOR * max((_size(both.right.get(n.name)) for n in place.node.all_input_nodes), default=0.0)
        gap = both.distance((right, place.typed, place.index), both.ranks[node.name], Partial, floor)
        if gap > FAR:
            return f"values part first in {_did(both, node)} (by {gap:.0e}); what it starts from is right."
    return None


def _size(value: Any) -> float:
    return value.abs().max().item() if isinstance(value, torch.Tensor) and value.numel() and value.dtype != torch.bool else 0.0


def _backward(both: _Both) -> str | None:
    floor = FLOOR * max(map(_size, both.edges.values()), default=0.0)
    for user in reversed(both.program.graph.nodes):
        for at, operand in enumerate(user.all_input_nodes):
            place, wanted = _place(both, operand), _expected(both, operand, user)
            if place is None or wanted is None:
                continue
            change = facts(user).joined[at] if facts(user).joined else facts(user).conversion
            typed = place.typed if change is None else _before(place.typed, change)
            parts = both.local_edges.get((operand.name, user.name))
            if parts is None:
                parts = {r: torch.zeros_like(both.part(wanted, typed, r, place.index)) for r in both.at}
            gap = both.distance((wanted, typed, place.index), parts, Replicate, floor)
            if gap > FAR:
                to = _value(place.node)
                return (
                    f"gradients part first behind {_did(both, user)}, on their way to {to} (by {gap:.0e}); values are right, and so is the "
                    f"gradient that arrives there."
                )
    return None


def _expected(both: _Both, operand: fx.Node, user: fx.Node) -> torch.Tensor | None:
    """The gradient of a value towards one use, as the captured graph has it; None where that is not known."""
    place = _place(both, operand)
    if place is None or not info_of(place.node).requires_grad or user.op == "output":
        return None
    if facts(user).joined:
        items = [u for u in user.users if u.args[1] == user.all_input_nodes.index(operand)]
        return _sum(both, items[0]) if items else None
    if facts(user).conversion is not None:
        return _sum(both, user)
    use = _origin(both, user)
    if use is None or place.node not in use.all_input_nodes:
        return None
    found = both.edges.get((place.node.name, use.name))
    return torch.zeros_like(both.right[place.node.name]) if found is None else found


def _sum(both: _Both, node: fx.Node) -> torch.Tensor | None:
    """The gradient of a value towards all uses that one conversion of it has."""
    found = [_expected(both, node, user) for user in node.users]
    return None if not found or any(f is None for f in found) else sum(found)  # type: ignore[arg-type,return-value]


def _sums(both: _Both) -> str | None:
    """Parameters whose gradients are right on every edge and wrong in the end."""
    floor = FLOOR * max(map(_size, both.edges.values()), default=0.0)
    for node, leaf in both.leaves.items():
        place = _place(both, node)
        if place is None or not leaf.requires_grad or place.typed is None:
            continue
        wanted = sum(g for (name, _), g in both.edges.items() if name == place.node.name)
        if not isinstance(wanted, torch.Tensor):
            continue
        parts = _parts(leaf.grad) if leaf.grad is not None else {r: torch.zeros(()) for r in both.at}
        gap = both.distance((wanted, place.typed, place.index), parts, type(None), floor)
        if gap > FAR:
            axes = [axis for axis, _, types in place.typed if isinstance(types[0], Replicate)]
            over = ", ".join(axes) or "the ranks"
            return f"the gradients of {node.target} are right on every rank, and wrong when summed over {over} (by {gap:.0e})."
    return None


# ---- words -----------------------------------------------------------------------------------------------------------------------------


def _did(both: _Both, node: fx.Node) -> str:
    """What a node of the lowered graph does, in words of the model."""
    change, joined = facts(node).conversion, facts(node).joined
    if joined:
        names = [str(n.target) for n in node.all_input_nodes]
        return f"the sum over {joined[0].axis} of the gradients of {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
    if change is not None:
        place = _place(both, node)
        whose = "a value" if place is None else _value(place.node)
        types = f"from {change.before} to {change.after} on {change.axis}"
        return f"the conversion of {whose} {types} ({getattr(node.target, '__name__', node.target)})"
    rule = "; ".join(_ruled(both, node))
    return f"{_value(_origin(both, node) or node)}{f', by its rule {rule}' if rule else ''}"


def _value(node: fx.Node) -> str:
    if node.op == "get_attr":
        return f"{node.target}"
    if node.op == "placeholder":
        return f"the input {node.target}"
    name = op_name(node.target) if hasattr(node.target, "_schema") else getattr(node.target, "__name__", str(node.target))
    source = facts(node).source
    return f"{name} in {facts(node).module or 'the model'}{f' ({source})' if source else ''}"


def _ruled(both: _Both, node: fx.Node) -> Iterator[str]:
    """ "tp: S(2), S(1) -> P", for every axis on which anything is cut."""
    places = [_place(both, n) for n in _operands(node)]
    for number, (axis, _, outs) in enumerate(_typed(node)):
        uses = [_one(p.typed[number][2], p.index) for p in places if p is not None and len(p.typed) > number]
        if any(not isinstance(t, Invariant) for t in (*uses, *outs)):
            yield f"{axis}: {', '.join(map(str, uses))} -> {', '.join(map(str, outs))}"


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    """What the captured operator was called with: an operator may have become several calls."""
    for operand in node.all_input_nodes:
        if operand.op != "call_function" or facts(operand).part_of is not None or facts(operand).conversion is not None:
            yield operand
        else:
            yield from _operands(operand)
