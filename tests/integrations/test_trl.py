"""TRL's SFTTrainer of a parallel model trains what one process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import meshpar as mp
from tests.integrations.training import SAMPLES, VOCAB, Rows, assert_equal, launched, model, parallel_model, whole
from tests.pool import Pool

BATCH, STEPS = 4, 20
Result = tuple[dict[str, list[float]], dict[str, torch.Tensor]]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1, **{f"w{i}": i for i in range(2, VOCAB)}}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")


def rows() -> Any:
    from datasets import Dataset

    texts = [" ".join(f"w{token}" for token in row["input_ids"].clamp(min=2).tolist()) for row in map(Rows().__getitem__, range(SAMPLES))]
    return Dataset.from_dict({"text": texts})


def arguments(folder: str, batch: int, **more: Any) -> Any:
    from trl import SFTConfig

    schedule = {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "max_grad_norm": 0.5, "logging_steps": 1, "pad_to_multiple_of": 5}
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2, "max_steps": STEPS, "save_strategy": "no"}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False}
    return SFTConfig(folder, **{**schedule, **sizes, **quiet, **more})


def logged(trainer: Any) -> dict[str, list[float]]:
    names = ("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens")
    return {name: [row[name] for row in trainer.state.log_history if name in row] for name in names}


def over_mesh(spec: str, folder: str, **more: Any) -> Result:
    from meshpar.integrations.trl import SFTTrainer

    with launched():
        pm = parallel_model(spec, BATCH)
        args = arguments(folder, BATCH // mp.data_rank(pm.mesh)[1], **more)
        trainer = SFTTrainer(model=pm, args=args, train_dataset=rows(), processing_class=tokenizer())
        trainer.train()
        return logged(trainer), whole(pm)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    from trl import SFTTrainer

    with launched():
        args = arguments(str(tmp_path_factory.mktemp("alone")), BATCH)
        trainer = SFTTrainer(model=model(), args=args, train_dataset=rows(), processing_class=tokenizer())
        trainer.train()
        return logged(trainer), {name: value.detach() for name, value in trainer.model.named_parameters()}


def check(results: list[Result], alone: Result) -> None:
    """TRL's own head computes in float32."""
    for logs, parameters in results:
        for name, values in logs.items():
            if values:
                torch.testing.assert_close(values, alone[0][name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert len(logs["loss"]) == STEPS
        assert_equal(parameters, alone[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("spec", ["dp=2"])
def test_sft(gloo: Pool, alone: Result, tmp_path: Path, spec: str) -> None:
    check(gloo.run(over_mesh, spec, str(tmp_path), world=2, timeout=240), alone)


def refused(folder: str) -> list[str]:
    from trl import SFTTrainer as Theirs

    from meshpar.integrations.transformers import parallel
    from meshpar.integrations.trl import SFTTrainer

    told = []
    with launched():
        pm = parallel_model("tp=2", BATCH)
        for kind, more in ((SFTTrainer, {"gradient_checkpointing": True}), (SFTTrainer, {"loss_type": "dft"}), (Theirs, {})):
            try:
                made = kind if kind is SFTTrainer else parallel(kind)
                made(model=pm, args=arguments(folder, BATCH, **more), train_dataset=rows(), processing_class=tokenizer())
            except mp.ConfigError as error:
                told.append(str(error))
    return told


def test_what_is_refused(gloo: Pool, tmp_path: Path) -> None:
    for checkpointing, loss, theirs in gloo.run(refused, str(tmp_path), world=2, timeout=120):
        assert 'recompute="full"' in checkpointing and "loss_fn" in loss and "meshpar.integrations.trl" in theirs
