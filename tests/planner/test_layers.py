"""The workload of a transformer against closed forms: FLOPs, parameters, bytes of collectives."""

from __future__ import annotations

import pytest

from meshpar.errors import ConfigError
from meshpar.planner import Cluster, Job, Mapping, Transformer, Workload, build, flops_per_token, mfu
from tests.planner.models import EXPERTS, GPT, LARGE, LATENT, SMALL, job


def computed(work: Workload) -> float:
    """FLOPs of a step over all ranks, as the operators say."""
    ranks = work.gpus / work.ranks
    return sum(layer.flops() * n for one in work.stages for layer, n in one.layers) * work.microbatches * ranks


@pytest.mark.parametrize("model", [SMALL, LARGE, EXPERTS, LATENT], ids=["small", "large", "experts", "latent"])
@pytest.mark.parametrize("mapping", [Mapping(), Mapping(tp=2), Mapping(pp=2), Mapping(cp=2), Mapping(tp=2, pp=2, microbatch=2)], ids=str)
def test_operators_add_up_to_the_models_flops_whatever_the_mapping(model: Transformer, mapping: Mapping) -> None:
    work = build(job(model), mapping)
    attention = 3 * 2 * model.heads * model.score_width * (model.layers + model.predicts) * 8192 / 2
    fused = flops_per_token(model, 8192) + attention / 3 * 0.5  # five products of scores in backward where the model counts four
    assert computed(work) / work.tokens == pytest.approx(fused, rel=1e-6)


def test_full_recompute_is_a_forward_more() -> None:
    plain, again = (build(job(SMALL), Mapping(recompute=r)) for r in ("none", "full"))
    forward = sum(x.flops("forward") * n for one in plain.stages for x, n in one.layers if x.name == "block")
    assert computed(again) - computed(plain) == pytest.approx(forward * plain.microbatches * 64)


@pytest.mark.parametrize("mapping", [Mapping(tp=2, pp=2), Mapping(pp=4, virtual=2), Mapping(ep=8), Mapping(tp=4, ep=8, etp=4)], ids=str)
def test_parameters_of_all_ranks_are_the_models(mapping: Mapping) -> None:
    work = build(job(EXPERTS), mapping)
    norms = 2 * EXPERTS.hidden * EXPERTS.layers + EXPERTS.hidden + EXPERTS.hidden * EXPERTS.experts * EXPERTS.layers
    dense = sum(one.parameters for one in work.stages)
    experts = sum(one.expert_parameters for one in work.stages) * mapping.ep * mapping.expert_tp
    assert dense * mapping.tp - norms * (mapping.tp - 1) + experts == pytest.approx(EXPERTS.parameters)


def test_parameter_counts_of_published_models() -> None:
    assert GPT.parameters / 1e9 == pytest.approx(174.6, abs=0.1)
    assert LARGE.parameters / 1e9 == pytest.approx(70.55, abs=0.05)
    assert LATENT.parameters / 1e9 == pytest.approx(671 + 11.5 + 0.9 + 0.1, rel=0.005)  # with the predicting block


@pytest.mark.parametrize("stack, layers", [("megatron-2024", [8, 8]), ("meshpar", [10, 6]), ("nanotron", [10, 6])])
def test_where_stages_end_is_the_stacks(stack: str, layers: list[int]) -> None:
    """A head worth 3.6 layers: evenly, the last of two stages takes a fifth more than its share."""
    model = Transformer(16, 2048, 16, 8192, 131072, tied=True)
    work = build(Job(model, Cluster("h100", 8), seq=4096, batch=256, stack=stack), Mapping(pp=2))
    assert [sum(n for layer, n in one.layers if layer.name == "block") for one in work.stages] == layers


@pytest.mark.parametrize("stack, layers", [("meshpar", [2, 2]), ("nanotron", [3, 1])])
def test_a_stage_ends_near_its_share_or_past_it(stack: str, layers: list[int]) -> None:
    """Four layers and a head worth 0.8: a stage's share is 2.4 layers."""
    model = Transformer(4, 2048, 16, 8192, 26000, tied=True)
    work = build(Job(model, Cluster("h100", 8), seq=128, batch=256, stack=stack), Mapping(pp=2))
    assert [sum(n for layer, n in one.layers if layer.name == "block") for one in work.stages] == layers


