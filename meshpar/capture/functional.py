"""A program without changes in place: traced once more by torch where there are some, else written out here, which costs half of a capture.

    x.to(dtype) of that dtype, x.contiguous() of a contiguous x        ->  x
    x.to(dtype), x.chunk(2), x.flatten(), x.mT, x.expand_as(y), ...    ->  _to_copy, split, view, transpose, expand, ...

`run_decompositions` makes a program functional by tracing it again under autograd, functional tensors and fake tensors. If no operator
changes anything, all that comes of it is that composite operators which may return a view of their operand are written out. So only those
are run here, each on its own, and what they call below takes their place.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from meshpar._torch import FakeTensor, OpOverload, TorchDispatchMode, is_written_out, pytree
from meshpar.capture.decompositions import WRITTEN_OUT
from meshpar.graph.operators import draws

_SPECIAL = frozenset(WRITTEN_OUT)


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program with nothing changed in place, and no composite operator that may be a view."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    if any(_needs_a_trace(node) for node in program.graph.nodes):
        return program.run_decompositions(dict(WRITTEN_OUT))
    for node in calls:
        if isinstance(node.target, OpOverload) and is_written_out(node.target):
            _write_out(program, node)
    return program


def _needs_a_trace(node: fx.Node) -> bool:
    """Whether this node is what torch has to trace: a change in place, a section with its own graph, sizes that depend on data."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    if not isinstance(node.target, OpOverload):
        return getattr(node.target, "__name__", "") != "getitem" or _is_symbolic(node.meta.get("val"))
    if node.target._schema.is_mutable or node.target in _SPECIAL or _is_symbolic(node.meta.get("val")):
        return True
    return is_written_out(node.target) and (draws(node) or _keeps_statistics(node))


def _is_symbolic(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    sizes = [n for leaf in leaves for n in (leaf.shape if isinstance(leaf, Tensor) else (leaf,))]
    return any(isinstance(n, torch.SymInt | torch.SymFloat | torch.SymBool) for n in sizes)


def _keeps_statistics(node: fx.Node) -> bool:
    """Whether an operator may update statistics without saying so in its schema."""
    return "norm" in str(node.target)


def _write_out(program: ExportedProgram, node: fx.Node) -> None:
    """Put what a composite operator calls in its place."""
    with program.graph.inserting_before(node):
        recorder = _Recorder(node)
        result = recorder.run()
        new = recorder.nodes_of(result)
    if isinstance(new, fx.Node):
        _replace(program, node, new)
    else:
        for user in list(node.users):
            _replace(program, user, new[user.args[1]])
    program.graph.erase_node(node)


def _replace(program: ExportedProgram, old: fx.Node, new: fx.Node) -> None:
    program.graph_signature.replace_all_uses(old.name, new.name)
    old.replace_all_uses_with(new)
    if not old.users and old.op == "call_function" and not isinstance(old.target, OpOverload):
        program.graph.erase_node(old)


class _Recorder(TorchDispatchMode):
    """Runs one call on the fake tensors of its operands and writes a node for every operator below."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.node, self.graph = node, node.graph
        self.made: dict[int, fx.Node] = {}
        self.kept: list[Tensor] = []  # so that no tensor is taken for another that had its place in memory

    def run(self) -> Any:
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), self._value)
        assert isinstance(self.node.target, OpOverload)
        with torch.no_grad(), self:
            return self.node.target.decompose(*args, **kwargs)

    def nodes_of(self, result: Any) -> Any:
        """The node of each tensor of a result."""
        return self._node(result) if isinstance(result, Tensor) else [self._node(one) for one in result]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result  # it asks for a device, or a size
        new_args, new_kwargs = pytree.tree_map_only(Tensor, self._node, (args, kwargs))
        call = self._call(func, new_args, new_kwargs, result)
        if isinstance(result, Tensor):
            self._keep(result, call)
        else:
            for i, one in enumerate(result):
                self._keep(one, self._call(operator.getitem, (call, i), {}, one))
        return result

    def _value(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, FakeTensor):
            self.made[id(value)] = node
        return value

    def _node(self, tensor: Tensor) -> fx.Node:
        return self.made[id(tensor)]

    def _keep(self, tensor: Tensor, node: fx.Node) -> None:
        self.kept.append(tensor)
        self.made[id(tensor)] = node

    def _call(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        call = self.graph.call_function(target, args, kwargs)
        call.meta = {**self.node.meta, "val": value}
        return call
