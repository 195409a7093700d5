"""A module's double on the CPU: the same code and attributes, random parameters; and the proof that two ways to compute agree."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from meshpar._torch import untraced
from meshpar.capture.state.places import PLAIN

T = TypeVar("T")

LARGE = 1 << 20
"""Tensors with more elements than this are zeros but for some random elements, and take no gradient in a proof: they cost little."""
_HUGE = 1 << 27
"""Tensors with more elements than this repeat a few random values instead: not even their zeros can be addressed."""


def aside(function: Callable[[], T]) -> T:
    """`function()` in a thread of its own: what runs there knows nothing of an export that is under way."""
    with untraced(), ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def stand_in(
    module: nn.Module,
    generator: torch.Generator,
    *,
    dtype: torch.dtype | None = None,
    instead: Mapping[int, nn.Module] | None = None,
    without: Sequence[str] = (),
    sizes: Mapping[int, int] | None = None,
    hollow: bool = False,
    thin: bool = False,
    dropping: Callable[[nn.Module, float, Tensor], Tensor] | None = None,
) -> nn.Module:
    """A copy of `module` with random tensors and without hooks: floating ones in `dtype` (None: their own).

    `instead`: id of a submodule -> its replacement. `without`: attributes of instances to leave out. `sizes`: numbers to replace by others,
    in shapes and attributes. `hollow`: large tensors are zeros in no memory. `thin`: a large nn.Linear computes another linear function, a
    cheap one. `dropping`: called with every nn.Dropout that would drop, its probability and what it is called with, in place of its
    forward; by default they drop nothing.
    """
    made: dict[int, Any] = {}
    tensors: dict[int, Tensor] = {}

    def tensor_like(tensor: Tensor, name: str) -> Tensor:
        if id(tensor) not in tensors:
            tensors[id(tensor)] = filled(resized(tensor, sizes) if sizes else tensor, generator, dtype, hollow=hollow)
        return tensors[id(tensor)]

    def thinned(new: nn.Linear, weight: Tensor) -> None:
        kind = (dtype or weight.dtype) if weight.is_floating_point() else weight.dtype
        cheap = _repeating(tuple(weight.shape), generator, weight.shape[1] ** -0.5, kind)  # whoever reads it finds no zeros
        new._parameters["weight"] = nn.Parameter(cheap, requires_grad=False)
        new.__dict__["forward"] = _Thin(new.in_features, new.out_features, generator)

    def copy(module: nn.Module) -> nn.Module:
        if instead and id(module) in instead:
            return instead[id(module)]
        if id(module) in made:
            return made[id(module)]
        new = made[id(module)] = module.__class__.__new__(module.__class__)
        new.__dict__.update({key: value for key, value in module.__dict__.items() if key not in without})
        new.__dict__.update({key: OrderedDict() for key in _HOOKS})
        for key, value in new.__dict__.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                new.__dict__[key] = tensor_like(value, key)
        if sizes:
            new.__dict__.update({key: _renumbered(value, sizes) for key, value in new.__dict__.items() if key not in _TABLES})
        large = module.weight if thin and type(module) is nn.Linear and module.weight.numel() > LARGE else None
        kept = {k: p for k, p in module._parameters.items() if p is None or p is not large}
        new.__dict__["_parameters"] = {k: None if p is None else tensor_like(p, k) for k, p in kept.items()}
        new.__dict__["_buffers"] = {k: None if b is None else tensor_like(b, k) for k, b in module._buffers.items()}
        new.__dict__["_modules"] = {k: None if m is None else copy(m) for k, m in module._modules.items()}
        if isinstance(new, nn.Dropout):
            if dropping is not None and new.training and new.p > 0:
                new.__dict__["forward"] = partial(dropping, new, new.p)
            new.__dict__["p"] = 0.0
        if isinstance(new, nn.Linear) and large is not None:
            thinned(new, large)
        return new

    return copy(module)


_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""What others attached to a module, to see what it does: they are not to see its copy."""


def settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module and of those below it, by their names: a forward that sets them keeps state."""
    named = ((path, name, value) for path, part in module.named_modules() for name, value in part.__dict__.items())
    return {f"{path}.{name}".lstrip("."): value for path, name, value in named if isinstance(value, PLAIN)}


def hooked(module: nn.Module) -> bool:
    """Whether somebody attached to a module what may change its results."""
    return any(getattr(module, key) for key in _HOOKS)


class _Thin:
    """A linear function that costs little: every feature of the result is a multiple of one of the input, and a shift."""

    def __init__(self, given: int, made: int, generator: torch.Generator) -> None:
        self.pick = torch.randint(given, (made,), generator=generator)
        self.scale, self.shift = (torch.randn(made, generator=generator) for _ in range(2))

    def __call__(self, input: Tensor) -> Tensor:
        return input[..., self.pick] * self.scale.to(input.dtype) + self.shift.to(input.dtype)


def reduced(tensors: Iterable[Tensor], width: int, *, kept: Sequence[int] = ()) -> dict[int, int]:
    """Small sizes in place of the large ones of tensors and of `width`: multiples stay multiples; those `kept` stay."""
    small: dict[int, int] = {}
    fresh = iter(_SMALL)
    for n in sorted({width, *(n for tensor in tensors for n in tensor.shape)} - {*kept}):
        if n <= _WIDE:
            continue
        divisor = next((m for m in sorted(small, reverse=True) if n % m == 0 and n // m <= 8), None)
        found = next(fresh, n) if divisor is None else small[divisor] * (n // divisor)
        while found in small.values():
            found = next(fresh, n)
        small[n] = found
    return small if all(a > b for a, b in small.items()) else {}


_WIDE = 128
"""Sizes up to this are left as they are."""
_SMALL = (12, 20, 28, 36, 60, 84, 100, 108)
"""Sizes to put in place of others; only small primes divide them."""


def resized(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """A tensor without values, of the same class and kind in other sizes."""
    made = torch.empty([sizes.get(n, n) for n in tensor.shape], dtype=tensor.dtype, device="meta")
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _renumbered(value: Any, sizes: Mapping[int, int]) -> Any:
    if type(value) is int:
        return sizes.get(value, value)
    if type(value) in (tuple, list, torch.Size):
        return type(value)(_renumbered(item, sizes) for item in value)
    return value


def blank(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros; in no memory when they are many."""
    if prod(shape) > LARGE:
        return torch.zeros((), dtype=dtype).expand(*shape)
    return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype).zero_()


