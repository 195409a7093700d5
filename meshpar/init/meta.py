"""Models too big to build: parameters that are described first and computed, or read, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from meshpar._torch import LocalTensor, maybe_disable_local_tensor_mode
from meshpar.errors import CheckpointError, MeshparError, raise_all
from meshpar.init.fit import Weights
from meshpar.init.record import mark_of, recording, ref_of
from meshpar.init.same import difference
from meshpar.init.tape import Replay, Tape, TapedView
from meshpar.init.weights import Files, Lazy, Matched, Ranges, say
from meshpar.waiting import each

PlaceTensor = Callable[[str, torch.Tensor | Lazy], None]
WeightsFrom = str | PathLike[str] | Weights


@dataclass(frozen=True)
class Share:
    """What this rank holds of a model, for what is asked of a file: the part of each of its parameters, and the names on any rank.

    `spread`: complaints of this rank -> those of all ranks, so that all fail together (collective).
    """

    part: Callable[[str], Ranges] = lambda name: ()
    names: Sequence[str] | None = None
    spread: Callable[[list[str]], list[str]] = lambda complaints: complaints


@contextmanager
def meta() -> Iterator[None]:
    """Build a model without memory for its parameters: they are on `meta`, and remember how they are to be filled.

    What the constructor does to parameters is recorded, and done later, tensor by tensor, with the very values that building the model
    on the CPU would have given. Buffers and other tensors are computed at once. Build the whole model inside one block.

    >>> torch.manual_seed(0)  # doctest: +SKIP
    >>> with meta():
    ...     model = nn.Linear(8, 4)
    >>> model.weight.device
    device(type='meta')
    """
    with maybe_disable_local_tensor_mode(), recording():  # simulated ranks build one model
        yield


def materialise(
    model: nn.Module,
    names: Sequence[str],
    place: PlaceTensor,
    *,
    seed: int | None = None,
    weights: WeightsFrom | None = None,
    dtype: torch.dtype | None = None,
    share: Share | None = None,
) -> dict[str, torch.Tensor]:
    """Hand the value of every parameter in `names` to `place(name, value)`, one at a time and in any order; returns all buffers, by name.

    `names`: canonical names, as in `model.named_parameters()`. `value` is a full tensor on the CPU or, with `weights`, a `Lazy` that reads
    the parts it is asked for; `read(value, ranges)` treats both alike. The model is not changed.

    With `weights` (a safetensors file, its index, or a directory that holds either, or `Weights` of one) values come from there; where a
    file has several names of one tensor, they must hold the same values in the part that any rank reads (`share`). Without, from the
    record of `meta()`, or, for a model built under `torch.device("meta")`, from its own `reset_parameters` and `init_weights` or
    `_init_weights`. Parameters that have memory are handed on as they are.

    `seed`: as if `torch.manual_seed(seed)` had been called before the model was built; None: the state the generator then had.
    `dtype`: what floating values are cast to; without it the dtypes in the file must be those of the model.

    Raises `CheckpointError` for weights that do not fit the model, `MeshparError` for parameters or buffers that nothing initialises.
    """
    _one_for_all_ranks(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    found: dict[str, torch.Tensor] = {name: buffer for name, buffer in buffers.items() if not buffer.is_meta}
    if weights is None:
        wanted: dict[str, torch.Tensor] = {name: parameters[name] for name in names}
    else:
        asked, share = weights if isinstance(weights, Weights) else Weights(weights), share or Share()
        matched = Files.open(asked.path).match(model, names if share.names is None else share.names, asked, dtype=dtype)
        _check_twins(matched, names, share)
        say(matched.notes)
        found |= {name: matched.lazy[name].read().to(buffers[name].dtype) for name in matched.buffers}
        for name in each([name for name in names if name in matched.lazy]):
            place(name, matched.lazy[name])
        wanted = {name: parameters[name] for name in names if name not in matched.lazy}
    wanted |= {name: buffer for name, buffer in buffers.items() if name not in found}

    for name, value in each(_once(_initialised(model, wanted, seed)), len(wanted)):
        if name in parameters:
            place(name, value if dtype is None or not value.is_floating_point() else value.to(dtype))
        else:
            found[name] = value
    return {name: found[name] for name in buffers}


def _check_twins(matched: Matched, names: Sequence[str], share: Share) -> None:
    """Names of one tensor must hold the same values: this rank looks where it reads, and all ranks learn what any of them has found."""
    if not matched.twins:
        return
    own, complaints = set(names), list[str]()
    for name, pairs in matched.twins.items():
        if name in own or name in matched.buffers:
            ranges = share.part(name) if name in own else ()
            for one, other in pairs:
                where = difference(one, other, ranges)
                complaints += [f"{one.name} and {other.name}: {where}."] if where else []
    complaints = list(dict.fromkeys(share.spread(complaints)))
    raise_all(
        CheckpointError,
        "the file holds different values under names that are one tensor in the model. Build the model without the tie, or say which name "
        "is to be left in the file: weights=mp.Weights(path, unexpected=[NAME]).",
        complaints,
    )


def _initialised(model: nn.Module, wanted: Mapping[str, torch.Tensor], seed: int | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of the tensors `wanted`, by name, one after the other."""
    record_initialisation(model, wanted.values())
    known = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    wanted = {name: known[name] for name in wanted}  # (what the record computed for real has taken the place of what was on `meta`)
    targets: dict[int, tuple[Tape, dict[str, TapedView]]] = {}
    for name, tensor in wanted.items():
        mark = mark_of(tensor)
        if mark is not None:
            targets.setdefault(id(mark.tape), (mark.tape, {}))[1][name] = ref_of(tensor)
    _check_written(targets.values(), [name for name, tensor in wanted.items() if tensor.is_meta and mark_of(tensor) is None])
    yield from ((name, tensor.detach()) for name, tensor in wanted.items() if not tensor.is_meta)
    for tape, refs in targets.values():
        yield from Replay(tape, seed).values(refs)


