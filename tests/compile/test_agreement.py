"""Ranks that built things in another order: exact where nothing depends on it, refused with what differs where something does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import meshpar as mp
from meshpar.compile.agreement import agree_on_values
from meshpar.errors import PlanError
from tests.graph.orders import NAMES, OTHER, SAME, Base, Checked, Counted, Dropouts, Registered
from tests.pool import Pool


def order() -> tuple[str, ...]:
    return NAMES if dist.get_rank() == 0 else NAMES[::-1]


def made(kind: type[Base]) -> Base:
    """The same model on every rank, but for the order."""
    torch.manual_seed(0)
    values = kind(NAMES).state_dict()
    model = kind(order())
    model.load_state_dict(values)
    return model


def checked(kinds: list[type[Base]], mesh: str) -> list[str]:
    torch.manual_seed(1)
    x = torch.randn(4, 8)
    return [f"{kind.__name__} {mp.verify(made(kind), mp.make_mesh(mesh), (x,)).ok}" for kind in kinds]


CERTAIN = [kind for kind in SAME if kind is not Dropouts]
"""Where chance decides, there is no single number to compare with."""


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mesh, kinds", [("tp=2", CERTAIN[::2]), ("tp=2", CERTAIN[1::2]), ("dp=2", [Registered, Counted, Checked])])
def test_exact_where_nothing_depends_on_the_order(gloo: Pool, mesh: str, kinds: list[type[Base]]) -> None:
    for found in gloo.run(checked, kinds, mesh, world=2, timeout=240):
        assert found == [f"{kind.__name__} True" for kind in kinds]


def dropped() -> list[float]:
    """What ranks of other orders drop in two steps, then what ranks of one order drop."""
    losses = []
    for order_ in (order(), NAMES):
        torch.manual_seed(0)
        pm = mp.parallelize(Dropouts(order_), mp.make_mesh("tp=2"), example=(torch.ones(4, 8),))
        losses += [float(pm(torch.ones(4, 8)).detach()) for _ in range(2)]
    return losses


def test_what_is_dropped_does_not_depend_on_the_order(gloo: Pool) -> None:
    first, second = gloo.run(dropped, world=2, timeout=120)
    assert first == second and first[:2] == first[2:] and first[0] != first[1]


def refused(kinds: list[type[Base]]) -> list[str]:
    messages = []
    for kind in kinds:
        try:
            mp.parallelize(made(kind), mp.make_mesh("tp=2"), example=(torch.ones(4, 8),))
            messages.append("parallelized")
        except PlanError as error:
            messages.append(str(error))
    return messages


def test_the_first_lines_that_differ_are_shown(gloo: Pool) -> None:
    for messages in gloo.run(refused, list(OTHER), world=2, timeout=120):
        for message in messages:
            assert "the model's captured graph differs between ranks: rank 1 of 2 differ" in message
            assert "for name in sorted(names)" in message
        assert "rank 0: linear(linear of orders.py:" in messages[0] or "rank 0: layers" in messages[0]
        assert "number 0: " in messages[1]


class Built(nn.Module):
    """Modules that draw their values in the order of the names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.kinds[name](x) for name in NAMES]).square().mean()


def initialised(same_seed: bool, under_meta: bool) -> str:
    torch.manual_seed(0 if same_seed else dist.get_rank())
    with mp.meta() if under_meta else torch.device("cpu"):
        model = Built(order() if same_seed else NAMES)
    try:
        mp.parallelize(model, mp.make_mesh("dp=2"), example=(torch.ones(4, 8),))
    except PlanError as error:
        return str(error)
    return "parallelized"


@pytest.mark.parametrize("under_meta", [False, True])
@pytest.mark.parametrize("same_seed", [False, True])
def test_other_initial_values_are_refused(gloo: Pool, same_seed: bool, under_meta: bool) -> None:
    for message in gloo.run(initialised, same_seed, under_meta, world=2, timeout=180):
        assert "the initial state of the model differs between ranks" in message and "chunk.weight: " in message, message
        assert "torch.manual_seed with the same number" in message


