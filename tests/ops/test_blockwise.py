"""Plain attention by kernels that return the log-sum-exp: the same as in tiles; which pairs they compute; a kernel that is not exact."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meshpar.ops import blockwise, fused_attention, seen, tiles
from meshpar.ops.blockwise import attend_, attend_backward_
from meshpar.ops.pairings import Pairing, Sight, Stretch
from meshpar.ops.seen import apart, by_position
from meshpar.ops.tiles import ScoreStep, Scoring, nothing_yet

HEAD_TAIL = ((Stretch(0, 0, 96), Stretch(96, 288, 96)), (Stretch(0, 96, 96), Stretch(96, 192, 96)))
"""What two ranks hold of 384 positions."""
SINK: tuple[ScoreStep, ...] = (("times", 0.5), ("sink", 0))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...], bool]]]:
    """Of each call of a kernel: which way, the queries and keys, and whether it is causal."""
    made = list[tuple[str, tuple[int, ...], bool]]()

    def counted(q: Tensor, k: Tensor, v: Tensor) -> fused_attention.FusedAttention | None:
        found = fused_attention.fused_attention_for(q, k, v)
        if found is None:
            return None
        kernel = found

        def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
            made.append(("forward", (q.shape[2], k.shape[2]), causal))
            return kernel.forward(q, k, v, causal, scale)

        def backward(
            grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, causal: bool, scale: float
        ) -> tuple[Tensor, Tensor, Tensor]:
            made.append(("backward", (q.shape[2], k.shape[2]), causal))
            return kernel.backward(grad, q, k, v, out, norm, causal, scale)

        return fused_attention.FusedAttention(forward, backward)

    monkeypatch.setattr(blockwise, "fused_attention_for", counted)
    yield made


def ring(dtype: torch.dtype, scoring: Scoring, kv: int = 2, width: int = 8) -> list[Tensor]:
    """Results, sums of scores and gradients of the first rank's queries, which meet its own keys and then the other's."""
    numbers = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 192, n, width, generator=numbers, dtype=torch.float64).to(dtype).transpose(1, 2) for n in (4, kv, kv, 4)]
    q, k, v, grad = drawn
    others = [torch.randn(2, kv, 192, width, generator=numbers, dtype=torch.float64).to(dtype) for _ in range(2)]
    sink = torch.randn(1, 4, 1, 1, generator=numbers, dtype=torch.float64).to(dtype).expand(1, 4, 192, 1)
    operands = [sink] if scoring.sink_of([sink]) is not None else []
    out, norm = nothing_yet(q, width, scoring.sink_of(operands))
    meeting = [(k, v, Pairing(HEAD_TAIL[0], HEAD_TAIL[0]).numbers), (*others, Pairing(*HEAD_TAIL).numbers)]
    for key, value, pairings in meeting:
        attend_(q, key, value, operands, pairings, scoring.written, out, norm)
    found, delta = out.to(dtype), (out * grad).sum(-1)
    of_query = torch.zeros_like(out)
    gradients = [of_query]
    for key, value, pairings in meeting:
        sums = [tiles.wide(torch.zeros_like(x)) for x in (key, value)]
        rest = q, key, value, operands, pairings, scoring.written, grad, found, norm, delta
        attend_backward_(*rest, of_query, *sums, [torch.zeros(1)] * len(operands))
        gradients += sums
    return [out, norm.sum(-1), *gradients]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scoring", [Scoring(True, None, 0.3), Scoring(False, None, 0.3), Scoring(True, 100, 0.3, SINK)], ids=str)
def test_kernels_compute_what_tiles_do(dtype: torch.dtype, scoring: Scoring, calls: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    right = ring(torch.float64, replace(scoring)) if dtype != torch.float64 else None
    calls.clear()
    by_kernels = ring(dtype, scoring)
    assert calls
    with sdpa_kernel([SDPBackend.MATH]):
        calls.clear()
        in_tiles = ring(dtype, scoring)
        assert not calls, "torch was told to use no kernel"
    for one, other, exact in zip(by_kernels, in_tiles, right or in_tiles, strict=True):
        error, bound = float((one - exact).abs().max()), float((other - exact).abs().max())
        assert error <= 4 * bound + 8 * torch.finfo(dtype).eps * float(exact.abs().max())


def test_which_pairs_a_kernel_computes(calls: list[tuple[str, tuple[int, ...], bool]]) -> None:
    """Keys that all are seen are one block, those of the queries' own positions another; nothing is computed of what nobody sees."""
    ring(torch.float32, Scoring(True))
    own = [((96, 96), True), ((96, 96), False), ((96, 96), True)]
    assert [(shape, causal) for way, shape, causal in calls if way == "forward"] == [*own, ((96, 192), False)]
    assert [(shape, causal) for way, shape, causal in calls if way == "backward"] == [*own, ((96, 192), False)]


