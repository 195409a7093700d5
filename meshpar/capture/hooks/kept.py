"""Hooks that a forward registers, or that its modules have, and that act in backward: kept in the graph, or refused by name.

A graph has no autograd of the forward that it was made from, so whatever was registered there is lost unless it becomes a node:

    h = self.a(x)                                h = a(x)
    k = h.relu()                                 h_ = hooked([h], "f#0")
    h.register_hook(f)                  ->       k = relu(h_)
    return self.b(h), k                          return b(h_), k

A hook sees the total gradient of its tensor, whenever it was registered: uses before and after go through the node. A module's backward
hooks are two such nodes, around its inputs and its outputs.
"""

from __future__ import annotations

import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch
from weakref import ReferenceType, ref

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import BackwardHook

from meshpar._torch import global_hooks, is_view, overwrites, recorded_as, rerouted, under_saved_tensors
from meshpar.capture.blame import here, is_users
from meshpar.capture.hooks.trial import judged
from meshpar.capture.stand_in import aside
from meshpar.errors import CaptureError
from meshpar.graph.facts import Info
from meshpar.ops.hooks import PARTS, WHOLE, Hook, Stale, learn, of_torch


class Given:
    """The hooks of the model as it was given: what is captured is a copy, whose tables do not learn that a hook was removed."""

    def __init__(self, model: nn.Module) -> None:
        self.stale = Stale(dict((*model.named_parameters(), *model.named_buffers())))
        self._modules: dict[str, tuple[ReferenceType[nn.Module], Mapping[int, Any], Mapping[int, Any]]] = {
            path: (ref(module), module._backward_hooks, module._backward_pre_hooks)
            for path, module in model.named_modules(remove_duplicate=False)
            if acts(module)
        }

    def of(self, path: str, copy: nn.Module) -> tuple[nn.Module, Mapping[int, Any], Mapping[int, Any]]:
        """The module at a path, or its copy if it is gone, and its hooks after and before backward."""
        found, after, before = self._modules[path]
        return found() or copy, after, before


