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
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshpar._torch import pytree

from . import launch
from ._torch import local_of, maybe_disable_local_tensor_mode, without_modes
from .api import parallelize
from .capture.copies import copied
from .capture.structure import call_loss, find_loss, order_of
from .comparable import cast, comparable, only
from .config import ParallelConfig, Precision
from .errors import BatchError, CaptureError, ConfigError, MeshparError
from .mesh import format_mesh, local_batch, make_mesh, mesh_sizes, parse_mesh
from .runtime.gradients import clip_grad_norm_
from .runtime.hooks import ParameterHooks, attach, copied, of_parameters
from .runtime.model import ParallelModel
from .runtime.parameters import full_grad, full_tensor, local_part, spec_of
from .simulate import is_simulated, local_tensors, simulate

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""float64: a million times the rounding of one operation, far below any mistake. float32: a hundred times, for sums over a hidden dim."""
FLOOR = 1e-3
LEARNING_RATE = 1e-2
"""Large, so that a step not taken shows against parameters of size one."""
MAX_NORM = 1.0

Batch = Mapping[str, Any] | tuple[Any, ...]


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

    @property
    def ok(self) -> bool:
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
    steps: int = 1,
    processes: bool = False,
    dtype: torch.dtype = torch.float64,
    perturb: float = 0.02,
    seed: int = 0,
    tolerance: float | None = None,
) -> Report:
    """Train `model` for `steps` steps on one device and in parallel, from the same parameters on the same `batch`, and compare.

    `batch` is the global batch. The ranks of `mesh` are simulated in this process; with `processes=True`, and for a pipeline, they are new
    gloo processes; given a DeviceMesh, or under torchrun, they are those of the mesh, and all of them call this. `config`, `rules` and
    `loss_fn` are those of `parallelize`; the precision of `config` is not used, everything is computed in `dtype`. `tolerance` defaults to
    1e-9 in float64 and 1e-5 in float32.

    A copy of the model is compared, not the model: dropout is switched off, every parameter moved by `perturb` times a normal draw, and
    requests of the model for a narrower dtype than `dtype` are answered with `dtype`, in both programs.

    Raises ConfigError, CaptureError, PlanError or BatchError as `parallelize` does, RankError when a rank fails.

        verify(model, "dp=2,tp=2", {"input_ids": ids, "labels": ids}).raise_if_failed()
    """
    with without_modes():
        task = _task(model, batch, config, rules, loss_fn, steps, dtype, perturb, seed, tolerance)
    if isinstance(mesh, DeviceMesh) or is_simulated() or launch.launched():
        found, sizes = _on_given_ranks(task, mesh)
        where = "simulated ranks" if is_simulated() else "ranks"
    elif processes or parse_mesh(mesh).get("pp", 1) > 1:
        sizes = parse_mesh(mesh)
        reference = _reference(task, torch.device("cpu"))
        everyone = launch.run(_on_rank, task, reference, sizes, world=prod(sizes.values()))
        found, where = _complete(_merged(everyone), reference), "gloo processes"
    else:
        sizes = parse_mesh(mesh)
        reference = _reference(task, torch.device("cpu"))
        with simulate(prod(sizes.values())):
            found, where = _complete(_compare(task, reference, make_mesh(sizes, "cpu")), reference), "simulated ranks"
    return Report(
        type(model).__name__,
        dict(sizes),
        where,
        dtype,
        steps,
        task.tolerance,
        tuple(_difference(q, d) for q, d in found.values.items()),
        found.notes,
    )


@dataclass(frozen=True)
class _Task:
    """What is compared: everything a rank must know."""

    model: nn.Module
    batch: Batch
    config: ParallelConfig
    rules: Mapping[str, str] | None
    loss_fn: Callable[[Any, Any], torch.Tensor] | None
    steps: int
    dtype: torch.dtype
    tolerance: float
    hooks: ParameterHooks
    """Of the parameters: a file loses them."""


@dataclass(frozen=True)
class _Reference:
    """The original on one device: losses and gradient norms of all steps, the first gradients, and what the tensors are at the end."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    gradients: Mapping[str, torch.Tensor | None]
    parameters: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    eps: float
    without: tuple[frozenset[str], ...] = ()
    """Per step, the parameters that had no gradient, which is not the same to an optimizer as zeros."""