def _once(values: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same, each computed once even where ranks are simulated."""
    while True:
        with maybe_disable_local_tensor_mode():
            item = next(values, None)
        if item is None:
            return
        yield item


def _check_written(targets: Any, unseen: Sequence[str]) -> None:
    empty = [*unseen]
    empty += [name for tape, refs in targets for name, ref in refs.items() if not tape.is_written(ref)]
    raise_all(
        MeshparError,
        "nothing gives these tensors a value: no reset_parameters of their module, and no init_weights or _init_weights of the model. "
        "Build the model under mp.meta() instead of torch.device('meta'), so that its constructor is recorded, build it for real, or give "
        "weights=PATH:",
        empty,
    )


def record_initialisation(model: nn.Module, wanted: Iterable[torch.Tensor]) -> None:
    """Record what the model's own initialisation does to all its tensors on `meta` without a record, if one that is `wanted` is such."""
    if not any(tensor.is_meta and mark_of(tensor) is None for tensor in wanted):
        return
    bare = [t for t in (*model.parameters(), *model.buffers()) if t.is_meta and mark_of(t) is None]
    partly_real = any(not p.is_meta or mark_of(p) is not None for p in model.parameters())
    with recording(adopt=bare), torch.no_grad():
        for module in _children_first(model):
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            reset = next((r for name in ("reset_parameters", "_reset_parameters") if callable(r := getattr(module, name, None))), None)
            if reset is not None and any(t is b for t in own for b in bare):
                reset()
        if not partly_real:  # what initialises the whole model would overwrite what is real
            _run_model_hooks(model)


def _one_for_all_ranks(model: nn.Module) -> None:
    """Tensors on `meta` that were made for every simulated rank become one for all: there is nothing in them yet that could differ."""
    made: dict[int, torch.Tensor] = {}

    def single(tensor: torch.Tensor) -> torch.Tensor:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    with maybe_disable_local_tensor_mode():
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if isinstance(tensor, LocalTensor) and tensor.is_meta:
                        table[name] = made.setdefault(id(tensor), single(tensor))


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    """All modules, each after its children, as constructors finish."""
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        if module not in seen:
            seen.add(module)
            for child in module.children():
                yield from visit(child)
            yield module

    return visit(module)


def _run_model_hooks(module: nn.Module) -> None:
    """Run the outermost `init_weights()`, `initialize_weights()` or `_init_weights(module)` along every path down the model."""
    for name in ("init_weights", "initialize_weights"):
        if callable(hook := getattr(module, name, None)):
            hook()
            return
    if callable(hook := getattr(module, "_init_weights", None)):
        module.apply(hook)
        return
    for child in module.children():
        _run_model_hooks(child)
