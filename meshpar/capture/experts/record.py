"""Recording: one expert's forward runs on a few rows, every operator is noted, and the notes are a `Body` for the rows of all experts.

Every value of the record is one of: `rows` (depends on the rows), `each` (a value every expert has its own of), `stack` (those of all
experts, along dim 0), `joined` (the same, of experts one after the other in dim 0), `shared` (a parameter that all experts read), `other`
(belongs to an expert that got no rows), or a constant, whose value is known. The sizes that stand for the number of rows are found by
recording twice. What operators mean for these kinds of values is in the tables of `expert_rules`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meshpar._torch import OpOverload, TorchDispatchMode, pytree, written_arguments
from meshpar.capture.experts.body import EXPERT, Body, BodyStep, ForEach, NotLifted, Ref, Rows, gather, pruned
from meshpar.capture.experts.rules import POINTWISE, READABLE, ROW_BY_ROW, RULES, TELLING, RecordedCall, cut_apart
from meshpar.capture.stand_in import LARGE, blank

aten = torch.ops.aten


def record(
    run: Callable[[Tensor], Tensor],
    width: int,
    dtype: torch.dtype,
    *,
    each: Mapping[str, Tensor] | None = None,
    stacks: Mapping[str, Tensor] | None = None,
    joined: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, Tensor] | None = None,
    expert: int = 0,
    experts: int = 1,
) -> Body:
    """Record `run` on rows [n, width]. `each`: the tensors of the expert that runs; or `stacks` [E, ...] and `joined` [E * n, ...]: those
    of all `experts`, of which `expert` gets the rows. `run` computes on the very tensors given here. Raises NotLifted."""
    given = {
        **{name: (tensor, "each") for name, tensor in (each or {}).items()},
        **{name: (tensor, "stack") for name, tensor in (stacks or {}).items()},
        **{name: (tensor, "joined") for name, tensor in (joined or {}).items()},
        **{name: (tensor, "shared") for name, tensor in (shared or {}).items()},
    }
    sizes = {width, *(n for tensor, _ in given.values() for n in tensor.shape)}
    counts = [n for n in _PRIMES if all(size % n for size in sizes)][:2]
    if len(counts) < 2:
        raise NotLifted("its sizes are multiples of many primes")
    first, second = (_record(run, n, width, dtype, given, (expert, experts)) for n in counts)
    if len(first.steps) != len(second.steps) or first.result != second.result:
        raise NotLifted("what it computes depends on the number of rows")
    steps = tuple(_generalised(a, b, *counts) for a, b in zip(first.steps, second.steps, strict=True))
    return pruned(replace(first, steps=steps))


def drop(module: torch.nn.Module, p: float, x: Tensor) -> Tensor:
    """Dropout as a record knows it; for `stand_in`."""
    return torch.native_dropout(x, p, True)[0]


_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def _record(
    run: Callable[[Tensor], Tensor],
    count: int,
    width: int,
    dtype: torch.dtype,
    given: Mapping[str, tuple[Tensor, str]],
    place: tuple[int, int],
) -> Body:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, width, generator=generator).to(dtype)
    recorder = Recorder(count, *place)
    operands = {name: recorder.add(tensor, kind) for name, (tensor, kind) in given.items()}
    rows = recorder.add(x, "rows")
    with recorder:
        y = run(x)
    result = recorder.known(y)
    if result is None or result.kind != "rows" or y.shape[0] != count or y.dim() != 2:
        raise NotLifted("its result is not one row per row")
    return Body(operands, rows, tuple(recorder.steps), result.index, y.shape[1], recorder.narrows)


def _generalised(a: BodyStep, b: BodyStep, first: int, second: int) -> BodyStep:
    """One step from its records with two numbers of rows."""
    differs = NotLifted("what it computes depends on the number of rows")
    leaves, spec = pytree.tree_flatten((a.args, dict(a.kwargs)))
    others, other = pytree.tree_flatten((b.args, dict(b.kwargs)))
    if spec != other or a.run != b.run or a.results != b.results:
        raise differs

    def merged(x: Any, y: Any) -> Any:
        if type(x) is type(y) and not isinstance(x, Tensor) and x == y:
            return x
        if isinstance(x, int) and isinstance(y, int) and x % first == 0 and x // first * second == y:
            return Rows(x // first)
        raise differs

    args, kwargs = pytree.tree_unflatten([merged(x, y) for x, y in zip(leaves, others, strict=True)], spec)
    return BodyStep(a.run, args, kwargs, a.results)


@dataclass(frozen=True, slots=True)
class RecordedValue:
    """What is known of a tensor: its place in the body, and what it holds."""

    index: int
    kind: str
    tensor: Tensor


class Recorder(TorchDispatchMode):
    """Runs every operator and notes what those do that the rows or the experts' tensors take part in."""

    def __init__(self, count: int, expert: int, experts: int) -> None:
        super().__init__()
        self.count, self.expert, self.experts = count, expert, experts
        self.steps: list[BodyStep] = []
        self.narrows = False
        self._values: dict[int, RecordedValue] = {}
        self.kept: list[Any] = []
        self._writes: Counter[int] = Counter()
        """How often a storage has been overwritten."""
        self._reshaped: dict[int, tuple[Tensor, int]] = {}
        """Rows in another shape -> what they were before, and how often that had been overwritten."""
        self._before: dict[int, Any] = {}
        self._next = 0

    def add(self, tensor: Tensor, kind: str) -> int:
        index, self._next = self._next, self._next + 1
        self._values[id(tensor)] = RecordedValue(index, kind, tensor)
        return index

    def known(self, tensor: Any) -> RecordedValue | None:
        return self._values.get(id(tensor))

    def kind(self, tensor: Any) -> str | None:
        """What the tensor is; None for a constant."""
        value = self.known(tensor)
        return None if value is None else value.kind

    def new(self, like: Tensor) -> Tensor:
        """A tensor like `like`, for a step between."""
        made = like.detach().clone()
        self.kept.append(made)
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = written_arguments(func, args, kwargs)
        self._before = {}
        self._before = {id(tensor): self.constant(tensor) for tensor in written if self.known(tensor) is None}
        out = self._cheaply(func, args, kwargs, inputs) if not written else func(*args, **kwargs)
        self.kept.append((out, inputs))  # an id stays one tensor's
        if any(self._writes[tensor.untyped_storage()._cdata] and self.known(tensor) is None for tensor in inputs):
            raise NotLifted("it reads through a view what it overwrote")
        if all(self.known(tensor) is None for tensor in inputs):
            return out
        if not torch.is_grad_enabled():
            raise NotLifted("it switches gradients off")
        results = [leaf for leaf in (out if isinstance(out, tuple | list) else (out,)) if isinstance(leaf, Tensor)]
        if not results:
            raise NotLifted(f"it asks for the values of its rows or parameters ({func})")
        if all(result.numel() == 0 for result in results) and not written:
            return out
        self._note(func, args, kwargs, results, inputs)
        for tensor in written:
            self._writes[tensor.untyped_storage()._cdata] += 1
        return out

    def _cheaply(self, func: OpOverload, args: Any, kwargs: Any, inputs: Sequence[Tensor]) -> Any:
        """The operator's result; zeros in its place where large values take part, whose elements nothing depends on."""
        known = sum(tensor.numel() for tensor in inputs if self.known(tensor) is not None)
        views = any(result.alias_info is not None for result in func._schema.returns)
        if known <= LARGE or views or func.overloadpacket in TELLING:
            return func(*args, **kwargs)
        try:
            shapes = func(*pytree.tree_map(_without_values, tuple(args)), **pytree.tree_map(_without_values, dict(kwargs)))
        except (RuntimeError, NotImplementedError):  # its shape depends on values: an index by a mask
            return func(*args, **kwargs)
        return pytree.tree_map(lambda leaf: blank(leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf, shapes)

    def _note(self, func: OpOverload, args: Any, kwargs: Any, results: list[Tensor], inputs: list[Tensor]) -> None:
        kinds = {value.kind for tensor in inputs if (value := self.known(tensor)) is not None}
        plain = _functional(func)
        if plain is None:
            raise NotLifted(f"{func} overwrites a tensor")
        self.narrows |= any(r.is_floating_point() and r.dtype.itemsize < 8 for r in results)
        if "joined" in kinds:
            cut_apart(self, RecordedCall(plain, args, kwargs, results, kinds))
            return
        rule = RULES.get(plain.overloadpacket)
        if rule is not None and rule(self, RecordedCall(plain, args, kwargs, results, kinds)):
            return
        if "rows" in kinds:
            self._on_rows(plain, args, kwargs, results, kinds)
        elif "other" in kinds:
            self.mark(results, "other")
        elif "stack" in kinds:
            if any(result.shape[:1] != self._leading(inputs) for result in results) or kinds != {"stack"}:
                raise NotLifted(f"{func} mixes the experts' parameters")
            self.step(plain, args, kwargs, results, "stack")
        elif "each" in kinds:
            self._on_each(plain, args, kwargs, results)
        else:
            self.step(plain, args, kwargs, results, "shared")

    def _leading(self, inputs: Sequence[Tensor]) -> torch.Size:
        return next(tensor.shape[:1] for tensor in inputs if self.kind(tensor) == "stack")

    def mark(self, results: Sequence[Tensor], kind: str) -> None:
        for result in results:
            self.add(result, kind)

    def step(self, run: Any, args: Any, kwargs: Any, results: Sequence[Tensor], kind: str) -> None:
        """Note a call; `args` may hold tensors with a value, Refs, and what is not a tensor."""
        args, kwargs = pytree.tree_map(self._ref, (tuple(args), dict(kwargs)))  # first: a result may be an argument, overwritten
        indices = tuple(self.add(result, kind) for result in results)
        self.steps.append(BodyStep(READABLE.get(run, run), args, kwargs, indices))

    def alias(self, result: Tensor, source: Tensor | RecordedValue) -> None:
        """`result` is what `source` is, cast to its own type."""
        value = source if isinstance(source, RecordedValue) else self._values[id(source)]
        if value.tensor.dtype != result.dtype:
            self.step(Tensor.to, (value.tensor, result.dtype), {}, [result], value.kind)
        else:
            self._values[id(result)] = RecordedValue(value.index, value.kind, result)

    def _ref(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        value = self.known(leaf)
        if value is None or value.kind == "other":
            raise NotLifted("it mixes rows of several experts, or rows and tensors that depend on the routing")
        return Ref(value.index)

    def _on_each(self, func: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        dims = tuple(0 if self.kind(leaves[i]) == "each" else None for i in places)
        rest = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
        self.step(ForEach(func, spec, rest, places, dims), [leaves[i] for i in places], {}, results, "each")

    def _on_rows(self, func: OpOverload, args: Any, kwargs: Any, results: Sequence[Tensor], kinds: set[str]) -> None:
        """An operator on rows, each alone."""
        if "other" in kinds:
            self.mark(results, "other")
            return
        if kinds & {"stack"}:
            raise NotLifted(f"{func} mixes rows and the parameters of all experts")
        if torch.Tag.pointwise in func.tags or func.overloadpacket in POINTWISE:
            args, kwargs = self._broadcast(args, kwargs, results[0])
        elif "each" in kinds or not self._alone(func, args):
            raise NotLifted(f"{func} is not known to treat rows alone")
        for result in results:
            self.row_dim(result)
        if not self._there_and_back(func, args, results):
            self.step(func, args, kwargs, results, "rows")

    def _there_and_back(self, func: OpOverload, args: Any, results: Sequence[Tensor]) -> bool:
        """Whether rows that were given another shape have their first one again: then that is what they are."""
        if func.overloadpacket not in (aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze, aten.squeeze):
            return False
        (result,) = results
        written = self._writes[result.untyped_storage()._cdata]
        first, before = self._reshaped.get(id(args[0]), (args[0], written))
        if result.shape != first.shape or written != before:
            self._reshaped[id(result)] = (first, before)
            return False
        self.alias(result, first)
        return True

    def _alone(self, func: OpOverload, args: Any) -> bool:
        check = ROW_BY_ROW.get(func.overloadpacket)
        return check is not None and check(self, args)

    def row_dim(self, tensor: Tensor) -> int:
        """The dim of rows; all others have other sizes."""
        found = [d for d, n in enumerate(tensor.shape) if n % self.count == 0]
        if len(found) != 1 or tensor.shape[found[0]] != self.count:
            raise NotLifted("it reshapes rows together")
        return found[0]

    def _broadcast(self, args: Any, kwargs: Any, like: Tensor) -> tuple[Any, Any]:
        """Arguments of a pointwise operator: what each expert has its own of becomes one value per row."""

        def wide(leaf: Any) -> Any:
            return self.gathered(leaf, like) if self.kind(leaf) == "each" else leaf

        return pytree.tree_map(wide, (args, kwargs))

    def gathered(self, each: Tensor, like: Tensor) -> Ref | Tensor:
        """`each` as one value per row, in a shape that broadcasts to `like`."""
        if self.row_dim(like) != 0:
            raise NotLifted("rows do not lie along the first dim where they meet a parameter")
        shape = tuple(each.shape)
        if len(shape) == like.dim():
            if shape[0] != 1:
                raise NotLifted("a parameter does not broadcast over rows")
            shape = shape[1:]
        row = each.detach().reshape(*(1 for _ in range(like.dim() - len(shape))), *shape)
        result = row.expand(self.count, *row.shape[1:]).clone()
        self.kept.append(result)
        self.step(gather, (each, Ref(EXPERT), list(row.shape[1:])), {}, [result], "rows")
        return result

    def constant(self, tensor: Any) -> Any:
        """The value all elements of a constant have, or None."""
        if not isinstance(tensor, Tensor) or self.known(tensor) is not None or tensor.numel() == 0:
            return None if isinstance(tensor, Tensor) else tensor
        if id(tensor) in self._before:
            return self._before[id(tensor)]  # it has been overwritten by now
        flat = tensor.detach().reshape(-1)
        return flat[0].item() if bool((flat == flat[0]).all()) else None

    def all_rows(self, index: Any) -> bool:
        return (
            isinstance(index, Tensor)
            and index.dtype != torch.bool
            and index.shape == (self.count,)
            and index.tolist() == [*range(self.count)]
        )


def _without_values(leaf: Any) -> Any:
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta") if isinstance(leaf, Tensor) else leaf


def _functional(func: OpOverload) -> OpOverload | None:
    """The operator that computes what an overwriting one does, or the operator itself."""
    if not func._schema.is_mutable:
        return func
    name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return None if packet is None else getattr(packet, overload, None)
