"""One expert's forward, recorded on a few rows and lifted to the sorted rows of all experts.

    recorded   t = mm(x, w[3].t());  y = silu(t) + b[3]
    lifted     t = grouped_mm(x, w.transpose(1, 2), offsets);  y = silu(t) + b[row_expert]

Every value of the record is one of: `rows` (depends on the rows), `each` (a value every expert has its own of), `stack` (those of all
experts, along dim 0), `shared` (a parameter that all experts read), `other` (belongs to an expert that got no rows), or a constant, whose
value is known. The sizes that stand for the number of rows are found by recording twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meshpar._torch import OpOverload, TorchDispatchMode, pytree, written_arguments
from meshpar.ops.experts import grouped_mm, row_expert

aten = torch.ops.aten


class NotLifted(Exception):
    """Why a forward cannot be lifted; `like_experts`: whether it looks like one of expert layers all the same."""

    def __init__(self, reason: str, *, like_experts: bool = True) -> None:
        super().__init__(reason)
        self.like_experts = like_experts


@dataclass(frozen=True, slots=True)
class Ref:
    """The result of an earlier step, or an operand of the body."""

    index: int


@dataclass(frozen=True, slots=True)
class Rows:
    """The number of rows times `factor`."""

    factor: int


@dataclass(frozen=True, slots=True)
class Step:
    """`results` = run(*args, **kwargs), with every Ref and Rows in the arguments replaced by what it stands for."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[int, ...]


@dataclass(frozen=True)
class Body:
    """A lifted forward: rows sorted by expert, the end of each expert's rows, and its operands by name -> rows."""

    operands: Mapping[str, int]
    rows: int
    steps: tuple[Step, ...]
    result: int
    narrows: bool
    """Whether it computes somewhere in a narrower type than float64 when it is given float64."""

    def __call__(self, x: Tensor, offsets: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        env: dict[int, Any] = {index: values[name] for name, index in self.operands.items()}
        env[self.rows], env[_OFFSETS] = x, offsets
        if any(_EXPERT in _refs(step) for step in self.steps):
            env[_EXPERT] = row_expert(x, offsets)
        for step in self.steps:
            args, kwargs = pytree.tree_map(
                lambda leaf: env[leaf.index] if isinstance(leaf, Ref) else leaf.factor * x.shape[0] if isinstance(leaf, Rows) else leaf,
                (step.args, dict(step.kwargs)),
                is_leaf=lambda leaf: isinstance(leaf, Ref | Rows),
            )
            out = step.run(*args, **kwargs)
            env.update(zip(step.results, out if isinstance(out, tuple | list) else (out,), strict=False))
        return env[self.result]


_OFFSETS, _EXPERT = -1, -2
"""Places of the offsets and of every row's expert."""


def _refs(step: Step) -> set[int]:
    return {leaf.index for leaf in pytree.tree_leaves((step.args, dict(step.kwargs))) if isinstance(leaf, Ref)}


def record(
    run: Callable[[Tensor], Tensor],
    width: int,
    dtype: torch.dtype,
    *,
    each: Mapping[str, Tensor] | None = None,
    stacks: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, Tensor] | None = None,
    expert: int = 0,
) -> Body:
    """Record `run` on rows [n, width]. `each`: the tensors of the expert that runs; or `stacks`: those of all experts, of which `expert`
    gets the rows. `run` computes on the very tensors given here. Raises NotLifted."""
    given = {
        **{name: (tensor, "each") for name, tensor in (each or {}).items()},
        **{name: (tensor, "stack") for name, tensor in (stacks or {}).items()},
        **{name: (tensor, "shared") for name, tensor in (shared or {}).items()},
    }
    sizes = {width, *(n for tensor, _ in given.values() for n in tensor.shape)}
    counts = [n for n in _PRIMES if all(size % n for size in sizes)][:2]
    if len(counts) < 2:
        raise NotLifted("its sizes are multiples of many primes")
    first, second = (_record(run, n, width, dtype, given, expert) for n in counts)
    if len(first.steps) != len(second.steps) or first.result != second.result:
        raise NotLifted("what it computes depends on the number of rows")
    steps = tuple(_generalised(a, b, *counts) for a, b in zip(first.steps, second.steps, strict=True))
    return _pruned(replace(first, steps=steps))


