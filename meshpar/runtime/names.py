"""One module under whose names everything on this rank is found, though several stages hold it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from meshpar.runtime.blocks import Block


def together(trees: Sequence[nn.Module]) -> nn.Module:
    """A module with all tensors of `trees` under the names they have there. A single tree is returned as it is.

    A place that one tree has is that tree's own module, so that what data parallelism swaps there is seen here. A place that several have
    is a new module with the tensors of each: those are as they are between steps.
    """
    if len(trees) == 1:
        return trees[0]
    made = Block()
    for tree in trees:
        made._parameters.update(tree._parameters)
        made._buffers.update(tree._buffers)
        made._non_persistent_buffers_set |= tree._non_persistent_buffers_set
    for name in dict.fromkeys(name for tree in trees for name in tree._modules):
        held = [module for tree in trees if (module := tree._modules.get(name)) is not None]
        made._modules[name] = together(held)
    return made
