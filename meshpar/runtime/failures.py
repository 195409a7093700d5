"""Ranks that fail together: when one raises, the others raise its message within seconds instead of waiting for it for ever.

    rank 3  raises ──> posts its message, and its connections' end points, to the job's store ──> raises
    rank 0  waits in a collective     its watcher sees the post and cuts the connections to rank 3, as if rank 3 had died:
                                      the collective fails ──> RankError with the message of rank 3

A rank that leaves for this reason posts too, so that those who wait for it leave as well. If all ranks raise within a moment (a mistake of
all of them), nothing is cut and each raises its own error: the process groups stay usable. Groups of NCCL are aborted instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshpar._torch import clone_store, default_store, local_tensor_mode
from meshpar.errors import RankError

POLL = 0.5
"""Seconds between two looks at the store."""
GRACE = 1.5
"""Seconds in which ranks that raise count as raising together."""

_LOST = ("connection", "peer", "gloo", "nccl", "abort", "socket", "broken pipe", "timed out", "timeout")


@dataclass(frozen=True, slots=True)
class Post:
    """What a rank that leaves says: where it was, why, and which end points its connections have; `follows` if another left first."""

    rank: int
    where: str
    message: str
    follows: bool
    endpoints: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return f"rank {self.rank} failed in {self.where}: {self.message}"


class Board:
    """The posts of the ranks of a mesh, in the job's store. A failure is complete when every rank has posted once more."""

    def __init__(self, store: dist.Store, ranks: tuple[int, ...]) -> None:
        name = hashlib.sha256(repr(ranks).encode()).hexdigest()[:12]
        self._store = dist.PrefixStore(f"meshpar/together/{name}", store)
        self.size = len(ranks)

    def post(self, post: Post) -> int:
        """Add a post; its number, from 1."""
        number = self._store.add("count", 1)
        values = {"rank": post.rank, "where": post.where, "message": post.message, "follows": post.follows, "endpoints": post.endpoints}
        self._store.set(str(number), json.dumps(values))
        return number

    def count(self) -> int:
        """How many posts there are."""
        return self._store.add("count", 0)

    def open_posts(self) -> tuple[Post, ...]:
        """The posts of a failure that is not complete."""
        count = self.count()
        return self._posts(count - count % self.size, count)

    def _posts(self, start: int, stop: int) -> tuple[Post, ...]:
        found = (json.loads(self._store.get(str(number + 1))) for number in range(start, stop))
        return tuple(Post(**{**values, "endpoints": tuple((host, port) for host, port in values["endpoints"])}) for values in found)


