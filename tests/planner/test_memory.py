"""Memory against the golden numbers of the 175B model and closed forms."""

from __future__ import annotations

import pytest

from meshpar.planner import Mapping, PeakMemory, build, memory, state_bytes
from meshpar.planner.constants import Constants
from meshpar.planner.hardware import GiB
from meshpar.planner.memory import fullest, roughly
from meshpar.planner.stack import STACKS
from tests.planner.models import GPT, LARGE, job

STACK = STACKS["megatron-2021"]
CONSTANTS = Constants.default()


def golden(mode: str = "zero1") -> tuple[PeakMemory, ...]:
    """tp 8 x pp 8 (virtual 2) x dp 8 = 512, sequence parallel, selective recompute, microbatches of one."""
    asked = job(GPT, "a100", 512, 2048, 1536, precision="fp16", stack="megatron-2021")
    return memory(build(asked, Mapping(8, 8, 2, data_parallel=mode, recompute="selective")), STACK, CONSTANTS)


def test_golden_activations_of_the_first_stage() -> None:
    assert golden()[0].activations / GiB == pytest.approx(13.7, abs=0.06)


@pytest.mark.parametrize("mode, states", [("zero1", 19.1), ("replicate", 45.8)])
def test_golden_states(mode: str, states: float) -> None:
    """The golden number is 2.73 B parameters, all / (t p): the mean over ranks without the last one's copy of the tied embedding."""
    copy = 51200 * 12288 / 8 * state_bytes(STACK, mode, 8)
    replicated = 2048 * 12288 * 7 / 8 * state_bytes(STACK, mode, 8)  # positions are held by all tp ranks
    whole = sum(one.states for one in golden(mode)) - copy - replicated
    assert whole / 8 / GiB == pytest.approx(states, abs=0.07)
    assert golden(mode)[0].states > golden(mode)[1].states  # the embedding


def test_bytes_per_parameter() -> None:
    assert state_bytes(STACK, "zero1", 8) == 6 + 12 / 8
    assert state_bytes(STACK, "replicate", 8) == 18
    assert state_bytes(STACKS["torchtitan"], "zero3", 8) == 16 / 8


def test_recompute_keeps_less_the_more_it_computes() -> None:
    asked = job(LARGE)
    held = [
        memory(build(asked, Mapping(tp=8, recompute=r)), asked.software, CONSTANTS)[0].activations for r in ("none", "activations", "full")
    ]
    assert held[0] > held[1] > held[2]
    # full: the input of 80 blocks, and the head's; the embedding keeps nothing
    assert held[2] == pytest.approx(81 * 2 * 8192 * 8192 / 8)


def test_the_closed_form_is_near_the_simulated_order() -> None:
    asked = job(LARGE)
    for mapping in (Mapping(8, 2, 4), Mapping(4, 4), Mapping(4, 4, 5), Mapping(8, 1, data_parallel="zero3")):
        work = build(asked, mapping)
        exact = fullest(work, asked.software, CONSTANTS).total
        assert roughly(work, asked.software, CONSTANTS).total == pytest.approx(exact, rel=0.05)
