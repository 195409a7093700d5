"""What a pipelined model does beside training exactly: evaluation, noise, buffers, accumulation, memory, timelines, mistakes."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import meshpar as mp
from meshpar.cli.look import explained
from meshpar.compile.programs import Programs
from meshpar.errors import BatchError, ConfigError, PlanError
from meshpar.init.weights import Lazy
from meshpar.pipeline import run as pipeline
from meshpar.pipeline.run import Pipelined
from meshpar.pipeline.sends import Sends
from tests.pipeline.models import made
from tests.pool import Pool

SECONDS = 25.0  # what "within seconds" means on a busy machine; the waits alone are 4


def parallel(name: str, mesh: str, **fields: Any) -> tuple[mp.ParallelModel, dict[str, Any], dict[str, Any], Any]:
    """A model in float64, parallel: it, this rank's batch, the global batch, and the original."""
    model, batch = made(name)
    model.double()
    batch = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in batch.items()}
    there = mp.make_mesh(mesh)
    tensors = {n: x for n, x in batch.items() if isinstance(x, Tensor)}
    local = {**batch, **mp.local_batch(tensors, there)}
    return mp.parallelize(model, there, example=local, config=mp.ParallelConfig(**fields)), local, batch, model


def gradients(pm: mp.ParallelModel) -> dict[str, Tensor | None]:
    return {name: mp.full_grad(p) for name, p in pm.named_parameters()}


def everyone(own: dict[str, Any]) -> dict[str, Any]:
    """Together what the ranks have."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return {name: value for one in found for name, value in one.items()}


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


# ---- evaluation ------------------------------------------------------------------------------------------------------------------------


def evaluating(schedule: str) -> None:
    pm, local, batch, model = parallel("everywhere", "pp=2", microbatches=4, schedule=schedule)
    wanted = model(**batch)
    close(pm.eval_step(**local), wanted["loss"].detach())
    pm.eval()
    close(pm.eval_step(**local), wanted["loss"].detach())
    shorter = {**batch, "ids": batch["ids"][3:6, :4], "labels": batch["labels"][3:6, :4]}  # another shape than the example's
    for there in (batch, shorter):
        wanted = model(**there)
        with torch.no_grad():
            out = pm(**there)
        assert list(out) == list(wanted) and out["nothing"] is None and out["power"] == there["power"]
        for name in ("loss", "picked", "ids", "logits"):
            close(out[name], wanted[name].detach())
    pm.train()
    assert all(p.grad is None for p in pm.parameters())
    with torch.no_grad():
        close(pm(**local)["loss"], model(**batch)["loss"])
    with pytest.raises(BatchError, match=r"trains by pm.train_step\(\*\*batch\)"):
        pm(**local)
    five = {**batch, "ids": batch["ids"].repeat(1, 2), "labels": batch["labels"].repeat(1, 2)}  # longer, in training
    loss = model(**five)["loss"]
    close(pm.train_step(**five), loss.detach())
    model.zero_grad()
    loss.backward()
    close(gradients(pm), {name: model.get_parameter(name).grad for name, _ in pm.named_parameters()})
    few = {**batch, "ids": batch["ids"][:6], "labels": batch["labels"][:6]}  # not a multiple of the microbatches: filled up
    model.zero_grad()
    pm.zero_grad()
    loss = model(**few)["loss"]
    close(pm.train_step(**few), loss.detach())
    loss.backward()
    close(gradients(pm), {name: model.get_parameter(name).grad for name, _ in pm.named_parameters()})


def test_evaluation_outputs_and_other_shapes(gloo: Pool) -> None:
    gloo.run(evaluating, "1f1b", timeout=120)
    gloo.run(evaluating, "zbv", timeout=120)


class ThereAndBack(nn.Module):
    """Layers that are passed twice, and penalties of some of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 16), nn.Linear(16, 24)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh()) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x, penalty = self.embed(ids), torch.zeros(())
        for layer in (*self.layers, *reversed(self.layers)):
            x = x + layer(x)
            penalty = penalty + layer[1].weight.abs().mean()
        penalty = penalty + sum(p.square().sum() for p in self.layers[0].parameters()) + self.embed.weight.norm()
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten()) + 0.01 * penalty


def over_shapes() -> float:
    """The largest difference of a loss or a gradient, over batches of several shapes."""
    torch.manual_seed(0)
    model, mesh, worst = ThereAndBack().double(), mp.make_mesh("pp=2,cp=2"), 0.0
    pm = mp.parallelize(model, mesh, example={"ids": torch.randint(24, (4, 8))}, config=mp.ParallelConfig(schedule="zbv"))
    for shape in ((4, 8), (4, 12), (6, 8), (4, 8), (6, 12)):
        batch = {"ids": torch.randint(24, shape)}
        model.zero_grad()
        loss = model(**batch)
        loss.backward()
        worst = max(worst, abs(pm.train_step(**batch).item() - loss.item()))
        for name, p in pm.named_parameters():
            worst = max(worst, (mp.full_grad(p) - model.get_parameter(name).grad).abs().max().item())
        pm.zero_grad()
    return worst


@pytest.mark.slow
def test_terms_of_parameters_for_batches_of_many_shapes(gloo: Pool) -> None:
    assert max(gloo.run(over_shapes, world=4, timeout=180)) < 1e-11


# ---- noise, buffers, accumulation ------------------------------------------------------------------------------------------------------


def two_steps(name: str, mesh: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Losses of two steps without zero_grad between them, gradients after each, buffers at the end."""
    pm, local, _, _ = parallel(name, mesh, microbatches=4, **fields)
    losses, grads = [], []
    for _ in range(2):
        losses.append(pm.train_step(**local))
        grads.append(everyone({n: None if g is None else g.clone() for n, g in gradients(pm).items()}))
    return {"losses": losses, "first": grads[0], "second": grads[1], "buffers": everyone(dict(pm.named_buffers()))}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", ["dropout", "batch_norm", "tied", "frozen_start", "balanced"])
def test_the_same_as_without_a_pipeline(gloo: Pool, name: str) -> None:
    """Noise, running statistics of every microbatch in turn, gradients that add up, terms of the loss that are no sum over samples."""
    alone = gloo.run(two_steps, name, "tp=1", {}, world=1, timeout=120)[0]
    if name == "dropout":
        assert abs(alone["losses"][0] - alone["losses"][1]) > 1e-4  # each step draws anew
    kinds: list[dict[str, Any]] = [{}, {"schedule": "zbv", "recompute": "full"}]
    for fields in kinds:
        for found in gloo.run(two_steps, name, "pp=2", fields, timeout=120):
            assert found["buffers"].keys() == alone["buffers"].keys()
            close(found, alone)
    if name == "tied":
        close(alone["second"]["embed.weight"], 2 * alone["first"]["embed.weight"])


def in_bfloat16() -> tuple[float, float, set[torch.dtype]]:
    model, batch = made("tied")
    wanted = model(**batch).item()
    pm = mp.parallelize(model, mp.make_mesh("pp=2"), example=batch, config=mp.ParallelConfig(microbatches=4, precision="bf16"))
    loss = pm.train_step(**batch)
    return loss.item(), wanted, {p.grad.dtype for p in pm.parameters() if p.grad is not None}


def test_mixed_precision(gloo: Pool) -> None:
    for loss, wanted, dtypes in gloo.run(in_bfloat16, timeout=120):
        assert 1e-6 < abs(loss - wanted) < 0.05 and dtypes == {torch.float32}


def half_precision_gradients(cases: list[tuple[str, str, torch.dtype | None]]) -> list[tuple[float, float]]:
    """Per schedule, mode and dtype of sums, how far gradients are from those in full precision, and from those of the first case."""
    model, batch = made("tied")
    model(**batch).backward()
    mesh, found = mp.make_mesh("pp=2,dp=2"), []
    first: dict[str, Tensor] = {}
    for schedule, mode, reduced in cases:
        precision = mp.Precision(compute_dtype=torch.bfloat16, reduce_dtype=reduced)
        config = mp.ParallelConfig(microbatches=4, schedule=schedule, data_parallel=mode, precision=precision)  # type: ignore[arg-type]
        local = mp.local_batch(batch, mesh)
        pm = mp.parallelize(made("tied")[0], mesh, example=local, config=config)
        for _ in range(2):  # gradients of a second step add to those of the first
            pm.train_step(**local)
        own = {n: mp.full_grad(p) / 2 for n, p in pm.named_parameters() if p.grad is not None}  # type: ignore[operator]
        first = first or own
        wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((max(_apart(g, wanted[n]) for n, g in own.items()), max(_apart(g, first[n]) for n, g in own.items())))
    return found


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_gradients_in_mixed_precision(gloo: Pool) -> None:
    """Gradients of several microbatches, some of them put off, are added in the dtype that data ranks sum in, and none is lost."""
    cases = [("1f1b", "zero3", torch.float32), ("zero-bubble", "zero3", torch.float32), ("zero-bubble", "zero2", torch.float32)]
    for found in gloo.run(half_precision_gradients, [*cases, ("zero-bubble", "replicate", None)], world=4, timeout=180):
        assert len(found) == 4 and max(rounding for rounding, _ in found) < 0.06, found
        assert max(from_first for _, from_first in found[:3]) < 1e-5, found


# ---- memory ----------------------------------------------------------------------------------------------------------------------------


def in_flight(schedule: str, microbatches: int) -> dict[str, Any]:
    """The most microbatches between forward and backward by what autograd holds, and how many sent values are alive at the end."""
    pm, local, _, _ = parallel("chain8", "pp=2", microbatches=microbatches, schedule=schedule)
    pm.train_step(**local)
    alive: Counter[int] = Counter()
    now, most = [0], [0]
    sent: list[weakref.ref[Tensor]] = []

    class Held:
        def __init__(self, value: Tensor) -> None:
            self.value, self.microbatch = value, now[0]
            alive[self.microbatch] += 1
            most[0] = max(most[0], sum(n > 0 for n in alive.values()))

        def __del__(self) -> None:
            alive[self.microbatch] -= 1

    run = pipeline._Run._forward

    def forward(self: Any, action: Any) -> None:
        now[0] = action.microbatch
        run(self, action)

    add = Sends.add

    def adding(self: Sends, works: Any, tensors: Any) -> None:
        sent.extend(weakref.ref(t) for t in tensors)
        add(self, works, tensors)

    backward, left = pipeline._Run._backward, []

    def going_back(self: Any, action: Any) -> None:
        if action.microbatch == microbatches - 1:  # every forward of this rank has long been used by the next one
            deadline = time.monotonic() + 5
            while any(r() is not None for r in sent[:microbatches]) and time.monotonic() < deadline:
                time.sleep(0.01)
            left.append(sum(r() is not None for r in sent[:microbatches]))
        backward(self, action)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline._Run, "_forward", forward)
        patch.setattr(pipeline._Run, "_backward", going_back)
        patch.setattr(Sends, "add", adding)
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.value):
            pm.train_step(**local)
    return {"most": most[0], "sent": len(sent), "left": left, "expected": dict(pm.memory().in_flight), "after": sum(alive.values())}


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("schedule", "expected"), [("1f1b", [2, 1]), ("gpipe", [8, 8])])
def test_microbatches_in_flight_and_values_let_go(gloo: Pool, schedule: str, expected: list[int]) -> None:
    found = gloo.run(in_flight, schedule, 8, timeout=120)
    assert [one["most"] for one in found] == expected  # p - r, or all
    assert [one["expected"] for one in found] == [{0: expected[0]}, {1: expected[1]}]
    assert all(one["after"] == 0 and one["sent"] == 8 and one["left"] == [0] for one in found), found


def sending() -> list[bool]:
    """Whether a tensor is alive before and after it has arrived."""
    sends, value = Sends(torch.device("cpu")), torch.ones(3)
    seen = weakref.ref(value)
    if dist.get_rank() == 1:
        dist.barrier()
        dist.irecv(value, 0).wait()
        return [True, False]
    sends.add([dist.isend(value, 1)], (value,))
    del value
    before = seen() is not None
    dist.barrier()
    deadline = time.monotonic() + 10
    while seen() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    after = seen() is not None
    sends.finish()
    return [before, after]


def test_what_was_sent_is_let_go_when_it_arrives(gloo: Pool) -> None:
    assert gloo.run(sending) == [[True, False]] * 2


@pytest.mark.slow
def test_memory_is_that_of_the_stages_of_a_rank() -> None:
    model, batch = made("chain8")

    def report(**fields: Any) -> Any:
        return explained(model, batch, "pp=4", config=mp.ParallelConfig(microbatches=8, **fields)).memory()

    whole = explained(model, batch, "tp=1", config=mp.ParallelConfig(microbatches=8)).memory()
    one, all_ = report(), report(schedule="gpipe")
    assert one.in_flight == {0: 4} and all_.in_flight == {0: 8}
    assert all_.activations == 2 * one.activations
    assert one.parameters == 2 * 4 * (8 * 8 + 8) < whole.parameters  # two of eight layers
    assert "4 microbatches in flight" in str(one) and "with stage 0 " in str(one)
    assert set(report(schedule="zbv").in_flight) == {0, 7}
    assert max(sum(held.values()) for held in mp.schedule.order("zbv", 4, 8, 8).in_flight(0)) == 8  # as many as 1F1B, in halves


# ---- timelines -------------------------------------------------------------------------------------------------------------------------


def timeline(schedule: str) -> dict[str, Any]:
    pm, local, batch, model = parallel("chain8", "pp=2", microbatches=4, schedule=schedule)
    pm.train_step(**local)
    pm.zero_grad()
    events = pm.timeline(**local)
    assert pm._engine.events is None  # type: ignore[attr-defined]
    model(**batch)["loss"].backward()
    close(gradients(pm), {name: model.get_parameter(name).grad for name, _ in pm.named_parameters()})  # it was a step as any other
    return {"events": events, "order": pm.schedule, "table": pm.schedule_table()}


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_measured_timelines(gloo: Pool, schedule: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = gloo.run(timeline, schedule, timeout=120)
    assert first == second
    events, order = first["events"], first["order"]
    assert first["table"] == mp.schedule.schedule_table(order) and first["table"].startswith("rank 0 | ")
    assert mp.schedule.order(schedule, 2, order.stages, 4) == order
    for rank in range(2):  # what ran is what the order says, one after the other
        own = [e for e in events if e.rank == rank]
        assert [(e.kind, e.stage, e.microbatch) for e in own if e.kind != "REDUCE_GRAD"] == [
            (a.kind, a.stage, a.microbatch) for a in order.compute[rank] if a is not None
        ]
        assert all(0 <= e.start <= e.end and e.end <= f.start for e, f in pairwise(own))
    assert mp.plot.schedule(order, measured=[e for e in events if e.kind != "REDUCE_GRAD"]) and mp.plot.schedule(order, measured=events)
    mp.plot.chrome_trace(events, tmp_path / "trace.json")
    assert '"F3"' in (tmp_path / "trace.json").read_text()


def test_there_is_no_timeline_without_a_pipeline() -> None:
    model, batch = made("chain")
    pm = explained(model, batch, "dp=2")
    assert pm.schedule is None
    for ask in (pm.schedule_table, lambda: pm.timeline(**batch)):
        with pytest.raises(ConfigError, match="no pp axis"):
            ask()


# ---- in words --------------------------------------------------------------------------------------------------------------------------


def test_stages_in_words() -> None:
    model, batch = made("tied")
    pm = explained(model, batch, "pp=2,dp=2", config=mp.ParallelConfig(microbatches=4, schedule="zbv"))
    text = pm.explain()
    assert "Stages: 4 on 2 ranks of pp, balanced by cost" in text
    assert "(same rank)" in text and "embed.weight is used by stages 0, 3: each has a copy; gradients are summed" in text
    assert "schedule zbv, 4 microbatches: idle for" in text and "4.2% with equal ones" in text
    assert "zero3: parameters stay gathered until the end of the step" in text
    assert "to stage 1         pp    forward   send" in text
    sends = [(c.stage, c.phase) for c in pm.comms() if c.kind == "send"]
    assert sorted(set(sends)) == [(0, "forward"), (1, "backward"), (2, "forward"), (3, "backward")]  # 1 and 2 are on one rank
    bare = explained(*made("bare"), "pp=4", config=mp.ParallelConfig(microbatches=4)).explain()
    assert "ranks 1, 2 of pp: nothing to train there" in bare and "75.0% with equal ones" in bare
    balanced = explained(*made("balanced"), "pp=2", config=mp.ParallelConfig(microbatches=4)).explain()
    assert "is the mean over microbatches, not over the whole batch" in balanced


# ---- mistakes --------------------------------------------------------------------------------------------------------------------------


def refused() -> list[str]:
    """The messages of mistakes that all ranks make; nothing may be captured for them."""
    model, batch = made("chain")
    mesh, messages = mp.make_mesh("pp=2"), []
    fields: list[dict[str, Any]] = [
        {"microbatches": 3, "schedule": "dualpipev"},
        {"microbatches": 5, "schedule": "interleaved-1f1b"},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "make", lambda *args, **kwargs: pytest.fail("captured"))
        for one in fields:
            with pytest.raises(ConfigError) as config:
                mp.parallelize(model, mesh, example=batch, config=mp.ParallelConfig(**one))
            messages.append(str(config.value))
    with pytest.raises(BatchError) as divided:
        mp.parallelize(model, mesh, example=batch, config=mp.ParallelConfig(microbatches=3))
    with pytest.raises(PlanError) as stages:
        mp.parallelize(model, mesh, example=batch, config=mp.ParallelConfig(microbatches=16 // 2, schedule="looped-bfs", virtual_stages=40))
    pm = mp.parallelize(model, mesh, example=batch)  # the groups are as good as before
    pm.train_step(**batch)
    return [*messages, str(divided.value), str(stages.value)]


def test_mistakes_are_told_before_anything_is_captured(gloo: Pool) -> None:
    first, second = gloo.run(refused, timeout=120)
    assert first == second
    assert "microbatches=3: dualpipev on 2 ranks: at least one microbatch per stage, 4. Nearest: microbatches=4" in first[0]
    assert "microbatches=5" in first[1] and "Nearest: microbatches=4 or microbatches=6" in first[1]
    assert "3 microbatches do not divide" in first[2] and "[1, 2, 4, 8]" in first[2]
    assert "stages=80: this graph has" in first[3] and "stages are possible" in first[3]


def raising(mesh: str, rank: int) -> tuple[str, float]:
    """A rank raises in the forward of microbatch 2: what this rank is told, and after how long."""
    pm, local, _, _ = parallel("chain", mesh, microbatches=4)
    pm.train_step(**local)
    assert isinstance(pm._engine, Pipelined)
    count = 0

    def broken(module: Any, args: Any, outputs: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise ZeroDivisionError("the third one is bad")

    if dist.get_rank() == rank:
        nn.Module.register_forward_hook(pm._engine.trees[pm._engine.axis.rank], broken)
    start = time.monotonic()
    try:
        pm.train_step(**local)
    except mp.MeshparError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "no error", 0.0


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("mesh", "rank", "stage"), [("pp=2", 0, 0), ("pp=2", 1, 1), ("pp=2,tp=2", 2, 1)])
def test_a_stage_that_raises_stops_all_ranks(gloo: Pool, mesh: str, rank: int, stage: int) -> None:
    world = 2 * mesh.count("=")
    for index, (message, seconds) in enumerate(gloo.run(raising, mesh, rank, world=world, timeout=120)):
        assert message.startswith("StageError: stage" if index == rank else f"RankError: rank {rank} failed in train_step: StageError:")
        assert f"stage {stage} (layers." in message and "microbatch 2, forward: ZeroDivisionError: the third one is bad" in message
        assert "in broken" in message and 'raise ZeroDivisionError("the third one is bad")' in message  # the traceback
        assert seconds < SECONDS


# ---- values ----------------------------------------------------------------------------------------------------------------------------


def loading(path: str) -> dict[str, Any]:
    """What this rank reads of a file, and what its parameters are then."""
    read: Counter[str] = Counter()
    original = Lazy.read

    def reading(self: Lazy, *args: Any) -> Tensor:
        value = original(self, *args)
        read[self.name] += value.nbytes
        return value

    batch = made("tied")[1]
    with torch.device("meta"):
        model = made("tied")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lazy, "read", reading)
        pm = mp.parallelize(model, mp.make_mesh("pp=2"), example=batch, config=mp.ParallelConfig(microbatches=2), weights=path)
    return {"read": dict(read), "values": {n: p.full_tensor() for n, p in pm.named_parameters()}}  # type: ignore[attr-defined]


def test_a_rank_reads_the_bytes_of_its_stages_only(gloo: Pool, tmp_path: Path) -> None:
    model = made("tied")[0]
    values = {name: p.detach().clone().normal_() for name, p in model.named_parameters()}
    save_file(values, tmp_path / "model.safetensors")
    found = gloo.run(loading, str(tmp_path / "model.safetensors"), timeout=120)
    for one in found:
        assert one["read"] == {name: values[name].nbytes for name in one["values"]} and len(one["read"]) < len(values)
        assert all(torch.equal(value, values[name]) for name, value in one["values"].items())
    assert set(found[0]["values"]) & set(found[1]["values"]) == {"embed.weight"} and set(found[0]["read"]) | set(found[1]["read"]) == set(
        values
    )


def deferred(mesh: str) -> dict[str, Tensor]:
    batch = made("tied")[1]
    with mp.meta():
        model = made("tied")[0]
    pm = mp.parallelize(model, mp.make_mesh(mesh), example=batch, config=mp.ParallelConfig(microbatches=2))
    assert len(list(pm.parameters())) < len(list(model.parameters()))
    return {n: p.full_tensor() for n, p in pm.named_parameters()}  # type: ignore[attr-defined]


def test_models_without_memory_are_filled_with_the_very_values(gloo: Pool) -> None:
    wanted = dict(made("tied")[0].named_parameters())
    found = gloo.run(deferred, "pp=2", timeout=120)
    assert set(found[0]) | set(found[1]) == set(wanted)
    assert all(torch.equal(value, wanted[name]) for one in found for name, value in one.items())


def norms() -> tuple[float, float, str]:
    """The gradient norm where a rank has no parameters: by the iterator, by a list with the mesh; and by a list alone."""
    pm, local, _, _ = parallel("one_stage", "pp=2", microbatches=2)
    pm.train_step(**local)
    found = mp.clip_grad_norm_(pm.parameters(), 1e9), mp.clip_grad_norm_(list(pm.parameters()), 1e9, mesh=pm.mesh)
    assert all(norm.dtype is torch.float64 for norm in found)
    torch.optim.AdamW([{"params": pm.parameters()}]).step()
    if dist.get_rank() == 0:
        return found[0].item(), found[1].item(), ""
    with pytest.raises(ConfigError) as error:
        mp.clip_grad_norm_(list(pm.parameters()), 1.0)
    return found[0].item(), found[1].item(), str(error.value)


def test_a_rank_without_parameters_takes_part_in_the_norm(gloo: Pool) -> None:
    (a, b, _), (c, d, message) = gloo.run(norms, timeout=120)
    assert a == b == c == d > 0
    assert "Pass mesh=pm.mesh" in message