class Buffered(nn.Module):
    """One buffer that a file of weights holds, and one that it does not, which nothing random gives its values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("noise", torch.randn(8))
        self.register_buffer("table", torch.empty(8), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * self.noise + self.table).square().mean()


BUILT = {"memory": lambda: torch.device("cpu"), "recorded": mp.meta, "meta": lambda: torch.device("meta")}


def filled(path: str) -> list[float]:
    losses = []
    for under in BUILT.values():
        torch.manual_seed(dist.get_rank())
        with under():
            model = Buffered()
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=(torch.ones(4, 8),), weights=path)
        losses.append(float(pm(torch.ones(4, 8)).detach()))
    return losses


def test_values_that_come_from_a_file_may_differ(gloo: Pool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.manual_seed(5)
    model = Buffered()
    save_file(model.state_dict(), path)
    for losses in gloo.run(filled, str(path), world=2, timeout=180):
        assert losses == pytest.approx([float(model(torch.ones(4, 8)).detach())] * 3)


def unfilled(path: str) -> str:
    """A buffer that differs, and is not in the file."""
    torch.manual_seed(0)
    model = Buffered()
    model.table.add_(dist.get_rank())
    try:
        mp.parallelize(model, mp.make_mesh("tp=2"), example=(torch.ones(4, 8),), weights=path)
    except PlanError as error:
        return str(error)
    return "parallelized"


def test_a_buffer_that_is_in_no_file_must_be_one(gloo: Pool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(Buffered().state_dict(), path)
    for message in gloo.run(unfilled, str(path), world=2, timeout=120):
        assert "the initial state of the model differs between ranks" in message and "rank 1: table: " in message, message


def constants(amount: int) -> str:
    """Nothing random, but a number that is not the same on both ranks."""
    with mp.meta():
        model = nn.Linear(8, 1)
        nn.init.constant_(model.weight, 1.0 + amount * dist.get_rank())
        nn.init.zeros_(model.bias)
    try:
        mp.parallelize(model, mp.make_mesh("dp=2"), example=(torch.ones(4, 8),), loss_fn=lambda out, batch: out.mean())
    except PlanError as error:
        return str(error)
    return "parallelized"


@pytest.mark.parametrize("amount, told", [(0, "parallelized"), (1, "weight: to be initialised")])
def test_what_is_recorded_is_compared(gloo: Pool, amount: int, told: str) -> None:
    assert all(told in message for message in gloo.run(constants, amount, world=2, timeout=120))


def test_fake_ranks_compare_nothing() -> None:
    """One process stands for all: there is nobody to ask."""
    with mp.simulate(2):
        agree_on_values(Buffered(), mp.make_mesh("dp=2"))


def orders_of_parameters() -> tuple[list[str], torch.Tensor]:
    pm = mp.parallelize(made(Registered), mp.make_mesh("dp=2"), example=(torch.ones(4, 8),))
    for _ in range(2):
        pm(torch.ones(4, 8)).backward()
        mp.clip_grad_norm_(pm.parameters(), 1.0)
    return [name for name, _ in pm.named_parameters()], mp.full_tensor(dict(pm.named_parameters())["kinds.near.weight"])


def test_parameters_are_in_the_order_of_the_first_rank(gloo: Pool) -> None:
    """What data parallelism gathers lies in that order on every rank."""
    (first, value), (second, other) = gloo.run(orders_of_parameters, world=2, timeout=180)
    assert first == second == [name for name, _ in Registered(NAMES).named_parameters()]
    torch.manual_seed(0)
    assert torch.equal(value, other) and torch.equal(value, Registered(NAMES).state_dict()["kinds.near.weight"])


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import meshpar as mp
from benchmarks.hash_seeds.run import texts
from tests.graph.orders import NAMES, SAME
print(hash("full"))
for kind in SAME:
    torch.manual_seed(0)
    model = kind([name for name in NAMES])
    model.order = set(NAMES)
    found = texts(model, {"x": torch.ones(4, 8)}, "dp=2,tp=2")
    print(kind.__name__, [hash_ for hash_ in map(__import__("zlib").crc32, (str(found[p]).encode() for p in ("graph", "plan", "code")))])
"""


def test_processes_that_order_sets_in_their_own_way() -> None:
    root = str(Path(__file__).parents[2])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, root], env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True, cwd=root
        )
        for seed in ("1", "2")
    ]
    first, second = (process.communicate(timeout=300)[0].splitlines() for process in started)
    assert first[0] != second[0] and len(first) == len(SAME) + 1
    assert first[1:] == second[1:]
