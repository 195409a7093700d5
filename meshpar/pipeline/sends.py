"""Messages under way: what is sent is kept until it has arrived, and not a moment longer.

NCCL's works tell when they are done. Gloo's sends do so only to one who waits for them: a thread does, in the order in which they were
sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread

import torch
import torch.distributed as dist

Message = tuple[Sequence[dist.Work], Sequence[torch.Tensor]]


class Sends:
    """The messages of one step. `add` each, and `finish` in the end."""

    def __init__(self, device: torch.device) -> None:
        self._telling = device.type != "cpu"
        self._messages: list[Message] = []
        self._queue: SimpleQueue[Message | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def add(self, works: Sequence[dist.Work], tensors: Sequence[torch.Tensor]) -> None:
        """Keep `tensors` until `works` are done. Raises what an earlier send raised."""
        if self._telling:
            self._messages = [m for m in self._messages if not all(work.is_completed() for work in m[0])] + [(works, tensors)]
            return
        if self._thread is None:
            self._thread = Thread(target=self._wait, name="meshpar-sends", daemon=True)
            self._thread.start()
        self._queue.put((works, tensors))
        self._raise()

    def finish(self) -> None:
        """Wait until everything has arrived."""
        for message in self._messages:
            _arrived(message)
        self._messages = []
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _wait(self) -> None:
        try:
            while (message := self._queue.get()) is not None:
                _arrived(message)
                del message  # or this frame would keep it until the next one
        except Exception as error:  # a lost connection: the step raises it
            self._error = error


def _arrived(message: Message) -> None:
    for work in message[0]:
        work.wait()