def acts(module: nn.Module) -> bool:
    """Whether a module has hooks that act in backward."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


@dataclass
class Found:
    """The hooks of one forward."""

    model: nn.Module
    given: Given
    hooks: dict[str, Hook] = field(default_factory=dict)
    """By their names in the graph."""
    routed: list[tuple[fx.Node, fx.Node, bool]] = field(default_factory=list)
    """(The node of a tensor, that of its hook, whether the tensor is a view)."""
    behind: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """What stands for a tensor with hooks -> what the tensor was made as; in between are its hooks."""
    called: set[str] = field(default_factory=set)
    """Modules whose backward hooks are in the graph."""

    def __post_init__(self) -> None:
        self.paths = {id(module.__dict__): path for path, module in self.model.named_modules()}

    def add(self, fns: Sequence[Callable[..., Any]], told: str, call: Any) -> tuple[str, Hook]:
        """A hook and its name in the graph. `fns`: what the user registered."""
        hook = Hook(f"{len(self.hooks)} {', '.join(map(fn_name, fns))}", told, call, self.given.stale)
        name = learn(hook)
        self.hooks[name] = hook
        return name, hook

    def judge(self, hooks: Sequence[Hook], fns: Sequence[Callable[..., Any]], call: Any, tensors: Sequence[Tensor]) -> None:
        """Find out whether hooks treat every element of the gradients of these tensors by itself."""
        infos = [Info(tuple(one.shape), one.dtype, True) for one in tensors]
        parts, linear = aside(lambda: judged(hooks[0], infos, tuple(fns), call))
        for hook in hooks:
            hook.parts, hook.linear = parts, linear

    def settle(self, graph: fx.Graph) -> None:
        """Take the hooks that were removed again out of the graph. Raises CaptureError for those of modules that it does not have."""
        for node in list(graph.nodes):
            if node.target in (WHOLE, PARTS) and self.hooks[node.args[1]].removed:
                results = [node] if node.target is PARTS else list(node.users)
                for result in results:
                    result.replace_all_uses_with(node.args[0] if result is node else node.args[0][result.args[1]])
                for one in dict.fromkeys((*results, node)):
                    graph.erase_node(one)
        uncalled = [path for path, module in self.model.named_modules() if acts(module) and path not in self.called]
        if uncalled:
            raise CaptureError(
                f"{', '.join(map(repr, uncalled))}: there are hooks that act in backward on what the captured forward does not call as a "
                "module (it may be one of several experts that run together).\n"
                "  Remove the hook, or register one on a module around it."
            )

    def check_unwritten(self) -> None:
        """Raise CaptureError for hooks on tensors whose memory is written to and seen by views. (In the graph as it was recorded.)"""
        for made in self.routed:
            _check_unwritten(self.hooks[str(made[1].args[1])], *made)


def fn_name(fn: Any) -> str:
    """What a function calls itself."""
    return str(getattr(fn, "__qualname__", type(fn).__qualname__))


@contextmanager
def kept(model: nn.Module, given: Given | None = None) -> Iterator[Found]:
    """Inside, hooks that a forward of `model` registers to act in backward, and those of its modules, are recorded with it.

    Raises CaptureError for those that cannot be: on autograd's nodes, on what autograd saves, on a parameter, and the like.
    """
    _refuse_old(model)
    found = Found(model, given or Given(model))
    with ExitStack() as stack:
        for owner, name, replacement in _replacements(found):
            stack.enter_context(patch.object(owner, name, replacement))
        for table in global_hooks():  # torch's own, which look at what a user runs
            stack.enter_context(patch.dict(table, clear=True))
        yield found


def _refuse_old(model: nn.Module) -> None:
    old = [path for path, module in model.named_modules() if module._backward_hooks and not module._is_full_backward_hook]
    if old:
        raise CaptureError(
            f"{', '.join(map(repr, old))}: registered with register_backward_hook, which acts on whatever operation comes last in the "
            "module.\n  Use register_full_backward_hook."
        )


def _replacements(found: Found) -> Iterator[tuple[Any, str, Any]]:
    yield torch.Tensor, "register_hook", _register(found, torch.Tensor.register_hook)
    yield torch.Tensor, "retain_grad", _refusing_on_tensor(torch.Tensor.retain_grad, "retain_grad", "h.register_hook(keep.append)")
    post = torch.Tensor.register_post_accumulate_grad_hook
    yield torch.Tensor, post.__name__, _refusing_on_tensor(post, post.__name__, "p.register_post_accumulate_grad_hook on pm.parameters()")
    yield torch.Tensor, "grad_fn", _watched_grad_fn(torch.Tensor.grad_fn)
    yield torch.autograd.graph, "get_gradient_edge", _watched_edge(torch.autograd.graph.get_gradient_edge)
    owner, push = under_saved_tensors()
    yield owner, push, _saved(getattr(owner, push))
    yield BackwardHook, "setup_input_hook", lambda own, args: _around(found, own).inputs(args)
    yield BackwardHook, "setup_output_hook", lambda own, result: _around(found, own).outputs(result)


# ---- tensors ---------------------------------------------------------------------------------------------------------------------------


class _Handle:
    """What `register_hook` returns while a forward is recorded: a hook that the forward removes again was never there."""

    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def remove(self) -> None:
        self._hook.removed = True

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _register(found: Found, original: Callable[..., Any]) -> Callable[..., Any]:
    def register_hook(self: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
        if not self.requires_grad:
            return original(self, hook)  # which says so
        told = f"The hook {fn_name(hook)} on a tensor{here()}"
        if of_torch(hook):
            raise CaptureError(f"{told} was registered by torch (register_multi_grad_hook?).\n  Register one hook on each tensor.")
        if isinstance(self, nn.Parameter):
            raise CaptureError(
                f"{told} is on a parameter, and the forward registers it again in every call.\n"
                "  Register it once, outside of forward, before parallelize."
            )
        if recorded_as(self) is None:
            raise CaptureError(f"{told} is on a tensor that is not part of the captured forward.\n  Register it in the forward itself.")
        name, made = found.add([hook], told, _on_one(hook))
        found.judge([made], [hook], made.call, [self])
        through = torch.ops.meshpar.hooked_parts(self, name) if made.parts else torch.ops.meshpar.hooked([self], name)[0]
        found.routed.append((*rerouted(self, through, found.behind), is_view(self)))
        return _Handle(made)

    return register_hook


def _on_one(hook: Callable[[Tensor], Tensor | None]) -> Callable[[tuple[Tensor, ...]], Sequence[Tensor | None]]:
    return lambda grads: (hook(grads[0]),)


def _refusing_on_tensor(original: Callable[..., Any], name: str, instead: str) -> Callable[..., Any]:
    def refusing(self: Tensor, *args: Any) -> Any:
        if recorded_as(self) is None or not self.requires_grad:
            return original(self, *args)
        raise CaptureError(
            f"The forward calls {name} on a tensor{here()}: in a parallel program there is no such tensor after backward.\n"
            f"  Use {instead} instead."
        )

    return refusing


def _check_unwritten(hook: Hook, node: fx.Node, made: fx.Node, view: bool) -> None:
    """A hook belongs to the value that a tensor had when it was registered: with writes in place and views, that would take a history."""
    memory = _memory(node)
    own = {node, made, *(user for user in made.users if user.target is operator.getitem)}
    while overwrites(node.target):
        node = node.all_input_nodes[0]
        own.add(node)
    for one in node.graph.nodes:
        if overwrites(one.target) and one.args[0] in own:
            own.add(one)
    others = [one for one in node.graph.nodes if one not in own and _memory(one) == memory and one.op == "call_function"]
    written = any(overwrites(one.target) for one in own)
    views = view or any(not overwrites(one.target) for one in others)
    if any(overwrites(one.target) for one in others) or (written and views):
        raise CaptureError(
            f"{hook.told}: the same memory is written to in place and seen by views, so that it is not clear whose gradient is meant.\n"
            "  Compute new tensors instead (y = x.op() instead of x.op_())."
        )


def _memory(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


# ---- autograd's own nodes and what it saves --------------------------------------------------------------------------------------------


class _Node:
    """A node of autograd's graph as the user's code sees it while a forward is recorded: to look at."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        if name in ("register_hook", "register_prehook"):
            raise CaptureError(
                f"The forward calls {name} of a grad_fn ({self._node.name()}){here()}: a parallel program has other operations, and other "
                "nodes in backward.\n  Use register_hook of the tensor."
            )
        if name == "next_functions":
            return tuple((None if node is None else _Node(node), at) for node, at in self._node.next_functions)
        return getattr(self._node, name)


