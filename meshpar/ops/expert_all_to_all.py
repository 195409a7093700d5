"""Expert all-to-all: rows of all ranks go to the rank that holds their expert, and come back in the order they left.

    rank 0   a0 b0 c0 d0          rank 0   a0 a1 b0 b1        experts a, b
                            <->
    rank 1   a1 b1 c1 d1          rank 1   c0 c1 d0 d1        experts c, d

Alone, with your own router and experts, on a process group or a 1-D mesh over which tokens and experts are split:

    rows, offsets, dispatched = dispatch(hidden, top_k_index, num_experts, group)      # every row of this rank's experts
    y = grouped_mm(rows, w, offsets)                                                  # w [num_experts / ranks, h, o]
    out = combine(y, dispatched, top_k_weights)                                       # [T, o]

`exchange` and `exchange_back` are the communication in them: what a lowered graph calls between `ops.experts.dispatch`, `grouped_mm` and
`combine`. What the way back needs is in the values that the way there returned, nowhere else. Ranks take consecutive tokens, an expert's
rows are in the order of their tokens, and a token's rows are added up in its own order: the results are those of one device, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from meshpar._torch import FakeTensor, functional, resolve_process_group
from meshpar.errors import ConfigError, raise_all
from meshpar.ops import experts
from meshpar.ops.primitives import Finish, begin, call, on_rank, start_messages
from meshpar.sharding.types import chunk
from meshpar.simulate import is_simulated, local_tensors

AxisKey = tuple[str, int, int]
"""Group name, size, rank (-1: simulated), as in `ops.collectives`."""


Splits = Tensor | tuple[Sequence[int], Sequence[int]]
LEAST_MESSAGE = 2**17
"""Bytes of an expert's rows from one rank, on the average, from which on a CPU sends them by themselves."""


class Route(NamedTuple):
    """Which rows went where: all that the way back needs.

    `splits` [2, ranks + 1] (int64, on the host): the rows sent to every rank and those left out; the rows received from every rank, and 0.
    `order` [m]: where among the received rows, source by source, each row in expert order is; `place` [m] is its inverse. Both are None
    where the two orders are the same, one expert per rank. In compiled code `splits` are the numbers themselves.

    Where the rows of an expert are a message of their own, each arrives where it belongs: both are None, and `splits` [2, E + 1] are the
    rows sent to every expert, and those received from every rank for each of this rank's.
    """

    splits: Splits
    order: Tensor | None
    place: Tensor | None


class Dispatched(NamedTuple):
    """What `combine` needs to know of a `dispatch`: the route, the choice of each sent row (`perm`), and the axis."""

    route: Route
    perm: Tensor
    dropping: bool
    group: str
    size: int
    rank: int


# ------------------------------------------------------------------------------------------------------------------ the operator


