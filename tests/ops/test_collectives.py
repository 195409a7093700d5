"""Every conversion against what its types mean, forward and gradient, for every kind of layout, on simulated and on gloo ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meshpar._torch import FakeStore
from meshpar.ops import collectives as ops
from meshpar.ops import primitives
from meshpar.sharding.conversions import CONVERSIONS
from meshpar.simulate import local_tensors, per_rank, simulate
from tests.ops.layouts import LAYOUTS, SHAPE, Layout, only, part
from tests.pool import Pool

Ranked = list[Tensor]
"""A value by rank."""


def values(kind: str, seed: int, size: int, layout: Layout | None = None) -> Ranked:
    """Random local tensors of a value of type I, R, P, or S of `layout`; gradients of R and P are made as P and I."""
    draw = torch.Generator().manual_seed(seed)
    make = partial(torch.randn, SHAPE, dtype=torch.float64, generator=draw)
    if kind == "P":
        return [make() for _ in range(size)]
    whole = make()
    return [whole if kind in "IR" else part(whole, layout, size, rank) for rank in range(size)]


def first(xs: Ranked) -> Ranked:
    return [x if rank == 0 else torch.zeros_like(x) for rank, x in enumerate(xs)]


def total(xs: Ranked) -> Ranked:
    return [sum(xs[1:], xs[0])] * len(xs)


def sliced(xs: Ranked, layout: Layout) -> Ranked:
    return [part(x, layout, len(xs), rank) for rank, x in enumerate(xs)]


def padded(xs: Ranked, layout: Layout) -> Ranked:
    """Own slice in place, zeros elsewhere."""
    whole = whole_of(xs, layout)
    return [only(whole, layout, len(xs), rank) for rank in range(len(xs))]


def whole_of(xs: Ranked, layout: Layout) -> Tensor:
    place = torch.arange(torch.Size(SHAPE).numel()).view(SHAPE)
    whole = xs[0].new_zeros(SHAPE).view(-1)
    for rank, x in enumerate(xs):
        whole[part(place, layout, len(xs), rank).reshape(-1)] = x.reshape(-1)
    return whole.view(SHAPE)


def gathered(xs: Ranked, layout: Layout) -> Ranked:
    return [whole_of(xs, layout)] * len(xs)


def same(xs: Ranked) -> Ranked:
    return xs


# conversion: (type in, type out, forward, backward) on lists of local tensors; the gradient of R is P, that of P is I.
WITHOUT_LAYOUT: dict[str, tuple[str, str, Callable[[Ranked], Ranked], Callable[[Ranked], Ranked]]] = {
    "i_to_r": ("I", "R", same, total),
    "i_to_p": ("I", "P", first, same),
    "r_to_i": ("R", "I", same, first),
    "r_to_p": ("R", "P", first, first),
    "p_to_i": ("P", "I", total, same),
    "p_to_r": ("P", "R", total, total),
}
WITH_LAYOUT: dict[str, tuple[str, str, Callable[..., Ranked], Callable[..., Ranked]]] = {
    "i_to_s": ("I", "S", sliced, gathered),
    "r_to_s": ("R", "S", sliced, padded),
    "p_to_s": ("P", "S", lambda xs, layout: sliced(total(xs), layout), gathered),
    "s_to_i": ("S", "I", gathered, sliced),
    "s_to_r": ("S", "R", gathered, lambda gs, layout: sliced(total(gs), layout)),
    "s_to_p": ("S", "P", padded, sliced),
}
DUAL = {"I": "I", "R": "P", "P": "I", "S": "S"}
"""The type of a value's gradient."""


def cases(size: int) -> list[tuple[str, tuple[Any, ...], Ranked, Ranked, Ranked, Ranked]]:
    """(conversion, layout arguments, inputs, output gradients, expected outputs, expected input gradients)."""
    found = []
    for name, (before, after, forward, backward) in WITHOUT_LAYOUT.items():
        x, g = values(before, 1, size), values(DUAL[after], 2, size)
        found.append((name, (), x, g, forward(x), backward(g)))
    for name, (before, after, forward, backward) in WITH_LAYOUT.items():
        for layout in LAYOUTS.values():
            x, g = values(before, 1, size, layout), values(DUAL[after], 2, size, layout)
            found.append((name, layout, x, g, forward(x, layout), backward(g, layout)))
    for i, layout in enumerate(LAYOUTS.values()):
        for other in list(LAYOUTS.values())[i % 2 :: 2]:  # every other pair: the property below draws from all
            x, g = values("S", 1, size, layout), values("S", 2, size, other)
            found.append(("s_to_s", (*layout, *other), x, g, sliced(gathered(x, layout), other), sliced(gathered(g, other), layout)))
    return found


