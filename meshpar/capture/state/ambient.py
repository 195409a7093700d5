"""What torch lets a program change between two calls, and what is done about each: the one list of it.

`key`: the value is part of what a program is made for; another value means another program. `asked`: part of it where the forward asks.
`refused`, `said`: told to the user. `free`: nothing has to be done, for the reason given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from meshpar._torch import active_modes, default_device, transforms
from meshpar.capture.state.places import Place

Treatment = Literal["key", "asked", "refused", "said", "free"]


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that may change: what it is, what is done, why that is right, and how it is read (None: nothing is read)."""

    what: str
    done: Treatment
    why: str
    read: Callable[[], Any] | None = None


def _autocast() -> Any:
    """The devices for which autocast is on, and in which types."""
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _DEVICES if torch.is_autocast_enabled(kind))


_DEVICES = ("cpu", "cuda")


def _gradients() -> bool:
    return torch.is_grad_enabled()


TABLE: tuple[Row, ...] = (
    Row("default dtype", "key", "torch.zeros(n) in a forward has it", torch.get_default_dtype),
    Row("default device", "key", "torch.zeros(n) in a forward lies there", default_device),
    Row("autocast", "key", "captured around the forward; its casts are in the graph, which runs without", _autocast),
    Row("deterministic algorithms", "key", "torch.nn.functional asks for them", torch.are_deterministic_algorithms_enabled),
    Row("float32 matmul precision", "key", "a forward may ask for it", torch.get_float32_matmul_precision),
    Row("grad mode", "asked", "graphs hold for both; a forward may ask torch.is_grad_enabled()", _gradients),
    Row("transforms of torch.func", "refused", "vmap and grad work on the operators of the model, not on collectives", transforms),
    Row("TorchFunctionMode, TorchDispatchMode", "said", "a mode sees the operators of the parallel program", active_modes),
    Row("inference mode", "free", "a step with backward raises torch's own error, one without computes the same"),
    Row("anomaly mode", "free", "autograd reads it when it runs"),
    Row("TF32, cuDNN and oneDNN flags", "free", "operators read them when they run, and programs run operators"),
    Row("sdpa_kernel", "free", "attention stays one operator, which chooses its kernel when it runs"),
    Row("autocast cache", "free", "saves casts, changes no value"),
    Row("random seed", "free", "programs draw from ParallelConfig.seed and the step"),
    Row("torch.compile of the model", "free", "what it compiles is what the program computes"),
    Row("training of modules", "key", "read as the attribute it is, of every module that asks"),
    Row("attributes of modules and of what they hold", "key", "recorded at capture: capture.reads"),
    Row("values and functions in globals, closures, classes, defaults", "key", "found in the code: capture.surroundings"),
    Row("what forward changes in globals, closures, classes, functions", "refused", "seen by a picture before and after: capture.outside"),
    Row("what recognised experts hold", "key", "all of it counts as read: others run in their place"),
    Row("environment variables", "asked", "recorded at capture: capture.reads"),
    Row("plain tensors of modules", "key", "by identity and version: the graph holds their values"),
    Row("buffers", "free", "programs read them when they run, under the names that pm shows"),
    Row("values of parameters", "free", "programs read them when they run"),
    Row("requires_grad of parameters", "key", "read before every step; refused where FSDP2 or stages were built for it"),
    Row("modules put in the place of others on the model given", "refused", "looked at before every step, while somebody has it"),
    Row("parameters, buffers and modules put in the place of others on pm", "refused", "programs run over those of parallelize"),
    Row("dtype and device of pm", "refused", "programs were captured in them"),
    Row("structure, shapes, dtypes, layouts of a batch, whether it requires grad", "key", "compile.signature.BatchSignature"),
    Row("what a batch holds beside tensors", "key", "by type and value; objects are refused"),
    Row(
        "what forward writes to attributes",
        "key",
        "numbers and plain values are written after every step; what else is, is refused or said",
    ),
    Row("random, numpy.random in a forward", "refused", "their state moves during capture"),
    Row("iterators and generators in a forward", "refused", "they can be read once"),
    Row("clocks, print, open, logging in a forward", "said", "they run while the forward is captured, and not in a step"),
    Row("hooks", "free", "see capture: what a forward hook computes is captured, those added later are not seen"),
)


def keyed() -> dict[Place, Any]:
    """What of torch's own state every program is made for."""
    return {place_of(row.what): row.read() for row in TABLE if row.done == "key" and row.read is not None}


def place_of(what: str) -> Place:
    """A row of the table as a place: its value is read by a call."""
    return Place("torch", (("call", what),))


class Torch:
    """The root of those places."""

    def __init__(self) -> None:
        self.calls = {row.what: row.read for row in TABLE if row.read is not None}


TORCH = Torch()
"""Where places of torch's own state begin."""
