"""The Plan: every decision about a parallel model as plain data, hashable, comparable across ranks, and readable from JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from meshpar.errors import PlanError
from meshpar.sharding.types import Invariant, Owned, Partial, Ragged, Replicate, Shard, Type

VERSION = 3


@dataclass(frozen=True, slots=True)
class NodePlan:
    """How one operator runs on one axis: the type each operand is used at, the type of each result, and the reason."""

    uses: tuple[Type, ...]
    outs: tuple[Type, ...]
    why: str
    handed: tuple[Type | None, ...] = ()
    """The type in which each result goes to other blocks, where one does."""


@dataclass(frozen=True)
class AxisPlan:
    """The types of all values of the graph on one mesh axis."""

    axis: str
    size: int
    nodes: Mapping[str, NodePlan]
    outputs: tuple[Type, ...]
    """The type of every value the graph returns."""
    samples: tuple[bool, ...] = ()
    """On an axis whose ranks have batches of their own: which of them are cut by samples, so that a rank holds those of its own."""
    chunks: int = 0
    """On an axis that cuts a sequence: how many pieces of it each rank has, where an example batch told; else 0."""
    pieces: str = ""
    """Why so many."""


@dataclass(frozen=True, slots=True)
class ParameterPlan:
    """Where one parameter lies: its type on every axis, and who decided so."""

    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    placements: Mapping[str, Type]
    why: str
    stages: tuple[int, ...] = (0,)
    """The pipeline stages that use it; each of them holds a copy."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of the pipeline: the node of the captured graph it begins with (empty for the first), its rank on `pp`, and why there.

    `begins` says in words where it begins, `share` is its part of the estimated cost.
    """

    start: str
    rank: int
    why: str
    begins: str = ""
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Comm:
    """One line of the communication ledger: `count` collectives per microbatch, of `nbytes` sent per device each."""

    kind: str
    axis: str
    phase: str
    nbytes: float
    count: int
    node: str
    module: str
    region: str
    stage: int = 0
    """The pipeline stage that runs it."""
    seconds: float = 0.0
    """How long one takes, by the constants that the plan was priced with."""
    exposed: float = 0.0
    """For how much of that the rank waits: nothing is computed beside it (`compile/exposure.py`)."""

    @property
    def exposed_bytes(self) -> float:
        """The bytes, of `nbytes`, that nothing is computed beside."""
        return self.nbytes * self.exposed / self.seconds if self.seconds else self.nbytes


@dataclass(frozen=True, repr=False)
class Plan:
    """All decisions: per axis the type of every value, per parameter its placement, and the communication that follows.

    Two plans with equal `hash` build the same program on every rank.
    """

    mesh: tuple[tuple[str, int], ...]
    graph: str
    """Fingerprint of the captured graph the plan was made for."""
    axes: tuple[AxisPlan, ...]
    """In the order in which they are lowered: data first, then tensor."""
    parameters: Mapping[str, ParameterPlan]
    stages: tuple[StagePlan, ...] = ()
    """The stages of the pipeline, in the order of the model; empty without a `pp` axis."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What of the configuration the plan was made for: microbatches, recompute, data parallelism, the schedule, and what was asked of the
    solver. A record, which reports read: the runtime obeys the configuration, and `parallelize(plan=)` refuses one that differs from it."""
    ledger: tuple[Comm, ...] = ()
    notes: tuple[str, ...] = ()
    """What the reader should know: operators that run whole."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """The dtype and the shape of every input of the captured graph: of one microbatch of all data ranks together."""
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The stages whose copies of a buffer are kept up to date: those that update it, or the only one that reads it."""

    @cached_property
    def hash(self) -> str:
        """A short fingerprint of the decisions, the same on every rank that made or was sent the same plan.

        What follows from them is left out: the ledger names what a rank runs, which may be parameters that it alone owns.
        """
        return hashlib.sha256(replace(self, ledger=()).to_json().encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return int(self.hash, 16)

    def __repr__(self) -> str:
        mesh = ",".join(f"{name}={size}" for name, size in self.mesh)
        stages = f", {len(self.stages)} stages" if self.stages else ""
        values = max((len(one.nodes) for one in self.axes), default=0)
        return f"Plan({mesh}: {len(self.parameters)} parameters, {values} values{stages}, {len(self.ledger)} collectives, hash {self.hash})"

    def comms(self) -> tuple[Comm, ...]:
        """The ledger: every collective of one microbatch, with the bytes a device sends."""
        return self.ledger

    def axis(self, name: str) -> AxisPlan | None:
        """The types on one axis, or None where the mesh has no such axis."""
        return next((a for a in self.axes if a.axis == name), None)

    def to_json(self) -> str:
        """The whole plan as JSON, keys in a fixed order."""
        body = {
            "version": VERSION,
            "mesh": self.mesh,
            "graph": self.graph,
            "axes": [
                {
                    "axis": a.axis,
                    "size": a.size,
                    "nodes": {n: [_types(p.uses), _types(p.outs), p.why, _types(p.handed)] for n, p in a.nodes.items()},
                    "outputs": _types(a.outputs),
                    "samples": list(a.samples),
                    **({"chunks": [a.chunks, a.pieces]} if a.pieces else {}),
                }
                for a in self.axes
            ],
            "parameters": {
                n: [p.shape, p.dtype, p.trainable, {k: _type(t) for k, t in p.placements.items()}, p.why, p.stages]
                for n, p in self.parameters.items()
            },
            "stages": [list(asdict(s).values()) for s in self.stages],
            "buffers": {name: list(stages) for name, stages in self.buffers.items()},
            "options": dict(self.options),
            "ledger": [list(asdict(c).values()) for c in self.ledger],
            "notes": self.notes,
            "inputs": dict(self.inputs),
        }
        return json.dumps(body, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. Raises PlanError for another version or something else altogether."""
        try:
            body = json.loads(text)
            if body["version"] != VERSION:
                raise PlanError(f"this plan has format {body['version']}, this meshpar reads {VERSION}. Make the plan again.")
            return cls(
                tuple((n, s) for n, s in body["mesh"]),
                body["graph"],
                tuple(
                    AxisPlan(
                        a["axis"],
                        a["size"],
                        {n: NodePlan(_untypes(u), _untypes(o), w, _handed(h)) for n, (u, o, w, h) in a["nodes"].items()},
                        _untypes(a["outputs"]),
                        tuple(a.get("samples", ())),
                        *a.get("chunks", ()),
                    )
                    for a in body["axes"]
                ),
                {
                    n: ParameterPlan(tuple(s), d, t, {k: _untype(v) for k, v in p.items()}, w, tuple(g))
                    for n, (s, d, t, p, w, g) in body["parameters"].items()
                },
                tuple(StagePlan(*s) for s in body["stages"]),
                body["options"],
                tuple(Comm(*c) for c in body["ledger"]),
                tuple(body["notes"]),
                body["inputs"],
                {name: tuple(stages) for name, stages in body.get("buffers", {}).items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"not a plan: {error}. A plan is written by plan.save(path).") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote."""
        return cls.from_json(Path(path).read_text())


_LETTERS: dict[type, str] = {Invariant: "I", Replicate: "R", Partial: "P", Ragged: "E"}
_SINGLE: dict[str, Type] = {"I": Invariant(), "R": Replicate(), "P": Partial(), "E": Ragged()}


def _type(type_: Type | None) -> Any:
    if isinstance(type_, Shard):
        return [type_.dim, type_.repeat, [list(s) for s in type_.segments]]
    if isinstance(type_, Owned):
        return [type_.rank]
    return None if type_ is None else _LETTERS[type(type_)]


def _types(types: Sequence[Type | None]) -> list[Any]:
    return [_type(t) for t in types]


def _untype(value: Any) -> Type:
    if isinstance(value, str):
        return _SINGLE[value]
    if len(value) == 1:
        return Owned(*value)
    dim, repeat, segments = value
    return Shard(dim, repeat, tuple((u, s) for u, s in segments))


def _untypes(values: list[Any]) -> tuple[Type, ...]:
    return tuple(_untype(v) for v in values)


def _handed(values: list[Any]) -> tuple[Type | None, ...]:
    return tuple(None if v is None else _untype(v) for v in values)