def filled(tensor: Tensor, generator: torch.Generator, dtype: torch.dtype | None = None, *, hollow: bool = False) -> Tensor:
    """A random tensor of the same shape and class, on the CPU. `hollow`: zeros in no memory, if it is large."""
    kind = (dtype or tensor.dtype) if tensor.is_floating_point() else tensor.dtype
    if not kind.is_floating_point:
        return torch.ones(tensor.shape, dtype=kind) if kind == torch.bool else torch.zeros(tensor.shape, dtype=kind)
    scale = (tensor.shape[-1] if tensor.dim() > 1 else 4) ** -0.5
    if tensor.numel() <= LARGE:
        made = (torch.randn(tensor.shape, generator=generator, dtype=torch.double) * scale).to(kind)
    elif hollow:
        made = blank(tensor.shape, (), kind)
    elif tensor.numel() <= _HUGE:
        made = _untouched(tuple(tensor.shape), kind)
        where = _spread(tensor.numel(), tensor.shape[-1])
        made.view(-1)[where] = torch.randn(where.shape, generator=generator).to(kind)
    else:
        made = _repeating(tuple(tensor.shape), generator, scale, kind)
    return nn.Parameter(made, requires_grad=tensor.requires_grad and tensor.numel() <= LARGE) if isinstance(tensor, nn.Parameter) else made


_RUNS, _RUN = 1 << 11, 8
"""Random elements of a large tensor: so many runs of so many neighbours. A run takes a page or two."""


def _spread(count: int, columns: int) -> Tensor:
    """Where the random elements of a tensor lie: runs at equal distances of rows, each next to the columns of the one before."""
    run = torch.arange(_RUNS)
    starts = run * (count // columns) // _RUNS * columns + run * _RUN % max(columns - _RUN + 1, 1)
    return (starts.clamp(max=count - _RUN)[:, None] + torch.arange(_RUN)).flatten()


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only around what is written to them, in the smallest pages there are."""
    pages = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _repeating(shape: tuple[int, ...], generator: torch.Generator, scale: float, dtype: torch.dtype) -> Tensor:
    """A tensor whose elements share memory: element (i, j, k) is value a*i + b*j + k of a short random row."""
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * 2 + 1
    length = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    return (torch.randn(length, generator=generator) * scale).to(dtype).as_strided(shape, strides)


def alike(a: Any, b: Any, *, depth: int = 0) -> bool:
    """Whether two modules compute the same function of their tensors, as far as their attributes tell."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and (a.shape, a.dtype, a.requires_grad, type(a)) == (b.shape, b.dtype, b.requires_grad, type(b))
        )
    if type(a) is not type(b) or depth > 8:
        return False
    if isinstance(a, nn.Module):
        skipped = ("forward",)
        keys = [key for key in a.__dict__ if key not in skipped]
        return keys == [key for key in b.__dict__ if key not in skipped] and all(
            alike(a.__dict__[key], b.__dict__[key], depth=depth + 1) for key in keys
        )
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(alike(a[key], b[key], depth=depth + 1) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(alike(x, y, depth=depth + 1) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool | int | float | str | bytes | None | set | frozenset | torch.dtype | torch.device):
        return bool(a == b)
    return a is b or _same_code(a, b)


def _same_code(a: Any, b: Any) -> bool:
    code = getattr(a, "__code__", None)
    if code is not None and code is getattr(b, "__code__", None):
        cells = [[cell.cell_contents for cell in (f.__closure__ or ())] for f in (a, b)]
        return all(x is y or (isinstance(x, int | float | str) and x == y) for x, y in zip(*cells, strict=True))
    return False


def close(ours: Iterable[Tensor | None], theirs: Iterable[Tensor | None], tolerance: float) -> bool:
    """Whether tensors agree, each within `tolerance` of its largest element."""
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            if not all(t is None or not bool(t.any()) for t in (a, b)):
                return False
        elif a.shape != b.shape or a.dtype != b.dtype:
            return False
        elif a.is_floating_point():
            if (
                not bool(torch.isfinite(b).all()) or (a - b).abs().max().item() > tolerance * (b.abs().max().item() + 1e-30)
                if a.numel()
                else False
            ):
                return False
        elif not torch.equal(a, b):
            return False
    return True


def derivatives(results: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor | None]:
    """The derivatives of one number that depends on every element of every floating result, each with another weight."""
    parts = [r for r in results if r.is_floating_point() and r.requires_grad]
    if not parts:
        return [None] * len(of)
    weights = [torch.linspace(0.5, 1.5, prod(p.shape), dtype=p.dtype).view(p.shape) for p in parts]
    total = torch.stack([(p * w).sum() for p, w in zip(parts, weights, strict=True)]).sum()
    return list(torch.autograd.grad(total, list(of), allow_unused=True))
