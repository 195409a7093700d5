"""capture(): any nn.Module, unmodified, as one flat functional graph at the global shape of a microbatch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from meshpar._torch import FakeTensorMode, checkpoints_only_call, quick_traces, without_dumps
from meshpar.capture import blame, check, decompositions, examples, fake, foreign, functional, grad, simplify, structure
from meshpar.capture import exported as graph
from meshpar.capture.attempts import Attempt, first_that_works
from meshpar.capture.batch import ReadBatch, maybe_packed, read_batch
from meshpar.capture.experts import seam as experts
from meshpar.capture.functions import calls as functions
from meshpar.capture.functions import cuts
from meshpar.capture.functions import operators as own_backwards
from meshpar.capture.hooks import kept as hooks
from meshpar.capture.recorder import ForwardRecorder, Returned
from meshpar.capture.state import taken as state
from meshpar.capture.values import branches, selections
from meshpar.collection import uncollected
from meshpar.errors import ConfigError
from meshpar.graph import regions, rows
from meshpar.graph.captured import Captured


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str = "cpu",
    scale: int = 1,
    divide: int = 1,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    batch_dims: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
    given: hooks.Given | None = None,
    ask: state.Ask | None = None,
) -> Captured:
    """The forward of `model` (in its present mode, training or evaluation) as a flat functional graph.

    `args` and `kwargs` are one data rank's local batch. The graph has the shapes of `local // divide * scale` samples: `divide` is the
    number of microbatches, `scale` the number of data ranks. A tensor holds samples along dim 0 when that dim is as long as that of the
    first tensor (of positional arguments, then of keywords in the order of the forward's parameters), or a multiple of it, if the forward
    does not run otherwise (the patches of all images, one after the other); `batch_dims` (input name -> dim) says otherwise. `device` is
    where the model will run; parameters on `meta` are read as if they were there already. Nothing is allocated, the model is not changed.

    `dtype`: what floating parameters and inputs are cast to before the forward runs (mixed precision); None leaves them.

    `given`: the hooks of the model that `model` is a copy of.

    `loss_fn(output, batch)` computes the loss where the model does not; `batch` is the keyword arguments, or the tuple of positional ones.

    What of Python the forward read and writes is in `Captured.state`; `ask` says which numbers of it become inputs.

    Raises BatchError when the batch does not divide, CaptureError when the forward cannot become such a graph.

    >>> captured = capture(nn.Linear(4, 2), (torch.randn(8, 4),))
    >>> captured.graph.print_tabular()                                        # doctest: +SKIP
    """
    device = _usable(torch.device(device))
    read = partial(read_batch, model, args, structure.order_of(model)(kwargs or {}), divide=divide)
    settings, asked = ask or state.Ask(), dict(batch_dims or {})

    def record(batch: ReadBatch, answers: branches.Branches) -> Captured:
        return _recorded(model, batch, device, loss_fn, dtype, settings, answers, given)

    def answer(batch: ReadBatch, follow: bool) -> branches.Branches:
        return branches.Branches(_leaves(model), batch.tensors, device, follow=follow)

    packed = () if scale == divide == 1 else tuple(maybe_packed(read(asked, scale=scale)))
    return first_that_works(_Ways(read, record, answer, asked, packed, scale, scale == divide).attempts())


@dataclass
class _Ways:
    """The ways to read one batch, in order: are inputs with several rows per sample cut, may the number of chosen rows be any."""

    read: Callable[..., ReadBatch]
    record: Callable[[ReadBatch, branches.Branches], Captured]
    answer: Callable[[ReadBatch, bool], branches.Branches]
    asked: Mapping[str, int]
    packed: tuple[str, ...]
    """The inputs that may hold several rows of each sample."""
    scale: int
    as_it_is: bool
    """Whether the graph has as many samples as the example: then other numbers are tried too."""
    sized: bool = False
    """Whether the last attempt met sizes that depend on values."""

    def attempts(self) -> tuple[Attempt[Captured], ...]:
        as_many, rows = "with as many chosen rows as the example has", f"with the rows of {', '.join(self.packed)} cut among samples"
        return (
            Attempt("with any number of chosen rows", self._alike),
            Attempt(as_many, partial(self._alike, True), lambda: self.sized, tells=(branches.RanksDiffer,)),
            Attempt(rows, self._cut, lambda: bool(self.packed)),
            Attempt(f"{rows}, {as_many}", partial(self._cut, True), lambda: bool(self.packed) and self.sized),
        )

    def _alike(self, follow: bool = False) -> Captured:
        """What may hold several rows of each sample is the same for all samples: then it fits any number of them."""
        if self.packed and self.as_it_is:
            self._captured(self.asked, 2 * self.scale, follow)
        return self._captured(self.asked, self.scale, follow)

    def _cut(self, follow: bool = False) -> Captured:
        return self._captured({**self.asked, **dict.fromkeys(self.packed, 0)}, self.scale, follow)

    def _captured(self, dims: Mapping[str, int], scale: int, follow: bool) -> Captured:
        batch = self.read(dims, scale=scale)
        answers = self.answer(batch, follow)
        try:
            return self.record(batch, answers)
        finally:
            self.sized = answers.sized


def _recorded(
    model: nn.Module,
    batch: ReadBatch,
    device: torch.device,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    dtype: torch.dtype | None,
    ask: state.Ask,
    answers: branches.Branches,
    given: hooks.Given | None,
) -> Captured:
    mode, recording = FakeTensorMode(allow_non_fake_inputs=True), state.Recording(ask)
    inputs = [fake.fake_of(leaf, device, mode, shape=shape, dtype=dtype) for leaf, shape in zip(batch.tensors, batch.shapes, strict=True)]
    inputs += [fake.fake_of(slot, device, mode) for slot in recording.slots()]
    with (
        state.without_autocast(),
        fake.faked(model, device, mode, dtype) as names,
        experts.seam(model) as found,
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        recorder = ForwardRecorder(model, batch, loss_fn, recording)
        with hooks.kept(model, given) as hooked:
            program, others = _export(recorder, inputs, device, found, answers, hooked)
        renamed = _canonical(program, recorder, names)
    built = graph.build(program, renamed, (*batch.names, *recording.slot_names()), prefix=_PREFIX)
    _keep_used(built.graph, recording)
    hooked.settle(built.graph)
    with found.advising():
        selections.lift(built.graph)
        simplify.prune(built.graph)
        check.refuse(built.graph)
    regions.assign(built.graph)
    others.refuse(built.graph, built.constants)
    leaves = batch.requires_grad | dict.fromkeys(recording.names, False) | _trainable(model)
    grad.propagate(built.graph, leaves)
    if cuts.cut(built.graph):
        grad.propagate(built.graph, leaves)
    simplify.simplify(built.graph)
    rows.mark(built.graph)
    examples.forget(built.graph)
    experts.mark_stacks(built.graph)
    check.number_seeds(built.graph)
    own_backwards.mark(built.graph, tuple(recorder.functions.in_cpp))
    assert recording.found is not None
    return replace(_captured(model, built, batch, recorder.outcome, found, recording), hooks=hooked.hooks)


def _keep_used(graph: fx.Graph, recording: state.Recording) -> None:
    """Drop the spare inputs that no number took, and name the others."""
    used = recording.placeholders()
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.target in recording.slot_names()]:
        if node.target in used:
            node.target = node.name = used[str(node.target)]
        else:
            graph.erase_node(node)


def _trainable(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


_PREFIX = "model."
"""Where the user's model sits in the recorder: every name and module path of the export starts with it."""


def _usable(device: torch.device) -> torch.device:
    """The device, if this machine can run on it: a fake tensor on a missing accelerator would end the process inside autograd."""
    if device.type == "meta":
        raise ConfigError(
            "capture(device='meta') was asked for, but the graph needs the device the model will run on. Type device='cpu' or 'cuda'."
        )
    if device.type != "cpu" and not getattr(getattr(torch, device.type, None), "is_available", lambda: True)():
        raise ConfigError(
            f"This machine has no usable {device.type!r} device. Capture on it with device='cpu': shapes and layouts are the same."
        )
    return device


def _leaves(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """The parameters and buffers in the order in which an export takes them."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return tuple(tensor for _, tensor in named)


def _export(
    recorder: ForwardRecorder,
    inputs: list[torch.Tensor],
    device: torch.device,
    found: experts.Seam,
    answers: branches.Branches,
    hooked: hooks.Found,
) -> tuple[ExportedProgram, foreign.Foreign]:
    with warnings.catch_warnings(), uncollected(), without_dumps(), quick_traces():
        warnings.simplefilter("ignore")
        try:
            with (
                grad.GradWatch(device.type),
                answers,
                decompositions.Written(),
                functions.casting_nothing(),
                checkpoints_only_call(),
                functions.kept(recorder.functions),
                foreign.Foreign() as others,
            ):
                program = torch.export.export(recorder, tuple(inputs), strict=False)
            hooked.check_unwritten()
            grad.inline(program.graph_module)
            return functional.functional(program), others
        except Exception as error:
            raise blame.explain(error, recorder.model, found.advice(blame.modules_of(error, recorder.model))) from error


def _canonical(program: ExportedProgram, recorder: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    """Exported name -> the model's first name for the same tensor."""
    renamed: dict[str, str] = {}
    for name, tensor in (*recorder.named_parameters(remove_duplicate=False), *recorder.named_buffers(remove_duplicate=False)):
        renamed[name] = names[id(tensor)]
    return renamed


def _captured(
    model: nn.Module, built: graph.Built, batch: ReadBatch, outcome: Returned, found: experts.Seam, recording: state.Recording
) -> Captured:
    used = {node.target for node in built.graph.nodes if node.op == "get_attr"}
    parameters = list(model.named_parameters())
    aliases = _aliases(model)
    assert outcome.spec is not None
    return Captured(
        graph=built.graph,
        parameters=tuple(name for name, _ in parameters if name in used),
        aliases=aliases,
        buffers=tuple(name for name, _ in model.named_buffers() if name in used or name in built.mutations),
        constants={name: value for name, value in built.constants.items() if name in used},
        inputs=(*batch.names, *recording.names),
        in_spec=batch.spec,
        in_leaves=batch.leaves,
        batch_dims=batch.dims,
        out_spec=outcome.spec,
        out_leaves=outcome.leaves,
        loss=outcome.loss,
        mutations=built.mutations,
        dropped=outcome.dropped,
        experts=found.lifted,
        unrecognised=found.unrecognised,
        state=_with_notes(
            state.State() if recording.found is None else state.settled(recording.found, model, found.lifted), built.overwritten
        ),
    )


def _with_notes(found: state.State, overwritten: Sequence[str]) -> state.State:
    """With a word on inputs that the model changes in place: a program leaves the caller's tensors as they are."""
    notes = (
        f"changes {name} of the batch in place: the tensor that is passed keeps its values, a step sees the new ones"
        for name in overwritten
    )
    return replace(found, notes=(*found.notes, *notes))


def _aliases(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases
