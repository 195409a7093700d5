"""Training runs that go on after loading, on the mesh they were saved from and on others, against the run that was never interrupted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import meshpar as mp
from meshpar.checkpoint import AllRanks, PerRank, inspection
from meshpar.checkpoint.convert.hf import to_hf
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.format.opened import open_checkpoint
from meshpar.checkpoint.online.training import load, save, save_async
from meshpar.errors import CheckpointError, ConfigError, RankError
from tests.checkpoint.making import CountingDisk, kill, no_space
from tests.models import GPT
from tests.pool import Pool

SECONDS = 240.0  # the first run of a pool imports everything
Case = tuple[str, str, str]
"""Mesh, data-parallel mode, optimizer."""


class Net(GPT):
    """GPT of uneven fused heads, an odd vocabulary, a tied head, a frozen parameter, and buffers of odd dtypes."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(heads=6, kv=2, width=24, vocab=37, layers=2, dropout=dropout)
        self.positions.weight.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([0.5, 0.25, 3.0], dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("codes", torch.tensor([1.0, -0.5]).to(torch.float8_e4m3fn))


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(37, (4, 6), generator=torch.Generator().manual_seed(step))
    return {"ids": ids, "labels": ids.roll(1, 1)}


def net(seed: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return Net(dropout).double()


def optimizer_of(name: str, module: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1}, {"params": [p for p in trained if p.ndim < 2]}]
    made: torch.optim.Optimizer
    if name == "factored":
        made = Factored(trained)
    elif name == "sgd":
        made = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    else:
        made = torch.optim.AdamW(groups, lr=0.01, amsgrad=True, **({name: True} if name in ("fused", "foreach") else {}))
    return made, torch.optim.lr_scheduler.MultiStepLR(made, [2, 4], gamma=0.5)


class Factored(torch.optim.Optimizer):
    """Row and column statistics of matrices, as Adafactor has them (torch's own does not run on DTensors), and a counter."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.05, "betas": (0.9, 0.5)})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state, square = self.state[p], p.grad**2
                state["count"] = state.get("count", 0) + 1
                rows = (
                    [("row", square.mean(1, keepdim=True)), ("column", square.mean(0, keepdim=True))] if p.ndim == 2 else [("all", square)]
                )
                for name, new in rows:
                    if isinstance(new, DTensor) and name != "all":
                        new = new.redistribute(placements=[Replicate()] * new.device_mesh.ndim)
                    state[name] = new if name not in state else state[name] * 0.9 + new * 0.1
                scale = state["row"] * state["column"] if p.ndim == 2 else state["all"]
                p.add_(p.grad / (scale.sqrt() + 1e-3), alpha=-group["lr"] / state["count"])


def parallel(case: Case, seed: int = 0, dropout: float = 0.0) -> tuple[Any, torch.optim.Optimizer, Any]:
    spec, mode, name = case
    mesh = mp.make_mesh(spec)
    stages = {"microbatches": 2, "schedule": "interleaved-1f1b", "virtual_stages": 2} if "pp" in spec else {}
    config = mp.ParallelConfig(data_parallel=mode, **stages)  # type: ignore[arg-type]
    pm = mp.parallelize(net(seed, dropout), mesh, example=mp.local_batch(batch(0), mesh), config=config)
    return pm, *optimizer_of(name, pm)


def train(pm: Any, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(float(pm.train_step(**mp.local_batch(batch(step), pm.mesh))))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses


def whole(pm: nn.Module) -> dict[str, torch.Tensor]:
    """Everything this rank has of the model; all of it, unless there are stages."""
    return {**{n: mp.full_tensor(p) for n, p in pm.named_parameters()}, **{n: b.clone() for n, b in pm.named_buffers()}}


def run_and_save(path: str, case: Case, dropout: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Three steps, a save, three more; then the same again from the save, which must be the same bit for bit."""
    pm, optimizer, scheduler = parallel(case, dropout=dropout)
    with torch.no_grad():
        pm.scale[0], pm.count[...], pm.flags[1] = 0.125, 41, True  # not what the model starts with
    train(pm, optimizer, scheduler, range(3))
    rank = pm.mesh.get_rank()
    extra = {"step": 3, "shape": (4, float("inf")), "mean": torch.arange(3.0), "position": PerRank(rank), "noise": PerRank(torch.rand(2))}
    torch.manual_seed(100 + rank)
    save(path, pm, optimizer, scheduler=scheduler, extra=extra)
    drawn = torch.rand(3)
    losses = train(pm, optimizer, scheduler, range(3, 6))

    again, optimizer, scheduler = parallel(case, seed=1, dropout=dropout)
    if case[2] == "fused":  # into state that exists already
        train(again, optimizer, scheduler, range(1))
    found = load(path, again, optimizer, scheduler=scheduler)
    assert torch.equal(torch.rand(3), drawn)
    assert (found["step"], found["shape"], found["position"]) == (3, (4, float("inf")), rank)
    assert torch.equal(found["mean"], torch.arange(3.0)) and torch.equal(found["noise"], extra["noise"].value)  # type: ignore[attr-defined]
    assert losses == train(again, optimizer, scheduler, range(3, 6))
    first, second = whole(pm), whole(again)
    assert all(torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first)
    return losses, first


def load_and_run(path: str, cases: list[Case]) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """The three steps after loading on each of some meshes."""
    out = []
    for case in cases:
        pm, optimizer, scheduler = parallel(case, seed=1)
        found = load(path, pm, optimizer, scheduler=scheduler, per_rank="all")
        for tree in pm._engine.trees.values():  # several stages of a rank may have copies of a buffer
            assert tree.scale[0] == 0.125 and tree.count == 41
        position = found["position"]
        assert isinstance(position, AllRanks) and sorted(position.values) == list(range(len(position.values)))
        out.append((train(pm, optimizer, scheduler, range(3, 6)), whole(pm)))
    return out


def one_device(path: Path, name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same, with nothing but torch."""
    model = net(1)
    optimizer, scheduler = optimizer_of(name, model)
    load(path, model, optimizer, scheduler=scheduler, per_rank="skip")
    losses = []
    for step in range(3, 6):
        loss = model(**batch(step))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses, {**dict(model.named_parameters()), **dict(model.named_buffers())}


def together(ranks: Sequence[tuple[list[float], dict[str, torch.Tensor]]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The union of what ranks have; tied names go by one."""
    assert all(losses == ranks[0][0] for losses, _ in ranks)
    found = {name: value for _, tensors in ranks for name, value in tensors.items()}
    return ranks[0][0], {name: value for name, value in found.items() if name != "head.weight"}


def check(found: tuple[list[float], dict[str, torch.Tensor]], expected: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-9, abs=0)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert found[1][name].dtype == value.dtype
        torch.testing.assert_close(found[1][name].double(), value.double(), rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "saved, four, two",
    [
        (("pp=2,tp=2", "zero3", "foreach"), [("dp=4", "zero1", "foreach")], [("pp=2", "replicate", "fused")]),
    ],
    ids=["pp2tp2"],
)
def test_a_run_goes_on_from_any_mesh(gloo: Pool, tmp_path: Path, saved: Case, four: list[Case], two: list[Case]) -> None:
    path = tmp_path / "a"
    expected = together(gloo.run(run_and_save, str(path), saved, 0.0, world=4, timeout=SECONDS))
    assert inspection.verify(path).ok and sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    for world, cases in ((4, four), (2, two)):
        for found in zip(*gloo.run(load_and_run, str(path), cases, world=world, timeout=SECONDS), strict=True):
            check(together(found), expected)
    check(one_device(path, saved[2]), expected)


def test_dropout_goes_on_bit_for_bit(gloo: Pool, tmp_path: Path) -> None:
    losses = gloo.run(run_and_save, str(tmp_path / "a"), ("dp=2", "zero1", "fused"), 0.1, world=2, timeout=SECONDS)[0][0]
    assert len(set(losses)) == 3


def language_model() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=67, tie_word_embeddings=True, **sizes))


