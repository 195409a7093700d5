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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshpar._torch import maybe_disable_local_tensor_mode, part_here, pytree, without_modes
from meshpar.api import parallelize
from meshpar.arguments import check_arguments
from meshpar.capture.attempts import Attempt, first_that_works
from meshpar.capture.hooks.models import attach, of_parameters
from meshpar.capture.structure import order_of
from meshpar.config import ParallelConfig, Precision
from meshpar.errors import ConfigError
from meshpar.graph.facts import facts
from meshpar.mesh import format_mesh, local_batch, make_mesh, mesh_sizes, parse_mesh
from meshpar.proof import launch
from meshpar.proof.comparable import cast, comparable
from meshpar.proof.differences import (
    Differences,
    buffer_distances,
    complete,
    gradient_distances,
    in_units,
    merged,
    parameter_distances,
    scalar_distance,
)
from meshpar.proof.expected import Expected, after, expectation
from meshpar.proof.locate import first_difference
from meshpar.proof.reference import (
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
from meshpar.proof.report import Report, difference
from meshpar.roles import ROLES, dividing, stage_axis
from meshpar.runtime.model import ParallelModel
from meshpar.runtime.parameters.gradients import clip_grad_norm_
from meshpar.simulate import is_simulated, local_tensors, simulate
from meshpar.waiting import each, working


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
    config = check_arguments(model, mesh, config, rules, loss_fn, caller="verify")
    sizes = mesh_sizes(mesh) if isinstance(mesh, DeviceMesh) else parse_mesh(mesh)
    with without_modes():
        task = _task(model, batch, sizes, config, rules, loss_fn, steps, dtype, perturb, seed, tolerance)
    if isinstance(mesh, DeviceMesh) or is_simulated() or launch.launched():
        where = "simulated ranks" if is_simulated() else "ranks"
        given = mesh if isinstance(mesh, DeviceMesh) else make_mesh(mesh)
        expected = expectation(task, torch.device(given.device_type))
        found = _on_given_ranks(task, expected.right, given)
    else:
        expected = expectation(task, torch.device("cpu"))
        if processes or sizes.get(stage_axis(), 1) > 1:
            where = "gloo processes"
            found = merged(launch.run(_on_rank, task, expected.right, sizes, world=prod(sizes.values())))
        else:
            where = "simulated ranks"
            with working("comparing with one device"), simulate(prod(sizes.values())):
                found = _compare(task, expected.right, make_mesh(sizes, "cpu"))
    report = _report(task, expected, complete(found, expected.right), sizes, where)
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


def _on_given_ranks(task: Task, reference: Reference, mesh: DeviceMesh) -> Differences:
    """On the ranks of a mesh that exists: all of them are here."""
    found = _compare(task, reference, mesh)
    if is_simulated() or mesh.size() == 1:
        return found
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return merged(everyone)


def _on_rank(task: Task, reference: Reference, sizes: Mapping[str, int]) -> Differences:
    if not of_parameters(task.model):  # sent by a file, which loses them
        attach(task.model, task.hooks)
    return _compare(task, reference, make_mesh(sizes, "cpu"))


def _compare(task: Task, reference: Reference, mesh: DeviceMesh) -> Differences:
    """Train in parallel, and measure how far this rank (every simulated rank) is from the reference."""
    losses, norms, gradients = dict[str, float](), dict[str, float](), dict[str, float]()
    with task.conditions():
        pm, packed = parallel(task, mesh)
        optimizer: torch.optim.Optimizer | None = None
        for step, whole in enumerate(each(task.batches), 1):
            batch = share(whole, mesh, packed=packed)
            value = pm.train_step(**batch) if isinstance(batch, Mapping) else pm.train_step(*batch)
            losses[f"step {step}"] = scalar_distance(value, reference.losses[step - 1])
            if not gradients:
                gradients = gradient_distances(pm, reference)
            norms[f"step {step}"] = scalar_distance(clip_grad_norm_(pm.parameters(), MAX_NORM), reference.norms[step - 1])
            optimizer = optimizer or optimizer_of(pm, reference.eps)
            _leave_out(pm, reference.without[step - 1])
            optimizer.step()
            optimizer.zero_grad()
    values = {"loss": losses, "gradients": gradients, "gradient norm": norms}
    values[after(len(task.batches))] = parameter_distances(pm, reference)
    buffers = buffer_distances(pm, reference)
    return Differences(values | ({"buffers": buffers} if buffers else {}), _notes(pm))


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
        notes.append(f"these see the samples of a microbatch, not of the whole batch: {', '.join(pm._first.within)}.")
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
    if pm._first.within or pm._first.averaged:
        return ("the program computes what was captured for a microbatch; the notes say what a microbatch changes. Try microbatches=1.",)
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


def _report(task: Task, expected: Expected, found: Differences, sizes: Mapping[str, int], where: str) -> Report:
    measured = {quantity: in_units(values, expected.own.get(quantity)) for quantity, values in found.values.items()}
    report = Report(
        type(task.model).__name__,
        dict(sizes),
        where,
        task.dtype,
        len(task.batches),
        task.tolerance,
        tuple(difference(q, d) for q, d in measured.items()),
        _drew(expected.right),
        expected.unproved,
        expected.silent,
    )
    return report if report.agrees else replace(report, notes=(*report.notes, *found.notes))


def _drew(reference: Reference) -> tuple[str, ...]:
    if not reference.drew:
        return ()
    return (f"random numbers that the model draws were replaced by the same fixed ones in both programs: {', '.join(reference.drew)}.",)
