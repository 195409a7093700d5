"""verify(): does the parallel program compute what the model computes? Loss, every gradient, gradient norm, optimizer steps.

    report = mp.verify(model, "dp=2,tp=2", batch)         # all ranks simulated in this process
    print(report)
    report.raise_if_failed()

How far two results are apart is measured relative to the largest element of the right one, plus a floor: max|a - b| / (max|b| + floor).
For gradients the floor is a thousandth of the largest gradient of the model. Some gradients are exactly zero by cancellation (the bias of
an attention key, for one): what is computed for them is rounding of the terms that cancelled, whose size other gradients tell. With the
floor they pass, while a mistake in a gradient a million times smaller than the largest is still a million times the tolerance of float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, prod
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshpar._torch import local_of, maybe_disable_local_tensor_mode, part_here, pytree, without_modes
from meshpar.api import parallelize
from meshpar.capture.attempts import Attempt, first_that_works
from meshpar.capture.hooks.models import attach, of_parameters
from meshpar.capture.structure import order_of
from meshpar.config import ParallelConfig, Precision
from meshpar.errors import ConfigError, MeshparError
from meshpar.graph.facts import facts
from meshpar.mesh import format_mesh, local_batch, make_mesh, mesh_sizes, parse_mesh
from meshpar.proof import launch
from meshpar.proof.comparable import cast, comparable
from meshpar.proof.locate import first_difference
from meshpar.proof.reference import (
    FLOOR,
    LEARNING_RATE,
    MAX_NORM,
    TOLERANCE,
    Batch,
    Reference,
    Task,
    batches_of,
    optimizer_of,
    samples_of,
    wide,
)
from meshpar.proof.reference import reference as reference_of
from meshpar.proof.reference import unproved as unproved_by
from meshpar.roles import ROLES, dividing, stage_axis
from meshpar.runtime.model import ParallelModel
from meshpar.runtime.parameters.gradients import clip_grad_norm_
from meshpar.runtime.parameters.specs import full_grad, full_tensor, local_part, spec_of
from meshpar.simulate import is_simulated, local_tensors, simulate


class VerificationError(MeshparError, AssertionError):
    """The parallel program does not compute what the model computes."""


@dataclass(frozen=True)
class Difference:
    """How far one quantity of the parallel program is from the original's: the largest relative difference, and where it is."""

    quantity: str
    compared: int
    largest: float
    worst: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Report:
    """What `verify` found. Its text is a table."""

    model: str
    mesh: Mapping[str, int]
    ranks: str
    """"simulated ranks", "gloo processes" or "ranks"."""
    dtype: torch.dtype
    steps: int
    tolerance: float
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()
    """Why the comparison proves nothing, where it does not."""
    silent: tuple[str, ...] = ()
    """The parameters of which it proves nothing: a program without their gradients would pass."""
    where: tuple[str, ...] = ()
    """On a difference, where values or gradients part first."""

    @property
    def ok(self) -> bool:
        """Whether every difference is within the tolerance, and that says something."""
        return not self.unproved and self.agrees

    @property
    def agrees(self) -> bool:
        """Whether every difference is within the tolerance."""
        return all(d.largest <= self.tolerance for d in self.differences)

    def __getitem__(self, quantity: str) -> Difference:
        return next(d for d in self.differences if d.quantity == quantity)

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def raise_if_failed(self) -> Report:
        """Raise VerificationError with the table unless all is well; returns the report."""
        if not self.ok:
            raise VerificationError(str(self))
        return self


