"""transformers' Trainer of a parallel model trains what one process trains."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import meshpar as mp
from tests.integrations.training import Rows, assert_equal, collate, launched, model, parallel_model, whole
from tests.pool import Pool

BATCH, STEPS, MIDDLE = 4, 20, 10
Result = tuple[dict[str, list[float]], dict[str, torch.Tensor]]


def arguments(folder: Path | str, batch: int, **more: Any) -> Any:
    from transformers import TrainingArguments

    schedule = {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "max_steps": STEPS,
    }
    events = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": MIDDLE, "save_steps": MIDDLE, "report_to": "none"}
    sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch, "gradient_accumulation_steps": 2}
    return TrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **{**schedule, **events, **sizes, **more})


def logged(trainer: Any) -> dict[str, list[float]]:
    names = ("loss", "grad_norm", "learning_rate", "eval_loss")
    return {name: [row[name] for row in trainer.state.log_history if name in row] for name in names}


def over_mesh(spec: str, folder: str, again: bool = False, config: dict[str, Any] | None = None, **more: Any) -> Result:
    from transformers import Trainer

    from meshpar.integrations.transformers import parallel

    with launched():
        pm = parallel_model(spec, BATCH, **(config or {}))
        batch = BATCH // mp.data_rank(pm.mesh)[1]
        trainer = parallel(Trainer)(
            model=pm, args=arguments(folder, batch, **more), train_dataset=Rows(), eval_dataset=Rows(8), data_collator=collate
        )
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{MIDDLE}" if again else None)
        return logged(trainer), whole(pm)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    from transformers import Trainer

    with launched():
        args = arguments(tmp_path_factory.mktemp("alone"), BATCH, save_strategy="no")
        trainer = Trainer(model=model(), args=args, train_dataset=Rows(), eval_dataset=Rows(8), data_collator=collate)
        trainer.train()
        return logged(trainer), {name: value.detach() for name, value in trainer.model.named_parameters()}


def check(results: list[Result], alone: Result, last: int = STEPS) -> None:
    for logs, parameters in results:
        for name, values in alone[0].items():
            wanted = values[len(values) * (STEPS - last) // STEPS :]
            torch.testing.assert_close(
                logs[name][-len(wanted) :], wanted, rtol=2e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert_equal(parameters, alone[1])


@pytest.mark.slow
def test_a_trainer_on_every_kind_of_mesh_and_resumed_on_another(gloo: Pool, alone: Result, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    check(gloo.run(over_mesh, "tp=2", folder, world=2, timeout=240), alone)
    check(gloo.run(over_mesh, "dp=2", folder, True, world=2, timeout=240, save_strategy="no"), alone, last=STEPS - MIDDLE)
    check(gloo.run(over_mesh, "pp=2", folder, True, world=2, timeout=240, save_strategy="no"), alone, last=STEPS - MIDDLE)


def other_loss(spec: str, folder: str) -> dict[str, torch.Tensor]:
    """A loss of the user's own, computed of the logits."""
    from transformers import Trainer

    from meshpar.integrations.transformers import parallel

    with launched():
        pm = parallel_model(spec, BATCH) if spec else model()
        args = arguments(folder, BATCH // (mp.data_rank(pm.mesh)[1] if spec else 1), max_steps=3, save_strategy="no", eval_strategy="no")
        kind = parallel(Trainer) if spec else Trainer
        trainer = kind(model=pm, args=args, train_dataset=Rows(), data_collator=collate, compute_loss_func=squares)
        trainer.train()
        return whole(pm) if isinstance(pm, mp.ParallelModel) else {name: value.detach() for name, value in pm.named_parameters()}


def squares(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    picked = outputs.logits[:, :-1].gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ((picked - 1) ** 2 * (labels[:, 1:] != -100)).sum() / num_items_in_batch


def test_a_loss_computed_outside_of_the_model(gloo: Pool, tmp_path: Path) -> None:
    wanted = other_loss("", str(tmp_path))
    for found in gloo.run(other_loss, "dp=2", str(tmp_path), world=2, timeout=120):
        assert_equal(found, wanted)


def exported(folder: str) -> list[str]:
    """In bfloat16; what is saved at the end is a folder of transformers. Returns what was refused on the way."""
    from transformers import AutoModelForCausalLM, Trainer

    from meshpar.integrations.transformers import parallel

    with launched():
        pm, told = parallel_model("tp=2", BATCH, precision="bf16", recompute="full"), []
        plain, rows = parallel_model("tp=2", BATCH), {"train_dataset": Rows(), "data_collator": collate}
        args = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no"}
        for wrong, more in (
            (plain, {"bf16": True}),
            (plain, {"gradient_checkpointing": True}),
            (plain, {"fp16": True}),
            (plain, {"torch_compile": True}),
        ):
            try:
                parallel(Trainer)(model=wrong, args=arguments(folder, BATCH, **args, **more), **rows).train()
            except mp.ConfigError as error:
                told.append(str(error))
        try:
            Trainer(model=plain, args=arguments(folder, BATCH, **args), **rows).train()
        except (mp.ConfigError, ValueError) as error:
            told.append(str(error))
        trainer = parallel(Trainer)(model=pm, args=arguments(folder, BATCH, **args, bf16=True, gradient_checkpointing=True), **rows)
        trainer.train()
        trainer.save_model(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, value in whole(pm).items():
            torch.testing.assert_close(loaded.get_parameter(name).detach(), value, rtol=0, atol=0)
        return told


def test_what_is_saved_and_what_is_refused(gloo: Pool, tmp_path: Path) -> None:
    for told in gloo.run(exported, str(tmp_path), world=2, timeout=180):
        bf16, checkpointing, fp16, compiled, plain = told
        assert 'precision="bf16"' in bf16 and 'recompute="full"' in checkpointing
        assert "mp.GradScaler" in fp16 and "torch_compile" in compiled
        assert "meshpar.integrations" in plain


def test_what_is_no_trainer() -> None:
    from meshpar.integrations.transformers import parallel

    with pytest.raises(mp.ConfigError, match="parallel takes a class"):
        parallel(torch.nn.Linear)
    from transformers import Trainer

    with pytest.raises(mp.ConfigError, match="mp.parallelize"):
        parallel(Trainer)(model=torch.nn.Linear(2, 2))


def test_repeated_samples_are_said(gloo: Pool, tmp_path: Path) -> None:
    assert all("count twice" in text for text in gloo.run(warned, str(tmp_path), world=2))


def warned(folder: str) -> str:
    from transformers import Trainer

    from meshpar.integrations.transformers import parallel

    with launched(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pm = parallel_model("dp=2", BATCH)
        trainer = parallel(Trainer)(
            model=pm, args=arguments(folder, 2, save_strategy="no", eval_strategy="no"), train_dataset=Rows(7), data_collator=collate
        )
        trainer.get_train_dataloader()
    return " ".join(str(one.message) for one in caught)
