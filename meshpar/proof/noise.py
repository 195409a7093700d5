"""The same numbers wherever a model draws random ones, in eager code and in capture alike, on every mesh.

Two programs that draw their own random numbers differ by them. Dropout is switched off; what else a forward draws (stochastic depth, noise
that is added, samples of a distribution) is replaced by numbers that depend only on the place of an element in the tensor that is drawn:

    u[i, j, ...] = frac(1/2 + i a_0 + j a_1 + ...)      with irrational a_d: evenly spread over (0, 1), another value for every neighbour

In a captured graph that is arithmetic on positions, which any mesh computes exactly. A step of several microbatches is captured at the
shape of one, so along a dim that may hold samples positions are counted within the samples of one rank's microbatch (`period`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from meshpar._torch import OpOverload, run_backward
from meshpar.capture.blame import here

STEPS = tuple(x**0.5 % 1 for x in (2, 3, 5, 7, 11, 13, 17, 19))
"""The irrational a_d."""
EDGE = 1e-3
"""How far the numbers stay from 0 and 1, whose logarithms are infinite."""


class Drawn(TorchFunctionMode):
    """Inside, what a model draws is as above. `lines` are the source lines that drew, dropout apart."""

    def __init__(self, period: int | None = None) -> None:
        super().__init__()
        self.period = period
        self.lines: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if type(func) is OpOverload:  # (whose hash is a call)
            return func(*args, **kwargs)
        if func in BACKWARDS:
            with self:
                return BACKWARDS[func](*args, **kwargs)
        if func in _SWITCHED_OFF:
            return _SWITCHED_OFF[func](func, args, kwargs)
        draw = _DRAWS.get(func)
        if draw is None:
            return func(*args, **kwargs)
        self.lines[here().removeprefix(" at ")] = None
        return draw(self, *args, **{k: v for k, v in kwargs.items() if k != "generator"})

    def uniform(self, shape: Sequence[int], like: Tensor | None = None, **options: Any) -> Tensor:
        """Numbers in (0, 1) of a shape; dtype and device are those of `like`, or in `options`."""
        device = options.get("device") or (like.device if like is not None else None)
        dtype = options.get("dtype") or (like.dtype if like is not None and like.is_floating_point() else torch.get_default_dtype())
        total = torch.full([1] * len(shape), 0.5, dtype=torch.float64, device=device)
        for d, n in enumerate(shape):
            place = torch.arange(n, device=device)
            if self.period is not None and n % self.period == 0:
                place = place % self.period
            step = place.to(torch.float64) * STEPS[d % len(STEPS)]
            total = total + step.reshape([n if e == d else 1 for e in range(len(shape))])
        return ((total - total.floor()) * (1 - 2 * EDGE) + EDGE).expand(list(shape)).to(dtype).clone()


def _backward(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    run_backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


BACKWARDS: dict[Any, Callable[..., None]] = {Tensor.backward: _backward, torch.autograd.backward: run_backward}
"""What calls the forward again, where that is checkpointed -> the same past the mode that is asked, so that the mode stays on."""


# ---- what is drawn ---------------------------------------------------------------------------------------------------------------------


def _shape(sizes: tuple[Any, ...], options: dict[str, Any]) -> tuple[int, ...]:
    given = options.pop("size", None) if not sizes else sizes[0] if isinstance(sizes[0], tuple | list) else sizes
    return tuple(given)


def _rand(self: Drawn, *sizes: Any, **options: Any) -> Tensor:
    return _required(self.uniform(_shape(sizes, options), **options), options)


def _randn(self: Drawn, *sizes: Any, **options: Any) -> Tensor:
    return _required(_normal(self.uniform(_shape(sizes, options), **options)), options)


def _required(made: Tensor, options: dict[str, Any]) -> Tensor:
    return made.requires_grad_() if options.get("requires_grad") else made


def _normal(u: Tensor) -> Tensor:
    return torch.erfinv(2 * u - 1) * 2**0.5


def _randint(self: Drawn, *given: Any, **options: Any) -> Tensor:
    count = len(given) + sum(name in options for name in ("low", "high", "size"))
    found: dict[str, Any] = dict(zip(("low", "high", "size") if count > 2 else ("high", "size"), given, strict=False))
    found |= {name: options.pop(name) for name in ("low", "high", "size") if name in options}
    low = found.get("low", 0)
    u = self.uniform(tuple(found["size"]), device=options.get("device"))
    return (low + (u * (found["high"] - low)).floor()).to(options.get("dtype") or torch.int64)


def _randint_like(self: Drawn, x: Tensor, low: int, high: int | None = None, **options: Any) -> Tensor:
    low, high = (0, low) if high is None else (low, high)
    return (low + (self.uniform(x.shape, device=x.device) * (high - low)).floor()).to(options.get("dtype") or x.dtype)


def _randperm(self: Drawn, n: int, **options: Any) -> Tensor:
    found = torch.arange(n, device=options.get("device"), dtype=options.get("dtype") or torch.int64)
    return found if self.period is not None else found.flip(0)


def _bernoulli(self: Drawn, x: Tensor, p: float | None = None, **_: Any) -> Tensor:
    return (self.uniform(x.shape, x) < (x if p is None else p)).to(x.dtype)


def _bernoulli_(self: Drawn, x: Tensor, p: Any = 0.5, **_: Any) -> Tensor:
    return x.copy_(self.uniform(x.shape, x) < p)


def _uniform_(self: Drawn, x: Tensor, low: float = 0.0, high: float = 1.0, **named: Any) -> Tensor:
    low, high = named.get("from", low), named.get("to", high)
    return x.copy_(self.uniform(x.shape, x) * (high - low) + low)


def _normal_(self: Drawn, x: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return x.copy_(_normal(self.uniform(x.shape, x)) * std + mean)


def _exponential_(self: Drawn, x: Tensor, lambd: float = 1.0, **_: Any) -> Tensor:
    return x.copy_(-self.uniform(x.shape, x).log() / lambd)


def _normal_of(self: Drawn, mean: Any, std: Any = 1.0, size: Any = None, **options: Any) -> Tensor:
    shape = torch.broadcast_shapes(*(v.shape for v in (mean, std) if isinstance(v, Tensor))) if size is None else tuple(size)
    like = next((v for v in (mean, std) if isinstance(v, Tensor)), None)
    return _normal(self.uniform(shape, like, **options)) * std + mean


def _multinomial(self: Drawn, weights: Tensor, num_samples: int, replacement: bool = False, **_: Any) -> Tensor:
    likely = weights.topk(1 if replacement else num_samples, -1).indices
    return likely.expand(*weights.shape[:-1], num_samples).clone()


def _gumbel_softmax(self: Drawn, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
    noise = -(-self.uniform(logits.shape, logits).log()).log()
    soft = ((logits + noise) / tau).softmax(dim)
    if not hard:
        return soft
    chosen = torch.zeros_like(logits).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
    return chosen - soft.detach() + soft


_DRAWS: dict[Any, Callable[..., Tensor]] = {
    torch.rand: _rand,
    torch.randn: _randn,
    torch.rand_like: lambda self, x, **o: self.uniform(x.shape, x, **o),
    torch.randn_like: lambda self, x, **o: _normal(self.uniform(x.shape, x, **o)),
    torch.randint: _randint,
    torch.randint_like: _randint_like,
    torch.randperm: _randperm,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_,
    Tensor.uniform_: _uniform_,
    Tensor.normal_: _normal_,
    Tensor.exponential_: _exponential_,
    torch.normal: _normal_of,
    torch.multinomial: _multinomial,
    Tensor.multinomial: _multinomial,
    F.gumbel_softmax: _gumbel_softmax,
}


# ---- what is switched off --------------------------------------------------------------------------------------------------------------


def _not_training(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Called as in evaluation, where it drops nothing."""
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.arguments["training"] = False
    return func(*bound.args, **bound.kwargs)


def _not_train(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same for operators (input, p, train)."""
    return func(*args[:2], False) if len(args) > 2 else func(*args, **{**kwargs, "train": False})


def _without_dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Attention (query, key, value, attn_mask, dropout_p, ...)."""
    return func(*args[:4], 0.0, *args[5:], **kwargs) if len(args) > 4 else func(*args, **{**kwargs, "dropout_p": 0.0})


_SWITCHED_OFF: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), _not_training),
    **dict.fromkeys((F.rrelu, F.multi_head_attention_forward), _not_training),
    **dict.fromkeys((torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout), _not_train),
    F.scaled_dot_product_attention: _without_dropout,
}
