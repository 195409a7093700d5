"""Random numbers on simulated ranks are those that processes draw: each rank has generators of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, random_split

from meshpar.simulate import local_tensors, per_rank, simulate

Draw = Callable[[Generator], Tensor]


def restored(g: Generator) -> Tensor:
    state = torch.get_rng_state()
    torch.randn(3)
    torch.set_rng_state(state)
    return torch.randn(3)


def forked(g: Generator) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.randn(3)
    return torch.randn(3)


def seeded_again(g: Generator) -> Tensor:
    torch.randn(3, generator=g)
    g.manual_seed(1)
    return torch.randn(3, generator=g)


def put_back(g: Generator) -> Tensor:
    state = g.get_state()
    torch.randn(3, generator=g)
    g.set_state(state)
    return torch.randn(3, generator=g)


def recomputed(g: Generator) -> Tensor:
    x = torch.ones(9, requires_grad=True)
    y = checkpoint(lambda x: F.dropout(x * x), x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None
    return torch.stack([y.detach(), x.grad])


def loaded(g: Generator) -> Tensor:
    return torch.cat([rows for (rows,) in DataLoader(TensorDataset(torch.arange(8)), batch_size=2, shuffle=True, generator=g)])


DRAWS: dict[str, Draw] = {
    "randn": lambda g: torch.randn(3, generator=g),
    "rand": lambda g: torch.rand(3, generator=g),
    "randint": lambda g: torch.randint(9, (3,), generator=g),
    "randperm": lambda g: torch.randperm(9, generator=g),
    "bernoulli": lambda g: torch.bernoulli(torch.full((9,), 0.5), generator=g),
    "multinomial": lambda g: torch.multinomial(torch.ones(9), 4, generator=g),
    "poisson": lambda g: torch.poisson(torch.full((5,), 3.0), generator=g),
    "normal": lambda g: torch.normal(torch.zeros(3), torch.ones(3), generator=g),
    "out": lambda g: torch.randn(3, generator=g, out=torch.empty(3)),
    "normal_": lambda g: torch.empty(4).normal_(generator=g),
    "uniform_": lambda g: torch.empty(4).uniform_(generator=g),
    "exponential_": lambda g: torch.empty(4).exponential_(generator=g),
    "random_": lambda g: torch.empty(4).random_(0, 100, generator=g),
    "kaiming": lambda g: nn.init.kaiming_uniform_(torch.empty(3, 3), generator=g),
    "trunc_normal": lambda g: nn.init.trunc_normal_(torch.empty(3, 3), generator=g),
    "twice": lambda g: torch.randn(3, generator=g) + torch.randn(3, generator=g),
    "the default one": lambda g: torch.randn(3, generator=torch.default_generator),
    "a copy": lambda g: torch.randn(3, generator=g.clone_state()),
    "sampler": lambda g: torch.tensor(list(RandomSampler(range(8), generator=g))),
    "split": lambda g: torch.tensor(random_split(range(8), [4, 4], generator=g)[0].indices),  # type: ignore[arg-type]
    **{draw.__name__: draw for draw in (restored, forked, seeded_again, put_back, recomputed, loaded)},
}


def drawn(draw: Draw) -> Tensor:
    torch.manual_seed(5)
    return draw(torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", DRAWS)
def test_every_rank_draws_what_a_process_does(name: str) -> None:
    expected = drawn(DRAWS[name])
    with simulate(3):
        found = local_tensors(drawn(DRAWS[name]))
    assert len(found) == 3 and all(torch.equal(own, expected) for own in found.values())


def test_seeds_of_ranks() -> None:
    expected = [torch.randn(2, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    g = torch.Generator()

    def seed(rank: int) -> None:
        g.manual_seed(rank)
        torch.manual_seed(rank)

    with simulate(2):
        per_rank(seed)
        for x in (torch.randn(2, generator=g), torch.randn(2)):
            assert [torch.equal(own, expected[rank]) for rank, own in local_tensors(x).items()] == [True, True]


def test_draws_inside_of_per_rank() -> None:
    g = torch.Generator().manual_seed(3)
    expected = torch.stack([torch.randn(2, generator=g) for _ in range(2)])
    torch.manual_seed(3)
    with simulate(2):
        g.manual_seed(3)
        for x in (per_rank(lambda rank: torch.randn(2, generator=g)), torch.randn(2, generator=g)):
            first, second = local_tensors(x).values()
            assert torch.equal(first, second)
        assert torch.equal(first, expected[1])
        first, second = local_tensors(per_rank(lambda rank: torch.randn(2))).values()
        assert torch.equal(first, second)


def test_ranks_that_drew_more_are_further_on() -> None:
    g = torch.Generator()
    expected = []
    for rank in range(2):
        g.manual_seed(3)
        torch.zeros(16 * (rank + 1)).normal_(generator=g)
        expected.append(torch.randn(1, generator=g))
    with simulate(2):
        g.manual_seed(3)
        per_rank(lambda rank: torch.zeros(16 * (rank + 1))).normal_(generator=g)
        assert [torch.equal(own, expected[rank]) for rank, own in local_tensors(torch.randn(1, generator=g)).items()] == [True, True]
    assert torch.get_rng_state is torch.random.get_rng_state