def axis(rank: int = -1) -> dict[str, Any]:
    return {"group": dist.group.WORLD.group_name, "size": dist.get_world_size(), "rank": rank}


def spread(xs: Ranked) -> Tensor:
    return per_rank(lambda rank: xs[rank])


@pytest.mark.sweep(2)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_conversion_means_what_its_types_say_on_simulated_ranks(size: int) -> None:
    table = cases(size)
    with simulate(size):
        for name, layout, xs, gs, ys, dxs in table:
            x = spread(xs).requires_grad_()
            kept = [t.clone() for t in xs]
            y = getattr(ops, name)(x, *layout, **axis())
            (dx,) = torch.autograd.grad(y, x, spread(gs))
            for rank in range(size):
                where = f"{name}{layout} rank {rank} of {size}"
                torch.testing.assert_close(local_tensors(y)[rank], ys[rank], rtol=1e-13, atol=0, msg=where)
                torch.testing.assert_close(local_tensors(dx)[rank], dxs[rank], rtol=1e-13, atol=0, msg=f"gradient of {where}")
                assert xs[rank].equal(kept[rank]), f"{where} changed its input"


def convert_on_a_real_rank(some: str) -> list[str]:
    """The conversions that are wrong on this rank."""
    rank, size, wrong = dist.get_rank(), dist.get_world_size(), []
    for name, layout, xs, gs, ys, dxs in cases(size):
        if (name == "s_to_s") != (some == "s_to_s"):
            continue
        x = xs[rank].clone().requires_grad_()
        y = getattr(ops, name)(x, *layout, **axis(rank))
        (dx,) = torch.autograd.grad(y, x, gs[rank])
        if not (y.allclose(ys[rank]) and dx.allclose(dxs[rank]) and y.shape == ys[rank].shape and x.equal(xs[rank])):
            wrong.append(f"{name}{layout}")
    return wrong


