"""Whose line it was: the user's source line of a node or of an exception, and what to do about it."""

from __future__ import annotations

import os
import re
import sys
import traceback
from functools import lru_cache
from types import FrameType

import torch
from torch import nn

from meshpar.errors import CaptureError

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_PYTHON = os.path.dirname(os.__file__) + os.sep
_PACKAGES = ("site-packages", "dist-packages")


@lru_cache(maxsize=4096)
def source_of(stack_trace: str | None) -> str:
    """ "file.py:line" of the innermost frame that is neither torch's, nor Python's, nor ours, or an empty string."""
    for path, line in reversed(_FRAME.findall(stack_trace or "")):
        if is_users(path):
            return f"{os.path.basename(path)}:{line}"
    return ""


def is_users(path: str) -> bool:
    """Whether a source file is neither torch's, nor Python's, nor ours."""
    if path.startswith(_PYTHON):
        return any(name in path for name in _PACKAGES) and not path.startswith((_TORCH, _OURS))
    return not path.startswith((_TORCH, _OURS, "<"))


def here() -> str:
    """ " at file.py:line (code)" of the user's innermost line that is running."""
    return _line_of(traceback.extract_stack())


def asked_by_user(depth: int = 2) -> bool:
    """Whether the function that calls this one was called by the user's code, not by torch's."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and frame.f_code.co_filename.startswith((_OURS, "<")):
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith(_TORCH)


def is_own() -> bool:
    """Whether the user's innermost line that is running is in a file of his own, rather than of an installed package."""
    frames = [frame.filename for frame in traceback.extract_stack() if is_users(frame.filename)]
    return bool(frames) and not any(name in frames[-1] for name in _PACKAGES)


_OF_ROWS = r"(?s:.*)Size-like symbols: [a-z]+\d"
"""What torch adds where a number is one of rows that a mask chooses."""
_ADVICE: tuple[tuple[str, str, str], ...] = (
    (
        r"Default process group has not been initialized|AssertionError: group cannot be None",
        "it calls a collective of torch.distributed",
        "A graph is of the whole batch, as one process computes it: leave the call out where torch.distributed.is_initialized() says no, "
        "as it does while a forward is captured",
    ),
    (
        r"FakeTensorDeviceMismatchError.*\bmeta\b",
        "it reads a parameter or a buffer out of a list, a dict or another object, where it is not registered",
        "Read it from the module that has it (self.proj.weight), or keep it in nn.ParameterList, nn.ParameterDict or a buffer",
    ),
    (
        r"Unable to cast NotImplemented to Tensor",
        "it reads a tensor that was made inside of mp.simulate, where every simulated rank has its own",
        "Make it before `with mp.simulate(...)`, or register it as a buffer before parallelize",
    ),
    (
        r"Could not guard on data-dependent" + _OF_ROWS,
        "it goes one of two ways by how many rows a mask chooses, which depends on what the model computes",
        "Leave the branch out (a sum over no rows is zero), or compute both ways and choose: torch.where(mask.sum() > n, one, other)",
    ),
    (
        r"Could not extract specialized" + _OF_ROWS,
        "it makes a Python number (len(), int(), float()) of how many rows a mask chooses, which depends on what the model computes",
        "Take that number as a tensor, mask.sum(), or as a size, x[mask].shape[0], and write a loop over rows as one call on all, a "
        "branch as torch.where(mask.sum() > 0, one, other)",
    ),
    (
        r"Could not guard on data-dependent",
        "it turns the values of a tensor into Python numbers, by which it goes one of two ways",
        "Compute both ways and choose: torch.where(condition, one, other); or hand the decision in as a plain Python argument",
    ),
    (
        r"Could not extract specialized|_local_scalar_dense",
        "it turns the values of a tensor into Python numbers (.item(), int(), float()), other ones with every step",
        "Leave it a tensor (x * scale rather than x * scale.item(); a mask rather than x[:n]), or hand it in as a plain Python argument",
    ),
    (
        r"data-dependent|GuardOnDataDependent|unbacked|\bu\d+\b|_local_scalar_dense",
        "it turns the values of a tensor into Python numbers or shapes (.item(), nonzero(), a boolean mask as an index, or `if tensor:`)",
        "Use torch.where, masked_fill or a fixed shape instead, or hand the number in as a plain Python argument",
    ),
    (
        r"\.numpy\(\) is not supported|Can't call numpy|convert.* to (a )?numpy",
        "it hands a tensor to NumPy, whose results a graph cannot hold",
        "Compute the same with torch, or make the function an operator: torch.library.custom_op, register_fake for the result's shape",
    ),
    (
        r"mutat|assign",
        "it changes a tensor that is neither a buffer nor made in the same forward",
        "Register it with register_buffer, or compute a new tensor instead of changing the old one",
    ),
    (
        r"not registered as pytree|Unsupported input type|pytree",
        "it uses a type that torch does not know how to take apart",
        "Pass tensors, numbers, strings, and lists, tuples and dicts of them",
    ),
    (r"loss_fn", "the loss could not be computed", "Make loss_fn return one floating number"),
)


def explain(error: Exception, model: nn.Module, advice: str = "") -> CaptureError:
    """The exception that export raised, told by the model's own line; `advice` ends the message."""
    if isinstance(error, CaptureError):
        return error
    told = _told(error, model)
    return CaptureError(f"{told}\n{advice}" if advice else str(told))


def modules_of(error: Exception, model: nn.Module) -> tuple[str, ...]:
    """The paths of the modules of `model` that were running."""
    names = {id(module): name for name, module in model.named_modules()}
    found = (names.get(id(frame.f_locals.get("self"))) for frame, _ in traceback.walk_tb(error.__traceback__))
    return tuple(dict.fromkeys(name for name in found if name is not None))


def _told(error: Exception, model: nn.Module) -> CaptureError:
    text = str(error).strip()
    where = _where(error, text)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    for pattern, reason, way_out in _ADVICE:
        if re.search(pattern, f"{type(error).__name__}: {text}"):
            return CaptureError(f"{type(model).__name__} cannot be captured{where}: {reason}.\n  {way_out}.\n  torch says: {first}")
    return CaptureError(
        f"{type(model).__name__} cannot be captured{where}: {type(error).__name__}: {first}\n"
        "  Check that the model runs by itself on this batch; if it does, write the line above with tensor operations of fixed shape."
    )


def _where(error: Exception, text: str) -> str:
    """ " at file.py:line (code)" of the user's innermost frame: in the traceback, or in what torch wrote into the message."""
    found = _line_of(traceback.extract_tb(error.__traceback__))
    source = source_of(text)
    return found or (f" at {source}" if source else "")


def _line_of(frames: traceback.StackSummary) -> str:
    for frame in reversed(frames):
        if is_users(frame.filename):
            return f" at {os.path.basename(frame.filename)}:{frame.lineno}" + (f" ({frame.line})" if frame.line else "")
    return ""
