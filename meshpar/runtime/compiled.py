"""torch.compile for the code of blocks: each structure once, and errors in words.

Every program is made for its sizes, so sizes are taken as they are (`dynamic=False`), unless the options say otherwise. Compiled code is
kept by torch per code object and given up after a few variants of one, so each function gets a code object of its own: recompute wraps all
blocks in one and the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from types import FunctionType
from typing import Any

import torch
from torch import fx

from meshpar._torch import compile_errors
from meshpar.errors import ConfigError
from meshpar.ops.expert_all_to_all import return_rows, send_rows
from meshpar.ops.expert_pieces import through_experts

Code = Callable[..., Any]


def compiled(code: Code, options: Mapping[str, Any], name: str) -> Code:
    """`code` of the block `name` as torch.compile makes it, at its first call, with `options` (its keyword arguments).

    Raises ConfigError, from that call, where it cannot be compiled.
    """
    assert isinstance(code, FunctionType)
    made = torch.compile(_own(code), **{"dynamic": False, **options})

    @wraps(code)
    def run(*args: Any) -> Any:
        try:
            return made(*args)
        except compile_errors() as error:
            raise ConfigError(
                f"compile={dict(options) or True!r}: torch.compile could not compile the code of block {name}:\n"
                f"  {_reason(error)}\n"
                '  Without compile= blocks run as they are. compile={"backend": "aot_eager"} leaves out the code generator, which on CPUs '
                "needs a C++ compiler; pm.print_readable() shows the code."
            ) from error

    return run


def as_it_is(graph: fx.Graph) -> bool:
    """Whether a block's code is left alone: sizes that only values tell (an exchange of tokens) break it into pieces."""
    return any(node.target in (send_rows, return_rows, through_experts) for node in graph.nodes)


def _own(code: FunctionType) -> FunctionType:
    """The same function with a code object that no other has."""
    return FunctionType(code.__code__.replace(), code.__globals__, code.__name__, code.__defaults__, code.__closure__)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
