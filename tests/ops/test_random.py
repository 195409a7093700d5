"""Random draws: equal on replicas, different on shards, reproducible, the same again under recompute."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meshpar.ops import random
from meshpar.simulate import local_tensors, per_rank, simulate

aten = torch.ops.aten


def test_keys_differ_by_seed_step_and_microbatch() -> None:
    keys = set()
    for seed in range(3):
        state = random.RandomState(seed)
        for _ in range(4):
            keys |= {state.key(microbatch) for microbatch in range(5)}
            state.advance()
    assert len(keys) == 3 * 4 * 5
    state = random.RandomState(7)
    state.advance()
    other = random.RandomState(0)
    other.load_state_dict(state.state_dict())
    assert other.key(2) == state.key(2)


def test_dropout_keeps_its_share_and_scales_it() -> None:
    x = torch.ones(200, 100, requires_grad=True)
    y, mask = random.native_dropout(x, 0.25, True, key=1, number=2)
    assert abs(mask.float().mean().item() - 0.75) < 0.01  # 4 standard deviations
    assert y.equal(mask / 0.75) and mask.dtype == torch.bool
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.equal(y)
    assert random.dropout(x, 0.25, True, key=1, number=2).equal(y)
    assert not random.dropout(x, 0.25, True, key=1, number=3).equal(y)
    assert not random.dropout(x, 0.25, True, key=2, number=2).equal(y)


def test_dropout_that_drops_nothing_or_everything() -> None:
    x = torch.randn(8, requires_grad=True)
    assert random.dropout(x, 0.5, False, key=1, number=2) is x
    assert random.dropout(x, 0.0, True, key=1, number=2) is x
    assert random.dropout(x, 1.0, True, key=1, number=2).tolist() == [0.0] * 8


def draws(x: Tensor, **where: Any) -> dict[str, Tensor]:
    """One draw of every way to draw."""
    target, first = random.drawn(aten.scaled_dot_product_attention.default)
    return {
        "dropout": random.dropout(x, 0.5, True, number=0, **where),
        "rand_like": random.draw(aten.rand_like.default, x, number=1, **where),
        "bernoulli": random.draw(aten.bernoulli.p, x.detach(), 0.5, number=2, **where),
        "attention": target(*first, x, x, x, None, 0.5, True, number=3, **where),
    }


def test_replicas_draw_the_same_and_shards_do_not() -> None:
    with simulate(4):
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        x = per_rank(lambda _: torch.linspace(-1, 1, 64).view(1, 2, 8, 4)).requires_grad_()
        tp = (mesh.get_group("tp").group_name, 2, -1)
        dp = (mesh.get_group("dp").group_name, 2, -1)
        for shards, classes in (((), 1), ((tp,), 2), ((dp,), 2), ((dp, tp), 4)):
            for name, y in draws(x, key=5, shards=shards).items():
                found = [t.tolist() for t in local_tensors(y).values()]
                places = [(rank // 2 if dp in shards else 0, rank % 2 if tp in shards else 0) for rank in range(4)]
                for a in range(4):
                    for b in range(4):
                        assert (found[a] == found[b]) == (places[a] == places[b]), (name, shards, a, b)
                assert len(set(map(str, found))) == classes


def test_simulated_ranks_draw_what_real_ranks_draw() -> None:
    real = [random.dropout(torch.ones(8, 8), 0.5, True, key=5, number=1, shards=(("any", 2, rank),)) for rank in range(2)]
    with simulate(2):
        x = per_rank(lambda _: torch.ones(8, 8))
        y = random.dropout(x, 0.5, True, key=5, number=1, shards=((dist.group.WORLD.group_name, 2, -1),))
        for rank, t in local_tensors(y).items():
            assert t.equal(real[rank])


def test_nothing_global_is_read_or_changed() -> None:
    x = torch.randn(1, 2, 8, 4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draws(x, key=3)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    again = draws(x, key=3)
    assert all(first[name].equal(again[name]) for name in first)


def test_recompute_draws_the_same_although_others_drew_between() -> None:
    """Two microbatches in flight: the first is recomputed after the second has drawn. `preserve_rng_state` is off on purpose."""
    state = random.RandomState(0)

    def block(x: Tensor, key: int) -> Tensor:
        return sum((y * y).sum() for y in draws(x.tanh(), key=key).values())

    grads = {}
    for recompute in (False, True):
        xs = [torch.linspace(-1, 1, 64).view(1, 2, 8, 4).requires_grad_() for _ in range(2)]
        run = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False) if recompute else block
        losses = [run(x, state.key(microbatch)) for microbatch, x in enumerate(xs)]
        for loss in losses:
            loss.backward()
        grads[recompute] = [x.grad for x in xs]
    assert all(a.equal(b) for a, b in zip(grads[False], grads[True]))
    assert not grads[True][0].equal(grads[True][1])


def test_shapes_without_values() -> None:
    x = torch.empty(1, 2, 8, 4, device="meta")
    assert all(y.shape == x.shape for y in draws(x, key=1).values())


def test_dropout_compiles_once_for_all_keys() -> None:
    count = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    x = torch.ones(64, 64)
    compiled = torch.compile(lambda x, key: random.dropout(x, 0.5, True, key=key, number=1), fullgraph=True, backend=backend)
    for key in range(10**15, 10**15 + 6):
        assert compiled(x, key).equal(random.dropout(x, 0.5, True, key=key, number=1))
    assert count <= 2, "once for the first key, once for any"
