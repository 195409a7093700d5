"""What each mesh axis does: one row an axis, outermost first. No other file compares an axis with a name.

    axis           divides     own batches   gradients   parameters             typed as
    pp             stages      no            its own     each rank its own      -
    dp             samples     yes           summed      shared out             dp
    dp_replicate   samples     yes           summed      a copy on every rank   dp
    dp_shard       samples     yes           summed      shared out             dp
    cp             sequence    no            summed      shared out             cp
    ep             experts     yes           summed      shared out, or cut     ep
    tp             weights     no            its own     cut                    tp

The axis that talks most is innermost, inside the fastest links. Values are typed on one axis after the other, in the order of the rows;
axes that are typed as one are one axis to the solver and to lowering. A new axis is a row here, and, where it divides something new, a
policy in `sharding.policy` (a mesh may name an axis whose policy is missing; `parallelize` says so).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Divides = Literal["stages", "samples", "sequence", "experts", "weights"]


@dataclass(frozen=True, slots=True)
class Role:
    """What an axis does."""

    divides: Divides
    own_batches: bool = False
    """Whether its ranks are fed batches of their own."""
    sums: bool = False
    """Whether gradients of what its ranks share are pending sums: each saw samples, or positions, of its own."""
    shares_out: bool = False
    """Whether data parallelism shares parameters, gradients and optimizer state out over it."""
    typed: str | None = None
    """The name under which values are typed on it; None for stages, which run different programs."""

    @property
    def cuts_parameters(self) -> bool:
        """Whether the plan may leave each of its ranks a part of a parameter."""
        return self.divides in ("experts", "weights")


ROLES: dict[str, Role] = {
    "pp": Role("stages"),
    "dp": Role("samples", own_batches=True, sums=True, shares_out=True, typed="dp"),
    "dp_replicate": Role("samples", own_batches=True, sums=True, typed="dp"),
    "dp_shard": Role("samples", own_batches=True, sums=True, shares_out=True, typed="dp"),
    "cp": Role("sequence", sums=True, shares_out=True, typed="cp"),
    "ep": Role("experts", own_batches=True, sums=True, shares_out=True, typed="ep"),
    "tp": Role("weights", typed="tp"),
}


def names() -> tuple[str, ...]:
    """All axes, outermost first."""
    return tuple(ROLES)


def dividing(what: Divides, among: Iterable[str] | None = None) -> tuple[str, ...]:
    """The axes, of those in `among` or of all, that divide stages, samples, the sequence, experts or weights."""
    return tuple(name for name in (ROLES if among is None else among) if ROLES[name].divides == what)


def stage_axis() -> str:
    """The axis whose ranks run different stages."""
    return dividing("stages")[0]


def with_own_batches(among: Iterable[str], *, without: Divides | None = None) -> tuple[str, ...]:
    """Those of the axes whose ranks are fed batches of their own, except those that divide `without`."""
    return tuple(name for name in among if ROLES[name].own_batches and ROLES[name].divides != without)


def summing(among: Iterable[str], *, without: Divides | None = None) -> tuple[str, ...]:
    """Those of the axes over which gradients are summed, except those that divide `without`."""
    return tuple(name for name in among if ROLES[name].sums and ROLES[name].divides != without)


def copying(among: Iterable[str]) -> tuple[str, ...]:
    """Those of the axes that gradients are summed over on every rank of which data parallelism keeps a copy."""
    return tuple(name for name in among if ROLES[name].sums and not ROLES[name].shares_out)


def typed(among: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name under which values are typed -> the axes, of those in `among`, that it stands for; in the order of typing.

    >>> typed(["pp", "dp_replicate", "dp_shard", "tp"])
    {'dp': ('dp_replicate', 'dp_shard'), 'tp': ('tp',)}
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(among, key=list(ROLES).index):
        if (one := ROLES[name].typed) is not None:
            found[one] = (*found.get(one, ()), name)
    return found
