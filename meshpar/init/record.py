"""Records on a tape what a model's constructor does to its parameters, which stay on `meta`.

Deferred are tensors that are born empty, constant or random with a floating dtype, and whatever is computed from them: that is what
parameters are made of. All else (integers, `arange`, `linspace`, data) is computed as usual. Code that reads a deferred value (`.item()`,
`if x.any()`) gets it: the tape is replayed as far as needed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref as weak

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from meshpar._torch import TorchDispatchMode, draws, opaque_initialisers, pytree, takes, without_modes, written_arguments
from meshpar.errors import MeshparError
from meshpar.init.tape import DEFAULT, Dice, Replay, Tape, TapedOp, TapedView

aten = torch.ops.aten

EMPTY = frozenset(
    (aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default)
)
"""They allocate and write nothing."""
FILLS: Mapping[Any, Callable[[tuple[Any, ...]], tuple[Any, tuple[Any, ...]]]] = {
    aten.zeros.default: lambda args: (aten.zero_.default, ()),
    aten.ones.default: lambda args: (aten.fill_.Scalar, (1,)),
    aten.full.default: lambda args: (aten.fill_.Scalar, (args[1],)),
    aten.rand.default: lambda args: (aten.uniform_.default, ()),
    aten.rand.generator: lambda args: (aten.uniform_.default, ()),
    aten.randn.default: lambda args: (aten.normal_.default, ()),
    aten.randn.generator: lambda args: (aten.normal_.default, ()),
}
"""What they do to the memory they allocate, in place, from their positional arguments."""
OVERWRITES = frozenset(
    (
        aten.zero_.default,
        aten.fill_.Scalar,
        aten.fill_.Tensor,
        aten.copy_.default,
        aten.normal_.default,
        aten.uniform_.default,
        aten.random_.default,
        aten.random_.to,
        getattr(aten.random_, "from"),
        aten.bernoulli_.float,
        aten.exponential_.default,
        aten.geometric_.default,
        aten.log_normal_.default,
        aten.cauchy_.default,
    )
)
"""In-place operations that do not read what they write to."""

_TENSOR: Any = torch.Tensor  # whose properties are wanted themselves
_READ = frozenset((torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__))
"""They read values without calling an operator."""

_MARK = "meshpar_tape"  # the attribute of a storage that says which tape it is on, under which number


@dataclass(frozen=True, slots=True)
class Mark:
    """The place of a storage: on a tape, under a number."""

    tape: Tape
    number: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        return self


def mark_of(tensor: torch.Tensor) -> Mark | None:
    """Where a tensor on `meta` was recorded, or None."""
    if not _is_plain(tensor) or not tensor.is_meta:
        return None
    return getattr(tensor.untyped_storage(), _MARK, None)


def ref_of(tensor: torch.Tensor) -> TapedView:
    """A recorded tensor as a view of its storage."""
    mark = mark_of(tensor)
    assert mark is not None
    return TapedView(mark.number, tensor.dtype, tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset()))


@contextmanager
def recording(*, adopt: Sequence[torch.Tensor] = ()) -> Iterator[Tape]:
    """Record what happens inside; tensors `adopt` on `meta` count as born empty on this tape.

    On leaving, every deferred tensor that is still alive and no parameter is computed, in place.
    """
    recorder = Taping()
    for tensor in adopt:
        recorder.number(tensor)
    with ExitStack() as stack:
        stack.callback(register_module_parameter_registration_hook(recorder.register).remove)
        stack.enter_context(opaque_initialisers(recorder.opaque))
        stack.enter_context(_Disguise(recorder))
        stack.enter_context(recorder)
        yield recorder.tape
    recorder.settle()


class Taping(TorchDispatchMode):
    """Sends the operations on deferred tensors to `meta` and to a tape."""

    def __init__(self) -> None:
        super().__init__()
        self.tape = Tape({DEFAULT: torch.get_rng_state()})
        self.busy = False
        self._replay = Replay(self.tape)
        self._alive: dict[int, weak[torch.Tensor]] = {}
        self._parameters: set[int] = set()
        self._moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._states = dict(self.tape.start)
        self._dice: dict[int, tuple[torch.Generator, Dice]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self.working():
            return self._dispatch(func, args, dict(kwargs or {}))

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, deferred tensors do not pretend to be on the CPU."""
        self.busy, was_busy = True, self.busy
        try:
            yield
        finally:
            self.busy = was_busy

    def number(self, tensor: torch.Tensor) -> int:
        """Give the storage of a tensor on `meta` a number on the tape, if it has none."""
        mark = mark_of(tensor)
        if mark is None:
            mark = Mark(self.tape, self.tape.new_storage(tensor.untyped_storage().nbytes()))
            setattr(tensor.untyped_storage(), _MARK, mark)
        return mark.number

    def register(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        """Registration hook: a parameter made of real data moves to `meta`, its data to the tape."""
        if parameter is None or not _is_plain(parameter) or not parameter.is_floating_point():
            return parameter
        with self.working():
            if id(parameter) not in self._moved and not parameter.is_meta:
                moved = nn.Parameter(self.constant(parameter.detach()), requires_grad=parameter.requires_grad)
                self._moved[id(parameter)] = (parameter, moved)
            if id(parameter) in self._moved:
                parameter = self._moved[id(parameter)][1]
            self._parameters.add(self.number(parameter))
        return parameter

    def constant(self, value: torch.Tensor) -> torch.Tensor:
        """A deferred tensor with the value of a real one."""
        with without_modes():
            deferred = _on_meta(value)
            self.number(deferred)
            self._append(torch.clone, (value.detach().clone(),), {}, reads=(), covers=(), writes=(), outputs=(ref_of(deferred),))
        return deferred

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """The value of a deferred tensor at this moment."""
        with without_modes():
            return self._replay.evaluate([ref_of(tensor)])[0]

    def opaque(self, run: Callable[..., torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Record an initialiser that overwrites all of `tensor` and whose course depends on what it draws as one operation."""
        with self.working():
            if self._is_taped(tensor):
                ref, covers = ref_of(tensor), self._is_whole(tensor)
                dice, reseed = self._roll(kwargs.get("generator"))
                kwargs["generator"] = None if dice == DEFAULT else dice
                parts = {"reads": (), "covers": (ref.number,) if covers else (), "outputs": (None,), "dice": dice, "reseed": reseed}
                self._append(run, (ref, *args), kwargs, writes=(ref.number,), **parts)
                return tensor
        return run(tensor, *args, **kwargs)

    def settle(self) -> None:
        """Compute, in place, what is still alive and no parameter."""
        alive = [t for t in (r() for r in self._alive.values()) if t is not None]
        self._alive.clear()
        alive = [t for t in alive if not isinstance(t, nn.Parameter) and ref_of(t).number not in self._parameters]
        values = self._replay.evaluate([ref_of(t) for t in alive])
        while alive:
            _replace(alive.pop(), values.pop())

    # ---- one operation

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is aten.set_.source_Tensor or not all(map(_is_plain, tensors)):
            return func(*args, **kwargs)
        if not any(map(self._is_taped, tensors)):
            return self._without_deferred(func, args, kwargs, tensors)
        written = written_arguments(func, args, kwargs)
        if any(not self._is_taped(t) for t in written) or _reads_data(func, args):
            return self._for_real(func, args, kwargs)
        return self._defer(func, args, kwargs, written)

    def _without_deferred(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
        if any(t.is_meta for t in tensors):
            return func(*args, **kwargs)
        written, random = written_arguments(func, args, kwargs), draws(func)
        if not written and (random or (not tensors and (func in EMPTY or func in FILLS))):
            meta = func(
                *pytree.tree_map(_on_meta, args), **_on_device({**kwargs, "device": "cpu"} if takes(func, "device") else kwargs, "meta")
            )
            if isinstance(meta, torch.Tensor) and (meta.is_floating_point() or meta.is_complex()):
                return self._born(meta, func, args, kwargs)
        kwargs = _on_device(kwargs, "cpu") if str(kwargs.get("device")) == "meta" else kwargs
        return self._random_for_real(func, args, kwargs) if random else func(*args, **kwargs)

    def _born(self, meta: torch.Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """A deferred tensor without deferred arguments; filling it is an operation of its own, so that what overwrites it makes it dead."""
        if func not in EMPTY and func not in FILLS:
            return self._defer(func, args, kwargs, [])
        self.number(meta)
        self._alive[id(meta)] = weak(meta)
        if func in FILLS:
            fill, rest = FILLS[func](args)
            generator = {"generator": kwargs["generator"]} if kwargs.get("generator") is not None else {}
            self._defer(fill, (meta, *rest), generator, [meta])
        return meta

    def _defer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: Sequence[torch.Tensor]) -> Any:
        """Run on `meta`; record unless the result is a mere view."""
        to_meta = lambda leaf: leaf if not isinstance(leaf, torch.Tensor) or self._is_taped(leaf) else _on_meta(leaf)  # noqa: E731
        try:
            result = func(*pytree.tree_map(to_meta, args), **_on_device(pytree.tree_map(to_meta, kwargs), "meta"))
        except NotImplementedError:
            return self._for_real(func, args, kwargs)
        leaves = pytree.tree_leaves(result)
        outputs = tuple(self._new_output(leaf) for leaf in leaves)
        if func not in EMPTY and (written or any(ref is not None for ref in outputs)):
            self._record(func, args, kwargs, written, outputs, leaves)
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and id(leaf) not in given:
                self._alive[id(leaf)] = weak(leaf)
        return result

    def _record(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        written: Sequence[torch.Tensor],
        outputs: tuple[TapedView | None, ...],
        leaves: Sequence[Any],
    ) -> None:
        taped = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and self._is_taped(t)]
        blind = func in OVERWRITES or "out" in kwargs
        unread = {id(t) for t in written} if blind else set()
        reads = tuple(dict.fromkeys(ref_of(t).number for t in taped if id(t) not in unread))
        covers = tuple(ref_of(t).number for t in written if blind and self._is_whole(t))
        dice, reseed = self._roll(kwargs.get("generator")) if draws(func) else (None, None)
        kwargs = {**_on_device(kwargs, "cpu"), **({"generator": dice} if kwargs.get("generator") is not None else {})}
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))) and takes(func, "dtype"):
            kwargs["dtype"] = leaves[0].dtype  # the default dtype may be another when the tape is replayed
        args, kwargs = pytree.tree_map(self._as_argument, (args, kwargs))
        numbers = tuple(ref_of(t).number for t in written)
        self._append(func, args, kwargs, reads=reads, covers=covers, writes=numbers, outputs=outputs, dice=dice, reseed=reseed)

    def _append(self, run: Callable[..., Any], args: Any, kwargs: Any, *, writes: tuple[int, ...], **parts: Any) -> None:
        self.tape.append(TapedOp(run, args, kwargs, **{"dice": None, "reseed": None, **parts}), writes)

    def _for_real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run on the values of the deferred arguments, because the result is data, or because a real tensor is written to."""
        if any(self._is_taped(t) for t in written_arguments(func, args, kwargs)):
            raise MeshparError(f"{func} writes to a parameter and needs data to do so; build this model without mp.meta().")
        value = lambda leaf: self.value(leaf) if isinstance(leaf, torch.Tensor) and self._is_taped(leaf) else leaf  # noqa: E731
        args, kwargs = pytree.tree_map(value, (args, kwargs))
        if str(kwargs.get("device")) == "meta":
            kwargs = _on_device(kwargs, "cpu")
        return self._random_for_real(func, args, kwargs) if draws(func) else func(*args, **kwargs)

    def _random_for_real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Draw now, after everything random that was deferred."""
        dice, reseed = self._roll(kwargs.get("generator"))
        generator = {} if dice == DEFAULT else {"generator": dice}
        taped = pytree.tree_map(self._as_argument, (args, {**kwargs, **generator}))
        leaves = pytree.tree_leaves(func(*pytree.tree_map(_on_meta, args), **_on_device(pytree.tree_map(_on_meta, kwargs), "meta")))
        self._append(func, *taped, reads=(), covers=(), writes=(), outputs=(None,) * len(leaves), dice=dice, reseed=reseed)
        return self._replay.for_real(len(self.tape.ops) - 1, lambda: func(*args, **kwargs), kwargs.get("generator"))

    # ---- tensors and generators

    def _is_taped(self, tensor: torch.Tensor) -> bool:
        mark = mark_of(tensor)
        if mark is not None and mark.tape is not self.tape:
            raise MeshparError("a parameter was built in an earlier `with mp.meta():`; build the whole model in one.")
        return mark is not None

    def _is_whole(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor holds every element of its storage once."""
        order = sorted(range(tensor.ndim), key=lambda d: (tensor.stride(d), -tensor.shape[d]), reverse=True)
        return tensor.permute(order).is_contiguous() and tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()

    def _new_output(self, leaf: Any) -> TapedView | None:
        if not isinstance(leaf, torch.Tensor) or self._is_taped(leaf):
            return None
        self.number(leaf)
        return ref_of(leaf)

    def _as_argument(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return ref_of(leaf) if self._is_taped(leaf) else leaf.detach().clone()

    def _roll(self, generator: torch.Generator | None) -> tuple[Dice, torch.Tensor | None]:
        """The name of a generator, and its state if it was put in another one since the last draw."""
        state = torch.get_rng_state() if generator is None else generator.get_state()
        dice = DEFAULT
        if generator is not None:
            dice = self._dice.setdefault(id(generator), (generator, Dice(len(self._dice) + 1)))[1]
        if dice not in self._states:
            self.tape.start[dice] = self._states[dice] = state
            self._replay.states[dice] = state
        if torch.equal(state, self._states[dice]):
            return dice, None
        self._states[dice] = state
        return dice, state


class _Disguise(TorchFunctionMode):
    """Makes deferred tensors say they are on the CPU, for constructors that skip their work on `meta`."""

    def __init__(self, recorder: Taping) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._recorder.busy:
            if func == _TENSOR.device.__get__ and mark_of(args[0]) is not None:
                return torch.device("cpu")
            if func == _TENSOR.is_meta.__get__ and mark_of(args[0]) is not None:
                return False
            if func in _READ and mark_of(args[0]) is not None:
                args = (self._recorder.value(args[0]), *args[1:])
            if func == _TENSOR.data.__set__:
                args = (args[0], self._like(args[0], args[1]))
        return func(*args, **(kwargs or {}))

    def _like(self, target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`value` deferred if `target` is, real if it is not: they must match for `target.data = value`."""
        if mark_of(target) is not None and mark_of(value) is None and _is_plain(value) and not value.is_meta:
            return self._recorder.constant(value)
        if mark_of(target) is None and not target.is_meta and mark_of(value) is not None:
            return self._recorder.value(value)
        return value


def _replace(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Make whoever holds `tensor` hold `value`."""
    try:
        torch.utils.swap_tensors(tensor, value)
    except RuntimeError:  # a view of it is alive, so that torch will not: replace it where it is held
        for holder in gc.get_referrers(tensor):
            if isinstance(holder, dict):
                holder.update({key: value for key, held in holder.items() if held is tensor})
            elif isinstance(holder, list):
                holder[:] = [value if held is tensor else held for held in holder]


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided


def _reads_data(func: Any, args: tuple[Any, ...]) -> bool:
    if func is aten.index.Tensor and all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1]):
        return False
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _on_meta(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or leaf.is_meta:
        return leaf
    return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")


def _on_device(kwargs: dict[str, Any], device: str) -> dict[str, Any]:
    """The keyword arguments with another device, where one is given; other operations go where their arguments are."""
    if kwargs.get("device") is None:
        return kwargs
    return {**{k: v for k, v in kwargs.items() if k != "pin_memory"}, "device": torch.device(device)}
