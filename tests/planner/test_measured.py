"""Measured machines: curves, contention, files, and that estimates follow them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from meshpar.errors import ConfigError
from meshpar.planner import Cluster, Hardware, Job, Mapping, Operator, Transformer, estimate, hardware, search
from meshpar.planner.comm import RankGroup
from meshpar.planner.files import write
from meshpar.planner.measured import RUNTIME, Curve, Measured, MeasuredFabric

MODEL = Transformer(layers=4, hidden=256, heads=4, ffn=1024, vocab=1024)


def machine(**more: object) -> Hardware:
    flops, moved = Curve((1e6, 1e9), (1e-4, 1e-2)), Curve((1e3, 1e6), (1e-6, 1e-4))
    kernels = {"matrix fp32": flops, "attention forward fp32": flops, "attention backward fp32": flops, "elementwise": moved, "slow": flops}
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    links = {f"{kind} {n} of {w}": Curve((1e3, 1e6), (n * 1e-4, n * 1e-3)) for kind in kinds for n, w in ((2, 2), (2, 4), (4, 4))}
    links["send 2 of 2"] = Curve((1e3, 1e6), (1e-4, 1e-3))
    own = Measured(2, (1.0, 1.1, 1.65, 2.2), kernels, links, {**dict.fromkeys(RUNTIME, 0.0), "step": 1e-3, **more})  # type: ignore[arg-type]
    return Hardware("here", "measured", {"fp32": 1e11}, 6e9, 0.9, 1e10, 1e9, 1e9, 4, 4, 1.0, 1.0, 0.0, "a test", measured=own)


def seconds(gpus: int, mapping: Mapping, part: Hardware) -> float:
    return estimate(Job(MODEL, Cluster(part, gpus), 128, 8, "fp32", "meshpar"), mapping).seconds


def test_kernels_and_collectives_are_looked_up() -> None:
    own = machine().measured
    assert own is not None
    assert own.operator(Operator("x", "matrix", "forward", 2e6, 0.0, "fp32", 2)) == pytest.approx(2e-4)
    assert own.operator(Operator("unknown", "elementwise", "forward", 0.0, 1e6, "fp32", 1)) == pytest.approx(1e-4)
    assert own.operator(Operator("slow", "elementwise", "forward", 0.0, 1e6, "fp32", 1)) == pytest.approx(1e-4)
    fabric = MeasuredFabric(own, 4)
    assert fabric.seconds("all_reduce", RankGroup(4, 4), 1e6) == pytest.approx(4e-3)
    assert fabric.seconds("all_reduce", RankGroup(2, 2), 1e6) == pytest.approx(2e-3)
    assert fabric.seconds("all_reduce", RankGroup(1, 1), 1e6) == 0
    with pytest.raises(ConfigError, match="was measured without broadcast"):
        fabric.seconds("broadcast", RankGroup(2, 2), 1.0)


def test_ranks_share_cores() -> None:
    own = machine().measured
    assert own is not None
    assert [own.slower(n) for n in (1, 2, 2.5, 4, 8)] == pytest.approx([1.0, 1.1, 1.375, 2.2, 4.4])
    part = machine()
    alone = replace(own, crowd=(1.0,) * 4, cores=4)
    quiet = replace(part, measured=alone)
    assert seconds(4, Mapping(), part) > 1.5 * seconds(4, Mapping(), quiet)
    assert seconds(4, Mapping(pp=4), part) > 1.2 * seconds(4, Mapping(pp=4), quiet)


@pytest.mark.parametrize("name", ["call", "data", "microbatch", "step", "tensor", "element"])
def test_every_share_of_the_runtime_is_in_a_step(name: str) -> None:
    more = seconds(2, Mapping(), machine(**{name: 2e-3}))
    if name == "tensor":  # dimensions alone have none
        assert more == seconds(2, Mapping(), machine())
    else:
        assert more > seconds(2, Mapping(), machine()) + 0.5e-3


def test_actions_of_a_pipeline_count() -> None:
    assert seconds(2, Mapping(pp=2), machine(action=1e-3)) > seconds(2, Mapping(pp=2), machine()) + 7e-3


def test_a_file_gives_the_machine_back(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    write(replace(machine(), scale=1.5), path)
    back = hardware(path)
    assert back == replace(machine(), scale=1.5) and hardware(str(path)) == back
    found = search(Job(MODEL, Cluster(str(path), 4), 128, 8, "fp32", "meshpar"))
    assert found.best.seconds == pytest.approx(1.5 * seconds(4, found.best.mapping, machine()))


def test_a_data_sheet_may_be_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "slow.json"
    write(replace(hardware("h100"), scale=2.0), path)
    job = Job(MODEL, Cluster(path, 8), 128, 8)
    assert estimate(job, Mapping()).seconds == pytest.approx(2 * estimate(Job(MODEL, Cluster("h100", 8), 128, 8), Mapping()).seconds)


def test_more_ranks_than_were_measured_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"measured with up to 4 ranks. Ask for fewer, or measure with `meshpar calibrate --ranks 8`"):
        Cluster(machine(), 8)


def test_everything_wrong_in_a_file_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    write(machine(), path)
    body = json.loads(path.read_text())
    body["nick"] = body.pop("nic")
    body["measured"]["crowd"] = [0]
    body["measured"]["kernels"]["elementwise"]["sizes"] = [2, 1]
    del body["measured"]["runtime"]["step"]
    path.write_text(json.dumps(body))
    with pytest.raises(ConfigError) as caught:
        hardware(path)
    for part in ("'nick' is no field", "Did you mean nic", "nic is missing", "crowd=[0]", "sizes rising", "runtime.step is missing"):
        assert part in str(caught.value)
