"""ParallelConfig(compile=...): blocks are compiled once per structure, and compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import meshpar as mp
from meshpar.errors import ConfigError
from meshpar.runtime.compiled import compiled
from tests.models import text, tiny
from tests.pool import Pool

EAGER = {"backend": "aot_eager"}


def trained(mesh: str, compile: Any, settings: Mapping[str, Any], steps: int = 2) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses, gradients of the last step, and how many graphs were compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    devices, model = mp.make_mesh(mesh, "cpu"), tiny("llama")
    batch = mp.local_batch(text(), devices)
    pm = mp.parallelize(model, devices, example=batch, config=mp.ParallelConfig(compile=compile, **settings))
    losses = []
    for _ in range(steps):
        pm.zero_grad()
        losses.append(float(pm.train_step(**batch)))
    found = {name: mp.full_grad(p) for name, p in pm.named_parameters()}
    return losses, found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        ("dp=2", {"recompute": "full"}),
        ("tp=2", {"recompute": "selective"}),
        ("pp=2", {"microbatches": 2}),
    ],
    ids=["sharded data, all recomputed", "recomputed in part", "pipeline"],
)
def test_compiled_blocks_compute_the_same(gloo: Pool, mesh: str, settings: Mapping[str, Any]) -> None:
    """Llama's two layers are one structure: one compilation."""
    for plain, made in zip(*(gloo.run(trained, mesh, compile, settings, world=2, timeout=240) for compile in (False, EAGER)), strict=True):
        assert (plain[2], made[2]) == (0, 1)
        assert made[0] == pytest.approx(plain[0], rel=1e-6)
        for name, right in plain[1].items():
            torch.testing.assert_close(made[1][name], right, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_what_cannot_be_compiled_is_told() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    def code(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    with pytest.raises(ConfigError) as caught:
        compiled(code, {"backend": broken}, "model.layers.0")(torch.ones(2))
    for said in ("could not compile the code of block model.layers.0", "no compiler here", "Without compile= blocks run as they are"):
        assert said in str(caught.value)


def test_functions_of_one_code_object_are_compiled_each_for_itself() -> None:
    """torch gives a code object up after 8 variants; recompute wraps all blocks in one."""

    def scaled(by: int) -> Any:
        return lambda x: x * by

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for by in range(2, 14):
        assert compiled(scaled(by), {"backend": backend}, "")(torch.ones(2)).tolist() == [by, by]
    assert len(graphs) == 12


def test_simulated_ranks_run_as_they_are() -> None:
    with mp.simulate(2):
        assert trained("tp=2", True, {}, steps=1)[2] == 0


def test_arguments_are_those_of_torch_compile() -> None:
    with pytest.raises(ConfigError, match="compile={'modus': 'x'}: True, False, or a dict of arguments of torch.compile: backend, dynamic"):
        mp.ParallelConfig(compile={"modus": "x"})
