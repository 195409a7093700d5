"""The expert all-to-all against the same operators on one device: the same bits, gradients included."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import meshpar as mp
from meshpar._torch import FakeStore, FakeTensorMode, TorchDispatchMode, functional
from meshpar.errors import ConfigError
from meshpar.ops import expert_all_to_all, experts
from meshpar.runtime import recompute
from meshpar.simulate import local_tensors, per_rank, simulate
from tests.pool import Pool

H, O = 3, 4
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def problem(tokens: int, num_experts: int, k: int, dtype: torch.dtype, skew: float = 0.0) -> list[Tensor]:
    """Hidden states, chosen experts, router weights, expert matrices. With skew 1 all choose the last k experts."""
    score = torch.rand(tokens, num_experts) * (1 - skew) + skew * torch.arange(num_experts)
    hidden, weights = torch.randn(tokens, H), torch.rand(tokens, k)
    return [hidden.to(dtype), score.topk(k).indices, weights.to(dtype), torch.randn(num_experts, H, O).to(dtype)]


def one_device(hidden: Tensor, index: Tensor, weights: Tensor, w: Tensor) -> Tensor:
    x, offsets, perm = experts.dispatch(hidden, index, w.shape[0])
    return experts.combine(experts.grouped_mm(x, w, offsets), perm, weights)


def layer(hidden: Tensor, index: Tensor, weights: Tensor, w: Tensor, num_experts: int, group: Any = None, **options: Any) -> Tensor:
    rows, offsets, dispatched = expert_all_to_all.dispatch(hidden, index, num_experts, group, **options)
    return expert_all_to_all.combine(experts.grouped_mm(rows, w, offsets), dispatched, weights)


def with_gradients(fn: Callable[..., Tensor], hidden: Tensor, index: Tensor, weights: Tensor, w: Tensor, *args: Any) -> list[Tensor]:
    """The output, and the gradients of a nonlinear function of it for everything that has one."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weights, w)]
    out = fn(leaves[0], index, leaves[1], leaves[2], *args)
    (out.double() ** 2).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def cut(x: Tensor, tokens: Sequence[int], rank: int) -> Tensor:
    return x.split(list(tokens))[rank]


def shares(whole: list[Tensor], tokens: Sequence[int], rank: int) -> list[Tensor]:
    """What a rank has of a problem: its tokens, and its experts."""
    *by_token, w = whole
    return [*(cut(x, tokens, rank) for x in by_token), w.chunk(len(tokens))[rank]]


