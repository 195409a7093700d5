"""Recompute: what a block saves for backward and what it computes again, as a wrapper around its code.

none        save everything autograd asks for
selective   save the results of matrix products, attention and collectives (gathered values too); compute the cheap rest again
full        save the inputs of the block only
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from meshpar.graph.facts import facts
from meshpar.graph.op import op_name
from meshpar.graph.operators import ARITHMETIC, OPERATORS, draws

Mode = Literal["none", "selective", "full"]
BlockCode = Callable[..., Any]

_COLLECTIVES = ("_c10d_functional::", "c10d_functional::", "_dtensor::")


def wrap(code: BlockCode, mode: Mode, graph: fx.Graph) -> BlockCode:
    """`code` with recompute: the same results and gradients, less memory between forward and backward. `graph` is what it runs.

    Without gradients it is called as it is. Random numbers are drawn again from the state they were first drawn from.

    Raises ValueError for an unknown mode.
    """
    if mode not in _MODES:
        raise ValueError(f"recompute is one of {', '.join(_MODES)}, not {mode!r}.")
    if mode == "none":
        return code
    options: dict[str, Any] = {**_MODES[mode], "preserve_rng_state": any(is_random(node) for node in graph.nodes)}

    def recomputed(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return code(*args)
        return checkpoint(code, *args, use_reentrant=False, **options)

    return recomputed


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    return facts(node).seed is not None or draws(node)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    row = OPERATORS.get(op_name(op))
    keep = row.kind in ARITHMETIC if row is not None else op.name().startswith(_COLLECTIVES)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_MODES: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, _policy)},
    "full": {},
}
