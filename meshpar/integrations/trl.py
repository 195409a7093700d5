"""TRL's SFTTrainer over a parallel model.

    from meshpar.integrations.trl import SFTTrainer

    args = SFTConfig(..., gradient_checkpointing=False)          # or parallelize(..., config=mp.ParallelConfig(recompute="full"))
    SFTTrainer(model=pm, args=args, train_dataset=dataset, processing_class=tokenizer).train()

TRL computes the loss of `nll` in tiles, from hidden states and the head's weight; here the model computes it, which gives the same number.
Entropy and token accuracy are computed of the logits, which a pipeline does not hand out: it logs neither.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
import trl
from torch.nn.functional import log_softmax

from meshpar.errors import ConfigError
from meshpar.integrations.transformers import OverMesh


class SFTTrainer(OverMesh, trl.SFTTrainer):
    """TRL's SFTTrainer for `model=pm`; its other arguments are TRL's. Raises ConfigError for losses that TRL computes itself (dft).

    >>> SFTTrainer(model=pm, args=args, train_dataset=dataset, processing_class=tokenizer)            # doctest: +SKIP
    """

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **named: Any) -> None:
        if getattr(args, "loss_type", "nll") != "nll":
            raise ConfigError(
                f'loss_type="{args.loss_type}" is computed by TRL from hidden states: use "nll", or parallelize(..., loss_fn=) with the '
                f"loss written out."
            )
        super().__init__(model, args, *others, **named)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The model's own loss, and what TRL logs beside it."""
        labels = inputs.get("labels")
        compute = transformers.Trainer.compute_loss
        loss, outputs = self.scaled_loss(compute, model, {**inputs, "use_cache": False}, True, num_items_in_batch)
        if labels is not None:
            self._count(outputs.logits.detach(), labels, inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _count(self, logits: torch.Tensor, labels: torch.Tensor, inputs: Any) -> None:
        """Entropy and accuracy over the labels that count, of all data ranks."""
        logits, labels = logits[:, :-1], labels[:, 1:]
        valid, logs = labels != -100, log_softmax(logits.float(), -1)
        entropy = -(logs.exp() * logs).sum(-1)
        seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else torch.tensor(inputs["input_ids"].numel())
        sums = torch.stack([valid.sum(), (entropy * valid).sum(), ((logits.argmax(-1) == labels) & valid).sum(), seen.to(logits.device)])
        count, total, right, tokens = self.accelerator.reduce(sums.double()).tolist()
        found = self._metrics["train" if self.model.training else "eval"]
        found["entropy"].append(total / max(count, 1.0))
        found["mean_token_accuracy"].append(right / max(count, 1.0))
        self._total_train_tokens += int(tokens) if self.model.training else 0
        found["num_tokens"] = [self._total_train_tokens]

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """A batch of evaluation, compared between ranks."""
        inputs = self.accelerator.agreed(inputs)
        return transformers.Trainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)


__all__ = ["SFTTrainer"]
