"""Jobs in Megatron's names: what they become, and what is wrong with them, all at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshpar.dry_run.megatron import read_megatron
from meshpar.errors import ConfigError

JOB = {
    "world_size": 64,
    "num_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "seq_length": 32,
    "micro_batch_size": 2,
    "global_batch_size": 128,
    "tensor_model_parallel_size": 4,
    "pipeline_model_parallel_size": 4,
    "virtual_pipeline_model_parallel_size": 2,
    "bf16": True,
}


def test_sizes_mesh_and_microbatches() -> None:
    job = read_megatron({**JOB, "ddp_config": {"use_distributed_optimizer": True, "bucket_size": 40_000_000}})
    assert (job.mesh, job.config.microbatches, job.local_batch) == ("pp=4,dp=4,tp=4", 16, 32)
    assert job.config.data_parallel == "zero1" and job.config.schedule == "interleaved-1f1b"
    assert job.sizes.vocab == 1024 and job.sizes.tied and job.sizes.positions == 32
    said = "\n".join([*map(str, job.translation), *job.remarks])
    assert "num_microbatches = global_batch_size / (micro_batch_size x data parallel size) = 128 / (2 x 4) = 16" in said
    assert "(p - 1) / (v m) = (4 - 1) / (2 x 16) = 9.38 %" in said
    assert "bucket_size=40000000 -> bucket_bytes=160000000" in said


def test_one_connection_is_wrong_beside_fully_sharded_parameters() -> None:
    both = {"ddp_config": {"use_megatron_fsdp": True}, "env": {"CUDA_DEVICE_MAX_CONNECTIONS": 1}}
    assert any(
        "CUDA_DEVICE_MAX_CONNECTIONS=1 is wrong beside fully sharded parameters" in r for r in read_megatron({**JOB, **both}).remarks
    )
    other = {"ddp_config": {"use_distributed_optimizer": True}, "env": {"CUDA_DEVICE_MAX_CONNECTIONS": 1}}
    assert not any("is wrong" in r for r in read_megatron({**JOB, **other}).remarks)


def test_what_the_file_says_of_the_model_becomes_the_model() -> None:
    named = {"swiglu": True, "num_query_groups": 2, "use_rotary_position_embeddings": True, "rotary_base": 500000, "num_experts": 4}
    job = read_megatron({**JOB, **named, "moe_ffn_hidden_size": 96, "lr": 1e-4})
    said = {one.name: str(one) for one in job.translation}
    assert (job.sizes.gated, job.sizes.kv_heads, job.sizes.positions, job.sizes.experts) == (True, 2, 0, 4)
    assert said["num_layers"] == "num_layers=8 -> layers=8 of the model"
    assert said["vocab_size"] == "vocab_size=1000 -> vocab=1024 of the model"
    assert said["swiglu"] == "swiglu=True -> gated=True of the model" and said["seq_length"] == "seq_length=32 -> seq=32 of the model"
    assert said["micro_batch_size"] == "micro_batch_size=2 -> microbatches=16, 32 samples of a data rank"
    assert said["rotary_base"] == "rotary_base=500000 -> nothing: the model that is dry run is made of sizes, and has no such part"
    assert said["lr"].startswith("lr=0.0001 -> nothing: the training loop decides")


def test_stages_of_blocks() -> None:
    """The name that is given most: how many blocks a stage has, of which a rank then has several."""
    job = dict(JOB)
    del job["virtual_pipeline_model_parallel_size"]
    found = read_megatron({**job, "num_layers": 24, "num_layers_per_virtual_pipeline_stage": 2})
    assert (found.config.virtual_stages, found.config.schedule) == (3, "interleaved-1f1b")
    said = [*map(str, found.translation), *found.remarks]
    assert 'num_layers_per_virtual_pipeline_stage=2 -> virtual_stages=3: with schedule="interleaved-1f1b"' in said
    assert any("(4 - 1) / (3 x 16)" in line for line in said)
    assert read_megatron({**job, "num_layers_per_virtual_pipeline_stage": 2}).config.schedule == "1f1b"  # one stage a rank
    for change, message in (
        ({"num_layers_per_virtual_pipeline_stage": 3}, "num_layers=8 is no multiple of .* = 4 x 3"),
        (
            {"num_layers_per_virtual_pipeline_stage": 1, "virtual_pipeline_model_parallel_size": 4},
            "virtual_pipeline_model_parallel_size=4, but num_layers_per_virtual_pipeline_stage=1 gives a rank 2 stages",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            read_megatron({**job, **change})


def test_experts() -> None:
    job = read_megatron({**JOB, "num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 96, "expert_model_parallel_size": 2})
    assert job.mesh == "pp=4,dp=2,ep=2,tp=4"
    assert (job.sizes.experts, job.sizes.top_k, job.sizes.expert_ffn) == (8, 2, 96)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(JOB))
    assert read_megatron(path).mesh == "pp=4,dp=4,tp=4"
    path = tmp_path / "job.yaml"
    path.write_text("\n".join(f"{name.replace('_', '-')}: {json.dumps(value)}" for name, value in JOB.items()))
    assert read_megatron(path).config == read_megatron(JOB).config


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"global_batch_size": 100},
            "global_batch_size=100 is no multiple of micro_batch_size x data parallel size = 2 x 4 = 8. Nearest: 96",
        ),
        ({"data_parallel_size": 8}, "data_parallel_size=8, but 64 GPUs leave 4 for data parallelism"),
        ({"hidden": 3}, "hidden is not a name of Megatron's configuration known here"),
        ({"world_size": 60}, "60 ranks are not divisible by 16"),
    ],
)
def test_what_does_not_go_together(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_megatron({**JOB, **change})
    assert message in str(caught.value)


def test_all_that_is_missing_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_megatron({"num_layers": 2})
    for name in ("hidden_size", "vocab_size", "global_batch_size", "--gpus"):
        assert name in str(caught.value)
