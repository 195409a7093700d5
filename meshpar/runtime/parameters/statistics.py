"""Batch norms of a parallel model, for code that looks for them: `torch.optim.swa_utils.update_bn` finds them by class."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from meshpar._torch import BatchNorm
from meshpar.errors import ConfigError
from meshpar.runtime.blocks import Block, Tree


class BatchNormBlock(Block, BatchNorm):  # type: ignore[misc]
    """The place of a batch norm in the tree. Its momentum is a number of the captured program."""

    _load_from_state_dict = nn.Module._load_from_state_dict
    extra_repr = nn.Module.extra_repr

    def reset_running_stats(self) -> NoReturn:
        """Raises ConfigError: statistics cannot be made anew with another momentum."""
        raise ConfigError(
            "update_bn resets the statistics of batch norms and takes plain means of them, but a parallel model runs a captured program in "
            "which the momentum is a number. Average the statistics with the weights, AveragedModel(pm, use_buffers=True), or export the "
            "weights (mp.checkpoint.save, meshpar checkpoint to-hf) and call update_bn on the model on one device."
        )


def mark_batch_norms(tree: Tree, model: nn.Module) -> None:
    """Let the blocks at the paths of batch norms be known as such."""
    blocks = dict(tree.named_modules())
    for path, module in model.named_modules():
        if isinstance(module, BatchNorm) and module.track_running_stats and type(blocks.get(path)) is Block:
            blocks[path].__class__ = BatchNormBlock
            blocks[path].momentum = module.momentum  # what update_bn notes first
