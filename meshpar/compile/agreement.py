"""What the ranks of a mesh must have alike before a program is built: the captured graph, the parameters, and their values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshpar._torch import OpOverload, pytree
from meshpar.consensus import agree_on_lines, is_real
from meshpar.graph import text
from meshpar.graph.captured import Captured
from meshpar.init.fit import Weights
from meshpar.init.meta import WeightsFrom, record_initialisation
from meshpar.init.record import mark_of, ref_of
from meshpar.init.tape import TapedOp, TapedView
from meshpar.init.weights import Files

_ORDER = (
    "Every rank must pass the same model and build it in the same way. What differs from process to process is the order of a set of "
    "strings: where the forward or the constructor loops over one and the order matters (a sum of floats, a list, the first that is "
    "found), write `for name in sorted(names)`."
)
_VALUES = (
    "Every rank takes its part of the values of its own model, so all must have the same ones: call torch.manual_seed with the same number "
    "on all ranks before the model is built, build its modules in the same order (`for name in sorted(names)` where names are a set of "
    "strings, which every process orders in its own way), fill what torch.empty makes, or pass weights=PATH."
)


def agree_on_graph(captured: Captured, parameters: Mapping[str, tuple[tuple[int, ...], str, bool]], mesh: DeviceMesh) -> None:
    """Raise PlanError on every rank, with the first lines that differ, unless all have captured the same graph. Collective."""
    held = [f"{name}: {dtype} {list(shape)}{'' if trains else ', frozen'}" for name, (shape, dtype, trains) in sorted(parameters.items())]
    agree_on_lines([*text.lines(captured), *held], lambda: [*text.shown(captured), *held], mesh, "the model's captured graph", _ORDER)


def agree_on_values(model: nn.Module, mesh: DeviceMesh, *, weights: WeightsFrom | None = None) -> None:
    """Raise PlanError on every rank, with the first tensors that differ, unless the model holds the same values everywhere. Collective.

    Large tensors are compared in places. What `weights` hold is not compared: it replaces the model's own. Free when ranks are simulated
    or fake.
    """
    if not is_real(mesh):
        return
    path = weights.path if isinstance(weights, Weights) else weights
    given = () if path is None else Files.open(path)
    named = (*model.named_parameters(), *model.named_buffers(remove_duplicate=False))
    skips = isinstance(weights, Weights) and weights.missing != "error"  # then parameters that no file has keep their own values
    tensors = {
        name: tensor for name, tensor in named if name not in given and (skips or path is None or not isinstance(tensor, nn.Parameter))
    }
    record_initialisation(model, tensors.values())
    held = sorted(f"{name}: {_value(tensor)}" for name, tensor in tensors.items())
    agree_on_lines(held, lambda: held, mesh, "the initial state of the model", _VALUES)


def _value(tensor: torch.Tensor) -> str:
    """What tells the value of a tensor: its elements, or how they will be computed."""
    mark = mark_of(tensor)
    if mark is None:
        return f"elements {text.digest(tensor)}"
    tape = mark.tape
    needed = sorted(tape.needed([ref_of(tensor)]))
    drawn = [i for i in needed if tape.ops[i].dice is not None]
    start = [text.digest(state) for state in tape.start.values()] if drawn else []
    record = [start, drawn, *(_made(tape.ops[i]) for i in needed)]
    return f"to be initialised, as {hashlib.sha256(str(record).encode()).hexdigest()[:16]}"


def _made(op: TapedOp) -> list[str]:
    """What an operation does: its operator and all that it is given, but for other tensors of the tape."""
    leaves = (leaf for leaf in pytree.tree_leaves((op.args, dict(op.kwargs))) if not isinstance(leaf, TapedView))
    run = str(op.run) if isinstance(op.run, OpOverload) else getattr(op.run, "__qualname__", type(op.run).__qualname__)  # (no addresses)
    return [run, *(text.digest(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves)]
