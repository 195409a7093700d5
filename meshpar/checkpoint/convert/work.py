"""A conversion, decided: what is read, what is written, and where every byte goes; proved before anything is written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from meshpar.checkpoint.format import manifest as manifests
from meshpar.checkpoint.format.division import Division
from meshpar.checkpoint.format.opened import Checkpoint
from meshpar.checkpoint.format.sink import Sink
from meshpar.checkpoint.format.table import Chunks, Crcs, Ints, Table
from meshpar.checkpoint.move.transfer import ZERO, Options, Piece, Transfers
from meshpar.checkpoint.names.keymap import Mapped
from meshpar.checkpoint.names.spaces import Link


class Owner(NamedTuple):
    """Whose chunk a target of transfers is: the group of tensors in the new table, the row of each transfer there, the box."""

    group: int
    rows: Ints
    box: int


@dataclass(frozen=True)
class Work:
    """A conversion, decided. `form` is "meshpar" or "hf"."""

    source: Checkpoint
    target: Path
    form: str
    mapped: Mapped
    sink: Sink
    transfers: tuple[Transfers, ...]
    owners: tuple[tuple[Owner | None, ...], ...]  # of each of the transfers: of every target; nobody's is padding
    division: Division
    values: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    keymap: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors, as written."""
        return self.sink.table.nbytes

    def origin(self, options: Options) -> str:
        """A fingerprint of the source and of everything that decides what is written."""
        m, table = self.source.manifest, self.sink.table
        unknown = [] if self.source.form == "meshpar" and m.has_checksums else [self.source.path(k) for k in range(len(m.files))]
        unknown += [self.source.asset_path(asset) for asset in m.assets if not asset.crcs]
        facts = [
            self.form,
            m.files,
            m.assets,
            [os.stat(path).st_mtime_ns for path in unknown],  # nothing else tells that bytes without checksums are the same
            [f.record for f in self.sink.files],  # their headers say where every box goes
            str(self.division.grid),
            [(g.dtype, g.shape, g.kind, g.layout, len(g.position)) for g in table.groups],
            self.mapped.rules,
            [self.values, self.aliases, self.keymap],
            options.checksums,
        ]
        found = hashlib.sha256(repr(facts).encode())
        for column in [*(g.chunks.crcs for g in m.tensors.groups), *(g.position for g in table.groups)]:
            found.update(np.ascontiguousarray(column).data)
        return found.hexdigest()

    def with_checksums(self, found: Sequence[Crcs]) -> Table:
        """The new table with the checksums that were found of the targets of each of the transfers."""
        table = self.sink.table
        done = [np.zeros((len(g.position), sum(g.blocks)), np.uint32) for g in table.groups]
        ends = [list(accumulate(g.blocks, initial=0)) for g in table.groups]
        for t, owners, crcs in zip(self.transfers, self.owners, found, strict=True):
            for owner, end, count in zip(owners, accumulate(t.target_blocks), t.target_blocks, strict=True):
                if owner is not None:
                    start = ends[owner.group][owner.box]
                    done[owner.group][owner.rows, start : start + count] = crcs[:, end - count : end]
        return Table(table.names, [g.with_crcs(crcs) for g, crcs in zip(table.groups, done, strict=True)])


def build(
    source: Checkpoint,
    target: Path,
    form: str,
    mapped: Mapped,
    sink: Sink,
    division: Division,
    *,
    values: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
    keymap: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Work:
    """Turn a key map and files into transfers, and prove once more that what is written tiles every tensor."""
    for g in sink.table.groups:
        manifests.check_tiling(sink.table.names[g.position[0]], g.shape, g.chunks.boxes, "the plan")
    rows = [*_kept(mapped.kept, source.manifest.tensors, sink.table)]
    rows += [_linked(link, source.manifest.tensors, sink.table) for link in mapped.links]
    return Work(
        source,
        target,
        form,
        mapped,
        sink,
        tuple(t for t, _ in rows),
        tuple(owners for _, owners in rows),
        division,
        dict(values or {}),
        dict(aliases or {}),
        tuple(keymap),
        tuple(notes),
    )


def _kept(kept: Mapping[str, str], source: Table, target: Table) -> Iterator[tuple[Transfers, tuple[Owner | None, ...]]]:
    """Transfers of tensors that stay what they are: all at once where they are alike on both sides."""
    new = np.array([target.index[name] for name in kept], np.int64)
    old = np.array([source.index[name] for name in kept.values()], np.int64)
    pair = target.group[new] * len(source.groups) + source.group[old]
    order = np.argsort(pair, kind="stable")
    for which in np.split(order, np.flatnonzero(np.diff(pair[order])) + 1) if len(order) else ():
        k = int(target.group[new[which[0]]])
        ours, theirs, rows = target.groups[k], source.groups[source.group[old[which[0]]]], target.row[new[which]]
        sources, targets = theirs.chunks.take(source.row[old[which]]), ours.chunks.take(rows)
        names = [target.names[at] for at in new[which].tolist()]
        owners = tuple(Owner(k, rows, box) for box in range(len(targets.boxes)))
        yield Transfers(names, theirs.dtype, theirs.shape, sources, targets, ours.dtype), owners


def _linked(link: Link, source: Table, target: Table) -> tuple[Transfers, tuple[Owner | None, ...]]:
    """The transfer of tensors that meet in the space of a link."""
    sources = [Piece(box, ZERO, 0) for box in link.source_padding]
    for place in link.sources:
        for c in source[place.tensor].chunks:
            sources.append(c._replace(box=place.box(c.box, len(link.shape))))
    shape = link.rearrange.shape if link.rearrange else link.shape
    targets = [Piece(box, ZERO, 0) for box in link.target_padding]
    owners: list[Owner | None] = [None] * len(targets)
    for place in link.targets:
        at = target.index[place.tensor]
        for box, p in enumerate(target[place.tensor].chunks):
            targets.append(p._replace(box=place.box(p.box, len(shape))))
            owners.append(Owner(int(target.group[at]), target.row[at : at + 1], box))
    name, both = link.targets[0].tensor, (Chunks.of([sources]), Chunks.of([targets]))
    return Transfers([name], link.dtype, link.shape, *both, link.target_dtype, link.rearrange, link.exact), tuple(owners)
