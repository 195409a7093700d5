"""Batch norm written out in sums, so that its statistics are those of the global batch when samples are cut.

    before                                        after (x [b, c, ...], n elements per channel)
      y, ... , rm', rv' =                           mean = x.mean(all but c);  d = x - mean;  var = (d * d).mean(all but c)
        batch_norm(x, w, b, rm, rv, training)       y = d * rsqrt(var + eps) * w + b
                                                    rm' = (1 - m) rm + m mean;  rv' = (1 - m) rv + m var n / (n - 1)

The types do the rest: a mean over cut samples is a pending sum, and using it demands the all-reduce.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import Info, facts, info_of, set_facts
from meshpar.graph.op import op_name, read

aten = torch.ops.aten

_WITH_STATS = "_native_batch_norm_legit_functional"
_WITHOUT = "_native_batch_norm_legit"


def expand_batch_norm(graph: fx.Graph) -> int:
    """Write out every batch norm that takes its statistics from the batch, in place; returns how many there were."""
    found = [n for n in graph.nodes if _is_batch_norm(n)]
    for node in found:
        with graph.inserting_before(node):
            _Expansion(graph, node).run()
    return len(found)


def takes_statistics(node: fx.Node) -> bool:
    """Whether a node computes something about all samples it sees that a part of them would not give: a batch norm, written out or not,
    or how often a row of a table is looked up."""
    if facts(node).statistics or _is_batch_norm(node):
        return True
    return node.op == "call_function" and op_name(node.target) == "embedding" and bool(read(node).arguments["scale_grad_by_freq"])


def _is_batch_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node.target) in (_WITH_STATS, _WITHOUT) and bool(read(node).arguments["training"])


class _Expansion:
    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node, self.arguments = graph, node, read(node).arguments
        self.x: fx.Node = self.arguments["input"]
        self.info = info_of(self.x)
        self.wide = torch.float32 if self.info.dtype in (torch.float16, torch.bfloat16) else self.info.dtype

    def run(self) -> None:
        shape = self.info.shape
        dims = [d for d in range(len(shape)) if d != 1]
        count = 1
        for d in dims:
            count *= shape[d]
        x = self._cast(self.x, self.wide)
        mean = self._emit(aten.mean.dim, (x, dims), shape[1:2])
        set_facts(mean, replace(facts(mean), statistics=True))
        centred = self._emit(aten.sub.Tensor, (x, self._along(mean)), shape)
        square = self._emit(aten.mul.Tensor, (centred, centred), shape)
        var = self._emit(aten.mean.dim, (square, dims), shape[1:2])
        rstd = self._emit(aten.rsqrt.default, (self._emit(aten.add.Tensor, (var, self.arguments["eps"]), shape[1:2]),), shape[1:2])
        out = self._emit(aten.mul.Tensor, (centred, self._along(rstd)), shape)
        for target, name in ((aten.mul.Tensor, "weight"), (aten.add.Tensor, "bias")):
            if self.arguments.get(name) is not None:
                out = self._emit(target, (out, self._along(self.arguments[name])), shape)
        new = {0: self._cast(out, self.info.dtype), 1: mean, 2: rstd}
        if self.arguments.get("running_mean") is not None:
            new[3] = self._running("running_mean", mean, 1.0)
            new[4] = self._running("running_var", var, count / max(1, count - 1))
        for user in list(self.node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(new[int(user.args[1])])  # type: ignore[arg-type]
            self.graph.erase_node(user)
        self.graph.erase_node(self.node)

    def _running(self, name: str, value: fx.Node, factor: float) -> fx.Node:
        old, momentum = self.arguments[name], float(self.arguments["momentum"])
        shape = info_of(value).shape
        fresh = self._emit(aten.detach.default, (value,), shape, grad=False)
        fresh = self._emit(aten.mul.Tensor, (fresh, momentum * factor), shape, grad=False)
        kept = self._emit(aten.mul.Tensor, (old, 1.0 - momentum), shape, grad=False)
        return self._emit(aten.add.Tensor, (kept, fresh), shape, grad=False)

    def _along(self, value: fx.Node) -> fx.Node:
        """A vector over channels, shaped to broadcast against the input."""
        rank, size = len(self.info.shape), self.info.shape[1]
        shape = tuple(size if d == 1 else 1 for d in range(rank))
        return self._emit(aten.reshape.default, (value, list(shape)), shape)

    def _cast(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        if info_of(value).dtype == dtype:
            return value
        made = self._emit(aten._to_copy.default, (value,), info_of(value).shape, dtype=dtype)
        made.kwargs = {"dtype": dtype}
        return made

    def _emit(
        self, target: Any, args: tuple[Any, ...], shape: tuple[int, ...], *, dtype: torch.dtype | None = None, grad: bool | None = None
    ) -> fx.Node:
        operands = [a for a in args if isinstance(a, fx.Node)]
        flows = any(info_of(o).requires_grad for o in operands) if grad is None else grad
        made = self.graph.call_function(target, args)
        return set_facts(made, facts(self.node).beside(Info(tuple(shape), dtype or info_of(operands[0]).dtype, flows)))