def verify(
    model: nn.Module,
    mesh: str | Mapping[str, int] | DeviceMesh,
    batch: Batch,
    *,
    config: ParallelConfig | None = None,
    rules: Mapping[str, str] | None = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    steps: int = 2,
    processes: bool = False,
    dtype: torch.dtype = torch.float64,
    perturb: float = 0.02,
    seed: int = 0,
    tolerance: float | None = None,
) -> Report:
    """Train `model` for `steps` steps on one device and in parallel, from the same parameters on the same `batch`, and compare.

    `batch` is the global batch; every step takes its samples in another order, so that what was frozen at the first (a count of calls, a
    number read from the batch) shows at the second. The ranks of `mesh` are simulated in this process; with `processes=True`, and for a
    pipeline, they are new gloo processes; given a DeviceMesh, or under torchrun, they are those of the mesh, and all of them call this.
    `config`, `rules` and `loss_fn` are those of `parallelize`; the precision of `config` is not used, everything is computed in `dtype`.
    `tolerance` defaults to 1e-9 in float64 and 1e-5 in float32.

    In bfloat16 a constant would be a guess: how far rounding carries depends on the model. So the model itself is run in bfloat16 and in
    float64 on one device, from the same values, and what bfloat16 does to a loss or gradient there is the unit: the parallel program may be
    `tolerance` units (6) from the float64 result. It rounds as the model does, and a few times more where a sum is made of one part per
    rank; a part that is missing, or added twice, is as large as the result, tens of units. Where a unit is too large for that (a sixth of
    what it belongs to), the comparison proves nothing and does not pass. A unit is at least one rounding and the median of its kind, so
    that luck is no standard.

    A parameter whose gradient on one device is zero, or so much smaller than others that it would not be missed, is one of which nothing
    is proved: the report names them (`silent`). Where they are more than three quarters of the parameters (of those that get a gradient at
    all; experts that no token chose are silent too), the comparison proves nothing and does not pass: more samples, or values that reach
    those layers, are needed.

    A copy of the model is compared, not the model: dropout is switched off, what else is drawn at random is the same in both programs,
    every parameter is moved by `perturb` times a normal draw, and requests of the model for a narrower dtype than `dtype` are answered with
    `dtype`, in both programs. A model whose loss is no number, whose gradients are all zero or do not depend on the batch, and a batch that
    is the same on all data ranks, prove nothing: the report says so and is not `ok`. On a difference it names the first operation whose
    values (or gradients) part; on ranks that exist already (a DeviceMesh, torchrun) it says how to have that looked for.

    Raises ConfigError, CaptureError, PlanError or BatchError as `parallelize` does, RankError when a rank fails.

        verify(model, "dp=2,tp=2", {"input_ids": ids, "labels": ids}).raise_if_failed()
    """
    sizes = mesh_sizes(mesh) if isinstance(mesh, DeviceMesh) else parse_mesh(mesh)
    with without_modes():
        task = _task(model, batch, sizes, config, rules, loss_fn, steps, dtype, perturb, seed, tolerance)
    if isinstance(mesh, DeviceMesh) or is_simulated() or launch.launched():
        where = "simulated ranks" if is_simulated() else "ranks"
        given = mesh if isinstance(mesh, DeviceMesh) else make_mesh(mesh)
        expected = _expected(task, torch.device(given.device_type))
        found = _on_given_ranks(task, expected.right, given)
    else:
        expected = _expected(task, torch.device("cpu"))
        if processes or sizes.get(stage_axis(), 1) > 1:
            where = "gloo processes"
            found = _merged(launch.run(_on_rank, task, expected.right, sizes, world=prod(sizes.values())))
        else:
            where = "simulated ranks"
            with simulate(prod(sizes.values())):
                found = _compare(task, expected.right, make_mesh(sizes, "cpu"))
    report = _report(task, expected, _complete(found, expected.right), sizes, where)
    if report.agrees:
        return report
    elsewhere = isinstance(mesh, DeviceMesh) or is_simulated() or launch.launched()
    return replace(report, where=_not_looked_for(sizes) if elsewhere else _where(task, report, sizes))


