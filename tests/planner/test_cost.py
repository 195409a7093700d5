"""Step times: parts add up, more of anything costs more, and published runs come out near."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshpar.planner import Cluster, Constants, Job, Mapping, StageLoad, build, estimate, hardware, stack, step_time
from meshpar.planner.cost import Memo, rates, timed
from tests.planner.models import EXPERTS, LARGE, SMALL, job

CONSTANTS = Constants.default()


@pytest.mark.parametrize("mapping", [Mapping(tp=8), Mapping(4, 4, 5, 2), Mapping(data_parallel="zero3"), Mapping(tp=8, pp=4)], ids=str)
def test_parts_add_up(mapping: Mapping) -> None:
    found = estimate(job(LARGE), mapping).time
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert all(part >= -1e-9 for part in found.parts.values()), found.parts


def test_one_product_takes_flops_and_bytes() -> None:
    from meshpar.planner import AxisSpan, Layer, Operator, Workload

    layer = Layer("product", (Operator("product", "matrix", "forward", flops=989e12, bytes=3350e9),))
    axes = {name: AxisSpan(name, 1, 1) for name in ("tp", "cp", "ep", "etp", "dp", "edp")}
    work = Workload((StageLoad(((layer, 1),)),), 1, "1f1b", 3, axes, 0.0, "zero1", 1, 1.0)
    parts = step_time(work, hardware("h100"), stack("megatron-2024"), CONSTANTS).parts
    assert parts["matrices"] == pytest.approx(3 * (1 / CONSTANTS["matrix hopper"] + 1 / CONSTANTS["memory"]), rel=1e-4)


def test_bubble_of_an_even_pipeline() -> None:
    model = replace(LARGE, vocab=64)  # a head that costs nothing
    found = estimate(job(model, batch=128), Mapping(tp=8, pp=8)).time
    assert found.bubble == pytest.approx(7 / 128, rel=0.1)


def test_virtual_stages_shorten_the_bubble() -> None:
    plain, virtual = (estimate(job(LARGE), Mapping(8, 4, v)).time.parts["bubble"] for v in (1, 5))
    assert virtual < 0.5 * plain


def test_a_slower_network_costs_where_it_is_used() -> None:
    part = hardware("h100")
    slow = replace(part, nic=part.nic / 8)
    for mapping, slower in ((Mapping(tp=8, pp=8), False), (Mapping(data_parallel="zero3", microbatch=1), True)):
        fast, then = (estimate(Job(LARGE, Cluster(p, 64), 8192, 128), mapping).seconds for p in (part, slow))
        assert (then > 1.5 * fast) == slower, mapping


def test_experts_over_servers_cost_more_than_inside_one() -> None:
    inside, over = (estimate(job(EXPERTS), Mapping(ep=ep)).time.parts["ep"] for ep in (8, 64))
    assert over > 3 * inside


@pytest.mark.parametrize(
    "model, part, gpus, batch, seq, precision, software, mapping, published",
    [
        (LARGE, "h100", 2048, 4096, 8192, "bf16", "nemo-2025", Mapping(4, 4, 5, 2), 14.66),
        (LARGE, "h100", 64, 128, 8192, "fp8", "nemo-2025", Mapping(4, 8, 5), 9.86),
        (SMALL, "h100", 128, 2048, 8192, "bf16", "nemo-2025", Mapping(cp=2), 12.33),
        (LARGE, "gb200", 64, 128, 8192, "fp8", "nemo-2025", Mapping(microbatch=2, data_parallel="zero3", recompute="full"), 4.11),
    ],
)
def test_published_steps(model, part, gpus, batch, seq, precision, software, mapping, published) -> None:  # type: ignore[no-untyped-def]
    found = estimate(Job(model, Cluster(part, gpus), seq, batch, precision, software), mapping)
    assert found.seconds == pytest.approx(published, rel=0.15)


def test_closed_form_ranks_as_the_simulation_times() -> None:
    asked = job(LARGE)
    speed = rates(asked.cluster.hardware, asked.software, CONSTANTS)
    for mapping in (Mapping(8), Mapping(4, 4, 5), Mapping(8, 2, 4), Mapping(8, 8)):
        work = build(asked, mapping)
        assert timed(work, speed, Memo(), simulate=False).seconds == pytest.approx(timed(work, speed, Memo()).seconds, rel=0.04)


def test_later_stages_sum_gradients_while_earlier_ones_still_compute() -> None:
    """All parameters on the last of two stages: its backward ends one stage before the step does, and that long its sum is hidden."""
    from meshpar.planner import AxisSpan, Collective, Layer, Operator, Workload

    part, software = hardware("h100"), stack("megatron-2021")
    layer = Layer("products", tuple(Operator("product", "matrix", phase, 989e12) for phase in ("forward", "input", "weight")))
    axes = {name: AxisSpan(name, 8 if name == "dp" else 1, 1) for name in ("tp", "cp", "ep", "etp", "dp", "edp")} | {
        "pp": AxisSpan("pp", 2, 8)
    }
    sums = (Collective("gradients", "all_reduce", "dp", "step", 300e9),)
    visible = []
    for stages in ((StageLoad(((layer, 1),), sums), StageLoad(((layer, 1),))), (StageLoad(((layer, 1),)), StageLoad(((layer, 1),), sums))):
        visible.append(step_time(Workload(stages, 2, "1f1b", 4, axes, 0.0, "replicate", 16, 1.0), part, software, CONSTANTS).parts["dp"])
    backward = 2 / CONSTANTS["matrix hopper"]
    assert visible[0] - max(0.0, visible[1]) == pytest.approx(min(visible[0], backward), rel=1e-3)
