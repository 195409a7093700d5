"""Small models of any type, and text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meshpar.cli.causal_lm import Corpus, SmallSizes, small_model
from meshpar.cli.demo import Comparison, Demo, Training
from meshpar.errors import ConfigError


def test_text_of_this_machine() -> None:
    text = Corpus()
    batch = text.batch(3, samples=4, sequence=16)
    assert batch["input_ids"].shape == (4, 16) and torch.equal(batch["input_ids"], batch["labels"])
    assert torch.equal(batch["input_ids"], Corpus().batch(3, samples=4, sequence=16)["input_ids"])
    assert not torch.equal(batch["input_ids"], text.batch(4, samples=4, sequence=16)["input_ids"])
    assert bytes(batch["input_ids"][0].tolist()) in bytes(text.data.tolist())


def test_text_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"0123456789")
    assert bytes(Corpus(path).batch(0, samples=1, sequence=9)["input_ids"][0].tolist()) in b"0123456789"
    with pytest.raises(ConfigError, match="10 bytes, fewer than a sequence of 10"):
        Corpus(path).batch(0, samples=1, sequence=10)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_small_models_train_on_bytes(kind: str) -> None:
    pytest.importorskip("transformers")
    sizes = SmallSizes(layers=1, hidden=32, heads=4, kv_heads=2, sequence=16)
    model, again = small_model(kind, sizes), small_model(kind, sizes)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert sum(p.numel() for p in model.parameters()) < 100_000
    loss = model(**Corpus().batch(0, samples=2, sequence=16)).loss
    assert 4 < loss < 7  # of 256 bytes, before training: about log 256 = 5.5


def test_the_demo_judges_by_the_largest_difference() -> None:
    def training(*losses: float) -> Training:
        return Training(losses, (1.0,) * len(losses), 0.0)

    assert Comparison(training(5.0, 4.0), training(5.0, 4.0004)).ok
    assert Comparison(training(5.0, 4.0), training(5.0, 4.0)).loss == 0
    assert not Comparison(training(5.1, 4.0), training(5.0, 4.0)).ok
    assert not Comparison(training(float("nan")), training(5.0)).ok
    assert Demo().sizes == SmallSizes()
