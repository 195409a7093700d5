"""What a search ranks, what it leaves out, and that it says why."""

from __future__ import annotations

import tomllib
from itertools import pairwise

import pytest

from meshpar.errors import ConfigError
from meshpar.planner import Candidate, Cluster, Mapping, Space, check, estimate, explain, hardware, launch, search, toml, usual_path
from meshpar.planner.search import candidates, limit, shape
from tests.planner.models import EXPERTS, GPT, LARGE, LATENT, SMALL, job

NARROW = Space(tp=(1, 4, 8), cp=(1,), microbatch=(1, 2))


@pytest.fixture(scope="module")
def found():  # type: ignore[no-untyped-def]
    return search(job(LARGE), NARROW)


def test_everything_ranked_can_be_run_fits_and_is_simulated(found) -> None:  # type: ignore[no-untyped-def]
    for one in found.ranked:
        check(found.job, one.mapping)
        assert one.memory.total <= limit(found.job) and one.simulated
        again = estimate(found.job, one.mapping)
        assert (again.seconds, again.memory.total) == pytest.approx((one.seconds, one.memory.total))


def test_the_order_is_that_of_time_up_to_half_a_percent(found) -> None:  # type: ignore[no-untyped-def]
    seconds = [one.seconds for one in found.ranked]
    assert all(later > 0.99 * earlier for earlier, later in pairwise(seconds))


def test_every_shape_comes_once_with_its_best(found) -> None:  # type: ignore[no-untyped-def]
    assert found.shapes[0] == found.best
    names = [shape(one.mapping) for one in found.shapes]
    assert len(set(names)) == len(names) > 3


def test_no_mapping_of_the_space_is_faster_than_the_best(found) -> None:  # type: ignore[no-untyped-def]
    """All candidates that fit, simulated one by one."""
    fit: list[Candidate] = []
    for options in candidates(found.job, NARROW):
        fit += [one for one in (estimate(found.job, m) for m in options) if one.memory.total <= limit(found.job)][:1]
    assert found.best.seconds <= 1.006 * min(one.seconds for one in fit)


def test_what_lost_says_why(found) -> None:  # type: ignore[no-untyped-def]
    families = {lost.family: lost for lost in found.lost}
    assert "does not fit" in families["data only, zero1"].why and "states" in families["data only, zero1"].why
    assert found.best.family not in families
    slower = [lost for lost in found.lost if lost.fits]
    assert slower and all("%: " in lost.why for lost in slower)


def test_text_has_ranking_path_and_reasons(found) -> None:  # type: ignore[no-untyped-def]
    text = explain(found)
    for part in ("64 x h100", "The usual path of decisions:", "tp, inside the domain.", "The best of the families that lost:", "Cost "):
        assert part in text, text


def test_ten_thousand_candidates_take_seconds() -> None:
    result = search(job(EXPERTS, gpus=256, batch=512), Space(microbatch=(1, 2, 4)))
    assert result.tried > 10_000
    assert result.seconds / result.tried < 0.01  # a busy machine; idle it is near 0.3 ms


def test_every_way_of_sharing_and_every_schedule_is_tried() -> None:
    asked = job(LARGE)
    tried = [one for options in candidates(asked, Space(tp=(1, 4, 8), cp=(1, 2), microbatch=(1,))) for one in options]
    assert {one.order for one in tried} == {"1f1b", "interleaved-1f1b", "zero-bubble", "zbv", "dualpipev"}
    assert {one.data_parallel for one in tried} == {"zero1", "zero2", "zero3"} and {one.cp for one in tried} == {1, 2}
    assert all(one.pp == 1 for one in tried if one.data_parallel == "zero2")


def test_zero2_lies_between_its_neighbours() -> None:
    """Gradients shared out: less memory than zero1, and a sum in every microbatch that zero1 has once."""
    one, two, three = (estimate(job(SMALL), Mapping(data_parallel=mode)) for mode in ("zero1", "zero2", "zero3"))
    assert one.memory.states > two.memory.states > three.memory.states
    assert one.exposed["dp"] < two.exposed["dp"] < three.exposed["dp"]


def test_the_usual_path_ends_in_what_fits() -> None:
    steps = usual_path(job(GPT, "a100", 512, 2048, 1536, stack="megatron-2024"))
    last = steps[-1].mapping
    assert last.tp == 8 and last.pp > 1 and last.virtual > 1
    assert usual_path(job(SMALL, seq=131072, batch=64))[-1].mapping.cp == 16


def test_configuration_and_launch() -> None:
    asked = job(EXPERTS, gpus=1024, batch=1024)
    written = tomllib.loads(toml(asked, Mapping(4, 4, ep=8, etp=4)))
    assert written["mesh"] == "pp=4,dp=8,ep=8,tp=4" and written["config"]["microbatches"] == 16
    assert "--nnodes=128 --nproc-per-node=8" in launch(asked)
    assert launch(asked, slurm=True).startswith("srun --nodes=128 --ntasks-per-node=8")
    with pytest.raises(ConfigError, match="fold_experts=False"):
        toml(asked, Mapping(4, 4, ep=8, etp=1))


def test_what_cannot_be_is_one_error_with_what_would_do() -> None:
    with pytest.raises(ConfigError, match="no accelerator 'h10'.*Did you mean h100.*Known: v100, a100"):
        hardware("h10")
    with pytest.raises(ConfigError, match="gpus=100 is no whole number of servers.*96 or 104"):
        Cluster("h100", 100)
    with pytest.raises(ConfigError) as caught:
        job(LARGE, batch=0, seq=0, precision="fp6", stack="megatrn-2024")
    for part in ("seq is missing", "batch is missing", "h100 has bf16, fp16, fp8", "Did you mean megatron-2024"):
        assert part in str(caught.value)


def test_what_does_not_fit_names_the_least() -> None:
    with pytest.raises(ConfigError, match=r"nothing fits. The least is \d+ GiB of 70"):
        search(job(LATENT, gpus=16, batch=64), Space(cp=(1,), microbatch=(1,)))
