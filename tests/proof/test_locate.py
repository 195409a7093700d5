"""Faults that are planted are found where they are: the operation, the line, the axis and the conversion or rule."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshpar.compile.state.held import Held
from meshpar.config import ParallelConfig
from meshpar.graph.operators import OPERATORS
from meshpar.mesh import make_mesh
from meshpar.ops import collectives, vocab_parallel
from meshpar.proof.comparable import comparable
from meshpar.proof.locate import first_difference
from meshpar.proof.reference import Task
from meshpar.proof.verify import parallel, share, verify
from meshpar.sharding.local import LocalCall
from meshpar.sharding.rules import row
from meshpar.simulate import simulate
from tests.capture.models import GPT
from tests.proof.test_verify import Gate, ids, squares

Plant = Callable[[pytest.MonkeyPatch], None]


class _Doubled(torch.autograd.Function):
    """The identity, and twice the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def patched(where: Any, name: str, change: Callable[..., Any]) -> Plant:
    """Put `change(original, *args)` in place of a function."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = getattr(where, name)

        def planted(*args: Any, **kwargs: Any) -> Any:
            return change(original, *args, **kwargs)

        planted.__name__ = name
        patch.setattr(where, name, planted)

    return plant


def dropped(original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x.clone()


def doubled(original: Any, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs) * 2


def doubled_backward(original: Any, *args: Any, **kwargs: Any) -> Any:
    return _Doubled.apply(original(*args, **kwargs))


def flipped(original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return original(x, *args, **kwargs).flip(1)


def untouched(original: Any, *xs: Tensor, **kwargs: Any) -> Any:
    return xs


def wrong_softmax(patch: pytest.MonkeyPatch) -> None:
    for name in ("softmax", "_softmax"):
        patch.setitem(OPERATORS, name, replace(OPERATORS[name], rule=row("... c -> ... c")))  # it sums over c


def wrong_mean(patch: pytest.MonkeyPatch) -> None:
    original = OPERATORS["mean"].local
    assert original is not None

    def planted(call: LocalCall) -> None:
        original(call)
        call.scale = None if call.scale is None else call.scale * 3

    patch.setitem(OPERATORS, "mean", replace(OPERATORS["mean"], local=planted))


TENSOR = ParallelConfig(sequence_parallel=False)
GPT_FAULTS: dict[str, tuple[Plant, str, ParallelConfig, str]] = {
    "an all-reduce is missing": (
        patched(collectives, "p_to_i", dropped), "tp=2", TENSOR,
        r"^values part first in the conversion of linear in blocks.0.attention.out \(models.py:\d+\) from P to I on tp \(p_to_i\)",
    ),
    "a sum is twice as large": (
        patched(collectives, "p_to_s", doubled), "dp=2,tp=2", ParallelConfig(),
        r"^values part first in the conversion of embedding in tokens \(models.py:\d+\) from P to S\(1\) on tp",
    ),
    "ranks are gathered in another order": (
        patched(collectives, "s_to_r", flipped), "tp=2", ParallelConfig(),
        r"^values part first in the conversion of layer_norm in blocks.0.\S+ \(models.py:\d+\) from S\(1\) to R on tp \(s_to_r\)",
    ),
    "the all-reduce of a backward is missing": (
        patched(collectives, "i_to_r", dropped), "tp=2", TENSOR,
        r"^gradients part first behind the conversion of layer_norm in norm \(models.py:\d+\) from I to R on tp \(i_to_r\), on their way",
    ),
    "gradients are not summed over data ranks": (
        patched(collectives, "i_to_r_many", untouched), "dp=2", ParallelConfig(),
        r"^gradients part first behind the sum over dp of the gradients of blocks.\S+",
    ),
    "a backward is twice as large": (
        patched(collectives, "p_to_i", doubled_backward), "tp=2", TENSOR,
        r"^gradients part first behind the conversion of .* from P to I on tp \(p_to_i\)",
    ),
    "a vocabulary-parallel embedding": (
        patched(vocab_parallel, "embedding", doubled), "tp=2", TENSOR,
        r"^values part first in embedding in tokens \(models.py:\d+\), by its rule tp: I, S\(0\) -> P",
    ),
    "a vocabulary-parallel loss": (
        patched(vocab_parallel, "cross_entropy", doubled), "tp=2", TENSOR,
        r"^values part first in cross_entropy_loss in the model \(models.py:\d+\), by its rule tp: S",
    ),
    "the backward of a vocabulary-parallel loss": (
        patched(vocab_parallel, "cross_entropy", doubled_backward), "tp=2", TENSOR,
        r"^gradients part first behind cross_entropy_loss in the model \(models.py:\d+\)",
    ),
}  # fmt: skip


@pytest.mark.sweep(2)
@pytest.mark.parametrize("fault", GPT_FAULTS)
def test_a_fault_in_a_transformer(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, mesh, config, words = GPT_FAULTS[fault]
    plant(monkeypatch)
    report = verify(gpt(), mesh, ids(), config=config, steps=1)
    assert not report.ok
    (where,) = report.where
    assert re.search(words, where), where
    assert where in str(report)


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(width=16, heads=4, layers=2, vocab=38, length=8)  # (with one layer nothing would be cut)


def means(output: Tensor, batch: Any) -> Tensor:
    return output.pow(2).mean()


@pytest.mark.parametrize(
    ("plant", "mesh", "words"),
    [
        (wrong_softmax, "tp=2", r"^values part first in softmax in the model \(test_verify.py:\d+\), by its rule tp: S\(1\) -> S\(1\)"),
        (wrong_mean, "dp=2", r"^values part first in mean in the model.*, by its rule dp: S\(0\) -> P"),
    ],
)
def test_a_fault_in_a_rule(plant: Plant, mesh: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    report = verify(Gate(), mesh, (torch.randn(4, 8),), loss_fn=means, steps=1)
    assert not report.ok and re.search(words, report.where[0]), report


def test_a_fault_within_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    patched(collectives, "p_to_i", dropped)(monkeypatch)
    report = verify(gpt(), "pp=2,tp=2", ids(), config=ParallelConfig(sequence_parallel=False, microbatches=2), steps=1)
    assert not report.ok and "blocks.0.attention.out" in report.where[0], report


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x).square().mean() * self.calls


def test_what_changes_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter of the forward is carried on; were it not, two steps would show it."""
    assert verify(Counting(), "tp=2", (torch.randn(4, 8),)).ok
    monkeypatch.setattr(Held, "leave", lambda self: None)
    report = verify(Counting(), "tp=2", (torch.randn(4, 8),))
    assert not report.ok and "the first step agrees" in report.where[0], report
    assert verify(Counting(), "tp=2", (torch.randn(4, 8),), steps=1).ok  # one step does not see it


@pytest.mark.parametrize(("mesh", "microbatches"), [("dp=2,tp=2", 2), ("tp=2", 1)])
def test_nothing_is_found_in_a_right_program(mesh: str, microbatches: int) -> None:
    model = comparable(gpt(), dtype=torch.float64, perturb=0.02, seed=0)

    task = Task(model, (ids(),), ParallelConfig(microbatches=microbatches), None, None, torch.float64, 1e-9, 2)
    with simulate(4 if "dp" in mesh else 2):
        made = make_mesh(mesh, "cpu")
        pm, packed = parallel(task, made)
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        assert first_difference(pm, state, share(task.batches[0], made, packed=packed)) is None


def test_the_loss_of_these_tests() -> None:
    assert verify(Gate(), "dp=2,tp=2", (torch.randn(4, 8),), loss_fn=squares).raise_if_failed().where == ()