def _watched_grad_fn(original: Any) -> property:
    def grad_fn(self: Tensor) -> Any:
        node = original.__get__(self)
        return _Node(node) if node is not None and is_users(sys._getframe(1).f_code.co_filename) else node

    return property(grad_fn, getattr(original, "__set__", None))


def _watched_edge(original: Callable[[Tensor], GradientEdge]) -> Callable[[Tensor], GradientEdge]:
    def get_gradient_edge(tensor: Tensor) -> GradientEdge:
        edge = original(tensor)
        if recorded_as(tensor) is None or not is_users(sys._getframe(1).f_code.co_filename):
            return edge
        return GradientEdge(_Node(edge.node), edge.output_nr)  # type: ignore[arg-type]

    return get_gradient_edge


def _saved(original: Callable[..., Any]) -> Callable[..., Any]:
    def push(pack: Callable[..., Any], unpack: Callable[..., Any]) -> None:
        if not of_torch(pack) and not of_torch(unpack):
            raise CaptureError(
                f"The forward puts hooks on what autograd saves{here()} ({fn_name(pack)}, {fn_name(unpack)}): a parallel program saves "
                'other tensors.\n  Leave them out; to save memory, use ParallelConfig(recompute="full").'
            )
        original(pack, unpack)

    return push


# ---- modules ---------------------------------------------------------------------------------------------------------------------------


def _around(found: Found, own: BackwardHook) -> _Around:
    around = own.__dict__.get("_meshpar_around")
    if around is None:
        path = found.paths[id(own.module.__dict__)]  # (a trace may hand out a proxy, which shares it)
        around = own.__dict__["_meshpar_around"] = _Around(found, path, own.module, len(own.user_hooks), len(own.user_pre_hooks))
    return around


