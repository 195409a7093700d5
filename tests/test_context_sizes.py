"""Context parallelism at the sizes of use: 131,072 tokens through blocks of a 70B model, on ranks and memory that are not here.

What is sent is compared with closed forms: b samples, s tokens, c context and t tensor ranks, h heads of queries and k of keys and values
of width d, numbers of e bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import nn

import meshpar as mp
from meshpar.dry_run.rehearsal import absent
from meshpar.mesh import parse_mesh

S, H, HEADS, D, E, LAYERS = 131072, 8192, 64, 128, 2, 2


def llama(kv: int, window: int | None = None, layers: int = LAYERS) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=H,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=kv,
        vocab_size=128256,
        max_position_embeddings=S,
        sliding_window=window,
    )
    with torch.device("meta"):
        return MistralForCausalLM(config).bfloat16()


def batch() -> dict[str, Any]:
    ids = torch.empty(1, S, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids}


@cache
def planned(mesh: str, kv: int, window: int | None, context: Any) -> tuple[str, tuple[tuple[str, str, float], ...]]:
    """The line of `explain()` about attention, and what the second block sends over cp."""
    with absent(mesh) as there:
        pm = mp.parallelize(llama(kv, window), there, config=mp.ParallelConfig(context=context), example=batch())
        (line,) = (line.split() for line in str(pm.explain()).splitlines() if "layers.*.self_attn  x2  " in line)
        sent = [c for c in pm.comms() if c.axis == "cp" and c.module.startswith("model.layers.1")]
        assert "Repeated on all 8 cp ranks: 0% of a rank's arithmetic" in str(pm.explain()) or "cp=8" not in mesh
    return line[2], tuple(sorted((c.kind, c.phase, c.nbytes) for c in sent))


def gather(c: int, t: int, kv: int) -> Iterator[tuple[str, str, float]]:
    """2 b (s/c) (k d/t) (c - 1) e forward; backward again for keys and values, and the same for their gradients."""
    nbytes = 2 * (S // c) * (kv * D // t) * (c - 1) * E
    yield "all_gather", "forward", nbytes
    yield "all_gather", "backward", nbytes
    yield "reduce_scatter", "backward", nbytes


def heads(c: int, t: int, kv: int) -> Iterator[tuple[str, str, float]]:
    """b (s/c) (h d/t) (c - 1)/c e of queries and results, (k d/t) of keys and values; backward the same of gradients."""
    for n in (HEADS, HEADS, kv, kv):
        for phase in ("forward", "backward"):
            yield "all_to_all", phase, (S // c) * (n * D // t) * (c - 1) // c * E


def ring(c: int, t: int, kv: int) -> Iterator[tuple[str, str, float]]:
    """2 b (s/c) (k d/t) e for each of c - 1 steps forward; backward again, and c steps of gradients."""
    step = 2 * (S // c) * (kv * D // t) * E
    yield "ring", "forward", (c - 1) * step
    yield "ring", "backward", (2 * c - 1) * step


def halo(c: int, t: int, kv: int, window: int) -> Iterator[tuple[str, str, float]]:
    """2 b (k d/t) e for each position that another rank reads, for each rank that reads it: of the rank with the most."""
    piece = S // (2 * c)
    held = [(r * piece, (2 * c - 1 - r) * piece) for r in range(c)]
    reads = [{p for first in pieces for p in range(first - window + 1, first)} for pieces in held]
    own = [{p for first in pieces for p in range(first, first + piece)} for pieces in held]
    rows = max(sum(len(own[r] & reads[other]) for other in range(c) if other != r) for r in range(c))
    if window <= piece and c > 2:
        assert rows == 2 * (window - 1)
    for phase in ("forward", "backward"):
        yield "halo", phase, rows * 2 * (kv * D // t) * E


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "mesh, kv, window, context, form",
    [
        ("cp=8,tp=8", 8, None, "auto", gather),  # fewer bytes while cp < heads / kv + 1
        ("cp=8,tp=8", 64, None, "auto", heads),
        ("cp=8,tp=8", 64, None, "gather", gather),
        ("cp=8,tp=8", 8, None, "ring", ring),
        ("cp=8,tp=8", 8, 4096, "auto", halo),
        ("cp=8,tp=8", 8, 4096, "ring", halo),
        ("cp=8,tp=8", 64, 40000, "ring", halo),  # longer than a piece: the positions before it are of several ranks
        ("cp=4,tp=2", 8, None, "heads", heads),
        ("cp=4,tp=2", 64, None, "ring", ring),
        ("cp=4,tp=2", 64, 40000, "ring", halo),
    ],
)
def test_bytes_are_the_closed_forms(mesh: str, kv: int, window: int | None, context: str, form: Any) -> None:
    c, t = parse_mesh(mesh).values()
    chosen, sent = planned(mesh, kv, window, context)
    assert chosen == form.__name__
    assert sent == tuple(sorted(form(c, t, kv, window) if form is halo else form(c, t, kv)))


def test_fewer_heads_than_ranks_are_not_dealt_out() -> None:
    """8 heads of keys and values over 8 tp ranks leave one for 8 cp ranks: it is gathered, and said so."""
    chosen, sent = planned("cp=8,tp=8", 8, None, "heads")
    assert chosen == "gather" and sent == planned("cp=8,tp=8", 8, None, "auto")[1]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("c", [2, 4])
@pytest.mark.parametrize("window", [2, 9])
def test_halo_counts_what_other_ranks_read(c: int, window: int) -> None:
    """Of two ranks one has both pieces in the middle, and reads what lies before the later one from itself."""
    with absent({"cp": c}) as there:
        pm = mp.parallelize(llama(8, window), there, config=mp.ParallelConfig(context="ring"), example=batch())
        sent = {c.nbytes for c in pm.comms() if c.kind == "halo"}
    assert sent == {nbytes for _, _, nbytes in halo(c, 1, 8, window)}


def test_a_plan_takes_seconds_and_names_the_memory_of_a_rank() -> None:
    """Of 20 layers; of all 80 `benchmarks/context` says."""
    layers = 20
    began = perf_counter()
    with absent("cp=8,tp=8") as there:
        pm = mp.parallelize(llama(8, layers=layers), there, config=mp.ParallelConfig(recompute="selective"), example=batch())
        took, memory = perf_counter() - began, pm.memory()
    assert took < 30
    block = (2 * H * H + 2 * H * 8 * D + 3 * H * 28672) // 64  # cut over tp, and shared out over cp
    table = 2 * (128256 * H) // 64
    assert memory.parameters == pytest.approx((layers * block + table) * E, rel=1e-3)
    stream, logits = S // 64 * H * E, S // 8 * 128256 // 8 * 4
    at_least = 2 + 2 + 1.25 + 1 + 14  # inputs of two norms and of two projections; q, k, v; attention's result; four of 3.5 H in the MLP
    assert layers * at_least * stream < memory.activations < layers * 27 * stream + 3 * logits  # (norms read float32)