@pytest.mark.parametrize("window", [None, 40, 96, 200, 500])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_and_the_rest_are_all_pairs_that_are_seen(causal: bool, window: int | None) -> None:
    keys = (Stretch(0, 96, 96), Stretch(96, 0, 96), Stretch(192, 288, 70), Stretch(262, 358, 26))
    queries = (Stretch(0, 288, 70), Stretch(70, 96, 96), Stretch(166, 380, 30), Stretch(196, 0, 96), Stretch(292, 500, 64))
    sight = Sight(causal, window)
    at_of = [torch.cat([torch.arange(at, at + size) for _, at, size in several]) for several in (queries, keys)]
    behind = at_of[0][:, None] - at_of[1]
    shown = torch.ones_like(behind, dtype=torch.bool) if not causal and window is None else behind >= 0
    shown &= behind < (window or 10**6)
    found = torch.zeros_like(behind)
    pairing = Pairing(queries, keys)
    whole, rest = apart(pairing, by_position(pairing, sight))
    for (row, rows), (column, columns), diagonal in whole:
        block = torch.ones(rows, columns, dtype=torch.long)
        found[row : row + rows, column : column + columns] += block.tril() if diagonal else block
    for some in rest:
        for one in some.queries:
            for held, _, size in some.keys:
                part = slice(one.held, one.held + one.size), slice(held, held + size)
                found[part] += shown[part]
    assert torch.equal(found, shown.long())
    assert bool(whole) == (window != 40), "a window narrower than the blocks leaves none"


def test_what_is_added_to_scores_is_done_in_tiles(calls: list[object]) -> None:
    q, k, v = (torch.randn(1, 2, 128, 8) for _ in range(3))
    calls.clear()
    whole = Pairing((Stretch(0, 0, 128),), (Stretch(0, 0, 128),)).numbers
    for steps in (
        (("tanh",),),
        (("plus", 0),),
        (("by", 0),),
        (("times", 2.0), ("tanh",)),
        (("keep", 1, -1e9),),
        (("seen", 1), ("times", -1.0)),
    ):
        operands = [torch.ones(1, 1, 128, 128), torch.ones(1, 1, 128, 128, dtype=torch.bool)]
        attend_(q, k, v, operands, whole, Scoring(True, steps=steps).written, *nothing_yet(q, 8))
    short = Pairing((Stretch(0, 0, 63),), (Stretch(0, 0, 63),)).numbers
    attend_(q, k, v, [], short, Scoring(True).written, *nothing_yet(q, 8))
    attend_(q, k, v[..., :4], [], whole, Scoring(True).written, *nothing_yet(q, 4))  # of values that are narrower: torch has none
    assert not calls


S = 192
HELD = (Stretch(0, 0, 48), Stretch(48, 144, 48))
PAST = torch.arange(S)[:, None] >= torch.arange(S)
DOCUMENTS = torch.tensor([0] * 50 + [1] * 94 + [2] * 48)


def padded(side: str) -> Tensor:
    """`[3, S]`: nothing, some and much of it hidden."""
    at = torch.arange(S)
    return torch.stack([at >= 0, at < 150 if side == "right" else at >= 40, at < 20 if side == "right" else at >= 170])


def added(shown: Tensor, value: float = 0.0) -> Tensor:
    return torch.full(shown.shape, value, dtype=torch.float64).masked_fill(~shown, -torch.inf)


