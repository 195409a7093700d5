"""ParallelConfig: what it accepts, what it says about the rest, and Megatron's names."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch

from meshpar.config import SCHEDULES, ParallelConfig, Precision
from meshpar.errors import ConfigError
from meshpar.megatron import AXES, FIELDS, LOOP, MODEL, NOTHING, megatron_mesh


def test_defaults_are_valid_and_frozen() -> None:
    config = ParallelConfig()
    assert config.stages_per_rank == 1
    with pytest.raises(FrozenInstanceError):
        config.microbatches = 2  # type: ignore[misc]
    assert hash(config) == hash(ParallelConfig())


def test_all_complaints_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(microbatches=0, schedule="1fb1", recompute="some", precision="bf17", sequence_parallel=3)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "microbatches=0: a whole number of at least 1." in text
    assert "schedule='1fb1': one of gpipe, 1f1b, looped-bfs, interleaved-1f1b, zero-bubble, zbv, dualpipev. Did you mean 1f1b?" in text
    assert "recompute='some'" in text
    assert "precision='bf17'" in text and "bf16" in text
    assert "sequence_parallel=3" in text


@pytest.mark.parametrize("value", [True, 1.5, "2", -1])
def test_microbatches_is_a_positive_whole_number(value: object) -> None:
    with pytest.raises(ConfigError, match="microbatches"):
        ParallelConfig(microbatches=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_virtual_stages_follow_the_schedule(schedule: str) -> None:
    least, most = SCHEDULES[schedule]
    assert ParallelConfig(schedule=schedule).stages_per_rank == least  # type: ignore[arg-type]
    if most is not None:
        with pytest.raises(ConfigError, match=f"virtual_stages={most + 1}: schedule '{schedule}' puts exactly {most} on a rank"):
            ParallelConfig(schedule=schedule, virtual_stages=most + 1)  # type: ignore[arg-type]


def test_precision() -> None:
    mixed = ParallelConfig(precision="bf16").precision  # type: ignore[arg-type]
    assert mixed == Precision(torch.float32, torch.bfloat16, torch.float32)
    assert Precision.named("fp64") == Precision("fp64", "double", torch.float64)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"compute_dtype: 'bfloat17' is no floating dtype.*Did you mean bfloat16"):
        Precision(compute_dtype="bfloat17")  # type: ignore[arg-type]


def test_from_megatron_says_what_every_name_becomes() -> None:
    config = ParallelConfig.from_megatron(
        {
            "tensor_model_parallel_size": 4,
            "sequence_parallel": True,
            "virtual_pipeline_model_parallel_size": 2,
            "recompute_granularity": "selective",
            "bf16": True,
            "hidden_size": 64,
        },
        {"use_distributed_optimizer": True, "bucket_size": 1000, "overlap_grad_reduce": False, "nccl_ub": True},
    )
    wanted = ParallelConfig(
        schedule="interleaved-1f1b",
        virtual_stages=2,
        sequence_parallel=True,
        recompute="selective",
        data_parallel="zero1",
        bucket_bytes=4000,
        overlap_grad_reduce=False,
        precision="bf16",  # type: ignore[arg-type]
    )
    assert config == wanted
    table = {t.name: str(t) for t in config.translation}
    assert len(table) == 10
    assert table["tensor_model_parallel_size"].startswith("tensor_model_parallel_size=4 -> mesh axis tp=4")
    assert table["bucket_size"] == "bucket_size=1000 -> bucket_bytes=4000: counted in bytes, 4 for each parameter"
    assert table["nccl_ub"].startswith("nccl_ub=True -> nothing: user-buffer registration belongs to NCCL")
    assert table["bf16"] == "bf16=True -> precision.compute_dtype=bfloat16"
    assert "-> nothing" in table["hidden_size"]


def test_from_megatron_takes_dataclasses_and_namespaces() -> None:
    @dataclass
    class Ddp:
        grad_reduce_in_fp32: bool = False
        data_parallel_sharding_strategy: str = "optim_grads_params"
        use_megatron_fsdp: bool = True
        bucket_size: int | None = None

    config = ParallelConfig.from_megatron(Namespace(bf16=True, sequence_parallel=False), Ddp())
    assert config.data_parallel == "zero3"
    assert config.bucket_bytes == ParallelConfig().bucket_bytes
    assert config.precision == Precision(torch.float32, torch.bfloat16, torch.bfloat16)
    assert config.sequence_parallel is False


def test_from_megatron_refuses_unknown_names_and_contradictions() -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelConfig.from_megatron({"tensor_model_paralel_size": 2, "bf16": True, "fp16": True, "expert_tensor_parallel_size": 2})
    text = str(caught.value)
    assert "tensor_model_paralel_size is not a name of Megatron's configuration known here. Did you mean tensor_model_parallel_size" in text
    assert "bf16 and fp16 are both set" in text
    assert "expert_tensor_parallel_size=2 differs from tensor_model_parallel_size=1" in text


def test_megatron_tables_do_not_overlap() -> None:
    names = [*AXES, *FIELDS, *NOTHING, *MODEL, *LOOP]
    assert len(names) == len(set(names))


def test_every_known_name_is_explained() -> None:
    values = {"recompute_granularity": None, "data_parallel_sharding_strategy": "optim", "bucket_size": 8, "num_microbatches": 1, "seed": 0}
    given = {name: values.get(name) for name in (*AXES, *FIELDS, *NOTHING, *MODEL, *LOOP)}
    given |= dict.fromkeys(("sequence_parallel", "overlap_grad_reduce", "overlap_p2p_comm"), True)
    for line in ParallelConfig.from_megatron(given).translation:
        assert line.becomes or line.why, line.name


def test_megatron_mesh() -> None:
    sizes = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
    assert megatron_mesh(sizes, 32) == "pp=2,dp=2,ep=2,tp=4"
    assert megatron_mesh({}, 1) == "tp=1"
    with pytest.raises(ConfigError, match="24 ranks are not divisible by 16 = pp 2 x cp 1 x ep 2 x tp 4"):
        megatron_mesh(sizes, 24)


def test_replace_keeps_checking() -> None:
    with pytest.raises(ConfigError, match="recompute"):
        replace(ParallelConfig(), recompute="all")  # type: ignore[arg-type]


def test_stages() -> None:
    assert ParallelConfig(stages=[4, 4, 3]).stages == (4, 4, 3)
    named = ParallelConfig(stages=["model.layers.4", "model.layers.8"])
    assert named.stages == ("model.layers.4", "model.layers.8") and isinstance(hash(named), int)


@pytest.mark.parametrize("stages", ["model.layers.4", [], [4, -1], [4, "model.layers.8"], [True, 2], 4])
def test_stages_that_cannot_be_meant(stages: object) -> None:
    with pytest.raises(ConfigError, match=r"stages=.*: layers per stage, as in \[8, 8, 8, 6\], or the modules at which stages"):
        ParallelConfig(stages=stages)  # type: ignore[arg-type]


def test_two_stages_at_one_module() -> None:
    with pytest.raises(ConfigError, match="two stages begin at one module"):
        ParallelConfig(stages=["model.layers.4", "model.layers.4"])