class Together:
    """Sections of code that the ranks of a mesh leave together.

    >>> with Together(mesh).section("train_step"):  # doctest: +SKIP
    ...     step()
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._board: Board | None = None
        self._watcher: Watcher | None = None
        if local_tensor_mode() is None and mesh.size() > 1 and dist.get_backend() != "fake":
            ranks = tuple(mesh.mesh.flatten().tolist())
            store = default_store()
            self._board = Board(store, ranks)
            self._watcher = Watcher(Board(clone_store(store), ranks), mesh)
            weakref.finalize(self, self._watcher.stop)

    @contextmanager
    def section(self, where: str) -> Iterator[None]:
        """Raise `RankError` with the message of the rank that failed first, if another than this one did."""
        try:
            yield
        except Exception as error:
            if self._board is not None:
                self._leave(where, error)
            raise

    def close(self) -> None:
        """Stop watching."""
        if self._watcher is not None:
            self._watcher.stop()

    def _leave(self, where: str, error: Exception) -> None:
        """Post, and raise `RankError` if this failure follows from another rank's."""
        assert self._board is not None and self._watcher is not None
        first = self._first_to_leave() if looks_lost(error) else None
        follows = first is not None
        message = f"{type(error).__name__}: {error}" if not follows else "left because another rank failed"
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
        number = 0
        try:
            number = self._board.post(Post(self._rank, where, message + place, follows, own_endpoints()))
        except RuntimeError:  # the store is gone with the rank that held it
            self._watcher.stop()
        if first is not None:
            raise RankError(f"{first}\n  This is rank {self._rank}, which waited for it in {where}.") from error
        if looks_lost(error):
            raise RankError(
                f"rank {self._rank} lost its connection to another rank in {where}, and no rank left a message: one was killed "
                f"(out of memory?) or failed outside of meshpar. Its own log says more. {error}"
            ) from error
        self._wait_for_others(number)

    def _first_to_leave(self) -> Post | None:
        """The post that the others follow; it may come a moment later than the connection breaks."""
        assert self._board is not None and self._watcher is not None
        deadline = time.monotonic() + GRACE
        while True:
            posts: tuple[Post, ...] = self._watcher.seen
            try:
                posts = posts or self._board.open_posts()
            except RuntimeError:
                return posts[0] if posts else None
            if posts or time.monotonic() > deadline:
                return next((p for p in posts if not p.follows), posts[0]) if posts else None
            time.sleep(POLL / 5)

    def _wait_for_others(self, number: int) -> None:
        """Stay for a moment after post `number`, so that those who fail too are counted, and the others can read why."""
        assert self._board is not None
        complete = -(-number // self._board.size) * self._board.size
        deadline = time.monotonic() + GRACE + 2 * POLL
        try:
            while self._board.count() < complete and time.monotonic() < deadline:
                time.sleep(POLL / 10)
        except RuntimeError:  # the store is gone: the others have read it, or left
            return


class Watcher(threading.Thread):
    """Looks at the board; when only some ranks have posted for longer than a moment, cuts the connections to them."""

    def __init__(self, board: Board, mesh: DeviceMesh) -> None:
        super().__init__(name="meshpar-together", daemon=True)
        self.seen: tuple[Post, ...] = ()
        self._board = board
        self._groups = [group for group in mesh.get_all_groups() if "nccl" in str(dist.get_backend_config(group))]
        self._rank = dist.get_rank()
        self._stopped = threading.Event()
        self._cut: set[tuple[str, int]] = set()
        self.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def run(self) -> None:
        """Look, wait, and act."""
        first, since = None, 0.0
        while not self._stopped.wait(POLL):
            try:
                self.seen = self._board.open_posts()
            except RuntimeError:  # the store is gone, and with it what could be watched
                return
            if not self.seen or self.seen[0] != first:
                first, since = (self.seen[0] if self.seen else None), time.monotonic()
            elif time.monotonic() - since > GRACE:
                self._act()

    def _act(self) -> None:
        gone = {endpoint for post in self.seen if post.rank != self._rank for endpoint in post.endpoints} - self._cut
        if gone:
            self._cut |= gone
            for group in self._groups:
                group.abort()
            cut(gone)


def own_endpoints() -> tuple[tuple[str, int], ...]:
    """This process's ends of its TCP connections, without those to the store."""
    return tuple(_endpoint(s.getsockname()) for s in _connections())


def cut(endpoints: set[tuple[str, int]]) -> None:
    """Shut down this process's connections to other processes' `endpoints`: whoever waits on one gets an error."""
    for connection in _connections():
        if _endpoint(connection.getpeername()) in endpoints:
            connection.shutdown(socket.SHUT_RDWR)


def _connections() -> Iterator[socket.socket]:
    """This process's connected TCP sockets, without those to the job's store."""
    store = int(os.environ.get("MASTER_PORT", "0"))
    for name in os.listdir("/dev/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                tcp = connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM
                if tcp and store not in (_endpoint(connection.getpeername())[1], _endpoint(connection.getsockname())[1]):
                    yield connection
        except OSError:  # closed meanwhile, or listening
            continue


def _endpoint(address: Any) -> tuple[str, int]:
    return str(address[0]), int(address[1])


def looks_lost(error: Exception) -> bool:
    """Whether an error is what a broken connection looks like, rather than a mistake of this rank's own."""
    return isinstance(error, (RankError, dist.DistError)) or (
        type(error) is RuntimeError and any(word in str(error).lower() for word in _LOST)
    )
