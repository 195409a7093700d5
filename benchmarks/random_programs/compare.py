"""One random program in parallel against one device, over several steps with an optimizer; batches may be of other shapes.

It goes through the parts of `mp.verify`, with a batch of its own for every step. `trained` is what a rank does; it also says what the
static check told of every program that was made, since proof and numbers have to agree.
"""

from __future__ import annotations

import random
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn

import meshpar.sharding.solve as solve
from benchmarks.random_programs.programs import Program
from benchmarks.random_programs.settings import Setting, rules_for
from meshpar._torch import without_modes
from meshpar.capture.hooks.models import copied
from meshpar.capture.structure import order_of
from meshpar.compile import programs
from meshpar.config import ParallelConfig, Precision
from meshpar.errors import MeshparError, RankError
from meshpar.graph.captured import Captured
from meshpar.graph.op import op_name
from meshpar.mesh import make_mesh
from meshpar.ops import again, chunked_loss, expert_pieces, pieces, products, token_pieces
from meshpar.passes import order
from meshpar.proof import verify as numeric
from meshpar.proof.comparable import cast
from meshpar.proof.differences import Differences, complete, merged
from meshpar.proof.expected import expectation
from meshpar.proof.reference import Reference, Task
from meshpar.runtime.model import ParallelModel
from meshpar.simulate import simulate

DTYPES = {"fp64": torch.float64, "bf16": torch.bfloat16, "mixed": torch.bfloat16}
MOST_UNITS = 18.0
"""A part that is missing, or added twice, is tens of units of what bfloat16 does to a model by itself (see `mp.verify`)."""
Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Found:
    """What one rank (or all simulated ones) found."""

    differences: Differences | None
    refused: str = ""
    """An error that meshpar raises and explains."""
    crashed: str = ""
    """An error that is not meshpar's own."""
    faults: tuple[str, ...] = ()
    """What the static check holds against the programs."""
    proved: int = 0
    unproved: int = 0
    programs: int = 0
    made: int = 0
    """The graphs that were made without a capture."""
    told: int = 0
    """The programs that were told by the code of others."""
    passes: tuple[str, ...] = ()
    """What passes put in that keep less, or hide sums."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program. `status`: "ok", "wrong", "rounding", "crash", "refused", "averaged" or "nothing".

    `run.py` says what each means.
    """

    status: str
    text: str
    found: Found | None = None

    @property
    def static(self) -> str:
        """ "proved", "partly" (some calls are not proved), "fault", or "-" where no program was made."""
        if self.found is None or not self.found.programs:
            return "-"
        return "fault" if self.found.faults else "partly" if self.found.unproved else "proved"

    @property
    def contradicts(self) -> bool:
        """Whether proof and numbers disagree."""
        return (self.static, self.status) in (("fault", "ok"), ("proved", "wrong"))


def outcome(program: Program, how: Setting, shapes: Shapes, pool: Any = None) -> Outcome:
    """Run a program on simulated ranks, or on those of `pool`."""
    try:
        task = task_of(program, how, shapes)
        expected = expectation(task, torch.device("cpu"))
        if expected.unproved:
            return Outcome("nothing", "; ".join(expected.unproved))
        if how.dtype == "mixed":
            _run_mixed(task)
    except Exception as error:
        return Outcome("nothing", f"on one device: {type(error).__name__}: {error}")
    world = prod(how.sizes.values())
    if how.processes:
        try:
            found = pool.run(trained, program, how, shapes, expected.right, world=world, timeout=240.0)
        except AssertionError as error:
            return Outcome("crash", str(error))
    else:
        with simulate(world):
            found = [trained(program, how, shapes, expected.right)]
    first = _first(found)
    if first.refused or first.crashed:
        return Outcome("refused" if first.refused else "crash", first.refused or first.crashed, first)
    differences = merged([f.differences for f in found if f.differences is not None])
    where = "gloo processes" if how.processes else "simulated ranks"
    report = numeric._report(task, expected, complete(differences, expected.right), how.sizes, where)
    if any(
        "averaged over microbatches" in note or "those of a microbatch" in note or "of a microbatch" in note for note in differences.notes
    ):
        return Outcome("averaged", str(report), first)
    if report.ok or how.dtype == "fp64" or max(d.largest for d in report.differences) > MOST_UNITS:
        return Outcome("ok" if report.ok else "wrong", str(report), first)
    exact = outcome(program, replace(how, dtype="fp64"), shapes, pool).status == "ok"
    return Outcome("rounding" if exact else "wrong", str(report), first)


def _run_mixed(task: Task) -> None:
    """A step on one device as mixed precision has it: parameters and batch in bf16, buffers in fp32. Raises what torch raises."""
    model = cast(copied(task.model), torch.float32)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    model(**cast(task.batches[0], torch.bfloat16)).backward()


def _first(found: Sequence[Found]) -> Found:
    """The rank that tells most: a crash before an explained error, its own before what others told it."""
    crashed = [f for f in found if f.crashed]
    refused = [f for f in found if f.refused]
    faulty = [f for f in found if f.faults]
    return next(iter([*crashed, *refused, *faulty, *found]))


def task_of(program: Program, how: Setting, shapes: Shapes) -> Task:
    """What is compared, as `verify` has it."""
    with without_modes():  # (simulated ranks would each draw numbers of their own)
        model, dtype = program.model(), DTYPES[how.dtype]
        config = ParallelConfig(**how.config)
        task = numeric._task(model, program.batch(), how.sizes, config, rules_for(program, how), None, 1, dtype, 0.02, 0, None)
        batches = (program.batch(step, sizes) for step, sizes in enumerate(shapes))
        return replace(task, batches=tuple(cast(order_of(model)(batch), dtype) for batch in batches))


