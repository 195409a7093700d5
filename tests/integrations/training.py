"""A small language model, data of uneven lengths, and ranks as a launcher starts them: what the tests of all trainers train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Dataset

import meshpar as mp

VOCAB, SAMPLES = 48, 48


def model() -> Any:
    """Float64, the same on every rank."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
    config = AutoConfig.for_model("llama", num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, **sizes)
    made: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    made.loss_function = loss_in_float64
    return made


def loss_in_float64(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None, **_: Any) -> torch.Tensor:
    """transformers' loss of a language model, which is computed in float32 there."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Sequences of 4 to 9 tokens, some labels of which do not count."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.samples:
            raise IndexError(index)
        ids = torch.randint(1, VOCAB, (4 + index % 6,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: index % 3] = -100
        return {"input_ids": ids, "labels": labels}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Padded to 5 or 10 tokens: data ranks get batches of different lengths."""
    longest = -(-max(len(row["input_ids"]) for row in rows) // 5) * 5

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.stack([F.pad(row[name], (0, longest - len(row[name])), value=value) for row in rows])

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": padded("labels", -100)}


@contextmanager
def launched() -> Iterator[None]:
    """The variables that a launcher sets, and nothing that a tool remembers of an earlier test."""
    rank, size = (str(dist.get_rank()), str(dist.get_world_size())) if dist.is_initialized() else ("0", "1")
    mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": "29500"}
    before = dict(os.environ)
    forget()
    if dist.is_initialized():
        os.environ.update(mine)
    try:
        yield
    finally:
        forget()
        for name in [name for name in os.environ if name not in before]:
            del os.environ[name]
        os.environ.update(before)


def forget() -> None:
    """accelerate keeps one state for a process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def parallel_model(spec: str, batch: int, **config: Any) -> mp.ParallelModel:
    """The model over a mesh; `batch` samples are the global batch."""
    mesh = mp.make_mesh(spec)
    example = collate([Rows()[i] for i in range(batch // mp.data_rank(mesh)[1])])
    return mp.parallelize(model(), mesh, example=example, config=mp.ParallelConfig(**{"microbatches": 2 if "pp" in spec else 1, **config}))


def whole(pm: mp.ParallelModel) -> dict[str, torch.Tensor]:
    """This rank's parameters, whole."""
    return {name: mp.full_tensor(parameter).cpu().clone() for name, parameter in pm.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], *, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    """Parameters after training are those of one process, up to rounding."""
    assert found
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