def simulated(whole: list[Tensor], tokens: Sequence[int], fn: Callable[..., Tensor] = layer, **options: Any) -> list[Tensor]:
    """Output and gradients of simulated ranks with `tokens` tokens each, put together."""
    with simulate(len(tokens)):
        local = per_rank(lambda rank: tuple(shares(whole, tokens, rank)))
        found = with_gradients(lambda *args: fn(*args, whole[3].shape[0], **options), *local)
        return [torch.cat(list(local_tensors(x).values())) for x in found]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for name, a, b in zip(("output", "hidden", "weights", "experts"), found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{name}: {(a - b).abs().max()}"


# ------------------------------------------------------------------------------------------------------------ on simulated ranks


def test_the_picture() -> None:
    with simulate(2):
        x = per_rank(lambda rank: torch.tensor([[10.0 * e + rank] for e in range(4)]))
        axis = {"group": dist.group.WORLD.group_name, "size": 2, "rank": -1}
        rows, offsets, route = expert_all_to_all.exchange(x, torch.arange(1, 5, dtype=torch.int32), **axis)
        assert [r.flatten().tolist() for r in local_tensors(rows).values()] == [[0, 1, 10, 11], [20, 21, 30, 31]]
        assert [o.tolist() for o in local_tensors(offsets).values()] == [[2, 4]] * 2
        assert all(o.dtype == torch.int32 for o in local_tensors(offsets).values())
        back = local_tensors(expert_all_to_all.exchange_back(rows, route, **axis))
        assert all(torch.equal(back[rank], x) for rank, x in local_tensors(x).items())


@pytest.mark.sweep(21)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "k"),
    [
        ((5, 5), 4, 2),
        ((5, 3), 2, 1),
        ((0, 7), 6, 3),
        ((4, 0, 1), 6, 2),
        ((3, 3, 3), 3, 1),
        ((2, 5, 0, 1), 8, 2),
        ((0, 0), 2, 1),
        ((6,), 4, 2),
    ],
)
def test_as_on_one_device(tokens: tuple[int, ...], num_experts: int, k: int, skew: float, dtype: torch.dtype) -> None:
    whole = problem(sum(tokens), num_experts, k, dtype, skew)
    assert_same(simulated(whole, tokens), with_gradients(one_device, *whole))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_routing(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, 6), min_size=2, max_size=4))
    num_experts = len(tokens) * data.draw(st.integers(1, 3))
    k = data.draw(st.integers(1, 3))
    some = st.sampled_from(data.draw(st.lists(st.integers(0, num_experts - 1), min_size=1)))
    choices = data.draw(st.lists(some, min_size=sum(tokens) * k, max_size=sum(tokens) * k))
    whole = problem(sum(tokens), num_experts, min(k, num_experts), data.draw(st.sampled_from(DTYPES)))
    whole[1], whole[2] = torch.tensor(choices, dtype=torch.int64).view(-1, k), torch.rand(sum(tokens), k).to(whole[0].dtype)
    assert_same(simulated(whole, tokens), with_gradients(one_device, *whole))


def test_a_tensor_that_all_ranks_share() -> None:
    """Made outside of the simulation: the same tokens on every rank."""
    hidden, index, weights, w = problem(5, 4, 2, torch.float64)
    with simulate(2):
        local = per_rank(lambda rank: w.chunk(2)[rank])
        found = local_tensors(layer(hidden, index, weights, local, 4))
    assert all(torch.equal(x, one_device(hidden, index, weights, w)) for x in found.values())


