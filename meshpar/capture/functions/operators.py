"""Calls whose backward is not torch's own, marked with what is known of it: Functions made operators, and operators of other libraries.

`torch.library.custom_op` with `register_autograd`, and any operator with an autograd kernel of its own, stay one node in a graph and keep
their backward. Whether it is linear nobody says: it is tried on drawn values, as that of a Function is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from meshpar._torch import FakeTensorMode, OpOverload, functions_behind, pytree
from meshpar.capture.functions.proofs import nature_of
from meshpar.capture.stand_in import aside
from meshpar.errors import CaptureError
from meshpar.graph.facts import Info, facts, info_of, infos_of, set_facts
from meshpar.graph.operators import draws
from meshpar.ops.nature import UNPROVED, Nature
from meshpar.ops.own_backward import ExampleCall, Unfit, function_of_operator, is_backward, nature_of_operator

_KNOWN = frozenset("aten prim prims meshpar c10d _c10d_functional higher_order".split())
"""The namespaces whose operators have their derivative for backward."""


def mark(graph: fx.Graph, in_cpp: Sequence[str] = ()) -> None:
    """Set the `nature` of the calls with a backward of their own. `in_cpp`: Functions in C++ that ran.

    Raises CaptureError for a Function in C++ that belongs to no operator, for a backward that is another each time, and for one that runs
    in forward, where autograd goes through it once more.
    """
    proved: dict[tuple[Any, ...], Nature] = {}
    foreign = [node for node in graph.nodes if node.op == "call_function" and is_foreign(node)]
    inside = aside(lambda: _inside(foreign)) if in_cpp else frozenset()
    stray = [name for name in in_cpp if name not in inside]
    if stray:
        raise CaptureError(
            f"The forward calls {', '.join(stray)}, an autograd function in C++ that is no operator: its backward would be lost.\n"
            "  Register it as one (TORCH_LIBRARY, with an Autograd kernel), or wrap it with torch.library.custom_op and register_autograd."
        )
    for node in foreign:
        if is_backward(node.target):
            raise _differentiated_twice(node)
        known = nature_of_operator(node.target)
        if known is None and any(info.requires_grad for info in known_infos(node)):
            known = _proved(node, proved)
        if known is not None:
            set_facts(node, replace(facts(node), nature=known))


def _inside(foreign: Sequence[fx.Node]) -> frozenset[str]:
    """The Functions in C++ that these operators call, by name."""
    found: set[str] = set()
    for node in foreign:
        if nature_of_operator(node.target) is None and any(info.requires_grad for info in known_infos(node)):
            operator = ForeignOperator(node.target, node.args, node.kwargs)
            with FakeTensorMode(allow_non_fake_inputs=True):
                operands = [torch.empty(e.shape, dtype=e.dtype, device=e.device) for e in operator.tensors]
                _, results = operator.under_autograd(operands)
                found.update(function for function in functions_behind(results) if isinstance(function, str))
    return frozenset(found)


def _differentiated_twice(node: fx.Node) -> CaptureError:
    where = f"{facts(node).module or 'The model'} ({facts(node).source or 'source unknown'})"
    return CaptureError(
        f"{where} differentiates inside forward what {function_of_operator(node.target)} gives, an autograd.Function whose backward is its "
        "own: the derivative of that backward is not known.\n  Write the gradient that is wanted as tensor operations in forward."
    )


def is_foreign(node: fx.Node) -> bool:
    """Whether a node calls an operator that is not torch's own."""
    return isinstance(node.target, OpOverload) and node.target.namespace not in _KNOWN


def known_infos(node: fx.Node) -> list[Info]:
    """What is known of the results of a node."""
    return [one for one in infos_of(node) if isinstance(one, Info)]


def _proved(node: fx.Node, proved: dict[tuple[Any, ...], Nature]) -> Nature:
    operator = ForeignOperator(node.target, node.args, node.kwargs)
    key = (node.target, str(fx.node.map_arg((node.args, node.kwargs), lambda n: "*")), operator.tensors)
    if draws(node):
        return UNPROVED
    if key not in proved:
        try:
            proved[key] = aside(lambda: nature_of(operator))
        except Unfit as error:
            raise CaptureError(
                f"{node.target} in {facts(node).module or 'the model'} ({facts(node).source or 'source unknown'}): {error}.\n"
                f"  {error.instead}"
            ) from error
    return proved[key]


@dataclass(frozen=True)
class ForeignOperator:
    """An operator of a library with what is fixed of its arguments, as two functions of tensors."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def tensors(self) -> tuple[ExampleCall, ...]:
        """What its operands look like, in the order in which they are written."""
        nodes = [leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, fx.Node)]
        infos = [info_of(node) for node in nodes]
        return tuple(ExampleCall(info.shape, info.dtype, torch.device("cpu"), info.requires_grad) for info in infos)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The results, without gradients."""
        return tuple(result.detach() for result in self._called(tensors))

    def under_autograd(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Operands, those that need a gradient as leaves, and the results of them."""
        leaves = [x.detach().requires_grad_(example.needs_grad) for x, example in zip(tensors, self.tensors, strict=True)]
        with torch.enable_grad():
            return leaves, self._called(leaves)

    def backward(self, grads: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the operands that need one."""
        leaves, results = self.under_autograd(tensors)
        pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if result.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        outputs, given = [result for result, _ in pairs], [grad for _, grad in pairs]
        return torch.autograd.grad(outputs, wanted, given, allow_unused=True, materialize_grads=True)

    def _called(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        given = iter(tensors)
        args, kwargs = pytree.tree_map(lambda leaf: next(given) if isinstance(leaf, fx.Node) else leaf, (self.args, dict(self.kwargs)))
        return [leaf for leaf in pytree.tree_leaves(self.target(*args, **kwargs)) if isinstance(leaf, Tensor)]
