"""Torch's kernels of attention that return the log-sum-exp of each query's scores, so that results of parts can be added up.

    forward     q, k, v                          -> out, log-sum-exp          of these keys
    backward    grad, q, k, v, out, log-sum-exp  -> gradients of q, k, v      with these keys, if the last two are of all keys

That the second line is so is nowhere promised, nor are these operators public: before one is called for the first time on some kind of
tensors, it computes a small attention of two parts, forward and backward, and is not used where that is not what the formulas say.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend

from meshpar._torch import chosen_attention

_aten = torch.ops.aten


@dataclass(frozen=True)
class FusedAttention:
    """What computes attention of queries `[b, h, s, e]`, keys `[b, k, t, e]` and values `[b, k, t, f]`, with nothing added to scores."""

    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    """Queries, keys, values, whether the query at i sees the keys up to i alone, the scale: `[b, h, s, f]` and `[b, h, s]`."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]]
    """What the result is asked for, queries, keys, values, results and log-sum-exp of all keys, and as above: three gradients."""


def fused_attention_for(query: Tensor, key: Tensor, value: Tensor) -> FusedAttention | None:
    """The one that torch would choose for these, if it returns what is needed and computes what it should."""
    name = _chosen(query, key, value)
    kind = (query.device.type, query.dtype, query.shape[1] // key.shape[1], query.shape[3], value.shape[3])
    rounding = 2.0**-10 if query.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else None
    return _KERNELS[name] if name is not None and _proved(name, *kind, rounding) else None


def in_rows(x: Tensor) -> Tensor:
    """With the last dim in one stretch: kernels read results and gradients in rows, of any other strides, too, and say nothing."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _chosen(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    grouped = query.shape[1] != key.shape[1]
    if query.device.type == "cpu":
        choice = chosen_attention(query, key, value, None, 0.0, False, enable_gqa=grouped)
        return "flash, cpu" if choice == SDPBackend.FLASH_ATTENTION.value else None
    if query.device.type == "cuda":
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        able = cuda.SDPAParams(q, k, v, None, 0.0, False, grouped)
        if cuda.flash_sdp_enabled() and query.shape[3] % 8 == 0 and cuda.can_use_flash_attention(able):
            return "flash"
        if cuda.mem_efficient_sdp_enabled() and cuda.can_use_efficient_attention(able):
            return "efficient"
    return None


@lru_cache(maxsize=256)
def _proved(name: str, device: str, dtype: torch.dtype, group: int, width: int, value_width: int, rounding: float | None) -> bool:
    """Whether a kernel computes a small attention of two parts, forward and backward, as it is written out in float64.

    `rounding`: of a product, if it is more than that of the dtype.
    """
    with torch.no_grad():
        numbers = torch.Generator("cpu").manual_seed(0)
        shapes = ((2 * group, 48, width), (2, 96, width), (2, 96, value_width), (2 * group, 48, value_width))
        q, k, v, grad = (torch.randn(1, *shape, dtype=torch.float64, generator=numbers, device="cpu") for shape in shapes)
        try:
            found = [x.to("cpu", torch.float64) for x in _of_two_parts(_KERNELS[name], *(x.to(device, dtype) for x in (q, k, v, grad)))]
        except RuntimeError as error:
            warnings.warn(f"attention in tiles: torch's kernel ({name}) cannot be called for {dtype} on {device}: {error}", stacklevel=2)
            return False
        bound = rounding or torch.finfo(dtype).eps * (4 if dtype.itemsize == 2 else 32)  # narrow ones are added up in float32
        wanted = _written_out(*(x.to(dtype).double() for x in (q, k, v, grad)))
        right = all(float((x - y).abs().max()) <= bound * float(y.abs().max()) for x, y in zip(found, wanted, strict=True))
    if not right:
        warnings.warn(f"attention in tiles: torch's kernel ({name}) is not exact for {dtype} on {device}", stacklevel=2)
    return right


def _of_two_parts(kernel: FusedAttention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Results, log-sum-exp and gradients of causal attention with the last half of the keys, and of any with the first."""
    half, scale = k.shape[2] // 2, q.shape[3] ** -0.5
    parts = [(k[:, :, :half], v[:, :, :half], False), (k[:, :, half:], v[:, :, half:], True)]
    met = [kernel.forward(q, *part, scale) for part in parts]
    norm = torch.logaddexp(met[0][1], met[1][1])
    out = sum((x.to(norm.dtype) * (own - norm).exp()[..., None] for x, own in met), torch.zeros_like(norm)[..., None]).to(q.dtype)
    (q1, k1, v1), (q2, k2, v2) = (kernel.backward(grad, q, k, v, out, norm, causal, scale) for k, v, causal in parts)
    return [out, norm, q1 + q2, torch.cat([k1, k2], 2), torch.cat([v1, v2], 2)]


def _written_out(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """The same by the formulas."""
    group, late, scale = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2], q.shape[3] ** -0.5
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ keys.transpose(-1, -2) * scale
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(late + 1), -torch.inf)
    weights, norm = scores.softmax(-1), scores.logsumexp(-1)
    out = weights @ values
    of_scores = weights * (grad @ values.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
    of_key, of_value = (x.unflatten(1, (-1, group)).sum(2) for x in (of_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad))
    return [out, norm, of_scores @ keys, of_key, of_value]


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, norm = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, norm


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, norm, 0.0, causal, scale=scale)
    return found[0], found[1], found[2]


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, norm, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, norm


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.zeros(2, dtype=torch.uint64, device=q.device)  # where dropout stood: there is none
    lengths = (None, None, q.shape[2], k.shape[2])
    found = _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, norm, *lengths, 0.0, causal, drawn, drawn[:0], scale=scale
    )
    return found[0], found[1], found[2]


_ALIGNED = 32
"""The rows of log-sum-exp that this kernel writes and reads are a multiple of so many; those beyond are infinite."""


def _efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, norm, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, norm[..., : q.shape[2]]


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = norm.new_full((*norm.shape[:2], -(-norm.shape[2] // _ALIGNED) * _ALIGNED), torch.inf)
    rows[..., : norm.shape[2]] = norm
    drawn = torch.zeros((), dtype=torch.long, device=q.device)
    found = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, rows, drawn, drawn, 0.0, [True, True, True, False], causal, scale=scale
    )
    return found[0], found[1], found[2]


_KERNELS = {
    "flash, cpu": FusedAttention(_cpu, _cpu_backward),
    "flash": FusedAttention(_flash, _flash_backward),
    "efficient": FusedAttention(_efficient, _efficient_backward),
}