@dataclass(frozen=True)
class _Found:
    """Quantity -> name -> relative difference."""

    values: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]


def _task(
    model: nn.Module,
    batch: Batch,
    config: ParallelConfig | None,
    rules: Mapping[str, str] | None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    steps: int,
    dtype: torch.dtype,
    perturb: float,
    seed: int,
    tolerance: float | None,
) -> _Task:
    if dtype not in TOLERANCE:
        raise ConfigError(
            f"dtype={dtype}: compare in torch.float64 or torch.float32; narrower dtypes round too much to tell mistakes from rounding."
        )
    if steps < 1:
        raise ConfigError(f"steps={steps}: at least 1.")
    if not isinstance(batch, (Mapping, tuple, list)):
        raise ConfigError(f"batch is a {type(batch).__name__}, not a dict of keyword arguments or a tuple of positional ones.")
    return _Task(
        comparable(model, dtype=dtype, perturb=perturb, seed=seed),
        cast(order_of(model)(batch) if isinstance(batch, Mapping) else tuple(batch), dtype),
        replace(config or ParallelConfig(), precision=Precision()),
        rules,
        loss_fn,
        steps,
        dtype,
        TOLERANCE[dtype] if tolerance is None else tolerance,
        of_parameters(model),
    )


# ---- the original ----------------------------------------------------------------------------------------------------------------------


def _reference(task: _Task, device: torch.device) -> _Reference:
    model = copied(task.model).to(device)
    batch = pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, task.batch)
    losses, norms, gradients, without = [], [], dict[str, torch.Tensor | None](), []
    optimizer: torch.optim.Optimizer | None = None
    eps = 0.0
    with only(task.dtype):
        for _ in range(task.steps):
            loss = _loss(model, batch, task.loss_fn)
            loss.backward()
            losses.append(loss.item())
            if not gradients:
                gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
            without.append(frozenset(n for n, p in model.named_parameters() if p.grad is None))
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
            eps = eps or _eps(model, task.dtype)
            optimizer = optimizer or _optimizer(model, eps)
            optimizer.step()
            optimizer.zero_grad()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    return _Reference(tuple(losses), tuple(norms), gradients, parameters, dict(model.named_buffers()), eps, tuple(without))


def _loss(model: nn.Module, batch: Batch, loss_fn: Callable[[Any, Any], torch.Tensor] | None) -> torch.Tensor:
    output = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    loss = find_loss(output) if loss_fn is None else call_loss(loss_fn, output, batch)
    if loss is None:
        raise BatchError(
            "there is no loss to compare: the model returns none for this batch. Pass labels if the model computes its loss from them, or "
            "loss_fn=, a function of (output, batch)."
        )
    return loss


def _optimizer(model: nn.Module, eps: float) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": trained}], lr=LEARNING_RATE, eps=eps)  # a group: a rank of a pipeline may have none


def _eps(model: nn.Module, dtype: torch.dtype) -> float:
    """AdamW's eps at the floor of the gradients: with a smaller one, a gradient that is rounding alone is a full step of random sign.

    AdamW divides by the gradient and eps, so it blows the rounding of small gradients up by as much as the floor is small: in float32 a
    thousand times would be seen.
    """
    floor = FLOOR if dtype == torch.float64 else 10 * FLOOR
    return floor * max((p.grad.abs().max().item() for p in model.parameters() if p.grad is not None and p.numel()), default=1.0) or 1e-8


# ---- the parallel program --------------------------------------------------------------------------------------------------------------


