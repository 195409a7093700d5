"""The expert seam: during capture, routing-dependent code of expert layers is replaced by `dispatch`, `grouped_mm` and `combine`.

Four ways lead there, the first that fits a module is taken: a function registered for its class; transformers' registry, for layers that
ask it; `expert_stacks`, for modules that hold the parameters of all experts in one tensor; `expert_lists`, for lists of modules. A layer
that multiplies every token with every expert (einsum, bmm) is an ordinary graph and needs none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from meshpar._torch import as_traced, lists_of_numbers
from meshpar.capture.experts import stacks as expert_stacks
from meshpar.capture.experts.body import NotLifted
from meshpar.capture.experts.lists import owners as expert_lists
from meshpar.errors import CaptureError, ConfigError
from meshpar.graph.facts import facts, set_facts
from meshpar.ops.experts import combine, dispatch, grouped_mm, row_expert

_NAME = "meshpar"

AnyFunction = Callable[..., Any]

REGISTERED: dict[type[nn.Module], AnyFunction] = {}
"""Classes of experts modules -> what runs in place of their forward during capture."""


def register_experts(kind: type[nn.Module], function: AnyFunction) -> None:
    """Teach meshpar a class of experts modules: `function(module, *args, **kwargs)` computes what its forward does, with the operators of
    `meshpar.ops.experts`, and runs in its place while the model is captured. Subclasses that do not override `forward` are covered.

    Raises ConfigError when `kind` is not a class of modules.

    >>> def run(module, hidden, index, weights):                   # hidden [T, h], index and weights [T, k]
    ...     x, offsets, perm = dispatch(hidden, index, module.up.shape[0])
    ...     y = grouped_mm(x, module.up, offsets).relu()           # up [E, h, i]
    ...     return combine(grouped_mm(y, module.down, offsets), perm, weights)
    >>> register_experts(MyExperts, run)                           # doctest: +SKIP
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"register_experts wants the class of an experts module, not {kind!r}. Type register_experts(type(module), fn).")
    REGISTERED[kind] = function


@dataclass
class Seam:
    """What the expert layers of a model became in one capture."""

    lifted: dict[str, str] = field(default_factory=dict)
    """Module -> how: "registered", "transformers", "stack" or "list"."""
    unrecognised: dict[str, str] = field(default_factory=dict)
    """Modules that look like experts and run as written -> why."""

    @contextmanager
    def advising(self) -> Iterator[None]:
        """Inside, a CaptureError of such a module ends with the advice."""
        try:
            yield
        except CaptureError as error:
            advice = self.advice(error.modules)
            raise (CaptureError(f"{error}\n{advice}", modules=error.modules) if advice else error) from error

    def advice(self, modules: Sequence[str] | None = None) -> str:
        """What to tell about the modules that were not recognised, if any of `modules` is one or inside of one; else an empty string."""
        found = {
            name: why
            for name, why in self.unrecognised.items()
            if modules is None or any(not name or f"{module}.".startswith(f"{name}.") for module in modules)
        }
        return advise(found)


def advise(unrecognised: Mapping[str, str]) -> str:
    """What to tell about modules that look like experts and are not recognised (name -> why); an empty string without any."""
    if not unrecognised:
        return ""
    lines = [f"    {name or 'the model'}: {reason}." for name, reason in unrecognised.items()]
    return "\n".join(("  Expert layers of a form that is not recognised:", *lines, _ADVICE))


_ADVICE = """\
    Two forms are: a module called with hidden [T, h], index [T, k] and weights [T, k] that holds stacked parameters [E, ...]; and a loop
    over an nn.ModuleList of equal modules, each a function of single rows, chosen by an index [T, k]. Any other takes a few lines:
        from meshpar.ops.experts import combine, dispatch, grouped_mm
        def run(module, hidden, index, weights):
            x, offsets, perm = dispatch(hidden, index, module.up.shape[0])
            return combine(grouped_mm(grouped_mm(x, module.up, offsets).relu(), module.down, offsets), perm, weights)
        mp.register_experts(MyExperts, run)"""


@contextmanager
def seam(model: nn.Module) -> Iterator[Seam]:
    """Inside, the expert layers of `model` that loop over the tokens of each expert run as grouped matrix products instead."""
    found = Seam()
    with ExitStack() as stack:
        registry = stack.enter_context(_registered(model, found))
        stack.enter_context(_replaced(model, found, registry))
        stack.enter_context(lists_of_numbers(expert_stacks.ShapeNumbers.of))
        yield found


@contextmanager
def _replaced(model: nn.Module, found: Seam, registry: Any) -> Iterator[None]:
    """The forwards of modules that may be experts decide, when they are called, what to run."""
    stacks, lists = expert_stacks.Stacks(), expert_lists.Lists()
    changed: list[nn.Module] = []
    try:
        for name, module in model.named_modules():
            if "forward" in module.__dict__ or _asks(module, registry):
                continue
            forward = _chosen(name, module, found, stacks, lists)
            if forward is not None:
                module.__dict__["forward"] = forward
                changed.append(module)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _asks(module: nn.Module, registry: Any) -> bool:
    """Whether a module's forward asks transformers' registry, which it has in its closure, or, in older releases, as a global."""
    function = type(module).forward
    if registry is None or not isinstance(function, FunctionType):
        return False
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    return any(value is registry for value in (*(cell.cell_contents for cell in function.__closure__ or ()), *named))


