"""What a file or a state dict has, held against what a model has: every name that does not fit, by kind, in few lines.

    names wanted ─┐
    names found  ─┼─> fit(...) ──> Fit: where each tensor comes from, what is missing, left out, cast; ties to compare; complaints
    the request  ─┘

Nothing here reads a value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os import PathLike

import torch

from meshpar.errors import ConfigError, near, raise_all

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that can be cast into each other; 8-bit floats mean nothing without their scales."""
Patterns = str | Sequence[str]
MOST = 20


@dataclass(frozen=True)
class Weights:
    """A safetensors file, an index, or a directory that holds either, and what is accepted where it does not fit the model.

    The words are those of `mp.checkpoint.load`. Each of the first two is "error", "skip", or patterns of names (`*` stands for anything):

    `missing`: parameters that the file lacks. Skipped ones get the value that the model's own initialisation gives them (a model built
    under `mp.meta()` or on `meta`), or keep the one they have: a new head to be trained.
    `unexpected`: tensors of the file that the model does not have. Names that a pattern matches are left in the file in any case, also
    where the model has them: of two names of one tensor with different values, the one that is not meant.
    `dtype`: "error", or "cast" floating tensors to the model's dtype, or to `Precision(param_dtype=...)`, which asks for it too.

    What was left out is said in a warning. A pattern that matches nothing is an error.

    >>> Weights("model.safetensors", missing=["score.*"], unexpected="skip").missing
    ('score.*',)
    """

    path: str | PathLike[str]
    missing: Patterns = field(default="error", kw_only=True)
    unexpected: Patterns = field(default="error", kw_only=True)
    dtype: str = field(default="error", kw_only=True)

    def __post_init__(self) -> None:
        complaints = [text for name in ("missing", "unexpected") for text in _choice(name, getattr(self, name))]
        if not isinstance(self.path, (str, PathLike)):
            complaints.append(
                f"{self.path!r} is no path: give that of a safetensors file, of an index, or of a directory that holds either."
            )
        if self.dtype not in ("error", "cast"):
            complaints.append(f"dtype={self.dtype!r}: expected 'error' or 'cast'.")
        raise_all(ConfigError, "Weights:", complaints)
        for name in ("missing", "unexpected"):
            if not isinstance(getattr(self, name), str):
                object.__setattr__(self, name, tuple(getattr(self, name)))


def _choice(name: str, value: object) -> list[str]:
    if isinstance(value, str):
        if value in ("error", "skip"):
            return []
        return [
            f"{name}={value!r}: expected 'error', 'skip' or a list of patterns.{near(value, ('error', 'skip'))} One pattern: [{value!r}]."
        ]
    if not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        return [f"{name}={value!r}: expected 'error', 'skip' or a list of patterns of names."]
    return []


@dataclass(frozen=True)
class Fact:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Words:
    """How the kinds of complaints are put, where what is wrong was given, and what to do about each."""

    missing: str
    unexpected: str
    shape: str
    to_skip_missing: str
    to_skip_unexpected: str
    to_cast: str


@dataclass(frozen=True)
class Fit:
    """What comes of it. `source`: the name of each tensor (by each of its names) in the file; `twins`: further ones, to be compared."""

    source: Mapping[str, str]
    twins: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    left: tuple[str, ...]
    complaints: tuple[str, ...]


def fit(
    wanted: Sequence[Sequence[str]],
    facts: Mapping[str, Fact],
    found: Mapping[str, Fact],
    words: Words,
    *,
    missing: Patterns = "error",
    unexpected: Patterns = "error",
    casts: bool = False,
    needed: Collection[str] = (),
    ignored: Sequence[str] = (),
) -> Fit:
    """Hold names, shapes and dtypes against each other.

    `wanted`: the tensors of the model, each with all of its names; `facts` of each name. Those with a name in `needed` must be found.
    `ignored`: regular expressions of names that the model itself says it can do without.
    """
    known = {name for group in wanted for name in group}
    patterns = () if isinstance(unexpected, str) else unexpected
    by_pattern = [n for n in found if any(fnmatchcase(n, p) for p in patterns)]
    strange = [n for n in found if n not in known and n not in set(by_pattern)]
    ignorable = [n for n in strange if unexpected == "skip" or any(re.search(p, n) for p in ignored)]
    left = (*by_pattern, *ignorable)
    here = {n: fact for n, fact in found.items() if n not in set(left)}
    source, twins, absent = dict[str, str](), list[tuple[str, str]](), list[str]()
    for group in wanted:
        present = [n for n in group if n in here]
        source |= dict.fromkeys(group, present[0]) if present else {}
        twins += [(present[0], other) for other in present[1:]]
        absent += [] if present or not set(group) & set(needed) else [group[0]]
    skipped = [n for n in absent if missing == "skip" or (not isinstance(missing, str) and any(fnmatchcase(n, p) for p in missing))]
    lacking = [n for n in absent if n not in set(skipped)]
    extra = [n for n in here if n not in known]
    complaints = [
        *_unmatched("unexpected", patterns, (*found, *known)),
        *_unmatched("missing", () if isinstance(missing, str) else missing, tuple(known)),
        *listed(lacking, words.missing, extra, words.to_skip_missing),
        *listed(extra, words.unexpected, lacking or tuple(known), words.to_skip_unexpected),
        *_shapes(here, facts, words),
        *_dtypes(here, facts, casts, words),
    ]
    return Fit(source, tuple(twins), tuple(skipped), tuple(left), tuple(complaints))