_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def _record(
    run: Callable[[Tensor], Tensor],
    count: int,
    width: int,
    dtype: torch.dtype,
    given: Mapping[str, tuple[Tensor, str]],
    expert: int,
) -> Body:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, width, generator=generator).to(dtype)
    recorder = _Recorder(count, expert)
    operands = {name: recorder.add(tensor, kind) for name, (tensor, kind) in given.items()}
    rows = recorder.add(x, "rows")
    with recorder:
        y = run(x)
    if not isinstance(y, Tensor) or recorder.known(y) is None or recorder.known(y).kind != "rows" or y.shape[0] != count or y.dim() != 2:  # type: ignore[union-attr]
        raise NotLifted("its result is not one row per row")
    return Body(operands, rows, tuple(recorder.steps), recorder.known(y).index, recorder.narrows)  # type: ignore[union-attr]


def _generalised(a: Step, b: Step, first: int, second: int) -> Step:
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
    return Step(a.run, args, kwargs, a.results)


def _pruned(body: Body) -> Body:
    needed, kept = {body.result}, []
    for step in reversed(body.steps):
        if needed.intersection(step.results):
            kept.append(step)
            needed |= _refs(step)
    return replace(body, steps=tuple(reversed(kept)))


@dataclass(frozen=True, slots=True)
class _Value:
    index: int
    kind: str
    tensor: Tensor


