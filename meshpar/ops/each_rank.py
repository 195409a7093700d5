"""One operator with other arguments on every rank: what simulated ranks, which share one graph, need where a dim is cut unevenly.

    rank 0 of 3:  split_with_sizes(x, [15, 15, 8])         each_rank(split_with_sizes, ((x, [15, 15, 8]), {}),
    rank 2 of 3:  split_with_sizes(x, [13, 13, 6])                                     ((x, [15, 15, 8]), {}),
                                                                                       ((x, [13, 13, 6]), {}), group=...)

Real ranks never run it: each has a graph of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from meshpar._torch import pytree
from meshpar.simulate import axis_rank, local_tensors, per_rank

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def each_rank(op: Callable[..., Any], *calls: Arguments, group: str) -> Any:
    """`op(*args, **kwargs)` with the i-th of `calls` on the i-th rank of the axis. The tensors in all calls are the same ones."""
    leaves = pytree.tree_leaves(calls[0])
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return _EachRank.apply(op, calls, group, *tensors)


class _EachRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], calls: tuple[Arguments, ...], group: str, *tensors: Tensor) -> Any:
        ctx.needed = [x.requires_grad for x in tensors]
        ctx.ran = {}
        ctx.set_materialize_grads(False)

        def run(world_rank: int, *local: Tensor) -> Any:
            mine = [x.detach().requires_grad_(needed) for x, needed in zip(local, ctx.needed, strict=True)]
            args, kwargs = _with(calls[axis_rank(group, world_rank)], mine)
            with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):  # not those of recompute, which is for all ranks
                out = op(*args, **kwargs)
            out = tuple(out) if isinstance(out, list) else out
            ctx.ran[world_rank] = (mine, out if isinstance(out, tuple) else (out,))
            return out

        found = per_rank(run, *tensors)
        made = next(iter(ctx.ran.values()))[1]
        results = found if isinstance(found, tuple) else (found,)
        ctx.mark_non_differentiable(*(x for x, own in zip(results, made, strict=True) if not own.requires_grad))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        given = [i for i, grad in enumerate(grads) if grad is not None]
        wanted = [i for i, needed in enumerate(ctx.needed) if needed]
        local = [local_tensors(grads[i]) for i in given]  # type: ignore[arg-type]

        def run(world_rank: int) -> tuple[Tensor, ...]:
            inputs, outs = ctx.ran[world_rank]
            found = torch.autograd.grad(
                [outs[i] for i in given],
                [inputs[i] for i in wanted],
                [grad[world_rank] for grad in local],
                allow_unused=True,
                materialize_grads=True,
            )
            return tuple(x.contiguous() for x in found)

        found: list[Tensor | None] = [None] * len(ctx.needed)
        for i, grad in zip(wanted, per_rank(run) if given else (), strict=False):
            found[i] = grad
        return None, None, None, *found


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _with(call: Arguments, tensors: list[Tensor]) -> Arguments:
    """The call with these in the place of its tensors."""
    local = iter(tensors)
    leaves, spec = pytree.tree_flatten(call)
    args, kwargs = pytree.tree_unflatten([next(local) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
    return args, kwargs