def _on_given_ranks(task: _Task, mesh: str | Mapping[str, int] | DeviceMesh) -> tuple[_Found, Mapping[str, int]]:
    """On the ranks of a mesh that exists: all of them are here."""
    mesh = mesh if isinstance(mesh, DeviceMesh) else make_mesh(mesh)
    with without_modes():
        reference = _reference(task, torch.device(mesh.device_type))
    found = _compare(task, reference, mesh)
    if is_simulated() or mesh.size() == 1:
        return _complete(found, reference), mesh_sizes(mesh)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return _complete(_merged(everyone), reference), mesh_sizes(mesh)


def _on_rank(task: _Task, reference: _Reference, sizes: Mapping[str, int]) -> _Found:
    attach(task.model, task.hooks)
    return _compare(task, reference, make_mesh(sizes, "cpu"))


def _compare(task: _Task, reference: _Reference, mesh: DeviceMesh) -> _Found:
    """Train in parallel, and measure how far this rank (every simulated rank) is from the reference."""
    losses, norms, gradients = dict[str, float](), dict[str, float](), dict[str, float]()
    with only(task.dtype):
        pm, batch = _parallel(task, mesh)
        optimizer: torch.optim.Optimizer | None = None
        for step, (loss, norm) in enumerate(zip(reference.losses, reference.norms, strict=True), 1):
            value = pm.train_step(**batch) if isinstance(batch, Mapping) else pm.train_step(*batch)
            losses[f"step {step}"] = _scalar_distance(value, loss)
            if not gradients:
                gradients = _gradient_distances(pm, reference)
            norms[f"step {step}"] = _scalar_distance(clip_grad_norm_(pm.parameters(), MAX_NORM), norm)
            optimizer = optimizer or _optimizer(pm, reference.eps)
            _leave_out(pm, reference.without[step - 1])
            optimizer.step()
            optimizer.zero_grad()
    values = {"loss": losses, "gradients": gradients, "gradient norm": norms}
    values[f"parameters after {task.steps} AdamW step{'s' if task.steps > 1 else ''}"] = _parameter_distances(pm, reference)
    buffers = _buffer_distances(pm, reference)
    return _Found(values | ({"buffers": buffers} if buffers else {}), _notes(pm, reference))


def _leave_out(pm: ParallelModel, names: frozenset[str]) -> None:
    """Zeros where the original had no gradient (an expert that a loop passed over) would still decay a weight: leave them out as well."""
    for name, parameter in pm.named_parameters():
        if name in names and parameter.grad is not None and not any(bool(local.any()) for local in _locals(parameter.grad)):
            parameter.grad = None