def test_bytes_of_tensor_parallelism_are_eight_times_the_activations() -> None:
    """Four gathers and four scatters of b s h per layer and microbatch, (t-1)/t each (2205.05198); two more gathers are hidden."""
    work = build(job(LARGE), Mapping(tp=4))
    layer = next(x for x, _ in work.stages[0].layers if x.name == "block")
    sizes = [c.bytes for c in layer.collectives if c.axis == "tp" and c.phase in ("forward", "input")]
    assert sizes == [2 * 8192 * 8192] * 8


def test_bytes_of_context_parallelism() -> None:
    """Keys and values of the whole sequence pass a rank in forward; they and their gradients in backward (8 kv heads of 128, over tp)."""
    work = build(job(LARGE), Mapping(tp=2, cp=4))
    layer = next(x for x, _ in work.stages[0].layers if x.name == "block")
    whole = 2 * 8192 * 2 * 8 * 128 / 2
    assert [(c.phase, c.bytes) for c in layer.collectives if c.axis == "cp"] == [("forward", whole), ("input", 2 * whole)]


def test_bytes_of_the_exchange_of_experts() -> None:
    work = build(job(EXPERTS), Mapping(ep=8))
    layer = next(x for x, _ in work.stages[0].layers if x.name == "experts")
    exchanged = [(c.count, c.bytes) for c in layer.collectives if c.kind == "all_to_all"]
    assert exchanged == [(2, 2 * 8 * 8192 * 4096)] * 2


def test_gradients_are_summed_over_data_and_context() -> None:
    work = build(job(LARGE, stack="megatron-2024"), Mapping(tp=4, cp=2))
    step = {(c.kind, c.axis): c.bytes for c in work.stages[0].collectives}
    assert work.axes["dp"].size == 16
    assert step["reduce_scatter", "dp"] == pytest.approx(4 * work.stages[0].parameters)
    assert step["all_gather", "dp"] == pytest.approx(2 * work.stages[0].parameters)


def test_the_ledger_counts_every_collective_of_a_step() -> None:
    work = build(job(LARGE), Mapping(tp=4, pp=2))
    counts = sum(n for _, c, n in work.ledger() if c.name == "attention" and c.axis == "tp")
    assert counts == 80 * work.microbatches * 4


def test_1024_gpus_with_64_experts() -> None:
    """tp 4 x pp 4 x ep 8 x dp 8: data parallelism of 64 outside experts, 8 inside, 8 experts on a rank."""
    mapping = Mapping(tp=4, pp=4, ep=8, etp=4)
    work = build(job(EXPERTS, gpus=1024, batch=1024), mapping)
    assert {name: axis.size for name, axis in work.axes.items()} == {"tp": 4, "cp": 1, "dp": 64, "etp": 4, "ep": 8, "edp": 8, "pp": 4}
    assert work.microbatches == 16
    assert work.stages[0].expert_parameters == pytest.approx(8 * 8 * 3 * 4096 * 2048 / 4)


def test_uneven_layers_go_to_stages_by_cost() -> None:
    model = Transformer(126, 16384, 128, 53248, 128256, kv_heads=8)
    work = build(job(model, gpus=1024, batch=512), Mapping(tp=8, pp=8, virtual=8))
    blocks = [sum(n for x, n in one.layers if x.name == "block") for one in work.stages]
    assert sum(blocks) == 126 and max(blocks) == 2 and len(blocks) == 64


@pytest.mark.parametrize(
    "published, model, seq, convention",
    [
        (13.8e12 * 1e3 / 1e3 / 238.2, SMALL, 8192, "noncausal"),
        (1635e12 / 6288, LATENT, 4096, "causal"),
        (1791e12 / 3986, LARGE, 8192, "causal"),
        (1614e12 / 31357, SMALL, 8192, "causal"),
        (842e12 / 782, GPT, 2048, "noncausal"),
    ],
)
def test_flops_are_those_that_published_rates_imply(published: float, model: Transformer, seq: int, convention: str) -> None:
    assert flops_per_token(model, seq, convention) == pytest.approx(published, rel=0.003)  # type: ignore[arg-type]


def test_utilisation_of_a_published_row() -> None:
    assert mfu(LARGE, 8192, 1117.6, 989e12, "noncausal") == pytest.approx(0.5432, rel=0.003)


def test_bad_mappings_are_refused_at_once_with_what_would_do() -> None:
    with pytest.raises(ConfigError) as caught:
        build(job(LARGE, batch=100), Mapping(tp=3, pp=200, ep=2, microbatch=0, recompute="all"))
    text = str(caught.value)
    for part in (
        "microbatch=0",
        "tp=3 does not divide 64 heads",
        "200 stages for 80 layers",
        "without experts",
        "recompute='all'; known: none",
        "64 GPUs",
    ):
        assert part in text, text
