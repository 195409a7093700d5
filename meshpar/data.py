"""Which samples each data rank reads: the global batches of one process, on every mesh, cut among the data ranks.

    batches = mp.data.batches(len(dataset), mesh, global_batch=32)
    loader = DataLoader(dataset, batch_sampler=batches)

    order of an epoch   7 2 5 0 | 3 6 1 4           global batches of 4
    data rank 0         7 2     | 3 6               the share that mp.local_batch would give it
    data rank 1             5 0 |     1 4           ranks that differ on tp, cp or pp alone read the same

A position is a number of global batches since the start of training, which means the same on every mesh.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import Sampler

from meshpar.errors import ConfigError, raise_all
from meshpar.mesh import SIMULATED, data_rank


class Batches(Sampler[list[int]]):
    """For `DataLoader(batch_sampler=)`: lists of this data rank's indices, one epoch at a time. Made by `batches`."""

    def __init__(self, samples: int, rank: int, ranks: int, global_batch: int, *, shuffle: bool, seed: int) -> None:
        self._samples, self._rank, self._ranks, self._size = samples, rank, ranks, global_batch
        self._shuffle, self._seed, self._next = shuffle, seed, 0

    def __len__(self) -> int:
        """Global batches of an epoch."""
        return self._samples // self._size

    def start(self, batch: int) -> Batches:
        """Go on after so many global batches since the start of training, over all epochs: the steps done when a checkpoint was saved.

        (A loader reads ahead, so that only the training loop knows.)
        """
        if batch < 0:
            raise ConfigError(f"start({batch}): the number of global batches that were trained on, at least 0.")
        self._next = batch
        return self

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of the epoch; the next iteration is the next epoch."""
        epoch, first = divmod(self._next, len(self))
        order, share = self._order(epoch), self._size // self._ranks
        self._next = (epoch + 1) * len(self)
        for batch in range(first, len(self)):
            begin = batch * self._size + self._rank * share
            yield order[begin : begin + share]

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(self._samples))
        return torch.randperm(self._samples, generator=torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)).tolist()


def batches(samples: int, mesh: DeviceMesh, *, global_batch: int, shuffle: bool = True, seed: int = 0) -> Batches:
    """The batches of this data rank, of `samples` samples, for `DataLoader(dataset, batch_sampler=)`.

    Every epoch has a new order (with `shuffle`), the same on all ranks and on every mesh for one `seed`. What is left after the last whole
    global batch, less than `global_batch` samples, is left out of the epoch. Raises ConfigError where `global_batch` does not divide among
    the data ranks, or there is no whole batch.

    >>> batches(len(dataset), mesh, global_batch=32).start(1200)                       # doctest: +SKIP
    """
    rank, ranks = data_rank(mesh)
    complaints = []
    if rank == SIMULATED:
        complaints.append(
            "simulated ranks have no data ranks of their own: mp.local_batch(batch, mesh) cuts a global batch for all of them."
        )
    if isinstance(samples, bool) or not isinstance(samples, int):
        complaints.append(f"samples is a {type(samples).__name__}: it is their number, len(dataset).")
    elif global_batch < 1 or samples < global_batch:
        complaints.append(f"global_batch={global_batch} of {samples} samples: at least 1, and no more than there are.")
    if global_batch % ranks:
        complaints.append(
            f"global_batch={global_batch} does not divide among {ranks} data ranks. Take {-(-global_batch // ranks) * ranks}."
        )
    raise_all(ConfigError, "batches:", complaints)
    return Batches(samples, rank, ranks, global_batch, shuffle=shuffle, seed=seed)
