"""Where gradients flow: no_grad sections become detaches, and every value learns whether it needs a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from meshpar._torch import OpOverload, enter_autocast, exit_autocast, set_grad_enabled
from meshpar.capture.blame import source_of
from meshpar.errors import CaptureError
from meshpar.graph.facts import Info, facts, gives_several, infos_of, set_facts

_SET_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"

STOPS: frozenset[str] = frozenset(
    {
        "aten::detach",
        "aten::zeros_like",
        "aten::ones_like",
        "aten::full_like",
        "aten::empty_like",
        "aten::rand_like",
        "aten::randn_like",
        "aten::randint_like",
        "aten::new_zeros",
        "aten::new_ones",
        "aten::new_full",
        "aten::new_empty",
        "aten::new_empty_strided",
    }
)
"""Floating operators whose result needs no gradient although an operand does."""


def inline(module: fx.GraphModule) -> None:
    """Inline the sub-graphs that export makes of `torch.no_grad()` and `torch.autocast()` sections.

    What enters a section without gradients is detached. An autocast section keeps its borders as calls, which torch turns into explicit
    casts when it decomposes the program.

        y = no_grad_section(w, x)     ->     w_, x_ = detach(w), detach(x);  y = <the section on w_, x_>
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and str(node.target) in (_SET_GRAD, _AUTOCAST):
            with module.graph.inserting_before(node):
                results = _section(module.graph, module, node, [(value,) for value in _operands(node)], 1)
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]][0])
                module.graph.erase_node(user)
            for source in node.all_input_nodes:
                source.users.setdefault(node)  # export (torch 2.13) forgets that a section without results reads anything
            module.graph.erase_node(node)
    for node in reversed(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.recompile()


def _operands(call: fx.Node) -> tuple[Any, ...]:
    return call.args[2:] if str(call.target) == _SET_GRAD else call.args[5:]


Levels = tuple[Any, ...]
"""A value as it is inside a section, in the section around that, and so on; outside of all of them last."""


def _section(graph: fx.Graph, owner: fx.GraphModule, call: fx.Node, operands: list[Levels], depth: int) -> list[Levels]:
    """Copy the section that `call` runs to the insertion point of `graph`; returns its results as the caller sees them."""
    if str(call.target) == _AUTOCAST:
        entered = graph.call_function(enter_autocast, call.args[:4])
        entered.meta.update(call.meta)
        results = _copy(graph, _body(owner, call.args[4]), [(levels[0], *levels) for levels in operands], depth + 1)
        graph.call_function(exit_autocast, (entered,)).meta.update(call.meta)
        return [levels[1:] for levels in results]
    body = _body(owner, call.args[1])
    origin = next((node for node in body.graph.nodes if node.op == "call_function"), call)
    if call.args[0]:  # gradients are on again, also for what came in without
        inside = [(levels[-1], *levels) for levels in operands]
    else:
        _refuse_overwriting(body, [levels[0] for levels in operands])
        inside = [(_detached(graph, levels[0], origin), *levels) for levels in operands]
    return [levels[1:] for levels in _copy(graph, body, inside, depth + 1)]


def _copy(graph: fx.Graph, body: fx.GraphModule, operands: list[Levels], depth: int) -> list[Levels]:
    made: dict[fx.Node, Levels] = {}
    items: dict[fx.Node, list[Levels]] = {}
    placeholders = iter(operands)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            made[node] = next(placeholders)
        elif node.op == "output":
            return [made[value] if isinstance(value, fx.Node) else (value,) * depth for value in node.args[0]]
        elif str(node.target) in (_SET_GRAD, _AUTOCAST):
            items[node] = _section(graph, body, node, [made[value] for value in _operands(node)], depth)
        elif node.op == "call_function" and node.args and node.args[0] in items:
            made[node] = items[node.args[0]][node.args[1]]
        elif (same := _itself(node)) is not None:
            made[node] = made[same]
        elif node.op != "get_attr":
            made[node] = (graph.node_copy(node, lambda value: made[value][0]),) * depth
    raise AssertionError("a section without an output")


def _itself(node: fx.Node) -> fx.Node | None:
    """The operand that a call like `x.to(x.dtype)` gives back as it is: outside of the section it is still the tensor it was before."""
    if not isinstance(node.target, OpOverload) or node.target._schema.name not in _MAY_RETURN_ITSELF:
        return None
    source = node.args[0]
    before, after = source.meta.get("val") if isinstance(source, fx.Node) else None, node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        return None
    shared = before.untyped_storage()._cdata == after.untyped_storage()._cdata
    return source if shared and before.shape == after.shape and before.stride() == after.stride() else None  # type: ignore[return-value]


_MAY_RETURN_ITSELF = frozenset(
    f"aten::{name}"
    for name in ("to", "contiguous", "type_as", "dropout", "flatten", "lift_fresh", "resolve_conj", "resolve_neg", "real", "expand_as")
)


def _body(owner: fx.GraphModule, reference: Any) -> fx.GraphModule:
    found = owner.get_submodule(str(reference.target))
    assert isinstance(found, fx.GraphModule)
    return found


def _refuse_overwriting(body: fx.GraphModule, operands: list[Any]) -> None:
    """A value overwritten without gradients keeps its old gradient in eager mode; no functional graph says that."""
    outer = dict(zip((node for node in body.graph.nodes if node.op == "placeholder"), operands, strict=True))
    for node in body.graph.nodes:
        if any(isinstance(outer.get(base), fx.Node) and _has_parameter(outer[base]) for base in _overwritten(node)):
            line = source_of(node.meta.get("stack_trace")) or "a line unknown"
            raise CaptureError(
                f"{node.target} at {line} overwrites, inside torch.no_grad(), a value that gradients flow through.\n"
                "  Compute a new tensor instead, for instance with torch.where, outside of no_grad."
            )


def _overwritten(node: fx.Node) -> Iterator[fx.Node]:
    """What a call writes to: for a view, what it is a view of."""
    if not isinstance(node.target, OpOverload):
        return
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            base = node.kwargs.get(argument.name, node.args[place] if place < len(node.args) else None)
            while isinstance(base, fx.Node) and base.op == "call_function" and base.args and _may_alias(base):
                base = base.args[0]
            if isinstance(base, fx.Node):
                yield base


def _may_alias(node: fx.Node) -> bool:
    """Whether the result of a call may be its first operand, or a view of it."""
    if not isinstance(node.target, OpOverload):
        return True
    schema = node.target._schema
    return schema.name in _MAY_RETURN_ITSELF or any(result.alias_info is not None for result in schema.returns)


def _has_parameter(node: fx.Node) -> bool:
    """Whether a parameter is among the ancestors of `node`."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op == "placeholder" and current.name.startswith("p_"):
            return True
        new = [source for source in current.all_input_nodes if source not in seen]
        seen.update(new)
        stack.extend(new)
    return False


def _detached(graph: fx.Graph, value: Any, origin: fx.Node) -> Any:
    """`value` cut off from its gradient, if it can have one (a buffer cannot, and may be written to in the section)."""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(tensor, torch.Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        return value
    if value.op == "placeholder" and value.name.startswith("b_"):
        return value
    node = graph.call_function(torch.ops.aten.detach.default, (value,))
    node.meta.update({key: origin.meta[key] for key in ("nn_module_stack", "stack_trace") if key in origin.meta} | {"val": tensor})
    return node


class GradWatch(TorchFunctionMode):
    """Refuses a no_grad section inside an autocast section: export (torch 2.13) would forget it, and gradients would flow."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is set_grad_enabled and not args[0] and torch.is_autocast_enabled(self.device_type):
            raise CaptureError(
                "The forward switches gradients off inside an autocast section, which torch.export does not carry over.\n"
                "  Swap the two (torch.autocast inside torch.no_grad), or detach() the values instead."
            )
        return func(*args, **(kwargs or {}))

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type


def propagate(graph: fx.Graph, leaves: Mapping[str, bool]) -> None:
    """Set `requires_grad` of every `Info` in `graph`, given that of the placeholders and `get_attr` targets."""
    for node in graph.nodes:
        info = facts(node).info
        if info is None:
            continue
        if node.op in ("placeholder", "get_attr"):
            needs = leaves.get(str(node.target), False)
        else:
            needs = not stops(node) and any(_needs(source, node) for source in node.all_input_nodes)
        given = tuple(_with(i, needs) for i in infos_of(node))
        set_facts(node, replace(facts(node), info=given if gives_several(node) else given[0]))


def stops(node: fx.Node) -> bool:
    """Whether no gradient goes through a node."""
    return isinstance(node.target, OpOverload) and node.target._schema.name in STOPS


def _needs(source: fx.Node, node: fx.Node) -> bool:
    infos = infos_of(source)
    index = node.args[1] if gives_several(source) and len(node.args) > 1 else None
    picked = [infos[index]] if isinstance(index, int) else infos
    return any(i is not None and i.requires_grad for i in picked)


def _with(info: Info | None, needs: bool) -> Info | None:
    if info is None:
        return None
    return Info(info.shape, info.dtype, needs and (info.dtype.is_floating_point or info.dtype.is_complex))
