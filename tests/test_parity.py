"""Loss, every gradient, gradient norm and optimizer steps against one device: many architectures, no model known to the package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import meshpar as mp
from benchmarks.architectures.packages.plain import text as text_models
from meshpar.sharding.types import I
from tests.models import plain, text, tiny
from tests.pool import Pool

CAUSAL = "llama gemma2 bloom deepseek_v3".split()
"""One of each kind; `benchmarks/architectures` has all."""
PLAIN = "gpt gpt_kv2 encoder_decoder vit mixer".split()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", CAUSAL)
def test_language_models_over_data_and_tensor_axes(name: str) -> None:
    mp.verify(tiny(name), "dp=2,tp=2", text()).raise_if_failed()


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", "gpt2 mixtral".split())
def test_language_models_without_sequence_parallelism(name: str) -> None:
    mp.verify(tiny(name), "tp=2", text(), config=mp.ParallelConfig(sequence_parallel=False)).raise_if_failed()


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", ["qwen3", "falcon"])
def test_fewer_key_value_heads_than_ranks(name: str) -> None:
    changes = {"num_kv_heads": 2, "new_decoder_architecture": True} if name == "falcon" else {"num_key_value_heads": 2}
    mp.verify(tiny(name, **changes), "tp=4", text()).raise_if_failed()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_models(name: str) -> None:
    model, batch = plain(name)
    mp.verify(model, "dp=2,tp=2", batch).raise_if_failed()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", ["batch_norm", "contrastive"])
@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2"])
def test_what_mixes_samples_sees_the_global_batch(name: str, mesh: str) -> None:
    model, batch = plain(name)
    mp.verify(model, mesh, batch).raise_if_failed()


@pytest.mark.slow
def test_float32_is_exact_to_its_rounding() -> None:
    mp.verify(tiny("mixtral"), "dp=2,tp=2", text(), dtype=torch.float32).raise_if_failed()


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("heads", "kv", "mesh"), [(6, 6, "tp=4"), (4, 1, "tp=4"), (5, 5, "tp=2")])
def test_heads_that_do_not_divide_are_cut_inside_or_left_whole(heads: int, kv: int, mesh: str) -> None:
    model = tiny("llama", hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=30)
    mp.verify(model, mesh, text(length=13)).raise_if_failed()


@pytest.mark.parametrize("name", ["vit"])
def test_three_ranks_that_hold_unequal_parts(name: str) -> None:
    """8 heads, a vocabulary of 131, 17 or 13 positions, 112 or 43 * 3 - 1 features on 3 ranks."""
    model, batch = plain(name) if name in PLAIN else (tiny(name), text(length=13))
    mp.verify(model, "tp=3", batch).raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba"])
def test_three_real_ranks_that_hold_unequal_parts(gloo: Pool, name: str) -> None:
    for differences in gloo.run(verified, name, "tp=3", world=3):
        assert max(differences.values()) < 1e-9, differences


def verified(name: str, mesh: str) -> dict[str, float]:
    """The largest differences on this rank."""
    model, batch = plain(name) if name in PLAIN else (tiny(name), text(length=13))
    return {d.quantity: d.largest for d in mp.verify(model, mp.make_mesh(mesh), batch).differences}


def test_microbatches_of_uneven_label_counts() -> None:
    model, batch = plain("gpt")
    mp.verify(model, "dp=2", batch, config=mp.ParallelConfig(microbatches=2)).raise_if_failed()
    mp.verify(model, "tp=2", batch, config=mp.ParallelConfig(microbatches=4)).raise_if_failed()


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mixer", [partial(text_models.Mamba2Block, groups=1), text_models.XAttention], ids=["state space", "one key head"])
def test_what_all_heads_share_is_cut_beside_them_in_one_projection(mixer: Callable[[], nn.Module]) -> None:
    """B and C of one group, beside z, x and dt by heads; the keys and values of one head: computed in parts, and gathered."""
    torch.manual_seed(0)
    model, ids = text_models.Stack(mixer), torch.randint(1, 64, (4, 12))
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2", "cpu"), example=(ids, ids))
    whole = [name for name, p in pm.plan.parameters.items() if p.placements["tp"] == I and len(p.shape) > 1]
    assert not whole
    mp.verify(model, "tp=2", (ids, ids)).raise_if_failed()
