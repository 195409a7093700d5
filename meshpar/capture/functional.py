"""A program without changes in place, made by rewriting the few calls that need it: tracing once more would cost half of a capture.

    x.to(dtype) of that dtype, x.contiguous() of a contiguous x        ->  x
    x.to(dtype), x.chunk(2), x.flatten(), x.mT, x.expand_as(y), ...    ->  _to_copy, split, view, transpose, expand, ...
    y = x * 2;  y.add_(1);  z = y.sum()                                ->  y = x * 2;  y1 = add(y, 1);  z = y1.sum()

`run_decompositions` makes a program functional by tracing it again under autograd, functional tensors and fake tensors. Where nothing is
changed in place that another value can see, all that comes of it is this: composite operators that may return a view of their operand are
written out, and what changes a value gives a new one. The former are run here, each on its own, and what they call takes their place.

Left to torch: changes of inputs, of parts of a value, and of what other values lie in too; sections with a graph of their own; sizes that
depend on data; operators that draw in place, or keep statistics behind their schema.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from meshpar._torch import FakeTensor, OpOverload, TorchDispatchMode, is_composite, is_written_out, only_composites, pytree
from meshpar.capture.decompositions import WRITTEN_OUT
from meshpar.graph.operators import draws

_SPECIAL, _DETACH = frozenset(WRITTEN_OUT), torch.ops.aten.detach_.default


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program with nothing changed in place, and no composite operator that may be a view."""
    if any(_needs_a_trace(node) for node in program.graph.nodes):
        return _traced(program)
    recorded = _copy(program.graph)
    names = [(spec.arg, spec.arg.name) for spec in program.graph_signature.output_specs]
    if _Rewriting(program).done():
        return program
    program.graph_module.graph = recorded  # as it was: torch's trace names and places calls by it
    for argument, name in names:
        argument.name = name
    return _traced(program)


def _traced(program: ExportedProgram) -> ExportedProgram:
    """As torch makes it."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    called = {node.target for graph in graphs for node in graph.nodes if isinstance(node.target, OpOverload)}
    with only_composites(called.union(WRITTEN_OUT)):
        return program.run_decompositions(dict(WRITTEN_OUT))


def _copy(graph: fx.Graph) -> fx.Graph:
    copies: dict[fx.Node, fx.Node] = {}
    new = fx.Graph()
    for node in graph.nodes:
        copies[node] = new.node_copy(node, copies.__getitem__)
    return new


def _needs_a_trace(node: fx.Node) -> bool:
    """Whether this node, wherever it stands, is for torch to trace."""
    if node.op != "call_function":
        return node.op == "get_attr"
    if _is_symbolic(node.meta.get("val")):
        return True
    if not isinstance(node.target, OpOverload):
        return node.target is not operator.getitem
    changes, rewritten = node.target._schema.is_mutable, is_written_out(node.target)
    return node.target in _SPECIAL or (changes and draws(node)) or ((changes or rewritten) and "norm" in str(node.target))


def _is_symbolic(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    sizes = [n for leaf in leaves for n in (leaf.shape if isinstance(leaf, Tensor) else (leaf,))]
    return any(isinstance(n, torch.SymInt | torch.SymFloat | torch.SymBool) for n in sizes)


class _Rewriting:
    """Rewrites the calls of a program in order, and knows which values lie in one memory."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program, self.graph = program, program.graph
        self.place = {node: i for i, node in enumerate(self.graph.nodes)}
        self.sharing: dict[int, list[fx.Node]] = {}
        """Memory -> the nodes whose values lie there, so far."""
        for node in self.graph.nodes:
            for source in node.all_input_nodes:
                source.users.setdefault(node)  # export (torch 2.13) forgets some, of sections without gradients

    def done(self) -> bool:
        """Rewrite every call. False where a change is not that simple."""
        for node in list(self.graph.nodes):
            if not isinstance(node.target, OpOverload):
                self._lies(node)
            elif node.target._schema.is_mutable:
                if not self._made_new(node):
                    return False
            elif is_written_out(node.target):
                if not self._write_out(node):
                    return False
            else:
                self._lies(node)
        return True

    def _lies(self, node: fx.Node) -> None:
        if isinstance(value := node.meta.get("val"), FakeTensor):
            self.sharing.setdefault(_memory(value), []).append(node)

    # -- composite operators ---------------------------------------------------------------------------------------------------------------

    def _write_out(self, node: fx.Node) -> bool:
        """Put what a composite operator calls in its place. False where that changes something in place."""
        with self.graph.inserting_before(node):
            recorder = _Recorder(node)
            result = recorder.run()
        for made in recorder.calls:
            self.place[made] = self.place[node]
            self._lies(made)
        if isinstance(result, Tensor):
            self._replace(node, recorder.node_of(result))
        else:
            for user in list(node.users):
                self._replace(user, recorder.node_of(result[user.args[1]]))
                self.graph.erase_node(user)
        self.graph.erase_node(node)
        return not any(isinstance(made.target, OpOverload) and made.target._schema.is_mutable for made in recorder.calls)

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        self.program.graph_signature.replace_all_uses(old.name, new.name)
        old.replace_all_uses_with(new)

    # -- changes in place ------------------------------------------------------------------------------------------------------------------

    def _made_new(self, node: fx.Node) -> bool:
        """Put an operator that gives a new value in the place of one that changes its operand. False where others would see the change."""
        assert isinstance(node.target, OpOverload)
        instead, old, value = _giving(node.target), node.args[0] if node.args else None, node.meta.get("val")
        if instead is None or not isinstance(old, fx.Node) or not isinstance(value, FakeTensor):
            return False
        if self._is_seen(old, node) and node.target is not _DETACH:  # (which changes no value)
            return False
        if not _fits(instead, node, value):
            return False
        with self.graph.inserting_before(node):
            new = self.graph.call_function(instead, node.args, node.kwargs)
        new.meta = dict(node.meta)
        self.place[new] = self.place[node]
        self._lies(new)
        self._replace(node, new)
        for user in self._later(old, node):
            if user.op == "output":
                self.program.graph_signature.replace_all_uses(old.name, new.name)
            user.replace_input_with(old, new)
        self.graph.erase_node(node)
        return True

    def _is_seen(self, old: fx.Node, change: fx.Node) -> bool:
        """Whether something besides the readers of `old` sees it change: a tensor of the model or the batch, or what shares its memory."""
        others = self.sharing.get(_memory(old.meta["val"]), [])
        return any(other.op == "placeholder" or (other is not old and self._later(other, change)) for other in others)

    def _later(self, node: fx.Node, than: fx.Node) -> list[fx.Node]:
        """What reads a node after another one."""
        return [user for user in node.users if self.place[user] > self.place[than]]


