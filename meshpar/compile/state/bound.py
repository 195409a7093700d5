"""Whether values at many places are still what they were, told in microseconds: what a step asks before it runs.

Almost always nothing has changed. Then it is enough that every place holds the very object that it held: places are bound once to the
dictionaries and lists that hold them, and compared by identity. Only if one differs are all of them looked at.
"""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from operator import attrgetter, contains, getitem, is_
from typing import Any

import torch
from torch import Tensor

from meshpar.capture.state.places import ABSENT, ANY, CONTAINERS, Picture, Place, same
from meshpar.capture.state.taken import token_of

_CONTENTS = attrgetter("cell_contents")


class Bound:
    """`values`: place -> what is compared with what is there now; `tensors`: plain tensors, and their versions."""

    def __init__(self, values: Mapping[Place, Any], tensors: Mapping[Place, tuple[Tensor, int]], roots: Mapping[str, Any]) -> None:
        self.values, self.tensors, self.roots = dict(values), dict(tensors), roots
        self._calls = [(roots[p.root].calls[p.steps[-1][1]], value) for p, value in values.items() if p.steps[-1][0] == "call"]
        self._fast: tuple[list[Any], ...] | None = None

    def holds(self) -> bool:
        """Whether every place holds what it did."""
        for ask, value in self._calls:
            if ask() != value:
                return False
        if self._fast is not None and self._unmoved(*self._fast):
            return True
        if any(not self._holds(place) for place in self.values):
            return False
        self._fast = self._bind()
        return True

    def changed(self) -> list[Place]:
        """The places that hold something else."""
        return [place for place in self.values if not self._holds(place)]

    def _holds(self, place: Place) -> bool:
        now, before = place.value(self.roots), self.values[place]
        if place not in self.tensors:
            return same(now, before)
        tensor, version = self.tensors[place]
        if token_of(tensor) != version:
            return False
        return now is tensor or _equal(now, tensor)

    @staticmethod
    def _unmoved(
        owners: list[Any], keys: list[Any], last: list[Any], empty: list[Any], names: list[Any], lists: list[Any], lengths: list[int],
        others: list[Any], versions: list[Any], cells: list[Any], contents: list[Any],
    ) -> bool:  # fmt: skip
        try:
            if not all(map(is_, map(getitem, owners, keys), last)) or not all(map(is_, map(_CONTENTS, cells), contents)):
                return False
        except (LookupError, ValueError):  # ValueError: an empty cell
            return False
        if any(map(contains, empty, names)) or list(map(len, lists)) != lengths:
            return False
        return all(same(place.value(roots), value) for place, roots, value in others) and all(token_of(t) == v for t, v in versions)

    def _bind(self) -> tuple[list[Any], ...]:
        owners, keys, empty, names, lists, others, cells, contents = (list[Any]() for _ in range(8))
        for place, value in self.values.items():
            kind, key = place.steps[-1]
            if kind == "call":
                continue
            try:
                owner = place.owner(self.roots)
            except (AttributeError, LookupError, TypeError, ValueError):
                others.append((place, self.roots, value))
                continue
            table = getattr(owner, "__dict__", None) if kind == "attr" else owner
            if kind == "cell":
                cells.append(owner)
                contents.append(owner.cell_contents)
                self._bind_items(contents[-1], owners, keys, lists, others, place)
                continue
            if isinstance(owner, type) and kind == "attr":
                bases = [vars(base) for base in (*owner.__mro__, *type.mro(type(owner)))]
                at = next((i for i, held in enumerate(bases) if key in held), None)
                if at is None:
                    others.append((place, self.roots, value))
                    continue
                empty += bases[:at]
                names += [key] * at
                owners.append(bases[at])
                keys.append(key)
                self._bind_items(bases[at][key], owners, keys, lists, others, place)
                continue
            if owner is os.environ or not isinstance(table, (dict, list, tuple)):
                others.append((place, self.roots, value))
                continue
            inside = key in table if isinstance(table, dict) else True
            if not inside:
                empty.append(table)
                names.append(key)
                base = next((b for b in type(owner).__mro__ if key in vars(b)), None) if value is not ABSENT else None
                if base is None and value is not ABSENT:
                    others.append((place, self.roots, value))
                if base is None:
                    continue
                table = vars(base)
            owners.append(table)
            keys.append(key)
            self._bind_items(table[key], owners, keys, lists, others, place)
        versions = [(tensor, version) for tensor, version in self.tensors.values()]
        return (
            owners,
            keys,
            [o[k] for o, k in zip(owners, keys, strict=True)],
            empty,
            names,
            lists,
            [len(x) for x in lists],
            others,
            versions,
            cells,
            contents,
        )

    def _bind_items(self, value: Any, owners: list[Any], keys: list[Any], lists: list[Any], others: list[Any], place: Place) -> None:
        """What a container holds."""
        if isinstance(self.values[place], Picture):
            others.append((place, self.roots, self.values[place]))
            return
        if type(value) not in CONTAINERS or isinstance(value, tuple | frozenset):
            return
        if isinstance(value, set):
            others.append((place, self.roots, self.values[place]))
            return
        was: Any = self.values[place]
        value, was = (vars(x) if isinstance(x, types.SimpleNamespace) else x for x in (value, was))
        lists.append(value)
        for key in value if isinstance(value, dict) else range(len(value)):
            if was[key] is not ANY:
                owners.append(value)
                keys.append(key)


def _equal(a: Any, b: Tensor) -> bool:
    """Whether two plain tensors are the same constants."""
    if not isinstance(a, Tensor) or (a.shape, a.dtype, a.device, a.requires_grad) != (b.shape, b.dtype, b.device, b.requires_grad):
        return False
    return a.is_meta or torch.equal(a, b)
