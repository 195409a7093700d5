"""What a layer keeps from forward to backward, on ranks: the closed form of `benchmarks/memory`, which has more models and meshes."""

from __future__ import annotations

from benchmarks.memory import run
from tests.pool import Pool

SHAPE = run.Shape(hidden=64, heads=4, kv=2, ffn=192, samples=2, length=64)
CASE = run.Case("llama", 2, True)


def kept() -> list[float]:
    """Bytes of a layer over tokens and hidden width, with the passes and without."""
    return [sum(one.values()) / SHAPE.unit for one in run.per_layer(CASE, SHAPE)]


def test_the_closed_form(gloo: Pool) -> None:
    closed = run.closed_form(CASE, SHAPE) / SHAPE.unit
    for measured, without in gloo.run(kept, world=2, timeout=120.0):
        assert closed <= measured < closed + 0.25, "a few numbers of each token and head"
        assert without > 1.3 * closed