def _task(
    model: nn.Module,
    batch: Batch,
    sizes: Mapping[str, int],
    config: ParallelConfig | None,
    rules: Mapping[str, str] | None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    steps: int,
    dtype: torch.dtype,
    perturb: float,
    seed: int,
    tolerance: float | None,
) -> Task:
    if dtype not in TOLERANCE:
        raise ConfigError(f"dtype={dtype}: compare in torch.float64, torch.float32 or torch.bfloat16.")
    if steps < 1:
        raise ConfigError(f"steps={steps}: at least 1.")
    if not isinstance(batch, (Mapping, tuple, list)):
        raise ConfigError(f"batch is a {type(batch).__name__}, not a dict of keyword arguments or a tuple of positional ones.")
    first: Batch = cast(order_of(model)(batch) if isinstance(batch, Mapping) else tuple(batch), dtype)
    return Task(
        comparable(model, dtype=dtype, perturb=perturb, seed=seed),
        batches_of(first, steps),
        replace(config or ParallelConfig(), precision=Precision()),
        rules,
        loss_fn,
        dtype,
        TOLERANCE[dtype] if tolerance is None else tolerance,
        prod(n for name, n in sizes.items() if ROLES[name].own_batches),
        of_parameters(model),
    )


# ---- the original ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Expected:
    """What is right, and how far rounding may carry from it."""

    right: Reference
    unproved: tuple[str, ...]
    silent: tuple[str, ...]
    """The parameters of which a comparison would prove nothing."""
    own: Mapping[str, Mapping[str, float]]
    """In bfloat16, quantity -> name -> how far that dtype alone carries the model on one device; else empty."""


def _expected(task: Task, device: torch.device) -> _Expected:
    with without_modes():
        if task.dtype != torch.bfloat16:
            right = reference_of(task, device)
            return _judged(right, unproved_by(task, right, device), {}, task.tolerance)
        exact = wide(task)
        right = reference_of(exact, device)
        reasons = unproved_by(exact, right, device)
        own = {} if reasons else _own(reference_of(task, device, eps=right.eps), right, len(task.batches))
    if not reasons and median(own["gradients"].values()) * task.tolerance > 1:
        share = median(own["gradients"].values())
        reasons = (
            f"in bfloat16 alone the model on one device differs from float64 by {share:.0%} of its gradients: a mistake of that size "
            f"would not show. Compare in float64.",
        )
    return _judged(right, reasons, own, task.tolerance)


def _judged(right: Reference, reasons: tuple[str, ...], own: Mapping[str, Mapping[str, float]], tolerance: float) -> _Expected:
    """With the parameters of which nothing is proved; most of them, and nothing is proved of the model."""
    if reasons:
        return _Expected(right, reasons, (), own)
    sizes = {name: g.numel() for name, g in right.gradients.items() if g is not None and g.numel()}
    silent = tuple(name for name in sizes if _would_pass_without(name, right, own.get("gradients", {}), tolerance))
    if 4 * len(silent) > 3 * len(sizes):
        reasons = (
            f"most of the model is silent: the gradients of {_few(silent)} ({len(silent)} of {len(sizes)} parameters) are zero on one "
            f"device, or too small beside the others to be missed. Give samples that reach them, or more of them.",
        )
    return _Expected(right, reasons, silent, own)


def _would_pass_without(name: str, right: Reference, own: Mapping[str, float], tolerance: float) -> bool:
    """Whether a program that gave zeros for a gradient would pass."""
    wanted = right.gradients[name]
    assert wanted is not None
    missing = _distance(torch.zeros_like(wanted), wanted, wanted, _gradient_floor(right))
    return missing / own.get(name, 1.0) <= tolerance


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])} and {len(names) - 3} others" if len(names) > 4 else ", ".join(names)


