"""memory(): shapes are exact, activations near what autograd keeps."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from meshpar.api import parallelize
from meshpar.cli.look import explained
from meshpar.config import ParallelConfig
from meshpar.mesh import make_mesh
from meshpar.passes import order
from meshpar.passes.tokens_in_pieces import CutTokensIntoPieces
from meshpar.report.memory import MemoryReport
from meshpar.runtime.model import ParallelModel
from meshpar.simulate import local_tensors, simulate
from tests.capture.models import GPT
from tests.models import text, tiny


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(width=32, heads=4, layers=8, vocab=64, length=16)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 64, (8, 16))
    return ids, ids


def report(mesh: str, **options: object) -> MemoryReport:
    return explained(model(), batch(), mesh, config=ParallelConfig(**options)).memory()  # type: ignore[arg-type]


def elements(pm: ParallelModel) -> int:
    return sum(p.to_local().numel() for p in pm.parameters())  # type: ignore[attr-defined]


def test_parameters_are_what_a_rank_holds() -> None:
    pm = explained(model(), batch(), "dp=2,tp=2")
    found = pm.memory()
    assert found.parameters == 4 * elements(pm)
    assert found.gradients == found.parameters and found.optimizer == 2 * found.parameters
    assert found.total == found.parameters + found.gathered + found.gradients + found.optimizer + found.activations


def test_what_the_modes_share_out() -> None:
    whole = report("dp=2", data_parallel="replicate")
    zero1, zero2, zero3 = (report("dp=2", data_parallel=mode) for mode in ("zero1", "zero2", "zero3"))
    assert whole.gathered == 0 and whole.optimizer == 2 * whole.parameters == 2 * whole.gradients
    assert zero1.gradients == whole.gradients and zero1.optimizer < whole.optimizer
    assert zero2.gradients < zero1.gradients and zero2.gathered == whole.parameters
    assert zero3.gathered < zero2.gathered and zero3.parameters == zero2.parameters


@pytest.mark.sweep(1)
@pytest.mark.parametrize("sequence", [True, False])
def test_activations_are_near_what_autograd_saves(sequence: bool) -> None:
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        first = local_tensors(x)[0]
        kept[first.untyped_storage().data_ptr()] = (first.untyped_storage().nbytes(), first)
        return x

    net, (ids, targets) = model(), batch()
    with simulate(2):
        pm = parallelize(net, make_mesh("tp=2", "cpu"), example=(ids, targets), config=ParallelConfig(sequence_parallel=sequence))
        held = {t.untyped_storage().data_ptr() for p in pm.parameters() for t in local_tensors(p.to_local()).values()}  # type: ignore[attr-defined]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            pm.train_step(ids, targets)
    measured = sum(size for place, (size, _) in kept.items() if place not in held)
    assert 0.7 < pm.memory().activations / measured < 1.4


def test_recompute_keeps_less() -> None:
    none, selective, full = (report("tp=2", recompute=kind).activations for kind in ("none", "selective", "full"))
    assert full < selective < none


def test_the_table() -> None:
    text = str(MemoryReport(1024, 0, 1024, 2048, 4096))
    assert text.splitlines()[0] == "Memory of a rank while it trains" and "8 KiB" in text.splitlines()[-1]


def test_experts_in_pieces_keep_what_they_keep_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the gathered tokens, of which a rank's own are left, and in what order they were dispatched."""
    found = {}
    for least in (0, 2**60):
        monkeypatch.setattr(order, "CutTokensIntoPieces", partial(CutTokensIntoPieces, least_bytes=least))
        pm = explained(tiny("mixtral"), text(), "tp=2", config=ParallelConfig(sequence_parallel=True))
        found[least] = pm.memory().activations
    tokens, width, choices, layers = 48, 64, 2, 2
    gathered, dispatched = tokens * width * 4 // 2, tokens * choices * 8
    assert found[2**60] - found[0] == layers * (gathered + dispatched)
