"""From an exported program to our graph: parameters by name, facts on every node, nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec
from torch.fx.node import map_arg

from meshpar.capture import examples
from meshpar.capture.blame import source_of
from meshpar.errors import CaptureError
from meshpar.graph import canonical
from meshpar.graph.facts import DataSized, Facts, Info, facts, info_of, set_facts
from meshpar.ops.expect import EXPECT

_CALL_NUMBER = re.compile(r"@\d+$")


@dataclass(frozen=True)
class Built:
    """The graph, the values of its constants, and the buffers whose new values end its output."""

    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]
    mutations: tuple[str, ...]
    overwritten: tuple[str, ...] = ()
    """The inputs that the forward changes in place, where the caller would see it."""


def build(program: ExportedProgram, renamed: Mapping[str, str], inputs: Sequence[str], *, prefix: str) -> Built:
    """Copy the nodes of `program` that are needed, in canonical order, into a new graph with `get_attr` nodes for all but the inputs.

    `renamed` maps an exported name to the model's own; `prefix` is what the export put before the paths of modules.
    """
    graph = fx.Graph()
    calls = canonical.arrange(_calls(program), _roots(program, renamed))
    leaves = _order_of_use(program, calls)
    constants = _constants(program, leaves, renamed)
    copies = _leaves(graph, program, leaves, {**renamed, **{name: new for name, (new, _) in constants.items()}}, inputs)
    for node in calls:
        copies[node] = _call(graph, node, copies, prefix)
    values, mutations = _results(program, copies, renamed)
    graph.output(values)
    return Built(graph, dict(constants.values()), mutations, _overwritten(program, copies))


def _overwritten(program: ExportedProgram, copies: Mapping[fx.Node, fx.Node]) -> tuple[str, ...]:
    names = {node.name: str(copies[node].target) for node in program.graph.nodes if node.op == "placeholder" and node in copies}
    specs = program.graph_signature.output_specs
    return tuple(dict.fromkeys(names[str(spec.target)] for spec in specs if spec.kind == OutputKind.USER_INPUT_MUTATION))


def _calls(program: ExportedProgram) -> list[fx.Node]:
    for node in program.graph.nodes:
        if node.op == "get_attr":
            raise CaptureError(
                f"The forward runs a sub-graph ({node.target}) that cannot be made flat. Replace torch.cond or scan by torch.where."
            )
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _roots(program: ExportedProgram, renamed: Mapping[str, str]) -> list[fx.Node]:
    """What the forward returns, in order, and the new values of what it changes, by name."""
    kept = [(spec, node) for spec, node in _outputs(program) if spec.kind != OutputKind.USER_INPUT_MUTATION]
    returned = [node for spec, node in kept if spec.kind == OutputKind.USER_OUTPUT]
    changed = [(renamed.get(str(spec.target), str(spec.target)), node) for spec, node in kept if spec.kind != OutputKind.USER_OUTPUT]
    return [*returned, *(node for _, node in sorted(changed, key=lambda one: one[0]))]


def _outputs(program: ExportedProgram) -> list[tuple[OutputSpec, fx.Node]]:
    """What the graph returns, and what each of it is. (By their places: torch 2.14 may have given nodes other names since.)"""
    return list(zip(program.graph_signature.output_specs, program.graph.output_node().args[0], strict=True))


def _order_of_use(program: ExportedProgram, calls: Sequence[fx.Node]) -> dict[str, None]:
    """The names of the placeholders, in the order in which they are used."""
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    used = (source.name for node in (*calls, output) for source in node.all_input_nodes if source.op == "placeholder")
    return dict.fromkeys(used)


def _constants(program: ExportedProgram, leaves: Mapping[str, None], renamed: Mapping[str, str]) -> dict[str, tuple[str, torch.Tensor]]:
    """Exported name -> (name in our graph, value) of every tensor that is neither a parameter nor a buffer of the model."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    found: dict[str, tuple[str, torch.Tensor]] = {}
    for spec in (specs[name] for name in leaves):
        if spec.kind != InputKind.USER_INPUT and spec.target is not None and spec.target not in renamed:
            value = program.constants[spec.target]
            if not isinstance(value, torch.Tensor):
                raise CaptureError(_opaque(value, next(node for node in program.graph.nodes if node.name == spec.arg.name)))
            found.setdefault(spec.target, (f"_constant_{len(found)}", value))
    return found


def _opaque(value: object, node: fx.Node) -> str:
    where = next((f" at {line}" for user in node.users if (line := source_of(user.meta.get("stack_trace")))), "")
    if isinstance(value, torch.Generator):
        return (
            f"The forward draws with a torch.Generator{where}: a graph would have the state that it had at capture for ever.\n"
            "  Draw without one (torch.rand(...), which is seeded by ParallelConfig.seed and the step), or outside of forward: in "
            "__init__, into a buffer, or in the training loop, and pass what was drawn in the batch."
        )
    return f"The forward uses a {type(value).__name__}{where}, which a graph cannot hold.\n  Compute with tensors, numbers and functions."


