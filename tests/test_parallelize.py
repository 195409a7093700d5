"""parallelize() on real gloo ranks: every way to divide the data, models without memory, precision, and what goes wrong said plainly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

import meshpar as mp
from meshpar.simulate import local_tensors
from tests.models import GPT, numbers, plain
from tests.moe_models import experts_in_a_list
from tests.pipeline.models import made
from tests.pool import Pool


def perturbed(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / (b.abs().max() + 1e-12))


def steps_against_one_device(spec: str, modes: list[str], microbatches: int) -> dict[str, tuple[float, float, float]]:
    """Largest difference of loss, gradients and parameters over 3 clipped AdamW steps, per mode."""
    found = {}
    model, batch = plain("gpt_kv2")
    perturbed(model)
    mesh = mp.make_mesh(spec)
    local = mp.local_batch(batch, mesh)
    for mode in modes:
        alone = copy.deepcopy(model)
        config = mp.ParallelConfig(microbatches=microbatches, data_parallel=mode)  # type: ignore[arg-type]
        pm = mp.parallelize(model, mesh, example=local, config=config)
        ours, theirs = torch.optim.AdamW(pm.parameters(), lr=1e-2), torch.optim.AdamW(alone.parameters(), lr=1e-2)
        worst = [0.0, 0.0, 0.0]
        names = dict(alone.named_parameters())
        for _ in range(3):
            loss, expected = pm.train_step(**local), alone(**batch)
            expected.backward()
            worst[0] = max(worst[0], abs(loss.item() - expected.item()))
            for name, parameter in pm.named_parameters():
                assert isinstance(parameter, DTensor) and parameter.shape == names[name].shape
                worst[1] = max(worst[1], largest(mp.full_grad(parameter), names[name].grad))  # type: ignore[arg-type]
            norm = mp.clip_grad_norm_(pm.parameters(), 0.5)
            torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5))
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
        worst[2] = max(largest(mp.full_tensor(p), names[n]) for n, p in pm.named_parameters())
        found[mode] = (worst[0], worst[1], worst[2])
    return found


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("spec", "modes", "microbatches", "world"),
    [
        ("dp=2", ["zero3", "zero2", "zero1", "replicate"], 2, 2),
        ("dp=2,tp=2", ["zero3", "replicate"], 2, 4),
        ("dp_replicate=2,dp_shard=2", ["zero3"], 1, 4),
    ],
)
def test_steps_equal_one_device(gloo: Pool, spec: str, modes: list[str], microbatches: int, world: int) -> None:
    for result in gloo.run(steps_against_one_device, spec, modes, microbatches, world=world, timeout=240):
        for mode, differences in result.items():
            assert max(differences) < 1e-9, (mode, differences)


def own_loop_and_other_batches() -> None:
    """The user's own loop with loss.backward(), evaluation at another length, outputs of the model's own structure."""
    model, batch = plain("gpt")
    perturbed(model)
    mesh = mp.make_mesh("dp=2,tp=2")
    local = mp.local_batch(batch, mesh)
    pm = mp.parallelize(model, mesh, example=local)
    alone = copy.deepcopy(model)
    loss, expected = pm(**local), alone(**batch)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    names = dict(alone.named_parameters())
    assert max(largest(mp.full_grad(p), names[n].grad) for n, p in pm.named_parameters()) < 1e-9  # type: ignore[arg-type]
    pm.eval()
    other = {"ids": numbers(53, 4, 8), "labels": numbers(53, 4, 8)}
    dist.broadcast(other["ids"], 0)
    dist.broadcast(other["labels"], 0)
    torch.testing.assert_close(pm.eval_step(**mp.local_batch(other, mesh)), alone.eval()(**other).detach())


def test_own_loop_and_other_batches(gloo: Pool) -> None:
    gloo.run(own_loop_and_other_batches, world=4, timeout=180)


def from_meta(path: str) -> dict[str, torch.Tensor]:
    """The values a model without memory gets: from a file, and by its own initialisation; buffers survive."""
    mesh = mp.make_mesh("dp=2,tp=2")
    _, batch = plain("gpt_kv2")
    local = mp.local_batch(batch, mesh)
    with torch.device("meta"):
        bare = GPT(kv=2)
    read = mp.parallelize(bare, mesh, example=local, weights=path)
    torch.manual_seed(3)
    with mp.meta():
        described = GPT(kv=2)
    made = mp.parallelize(described, mesh, example=local)
    both = (("read", read), ("made", made))
    return {f"{kind}.{n}": mp.full_tensor(p) for kind, pm in both for n, p in pm.named_parameters()}


def test_models_without_memory(gloo: Pool, tmp_path: Path) -> None:
    saved = GPT(kv=2)
    save_file({n: p.detach() for n, p in saved.named_parameters()}, tmp_path / "model.safetensors")
    torch.manual_seed(3)
    built = GPT(kv=2)
    for result in gloo.run(from_meta, str(tmp_path / "model.safetensors"), world=4, timeout=180):
        for name, parameter in saved.named_parameters():
            assert torch.equal(result[f"read.{name}"], parameter), name
        for name, parameter in built.named_parameters():
            assert torch.equal(result[f"made.{name}"], parameter), name


def half_precision(recompute: str) -> tuple[float, float, list[str]]:
    model, batch = plain("gpt")
    mesh = mp.make_mesh("dp=2,tp=2")
    local = mp.local_batch(batch, mesh)
    config = mp.ParallelConfig(precision="bf16", recompute=recompute)  # type: ignore[arg-type]
    pm = mp.parallelize(model, mesh, example=local, config=config)
    loss = pm.train_step(**local)
    dtypes = sorted({str(p.dtype) for p in pm.parameters()} | {str(p.grad.dtype) for p in pm.parameters() if p.grad is not None})
    expected = copy.deepcopy(model).bfloat16()(**batch)
    return loss.item(), expected.item(), dtypes


def test_bf16_compute_keeps_fp32_masters_and_gradients(gloo: Pool) -> None:
    for loss, expected, dtypes in gloo.run(half_precision, "selective", world=4, timeout=180):
        assert loss == pytest.approx(expected, rel=2e-2)
        assert dtypes == ["torch.float32"]


def recomputed() -> list[tuple[float, float]]:
    """Gradients with dropout on, without and with recompute; the same mask on both ranks of tp where values are whole."""
    model, batch = plain("gpt_dropout")
    mesh = mp.make_mesh("tp=2")
    found = []
    for mode in ("none", "selective", "full"):
        pm = mp.parallelize(model, mesh, example=batch, config=mp.ParallelConfig(recompute=mode))  # type: ignore[arg-type]
        loss = pm.train_step(**batch)
        found.append((loss.item(), sum(float(mp.full_grad(p).double().sum()) for p in pm.parameters())))  # type: ignore[union-attr]
    return found


def test_recompute_and_dropout_change_nothing(gloo: Pool) -> None:
    first, second = gloo.run(recomputed, world=2, timeout=180)
    assert first == second
    for loss, gradient in first[1:]:
        assert loss == first[0][0]
        assert gradient == pytest.approx(first[0][1], rel=1e-5)


def complaint(kind: str) -> str:
    """What each rank is told."""
    model, batch = plain("gpt")
    mesh = mp.make_mesh("tp=2")
    example: Any = batch
    try:
        if kind == "batch":
            mp.parallelize(model, mesh, example={k: v + dist.get_rank() for k, v in batch.items()})
        elif kind == "plan":
            mp.parallelize(model, mesh, example=example, rules={"*qkv.weight": "replicate"} if dist.get_rank() else None)
        elif kind == "graph":
            mp.parallelize(GPT(layers=2 + dist.get_rank()), mesh, example=example)
        elif kind == "fails":
            if dist.get_rank() == 1:
                batch = {**batch, "ids": batch["ids"] + 1000}
            pm = mp.parallelize(model, mesh, example=example)
            pm._checked.update(pm._variants.known())  # the check of the batch would name it; here the rank itself must fail
            pm.train_step(**batch)
    except mp.MeshparError as error:
        return f"{type(error).__name__}: {error}"
    except IndexError as error:
        return f"IndexError: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("kind", "each"),
    [("batch", "must be fed the same batch"), ("graph", "differs between ranks"), ("plan", "differs between ranks")],
)
def test_ranks_that_disagree_are_told(gloo: Pool, kind: str, each: str) -> None:
    for message in gloo.run(complaint, kind, world=2, timeout=120):
        assert each in message


def test_a_rank_that_fails_is_named_by_the_others(gloo: Pool) -> None:
    other, culprit = gloo.run(complaint, "fails", world=2, timeout=120)
    assert culprit.startswith("BatchError: the batch holds numbers that a table of the model does not have")
    assert other.startswith("RankError: rank 1 failed in train_step: BatchError")


# ---- one process -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"*.qvk.weight": "tp:0"}, r"rule '\*.qvk.weight' matches no parameter"),
        ({"*qkv.weight": "tp:5"}, "it has no dim 5"),
        ({"*qkv.weight": "row"}, 'is not "tp:DIM"'),
    ],
)
def test_rules_that_cannot_be_meant(rules: dict[str, str], said: str) -> None:
    model, batch = plain("gpt")
    with mp.simulate(2), pytest.raises(mp.PlanError, match=said):
        mp.parallelize(model, mp.make_mesh("tp=2"), example=batch, rules=rules)


def test_rules_are_obeyed() -> None:
    model, batch = plain("gpt")
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch, rules={"*.down.weight": "replicate", "*.out.weight": "tp:0"})
        placements = {n: p.placements[0] for n, p in pm.named_parameters() if n.startswith("blocks.0")}
    assert placements["blocks.0.down.weight"].is_replicate()
    assert placements["blocks.0.out.weight"].is_shard(0)
    mp.verify(model, "tp=2", batch, rules={"*.down.weight": "replicate", "*.out.weight": "tp:0"}).raise_if_failed()


def test_simulated_ranks_compute_in_half_precision_too() -> None:
    model, batch = plain("gpt")
    expected = copy.deepcopy(model).bfloat16()(**batch)
    with mp.simulate(4):
        mesh = mp.make_mesh("dp=2,tp=2")
        local = mp.local_batch(batch, mesh)
        pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(precision="bf16"))  # type: ignore[arg-type]
        loss = pm.train_step(**local)
        assert {p.grad.dtype for p in pm.parameters() if p.grad is not None} == {torch.float32}
    for part in local_tensors(loss).values():
        assert part.item() == pytest.approx(expected.item(), rel=2e-2)


def test_a_step_without_a_loss_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with mp.simulate(2):
        mesh = mp.make_mesh("tp=2")
        pm = mp.parallelize(model, mesh, example=(torch.randn(2, 4),))
        with pytest.raises(mp.BatchError, match="loss_fn="):
            pm.train_step(torch.randn(2, 4))
        pm = mp.parallelize(model, mesh, example=(torch.randn(2, 4),), loss_fn=lambda output, batch: output.pow(2).mean())
        assert pm.train_step(torch.randn(2, 4)).ndim == 0


def test_axes_that_are_not_there_yet_are_refused() -> None:
    model, batch = plain("gpt")
    with mp.simulate(2), pytest.raises(mp.ConfigError, match="pp"):
        mp.parallelize(model, mp.make_mesh("pp=2"), example=batch)


def test_a_model_without_an_example_says_what_to_pass() -> None:
    with mp.simulate(2), pytest.raises(mp.ConfigError, match="example=batch"):
        mp.parallelize(nn.Linear(2, 2), mp.make_mesh("tp=2"))


def test_outputs_keep_the_models_structure() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            hidden = self.up(x).relu()
            return {"out": (self.down(hidden), "kept"), "hidden": hidden}

    model, x = Two().double(), torch.randn(2, 4, dtype=torch.float64)
    expected = model(x)
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=(x,))
        found = pm(x)
        assert list(found) == ["out", "hidden"] and found["out"][1] == "kept"
        for part in local_tensors(found["hidden"]).values():
            torch.testing.assert_close(part, expected["hidden"])
        for part in local_tensors(found["out"][0]).values():
            torch.testing.assert_close(part, expected["out"][0])


def loads_a_state_dict_of_the_model() -> None:
    """Whole tensors of the unparallel model, tied, fused, cut unevenly, in stages or owned by one rank: every rank keeps its part."""
    for name, spec in (("gpt_kv2", "dp=2,tp=2"), ("tied", "pp=2,tp=2"), ("experts", "dp=2,ep=2")):
        if name == "experts":
            model, batch = experts_in_a_list()
        else:
            model, batch = made("tied") if name == "tied" else plain(name)
        mesh = mp.make_mesh(spec)
        local = mp.local_batch(batch, mesh)
        other = perturbed(copy.deepcopy(model))
        pm = mp.parallelize(model.double(), mesh, example=local)
        result = pm.load_state_dict(other.state_dict())
        assert not result.missing_keys and not result.unexpected_keys
        found = other(**batch)
        expected = found["loss"] if isinstance(found, dict) else found
        torch.testing.assert_close(pm.train_step(**local), expected.detach())


def test_a_state_dict_of_the_model_can_be_loaded(gloo: Pool) -> None:
    gloo.run(loads_a_state_dict_of_the_model, world=4, timeout=180)


def test_state_dicts_that_do_not_fit_are_refused() -> None:
    model, batch = plain("gpt")
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch)
        state = model.state_dict()
        name = next(n for n, value in state.items() if value.dim() == 2)
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            pm.load_state_dict({**state, name: state[name][:-1]})
        with pytest.raises(RuntimeError, match="Unexpected"):
            pm.load_state_dict({**state, "another": state[name]})
        with pytest.raises(RuntimeError, match="Missing"):
            pm.load_state_dict({n: value for n, value in state.items() if n != name})


def test_dtype_and_device_are_fixed() -> None:
    model, batch = plain("gpt")
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch)
        with pytest.raises(mp.ConfigError, match="convert the model before parallelize"):
            pm.to(torch.bfloat16)
        with pytest.raises(mp.ConfigError, match="stays on the devices of its mesh"):
            pm.to("meta")
        pm.to("cpu").train_step(**batch)


class Scaled(nn.Module):
    """Takes a table that is the same for all samples, of a name before theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return (self.inside(x) * table).square().mean()


