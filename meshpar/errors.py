"""Errors that say what was asked, what was found, which values would do and what to type next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from fnmatch import fnmatchcase


class MeshparError(Exception):
    """Any error raised by meshpar on purpose."""


class ConfigError(MeshparError, ValueError):
    """A configuration, mesh or argument that cannot be meant."""


class CaptureError(MeshparError):
    """The model's forward could not be turned into a graph. `modules`: the paths of the modules at fault, None where that is not known."""

    def __init__(self, *told: object, modules: Sequence[str] | None = None) -> None:
        super().__init__(*told)
        self.modules = modules


class PlanError(MeshparError):
    """No plan satisfies what was asked, or a plan does not fit the model."""


class BatchError(MeshparError, ValueError):
    """A batch that does not fit the model, the mesh or the other ranks."""


class ProgramFault(MeshparError):
    """The program that was made contradicts the model's graph: an error of meshpar, not of the model. The message names place and axis."""


class RankError(MeshparError, RuntimeError):
    """Another rank failed; the message is its own."""


class StageError(MeshparError, RuntimeError):
    """A stage of a pipeline raised; the message says where, for which microbatch, and holds the traceback."""


class CheckpointError(MeshparError):
    """A checkpoint is corrupt, incomplete, or not what was asked for."""


class StateDictError(CheckpointError, RuntimeError):
    """A state dict that does not fit the model: a RuntimeError too, as from torch."""


def near(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """A sentence with the names nearest to `name`, or an empty string.

    >>> near("layer.0.weight", ["layers.0.weight", "head.bias"])
    ' Did you mean layers.0.weight?'
    """
    found = get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" Did you mean {', '.join(found)}?" if found else ""


def near_pattern(pattern: str, names: Iterable[str], *, count: int = 3) -> str:
    """The same for a pattern of dotted names: the patterns that differ from it in one part, else names whose end is most like its end.

    >>> near_pattern("*.q_prj.weight", ["layers.0.q_proj.weight", "norm.weight"])
    ' Did you mean *.q_proj.weight?'
    """
    wanted, known = pattern.split("."), [name.split(".") for name in names]
    fitting: dict[str, float] = {}
    for at, part in enumerate(wanted):
        spare = set(part) - set("*?[]")
        for other in dict.fromkeys(other for name in known for other in name) if spare else ():
            tried = ".".join([*wanted[:at], other, *wanted[at + 1 :]])
            alike = SequenceMatcher(None, part, other).ratio()
            if alike >= 0.6 and any(fnmatchcase(".".join(name), tried) for name in known):
                fitting[tried] = max(alike, fitting.get(tried, 0.0))
    if fitting:
        return f" Did you mean {', '.join(sorted(fitting, key=lambda tried: -fitting[tried])[:count])}?"
    tails = (wanted[at:] for at in range(len(wanted)) if len([part for part in wanted[at:] if "*" not in part]) > 1)
    for tried in (f"*.{'.'.join(tail)}" for tail in tails if tail[0] != "*"):
        if tried != pattern and any(fnmatchcase(".".join(name), tried) for name in known):
            return f" Did you mean {tried}?"
    if "*" not in pattern and any(fnmatchcase(".".join(name), f"*{pattern}*") for name in known):
        return f" Did you mean *{pattern}*?"
    kinds = dict.fromkeys(".".join("*" if part.isdigit() else part for part in name) for name in known)
    return near(pattern, kinds, count=count)


def raise_all(error: type[MeshparError], heading: str, complaints: Sequence[str]) -> None:
    """Raise one `error` that holds every complaint; with none, do nothing.

    >>> raise_all(ConfigError, "ParallelConfig:", [])
    """
    if complaints:
        raise error(f"{heading} {complaints[0]}" if len(complaints) == 1 else "\n  ".join((heading, *complaints)))