def trained_on_two(path: str) -> dict[str, torch.Tensor]:
    mesh, ids = mp.make_mesh("tp=2"), torch.arange(24).reshape(2, 12) % 67
    pm = mp.parallelize(language_model(), mesh, example={"input_ids": ids, "labels": ids})
    optimizer = torch.optim.AdamW(pm.parameters(), lr=0.01)
    pm.train_step(input_ids=ids, labels=ids)
    optimizer.step()
    save(path, pm, optimizer)
    return {n: mp.full_tensor(p) for n, p in pm.named_parameters()}


def started_from(folder: str) -> dict[str, torch.Tensor]:
    mesh, ids = mp.make_mesh("dp=2"), torch.arange(12).reshape(1, 12) % 67
    with mp.meta():
        bare = language_model()
    pm = mp.parallelize(bare, mesh, example={"input_ids": ids, "labels": ids}, weights=folder)
    return {n: mp.full_tensor(p) for n, p in pm.named_parameters()}


def test_a_trained_model_leaves_for_hugging_face_and_comes_back(gloo: Pool, tmp_path: Path) -> None:
    path, folder = tmp_path / "a", tmp_path / "hf"
    trained = gloo.run(trained_on_two, str(path), world=2, timeout=SECONDS)[0]
    report = to_hf(path, folder)
    assert report.tensors == len(trained) and "the optimizer and other state" in report.notes[0]
    model, ids = language_model().eval(), torch.arange(12).reshape(1, 12) % 67
    before = model(ids).logits
    load(path, model, unexpected="skip")
    model.config.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    assert torch.equal(again(ids).logits, model(ids).logits) and not torch.equal(before, model(ids).logits)
    started = gloo.run(started_from, str(folder), world=2, timeout=SECONDS)[0]
    assert started.keys() == trained.keys() and all(torch.equal(started[n], trained[n]) for n in trained)
    state = {n: torch.zeros_like(t) for n, t in trained.items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    assert all(torch.equal(state[n], trained[n]) for n in trained)


class Part(nn.Module):
    """What one rank of a pipeline holds: some parameters of a model, under the model's names."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor))


PARTS = {"embed": (7, 4), "experts": (3, 2, 5), "middle": (4, 5), "scale": (1,), "head": (7, 4)}


def part(name: str) -> torch.Tensor:
    return torch.randn(PARTS[name], dtype=torch.float64, generator=torch.Generator().manual_seed(len(name)))


def stage_of(names: list[str], mesh: Any, *, zero: bool = False) -> tuple[Part, torch.optim.Optimizer]:
    """A module of some parameters over tp (ep for the experts), with an optimizer of two groups that has state for them."""
    placements = {"embed": [Shard(0)], "middle": [Shard(1)], "experts": [Shard(0)]}
    parameters = {n: distribute_tensor(part(n), mesh, placements.get(n, [Replicate()])) for n in names}
    module = Part({n: torch.zeros_like(p) if zero else p for n, p in parameters.items()})
    groups = [[p for p in module.parameters() if p.ndim > 1], [p for p in module.parameters() if p.ndim == 1]]
    optimizer = torch.optim.AdamW([{"params": rows, "lr": lr} for rows, lr in zip(groups, (0.1, 0.2), strict=True)])
    if not zero:
        for name, parameter in module.named_parameters():
            parameter.grad = parameter.detach() * (1 + len(name))
        optimizer.step()
    return module, optimizer


def pipeline_save(path: str) -> str:
    """pp=2 x tp=2: a tied parameter on both stages, experts cut over ep, a stage whose second group is empty."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    other = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))
    own = other["ep"] if mesh.get_local_rank("pp") else mesh["tp"]
    module, optimizer = stage_of([["embed", "middle"], ["embed", "experts", "scale"]][mesh.get_local_rank("pp")], own)
    save(path, module, optimizer)
    optimizer.param_groups[0]["lr"] = 0.1 + mesh.get_local_rank("pp")
    try:
        save(path + "-bad", module, optimizer)
    except (CheckpointError, RankError) as error:
        return str(error)
    return "saved"


def pipeline_load(path: str, names: list[list[str]]) -> bool:
    """Load on two ranks with other stages: every parameter and moment must be that of the whole model after one step."""
    own = init_device_mesh("cpu", (len(names), 2 // len(names)), mesh_dim_names=("pp", "tp"))["tp"]
    mine = names[dist.get_rank() % len(names)]
    module, optimizer = stage_of(mine, own, zero=True)
    load(path, module, optimizer)
    return all(_same_step(name, parameter, optimizer) for name, parameter in module.named_parameters())


def _same_step(name: str, parameter: Any, optimizer: torch.optim.Optimizer) -> bool:
    alone = Part({name: part(name)})
    expected = torch.optim.AdamW(alone.parameters(), lr=0.2 if name == "scale" else 0.1)
    (only,) = alone.parameters()
    only.grad = only.detach() * (1 + len(name))
    expected.step()
    state, wanted = optimizer.state[parameter], expected.state[only]
    pairs = [(parameter.detach(), only.detach()), *((state[k], wanted[k]) for k in wanted)]
    return state.keys() == wanted.keys() and all(torch.equal(a.full_tensor() if isinstance(a, DTensor) else a, b) for a, b in pairs)


def test_ranks_that_hold_different_parameters(gloo: Pool, tmp_path: Path) -> None:
    path = tmp_path / "a"
    said = gloo.run(pipeline_save, str(path), world=4, timeout=SECONDS)
    assert all("optimizer.groups.0.lr is 0.1 on one rank and 1.1 on rank 2" in text for text in said), said
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    stored = open_checkpoint(path).manifest
    assert {n for n in stored.tensors if "/" not in n} == {"embed", "middle", "experts", "scale"}
    for names in ([["embed", "middle", "experts", "scale"]], [["embed", "experts"], ["middle", "scale"]]):
        assert gloo.run(pipeline_load, str(path), names, world=2, timeout=SECONDS) == [True, True]
    module, optimizer = Part({n: torch.zeros(PARTS[n], dtype=torch.float64) for n in stored.tensors if n in PARTS}), None
    optimizer = torch.optim.AdamW([{"params": [p for n, p in module.named_parameters() if (n == "scale") == k]} for k in (False, True)])
    load(path, module, optimizer, per_rank="skip")
    assert all(_same_step(name, p, optimizer) for name, p in module.named_parameters())
    mixed = torch.optim.AdamW(module.parameters())
    with pytest.raises(CheckpointError, match=r"holds [a-z]+ and scale, but they were saved with lr=0.1 and 0.2"):
        load(path, module, mixed)


def factored(path: str, spec: str, *, saving: bool) -> dict[str, torch.Tensor]:
    """Row and column statistics of a fused projection whose order torch cannot name."""
    pm, optimizer, scheduler = parallel((spec, "zero3", "factored"), seed=0 if saving else 1)
    if saving:
        train(pm, optimizer, scheduler, range(2))
        save(path, pm, optimizer, scheduler=scheduler)
    else:
        load(path, pm, optimizer, scheduler=scheduler)
    losses = train(pm, optimizer, scheduler, range(2, 5))
    return {**whole(pm), "losses": torch.tensor(losses)}


@pytest.mark.slow
def test_statistics_of_other_shapes_than_their_parameter(gloo: Pool, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    first = gloo.run(factored, path, "tp=2", saving=True, timeout=SECONDS)[0]
    second = gloo.run(factored, path, "tp=2", saving=False, timeout=SECONDS)[0]
    third = gloo.run(factored, path, "dp=2", saving=False, timeout=SECONDS)[0]
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(third[name].double(), value.double(), rtol=1e-9, atol=1e-12)


def in_background(path: str) -> list[str]:
    """What is saved is what was there when `save_async` was called, whatever training does to it meanwhile."""
    pm, optimizer, scheduler = parallel(("dp=2", "zero2", "foreach"))
    train(pm, optimizer, scheduler, range(1))
    before, moments = whole(pm), {n: optimizer.state[p]["exp_avg"].full_tensor() for n, p in pm.named_parameters() if p.requires_grad}
    saving = save_async(path + "/a", pm, optimizer, scheduler=scheduler, disk=Slow())
    with torch.no_grad():
        for parameter in pm.parameters():
            parameter.zero_()
    was_done = saving.done()
    train(pm, optimizer, scheduler, range(1, 3))  # collectives of its own, meanwhile
    save(path + "/b", pm, optimizer, scheduler=scheduler)  # waits for the first
    after, first_done = whole(pm), saving.done()
    saving.wait()
    failing = save_async(path + "/a", pm, optimizer, scheduler=scheduler)
    said = [f"{was_done} {first_done}", _message(failing.wait)]
    unlucky = save_async(path + "/c", pm, disk=CountingDisk(3, no_space) if dist.get_rank() else None)
    said += [_message(lambda: save(path + "/d", pm)), _message(unlucky.wait), _message(lambda: save(path + "/d", pm))]
    for name, expected in (("a", before), ("b", after)):
        load(f"{path}/{name}", pm, optimizer, scheduler=scheduler)
        found = whole(pm)
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        if name == "a":
            assert all(torch.equal(optimizer.state[pm.get_parameter(n)]["exp_avg"].full_tensor(), m) for n, m in moments.items())
    return said


def _message(act: Any) -> str:
    try:
        act()
    except (CheckpointError, RankError) as error:
        return str(error)
    return "went well"


class Slow(Disk):
    """Takes its time to write."""

    def write(self, fd: int, views: Any, offset: int) -> None:
        time.sleep(0.02)
        super().write(fd, views, offset)


def test_saving_in_the_background(gloo: Pool, tmp_path: Path) -> None:
    for done, exists, unlucky, again, good in gloo.run(in_background, str(tmp_path), world=2, timeout=SECONDS):
        assert done == "False True"
        assert "exists. A checkpoint is never written over another one" in exists
        assert "No space left on device" in unlucky and again == unlucky and good == "went well"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "d"]


def test_nothing_is_left_behind_or_made_up(tmp_path: Path) -> None:
    module, path = nn.Linear(3, 2), tmp_path / "a"
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    save(path, module, optimizer, scheduler=scheduler, extra={"position": PerRank({"epoch": 3})})
    load(path, module, optimizer, scheduler=scheduler)
    for kept, said in (
        ({"optimizer": optimizer}, "holds the state of the scheduler, which would be lost"),
        ({"scheduler": scheduler}, "holds the state of the optimizer, which would be lost"),
        (
            {"optimizer": torch.optim.Adam(module.parameters()), "scheduler": scheduler},
            "holds the state of SGD, which Adam cannot continue",
        ),
        ({"optimizer": torch.optim.SGD(nn.Linear(3, 2).parameters()), "scheduler": scheduler}, "are not among the module's"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=said):
            load(path, module, **kept)  # type: ignore[arg-type]
    assert load(path, module, unexpected="skip") == {"position": {"epoch": 3}}
    with pytest.raises(CheckpointError, match=r"extra/extra.made is a Linear.\n  extra/extra.path.0 is a PosixPath"):
        save(tmp_path / "b", module, extra={"made": nn.Linear(1, 1), "path": [tmp_path], "x": 1})
    save(tmp_path / "b", module)
    with pytest.raises(CheckpointError, match="it holds no optimizer"):
        load(tmp_path / "b", module, optimizer)
    load(tmp_path / "b", module, optimizer, missing="skip")
    with pytest.warns(UserWarning, match="1 tensors were not saved and keep their values: more"):
        load(tmp_path / "b", _with_more(module), missing="skip")


def _with_more(module: nn.Module) -> nn.Module:
    module.register_parameter("more", nn.Parameter(torch.ones(2)))
    return module


def different_values(path: str) -> list[str]:
    rank, module = dist.get_rank(), nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    said = [_message(lambda: save(path, module, extra={"seen": torch.tensor([1.0, rank])}))]
    with torch.no_grad():
        module.bias[1] = rank
    return [*said, _message(lambda: save(path, module)), _message(lambda: save(path, module, extra={"epoch": rank}))]


def test_what_should_be_equal_on_all_ranks_but_is_not(gloo: Pool, tmp_path: Path) -> None:
    for seen, bias, _ in gloo.run(different_values, str(tmp_path / "a"), world=2, timeout=SECONDS):
        assert "extra/extra.seen is a plain tensor, and rank" in seen and "PerRank" in seen
        assert "bias is a plain tensor, and rank" in bias
    assert list(tmp_path.iterdir()) == []


def killed(rank: int, path: str, store: str) -> None:
    """Rank 1 is killed while it writes the second checkpoint; rank 0 must end with an error, and the first must load."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    module = Part({"w": distribute_tensor(torch.arange(64.0).reshape(8, 8), mesh, [Shard(0)])})
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.5)
    save(path + "/a", module, optimizer)
    said = _message(lambda: save(path + "/b", module, optimizer, disk=CountingDisk(3, kill) if rank else None))
    assert "the connection to another rank was lost" in said, said
    Path(path, "said").write_text(said)
    os._exit(0)


def test_a_rank_killed_while_saving(tmp_path: Path) -> None:
    context = get_context("spawn")
    ranks = [context.Process(target=killed, args=(r, str(tmp_path), str(tmp_path / "store"))) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
    assert [process.exitcode for process in ranks] == [0, -signal.SIGKILL]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "said", "store"]
    module = Part({"w": torch.zeros(8, 8)})
    load(tmp_path / "a", module, torch.optim.SGD(module.parameters(), momentum=0.5))
    assert torch.equal(module.get_parameter("w").detach(), torch.arange(64.0).reshape(8, 8))


def test_folders_above_a_checkpoint_are_made(tmp_path: Path) -> None:
    mp.checkpoint.save(tmp_path / "new" / "run" / "step-1", nn.Linear(2, 2))
    assert (tmp_path / "new" / "run" / "step-1" / "manifest.json").exists()