def test_an_axis_of_a_mesh() -> None:
    """Two groups of two ranks, each with tokens of its own."""
    whole = problem(12, 4, 2, torch.float64)
    with simulate(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        local = per_rank(lambda rank: (*(x.chunk(4)[rank] for x in whole[:3]), whole[3].chunk(2)[rank % 2]))
        found = torch.cat(list(local_tensors(layer(*local, 4, mesh["ep"])).values()))
        with pytest.raises(ConfigError, match=r"a mesh of 2 axes \('dp', 'ep'\): pass the one that splits the experts, mesh\['ep'\]"):
            layer(*local, 4, mesh)
    assert torch.equal(found, one_device(*whole))


class Collectives(TorchDispatchMode):
    """The collectives of everything inside, in order, with their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and func is not functional.wait_tensor.default:
            self.seen.append((func, tuple(args[0].shape)))
        return func(*args, **kwargs or {})


def test_collectives_are_visible() -> None:
    """Two there, one back, and as many rows in backward; nothing else."""
    whole = problem(6, 4, 2, torch.float64)
    with simulate(2), Collectives() as collectives:
        with_gradients(lambda *args: layer(*args, 4), *per_rank(lambda rank: tuple(shares(whole, (3, 3), rank))))
    assert [func for func, _ in collectives.seen] == [functional.all_to_all_single.default] * 5
    assert collectives.seen[0][1] == (4,) and collectives.seen[1][1] == (6, H)


def test_second_derivative() -> None:
    x = torch.randn(5, H, dtype=torch.float64)
    with simulate(2):
        local = per_rank(lambda rank: x.clone() + rank).requires_grad_()
        axis = {"group": dist.group.WORLD.group_name, "size": 2, "rank": -1}
        rows, _, route = expert_all_to_all.exchange(local, torch.tensor([1, 1, 3, 5], dtype=torch.int32), **axis)
        (grad,) = torch.autograd.grad((expert_all_to_all.exchange_back(rows**3, route, **axis) ** 2).sum(), local, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), local)
        for found, at in zip(local_tensors(second).values(), local_tensors(local).values()):
            torch.testing.assert_close(found, 30 * at**4)


# --------------------------------------------------------------------------------------------------------- as values and nodes


def graph_layer(size: int) -> fx.GraphModule:
    """hidden, index, weights, w -> out, as a lowered graph writes it."""
    graph = fx.Graph()
    hidden, index, weights, w = map(graph.placeholder, ("hidden", "index", "weights", "w"))
    axis = {"group": dist.group.WORLD.group_name, "size": size, "rank": -1}
    sorted_ = graph.call_function(torch.ops.meshpar.dispatch.default, (hidden, index, 4))
    x, offsets, perm = (graph.call_function(getitem, (sorted_, i)) for i in range(3))
    exchanged = graph.call_function(expert_all_to_all.exchange, (x, offsets), axis)
    rows, ends, route = (graph.call_function(getitem, (exchanged, i)) for i in range(3))
    y = graph.call_function(torch.ops.meshpar.grouped_mm.default, (rows, w, ends))
    back = graph.call_function(expert_all_to_all.exchange_back, (y, route), axis)
    graph.output(graph.call_function(torch.ops.meshpar.combine.default, (back, perm, weights)))
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_nodes_of_a_graph_that_is_recomputed(mode: recompute.Mode) -> None:
    whole, tokens = problem(8, 4, 2, torch.float64), (3, 5)
    with simulate(2):
        module = copy.deepcopy(graph_layer(2))
        assert "exchange_back(" in module.code
        run = recompute.wrap(module, mode, module.graph)
        found = with_gradients(run, *per_rank(lambda rank: tuple(shares(whole, tokens, rank))))
        found = [torch.cat(list(local_tensors(x).values())) for x in found]
    assert_same(found, with_gradients(one_device, *whole))


def through_copies(hidden: Tensor, index: Tensor, weights: Tensor, w: Tensor, num_experts: int) -> Tensor:
    rows, offsets, dispatched = expert_all_to_all.dispatch(hidden, index, num_experts)
    kept = copy.deepcopy(dispatched)
    del dispatched
    expert_all_to_all.dispatch(hidden, (index + 1) % num_experts, num_experts)  # leaves nothing behind
    return expert_all_to_all.combine(experts.grouped_mm(rows, w, offsets), kept, weights)


def test_metadata_is_in_the_values() -> None:
    whole = problem(8, 4, 2, torch.float64)
    assert_same(simulated(whole, (3, 5), through_copies), with_gradients(one_device, *whole))


# ---------------------------------------------------------------------------------------------------------------------- capacity


def reference_kept(index: list[list[int]], weights: list[list[float]], capacity: int, policy: str) -> list[list[bool]]:
    """The definition, choice by choice."""
    keep = [[False] * len(row) for row in index]
    for expert in {e for row in index for e in row}:
        choices = [(t, s) for t, row in enumerate(index) for s, e in enumerate(row) if e == expert]
        if policy == "probs":
            choices.sort(key=lambda choice: -weights[choice[0]][choice[1]])  # stable
        for t, s in choices[:capacity]:
            keep[t][s] = True
    return keep


@pytest.mark.sweep(23)
@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize(("factor", "capacity"), [(0.5, 1), (1.0, 2), (1.3, 3), (4.0, 8), (1e-9, 1)])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_capacity(world: int, factor: float, capacity: int, policy: str) -> None:
    """4 tokens per rank with 2 of 4 experts each: 2 rows per expert at factor 1. Weights have ties."""
    _, index, weights, _ = whole = problem(4 * world, 4, 2, torch.float64, skew=0.3)
    weights.mul_(4).ceil_().div_(4)
    keep = torch.cat(
        [torch.tensor(reference_kept(i.tolist(), p.tolist(), capacity, policy)) for i, p in zip(index.chunk(world), weights.chunk(world))]
    )
    assert capacity >= 8 or not keep.all()

    def limited(hidden: Tensor, index: Tensor, weights: Tensor, w: Tensor, num_experts: int) -> Tensor:
        return layer(hidden, index, weights, w, num_experts, capacity_factor=factor, drop_policy=policy, top_k_weights=weights)

    found = simulated(whole, (4,) * world, limited)
    expected = with_gradients(lambda h, i, p, w: one_device(h, i, p * keep, w), *whole)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
    assert torch.equal(found[2] == 0, ~keep)  # a dropped choice has no gradient, a kept one has


def test_capacity_sends_fewer_rows() -> None:
    hidden, index, weights, _ = problem(6, 4, 2, torch.float64, skew=1.0)
    with simulate(2):
        rows, offsets, _ = expert_all_to_all.dispatch(hidden, index, 4, capacity_factor=1.0, top_k_weights=weights)
        assert [tuple(x.shape) for x in local_tensors(rows).values()] == [(0, H), (12, H)]  # 2 experts, 2 ranks, 3 rows
        assert [x.tolist() for x in local_tensors(offsets).values()] == [[0, 0], [6, 12]]


# ------------------------------------------------------------------------------------------------------------------ real processes


def on_gloo(whole: list[Tensor], tokens: Sequence[int]) -> list[Tensor]:
    num_experts = whole[3].shape[0]
    mesh = init_device_mesh("cpu", (len(tokens),))
    return with_gradients(lambda *args: layer(*args, num_experts, mesh), *shares(whole, tokens, dist.get_rank()))


@pytest.mark.sweep(7)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "skew"), [((5, 4), 0.0), ((0, 6), 1.0), ((3, 0, 6, 2), 0.2), ((1, 1, 1, 1), 1.0)])
def test_gloo(gloo: Pool, tokens: tuple[int, ...], skew: float, dtype: torch.dtype) -> None:
    whole = problem(sum(tokens), 8, 2, dtype, skew)
    found = gloo.run(on_gloo, whole, tokens, world=len(tokens))
    assert_same([torch.cat(parts) for parts in zip(*found)], with_gradients(one_device, *whole))


def one_by_one_on_gloo(whole: list[Tensor], tokens: Sequence[int], **options: Any) -> tuple[list[Tensor], int]:
    """With a message for the rows of every expert, however few; and how many messages this rank sent and received."""
    least, start, seen = expert_all_to_all.LEAST_MESSAGE, expert_all_to_all.start_messages, [0]

    def counted(gone: Sequence[Any], come: Sequence[Any], group: str) -> Callable[[], None]:
        seen[0] += len(gone) + len(come)
        return start(gone, come, group)

    expert_all_to_all.LEAST_MESSAGE, expert_all_to_all.start_messages = 1, counted
    try:
        mesh, num_experts = init_device_mesh("cpu", (len(tokens),)), whole[3].shape[0]
        return with_gradients(lambda *args: layer(*args, num_experts, mesh, **options), *shares(whole, tokens, dist.get_rank())), seen[0]
    finally:
        expert_all_to_all.LEAST_MESSAGE, expert_all_to_all.start_messages = least, start


@pytest.mark.parametrize(
    ("tokens", "skew", "options"),
    [((5, 4), 0.0, {}), ((0, 6), 0.0, {}), ((3, 0, 6, 2), 0.2, {}), ((5, 5), 0.1, {"capacity_factor": 0.5, "drop_policy": "position"})],
)
def test_a_message_for_every_expert(gloo: Pool, tokens: tuple[int, ...], skew: float, options: dict[str, Any]) -> None:
    """Rows arrive where they belong: the same bits, and gradients, and nothing is put into another order."""
    whole = problem(sum(tokens), 8, 2, torch.float32, skew)
    found = gloo.run(one_by_one_on_gloo, whole, tokens, world=len(tokens), **options)
    assert any(sent for _, sent in found)
    expected = simulated(whole, tokens, **options) if options else with_gradients(one_device, *whole)
    assert_same([torch.cat(parts) for parts in zip(*(one for one, _ in found))], expected)


def test_small_messages_travel_together(gloo: Pool) -> None:
    assert expert_all_to_all.LEAST_MESSAGE > 2**10
    whole = problem(9, 8, 2, torch.float64)
    assert [tuple(x) for x in gloo.run(splits_on_gloo, whole, (5, 4), world=2)] == [(2, 3)] * 2


def splits_on_gloo(whole: list[Tensor], tokens: Sequence[int]) -> list[int]:
    """The shape of what a route says of rows."""
    hidden, index, *_ = shares(whole, tokens, dist.get_rank())
    return list(expert_all_to_all.dispatch(hidden, index, 8)[2].route.splits.shape)  # type: ignore[union-attr]


def recomputed_on_gloo(whole: list[Tensor], tokens: Sequence[int]) -> list[Tensor]:
    def run(*args: Tensor) -> Tensor:
        return checkpoint(layer, *args, 4, use_reentrant=False)

    return with_gradients(run, *shares(whole, tokens, dist.get_rank()))


def test_recomputed_on_gloo(gloo: Pool) -> None:
    whole, tokens = problem(7, 4, 2, torch.float64), (3, 4)
    found = gloo.run(recomputed_on_gloo, whole, tokens, world=2)
    assert_same([torch.cat(parts) for parts in zip(*found)], with_gradients(one_device, *whole))


def compiled_on_gloo(steps: Sequence[list[Tensor]], tokens: Sequence[int], backend: str, options: dict[str, Any]) -> list[list[Tensor]]:
    """Compiled once, for routings of all kinds."""

    def run(hidden: Tensor, index: Tensor, weights: Tensor, w: Tensor) -> Tensor:
        return layer(hidden, index, weights, w, steps[0][3].shape[0], **options)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, error_on_recompile=True):
        compiled = torch.compile(run, fullgraph=True, backend=backend)
        return [with_gradients(compiled, *shares(whole, tokens, dist.get_rank())) for whole in steps]


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("num_experts", "options", "backend"),
    [
        (2, {}, "aot_eager"),
        (4, {}, "aot_eager"),
        (4, {"capacity_factor": 0.5, "drop_policy": "position"}, "aot_eager"),
        (4, {}, "inductor"),
    ],
    ids=["one expert per rank", "two", "capacity", "inductor"],
)
def test_compiled(gloo: Pool, num_experts: int, options: dict[str, Any], backend: str) -> None:
    """One graph without breaks, for any numbers of rows."""
    tokens = (5, 5)
    steps = [problem(10, num_experts, 2, torch.float32, skew) for skew in (0.0, 0.1, 1.0)]
    found = gloo.run(compiled_on_gloo, steps, tokens, backend, options, world=2, timeout=240)
    for step, parts in zip(steps, zip(*found)):
        assert_same([torch.cat(part) for part in zip(*parts)], simulated(step, tokens, **options))


# ----------------------------------------------------------------------------------------------------------- without other ranks


def test_fake_group_is_balanced() -> None:
    """On the fake backend every rank receives what it sends: other ranks' rows have no values, but the shapes are those of balance."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    hidden, index, weights, w = problem(8, 8, 2, torch.float32)
    rows, offsets, dispatched = expert_all_to_all.dispatch(hidden.requires_grad_(), index, 8)
    assert tuple(rows.shape) == (16, H) and offsets[-1] == 16 and tuple(offsets.shape) == (2,)
    sent, received = dispatched.route.splits.tolist()
    assert sent == received == [*index.flatten().bincount(minlength=8).view(4, 2).sum(1).tolist(), 0]
    out = expert_all_to_all.combine(experts.grouped_mm(rows, w[:2], offsets), dispatched, weights)
    out.sum().backward()
    assert tuple(out.shape) == (8, O) and hidden.grad is not None and hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize("options", [{}, {"capacity_factor": 1.0}], ids=["dropless", "capacity"])
@pytest.mark.parametrize("num_experts", [4, 8])
def test_shapes_only(where: str, options: dict[str, Any], num_experts: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    hidden, index, weights, w = problem(7, num_experts, 2, torch.bfloat16)
    with FakeTensorMode() as mode:
        place: Callable[[Tensor], Tensor] = mode.from_tensor if where == "fake" else lambda x: x.to("meta")
    h, i, p, w = (place(x) for x in (hidden, index, weights, w[: num_experts // 4]))
    with mode if where == "fake" else torch.device("meta"):
        found = with_gradients(lambda *args: layer(*args, num_experts, **options, top_k_weights=p), h, i, p, w)
    assert [tuple(x.shape) for x in found] == [(7, O), (7, H), (7, 2), (num_experts // 4, H, O)]
    assert all(x.dtype == torch.bfloat16 for x in found)


# ------------------------------------------------------------------------------------------------------------------------- errors


def call(hidden: Tensor, index: Tensor, num_experts: int = 4, **options: Any) -> Any:
    with simulate(2):
        return expert_all_to_all.dispatch(hidden, index, num_experts, **options)


def test_errors() -> None:
    hidden, index, weights, _ = problem(5, 4, 2, torch.float32)
    cases = [
        (lambda: call(hidden, index, 5), "2 ranks do not divide 5 experts. Possible: 1, 5 ranks."),
        (lambda: call(hidden, index + 1), "top_k_index holds 1 to 4: there are experts 0 to 3."),
        (lambda: call(hidden, index - 1), "top_k_index holds -1 to 2: there are experts 0 to 3."),
        (lambda: call(hidden, index.float()), "top_k_index is torch.float32: the number of an expert is an int64 or int32."),
        (lambda: call(hidden, index[:4]), r"hidden (5, 3) and top_k_index (4, 2): [T, h] and [T, k] of the same tokens are needed"),
        (lambda: call(hidden[None], index[None]), "flatten batch and sequence first, hidden.flatten(0, -2)"),
        (lambda: call(hidden, index, capacity_factor=0.0), "capacity_factor=0.0: a positive number, or None to drop nothing."),
        (
            lambda: call(hidden, index, drop_policy="random"),
            "drop_policy='random': 'probs' (keep the highest router weights) or 'position'",
        ),
        (lambda: call(hidden, index, capacity_factor=1.0), "drop_policy='probs' needs top_k_weights (5, 2): missing."),
        (lambda: call(hidden, index, capacity_factor=1.0, top_k_weights=weights[:3]), "needs top_k_weights (5, 2): (3, 2)."),
    ]
    for provoke, text in cases:
        with pytest.raises(ConfigError) as error:
            provoke()
        assert text in str(error.value)
    with pytest.raises(ConfigError, match="dispatch:\n  .*top_k_index is torch.float32.*\n  .*do not divide"):
        call(hidden, index.float(), 5)
    with pytest.raises(ConfigError, match="there is no process group: call torch.distributed.init_process_group first"):
        expert_all_to_all.dispatch(hidden, index, 4)


def test_errors_of_the_way_back_and_of_offsets() -> None:
    hidden, index, weights, _ = problem(5, 4, 2, torch.float32)
    with simulate(2):
        rows, _, dispatched = expert_all_to_all.dispatch(hidden, index, 4)
        with pytest.raises(ConfigError, match=r"combine: top_k_weights \(4, 2\): \[T, k\] of the 10 choices that were dispatched"):
            expert_all_to_all.combine(rows, dispatched, weights[:4])
        axis = {"group": dist.group.WORLD.group_name, "size": 2, "rank": -1}
        with pytest.raises(ConfigError, match="the offsets end at 4, x has 5 rows: every row needs an expert from 0 to 1"):
            expert_all_to_all.exchange(hidden, torch.tensor([2, 4], dtype=torch.int32), **axis)
        with pytest.raises(ConfigError, match="2 ranks do not divide the 3 experts"):
            expert_all_to_all.exchange(hidden, torch.tensor([2, 4, 5], dtype=torch.int32), **axis)


def test_public_name() -> None:
    assert mp.ops.expert_all_to_all is expert_all_to_all