def _own(low: Reference, right: Reference, steps: int) -> dict[str, dict[str, float]]:
    """What a narrow dtype does to the model by itself, for every quantity that is compared: the units of a comparison in it."""
    floor = _gradient_floor(right)
    gradients = {}
    for name, wanted in right.gradients.items():
        found = low.gradients[name]
        if wanted is not None and found is not None:
            gradients[name] = _distance(found, wanted, wanted, floor)
    parameters = {n: _distance(low.parameters[n], p, p, LEARNING_RATE) for n, p in right.parameters.items()}
    every = {
        "loss": {f"step {i}": _scalar_distance(torch.tensor(a), b) for i, (a, b) in enumerate(zip(low.losses, right.losses), 1)},
        "gradients": gradients,
        "gradient norm": {f"step {i}": _scalar_distance(torch.tensor(a), b) for i, (a, b) in enumerate(zip(low.norms, right.norms), 1)},
        _after(steps): parameters,
        "buffers": {n: _distance(low.buffers[n], b, b, FLOOR) for n, b in right.buffers.items() if b.numel()},
    }
    return {quantity: _fair(values) for quantity, values in every.items()}


def _fair(own: Mapping[str, float]) -> dict[str, float]:
    """Units that are no luck: at least one rounding, and at least the median of their kind."""
    least = max(torch.finfo(torch.bfloat16).eps, median(own.values())) if own else 0.0
    return {name: max(value, least) for name, value in own.items()}


def _after(steps: int) -> str:
    return f"parameters after {steps} AdamW step{'s' if steps > 1 else ''}"


@dataclass(frozen=True)
class _Differences:
    """Quantity -> name -> relative difference."""

    values: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]


# ---- the parallel program --------------------------------------------------------------------------------------------------------------


def _on_given_ranks(task: Task, reference: Reference, mesh: DeviceMesh) -> _Differences:
    """On the ranks of a mesh that exists: all of them are here."""
    found = _compare(task, reference, mesh)
    if is_simulated() or mesh.size() == 1:
        return found
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return _merged(everyone)


def _on_rank(task: Task, reference: Reference, sizes: Mapping[str, int]) -> _Differences:
    if not of_parameters(task.model):  # sent by a file, which loses them
        attach(task.model, task.hooks)
    return _compare(task, reference, make_mesh(sizes, "cpu"))


def _compare(task: Task, reference: Reference, mesh: DeviceMesh) -> _Differences:
    """Train in parallel, and measure how far this rank (every simulated rank) is from the reference."""
    losses, norms, gradients = dict[str, float](), dict[str, float](), dict[str, float]()
    with task.conditions():
        pm, packed = parallel(task, mesh)
        optimizer: torch.optim.Optimizer | None = None
        for step, whole in enumerate(task.batches, 1):
            batch = share(whole, mesh, packed=packed)
            value = pm.train_step(**batch) if isinstance(batch, Mapping) else pm.train_step(*batch)
            losses[f"step {step}"] = _scalar_distance(value, reference.losses[step - 1])
            if not gradients:
                gradients = _gradient_distances(pm, reference)
            norms[f"step {step}"] = _scalar_distance(clip_grad_norm_(pm.parameters(), MAX_NORM), reference.norms[step - 1])
            optimizer = optimizer or optimizer_of(pm, reference.eps)
            _leave_out(pm, reference.without[step - 1])
            optimizer.step()
            optimizer.zero_grad()
    values = {"loss": losses, "gradients": gradients, "gradient norm": norms}
    values[_after(len(task.batches))] = _parameter_distances(pm, reference)
    buffers = _buffer_distances(pm, reference)
    return _Differences(values | ({"buffers": buffers} if buffers else {}), _notes(pm))


def _leave_out(pm: ParallelModel, names: frozenset[str]) -> None:
    """Zeros where the original had no gradient (an expert that a loop passed over) would still decay a weight: leave them out as well."""
    for name, parameter in pm.named_parameters():
        if name in names and parameter.grad is not None and not any(bool(local.any()) for local in _locals(parameter.grad)):
            parameter.grad = None


