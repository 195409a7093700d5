"""A save that goes on while training does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from meshpar.checkpoint.format.faults import StorageError
from meshpar.checkpoint.online.ranks import Group, Ranks


@dataclass
class Saving:
    """A save on its way."""

    path: Path
    ranks: Ranks | None = None
    group: Group = None
    _thread: threading.Thread | None = None
    _failure: list[Exception] = field(default_factory=list)
    _said: bool = False

    def done(self) -> bool:
        """Whether it has ended on this rank, well or badly."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Return when the checkpoint is there. Raises what `save` would have raised, on all ranks."""
        if self._thread is not None:
            self._thread.join()
        if self._failure:
            self._said = True
            self.ranks = None  # connections after a failure are not used again
            raise self._failure[0]

    def settle(self) -> None:
        """Wait before the next save or load; a failure is raised unless `wait` has done so."""
        if self._thread is not None:
            self._thread.join()
        if not self._said:
            self.wait()

    def __deepcopy__(self, memo: object) -> Saving:
        return Saving(self.path)  # a copy of the module has nothing on its way

    def __reduce__(self) -> tuple[type[Saving], tuple[Path]]:
        return Saving, (self.path,)

    def start(self, write: Callable[[], None]) -> None:
        def work() -> None:
            try:
                write()
            except Exception as error:
                self._failure.append(error)
            except BaseException as error:  # it ends the thread, and the save with it
                self._failure.append(StorageError(f"Writing {self.path} was ended by {type(error).__name__}: {error}"))

        self._thread = threading.Thread(target=work, name=f"save {self.path}")
        self._thread.start()


SAVING = "_meshpar_saving"


def last_save(module: nn.Module) -> Saving:
    """The last asynchronous save of a module."""
    found: Saving = module.__dict__.get(SAVING, Saving(Path()))
    return found