def trained(program: Program, how: Setting, shapes: Shapes, right: Reference) -> Found:
    """Train a program for its steps on this rank (or on all simulated ones), and measure how far it is from what is right."""
    warnings.simplefilter("ignore")
    task = task_of(program, how, shapes)
    if how.dtype == "mixed":
        wide = tuple(cast(batch, torch.float32) for batch in task.batches)
        config = replace(task.config, precision=Precision(torch.float32, torch.bfloat16, torch.float32))
        task = replace(task, model=cast(copied(task.model), torch.float32), batches=wide, config=config)
    with costs(program.seed if how.drawn else None), sharing(program, how), eager(how.eager), keeping() as models:
        try:
            differences = numeric._compare(task, right, make_mesh(how.sizes, "cpu"))
            return _told(Found(differences), models)
        except RankError as error:
            return _told(Found(None, refused="" if "failed" in str(error) else str(error), crashed=str(error)), models)
        except MeshparError as error:
            return _told(Found(None, refused=f"{type(error).__name__}: {error}"), models)
        except Exception as error:
            return _told(Found(None, crashed=f"{type(error).__name__}: {error}\n{traceback.format_exc()[-2500:]}"), models)


def _told(found: Found, models: Sequence[ParallelModel]) -> Found:
    """With what the static check said of all programs."""
    proofs = [program.proof for pm in models for program, _, _ in pm._variants.programs()]
    return replace(
        found,
        faults=tuple(str(fault) for proof in proofs for fault in proof.faults),
        proved=sum(proof.proved for proof in proofs),
        unproved=sum(len(proof.unproved) for proof in proofs),
        programs=len(proofs),
        made=sum(pm._makes.shapes.count.made for pm in models),
        told=sum(pm._variants._resized.made for pm in models),
        passes=tuple(sorted({name for pm in models for program, _, _ in pm._variants.programs() for name in _put_in(program)})),
    )


def _put_in(program: Any) -> Iterator[str]:
    """The operators of passes that keep less, or hide sums, in all graphs of a program."""
    cuts = [*program.stages, *program.all_stages, *([program.step] if program.step is not None else [])]
    for graph in (program.graph, *(cut.graph for cut in cuts)):
        yield from (op_name(n.target).removeprefix("meshpar.ops.") for n in graph.nodes if n.op == "call_function" and _is_put_in(n.target))


def _is_put_in(target: Any) -> bool:
    return getattr(target, "__module__", "") in _PUT_IN


_PUT_IN = frozenset(one.__name__ for one in (again, chunked_loss, expert_pieces, pieces, products, token_pieces))


@contextmanager
def keeping() -> Iterator[list[ParallelModel]]:
    """Inside, the parallel models that comparisons make are kept."""
    inner, kept = numeric.parallel, list[ParallelModel]()

    def parallel(*args: Any) -> tuple[ParallelModel, bool]:
        pm, packed = inner(*args)
        kept.append(pm)
        return pm, packed

    numeric.parallel = parallel
    try:
        yield kept
    finally:
        numeric.parallel = inner


@contextmanager
def eager(on: bool) -> Iterator[None]:
    """Inside, passes that are for megabytes take what is small."""
    names = ("ComputeAgain", "CutExpertsIntoPieces", "CutTokensIntoPieces", "CutIntoPieces", "HideGradientSums")
    real, least = {name: getattr(order, name) for name in names}, pieces.LEAST
    try:
        pieces.LEAST = 1 if on else least
        for name in names if on else ():
            setattr(order, name, partial(real[name], least_bytes=0))
        yield
    finally:
        pieces.LEAST = least
        for name in names:
            setattr(order, name, real[name])


_CAPTURES: dict[Any, Captured] = {}
"""Of the last program: what is captured is the same on all meshes."""


@contextmanager
def sharing(program: Program, how: Setting) -> Iterator[None]:
    """Inside, what was captured of this program is not captured again. (Captures with a state of Python of their own are not kept.)"""
    inner = programs.capture

    def captured(model: nn.Module, args: Any, kwargs: Any, **about: Any) -> Captured:
        each = about["divide"], about["scale"]
        shapes = tuple((name, str(x.dtype), x.shape[0] // each[0] * each[1], *x.shape[1:]) for name, x in kwargs.items())
        grad = about["ask"].gradients, tuple(p.requires_grad for p in model.parameters()), model.training
        key = program.source, how.dtype, str(about["dtype"]), shapes, grad, each[0] == each[1] == 1
        if key not in _CAPTURES:
            found = inner(model, args, kwargs, **about)
            state = found.state
            if state.tensors or state.numbers or state.inputs or state.writes or state.lost:
                return found
            if _CAPTURES and next(iter(_CAPTURES))[0] != program.source:
                _CAPTURES.clear()
            _CAPTURES[key] = found
        found = _CAPTURES[key]
        return replace(found, graph=order._copied(found.graph), state=replace(found.state))

    programs.capture = captured
    try:
        yield
    finally:
        programs.capture = inner


@contextmanager
def costs(seed: int | None) -> Iterator[None]:
    """Inside, the solver pays what is drawn for a typing: nothing, its price, or a hundred times that."""
    inner, rng = solve.choices, random.Random(f"costs {seed}")

    def drawn(*args: Any, **kwargs: Any) -> tuple[solve.Choice, ...]:
        return tuple(replace(c, cost=c.cost * rng.choice([0, 1, 1, 100]) + 1e-3 * rng.random()) for c in inner(*args, **kwargs))

    if seed is not None:
        solve.choices = drawn
    try:
        yield
    finally:
        solve.choices = inner