MASKS: dict[str, tuple[bool, tuple[ScoreStep, ...], list[Tensor]]] = {
    "of ones": (False, (("seen", 0),), [torch.ones(3, 1, 1, S, dtype=torch.bool)]),
    "of ones, causal": (True, (("seen", 0), ("times", 0.5)), [torch.ones(3, 1, 1, S, dtype=torch.bool)]),
    "causal": (False, (("seen", 0),), [PAST[None, None]]),
    "a prefix": (False, (("seen", 0),), [(PAST | (torch.arange(S) < 20))[None, None]]),
    "padding right": (True, (("seen", 0),), [padded("right")[:, None, None]]),
    "padding left and causal": (False, (("seen", 0),), [(padded("left")[:, None] & PAST)[:, None]]),
    "padding of queries": (False, (("seen", 0),), [padded("left")[:, None, :, None]]),
    "documents": (False, (("seen", 0),), [(PAST & (DOCUMENTS[:, None] == DOCUMENTS))[None, None]]),
    "two": (False, (("seen", 0), ("keep", 1, -torch.inf)), [padded("right")[:, None, None], PAST[None, None]]),
    "filled": (
        True,
        (("fill", 0, -torch.inf), ("sink", 1)),
        [~padded("left")[:, None, None], torch.randn(1, 4, S, 1, dtype=torch.float64)],
    ),
    "added": (True, (("plus", 0),), [added(padded("right")[:, None, None])]),
    "added, of heads": (False, (("plus", 0),), [added(torch.stack([PAST, PAST, PAST, PAST & (torch.arange(S) != 50)])[None])]),
    "added, and more": (True, (("plus", 0),), [added(padded("right")[:, None, None], 0.25)]),
    "added, nearly hidden": (True, (("plus", 0),), [added(padded("left")[:, None, None]).clamp(min=-3e38)]),
}
BY_KERNELS = {"of ones": 4, "of ones, causal": 4, "causal": 4, "padding right": 6, "padding left and causal": 5, "padding of queries": 6}
"""Calls, forward, for two stretches of 48 queries that meet their own keys and those of another rank, of three samples: one where they see
alike. Of causal attention: of the first its own keys, of the second those, the first's, and the other's."""


def masked(name: str) -> list[Tensor]:
    """Results, sums and gradients: first what a rank holds itself is met, then the rest."""
    causal, steps, operands = MASKS[name]
    numbers = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(3, n, S, 8, generator=numbers, dtype=torch.float64) for n in (4, 2, 2, 4))
    rows = torch.cat([torch.arange(at, at + size) for _, at, size in HELD])
    rest = torch.tensor([i for i in range(S) if i not in set(rows.tolist())])
    local = [x if x.shape[2] == 1 else x[:, :, rows] for x in operands]
    scoring = Scoring(causal, None, 0.3, steps)
    out, norm = nothing_yet(q[:, :, rows], 8, scoring.sink_of(local))
    meeting = [(rows, Pairing(HELD, HELD)), (rest, Pairing(HELD, (Stretch(0, 48, 96),)))]
    for at, pairing in meeting:
        attend_(q[:, :, rows], k[:, :, at], v[:, :, at], local, pairing.numbers, scoring.written, out, norm)
    grad = grad[:, :, rows]
    delta, of_query, found = (out * grad).sum(-1), torch.zeros_like(out), [out, norm.sum(-1)]
    for at, pairing in meeting:
        sums = [torch.zeros_like(x[:, :, at]) for x in (k, v)]
        rest_of = local, pairing.numbers, scoring.written, grad, out, norm, delta, of_query, *sums, [torch.zeros(1)] * len(local)
        attend_backward_(q[:, :, rows], k[:, :, at], v[:, :, at], *rest_of)
        found += sums
    return [*found, of_query]