def _locals(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    with maybe_disable_local_tensor_mode():
        yield from local_tensors(part_here(tensor)).values()


def parallel(task: Task, mesh: DeviceMesh) -> tuple[ParallelModel, bool]:
    """The parallel model; and whether tensors of several rows per sample are cut, which they are where the batch fits no other way."""
    make = partial(parallelize, task.model, mesh, config=task.config, rules=task.rules, loss_fn=task.loss_fn)
    batch, packed = (share(task.batches[0], mesh, packed=rows) for rows in (False, True))
    return first_that_works(
        (
            Attempt("with the samples of the first tensor cut", lambda: (make(example=batch), False)),
            Attempt(
                "with tensors of several rows per sample cut too",
                lambda: (make(example=packed), True),
                lambda: _shapes(packed) != _shapes(batch),
            ),
        )
    )


def _shapes(batch: Batch) -> list[torch.Size]:
    return [leaf.shape for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]


def share(batch: Batch, mesh: DeviceMesh, *, packed: bool) -> Batch:
    """This data rank's part of every tensor that holds samples: those as long as the first, or (`packed`) a multiple of it."""
    samples = samples_of(batch)

    def one(leaf: Any) -> Any:
        rows = leaf.shape[0] if isinstance(leaf, torch.Tensor) and leaf.ndim else 0
        cut = rows and (rows == samples or (packed and rows % samples == 0))
        return local_batch({"the batch": leaf}, mesh)["the batch"] if cut else leaf

    found: Batch = pytree.tree_map(one, batch)
    return found


def _gradient_distances(pm: ParallelModel, reference: Reference) -> dict[str, float]:
    floor = _gradient_floor(reference)
    found = {}
    for name, parameter in pm.named_parameters():
        wanted, grad = reference.gradients[name], parameter.grad
        if grad is None:  # torch leaves gradients out where they are zero because nothing depends on a parameter
            found[name] = 0.0 if wanted is None or not wanted.any() else inf
            continue
        wanted = torch.zeros_like(reference.parameters[name]) if wanted is None else wanted
        found[name] = max(_distance(a, b, wanted, floor) for a, b in _pairs(grad, parameter, wanted, full_grad))
    return found


def _gradient_floor(reference: Reference) -> float:
    return FLOOR * max((g.abs().max().item() for g in reference.gradients.values() if g is not None and g.numel()), default=0.0)


def _parameter_distances(pm: ParallelModel, reference: Reference) -> dict[str, float]:
    found = {}
    for name, parameter in pm.named_parameters():
        wanted = reference.parameters[name]
        found[name] = max(_distance(a, b, wanted, LEARNING_RATE) for a, b in _pairs(parameter, parameter, wanted, full_tensor))
    return found


def _buffer_distances(pm: ParallelModel, reference: Reference) -> dict[str, float]:
    found = {}
    unsaved = {f"{path}.{name}".lstrip(".") for path, module in pm.named_modules() for name in module._non_persistent_buffers_set}
    for name, buffer in pm.named_buffers():
        wanted = reference.buffers.get(name)
        remade = wanted is not None and wanted.shape != buffer.shape and name in unsaved
        if wanted is not None and wanted.numel() and not remade:  # (a table that grew is no state: it is made again in every forward)
            found[name] = max(_distance(local, wanted, wanted, FLOOR) for local in local_tensors(buffer).values())
    return found


def _pairs(
    tensor: torch.Tensor, parameter: torch.Tensor, wanted: torch.Tensor, whole: Callable[[torch.Tensor], torch.Tensor | None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(What is there, what should be): this rank's whole, or every simulated rank's own part, so that no copy goes unseen."""
    if not is_simulated():
        full = whole(parameter)
        assert full is not None
        yield full, wanted
        return
    spec = spec_of(parameter)
    assert isinstance(parameter, DTensor) and isinstance(tensor, DTensor) and spec is not None
    parts = local_tensors(local_of(tensor))
    with maybe_disable_local_tensor_mode():
        grid = parameter.device_mesh.mesh
        names = parameter.device_mesh.mesh_dim_names or ()
        for place in torch.ones_like(grid).nonzero().tolist():
            axes = {name: (grid.shape[d], place[d]) for d, name in enumerate(names)}
            yield parts[int(grid[tuple(place)])], local_part(wanted, spec, axes)


@torch.no_grad()
def _distance(a: torch.Tensor, b: torch.Tensor, whole: torch.Tensor, floor: float) -> float:
    """max|a - b| / (max|whole| + floor); infinite for other shapes and for what is not a number."""
    with maybe_disable_local_tensor_mode():
        if a.shape != b.shape:
            return inf
        if not a.numel():
            return 0.0
        a, b, whole = (torch.view_as_real(x).double() if x.is_complex() else x.double() for x in (a, b, whole))
        scale = whole[whole.isfinite()].abs().amax().item() + floor if whole.isfinite().any() else floor
        largest = torch.where(a == b, 0.0, a - b).abs().max().item()  # infinities that agree agree: masks are full of them
        return largest / scale if largest < inf and scale else (0.0 if largest == 0 else inf)


def _scalar_distance(value: torch.Tensor, wanted: float) -> float:
    """The same for a number, on the rank where it is largest."""
    there = torch.tensor(wanted, dtype=torch.float64)
    return max(_distance(local.cpu().reshape(()), there, there, FLOOR) for local in local_tensors(value).values())


def _notes(pm: ParallelModel) -> tuple[str, ...]:
    """What explains a difference that is no mistake."""
    notes = []
    drawn = [n for n in pm._first.graph.nodes if facts(n).seed is not None]
    if drawn:
        where = ", ".join(dict.fromkeys(str(facts(n).source or facts(n).module or "the model") for n in drawn[:3]))
        notes.append(f"the model still draws random numbers ({where}), which differ between the two programs: switch them off to compare.")
    if pm._first.averaged:
        notes.append(f"terms of the loss that are averaged over microbatches, not over the whole batch: {', '.join(pm._first.averaged)}.")
    if pm._first.within:
        notes.append(f"samples are taken together, those of a microbatch and not of the whole batch, in {', '.join(pm._first.within)}.")
    return tuple(notes)


def _where(task: Task, report: Report, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Where values or gradients part first, on simulated ranks of the same mesh without its pipeline."""
    flat = {name: n for name, n in sizes.items() if ROLES[name].typed} or {dividing("weights")[0]: 1}
    task = replace(wide(task), config=replace(task.config, schedule="1f1b", stages=None, virtual_stages=None))
    with simulate(prod(flat.values())), task.conditions():
        mesh = make_mesh(flat, "cpu")
        pm, packed = parallel(task, mesh)
        state = dict(task.model.named_parameters()) | dict(task.model.named_buffers())
        found = first_difference(pm, state, share(task.batches[0], mesh, packed=packed))
    if found is not None:
        return (found,)
    if dividing("stages", sizes):
        return ("within its stages the program is right: what differs comes from cutting it, its schedule, or what stages send and share.",)
    first = [dict(report[q].worst).get("step 1", 0.0) for q in ("loss", "gradient norm")]
    if max(first) <= report.tolerance and report["gradients"].largest <= report.tolerance:
        return (
            "the first step agrees: what differs comes with the second. Look for what changes from step to step and is no parameter or "
            "buffer: a count of calls, an attribute that the forward sets, a parameter that no optimizer sees.",
        )
    return ("on every rank the program computes what was captured of the model, so it is the capture that differs from the model.",)


def _not_looked_for(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """What to call where the ranks of the comparison cannot simulate others."""
    return (
        f"where they part first was not looked for, since these ranks exist already: in one process (python, not torchrun, and outside of "
        f'mp.simulate) mp.verify(model, "{format_mesh(sizes)}", batch) names the first operation whose values part.',
    )


# ---- reporting -------------------------------------------------------------------------------------------------------------------------


def _report(task: Task, expected: _Expected, found: _Differences, sizes: Mapping[str, int], where: str) -> Report:
    measured = {quantity: _in_units(values, expected.own.get(quantity)) for quantity, values in found.values.items()}
    report = Report(
        type(task.model).__name__,
        dict(sizes),
        where,
        task.dtype,
        len(task.batches),
        task.tolerance,
        tuple(_difference(q, d) for q, d in measured.items()),
        _drew(expected.right),
        expected.unproved,
        expected.silent,
    )
    return report if report.agrees else replace(report, notes=(*report.notes, *found.notes))


def _in_units(values: Mapping[str, float], own: Mapping[str, float] | None) -> Mapping[str, float]:
    return values if not own else {name: value / own[name] if name in own else value for name, value in values.items()}


def _drew(reference: Reference) -> tuple[str, ...]:
    if not reference.drew:
        return ()
    return (f"random numbers that the model draws were replaced by the same fixed ones in both programs: {', '.join(reference.drew)}.",)


def _merged(found: Sequence[_Differences]) -> _Differences:
    """The largest difference of any rank; ranks of a pipeline hold different parameters."""
    merged: dict[str, dict[str, float]] = {}
    for one in found:
        for quantity, values in one.values.items():
            own = merged.setdefault(quantity, {})
            own.update({name: max(value, own.get(name, 0.0)) for name, value in values.items()})
    return _Differences(merged, tuple(dict.fromkeys(note for one in found for note in one.notes)))


def _complete(found: _Differences, reference: Reference) -> _Differences:
    """A parameter that no rank has is lost."""
    for quantity, values in found.values.items():
        if quantity.startswith(("gradients", "parameters")):
            found = replace(found, values={**found.values, quantity: {**dict.fromkeys(reference.parameters, inf), **values}})
    return found


def _difference(quantity: str, values: Mapping[str, float]) -> Difference:
    worst = sorted(values.items(), key=lambda item: -item[1])[:3]
    return Difference(quantity, len(values), worst[0][1] if worst else 0.0, tuple(worst))


def _lines(report: Report) -> Iterator[str]:
    name = str(report.dtype).removeprefix("torch.")
    verdict = "FAILED" if not report.agrees else "PROVES NOTHING" if report.unproved else "OK"
    yield (
        f"verify {report.model} on {format_mesh(report.mesh)} ({prod(report.mesh.values())} {report.ranks}) against one device, in {name}: "
        f"{verdict}"
    )
    width = max(len(d.quantity) for d in report.differences)
    if report.dtype == torch.bfloat16:
        yield f"  {'':{width}}  compared  in units of what {name} does to the model on one device   (tolerance {report.tolerance:g})"
    else:
        yield f"  {'':{width}}  compared  largest relative difference   (tolerance {report.tolerance:.0e})"
    for d in report.differences:
        state = "ok" if d.largest <= report.tolerance else "FAILED"
        yield f"  {d.quantity:{width}}  {d.compared:8}  {_number(d.largest)}  {state:6}  {_worst(d, report.tolerance)}".rstrip()
    for reason in report.unproved:
        yield f"  proves nothing: {reason}"
    if report.silent and not report.unproved:
        yield f"  of {_few(report.silent)} nothing is proved: zero gradients on one device, or too small beside others to be missed."
    for line in report.where:
        yield f"  {line}"
    for note in report.notes:
        yield f"  note: {note}"


def _number(value: float) -> str:
    return f"{value:.1e}" if value < inf else "   inf "


def _worst(d: Difference, tolerance: float) -> str:
    """The worst name, and when it failed the worst three."""
    if d.compared <= 1:
        return ""
    return ", ".join(f"{name} {_number(value).strip()}" for name, value in d.worst[: 3 if d.largest > tolerance else 1])