def pattern(name: str) -> str:
    """The name with its numbers as stars.

    >>> pattern("model.layers.12.self_attn.q_proj.weight")
    'model.layers.*.self_attn.q_proj.weight'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def gathered(names: Sequence[str]) -> dict[str, list[str]]:
    """Names that differ in their numbers only, together: by their pattern where there are several, else by the name."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(pattern(name), []).append(name)
    return {shape if len(members) > 1 else members[0]: members for shape, members in groups.items()}


def shortened(names: Sequence[str], *, most: int = MOST) -> str:
    """Names in a sentence.

    >>> shortened(["head", "layers.0.w", "layers.1.w"])
    'head, layers.*.w (2 tensors)'
    """
    groups = gathered(names)
    shown = [_counted(label, members) for label, members in list(groups.items())[:most]]
    return ", ".join(shown) + (f" and {len(groups) - most} more" if len(groups) > most else "")


def listed(names: Sequence[str], what: str, known: Sequence[str], advice: str = "") -> list[str]:
    """A complaint about each kind of names, at most `MOST`, then one line of advice; near misses are slow to find among very many."""
    groups = gathered(names)
    lines = []
    for label, members in list(groups.items())[:MOST]:
        lines.append(f"{what.format(_counted(label, members))}{near(members[0], known) if len(known) < 20_000 else ''}")
    if len(groups) > MOST:
        rest = [name for members in list(groups.values())[MOST:] for name in members]
        lines.append(f"... and {len(rest)} more: {what.format('each')}")
    return lines + ([advice] if lines and advice else [])


def _counted(label: str, members: Sequence[str]) -> str:
    return f"{label} ({len(members)} tensors)" if len(members) > 1 else label


def _unmatched(option: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    return [
        f"{option}={[p]!r} matches no name.{near(p, {pattern(n): None for n in names})}"
        for p in patterns
        if not any(fnmatchcase(n, p) for n in names)
    ]


def _shapes(here: Mapping[str, Fact], facts: Mapping[str, Fact], words: Words) -> list[str]:
    wrong: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name, fact in here.items():
        if name in facts and fact.shape != facts[name].shape:
            wrong.setdefault((pattern(name), fact.shape, facts[name].shape), []).append(name)
    lines = [
        words.shape.format(_counted(label if len(names) > 1 else names[0], names), list(found), list(own))
        for (label, found, own), names in wrong.items()
    ]
    return lines[:MOST] + ([f"... and {len(lines) - MOST} more kinds of names with another shape."] if len(lines) > MOST else [])


def _dtypes(here: Mapping[str, Fact], facts: Mapping[str, Fact], casts: bool, words: Words) -> list[str]:
    wrong: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for name, fact in here.items():
        if name in facts and fact.dtype != facts[name].dtype and not (casts and castable(fact.dtype, facts[name].dtype)):
            wrong.setdefault((fact.dtype, facts[name].dtype), []).append(name)
    lines = []
    for (found, own), names in wrong.items():
        verb = "is" if len(names) == 1 else "are"
        said = f"{shortened(names, most=5)} {verb} {short(found)}, the model's {short(own)}."
        lines.append(said + (words.to_cast.format(short(found), short(own)) if castable(found, own) else _uncastable(found, own)))
    return lines


def castable(found: torch.dtype, own: torch.dtype) -> bool:
    """Whether values of one dtype can be taken as those of another."""
    return found == own or (found in FLOATS and own in FLOATS)


def _uncastable(found: torch.dtype, own: torch.dtype) -> str:
    if found.is_floating_point and found.itemsize == 1:
        return " 8-bit floats have scales of their own: write the file again in the model's dtype."
    return f" Only {', '.join(map(short, FLOATS))} are cast into each other."


def short(dtype: torch.dtype) -> str:
    """A dtype's name.

    >>> short(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")