@pytest.mark.parametrize("name", MASKS)
def test_what_masks_hide(name: str, calls: list[tuple[str, tuple[int, ...], bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that a mask leaves alone, or makes causal, are a kernel's, of each sample; those it hides nobody's."""
    monkeypatch.setattr(seen, "LEAST", 16)
    monkeypatch.setattr(seen, "MASKED", 48)
    calls.clear()
    found = masked(name)
    made = [way for way, *_ in calls]
    with sdpa_kernel([SDPBackend.MATH]):
        for x, y in zip(found, masked(name), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
    assert made.count("forward") == made.count("backward") == BY_KERNELS.get(name, made.count("forward"))
    assert bool(made) == (name != "added, and more")


def test_gradients_of_what_is_added_are_computed_in_tiles(calls: list[tuple[str, tuple[int, ...], bool]]) -> None:
    q, k, v = (torch.randn(1, 2, 128, 8, dtype=torch.float64) for _ in range(3))
    bias, whole = torch.zeros(1, 2, 128, 128, dtype=torch.float64), Pairing((Stretch(0, 0, 128),), (Stretch(0, 0, 128),)).numbers
    how = Scoring(True, None, 0.3, (("plus", 0),)).written
    (out, norm), of_bias = nothing_yet(q, 8), torch.zeros_like(bias)
    attend_(q, k, v, [bias], whole, how, out, norm)
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    attend_backward_(q, k, v, [bias], whole, how, torch.ones_like(out), out, norm, out.sum(-1), *sums, [of_bias])
    assert [way for way, *_ in calls] == ["forward"]
    weights = (q @ k.mT * 0.3).masked_fill(~torch.ones(128, 128).tril().bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(of_bias, weights * (v.sum(-1)[:, :, None] - out.sum(-1)[..., None]))


@pytest.mark.parametrize("wrong", ["results", "log-sum-exp", "gradients", "refuses"])
def test_a_kernel_that_does_not_compute_this_is_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = fused_attention._KERNELS["flash, cpu"]

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, norm = cpu.forward(q, k, v, causal, scale)
        return (out * 1.001, norm) if wrong == "results" else (out, norm * 1.4427) if wrong == "log-sum-exp" else (out, norm)

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if wrong == "refuses":
            raise RuntimeError("no kernel for this")
        own = cpu.forward(q, k, v, causal, scale) if wrong == "gradients" else (out, norm)  # as if there were no other keys
        return cpu.backward(grad, q, k, v, *own, causal, scale)

    monkeypatch.setitem(fused_attention._KERNELS, "flash, cpu", fused_attention.FusedAttention(forward, backward))
    fused_attention._proved.cache_clear()
    said = "cannot be called" if wrong == "refuses" else "not exact"
    with pytest.warns(UserWarning, match=said):
        found = ring(torch.float64, Scoring(True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        ring(torch.float64, Scoring(True))
    monkeypatch.undo()
    fused_attention._proved.cache_clear()
    with sdpa_kernel([SDPBackend.MATH]):
        in_tiles = ring(torch.float64, Scoring(True))
    assert all(torch.equal(x, y) for x, y in zip(found, in_tiles, strict=True))


def test_gradients_and_results_of_any_strides() -> None:
    q, k, v = (torch.randn(1, 2, 128, 8, dtype=torch.float64) for _ in range(3))
    whole, how = Pairing((Stretch(0, 0, 128),), (Stretch(0, 0, 128),)).numbers, Scoring(True).written
    out, norm = nothing_yet(q, 8)
    attend_(q, k, v, [], whole, how, out, norm)
    found = list[list[Tensor]]()
    for grad, result in ((torch.ones_like(out), out), (torch.ones((), dtype=out.dtype).expand_as(out), out.mT.contiguous().mT)):
        found.append([torch.zeros_like(x) for x in (q, k, v)])
        attend_backward_(q, k, v, [], whole, how, grad, result, norm, (out * grad).sum(-1), *found[-1], [])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_asking_draws_no_number() -> None:
    before = torch.get_rng_state()
    fused_attention._proved.cache_clear()
    assert fused_attention.fused_attention_for(*(torch.ones(1, 1, 64, 8) for _ in range(3))) is not None
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("name", "group"), [("flash", 1), ("flash", 2), ("efficient", 1)])
def test_operators_of_accelerators_take_these_arguments(name: str, group: int) -> None:
    """Their shapes, on `meta`: what they compute is seen on an accelerator, before they are used there."""
    q, k, v = (torch.empty(2, n, 70, 16, dtype=torch.bfloat16, device="meta") for n in (2 * group, 2, 2))
    kernel = fused_attention._KERNELS[name]
    out, norm = kernel.forward(q, k, v, True, 0.3)
    assert out.shape == q.shape and norm.shape == q.shape[:3] and norm.dtype == torch.float32
    assert [x.shape for x in kernel.backward(q, q, k, v, out, norm, True, 0.3)] == [x.shape for x in (q, k, v)]
