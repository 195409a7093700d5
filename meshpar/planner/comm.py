"""How long a collective takes: the levels its group spans, the bytes on the narrowest of them, and a latency for every step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from meshpar.planner.workload import AxisSpan


@dataclass(frozen=True, slots=True)
class RankGroup:
    """A group of ranks as the fabric sees it."""

    size: int
    inside: int
    """Ranks of the group in one fast domain."""

    @property
    def domains(self) -> int:
        return -(-self.size // self.inside)


@dataclass(frozen=True, slots=True)
class Fabric:
    """Rates that collectives reach, in bytes/s and seconds."""

    link: float
    nic: float
    latency: float
    """Of starting a collective."""
    hop: float
    """Of one more rank in a ring that leaves its domain."""
    one_adapter: bool = False
    """Rings leave a domain through one adapter, however many of their ranks are in it."""

    def seconds(self, kind: str, group: RankGroup, size: float, copies: int = 1) -> float:
        """The time of one collective of `size` bytes as `workload.Collective` counts them; nothing for a group of one.

        >>> Fabric(400e9, 40e9, 0, 0).seconds("all_gather", RankGroup(8, 8), 8e9)
        0.0175
        """
        n = group.size
        if n == 1 or size == 0:
            return 0.0
        moved = size * (n - 1) / n
        hops = self.hop * (n - 1) if group.domains > 1 else 0.0
        if kind == "all_to_all":
            return self.latency + hops / group.inside + self._exchange(group, size, copies)
        if kind == "ring":
            return self.latency * (n - 1) + hops + moved / self.slowest(group, per_rank=True)
        rounds = 2 if kind == "all_reduce" else 1  # a sum comes by trees: twice the bytes, not twice the hops
        return self.latency + hops + rounds * moved / self.slowest(group)

    def slowest(self, group: RankGroup, *, per_rank: bool = False) -> float:
        """Bytes/s of the narrowest level: links inside a domain, else the adapters of all ranks the group has there.

        A ring whose hops are single transfers (`per_rank`) crosses with one adapter.
        """
        if group.domains == 1:
            return self.link
        return min(self.link, self.nic * (1 if per_rank or self.one_adapter else group.inside))

    def _exchange(self, group: RankGroup, size: float, copies: int) -> float:
        """All-to-all: what stays in the domain over links, what leaves over each rank's own adapter, the two at once.

        Of `copies` rows alike one goes to every domain that wants some, and there one to every rank that does.
        """
        n, inside, domains = group.size, group.inside, group.domains
        crossing = size * (n - inside) / n * _distinct(domains, copies) / copies
        within = size * (inside - 1) * (_distinct(n, copies) / copies / inside if copies > 1 else 1 / n)
        return max(within / self.link, crossing / self.nic)

    def transfer(self, size: float, *, inside: bool) -> float:
        """Seconds of `size` bytes from one rank to another."""
        return self.latency + (size / self.link if inside else self.hop + size / self.nic)


def _distinct(places: int, copies: int) -> float:
    """How many of `places` get something when `copies` are spread at random.

    >>> _distinct(8, 1), round(_distinct(8, 8), 2)
    (1.0, 5.25)
    """
    return places * (1 - (1 - 1 / places) ** copies)


@cache
def place(axis: AxisSpan, domain: int) -> RankGroup:
    """The group of an axis on domains of so many ranks: neighbours are `stride` apart, so that a domain holds domain / stride of them.

    >>> place(AxisSpan("dp", 8, 4), 8)
    RankGroup(size=8, inside=2)
    """
    held = min(axis.size, max(1, domain // axis.stride))
    while axis.size % held:
        held -= 1
    return RankGroup(axis.size, held)