@pytest.mark.sweep(2)
@pytest.mark.parametrize("some", ["s_to_s", "others"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_conversion_on_gloo_ranks(gloo: Pool, size: int, some: str) -> None:
    assert gloo.run(convert_on_a_real_rank, some, world=size) == [[]] * size


DTYPES = [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.complex64]


def move_every_dtype() -> list[str]:
    rank, size, wrong = dist.get_rank(), dist.get_world_size(), []
    for dtype in DTYPES:
        whole = (torch.arange(96) % 5).view(12, 8).to(dtype)
        for name in ("plain", "uneven segments", "repeat"):
            layout, other = LAYOUTS[name], LAYOUTS["uneven heads"]
            mine = part(whole, layout, size, rank)
            moved = ops.s_to_s(mine, *layout, *other, **axis(rank))
            if not (ops.s_to_i(mine, *layout, **axis(rank)).equal(whole) and moved.equal(part(whole, other, size, rank))):
                wrong.append(f"{dtype} {name}")
        if dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64) and not ops.p_to_i(whole, **axis(rank)).equal(whole * size):
            wrong.append(f"sum of {dtype}")
    return wrong


def test_every_dtype_moves_on_gloo_ranks(gloo: Pool) -> None:
    assert gloo.run(move_every_dtype, world=2) == [[], []]


def test_integers_and_no_grad_skip_autograd() -> None:
    layout = LAYOUTS["repeat"]
    with simulate(2):
        x = spread(values("S", 1, 2, layout)).requires_grad_()
        assert ops.s_to_r(x, *layout, **axis()).grad_fn is not None
        with torch.no_grad():
            assert ops.s_to_r(x, *layout, **axis()).grad_fn is None
        ids = per_rank(lambda rank: torch.arange(6) + 6 * rank)
        for t in local_tensors(ops.s_to_i(ids, 0, 1, ((12, 1),), **axis())).values():
            assert t.equal(torch.arange(12))


def test_an_axis_of_one_rank_is_the_identity() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    nowhere: dict[str, Any] = {"group": "", "size": 1, "rank": 0}
    for name in WITHOUT_LAYOUT:
        assert getattr(ops, name)(x, **nowhere) is x
    for name in WITH_LAYOUT:
        assert getattr(ops, name)(x, *LAYOUTS["repeat"], **nowhere) is x
    assert ops.s_to_s(x, *LAYOUTS["repeat"], *LAYOUTS["heads"], **nowhere) is x
    assert ops.i_to_r_many(x, x, **nowhere) == (x, x)


def test_a_slice_does_not_keep_the_whole_alive() -> None:
    with simulate(2):
        whole = per_rank(lambda _: torch.zeros(SHAPE))
        for t in local_tensors(ops.i_to_s(whole, *LAYOUTS["plain"], **axis())).values():
            assert t.untyped_storage().nbytes() == whole.numel() // 2 * 4


def test_many_gradients_are_added_in_one_all_reduce_per_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[torch.dtype] = []
    real = ops.all_reduce
    monkeypatch.setattr(ops, "all_reduce", lambda x, *rest: sums.append(x.dtype) or real(x, *rest))
    with simulate(3):
        q, k, v, unused = (spread([torch.full((n,), 2.0, dtype=dtype)] * 3).requires_grad_() for n, dtype in FOUR)
        index, frozen = torch.arange(3), torch.ones(2)
        a, b, c, _, same_index, same_frozen = ops.i_to_r_many(q, k, v, unused, index, frozen, **axis())
        assert same_index is index and same_frozen is frozen
        scale = per_rank(lambda rank: torch.tensor(rank + 1.0))
        ((a * scale).sum() + (2 * b * scale).sum() + (c * scale).sum()).backward()
        assert sorted(map(str, sums)) == ["torch.float32", "torch.float64"]
        for x, expected in ((q, 6.0), (k, 12.0), (v, 6.0)):
            for grad in local_tensors(x.grad).values():
                assert grad.tolist() == [expected] * x.numel()
        assert unused.grad is None


FOUR = ((2, torch.float32), (3, torch.float32), (4, torch.float64), (5, torch.float32))


def test_groups_of_an_inner_and_an_outer_axis() -> None:
    """On a 2 x 3 mesh each axis adds over its own ranks only."""
    with simulate(6):
        mesh = dist.init_device_mesh("cpu", (2, 3), mesh_dim_names=("dp", "tp"))
        x = per_rank(lambda rank: torch.tensor([10.0**rank]))
        for name, size, expected in (("dp", 2, [1001, 10010, 100100] * 2), ("tp", 3, [111] * 3 + [111000] * 3)):
            group = mesh.get_group(name).group_name
            y = ops.p_to_i(x, group=group, size=size, rank=-1)
            assert [int(t) for t in local_tensors(y).values()] == expected
            own = ops.i_to_s(per_rank(lambda _: torch.arange(6)), 0, 1, ((6, 1),), group=group, size=size, rank=-1)
            place = [rank // 3 if name == "dp" else rank % 3 for rank in range(6)]
            assert [t[0].item() for t in local_tensors(own).values()] == [6 // size * p for p in place]


def test_a_value_made_outside_the_simulation_counts_once_per_rank() -> None:
    x = torch.ones(2, requires_grad=True)
    with simulate(3):
        y = ops.p_to_i(x.detach(), **axis())
        assert all(t.tolist() == [3, 3] for t in local_tensors(y).values())


def test_second_derivatives_are_refused() -> None:
    with simulate(2):
        x = spread(values("P", 1, 2)).requires_grad_()
        y = (ops.p_to_r(x, **axis()) ** 2).sum()
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(y, x, create_graph=True)


# ------------------------------------------------------------------------------------------------------------------ properties


@st.composite
def layouts(draw: st.DrawFn, dims: int = 2) -> Layout:
    repeat = draw(st.integers(1, 3))
    segments = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), min_size=1, max_size=3))
    return draw(st.integers(0, dims - 1)), repeat, tuple(segments)


def length(layout: Layout) -> int:
    return layout[1] * sum(units * unit for units, unit in layout[2])


@settings(max_examples=60, deadline=None)
@given(layouts(), layouts(), st.integers(2, 5))
def test_any_layout_to_any_other_is_the_slice_of_the_whole(here: Layout, there: Layout, size: int) -> None:
    if here[0] == there[0]:
        there = (here[0], 1, ((length(here), 1),)) if length(here) != length(there) else there
    shape = [2, 3]
    shape[here[0]], shape[there[0]] = length(here), length(there)
    whole = torch.randn(shape, dtype=torch.float64)
    with simulate(size):
        invariant = per_rank(lambda _: whole)
        x = ops.i_to_s(invariant, *here, **axis())
        back = ops.s_to_i(x, *here, **axis())
        moved = ops.s_to_s(x, *here, *there, **axis())
        again = ops.s_to_s(moved, *there, *here, **axis())
        for rank in range(size):
            assert local_tensors(back)[rank].equal(whole)
            assert local_tensors(moved)[rank].equal(part(whole, there, size, rank))
            assert local_tensors(again)[rank].equal(local_tensors(x)[rank])