class _Around:
    """The backward hooks of one call of a module: torch's `BackwardHook`, on the graph."""

    def __init__(self, found: Found, path: str, copy: nn.Module, after: int, before: int) -> None:
        self.found, self.path = found, path
        self.module, self.after, self.before = found.given.of(path, copy)
        self.keys = tuple(self.after), tuple(self.before)
        self.fns = (*self.after.values(), *self.before.values())
        self.told = f"The backward hook {', '.join(map(fn_name, self.fns))} of {path!r}"
        self.pending: deque[tuple[Tensor | None, ...]] = deque()
        """Gradients of the results that wait for those of the arguments: one, or one for each simulated rank."""
        self.given = self.made = _Behind((), 0)
        found.called.add(path)

    def inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the module, behind its hooks."""
        args, self.given = self._behind(args, self._after)
        return args

    def outputs(self, result: Any) -> Any:
        """The result of the module, behind its hooks."""
        several, self.made = self._behind(result if isinstance(result, tuple) else (result,), self._before)
        if self.made.hook is not None:
            self.made.hook.begin = self.pending.clear
            hooks = [one.hook for one in (self.made, self.given) if one.hook is not None]
            for hook in hooks:
                hook.pair = self.made.hook.name
            self.found.judge(hooks, self.fns, self._both, (*self.made.tensors, *self.given.tensors))
        return several if isinstance(result, tuple) else several[0]

    def _behind(self, values: tuple[Any, ...], call: Any) -> tuple[Any, _Behind]:
        slots = tuple(i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad)
        if not slots or not torch.is_grad_enabled():
            return values, _Behind((), len(values))
        tensors = tuple(values[i] for i in slots)
        name, hook = self.found.add(self.fns, self.told, call)
        through = dict(zip(slots, torch.ops.meshpar.hooked(list(tensors), name), strict=True))
        new = [through.get(i, value) for i, value in enumerate(values)]
        return (tuple(new) if type(values) is tuple else type(values)(*new)), _Behind(slots, len(values), tensors, hook)

    def _both(self, grads: tuple[Tensor, ...]) -> Sequence[Tensor | None]:
        """Both in a row, to see what they do."""
        count = len(self.made.slots)
        made = self._before(grads[:count])
        return [*made, *(self._after(grads[count:]) or () if self.given.slots else ())]

    def _before(self, grads: tuple[Tensor, ...]) -> Sequence[Tensor]:
        """In backward: the gradients of the results, as the hooks before backward leave them."""
        current = self.made.spread(grads)
        for key in self.keys[1]:
            if key in self.before:
                current = self._checked(current, self.before[key](self.module, current))
        self.pending.append(current)
        if not self.given.slots:
            self._call_after(self.given.spread(()))
        return self.made.picked(current, grads)

    def _after(self, grads: tuple[Tensor, ...]) -> Sequence[Tensor | None] | None:
        """In backward: the gradients of the arguments, as the hooks after backward leave them."""
        if not self.pending:  # the gradient did not come through the results of the module
            return None
        return self.given.picked(self._call_after(self.given.spread(grads)), grads)

    def _call_after(self, current: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        made = self.pending.popleft()
        for key in self.keys[0]:
            if key in self.after:
                current = self._checked(current, self.after[key](self.module, current, made))
        return current

    def _checked(self, before: tuple[Tensor | None, ...], returned: Any) -> tuple[Tensor | None, ...]:
        if returned is None:
            return before
        if not isinstance(returned, (tuple, list)) or len(returned) != len(before):
            raise CaptureError(f"{self.told} was handed {len(before)} gradients: it returns a tuple of as many, or None.")
        return tuple(returned)


@dataclass(frozen=True)
class _Behind:
    """Which of some values are behind a hook: those that need a gradient."""

    slots: tuple[int, ...]
    count: int
    tensors: tuple[Tensor, ...] = ()
    hook: Hook | None = None

    def spread(self, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Gradients at the places of their tensors; None at the others."""
        at = dict(zip(self.slots, grads, strict=True))
        return tuple(at.get(i) for i in range(self.count))

    def picked(self, current: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        """The gradients at these places; None says that there is no gradient."""
        found = [(current[i], grad) for i, grad in zip(self.slots, like, strict=True)]
        return [torch.zeros_like(grad) if one is None else one for one, grad in found]