def table_of_all_samples(differs: bool) -> tuple[float, str]:
    torch.manual_seed(0)
    model, x, table = Scaled().double(), torch.randn(8, 6).double(), torch.rand(6).double()
    mesh = mp.make_mesh("dp=2")
    local = {"x": mp.local_batch({"x": x}, mesh)["x"], "table": table + (differs and mp.data_rank(mesh)[0])}
    pm = mp.parallelize(model, mesh, example=local)
    try:
        return abs(float(pm.train_step(**local)) - float(model(x, table).detach())), ""
    except mp.BatchError as error:
        return 0.0, str(error)


def test_inputs_that_hold_no_samples_are_the_same_on_all_data_ranks(gloo: Pool) -> None:
    for difference, error in gloo.run(table_of_all_samples, False, world=2):
        assert difference < 1e-14 and not error
    for _, error in gloo.run(table_of_all_samples, True, world=2):
        assert "the same on every rank, but these differ" in error and "table: rank 1 from the rest" in error


class ByNumber(nn.Module):
    """Looks samples up by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).index_select(0, torch.tensor([0, 2, 0, 1])).square().mean()


def test_samples_looked_up_by_their_number_in_a_microbatch() -> None:
    x = torch.linspace(0, 1, 12).view(4, 3)
    with mp.simulate(2):
        pm = mp.parallelize(ByNumber(), mp.make_mesh("tp=2"), example=(x,), config=mp.ParallelConfig(microbatches=2))
        with pytest.raises(mp.BatchError, match=r"(?s)Each of the 2 microbatches.*x\.shape\[0\]"):
            pm.train_step(x)