def _chosen(
    name: str, module: nn.Module, found: Seam, stacks: expert_stacks.Stacks, lists: expert_lists.Lists
) -> Callable[..., Any] | None:
    function = _registered_for(type(module))
    if function is not None:

        def by_function(*args: Any, **kwargs: Any) -> Any:
            found.lifted[name] = "registered"
            return function(module, *args, **kwargs)

        by_function.__dict__["__wrapped__"] = function  # whose surroundings count
        return by_function
    counts = expert_stacks.experts_of(module)
    if counts:

        def by_stack(*args: Any, **kwargs: Any) -> Any:
            lifted = stacks.first(module, counts, args, kwargs)
            if isinstance(lifted, expert_stacks.Called):
                found.lifted[name] = "stack"
                return expert_stacks.run(module, lifted.lifted, lifted.call)
            if lifted is not None:
                found.unrecognised[name] = str(lifted)
            return type(module).forward(as_traced(module), *args, **kwargs)

        return by_stack
    containers = expert_lists.experts_in(module)
    if containers:

        def by_list(*args: Any, **kwargs: Any) -> Any:
            lifted = lists.lifted(module, containers, args, kwargs)
            if isinstance(lifted, NotLifted):
                if lifted.like_experts:
                    found.unrecognised[name] = str(lifted)
                module.__dict__.pop("forward")
                try:
                    return type(module).forward(as_traced(module), *args, **kwargs)
                finally:
                    module.__dict__["forward"] = by_list
            found.lifted[name] = "list"
            left = {
                f"{name}.{other}".lstrip("."): f"one loop in a forward is replaced, here that over {lifted.container!r}"
                for other in lifted.left
            }
            found.unrecognised.update(left)
            return expert_lists.run(module, lifted, args, kwargs)

        return by_list
    return None


def _registered_for(kind: type[nn.Module]) -> AnyFunction | None:
    known = next((k for k in kind.__mro__ if k in REGISTERED), None)
    return REGISTERED[known] if known is not None and known.forward is kind.forward else None


@contextmanager
def _registered(model: nn.Module, found: Seam) -> Iterator[Any]:
    """Answer for the expert layers that ask transformers' registry how to run. (Not imported here: a model of its kind has imported it.)"""
    registry = getattr(sys.modules.get("transformers.integrations.moe"), "ALL_EXPERTS_FUNCTIONS", None)
    if registry is None:
        yield None
        return
    names = {id(module): name for name, module in model.named_modules()}

    def function(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        found.lifted[names.get(id(self), "")] = "transformers"
        return grouped_experts(self, *args, **kwargs)

    configs = {id(module.config): module.config for module in model.modules() if hasattr(getattr(module, "config", None), "__dict__")}
    before = {key: config.__dict__.get(_CHOICE) for key, config in configs.items() if _CHOICE in config.__dict__}
    registry[_NAME] = function
    try:
        for key in before:
            configs[key].__dict__[_CHOICE] = _NAME
        yield registry
    finally:
        for key, choice in before.items():
            configs[key].__dict__[_CHOICE] = choice
        del registry[_NAME]


_CHOICE = "_experts_implementation_internal"


def grouped_experts(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """An expert layer in the registry's terms (stacked weights, maybe biases and gates): `hidden` [T, h], `index`, `weights` [T, k]."""
    x, offsets, perm = dispatch(hidden, index, self.num_experts)
    expert = row_expert(x, offsets) if self.has_bias else None
    has_gate = getattr(self, "has_gate", True)  # (transformers 5.0 has no other form, and no norm)
    y = _project(self, "gate_up_proj" if has_gate else "up_proj", x, offsets, expert)
    y = self._apply_gate(y) if has_gate else self.act_fn(y)
    y = _project(self, "down_proj", y, offsets, expert)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    return combine(y, perm, weights)


def _project(self: Any, name: str, x: Tensor, offsets: Tensor, expert: Tensor | None) -> Tensor:
    weight = getattr(self, name)
    y = grouped_mm(x.to(weight.dtype), weight if self.is_transposed else weight.transpose(1, 2), offsets)
    return y if expert is None else y + getattr(self, f"{name}_bias")[expert]


def mark_stacks(graph: fx.Graph) -> None:
    """Set `expert_stack` on every `aten.stack` of the parameters of experts kept as a list, one per expert in order."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.stack.default:
            parts: Any = node.args[0]
            if all(part.op == "get_attr" for part in parts) and (len(node.args) < 2 or node.args[1] == 0) and _reaches_rows(node):
                set_facts(node, replace(facts(node), expert_stack=True))


def _reaches_rows(node: fx.Node, depth: int = 0) -> bool:
    """Whether a stack, perhaps seen another way, is what rows are multiplied with or looked up in."""
    return any(
        user.target is torch.ops.meshpar.grouped_mm.default
        or (user.target is torch.ops.aten.index.Tensor and any(_is_row_expert(i) for i in user.args[1]))  # type: ignore[union-attr]
        or (depth < 8 and user.op == "call_function" and _reaches_rows(user, depth + 1))
        for user in node.users
    )


def _is_row_expert(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ops.meshpar.row_expert.default
