"""PEFT's own adapters: losses, gradients and steps are those of one device, and their files move between meshes and PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import meshpar as mp
from meshpar.simulate import local_tensors
from tests.integrations.training import loss_in_float64
from tests.pool import Pool

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
ENDS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
FUSED = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "LoraConfig", {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}),
    "dora": ("llama", "LoraConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True, "init_lora_weights": False}),
    "ia3": ("llama", "IA3Config", {"init_ia3_weights": False}),
    "prompt": ("llama", "PromptTuningConfig", {"num_virtual_tokens": 4}),
    "prefix": ("llama", "PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "embedding, tied": ("llama", "LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": False}),
    "head kept": (
        "llama",
        "LoraConfig",
        {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False},
    ),
    "fused": ("phi3", "LoraConfig", {"r": 4, "target_modules": FUSED, "init_lora_weights": False}),
    "tokens": (
        "llama",
        "LoraConfig",
        {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5], "init_lora_weights": False},
    ),
}


def base(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **ENDS), attn_implementation="eager")
    model.loss_function = loss_in_float64
    return model


def adapted(name: str) -> Any:
    import peft

    kind, config, options = KINDS[name]
    model = base(kind)
    torch.manual_seed(1)
    made = peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **options))
    if name == "lora":  # several, of which two are active
        made.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
        made.base_model.set_adapter(["default", "other"])
    return made.double()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(48, (4, 8), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def stepped(parameters: Any) -> None:
    torch.optim.AdamW([{"params": [p for p in parameters if p.requires_grad]}], lr=1e-2).step()


def alone(model: Any) -> tuple[Any, torch.Tensor]:
    """A copy after a step on one device, with its gradients; its loss before. Outside of simulated ranks: forward makes tensors."""
    copied = copy.deepcopy(model)
    loss = copied(**batch()).loss
    loss.backward()
    stepped(copied.parameters())
    return copied, loss.detach()


def trains(model: Any, wanted: tuple[Any, torch.Tensor], spec: str, **config: Any) -> Any:
    mesh, parameters = mp.make_mesh(spec), dict(wanted[0].named_parameters())
    local = mp.local_batch(batch(), mesh)
    pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(**config))
    for found in local_tensors(pm.train_step(**local)).values():
        torch.testing.assert_close(found, wanted[1], rtol=1e-11, atol=0)
    for name, parameter in pm.named_parameters():
        expected = parameters[name].grad
        assert (parameter.grad is None) == (expected is None), name
        if parameter.grad is not None:
            for grad in local_tensors(mp.full_grad(parameter)).values():
                torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    stepped(pm.parameters())
    for name, parameter in pm.named_parameters():
        for value in local_tensors(mp.full_tensor(parameter)).values():
            torch.testing.assert_close(
                value, parameters[name].detach(), rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )
    return pm


def moves(pm: Any, other: Any, name: str, folder: Path) -> None:
    """An adapter's files: PEFT reads what was written here, and the other way round."""
    from peft import PeftModel

    from meshpar.integrations.peft import load_adapter, save_adapter

    save_adapter(pm, folder / "ours")
    inputs = {key: batch()[key] for key in ("input_ids", "attention_mask")}
    if list(other.peft_config) == ["default"]:
        loaded = PeftModel.from_pretrained(base(KINDS[name][0]).double(), str(folder / "ours"), autocast_adapter_dtype=False).double()
        torch.testing.assert_close(loaded.eval()(**inputs).logits, other.eval()(**inputs).logits, rtol=1e-6, atol=1e-8)
    theirs = folder / f"theirs-{torch.distributed.get_rank()}"
    other.save_pretrained(str(theirs), selected_adapters=["default"])
    before = {key: mp.full_tensor(value).clone() for key, value in pm.named_parameters()}
    with torch.no_grad():
        for parameter in pm.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    load_adapter(pm, theirs)
    for key, parameter in pm.named_parameters():
        if "other" not in key and parameter.requires_grad:
            torch.testing.assert_close(mp.full_tensor(parameter), before[key], rtol=1e-7, atol=1e-9)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", KINDS)
def test_adapters_on_tp(name: str) -> None:
    model = adapted(name)
    wanted = alone(model)
    with mp.simulate(2):
        trains(model, wanted, "tp=2")


def over_ranks(name: str, spec: str, folder: str, **config: Any) -> None:
    model = adapted(name)
    wanted = alone(model)
    moves(trains(model, wanted, spec, **config), wanted[0], name, Path(folder))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name, spec", [("lora", "pp=2"), ("fused", "dp=2"), ("prompt", "tp=2")])
def test_adapters_and_their_files_on_processes(gloo: Pool, tmp_path: Path, name: str, spec: str) -> None:
    folder = tmp_path / name
    gloo.run(over_ranks, name, spec, str(folder), world=2, timeout=180, **({"microbatches": 2} if "pp" in spec else {}))


def wrong(folder: str) -> list[str]:
    from meshpar.integrations.peft import load_adapter, save_adapter

    mesh = mp.make_mesh("tp=2")
    pm = mp.parallelize(adapted("ia3"), mesh, example=batch())
    save_adapter(pm, folder)
    other = mp.parallelize(adapted("dora"), mesh, example=batch())
    told = []
    for act in (
        lambda: load_adapter(other, folder),
        lambda: save_adapter(pm, folder, "second"),
        lambda: save_adapter(mp.parallelize(base("llama").double(), mesh, example=batch()), folder),
    ):
        try:
            act()
        except mp.MeshparError as error:
            told.append(str(error))
    return told


def test_what_does_not_fit(gloo: Pool, tmp_path: Path) -> None:
    for missing, name, plain in gloo.run(wrong, str(tmp_path / "ia3"), world=2, timeout=120):
        assert "is missing" in missing and "another model or configuration" in missing
        assert "there is no adapter 'second'; there are default" in name and "get_peft_model" in plain
