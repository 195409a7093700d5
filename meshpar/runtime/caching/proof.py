"""Whether a model says the same with a cache as without, by running its own forward on drawn values, both ways, in float64.

    all positions at once                       a b c d e f   ──> logits of d, e, f      ──┐
    a b c, then d, e, f one after the other                                                ├── equal, or no cache, with the reason
    with keys and values of those before, more masked positions on the left  ──> logits    ──┘

One sample is padded on the left. Parameters are windows on few drawn numbers, so that large models need little memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from meshpar._torch import pytree, without_modes
from meshpar.capture import fake
from meshpar.capture.padding.proof import TOLERANCE, running
from meshpar.runtime.caching.keys import cache_name, keys_and_values

MOST = 1 << 30
"""Parameters at most."""
_PROMPT, _NEW, _ROOM = 4, 2, 9
"""Positions of the prompt, of what comes after it, and those that a decoding forward attends to."""
_STEP = 7
"""How far the window of a row is from that of the row before."""


def why_not(model: nn.Module, *, trusted: bool = False) -> str | None:
    """Why `model` cannot generate with a cache of keys and values; None where that is proved. `trusted`: the user's word is enough."""
    known = inspect.signature(type(model).forward).parameters
    name = cache_name(model)
    if name is None:
        return "its forward takes no cache"
    if "attention_mask" not in known:
        return "its forward takes no attention_mask, which would tell the positions of a cache that are none"
    if "cache_position" in known:
        return "its forward is told places in the cache (cache_position), as in transformers before 5.24"
    if trusted:
        return None
    size = sum(p.numel() for p in model.parameters())
    if size > MOST:
        return (
            f"it has {size:,} parameters, and whether a cache is exact is tried with {MOST:,} at most; use_cache=True takes your word "
            "that it is, as it is for a model whose own generate has left-padded batches and a cache right"
        )
    try:
        return _differs(model, name, takes_positions="position_ids" in known)
    except Exception as error:  # whatever it is: nothing is known then
        said = str(error).strip().partition("\n")[0][:200]
        return f"its forward does not run with keys and values alone: {type(error).__name__}: {said}"


def _differs(model: nn.Module, name: str, *, takes_positions: bool) -> str | None:
    total = _PROMPT + _NEW
    ids = torch.arange(3, 3 + 2 * total).view(2, total) % _vocabulary(model)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0

    def batch(begin: int, end: int, room: int) -> dict[str, Tensor]:
        found = {"input_ids": ids[:, begin:end], "attention_mask": pad(mask[:, :end], (room - end, 0))}
        return found | ({"position_ids": positions_of(mask)[:, begin:end]} if takes_positions else {})

    with without_modes(), torch.no_grad(), _drawn(model), running():
        wanted = model(**batch(0, total, total), use_cache=False).logits
        out = model(**batch(0, _PROMPT, _PROMPT), use_cache=True, **{name: keys_and_values()(())})
        found, kept = [out.logits[:, -1]], pytree.tree_leaves(out[name])
        for at in range(_PROMPT, total):
            if any(x is not None and (x.dim() != 4 or x.shape[0] != 2 or x.shape[2] != at) for x in kept):
                return "what its layers keep is not [samples, heads, positions, width] of all positions"
            before, spec = pytree.tree_flatten(out[name])
            del before
            room = [x if x is None else pad(x, (0, 0, _ROOM - 1 - at, 0)) for x in kept]
            out = model(**batch(at, at + 1, _ROOM), use_cache=True, **{name: pytree.tree_unflatten(room, spec)})
            found.append(out.logits[:, -1])
            kept = [x if x is None else torch.cat([x, new], 2) for x, new in zip(kept, pytree.tree_leaves(out[name]), strict=True)]
    off = max(float((a - wanted[:, _PROMPT - 1 + i]).abs().max()) for i, a in enumerate(found))
    if not kept:
        return "it keeps no keys and values"
    if not off <= TOLERANCE * float(wanted.abs().max()):
        return f"with a cache its logits are others: tried in float64 on drawn values, they differ by {off:.1e}"
    return None


def positions_of(mask: Tensor) -> Tensor:
    """The position of each token among those that are not masked."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


@contextmanager
def _drawn(model: nn.Module) -> Iterator[None]:
    """Inside, `model` holds drawn parameters, and copies of its buffers."""
    generator = torch.Generator().manual_seed(0)

    def stand_in(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            if tensor.is_meta:
                raise ValueError("a buffer of the model has no values (it was built on the meta device)")
            return tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.detach().cpu().clone()
        return nn.Parameter(_windows(tensor.shape, generator), requires_grad=False)

    with fake.replaced(model, stand_in):
        yield


def _windows(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A tensor of drawn numbers, each row of which begins a few numbers after the row before."""
    if len(shape) < 2:
        return 0.5 + 0.1 * torch.randn(shape, generator=generator, dtype=torch.double)
    rows, width = shape[:-1].numel(), shape[-1]
    numbers = torch.randn(_STEP * rows + width, generator=generator, dtype=torch.double) / width**0.5
    strides = [_STEP * shape[d + 1 : -1].numel() for d in range(len(shape) - 1)]
    return numbers.as_strided(shape, (*strides, 1))
