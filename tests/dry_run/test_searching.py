"""mp.search: dimensions read off graphs, and a configuration that everything takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import meshpar as mp
from meshpar.dry_run.decoder import Decoder
from meshpar.dry_run.searching import Mappings
from meshpar.dry_run.sizes import sizes_of
from meshpar.mesh import parse_mesh
from meshpar.planner import Cluster, Transformer
from tests.dry_run.measured import DENSE, EXPERTS, batch
from tests.models import text, tiny

TIED = Transformer(layers=3, hidden=64, heads=4, ffn=256, vocab=200, gated=False, tied=True, positions=32)
SHARED = Transformer(layers=3, hidden=64, heads=4, ffn=256, vocab=200, experts=4, top_k=2, expert_ffn=32, shared_ffn=48, dense_layers=1)


@pytest.mark.parametrize("sizes", [DENSE, TIED, SHARED], ids=["gated", "tied", "experts"])
def test_dimensions_are_read_off_the_graph(sizes: Transformer) -> None:
    ids = torch.zeros(2, 32, dtype=torch.long)
    with torch.device("meta"):
        model = Decoder(sizes)
    found, seq = sizes_of(model, {"input_ids": ids, "labels": ids})
    assert found == replace(sizes, head_dim=sizes.head, kv_heads=sizes.keys) and seq == 32


@pytest.mark.parametrize("name, heads", [("llama", (8, 4)), ("phi3", (8, 4)), ("mixtral", (8, 4))])
def test_dimensions_of_models_of_transformers(name: str, heads: tuple[int, int]) -> None:
    found, _ = sizes_of(tiny(name), text(4))
    assert (found.heads, found.kv_heads, found.gated) == (*heads, True)


def test_what_is_no_decoder_is_told_so() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(mp.MeshparError) as caught:
        mp.search(model, ("h100", 8), global_batch=8, example=(torch.zeros(2, 8),))
    assert "no attention" in str(caught.value) and "Give a planner.Transformer" in str(caught.value)


@pytest.fixture(scope="module")
def found() -> Mappings:
    sizes = Transformer(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256)
    return mp.search(sizes, ("h100", 64), global_batch=512, seq=4096)


def test_only_what_this_runtime_does_is_searched(found: Mappings) -> None:
    assert all(one.mapping.recompute in ("none", "selective", "full") for one in found.ranked)
    assert "The best of the families that lost" in str(found) and "The usual path" in str(found)


@pytest.mark.parametrize("index", [0, 3, 7])
def test_the_configuration_is_taken_by_mesh_parallelize_and_dry_run(found: Mappings, index: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(found.toml(index))
    sizes, config = parse_mesh(path), mp.ParallelConfig.from_toml(path)
    mapping = found.ranked[index].mapping
    assert sizes.get("tp", 1) == mapping.tp and sizes.get("pp", 1) == mapping.pp and config.data_parallel == mapping.data_parallel
    assert config.microbatches * mapping.microbatch * mapping.data(64) == 512


def test_parallelize_takes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('mesh = "dp=2,tp=2"\n\n[config]\nmicrobatches = 2\nrecompute = "full"\n')
    with torch.device("meta"):
        model = Decoder(DENSE)
    with mp.simulate(4):
        pm = mp.parallelize(model, mp.make_mesh(path, "cpu"), example={n: x[:8] for n, x in batch().items()}, config=path)
    assert pm.parallel_config.microbatches == 2 and pm.parallel_config.recompute == "full"


@pytest.mark.parametrize(
    "body, message",
    [
        ('mesh = "dp=2"\n[config]\nmicrobatch = 2', "[config] microbatch: there is no such field. Did you mean microbatches"),
        ("[batch]\nmicrobatches = 4", "[batch] microbatches: microbatch and seq are known"),
        ("meshes = 3", "'meshes' is not mesh, config or batch. Did you mean mesh"),
        ("mesh = ", "is no TOML"),
    ],
)
def test_files_that_are_none(body: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(body)
    with pytest.raises(mp.ConfigError) as caught:
        mp.ParallelConfig.from_toml(path)
    assert message in str(caught.value)


def test_bad_input_is_one_error_with_the_values_that_would_do() -> None:
    with pytest.raises(mp.ConfigError, match="no accelerator 'h10'"):
        mp.search(EXPERTS, ("h10", 8), global_batch=8, seq=64)
    with pytest.raises(mp.ConfigError, match="cluster='h100'; a planner.Cluster, or an accelerator and how many"):
        mp.search(EXPERTS, "h100", global_batch=8, seq=64)  # type: ignore[arg-type]
    with pytest.raises(mp.ConfigError, match="gpus='8'; a cluster has a whole number of GPUs"):
        mp.search(EXPERTS, ("h100", "8"), global_batch=8, seq=64)  # type: ignore[arg-type]
    with pytest.raises(mp.ConfigError, match="seq is missing"):
        mp.search(EXPERTS, Cluster("h100", 8), global_batch=8)
    with pytest.raises(mp.ConfigError, match="batch is missing"):
        mp.search(EXPERTS, Cluster("h100", 8), global_batch=0, seq=64)