def _memory(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


@cache
def _giving(changing: OpOverload) -> OpOverload | None:
    """The operator that gives as a new value what this one writes into its first operand."""
    name = changing._schema.name.removeprefix("aten::")
    written = [i for i, one in enumerate(changing._schema.arguments) if one.alias_info is not None and one.alias_info.is_write]
    packet = getattr(torch.ops.aten, name[:-1], None)
    if changing.namespace != "aten" or not name.endswith("_") or packet is None or written != [0] or is_composite(changing):
        return None
    found = getattr(packet, changing._overloadname, None)
    if found is None or found._schema.is_mutable or is_written_out(found):
        return None
    names = [[one.name for one in schema.arguments] for schema in (changing._schema, found._schema)]
    return found if names[0] == names[1] else None


def _fits(instead: Callable[..., Any], node: fx.Node, value: Tensor) -> bool:
    """Whether a new value is of the dtype and shape of the one that is written into."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    with torch.no_grad():
        found = instead(*args, **kwargs)
    return isinstance(found, Tensor) and (found.shape, found.dtype) == (value.shape, value.dtype)


class _Recorder(TorchDispatchMode):
    """Runs one call on the fake tensors of its operands and writes a node for every operator below."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.node, self.graph = node, node.graph
        self.calls: list[fx.Node] = []
        self.held: dict[int, tuple[Tensor, fx.Node]] = {}  # (with the tensor, so that no other comes to lie where it was)

    def run(self) -> Any:
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), self._value)
        assert isinstance(self.node.target, OpOverload)
        with torch.no_grad(), self:
            return self.node.target.decompose(*args, **kwargs)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that gives a tensor."""
        return self.held[id(tensor)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result  # it asks for a device, or a size
        args, kwargs = pytree.tree_map_only(Tensor, self.node_of, (args, kwargs or {}))
        call = self._call(func, args, kwargs, result)
        for i, one in enumerate(() if isinstance(result, Tensor) else result):
            self._call(operator.getitem, (call, i), {}, one)
        return result

    def _value(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, Tensor):
            self.held[id(value)] = value, node
        return value

    def _call(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        call = self.graph.call_function(target, args, kwargs)
        call.meta = {**self.node.meta, "val": value}
        self.calls.append(call)
        if isinstance(value, Tensor):
            self.held[id(value)] = value, call
        return call
