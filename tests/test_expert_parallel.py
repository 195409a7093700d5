"""Experts split over `ep`, with every other axis: loss, every gradient, norm and optimizer steps against one device, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import meshpar as mp
from meshpar._torch import FakeStore, local_of
from meshpar.graph.facts import facts
from meshpar.ops import experts
from meshpar.sharding import solve
from meshpar.sharding.infer import BoundOp
from meshpar.sharding.types import Owned, R, Ragged, Shard
from tests.capture.moe import MoE
from tests.models import text, tiny
from tests.moe_models import experts_in_a_list
from tests.pool import Pool

Case = tuple[str, str, Mapping[str, Any], Mapping[str, Any]]
"""Model, mesh, configuration, changes to the model."""

_GPT_OSS = {"num_local_experts": 4, "head_dim": 16, "num_experts_per_tok": 2}
_GRANITE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QUIET = {"output_router_logits": False}

TWO: list[Case] = [("olmoe", "ep=2", {}, {"num_experts": 8, "num_experts_per_tok": 3}), ("list", "ep=2", {}, {"style": "skipping"})]
FOUR: list[Case] = [
    ("mixtral", "pp=2,ep=2", {"microbatches": 4, "schedule": "zbv"}, {**_QUIET, "num_hidden_layers": 4}),
    ("granitemoe", "dp_replicate=2,ep=2", {"microbatches": 2}, _GRANITE),
    ("list", "dp=2,ep=2", {"data_parallel": "zero2"}, {}),
    ("list", "pp=2,ep=2", {"microbatches": 2}, {"penalty": 0.0}),
]
"""What needs processes: stages, and every mode of data parallelism."""
SIMULATED: list[Case] = [
    ("deepseek_v3", "ep=2,tp=2", {}, {}),
    ("gpt_oss", "ep=2,tp=2", {"recompute": "full"}, _GPT_OSS),
]


def model_of(name: str, changes: Mapping[str, Any]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return experts_in_a_list(**changes) if name == "list" else (tiny(name, **changes), text(8))


def reports(cases: Sequence[Case]) -> list[str]:
    """On every rank: the text of each report that failed."""
    failed = []
    for name, mesh, config, changes in cases:
        model, batch = model_of(name, changes)
        report = mp.verify(model, mesh, batch, config=mp.ParallelConfig(**config), steps=2)
        failed += [] if report.ok else [str(report)]
    return failed


def test_two_ranks(gloo: Pool) -> None:
    assert gloo.run(reports, TWO, world=2, timeout=240) == [[], []]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("cases", [FOUR[:1], FOUR[2:]], ids=["1", "2"])
def test_four_ranks(gloo: Pool, cases: list[Case]) -> None:
    assert gloo.run(reports, cases, world=4, timeout=400) == [[]] * 4


@pytest.mark.sweep(1)
@pytest.mark.parametrize("case", SIMULATED, ids=lambda case: f"{case[0]} {case[1]}")
def test_simulated_ranks(case: Case) -> None:
    assert reports([case]) == []


def test_a_router_that_sends_everything_to_one_expert() -> None:
    """Three of four experts, and one of two ranks, have no rows; their gradients are zeros."""
    model = tiny("mixtral", **_QUIET)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            nn.init.zeros_(parameter)  # equal scores: the first experts are chosen
    mp.verify(model, "ep=2", text(8), perturb=0.0).raise_if_failed()


def test_experts_in_a_list_lie_as_they_are_stacked_whatever_another_axis_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """If dp could make their parameters pending sums first, ep would find no one to give them to."""
    inner = solve.choices

    def choices(call: BoundOp, *args: Any, **kwargs: Any) -> tuple[solve.Choice, ...]:
        found = inner(call, *args, **kwargs)
        return tuple(replace(one, cost=1e3 if R in one.uses else 0.0) for one in found) if facts(call.op.node).expert_stack else found

    monkeypatch.setattr(solve, "choices", choices)
    model, batch = experts_in_a_list()
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    plan = mp.parallelize(model, mp.make_mesh("dp=2,ep=2", "cpu"), example=batch).plan
    placed = [one.placements["ep"] for name, one in plan.parameters.items() if ".experts." in name]
    assert placed and all(isinstance(type_, Owned) for type_ in placed)


class Summary(nn.Module):
    """A loss over the means of sequences, so that what has no positions could be cut along samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts = nn.Linear(8, 8), MoE("hits")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        mixed, _ = self.experts(nn.functional.rms_norm(h, h.shape[-1:]))
        loss: torch.Tensor = (h + mixed).mean(1).pow(2).sum(-1).mean()
        return loss


@pytest.mark.sweep(1)
@pytest.mark.parametrize("samples", [2, 4])
def test_samples_are_left_to_the_axis_of_experts(samples: int) -> None:
    mp.verify(Summary(), "cp=2,ep=2", {"x": torch.randn(samples, 4, 8)}, steps=1).raise_if_failed()