def dispatch(
    hidden: Tensor,
    top_k_index: Tensor,
    num_experts: int,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    *,
    capacity_factor: float | None = None,
    drop_policy: str = "probs",
    top_k_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Dispatched]:
    """Send every token to the ranks of its experts: `hidden` [T, h], `top_k_index` [T, k] -> `rows` [m, h], `offsets`, `dispatched`.

    T may differ from rank to rank. Rank r of `group` (default: all ranks) holds experts r * E/ranks to (r + 1) * E/ranks - 1. `rows` are
    those of this rank's experts, expert by expert, in global token order; `offsets` [E/ranks] (int32) is where each expert's rows end, as
    `grouped_mm` takes it. m depends on the routing, and may be 0.

    `capacity_factor` limits each expert to C = ceil(T * k / E * capacity_factor) rows from each rank (the group of GShard, arXiv
    2006.16668; the expert capacity of Switch, arXiv 2101.03961, there k = 1; `moe_expert_capacity_factor` of Megatron-Core, whose names the
    policies have). `drop_policy` "probs" keeps the choices of the highest router weight `top_k_weights` [T, k], earlier tokens first among
    equals; "position" keeps those of the first tokens. Dropped choices are not sent; they add nothing to the output and get zero gradients,
    and the weights that stay are not normalised again. The default, None, drops nothing. Capacity is per rank: what is dropped depends on
    how the tokens are split.

    Inside `torch.compile` set `torch._dynamo.config.capture_scalar_outputs`: m is read from the data. On fake and meta tensors, and on a
    process group of the "fake" backend, every rank receives as many rows as it sends.

    Raises ConfigError for shapes, types or indices that do not fit, and where the ranks do not divide the experts. (Indices on an
    accelerator are looked at when the host waits anyway, and with a capacity those that are no expert's are dropped.)

    >>> from meshpar.simulate import local_tensors, per_rank, simulate
    >>> with simulate(2):
    ...     hidden = per_rank(lambda rank: torch.tensor([[10.0 * rank], [10.0 * rank + 1]]))
    ...     rows, offsets, dispatched = dispatch(hidden, torch.tensor([[1], [0]]), 2)
    ...     local_tensors(rows)[0].flatten().tolist(), local_tensors(combine(rows, dispatched, torch.ones(2, 1)))[1].flatten().tolist()
    ([1.0, 11.0], [10.0, 11.0])
    """
    axis = name, size, rank = _axis(group)
    _check(hidden, top_k_index, num_experts, size, capacity_factor, drop_policy, top_k_weights)
    index = top_k_index.long().masked_fill(top_k_index < 0, num_experts)  # what is no expert's comes last
    dropping = capacity_factor is not None
    if capacity_factor is not None:
        capacity = ceil(index.shape[0] * index.shape[1] / num_experts * capacity_factor)
        keep = _kept(index, capacity, num_experts, top_k_weights if drop_policy == "probs" else None)
        index = index.masked_fill(~keep, num_experts)
    x, offsets, perm = experts.dispatch(hidden, index, num_experts)
    rows, ends, route = exchange(x, offsets, dropping=dropping, group=name, size=size, rank=rank)
    return rows, ends, Dispatched(route, perm, dropping, *axis)


def combine(y: Tensor, dispatched: Dispatched, top_k_weights: Tensor) -> Tensor:
    """Send the experts' rows back and add up each token's, times its weights: `y` [m, o], `top_k_weights` [T, k] -> [T, o].

    `y` holds a row for each of `dispatch`'s, in its order. Summed in token order, in float32 or wider; the result has the type of `y`.
    Choices that were dropped count as zero rows.
    """
    route, perm, dropping, group, size, rank = dispatched
    _check_back(y, dispatched, top_k_weights)
    rows = exchange_back(y, route, dropping=dropping, group=group, size=size, rank=rank)
    return experts.combine(rows, perm, top_k_weights)


# ---------------------------------------------------------------------------------------------------------------- nodes of a graph


