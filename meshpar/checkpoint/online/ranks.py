"""The ranks that save or load together: small objects travel between them, and if one fails, all raise what it said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from meshpar.errors import RankError

Group = dist.ProcessGroup | None
T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """What an exception on some rank said; on that rank also the exception."""

    text: str
    error: Exception | None = None

    def __reduce__(self) -> tuple[type[Failure], tuple[str]]:
        return Failure, (self.text,)  # exceptions do not all travel


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group; one process without one is rank 0 of 1. Rank 0 leads."""

    group: Group
    rank: int
    world: int

    @classmethod
    def of(cls, group: Group) -> Ranks:
        if not dist.is_initialized():
            return cls(None, 0, 1)
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def apart(self) -> Ranks:
        """The same ranks over connections of their own (gloo), which a thread may use beside training. Collective."""
        if self.world == 1:
            return self
        members = dist.get_process_group_ranks(self.group)
        whole = len(members) == dist.get_world_size()
        return Ranks(dist.new_group(members, backend="gloo", use_local_synchronization=not whole), self.rank, self.world)

    def everyone(self, mine: T | Failure) -> list[T]:
        """Everybody's object, by rank. If any rank passes a Failure, all raise."""
        found: list[Any] = [mine]
        if self.world > 1:
            found = [None] * self.world
            with _connected():
                dist.all_gather_object(found, mine, group=self.group)
        return _successes(found, mine)

    def to_lead(self, mine: T | Failure) -> list[T]:
        """On rank 0 everybody's object, else nothing. Rank 0 raises if any of them is a Failure; the others must `hear` so."""
        if self.world == 1:
            return _successes([mine])
        found: list[Any] | None = [None] * self.world if self.rank == 0 else None
        with _connected():
            dist.gather_object(mine, found, group=self.group, group_dst=0)
        return _successes(found or [])

    def tell(self, text: str = "", error: Exception | None = None) -> None:
        """Rank 0 says something to all, or why it failed. A failure is told as well as the connections allow."""
        if self.world == 1:
            return
        box: list[Any] = [text, None if error is None else describe(error)]
        if error is not None:
            with suppress(RankError), _connected():
                dist.broadcast_object_list(box, group=self.group, group_src=0)
            return
        with _connected():
            dist.broadcast_object_list(box, group=self.group, group_src=0)

    def hear(self) -> str:
        """What rank 0 told. Raises RankError with its message if it failed."""
        box: list[Any] = [None, None]
        with _connected():
            dist.broadcast_object_list(box, group=self.group, group_src=0)
        if box[1] is not None:
            raise RankError(box[1] if box[1].startswith("rank ") else f"rank 0: {box[1]}")
        return str(box[0])


def attempt(act: Callable[[], T]) -> T | Failure:
    """A result, or what the error said: to be handed to the other ranks before anybody raises."""
    try:
        return act()
    except Exception as error:
        return Failure(describe(error), error)


def describe(error: Exception) -> str:
    return str(error) if isinstance(error, RankError) else f"{type(error).__name__}: {error}"


def _successes(found: Sequence[Any], mine: Any = None) -> list[Any]:
    if len(found) == 1 and isinstance(found[0], Failure) and found[0].error is not None:
        raise found[0].error  # alone, the error itself says more than a report of it
    texts = {item.text if isinstance(item, Failure) else None for item in found}
    if isinstance(mine, Failure) and mine.error is not None and texts == {mine.text}:
        raise mine.error  # a mistake of all
    failed = [f"rank {rank}: {item.text}" for rank, item in enumerate(found) if isinstance(item, Failure)]
    if failed:
        more = f"; and {len(failed) - 4} more ranks" if len(failed) > 4 else ""
        raise RankError("; ".join(failed[:4]) + more)
    return list(found)


@contextmanager
def _connected() -> Iterator[None]:
    """Turn a lost connection into an error that says so."""
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:
        raise RankError(
            "the connection to another rank was lost: one was killed (out of memory?) or left. No checkpoint appears; earlier ones are as "
            f"they were. ({error})"
        ) from error