def _leaves(
    graph: fx.Graph, program: ExportedProgram, leaves: Mapping[str, None], renamed: Mapping[str, str], inputs: Sequence[str]
) -> dict[fx.Node, fx.Node]:
    """Placeholders for the batch first, then one `get_attr` per parameter, buffer and constant that is used."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    copies: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, fx.Node] = {}
    names = iter(inputs)
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            node = nodes[spec.arg.name]
            copies[node] = graph.placeholder(next(names))
            _describe(copies[node], node, module="")
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for spec in (specs[name] for name in leaves):
        if spec.kind != InputKind.USER_INPUT:
            node, name = nodes[spec.arg.name], renamed[str(spec.target)]
            if name not in attributes:
                attributes[name] = graph.get_attr(name)
                _describe(attributes[name], node, module=name.rpartition(".")[0])
            copies[node] = attributes[name]
    return copies


def _call(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node], prefix: str) -> fx.Node:
    args = map_arg(node.args, copies.__getitem__)
    kwargs = map_arg(examples.with_device(node), copies.__getitem__)
    copy = graph.create_node("call_function", node.target, args, kwargs, name=canonical.name_of(node))
    stack = [_CALL_NUMBER.sub("", path).removeprefix(prefix) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    stack = ["" if path == prefix.rstrip(".") else path for path in stack]
    _describe(copy, node, module=stack[-1] if stack else "")
    return set_facts(copy, replace(facts(copy), stack=tuple(dict.fromkeys(stack))))


def _describe(copy: fx.Node, node: fx.Node, *, module: str) -> None:
    value = node.meta.get("val")
    info = tuple(_info(item) for item in value) if isinstance(value, tuple | list) else _info(value)
    symbol = str(value) if isinstance(value, torch.SymInt) else None
    source = source_of(node.meta.get("custom", {}).get("source") or node.meta.get("stack_trace"))
    set_facts(copy, Facts(info, module, source=source, symbol=symbol))


def _keeps_bounds(new: fx.Node, name: str | None) -> bool:
    """Whether a parameter is overwritten by itself, clamped: as long as nothing is cut off that does nothing, which the graph checks.

    w.data.clamp_(-1, 1);  linear(x, w)        ->        expect(all(eq(clamp(w, -1, 1), w)), [True]);  linear(x, w)
    """
    old = new
    while old.op == "call_function" and old.target in _BOUNDS:
        old = old.all_input_nodes[0]
    if old.op != "get_attr" or old.target != name or old is new or not _bounded(new):
        return False
    info, where = info_of(old), facts(new).source
    graph = new.graph
    with graph.inserting_after(new):
        same = graph.call_function(torch.ops.aten.eq.Tensor, (new, old))
    with graph.inserting_after(same):
        every = graph.call_function(torch.ops.aten.all.default, (same,))
    with graph.inserting_after(every):
        check = graph.call_function(EXPECT, (every, [1], f" at {where}, whether {name} keeps the bounds that it is clamped to"))
    for node, shape in ((same, info.shape), (every, ()), (check, ())):
        set_facts(node, facts(new).beside(Info(shape, torch.bool, False)))
    new.replace_all_uses_with(old, delete_user_cb=lambda user: user is not same)
    return True


def _bounded(node: fx.Node) -> bool:
    """Whether a clamp is among what made `node`."""
    while node.op == "call_function":
        if "clamp" in str(node.target):
            return True
        node = node.all_input_nodes[0]
    return False


_BOUNDS = frozenset(
    {
        torch.ops.aten.clamp.default,
        torch.ops.aten.clamp_min.default,
        torch.ops.aten.clamp_max.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.alias.default,
    }
)


def _info(value: Any) -> Info | DataSized | None:
    if not isinstance(value, torch.Tensor):
        return None
    if any(not isinstance(n, int) for n in value.shape):
        return DataSized(tuple(n if isinstance(n, int) else str(n) for n in value.shape), value.dtype)
    return Info(tuple(value.shape), value.dtype, False)


def _results(
    program: ExportedProgram, copies: Mapping[fx.Node, fx.Node], renamed: Mapping[str, str]
) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The values of the output node: what the forward returns, then the new values of the buffers it updates."""
    returned: list[fx.Node] = []
    updated: dict[str, fx.Node] = {}
    for spec, node in _outputs(program):
        if spec.kind == OutputKind.USER_OUTPUT:
            returned.append(copies[node])
        elif spec.kind == OutputKind.BUFFER_MUTATION:
            updated[renamed[str(spec.target)]] = copies[node]
        elif spec.kind != OutputKind.USER_INPUT_MUTATION and not _keeps_bounds(copies[node], renamed.get(str(spec.target))):
            raise CaptureError(
                f"The forward changes {renamed.get(str(spec.target), spec.target)} in place, a parameter or a plain tensor of the model.\n"
                "  Only buffers may change in a forward: make it one with register_buffer, or change it outside."
            )
    changed = sorted(updated)
    return (*returned, *(updated[name] for name in changed)), tuple(changed)