def exchange(x: Tensor, offsets: Tensor, *, dropping: bool = False, group: str, size: int, rank: int) -> tuple[Tensor, Tensor, Route]:
    """Rows sorted by expert to the ranks that hold the experts: `x` [n, h], `offsets` [E] -> `rows` [m, h], `offsets` [E/size], route.

    `offsets` (int32) are the ends of this rank's rows of every expert, those that come back the ends of all ranks' rows of this rank's
    experts; an expert's rows are in the order of the ranks they came from. With `dropping`, rows after the last offset are not sent.
    Two all-to-alls, of E numbers and of the rows; the host waits once, for 2 * size numbers. Its gradient is `exchange_back`.

    On CPUs, whose memory is not much faster than their network, rows are not put into another order where they arrive: from
    `LEAST_MESSAGE` on those of every expert are a message of their own. (Whether they are, all ranks see alike: with its numbers each
    tells how many rows it has.)
    """
    axis = (group, size, rank)
    if size == 1 and not dropping:
        return x, offsets, Route(torch.empty(2, 0, dtype=torch.int64), None, None)  # nothing reads it
    check_even(offsets.shape[0], size)
    if _is_fake(x):
        return _exchange_fake(x, offsets, axis)
    tells = rank >= 0 and offsets.shape[0] > size and x.device.type == "cpu" and not torch.compiler.is_compiling() and not _pretends(group)
    counts = on_rank(lambda _, ends: ends.diff(prepend=ends.new_zeros(1)), axis, offsets)
    told = torch.nn.functional.pad(counts.view(size, -1), (0, 1), value=x.shape[0]).flatten() if tells else counts
    even = [told.shape[0] // size] * size
    received = call(functional.all_to_all_single.default, told, even, even, group)
    if rank >= 0 and _pretends(group):
        received = counts
    splits, order, place, ends = on_rank(partial(_route, size, dropping, tells), axis, x, counts, received)
    if torch.compiler.is_compiling():
        splits = _known(splits, x.shape[0], dropping, order)
    route = Route(splits, order, place)
    return _move(x, route, dropping, axis), ends, route


def exchange_back(y: Tensor, route: Route, *, dropping: bool = False, group: str, size: int, rank: int) -> Tensor:
    """The way back of `exchange`: `y` [m, o], a row for each that arrived -> [n, o], in the order in which they were sent.

    With `dropping`, rows that were not sent come back as zeros. One all-to-all. Its gradient is `exchange`, along the same route.
    """
    if size == 1 and not dropping:
        return y
    if not isinstance(route.splits, Tensor) and not torch.compiler.is_compiling():
        route = route._replace(splits=torch.tensor(route.splits))  # dispatched in compiled code
    return _move(y, route, dropping, (group, size, rank), back=True)


def send_rows(
    x: Tensor, offsets: Tensor, *, dropping: bool = False, group: str, size: int, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`exchange` with tensors only, as a graph wants them: rows, offsets, and the splits, order and place of the route."""
    rows, ends, route = exchange(x, offsets, dropping=dropping, group=group, size=size, rank=rank)
    assert isinstance(route.splits, Tensor)
    none = ends[:0]  # int32 says that there is none
    return rows, ends, route.splits, none if route.order is None else route.order, none if route.place is None else route.place


def return_rows(
    y: Tensor, splits: Tensor, order: Tensor, place: Tensor, *, dropping: bool = False, group: str, size: int, rank: int
) -> Tensor:
    """`exchange_back` along what `send_rows` returned."""
    return exchange_back(y, _route_of(splits, order, place), dropping=dropping, group=group, size=size, rank=rank)


def start_return_rows(y: Tensor, splits: Tensor, order: Tensor, place: Tensor, *, dropping: bool, axis: AxisKey) -> Finish:
    """`return_rows` in two, without autograd: what is returned waits for the rows."""
    return _start_returned(y, _route_of(splits, order, place), dropping, axis)


def check_even(experts: int, size: int) -> None:
    """Raise ConfigError where ranks cannot have as many experts each."""
    if experts % size:
        raise ConfigError(f"expert_all_to_all: {size} ranks do not divide the {experts} experts.")


def without_expert(end: int, rows: int, experts: int) -> ConfigError:
    """What is said of rows that no expert has."""
    return ConfigError(
        f"expert_all_to_all: the offsets end at {end}, x has {rows} rows: every row needs an expert from 0 to {experts - 1} (or "
        "dropping=True, which leaves the rows after the last offset out)."
    )


def sends_by_itself(x: Tensor, *, group: str, size: int, rank: int) -> bool:
    """Whether messages of one's own can be sent: not where ranks are simulated or pretended, nor where a compiler orders what runs."""
    return size > 1 and rank >= 0 and not torch.compiler.is_compiling() and not _is_fake(x) and not _pretends(group)


def _route_of(splits: Tensor, order: Tensor, place: Tensor) -> Route:
    return Route(splits, None, None) if order.dtype == torch.int32 else Route(splits, order, place)


# -------------------------------------------------------------------------------------------------------------------- the route


def _route(
    size: int, dropping: bool, tells: bool, rank: int, x: Tensor, counts: Tensor, received: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """`splits`, `order`, `place` (see `Route`) and the experts' ends, of what this rank sends to every expert and gets for its own."""
    arrived, rows_of = received.view(size, -1).long(), None
    if tells:
        arrived, rows_of = arrived[:, :-1], arrived[:, -1]
    alone = rows_of is not None and int(rows_of.sum()) * x.shape[1] * x.itemsize >= LEAST_MESSAGE * size * counts.shape[0]
    sent, came = (counts.long(), arrived.flatten()) if alone else (counts.view(size, -1).sum(1), arrived.sum(1))
    left = x.shape[0] - sent.sum(0, keepdim=True)
    splits = torch.stack([torch.cat([sent, left]), torch.cat([came, torch.zeros_like(left)])]).cpu()
    if not dropping and not torch.compiler.is_compiling() and splits[0, -1]:
        raise without_expert(x.shape[0] - int(splits[0, -1]), x.shape[0], counts.shape[0])
    ends = arrived.sum(0).cumsum(0).to(torch.int32)
    if alone or arrived.shape[1] == 1:
        return splits, None, None, ends
    total = int(splits[1].sum())
    here = _starts(arrived)
    shift = here - _starts(arrived.t()).t()
    rows = torch.arange(total, device=received.device)
    order = rows + torch.repeat_interleave(shift.t().flatten(), arrived.t().flatten(), output_size=total)
    place = rows - torch.repeat_interleave(shift.flatten(), arrived.flatten(), output_size=total)
    return splits, order, place, ends


def _starts(counts: Tensor) -> Tensor:
    """Where each of the stretches of these lengths starts, if they lie one after the other."""
    flat = counts.flatten()
    return (flat.cumsum(0) - flat).view_as(counts)


def _known(splits: Tensor, n: int, dropping: bool, order: Tensor | None) -> tuple[list[int], list[int]]:
    """The numbers of `splits`, the last of each direction as the rest: a compiler then sees that n rows leave, and as many come back."""
    (*sent, left), (*received, _) = splits.tolist()
    if not dropping:
        torch._check(left == 0, lambda: "expert_all_to_all: every row needs an expert.")
        left = 0
    total = splits[1].sum().item() if order is None else order.shape[0]
    most, all_but_last = sent[:-1], received[:-1]
    return [*most, n - left - sum(most), left], [*all_but_last, total - sum(all_but_last), 0]


def _splits(rows: Tensor, route: Route, axis: AxisKey) -> tuple[Sequence[int], Sequence[int], int]:
    """The rows sent to and received from every rank, and the rows left out."""
    if _is_fake(rows):
        even = [high - low for low, high in (chunk(rows.shape[0], axis[1], rank) for rank in range(axis[1]))]
        return even, even, 0
    (*sent, left), (*received, _) = route.splits.tolist() if isinstance(route.splits, Tensor) else route.splits
    return sent, received, left


def _exchange_fake(x: Tensor, offsets: Tensor, axis: AxisKey) -> tuple[Tensor, Tensor, Route]:
    """Shapes only: this rank receives as many rows as it sends."""
    local = offsets.shape[0] // axis[1]
    order = None if local == 1 else offsets.new_empty(x.shape[0], dtype=torch.int64)
    route = Route(offsets.new_empty(2, axis[1] + 1, dtype=torch.int64), order, order)
    return _move(x, route, False, axis), offsets.new_empty(local), route


def _is_fake(x: Tensor) -> bool:
    return x.is_meta or (not torch.compiler.is_compiling() and isinstance(x, FakeTensor))


@torch.compiler.assume_constant_result
def _pretends(group: str) -> bool:
    """Whether the group has no other ranks, and what it receives means nothing."""
    return dist.get_backend(resolve_process_group(group)) == "fake"


# ------------------------------------------------------------------------------------------------------------------ the movement


def _move(rows: Tensor, route: Route, dropping: bool, axis: AxisKey, *, back: bool = False) -> Tensor:
    """Rows along their route, to the ranks of their experts or `back`."""
    if rows.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        moved: Tensor = _Moved.apply(rows, *route, dropping, axis, back)
        return moved
    return (_returned if back else _sent)(rows, route, dropping, axis)


class _Moved(torch.autograd.Function):
    """`_move`, whose gradient goes the other way. Compiled code reads no numbers in here: it has the gradients of the single steps."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: Splits, order: Tensor | None, place: Tensor | None, *how: Any) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(splits, order, place)
        dropping, axis, back = how
        return _move(rows, Route(splits, order, place), dropping, axis, back=back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dropping, axis, back = ctx.how
        return _move(grad, Route(*ctx.saved_tensors), dropping, axis, back=not back), *(None,) * 6


def _sent(x: Tensor, route: Route, dropping: bool, axis: AxisKey) -> Tensor:
    sent, received, left = _splits(x, route, axis)
    x = on_rank(_contiguous, axis, x[: x.shape[0] - left] if dropping else x)
    if len(sent) > axis[1]:
        return _start_alone(x, _by_rank(sent, axis[1]), _by_expert(received, axis[1]), axis)()
    rows = call(functional.all_to_all_single.default, x, received, sent, axis[0])
    return rows if route.order is None else on_rank(_permuted, axis, rows, route.order)


def _returned(y: Tensor, route: Route, dropping: bool, axis: AxisKey) -> Tensor:
    return _start_returned(y, route, dropping, axis)()


def _start_returned(y: Tensor, route: Route, dropping: bool, axis: AxisKey) -> Finish:
    sent, received, left = _splits(y, route, axis)
    y = on_rank(_contiguous, axis, y) if route.place is None else on_rank(_permuted, axis, y, route.place)
    if len(sent) > axis[1]:
        flying = _start_alone(y, _by_expert(received, axis[1]), _by_rank(sent, axis[1]), axis)
    else:
        flying = begin(functional.all_to_all_single.default, y, sent, received, axis[0])
    if not dropping:
        return flying

    def with_the_rest() -> Tensor:
        rows = flying()
        return torch.cat([rows, rows.new_zeros(left, *rows.shape[1:])])

    return with_the_rest


Stretches = dict[tuple[int, int], tuple[int, int]]
"""(rank, one of its experts, or of this rank's) -> the first and the last row of what goes there, or comes from there."""


def _by_rank(counts: Sequence[int], size: int) -> Stretches:
    """Rows in the order of experts, those of all ranks."""
    local = len(counts) // size
    return _stretches([(at, counts[at]) for at in range(len(counts))], local)


def _by_expert(counts: Sequence[int], size: int) -> Stretches:
    """Rows in the order of this rank's experts, of each those of one rank after the other."""
    local = len(counts) // size
    return _stretches([(rank * local + expert, counts[rank * local + expert]) for expert in range(local) for rank in range(size)], local)


def _stretches(counts: Sequence[tuple[int, int]], local: int) -> Stretches:
    found, start = Stretches(), 0
    for at, count in counts:
        found[divmod(at, local)] = start, start + count
        start += count
    return found


def _start_alone(x: Tensor, here: Stretches, there: Stretches, axis: AxisKey) -> Finish:
    """Every stretch of `x` a message of its own, which arrives in its place."""
    group, _, rank = axis
    x = x.detach()
    result = x.new_empty(sum(stop - start for start, stop in there.values()), *x.shape[1:])
    gone = [(x[start:stop], peer, tag) for (peer, tag), (start, stop) in here.items() if peer != rank and stop > start]
    come = [(result[start:stop], peer, tag) for (peer, tag), (start, stop) in there.items() if peer != rank and stop > start]
    wait = start_messages(gone, come, group)
    for key, (start, stop) in here.items():
        if key[0] == rank:
            result[slice(*there[key])].copy_(x[start:stop])

    def arrived() -> Tensor:
        wait()
        return result

    return arrived


def _contiguous(rank: int, rows: Tensor) -> Tensor:
    return rows.contiguous()


def _permuted(rank: int, rows: Tensor, order: Tensor) -> Tensor:
    return rows.index_select(0, order)


# ------------------------------------------------------------------------------------------------------------- capacity and checks


def _kept(index: Tensor, capacity: int, num_experts: int, weights: Tensor | None) -> Tensor:
    """Which choices [T, k] are within their expert's capacity, in the order of their weights (without: of their tokens)."""
    flat = index.flatten()
    order = torch.arange(flat.shape[0], device=flat.device) if weights is None else weights.flatten().argsort(descending=True, stable=True)
    order = order[flat[order].argsort(stable=True)]
    by_expert = flat[order]
    first = torch.searchsorted(by_expert, torch.arange(num_experts + 1, device=flat.device, dtype=flat.dtype))
    place = torch.arange(flat.shape[0], device=flat.device) - first[by_expert]
    return torch.empty_like(flat, dtype=torch.bool).index_copy_(0, order, place < capacity).view_as(index)


def _axis(group: dist.ProcessGroup | DeviceMesh | None) -> AxisKey:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ConfigError(
                f"expert_all_to_all: a mesh of {group.ndim} axes {group.mesh_dim_names}: pass the one that splits the experts, mesh['ep']."
            )
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if group is None:
        raise ConfigError("expert_all_to_all: there is no process group: call torch.distributed.init_process_group first.")
    return group.group_name, group.size(), -1 if is_simulated() else group.rank()


def _check(
    hidden: Tensor,
    index: Tensor,
    num_experts: int,
    size: int,
    capacity_factor: float | None,
    drop_policy: str,
    weights: Tensor | None,
) -> None:
    """Raise for what does not fit, all complaints at once."""
    wrong = []
    if hidden.dim() != 2 or index.dim() != 2 or hidden.shape[0] != index.shape[0]:
        wrong.append(
            f"hidden {tuple(hidden.shape)} and top_k_index {tuple(index.shape)}: [T, h] and [T, k] of the same tokens are needed; flatten "
            "batch and sequence first, hidden.flatten(0, -2)."
        )
    if index.dtype not in (torch.int32, torch.int64):
        wrong.append(f"top_k_index is {index.dtype}: the number of an expert is an int64 or int32.")
    elif not index.is_meta and index.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(index, FakeTensor):
        wrong += _out_of_range(index, num_experts)
    if num_experts < 1 or num_experts % size:
        wrong.append(f"{size} ranks do not divide {num_experts} experts. Possible: {', '.join(map(str, _divisors(num_experts)))} ranks.")
    if capacity_factor is not None and capacity_factor <= 0:
        wrong.append(f"capacity_factor={capacity_factor}: a positive number, or None to drop nothing.")
    if drop_policy not in ("probs", "position"):
        wrong.append(f"drop_policy={drop_policy!r}: 'probs' (keep the highest router weights) or 'position' (keep the first tokens).")
    if capacity_factor is not None and drop_policy == "probs" and (weights is None or weights.shape != index.shape):
        found = "missing" if weights is None else f"{tuple(weights.shape)}"
        wrong.append(f"drop_policy='probs' needs top_k_weights {tuple(index.shape)}: {found}. Pass them, or drop_policy='position'.")
    raise_all(ConfigError, "expert_all_to_all.dispatch:", wrong)


def _out_of_range(index: Tensor, num_experts: int) -> list[str]:
    found = {rank: (int(x.min()), int(x.max())) for rank, x in local_tensors(index).items() if x.numel()}
    bad = [(low, high) for low, high in found.values() if low < 0 or high >= num_experts]
    return [f"top_k_index holds {low} to {high}: there are experts 0 to {num_experts - 1}." for low, high in bad[:1]]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _check_back(y: Tensor, dispatched: Dispatched, weights: Tensor) -> None:
    wrong = []
    if y.dim() != 2:
        wrong.append(f"y {tuple(y.shape)}: [m, o], a row for each of dispatch's.")
    if weights.dim() != 2 or weights.numel() != dispatched.perm.shape[0]:
        wrong.append(f"top_k_weights {tuple(weights.shape)}: [T, k] of the {dispatched.perm.shape[0]} choices that were dispatched.")
    raise_all(ConfigError, "expert_all_to_all.combine:", wrong)