def test_rows_travel_and_parameters_stay() -> None:
    with mp.simulate(4):
        mesh = mp.make_mesh("ep=2,tp=2", "cpu")
        pm = mp.parallelize(tiny("mixtral"), mesh, example=mp.local_batch(text(8), mesh))
        placed = pm.plan.parameters["model.layers.0.mlp.experts.gate_up_proj"].placements
        assert isinstance(placed["ep"], Shard) and placed["ep"].dim == 0
        assert isinstance(placed["tp"], Shard) and placed["tp"].dim == 1
        axis = pm.plan.axis("ep")
        assert axis is not None and Ragged() in axis.nodes["grouped_mm"].uses
        layer = [c for c in pm.comms() if c.axis == "ep" and c.region == "model.layers.0" and c.kind == "all_to_all"]
        tokens, hidden, choices = 4 * 12, 64, 2
        rows = choices * tokens * hidden * 4 / 2  # bytes to the one other rank: half of all rows
        assert [c.nbytes for c in layer] == [4 * 4 / 2, rows, rows, rows, rows]  # counts; there and back, forward and backward


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mesh_text, recompute", [("ep=2,tp=2", "full"), ("cp=2,ep=2", "none"), ("dp=2,cp=2", "full")])
def test_the_load_of_every_expert(mesh_text: str, recompute: str) -> None:
    """Rows of samples, and of positions, are counted once each, whichever axis cuts them."""
    model, batch = tiny("mixtral"), text(8)
    with torch.no_grad():
        scores = model(**batch, output_router_logits=True).router_logits
    wanted = [torch.bincount(s.topk(2, -1).indices.flatten(), minlength=4).tolist() for s in scores]
    with mp.simulate(4):
        mesh = mp.make_mesh(mesh_text, "cpu")
        own = mp.local_batch(batch, mesh)
        pm = mp.parallelize(model, mesh, example=own, config=mp.ParallelConfig(microbatches=2, recompute=recompute))
        assert pm.expert_load() == {}
        for _ in range(2):  # of the last step alone
            pm.train_step(**own)
        assert [load.tolist() for load in pm.expert_load().values()] == wanted
        assert list(pm.expert_load()) == [f"model.layers.{i}.mlp.experts" for i in range(2)]


def outputs(mesh: str) -> float:
    """How far the logits are from those of one device, on this rank."""
    model, batch = tiny("mixtral").double().eval(), text(8)
    device_mesh = mp.make_mesh(mesh)
    pm = mp.parallelize(model, device_mesh, example=mp.local_batch(batch, device_mesh)).eval()
    with torch.no_grad():
        logits = pm(**mp.local_batch({"input_ids": batch["input_ids"][:4]}, device_mesh)).logits
        wanted = mp.local_batch(model(input_ids=batch["input_ids"][:4]).logits, device_mesh)
    assert not isinstance(logits, DTensor) and logits.shape == wanted.shape
    return float((logits - wanted).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["pp=2,ep=2"])
def test_outputs_are_the_models_own(gloo: Pool, mesh: str) -> None:
    assert max(gloo.run(outputs, mesh, world=4, timeout=120)) < 1e-6  # its norms compute in float32


def owned(mesh: str) -> tuple[list[str], dict[str, Any]]:
    model, batch = experts_in_a_list()
    device_mesh = mp.make_mesh(mesh)
    pm = mp.parallelize(model, device_mesh, example=mp.local_batch(batch, device_mesh))
    return [n for n, _ in pm.named_parameters()], {n: p.placements.get("ep") for n, p in pm.plan.parameters.items()}


def test_each_rank_owns_its_experts_of_a_list(gloo: Pool) -> None:
    (first, placed), (second, _) = gloo.run(owned, "ep=2", world=2)
    assert placed["layers.0.experts.0.w1.weight"] == Owned(0) and placed["layers.1.experts.3.w3.bias"] == Owned(1)
    assert {n.split(".")[3] for n in first if ".experts." in n} == {"0", "1"}
    assert {n.split(".")[3] for n in second if ".experts." in n} == {"2", "3"}
    assert [n for n in first if ".experts." not in n] == [n for n in second if ".experts." not in n]


def parallelized(model: nn.Module, batch: Mapping[str, torch.Tensor], mesh: str, world: int) -> None:
    with mp.simulate(world):
        mp.parallelize(model, mp.make_mesh(mesh, "cpu"), example=dict(batch))


def test_experts_that_do_not_divide() -> None:
    with pytest.raises(mp.PlanError, match=r"ep=3 does not divide the 4 experts of model.layers.0.mlp.experts.* Valid ep: 1, 2, 4."):
        parallelized(tiny("mixtral"), text(6), "ep=3", 3)