def _locals(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    with maybe_disable_local_tensor_mode():
        yield from local_tensors(local_of(tensor) if isinstance(tensor, DTensor) else tensor).values()


def _parallel(task: _Task, mesh: DeviceMesh) -> tuple[ParallelModel, Batch]:
    """The parallel model and this data rank's part of the batch; tensors of several rows per sample are cut where it fits no other way."""
    make = partial(parallelize, task.model, mesh, config=task.config, rules=task.rules, loss_fn=task.loss_fn)
    batch = _share(task.batch, mesh, packed=False)
    try:
        return make(example=batch), batch
    except CaptureError as error:
        packed = _share(task.batch, mesh, packed=True)
        if _shapes(packed) == _shapes(batch):
            raise
        unfit = error
    try:
        return make(example=packed), packed
    except CaptureError:
        raise unfit from unfit.__cause__


def _shapes(batch: Batch) -> list[torch.Size]:
    return [leaf.shape for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]


def _share(batch: Batch, mesh: DeviceMesh, *, packed: bool) -> Batch:
    """This data rank's part of every tensor that holds samples: those as long as the first, or (`packed`) a multiple of it."""
    samples = next((leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim), 0)

    def share(leaf: Any) -> Any:
        rows = leaf.shape[0] if isinstance(leaf, torch.Tensor) and leaf.ndim else 0
        cut = rows and (rows == samples or (packed and rows % samples == 0))
        return local_batch({"the batch": leaf}, mesh)["the batch"] if cut else leaf

    return pytree.tree_map(share, batch)


def _gradient_distances(pm: ParallelModel, reference: _Reference) -> dict[str, float]:
    floor = FLOOR * max((g.abs().max().item() for g in reference.gradients.values() if g is not None and g.numel()), default=0.0)
    found = {}
    for name, parameter in pm.named_parameters():
        wanted, grad = reference.gradients[name], parameter.grad
        if grad is None:  # torch leaves gradients out where they are zero because nothing depends on a parameter
            found[name] = 0.0 if wanted is None or not wanted.any() else inf
            continue
        wanted = torch.zeros_like(reference.parameters[name]) if wanted is None else wanted
        found[name] = max(_distance(a, b, wanted, floor) for a, b in _pairs(grad, parameter, wanted, full_grad))
    return found


def _parameter_distances(pm: ParallelModel, reference: _Reference) -> dict[str, float]:
    found = {}
    for name, parameter in pm.named_parameters():
        wanted = reference.parameters[name]
        found[name] = max(_distance(a, b, wanted, LEARNING_RATE) for a, b in _pairs(parameter, parameter, wanted, full_tensor))
    return found


def _buffer_distances(pm: ParallelModel, reference: _Reference) -> dict[str, float]:
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


def _notes(pm: ParallelModel, reference: _Reference) -> tuple[str, ...]:
    notes = []
    if not all(abs(x) < inf for x in (*reference.losses, *reference.norms)):
        notes.append("the original's own loss or gradient norm is not finite: there is nothing to compare with.")
    drawn = [n for n in pm._first.graph.nodes if "seed" in n.meta]
    if drawn:
        where = ", ".join(dict.fromkeys(str(n.meta.get("source") or n.name) for n in drawn[:3]))
        notes.append(f"the model still draws random numbers ({where}), which differ between the two programs: switch them off to compare.")
    if pm._first.averaged:
        notes.append(f"terms of the loss that are averaged over microbatches, not over the whole batch: {', '.join(pm._first.averaged)}.")
    if pm._first.within:
        notes.append(f"statistics that are those of a microbatch, not of the whole batch: {', '.join(pm._first.within)}.")
    return tuple(notes)


# ---- reporting -------------------------------------------------------------------------------------------------------------------------


def _merged(found: Sequence[_Found]) -> _Found:
    """The largest difference of any rank; ranks of a pipeline hold different parameters."""
    merged: dict[str, dict[str, float]] = {}
    for one in found:
        for quantity, values in one.values.items():
            own = merged.setdefault(quantity, {})
            own.update({name: max(value, own.get(name, 0.0)) for name, value in values.items()})
    return _Found(merged, tuple(dict.fromkeys(note for one in found for note in one.notes)))


def _complete(found: _Found, reference: _Reference) -> _Found:
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
    yield (
        f"verify {report.model} on {format_mesh(report.mesh)} ({prod(report.mesh.values())} {report.ranks}) against one device, in {name}: "
        f"{'OK' if report.ok else 'FAILED'}"
    )
    width = max(len(d.quantity) for d in report.differences)
    yield f"  {'':{width}}  compared  largest relative difference   (tolerance {report.tolerance:.0e})"
    for d in report.differences:
        state = "ok" if d.largest <= report.tolerance else "FAILED"
        yield f"  {d.quantity:{width}}  {d.compared:8}  {_number(d.largest)}  {state:6}  {_worst(d, report.tolerance)}".rstrip()
    for note in report.notes:
        yield f"  note: {note}"


def _number(value: float) -> str:
    return f"{value:.1e}" if value < inf else "   inf "


def _worst(d: Difference, tolerance: float) -> str:
    """The worst name, and when it failed the worst three."""
    if d.compared <= 1:
        return ""
    return ", ".join(f"{name} {_number(value).strip()}" for name, value in d.worst[: 3 if d.largest > tolerance else 1])
