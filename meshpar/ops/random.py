"""Random numbers that follow from their arguments alone: equal on replicas, different on shards, the same again when recomputed.

Every draw is seeded from

    key          one integer per forward and microbatch, from `RandomState.key`; an input of the lowered graph
    number       which random node of the graph this is
    shards       the mesh axes that cut the value, as (group, size, rank): the rank's place on them enters the seed, other axes do not

    part         of a value whose sequence is cut: which part of it the rank has. It is drawn whole, and that part of it taken, so that the
                 numbers belong to positions, however many ranks there are (dropout alone; fused attention draws as its shards say)

so nothing global is read or left changed. The key travels as an argument: a block that is recomputed in backward gets the one it had.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from meshpar._torch import FakeTensor, LocalTensor, LocalTensorMode, enabled_local_tensor_mode, pytree, simulated_generators
from meshpar.ops.layouts import Segments, take
from meshpar.sharding.types import Shard
from meshpar.simulate import axis_rank, per_rank

Shards = tuple[tuple[str, int, int], ...]
"""The axes that cut a value: (group name, size, this process's rank or -1 inside `simulate`)."""

Part = tuple[int, int, Segments, str, int, int]
"""The layout of a `Shard` (dim, repeat, segments), and the axis that it is cut over, as above."""


@dataclass
class RandomState:
    """Where the random numbers of a training run stand. The same on every rank.

    >>> state = RandomState(seed=0)
    >>> first = state.key(); state.advance(); first == state.key()
    False
    """

    seed: int
    step: int = 0

    def key(self, microbatch: int = 0) -> int:
        """The key of one forward: of this step, for this microbatch."""
        return _mix(self.seed, self.step, microbatch)

    def advance(self) -> None:
        """Go on to the next step; once per training step, after its last forward was started."""
        self.step += 1

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.seed, self.step = state["seed"], state["step"]


# ---------------------------------------------------------------------------------------------------------------- drawing


def derive(key: int, number: int) -> int:
    """The key of one part of a graph, such as one of several blocks that share their code."""
    return _mix(key, number)


def drawn(op: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What to call, and with which leading arguments, in place of an ATen op that draws random numbers.

    The call takes these, then the op's own arguments, then the keywords `key`, `number` and `shards`.

    >>> drawn(torch.ops.aten.native_dropout.default)[0].__name__
    'native_dropout'
    """
    own = _OWN.get(op)
    return (own, ()) if own is not None else (draw, (op,))


def draw(op: Callable[..., Any], *args: Any, key: int, number: int, shards: Shards = (), **kwargs: Any) -> Any:
    """Run any op with the default generator of its device seeded for this draw, and put back after it.

    For every op without a mask of its own, fused attention with dropout among them.
    """
    with _seeded(_device_of(args, kwargs), key, number, shards):
        return op(*args, **kwargs)


def dropout(x: Tensor, p: float, train: bool, *, key: int, number: int, shards: Shards = (), part: Part | None = None) -> Tensor:
    """`F.dropout`. Keeps one byte per element for backward."""
    return native_dropout(x, p, train, key=key, number=number, shards=shards, part=part)[0] if train and p > 0 else x


def native_dropout(
    x: Tensor, p: float, train: bool | None, *, key: int, number: int, shards: Shards = (), part: Part | None = None
) -> tuple[Tensor, Tensor]:
    """`aten.native_dropout`: the result and the mask of what was kept."""
    if train is False or p == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    mask = _mask(x, 1 - p, key, number, shards, part)
    return x * mask * (1 / (1 - p) if p < 1 else 0.0), mask


_OWN: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.dropout.default: dropout,
    torch.ops.aten.native_dropout.default: native_dropout,
}

# ------------------------------------------------------------------------------------------------------------------- masks


@torch.library.custom_op("meshpar::bernoulli", mutates_args=())
def _bernoulli(size: Sequence[int], p: float, device: torch.device, key: int, number: int, place: int) -> Tensor:
    """True with probability `p`. An op of its own, so that compilers leave it whole."""
    if device.type == "meta":
        return torch.empty(size, dtype=torch.bool, device=device)
    generator = torch.Generator(device).manual_seed(_mix(key, number, place))
    return torch.empty(size, dtype=torch.bool, device=device).bernoulli_(p, generator=generator)


@_bernoulli.register_fake
def _(size: Sequence[int], p: float, device: torch.device, key: int, number: int, place: int) -> Tensor:
    return torch.empty(size, dtype=torch.bool, device=device)


def _mask(x: Tensor, p: float, key: int, number: int, shards: Shards, part: Part | None) -> Tensor:
    def mask(world_rank: int | None, x: Tensor) -> Tensor:
        place = _place(shards, world_rank)
        if part is None:
            return _bernoulli(x.shape, p, x.device, key, number, place)
        layout, (group, size, rank) = part[:3], part[3:]
        shape = (*x.shape[: layout[0]], Shard(*layout).length, *x.shape[layout[0] + 1 :])
        whole = _bernoulli(shape, p, x.device, key, number, place)
        return take(whole, layout, size, rank if world_rank is None or rank >= 0 else axis_rank(group, world_rank)).contiguous()

    if isinstance(x, LocalTensor) or any(rank < 0 for _, _, rank in shards) or (part is not None and part[-1] < 0):
        found: Tensor = per_rank(mask, x)
        return found
    return mask(None, x)


def _place(shards: Shards, world_rank: int | None) -> int:
    """One number for the coordinates on the axes that cut the value."""
    place = 0
    for group, size, rank in shards:
        place = place * size + (rank if world_rank is None or rank >= 0 else axis_rank(group, world_rank))
    return place


def _mix(*numbers: int) -> int:
    """63 well-mixed bits: neighbouring steps, nodes and ranks get unrelated seeds."""
    packed = struct.pack(f"<{len(numbers)}Q", *(number % 2**64 for number in numbers))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


# ------------------------------------------------------------------------------------------------- seeding the default generators


@contextmanager
def _seeded(device: torch.device | None, key: int, number: int, shards: Shards) -> Iterator[None]:
    mode = enabled_local_tensor_mode()
    if device is None:  # fake or meta: nothing is drawn
        yield
    elif mode is not None:
        with _seeded_ranks(mode, key, number, shards):
            yield
    else:
        generator = _default_generator(device)
        before = generator.get_state()
        generator.manual_seed(_mix(key, number, _place(shards, None)))
        try:
            yield
        finally:
            generator.set_state(before)


@contextmanager
def _seeded_ranks(mode: LocalTensorMode, key: int, number: int, shards: Shards) -> Iterator[None]:
    """The same for every simulated rank."""
    states = simulated_generators(mode)
    before = dict(states)
    with mode.disable():
        for rank in states:
            seed = _mix(key, number, _place(shards, rank))
            devices = {i: torch.Generator(f"cuda:{i}").manual_seed(seed).get_state() for i in before[rank][1]}
            states[rank] = (torch.Generator().manual_seed(seed).get_state(), devices)
    try:
        yield
    finally:
        states.update(before)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _device_of(args: Any, kwargs: Any) -> torch.device | None:
    """The device an op will draw on; None if it only computes shapes."""
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, FakeTensor):
            return None
        if isinstance(leaf, Tensor):
            return None if leaf.is_meta else leaf.device
    device = torch.device(kwargs.get("device") or torch.get_default_device())
    return None if device.type == "meta" else device