def test_a_model_without_experts() -> None:
    with pytest.raises(mp.ConfigError, match=r"ep=2 divides experts among ranks, and the model has none .* Use dp=2 instead"):
        parallelized(tiny("llama"), text(4), "ep=2", 2)


class Odd(nn.Module):
    """Experts that exchange something between rows: no sum over rows by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, index = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            gates = (weights * (index == e)).sum(-1, keepdim=True)
            out = out + gates * expert(x - x.mean(0))
        return out.square().mean()


def test_experts_that_run_as_written_are_explained() -> None:
    with mp.simulate(2):
        text = mp.parallelize(Odd(), mp.make_mesh("dp=2", "cpu"), example={"x": torch.randn(4, 8)}).explain()
    assert "the model is not recognised as experts, and runs as written: what its loop computes is not a weighted sum" in text


def test_experts_of_another_form_are_named() -> None:
    with pytest.raises(mp.ConfigError) as caught:
        parallelized(Odd(), {"x": torch.randn(4, 8)}, "ep=2", 2)
    assert "ep=2 divides experts" in str(caught.value) and "mp.register_experts(MyExperts, run)" in str(caught.value)


class Ranked(nn.Module):
    """Stacked experts whose rows are compared with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 6)), nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, index = self.gate(x).softmax(-1).topk(2, -1)
        rows, offsets, perm = experts.dispatch(x, index, 4)
        rows = experts.grouped_mm(rows, self.up, offsets).cumsum(0)
        return experts.combine(experts.grouped_mm(rows, self.down, offsets), perm, weights).square().mean()


def test_what_compares_rows_is_named() -> None:
    with pytest.raises(mp.PlanError, match=r"ep=2: cumsum in the model .* works on the rows of experts and needs all of them at once"):
        parallelized(Ranked(), {"x": torch.randn(4, 8)}, "ep=2", 2)
    mp.verify(Ranked(), "dp=2", {"x": torch.randn(4, 8)}).raise_if_failed()  # there rows are gathered


# ---- 1024 ranks --------------------------------------------------------------------------------------------------------------------------

LAYERS, HIDDEN, INNER, VOCAB, EXPERTS = 8, 512, 96, 512, 64


def reference_model() -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_local_experts": EXPERTS}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": VOCAB, "num_experts_per_tok": 2}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, **heads))  # type: ignore[no-any-return]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("rank", [0, 1023])
def test_the_reference_configuration_without_memory(rank: int) -> None:
    """tp 4 x pp 4 x ep 8 x dp 8 = 1024 ranks, 64 experts, 8 for each rank: what a rank holds and sends follows the closed forms."""
    dist.init_process_group("fake", rank=rank, world_size=1024, store=FakeStore())
    mesh = mp.make_mesh("pp=4,dp=8,ep=8,tp=4", "cpu")
    ids = torch.zeros(4, 16, dtype=torch.long)
    config = mp.ParallelConfig(microbatches=4, sequence_parallel=True)
    pm = mp.parallelize(reference_model(), mesh, example={"input_ids": ids, "labels": ids}, config=config)
    held = dict(pm.named_parameters())
    assert all(p.is_meta for p in held.values())
    stage = rank * 4 // 1024
    assert {n.split(".")[2] for n in held if ".layers." in n} == {str(i) for i in range(stage * 2, stage * 2 + 2)}
    assert ("model.embed_tokens.weight" in held) == (stage == 0) and ("lm_head.weight" in held) == (stage == 3)

    experts = sum(local_of(p).numel() for n, p in held.items() if ".experts." in n)
    assert experts == LAYERS // 4 * EXPERTS * 3 * HIDDEN * INNER // (4 * 8 * 8)  # over tp, ep, and the rest of the data axes
    whole = sum(p.numel() for n, p in held.items() if "_proj" in n and "self_attn" in n)
    assert sum(local_of(p).numel() for n, p in held.items() if "_proj" in n and "self_attn" in n) == whole // (4 * 64)

    tokens = 16  # of one microbatch on one data rank
    rows = 2 * tokens * HIDDEN * 4
    sent = [c.nbytes for c in pm.comms() if c.axis == "ep" and c.kind == "all_to_all" and c.stage == stage and c.nbytes > 4 * EXPERTS]
    assert sent == [rows * 7 / 8] * 4 * 2  # per layer: there and back, forward and backward
    handed = [c.nbytes for c in pm.comms() if c.kind == "send" and c.stage == 1 and c.phase == "forward"]
    assert max(handed) == tokens * HIDDEN * 4 / 4  # the residual stream, cut along the sequence over tp

    grids = mp.rank_grid(mesh)
    assert "dense layers: pp=4 x data=64 x tp=4" in grids and "expert layers: pp=4 x edp=8 x ep=8 x tp=4" in grids