PAIRS = [(name, before, after) for name, (before, after, *_) in {**WITHOUT_LAYOUT, **WITH_LAYOUT}.items()]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PAIRS), layouts(1), st.integers(2, 4))
def test_the_two_halves_of_a_pair_are_adjoint(pair: tuple[str, str, str], layout: Layout, size: int) -> None:
    """<A x, y> = <x, A^T y>, where a value and its gradient meet as their types say."""
    name, before, after = pair
    shape = (length(layout), 2)

    def make(kind: str) -> Ranked:
        whole = torch.randn(shape, dtype=torch.float64)
        if kind == "P":
            return [torch.randn(shape, dtype=torch.float64) for _ in range(size)]
        return [part(whole, layout, size, rank) if kind == "S" else whole for rank in range(size)]

    def inner(kind: str, x: Ranked, grad: Ranked) -> float:
        pairs = [float((a * b).sum()) for a, b in zip(x, grad)]
        return pairs[0] if kind == "I" else sum(pairs)  # R meets P, P meets I and S meets S in a sum over ranks; I meets I once

    xs, gs = make(before), make(DUAL[after])
    with simulate(size):
        x = spread(xs).requires_grad_()
        y = getattr(ops, name)(x, *(layout if name in WITH_LAYOUT else ()), **axis())
        (dx,) = torch.autograd.grad(y, x, spread(gs))
        left = inner(after, list(local_tensors(y).values()), gs)
        right = inner(before, xs, list(local_tensors(dx).values()))
    assert left == pytest.approx(right, rel=1e-10, abs=1e-10)


# --------------------------------------------------------------------------------------------------- shapes only, and compilers


@pytest.fixture
def fake_group() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)


def every_conversion(x: Tensor, sizes: tuple[int, int] = (8, 8)) -> Tensor:
    """A chain through all of them; `x` is this rank's slice of dim 0 of a tensor of `sizes`."""
    rows, columns = (0, 1, ((sizes[0], 1),)), (1, 1, ((sizes[1], 1),))
    at = axis(1)
    y = ops.s_to_r(x, *rows, **at)
    y = ops.p_to_s(y, *columns, **at)
    y = ops.s_to_s(y, *columns, *rows, **at)
    y = ops.i_to_s(ops.s_to_i(y, *rows, **at), *columns, **at)
    y = ops.p_to_r(ops.s_to_p(y, *columns, **at), **at)
    y = ops.p_to_i(ops.r_to_p(y, **at), **at)
    y = ops.r_to_s(ops.i_to_r(y, **at), *rows, **at)
    a, b = ops.i_to_r_many(y, y * 2, **at)
    return ops.r_to_i(a, **at).sum() + ops.i_to_p(b, **at).sum()


@pytest.mark.parametrize("sizes", [(8, 8), (5, 6)], ids=["even", "uneven"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_without_values(fake_group: None, device: str, sizes: tuple[int, int]) -> None:
    x = torch.ones(2, sizes[1], device=device, requires_grad=True)
    every_conversion(x, sizes).backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.sweep(1)
@pytest.mark.parametrize("sizes", [(8, 8), (5, 6)], ids=["even", "uneven"])
def test_compiles_into_one_graph(fake_group: None, sizes: tuple[int, int]) -> None:
    torch.compiler.reset()  # else the sizes of the run before become symbols, those of layouts too
    x = torch.randn(2, sizes[1], requires_grad=True)
    compiled = torch.compile(partial(every_conversion, sizes=sizes), fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(every_conversion(x, sizes), x)
    (found,) = torch.autograd.grad(compiled(x), x)
    assert found.equal(expected)


# ----------------------------------------------------------------------------------------------------------------------- traffic


def test_the_table_of_conversions_says_which_collectives_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table and the functions cannot drift apart."""
    ran: list[str] = []
    real = primitives.begin
    monkeypatch.setattr(primitives, "begin", lambda op, *args: ran.append(op._schema.name.split("::")[1]) or real(op, *args))
    names = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter", "all_to_all_single": "all_to_all"}
    sent = {c.op: (c.forward, c.backward) for c in CONVERSIONS.values()}
    table = cases(2)
    with simulate(2):
        for name, layout, xs, gs, *_ in table:
            ran.clear()
            x = spread(xs).requires_grad_()
            torch.autograd.grad(getattr(ops, name)(x, *layout, **axis()), x, spread(gs))
            stays = name == "s_to_s" and layout[:3] == layout[3:]
            expected = [] if stays else [kind for kind in sent[name] if kind is not None]
            assert [names.get(op, op) for op in ran] == expected, (name, layout)
