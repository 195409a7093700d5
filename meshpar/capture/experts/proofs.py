"""Learning a lifted forward: whatever goes wrong becomes a reason, and what is wide is proven at small sizes where that proves as much."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from meshpar.capture.experts.body import Body, BodyStep, ForEach, NotLifted, Rows
from meshpar.capture.stand_in import aside

T = TypeVar("T")


def attempt(learn: Callable[[], T], runs: str) -> T | NotLifted:
    """What `learn` finds, or why it finds nothing; `runs`: what it needs the user's code to do, in words that say that it does not.

    It runs apart from the export that is under way, and leaves the state of the random numbers as it was.
    """

    def apart() -> T | NotLifted:
        with torch.random.fork_rng(devices=[]):
            return reasoned(learn, f"{runs} by itself")

    return aside(apart)


def reasoned(learn: Callable[[], T], runs: str) -> T | NotLifted:
    """`attempt`, here and now."""
    try:
        return learn()
    except NotLifted as error:
        return error
    except Exception as error:  # the user's code may raise anything, on inputs that it was not made for
        first = next(iter(str(error).splitlines()), "")[:160]
        return NotLifted(f"{runs} ({type(error).__name__}: {first})")


def proven(recorded: Callable[[Mapping[int, int]], Body], prove: Callable[[Mapping[int, int]], None], sizes: Mapping[int, int]) -> Body:
    """`recorded({})`, proven: at the small `sizes`, if what is recorded there is the same body, else (and that is slow) at its own.

    Both functions take numbers and what to put in their place. Raises NotLifted.
    """
    body = recorded({})
    small = sizes if sizes and _same_at(sizes, body, recorded) else {}
    try:
        prove(small)
    except NotLifted:
        raise
    except Exception:  # whatever it is, the code does not run at other sizes
        if not small:
            raise
        prove({})
    return body


def _same_at(sizes: Mapping[int, int], body: Body, recorded: Callable[[Mapping[int, int]], Body]) -> bool:
    try:
        return same_steps(body, recorded(sizes), sizes)
    except Exception:  # whatever it is, the code does not run at other sizes
        return False


def same_steps(body: Body, other: Body, sizes: Mapping[int, int]) -> bool:
    """Whether two bodies are one at different sizes: the same steps, their numbers equal or in the ratio of a size to the other's."""
    return (
        (body.operands, body.rows, body.result, body.narrows) == (other.operands, other.rows, other.result, other.narrows)
        and len(body.steps) == len(other.steps)
        and all(_same(a, b, sizes) for a, b in zip(body.steps, other.steps, strict=True))
    )


def _same(a: Any, b: Any, sizes: Mapping[int, int]) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, BodyStep | ForEach | Rows):
        return all(_same(getattr(a, field.name), getattr(b, field.name), sizes) for field in fields(a))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y, sizes) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_same(a[key], b[key], sizes) for key in a)
    if isinstance(a, Tensor):
        return False
    return bool(a == b) or (type(a) is int and any(a * small == b * large for large, small in sizes.items()))