class _Recorder(TorchDispatchMode):
    """Runs every operator and notes what those do that the rows or the experts' tensors take part in."""

    def __init__(self, count: int, expert: int) -> None:
        super().__init__()
        self.count, self.expert = count, expert
        self.steps: list[Step] = []
        self.narrows = False
        self._values: dict[int, _Value] = {}
        self._kept: list[Any] = []
        self._written: set[int] = set()
        self._before: dict[int, Any] = {}
        self._next = 0

    def add(self, tensor: Tensor, kind: str) -> int:
        index, self._next = self._next, self._next + 1
        self._values[id(tensor)] = _Value(index, kind, tensor)
        return index

    def known(self, tensor: Any) -> _Value | None:
        return self._values.get(id(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = written_arguments(func, args, kwargs)
        self._before = {}
        self._before = {id(tensor): self.constant(tensor) for tensor in written if self.known(tensor) is None}
        out = func(*args, **kwargs)
        self._kept.append((out, inputs))  # an id stays one tensor's
        if any(tensor.untyped_storage()._cdata in self._written and self.known(tensor) is None for tensor in inputs):
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
            self._written.add(tensor.untyped_storage()._cdata)
        return out

    def _note(self, func: OpOverload, args: Any, kwargs: Any, results: list[Tensor], inputs: list[Tensor]) -> None:
        kinds = {value.kind for tensor in inputs if (value := self.known(tensor)) is not None}
        plain = _functional(func)
        if plain is None:
            raise NotLifted(f"{func} overwrites a tensor")
        self.narrows |= any(r.is_floating_point() and r.dtype.itemsize < 8 for r in results)
        for rule in _RULES.get(plain.overloadpacket, ()):
            if rule(self, plain, args, kwargs, results, kinds):
                return
        if "rows" in kinds:
            self._on_rows(plain, args, kwargs, results, kinds)
        elif "other" in kinds:
            self._mark(results, "other")
        elif "stack" in kinds:
            if any(result.shape[:1] != self._leading(inputs) for result in results) or kinds != {"stack"}:
                raise NotLifted(f"{func} mixes the experts' parameters")
            self.step(plain, args, kwargs, results, "stack")
        elif "each" in kinds:
            self._on_each(plain, args, kwargs, results)
        else:
            self.step(plain, args, kwargs, results, "shared")

    def _leading(self, inputs: Sequence[Tensor]) -> torch.Size:
        return next(tensor.shape[:1] for tensor in inputs if (value := self.known(tensor)) is not None and value.kind == "stack")

    def _mark(self, results: Sequence[Tensor], kind: str) -> None:
        for result in results:
            self.add(result, kind)

    def step(self, run: Any, args: Any, kwargs: Any, results: Sequence[Tensor], kind: str) -> None:
        """Note a call; `args` may hold tensors with a value, Refs, and what is not a tensor."""
        args, kwargs = pytree.tree_map(self._ref, (tuple(args), dict(kwargs)))  # first: a result may be an argument, overwritten
        indices = tuple(self.add(result, kind) for result in results)
        self.steps.append(Step(_READABLE.get(run, run), args, kwargs, indices))

    def alias(self, result: Tensor, source: Tensor | _Value) -> None:
        """`result` is what `source` is, cast to its own type."""
        value = source if isinstance(source, _Value) else self._values[id(source)]
        if value.tensor.dtype != result.dtype:
            self.step(Tensor.to, (value.tensor, result.dtype), {}, [result], value.kind)
        else:
            self._values[id(result)] = _Value(value.index, value.kind, result)

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
        dims = tuple(0 if (v := self.known(leaves[i])) is not None and v.kind == "each" else None for i in places)
        rest = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
        self.step(_ForEach(func, spec, rest, places, dims), [leaves[i] for i in places], {}, results, "each")

    def _on_rows(self, func: OpOverload, args: Any, kwargs: Any, results: Sequence[Tensor], kinds: set[str]) -> None:
        """An operator on rows, each alone."""
        if "other" in kinds:
            self._mark(results, "other")
            return
        if kinds & {"stack"}:
            raise NotLifted(f"{func} mixes rows and the parameters of all experts")
        if torch.Tag.pointwise in func.tags or func.overloadpacket in _POINTWISE:
            args, kwargs = self._broadcast(args, kwargs, results[0])
        elif "each" in kinds or not self._alone(func, args):
            raise NotLifted(f"{func} is not known to treat rows alone")
        for result in results:
            self.row_dim(result)
        self.step(func, args, kwargs, results, "rows")

    def _alone(self, func: OpOverload, args: Any) -> bool:
        check = _ROW_BY_ROW.get(func.overloadpacket)
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
            value = self.known(leaf) if isinstance(leaf, Tensor) else None
            return leaf if value is None or value.kind != "each" else self.gathered(value.tensor, like)

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
        self._kept.append(result)
        self.step(_gather, (each, Ref(_EXPERT), list(row.shape[1:])), {}, [result], "rows")
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


@dataclass(frozen=True)
class _ForEach:
    """An operator applied to the tensors of every expert."""

    func: Any
    spec: Any
    rest: tuple[Any, ...]
    places: tuple[int, ...]
    dims: tuple[int | None, ...]

    def __call__(self, *tensors: Tensor) -> Any:
        if self.func in (aten.t.default, aten.transpose.int, aten.numpy_T.default) and tensors[0].dim() == 3:
            return tensors[0].transpose(1, 2)
        if self.func is aten._to_copy.default or self.func is aten.detach.default:
            return self._plain(*tensors)
        return torch.func.vmap(self._plain, self.dims)(*tensors)

    def _plain(self, *tensors: Tensor) -> Any:
        leaves = list(self.rest)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.func(*args, **kwargs)


def _gather(stack: Tensor, expert: Tensor, shape: Sequence[int]) -> Tensor:
    return stack[expert].reshape(expert.shape[0], *shape)


def _functional(func: OpOverload) -> OpOverload | None:
    """The operator that computes what an overwriting one does, or the operator itself."""
    if not func._schema.is_mutable:
        return func
    name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return None if packet is None else getattr(packet, overload, None)


Rule = Callable[[_Recorder, OpOverload, Any, Any, list[Tensor], set[str]], bool]


def _select(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    """stack[e]"""
    if kinds != {"stack"} or args[1] != 0:
        return False
    if args[2] % args[0].shape[0] == recorder.expert:
        recorder.step(_identity, (args[0],), {}, results, "each")
    else:
        recorder._mark(results, "other")
    return True


def _unbind(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    if kinds != {"stack"} or (len(args) > 1 and args[1] != 0):
        return False
    for expert, result in enumerate(results):
        if expert == recorder.expert:
            recorder.step(_identity, (args[0],), {}, [result], "each")
        else:
            recorder._mark([result], "other")
    return True


def _slice(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    """stack[e : e + 1]"""
    if kinds != {"stack"} or (len(args) > 1 and args[1] != 0) or results[0].shape[0] == args[0].shape[0]:
        return False
    start, end = (args[2] or 0), args[3]
    if not start <= recorder.expert < end:
        recorder._mark(results, "other")
    elif results[0].shape[0] == 1:
        recorder.step(Tensor.unsqueeze, (args[0], 1), {}, results, "each")
    else:
        raise NotLifted("it takes the parameters of several experts at once")
    return True


def _index(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    source, indices = args[:2]
    value = recorder.known(source)
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if value is None or len(given) != 1 or recorder.known(given[0][1]) is not None:
        return False
    dim, index = given[0]
    if value.kind == "stack" and dim == 0 and index.dtype != torch.bool:
        chosen = set(index.reshape(-1).tolist())
        if recorder.expert not in chosen:
            recorder._mark(results, "other")
        elif chosen != {recorder.expert}:
            raise NotLifted("it takes the parameters of several experts at once")
        elif index.numel() == 1:
            recorder.step(Tensor.reshape, (source, [source.shape[0], *results[0].shape]), {}, results, "each")
        elif index.shape == (recorder.count,) and source.dim() == 2:
            recorder.step(_gather, (source, Ref(_EXPERT), list(source.shape[1:])), {}, results, "rows")
        else:
            return False
        return True
    if value.kind in ("rows", "other") and dim == recorder.row_dim(source) and (recorder.all_rows(index) or _all(index)):
        recorder.alias(results[0], source)
        return True
    return False


def _all(index: Tensor) -> bool:
    return index.dtype == torch.bool and index.dim() == 1 and bool(index.all())


def _index_add(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    target, dim, index, source = args[:4]
    if dim != 0 or kwargs.get("alpha", 1) != 1:
        return False
    return _put(recorder, results[0], target, index, source, add=True)


def _index_put(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    target, indices, values = args[:3]
    return len(indices) == 1 and _put(recorder, results[0], target, indices[0], values, add=len(args) > 3 and bool(args[3]))


def _put(recorder: _Recorder, result: Tensor, target: Tensor, index: Any, source: Any, *, add: bool) -> bool:
    if not isinstance(index, Tensor) or recorder.known(index) is not None:
        return False
    if index.numel() == 0 or source.numel() == 0 or (index.dtype == torch.bool and not bool(index.any())):
        if recorder.known(target) is not None:
            recorder.alias(result, target)
        return True
    value = recorder.known(source)
    if value is None or value.kind != "rows" or not (recorder.all_rows(index) or _all(index)) or source.shape != target.shape:
        return False
    if not add or recorder.constant(target) == 0:
        recorder.alias(result, source)
    else:
        recorder.step(torch.add, (target, source), {}, [result], "rows")
    return True


def _mul(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    """Times a weight of one, or of zero."""
    for value, factor in (args[:2], args[1::-1]):
        if not isinstance(value, Tensor) or recorder.known(value) is None or not isinstance(factor, Tensor) or recorder.known(factor):
            continue
        constant = recorder.constant(factor)
        if constant == 0 and "rows" in kinds | {"rows" if recorder.known(value).kind == "other" else ""}:  # type: ignore[union-attr]
            return True
        if constant == 1 and value.shape == results[0].shape:
            recorder.alias(results[0], value)
            return True
    return False


def _add(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    if kwargs.get("alpha", 1) != 1:
        return False
    for value, term in (args[:2], args[1::-1]):
        known = isinstance(value, Tensor) and recorder.known(value) is not None and value.shape == results[0].shape
        if known and isinstance(term, Tensor) and recorder.known(term) is None and recorder.constant(term) == 0:
            recorder.alias(results[0], value)
            return True
    return False


def _where(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    condition = recorder.constant(args[0])
    if not isinstance(condition, bool) or recorder.known(args[0]) is not None:
        return False
    chosen = args[1] if condition else args[2]
    if isinstance(chosen, Tensor) and recorder.known(chosen) is not None:
        if chosen.shape != results[0].shape:
            return False
        recorder.alias(results[0], chosen)
        return True
    return recorder.constant(chosen) is not None


def _masked_fill(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    if recorder.constant(args[1]) is not False or args[0].shape != results[0].shape:
        return False
    recorder.alias(results[0], args[0])
    return True


def _mm(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    x, w = recorder.known(args[0]), recorder.known(args[1])
    if x is None or w is None or {x.kind, w.kind} != {"rows", "each"}:
        return False
    if x.kind == "rows" and recorder.row_dim(x.tensor) == 0:
        recorder.step(_grouped, (x.tensor, w.tensor, Ref(_OFFSETS)), {}, results, "rows")
        return True
    if x.kind == "each" and recorder.row_dim(w.tensor) == 1:
        recorder.step(_grouped_from_left, (x.tensor, w.tensor, Ref(_OFFSETS)), {}, results, "rows")
        return True
    return False


def _addmm(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    bias, x, w = (recorder.known(arg) for arg in args[:3])
    if bias is None or x is None or w is None or x.kind != "rows" or w.kind != "each" or bias.kind not in ("each", "shared") or kwargs:
        return False
    if recorder.row_dim(x.tensor) != 0:
        return False
    product = results[0].detach().clone()
    recorder._kept.append(product)
    recorder.step(_grouped, (x.tensor, w.tensor, Ref(_OFFSETS)), {}, [product], "rows")
    term = recorder.gathered(bias.tensor, product) if bias.kind == "each" else bias.tensor
    recorder.step(torch.add, (product, term), {}, results, "rows")
    return True


def _grouped(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return grouped_mm(x, w, offsets)


def _grouped_from_left(w: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return grouped_mm(x.transpose(0, 1), w.transpose(1, 2), offsets).transpose(0, 1)


def _layer_norm(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    x, shape, weight, bias, eps = args[:5]
    value = recorder.known(x)
    if value is None or value.kind != "rows" or "other" in kinds or recorder.row_dim(x) >= x.dim() - len(shape):
        return False
    return _normed(recorder, torch.nn.functional.layer_norm, x, shape, (weight, bias), {"eps": eps}, results[0])


def _rms_norm(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    x, shape, weight, eps = args[:4]
    value = recorder.known(x)
    if value is None or value.kind != "rows" or "other" in kinds or recorder.row_dim(x) >= x.dim() - len(shape):
        return False
    return _normed(recorder, torch.nn.functional.rms_norm, x, shape, (weight,), {"eps": eps}, results[0])


def _normed(recorder: _Recorder, norm: Any, x: Tensor, shape: Any, affine: Sequence[Any], kwargs: Any, result: Tensor) -> bool:
    """A norm whose scale and shift may be each expert's own."""
    if all(term is None or recorder.known(term).kind == "shared" for term in affine):  # type: ignore[union-attr]
        recorder.step(norm, (x, list(shape), *affine), kwargs, [result], "rows")
        return True
    values: list[tuple[Any, Tensor]] = [(run, term) for run, term in zip((torch.mul, torch.add), affine, strict=False) if term is not None]
    current = result.detach().clone()
    recorder._kept.append(current)
    recorder.step(norm, (x, list(shape)), kwargs, [current], "rows")
    for position, (run, term) in enumerate(values):
        last = position == len(values) - 1
        after = result if last else result.detach().clone()
        recorder._kept.append(after)
        operand = recorder.gathered(term, current) if recorder.known(term).kind == "each" else term  # type: ignore[union-attr]
        recorder.step(run, (current, operand), {}, [after], "rows")
        current = after
    return True


def _made(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    """A new tensor in the shape of another: a constant."""
    return True


def _split(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    """Rows split by expert: one part has them all, the others are empty."""
    if kinds != {"rows"} or (args[2] if len(args) > 2 else 0) % args[0].dim() != recorder.row_dim(args[0]):
        return False
    for result in results:
        if result.numel() > 0:
            if result.shape != args[0].shape:
                return False
            recorder.alias(result, args[0])
    return True


def _cat(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    """Rows and empty tensors put together."""
    parts = [part for part in args[0] if part.numel() > 0]
    if len(parts) != 1 or len(args[0]) == 1 or recorder.known(parts[0]) is None:
        return False
    recorder.alias(results[0], parts[0])
    return True


def _dropout(recorder: _Recorder, func: Any, args: Any, kwargs: Any, results: list[Tensor], kinds: set[str]) -> bool:
    if kinds != {"rows"}:
        return False
    recorder.step(torch.nn.functional.dropout, (args[0], args[1], args[2]), {}, results[:1], "rows")
    return True


def _identity(x: Tensor) -> Tensor:
    return x


_RULES: Mapping[Any, tuple[Rule, ...]] = {
    aten.select: (_select,),
    aten.unbind: (_unbind,),
    aten.slice: (_slice,),
    aten.index: (_index,),
    aten.index_add: (_index_add,),
    aten.index_put: (_index_put,),
    aten.mul: (_mul,),
    aten.add: (_add,),
    aten.where: (_where,),
    aten.masked_fill: (_masked_fill,),
    aten.mm: (_mm,),
    aten.addmm: (_addmm,),
    aten.native_layer_norm: (_layer_norm,),
    aten._fused_rms_norm: (_rms_norm,),
    aten.native_dropout: (_dropout,),
    **dict.fromkeys((aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like), (_made,)),
    **dict.fromkeys((aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty), (_made,)),
    aten.split: (_split,),
    aten.split_with_sizes: (_split,),
    aten.cat: (_cat,),
}
"""Operators by what they mean for rows and experts; the first rule that is not "not mine" counts."""


def _dims(position: int) -> Callable[[_Recorder, Any], bool]:
    """The dims that argument `position` names are not the rows'."""

    def check(recorder: _Recorder, args: Any) -> bool:
        source = args[0] if isinstance(args[0], Tensor) else args[0][0]
        named = args[position] if len(args) > position else 0 if position == 2 else None
        dims: list[Any] = [*named] if isinstance(named, list | tuple) else [named]
        return None not in dims and bool(dims) and all(d % source.dim() != recorder.row_dim(source) for d in dims)

    return check


def _always(recorder: _Recorder, args: Any) -> bool:
    return True


def _by_shared(position: int) -> Callable[[_Recorder, Any], bool]:
    """Rows times a matrix that all experts share."""

    def check(recorder: _Recorder, args: Any) -> bool:
        x, w = recorder.known(args[position]), recorder.known(args[position + 1])
        return x is not None and x.kind == "rows" and w is not None and w.kind == "shared" and recorder.row_dim(args[position]) == 0

    return check


_POINTWISE = frozenset({aten.clone, aten._to_copy, aten.alias, aten.detach, aten.gelu, aten.silu, aten.where, aten.masked_fill})
_ROW_BY_ROW: Mapping[Any, Callable[[_Recorder, Any], bool]] = {
    **dict.fromkeys((aten.unsqueeze, aten.squeeze, aten.transpose, aten.permute, aten.expand, aten.t), _always),
    **dict.fromkeys((aten.view, aten.reshape, aten._unsafe_view), _always),
    **dict.fromkeys(
        (aten.slice, aten.select, aten._softmax, aten._log_softmax, aten.cat, aten.sum, aten.mean, aten.amax, aten.glu), _dims(1)
    ),
    **dict.fromkeys((aten.split, aten.split_with_sizes), _dims(2)),
    aten.mm: _by_shared(0),
    aten.addmm: _by_shared(1),
}
"""Operators that treat rows alone, and when. (A view that keeps the rows' dim does; one that does not is refused by its shape.)"""


def _cast(x: Tensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    return x if dtype is None else x.to(dtype)


_READABLE: Mapping[Any, Callable[..., Any]] = {
    aten._to_copy.default: _cast,
    aten._unsafe_view.default: torch.reshape,
    aten.view.default: torch.reshape,
    aten._softmax.default: lambda x, dim, half: torch.softmax(x, dim),
    aten._log_softmax.default: lambda x, dim, half: torch.log_softmax(x, dim),
    aten.mm.default: torch.mm,
}
"""Operators of a record -> what to call instead, so that the graph has operators that rules know."""
