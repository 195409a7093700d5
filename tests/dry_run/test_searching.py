"""mp.search: dimensions read off graphs, and a configuration that everything takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import meshpar as mp
from meshpar.dry_run.decoder import Decoder
from meshpar.dry_run.result import DryRun
from meshpar.dry_run.searching import Mappings
from meshpar.dry_run.sizes import sizes_of
from meshpar.mesh import parse_mesh
from meshpar.planner import Cluster, Job, Mapping, Transformer
from meshpar.planner.search import Candidate, estimate
from tests.dry_run.measured import DENSE, EXPERTS, batch
from tests.models import text, tiny

TIED = Transformer(layers=3, hidden=64, heads=4, ffn=256, vocab=200, gated=False, tied=True, positions=32)
SHARED = Transformer(layers=3, hidden=64, heads=4, ffn=256, vocab=200, experts=4, top_k=2, expert_ffn=32, shared_ffn=48, dense_layers=1)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("sizes", [DENSE, TIED, SHARED], ids=["gated", "tied", "experts"])
def test_dimensions_are_read_off_the_graph(sizes: Transformer) -> None:
    ids = torch.zeros(2, 32, dtype=torch.long)
    with torch.device("meta"):
        model = Decoder(sizes)
    found, seq = sizes_of(model, {"input_ids": ids, "labels": ids})
    assert found == replace(sizes, head_dim=sizes.head, kv_heads=sizes.keys) and seq == 32


@pytest.mark.sweep(2)
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


SMALL = Transformer(layers=4, hidden=256, heads=4, kv_heads=2, ffn=512, vocab=1000)


def test_the_first_are_checked_by_their_programs() -> None:
    found = mp.search(SMALL, ("h100", 8), global_batch=16, seq=256, top=5, check=2)
    assert len(found.checked) == 2 and all(one.fits for one in found.checked)
    assert sorted(found.ranked.index(one.estimate) for one in found.checked) == [0, 1]
    seconds = [one.program.time.seconds for one in found.checked if one.program is not None]
    assert seconds == sorted(seconds) and found.best is found.checked[0].estimate
    assert found.toml() == found.toml(found.ranked.index(found.best))
    assert "As their programs are" in str(found) and str(found).count("  fits  ") == 2


def test_what_does_not_fit_by_its_program_is_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    first = mp.search(SMALL, ("h100", 8), global_batch=16, seq=256, top=4).ranked
    monkeypatch.setattr(DryRun, "fits", property(lambda self: self.config.recompute == "full" or self.mesh != _mesh(first[0])))
    found = mp.search(SMALL, ("h100", 8), global_batch=16, seq=256, top=4, check=1)
    fits = [one.fits for one in found.checked]
    assert fits[0] and not any(fits[1:]) and len(fits) > 1
    assert found.best is not first[0] and "DOES NOT FIT" in str(found)
    monkeypatch.setattr(DryRun, "fits", property(lambda self: False))
    with pytest.raises(mp.MeshparError, match="by their programs none of the first 4 mappings fits; least is lacking to"):
        mp.search(SMALL, ("h100", 8), global_batch=16, seq=256, top=4, check=1)


def _mesh(candidate: Candidate) -> str:
    """As a dry run calls it."""
    mapping = candidate.mapping
    sizes = {"pp": mapping.pp, "dp": mapping.data(8), "tp": mapping.tp}
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1)


def test_a_model_of_ones_own_is_checked_with_its_example() -> None:
    with torch.device("meta"):
        model = Decoder(SMALL)
    ids = torch.zeros(2, 128, dtype=torch.long)
    found = mp.search(model, ("h100", 8), global_batch=16, example={"input_ids": ids, "labels": ids}, top=3, check=1)
    (one,) = found.checked
    assert one.program is not None and one.program.tokens == 16 * 128


@pytest.mark.parametrize(
    "more, said",
    [
        ({"stack": "megatron-2024"}, "reads programs of this package"),
        ({"seq": 64}, "the example's 128 tokens, and seq=64"),
        ({"precision": "fp8"}, "in bf16, fp16, fp32, and precision='fp8'"),
        ({"check": -1}, "check=-1 is not a number"),
    ],
)
def test_what_cannot_be_checked(more: dict[str, Any], said: str) -> None:
    with torch.device("meta"):
        model = Decoder(SMALL)
    ids = torch.zeros(2, 128, dtype=torch.long)
    with pytest.raises(mp.MeshparError) as caught:
        mp.search(model, ("h100", 8), global_batch=16, example={"input_ids": ids, "labels": ids}, **{"check": 1, **more})
    assert said in str(caught.value)


@pytest.mark.parametrize("tp", [1, 4])
def test_the_closed_form_of_selective_recompute_is_that_of_this_runtime(tp: int) -> None:
    """The products' results, attention's, and those of collectives: by the program as much, and over tp more than without recompute."""
    sizes = Transformer(layers=4, hidden=1024, heads=16, kv_heads=4, ffn=4096, vocab=1000)
    with torch.device("meta"):
        model = Decoder(sizes)
    ids = torch.zeros(4, 4096, dtype=torch.long)
    found = {}
    for recompute in ("none", "selective"):
        config = mp.ParallelConfig(recompute=recompute, data_parallel="zero3", sequence_parallel=tp > 1, precision="bf16")
        read = mp.dry_run(model, f"dp=8,tp={tp}" if tp > 1 else "dp=8", config, example={"input_ids": ids, "labels": ids})
        job = Job(sizes, Cluster("h100", 8 * tp), seq=4096, batch=32, stack="meshpar")
        guessed = estimate(job, Mapping(tp=tp, data_parallel="zero3", microbatch=4, recompute=recompute))
        found[recompute] = guessed.memory.activations, read.ranks[0].activations + read.ranks[0].buffers
    by_form, by_program = (found["selective"][k] - found["none"][k] for k in range(2))
    assert by_form == pytest.approx(by_program, rel=0.35)
    assert by_program > 0 if tp > 1 else by_program < 0
