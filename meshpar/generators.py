"""Random generators on simulated ranks: every rank has its own, as every process would.

    g = torch.Generator().manual_seed(0)
    with simulate(2):
        torch.randn(3, generator=g)                    # the same numbers on both ranks: each has a generator in this state
        per_rank(lambda rank: g.manual_seed(rank))     # from now on, other numbers on each
        state = torch.get_rng_state()                  # of every rank; so do set_rng_state and fork_rng

What a rank has drawn from a generator stays its own until the generator is put into another state by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any
from unittest.mock import patch

import torch

from meshpar._torch import (
    LocalTensor,
    LocalTensorMode,
    default_states,
    enabled_local_tensor_mode,
    generator_key,
    on_simulated_ranks,
    put_default_states,
    pytree,
    simulated_generators,
    states_from_generators,
)


class Ranks(LocalTensorMode):
    """torch's simulated ranks, each with generators of its own."""

    def __init__(self, ranks: int) -> None:
        super().__init__(ranks)
        self._drawn: dict[int, tuple[torch.Generator, dict[int, torch.Tensor]]] = {}
        """Generators, and the state of each rank's."""
        self._left: dict[int, torch.Tensor] = {}
        """The state in which we left the generator itself: that of the first rank."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        found = on_simulated_ranks(self, func, types, args, kwargs)
        if found is not NotImplemented:
            return found
        generator = next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.Generator)), None)
        if generator is None or self._disable:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if _is_default(generator):
            args, kwargs = pytree.tree_map(lambda one: None if isinstance(one, torch.Generator) else one, (args, kwargs))
            return super().__torch_dispatch__(func, types, args, kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, LocalTensor) for leaf in leaves) and any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            return func(*args, **kwargs)  # a tensor that all ranks share
        return self._on_each(generator, func, args, kwargs)

    def _on_each(self, generator: torch.Generator, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        results = {}
        for rank in sorted(self.ranks):
            with self.generator_of(generator, rank):
                own, named = pytree.tree_map(
                    lambda one, r=rank: one._local_tensors[r] if isinstance(one, LocalTensor) else one, (args, kwargs)
                )
                results[rank] = func(*own, **named)
        if func._schema.name.endswith("_"):
            return args[0]
        return kwargs["out"] if "out" in kwargs else LocalTensor(results)

    @contextmanager
    def generator_of(self, generator: torch.Generator, rank: int) -> Iterator[None]:
        """Inside, the generator is in the state of that rank's, and what is drawn or seeded is that rank's."""
        states = self._states(generator)
        first = min(self.ranks)
        generator.set_state(states[rank])
        try:
            yield
        finally:
            states[rank] = generator.get_state()
            generator.set_state(states[first])
            self._left[generator_key(generator)] = generator.get_state()  # (not always the bytes that were set)

    def _states(self, generator: torch.Generator) -> dict[int, torch.Tensor]:
        now = generator.get_state()
        known = self._drawn.get(generator_key(generator))
        if known is None or not torch.equal(self._left[generator_key(generator)], now):
            known = self._drawn[generator_key(generator)] = (
                generator,
                dict.fromkeys(sorted(self.ranks), now),
            )  # seeded by hand: alike on all ranks
            self._left[generator_key(generator)] = now
        return known[1]

    @contextmanager
    def rank_alone(self, rank: int, generators: Sequence[torch.Generator]) -> Iterator[None]:
        """Inside, which is outside of the simulation, this rank's numbers are drawn: from the default generators and those given."""
        states = simulated_generators(self)
        put_default_states(states[rank])
        if not generators:
            yield
        else:
            with self.generator_of(generators[0], rank), self._others(rank, generators[1:]):
                yield
        states[rank] = default_states()

    @contextmanager
    def _others(self, rank: int, generators: Sequence[torch.Generator]) -> Iterator[None]:
        if not generators:
            yield
            return
        with self.generator_of(generators[0], rank), self._others(rank, generators[1:]):
            yield


def generators_in(fn: Callable[..., Any]) -> tuple[torch.Generator, ...]:
    """The generators that a function knows by name."""
    code = getattr(fn, "__code__", None)
    if not isinstance(code, CodeType):
        return ()
    cells = [cell.cell_contents for cell in getattr(fn, "__closure__", None) or () if _is_filled(cell)]
    space = getattr(fn, "__globals__", {})
    known = (*cells, *(getattr(fn, "__defaults__", None) or ()), *(space.get(name) for name in code.co_names))
    found = {generator_key(one): one for one in known if isinstance(one, torch.Generator) and not _is_default(one)}
    return tuple(found.values())


def _is_default(generator: torch.Generator) -> bool:
    known = (torch.default_generator, *(torch.cuda.default_generators if generator.device.type == "cuda" else ()))
    return generator_key(generator) in map(generator_key, known)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is bound later
        return False


@contextmanager
def states_of_ranks() -> Iterator[None]:
    """Inside, `torch.get_rng_state` and `set_rng_state` (and so `fork_rng`) speak of every simulated rank's default generator."""
    with (
        states_from_generators(),
        patch.object(torch, "get_rng_state", _get_state),
        patch.object(torch, "set_rng_state", _set_state),
        patch.object(torch.random, "get_rng_state", _get_state),
        patch.object(torch.random, "set_rng_state", _set_state),
    ):
        yield


def _get_state() -> torch.Tensor:
    mode = enabled_local_tensor_mode()
    if mode is None:
        return torch.default_generator.get_state()
    with mode.disable():
        states = {rank: state.clone() for rank, (state, _) in sorted(simulated_generators(mode).items())}
        first = next(iter(states.values()))
        return first if all(torch.equal(first, state) for state in states.values()) else LocalTensor(states)


def _set_state(new_state: torch.Tensor) -> None:
    mode = enabled_local_tensor_mode()
    if mode is None:
        torch.default_generator.set_state(new_state)
        return
    states = simulated_generators(mode)
    with mode.disable():
        for rank, (_, devices) in list(states.items()):
            own = new_state._local_tensors[rank] if isinstance(new_state, LocalTensor) else new_state
            states[rank] = (own.clone(), devices)
