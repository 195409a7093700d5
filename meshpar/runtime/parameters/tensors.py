"""Parameters, their gradients and what is computed from them: elementwise on the parts, anything else on the whole.

A DTensor answers an operator by its placements. Not all layouts are placements (see `parameters`), not all operators have a rule there, and
some rules leave pending norms that later operators refuse. A `ModelTensor` is a DTensor that knows the layout it has instead, and answers
ATen operators so that whatever an optimizer does is what it does on one device, in the original order of elements:

    elementwise         exp_avg.lerp_(grad, 0.1)       on this rank's part (also torch's foreach and fused forms); nothing is sent
    norm, sum           update.norm()                  of this rank's part, then one all-reduce of a number
    anything else       update @ update.T, mask[...]   on the gathered whole, on every rank; the result is whole, and written back if it
                                                       was written in place

A whole result next to a part (`param.add_(whole)`) is cut to the part. A view of a part is a view of a gathered copy: what is written to it
is written back, and it is gathered again if the part has changed. Random numbers are those of the first rank that holds the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from meshpar._torch import LocalTensor, OpOverload, draws, dtensor_like, is_view_operator, local_of, pytree, written_names
from meshpar.errors import ConfigError
from meshpar.ops.collectives import p_to_i
from meshpar.runtime.parameters.alike import check_alike, data_axes
from meshpar.runtime.parameters.apart import NumberApart, Origin, inside_step, joined, refuse_number, refuse_scaler
from meshpar.runtime.parameters.specs import ParameterSpec, from_true, gathered, spec_of, tells_order
from meshpar.sharding.types import Owned
from meshpar.simulate import is_simulated

_PARTS = frozenset(
    "zeros_like ones_like empty_like full_like _to_copy detach alias copy_ zero_ fill_ masked_fill masked_fill_ lift_fresh fill".split()
)
"""Operators that work on every element alone and are not tagged so by torch."""
_NEW = frozenset("new_zeros new_ones new_empty new_full new_empty_strided".split())
_ELEMENTS = frozenset("select index slice unbind view reshape squeeze _unsafe_view as_strided expand permute t transpose narrow".split())
"""Operators that hand out elements as they are: one element is no number of the whole."""
_SCALER = "_amp_foreach_non_finite_check_and_unscale_"
_ANSWERS = frozenset("equal allclose".split())
_GRAD: Any = torch.Tensor.grad
_DATA: Any = torch.Tensor.data


class ModelTensor(DTensor):
    """A parameter of a parallel model, its gradient, or what was computed from them."""

    _origin: Origin
    _whole: bool
    """Whether every rank holds all of it, in the original order; else it is laid out like its parameter."""
    _source: tuple[ModelTensor, torch.Tensor, int] | None = None
    """For a view of a part: the part, the gathered copy that this is a view of, and the part's version then."""

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})

    @property
    def grad(self) -> torch.Tensor | None:
        """The gradient; whoever put it there (FSDP2, autograd, the user), it knows where it comes from."""
        return _known(_GRAD.__get__(self), self)

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        _GRAD.__set__(self, _known(value, self))  # (before autograd adds to it, which does not ask here)

    @grad.deleter
    def grad(self) -> None:
        _GRAD.__delete__(self)

    @property
    def data(self) -> torch.Tensor:
        """This tensor outside of autograd. Assigning copies the values (torch drops them in silence for a DTensor)."""
        data: torch.Tensor = _DATA.__get__(self)
        return data

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise ConfigError(
                f"p.data = ... of shape {tuple(value.shape)} ({value.dtype}) for {self._origin}, which has {tuple(self.shape)} "
                f"({self.dtype}): the parameters of a parallel model keep shape and dtype."
            )
        with torch.no_grad():
            self.detach().copy_(value)

    def item(self) -> Any:
        """The number as Python's; in an optimizer's step one that remembers whose it is."""
        value = super().item()
        return NumberApart(value, self._origin) if self._origin.apart and isinstance(value, float) and inside_step() else value

    def full_tensor(self, *, grad_placements: Any = None) -> torch.Tensor:
        """The whole in the original order, on every rank. Collective over the ranks that hold it.

        Its gradient goes to the parameter, averaged over the data ranks (what all of them compute alike counts once).
        """
        if grad_placements is not None and not all(p.is_replicate() for p in grad_placements):
            raise ConfigError(f"full_tensor(grad_placements={grad_placements}): the gradient of {self._origin} as a whole is Replicate().")
        if torch.is_grad_enabled() and self.requires_grad:
            found: torch.Tensor = _Full.apply(self)
            return found
        return _whole_of(self).detach().clone()

    def redistribute(self, *args: Any, **kwargs: Any) -> DTensor:
        """As DTensor's, where the placements say how the tensor is laid out. Raises ConfigError where they cannot."""
        if not self._whole and self._origin.spec is not None and not tells_order(self, self._origin.spec):
            raise ConfigError(
                f"the layout of {self._origin} is none that torch can move to another: take mp.full_tensor(p) or mp.full_grad(p)."
            )
        moved = super().redistribute(*args, **kwargs)
        return become(moved, self._origin, whole=True) if all(p.is_replicate() for p in moved.placements) else moved

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dtensor_like(local_of(self), self).__reduce_ex__(protocol)


def become(tensor: DTensor, origin: Origin, *, whole: bool = False) -> ModelTensor:
    """Make a DTensor, itself and no copy, one that knows its layout."""
    tensor.__class__ = ModelTensor
    assert isinstance(tensor, ModelTensor)
    tensor._origin, tensor._whole = origin, whole
    return tensor


def adopt(module: nn.Module, specs: Mapping[str, ParameterSpec], *, apart: bool) -> None:
    """Make the parameters of `module` ModelTensors. `apart`: other ranks hold parameters that this one has not.

    Its modules remember them as their `_own`: FSDP2 puts gathered ones in their place from forward to backward.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor) and name in specs:
            become(parameter, Origin(frozenset((name,)), specs[name], apart))
    for part in module.modules():
        part.__dict__["_own"] = dict(part._parameters)


def _known(grad: torch.Tensor | None, parameter: ModelTensor) -> torch.Tensor | None:
    """The gradient of a parameter, itself, which knows its layout from now on, and is laid out as the parameter is.

    What a loop computed from the whole of a parameter has a gradient that is whole; whatever adds to it next (FSDP2, a step) adds parts.
    """
    if type(grad) is DTensor and (alike := _laid_like(grad, parameter)) is not None:
        become(grad, parameter._origin, whole=not alike)
    if type(grad) is ModelTensor and grad._whole and grad.shape == parameter.shape and not _is_replicated(parameter):
        part = _wrapped_part(_cut(local_of(grad), parameter), parameter, parameter._origin)
        grad._local_tensor, grad._spec = part._local_tensor, part._spec
        grad._origin, grad._whole, grad._source = parameter._origin, False, None
    return grad


class _ToLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> torch.Tensor:
        ctx.parameter = parameter
        return local_of(parameter).view_as(local_of(parameter))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        made = dtensor_like(grad, ctx.parameter)
        return _known(made, ctx.parameter) if isinstance(ctx.parameter, ModelTensor) else made  # type: ignore[return-value]


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: ModelTensor) -> torch.Tensor:
        ctx.tensor = tensor
        return _whole_of(tensor).detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        tensor: ModelTensor = ctx.tensor
        for one in data_axes(tensor.device_mesh):
            grad = p_to_i(grad, group=one.group, size=one.size, rank=one.rank) / one.size
        if tensor._whole:
            return _wrapped_whole(grad, tensor, tensor._origin)
        return _wrapped_part(_cut(grad, tensor), tensor, tensor._origin)


def local_with_gradient(parameter: DTensor) -> torch.Tensor:
    """As `to_local`, with a gradient that knows its layout, before autograd adds to it what was computed from the whole."""
    found: torch.Tensor = _ToLocal.apply(parameter)
    return found


def of_parameter(tensor: DTensor, parameter: torch.Tensor) -> DTensor:
    """A tensor of a parameter's state (`tensor` itself): it knows its layout if the parameter does."""
    if isinstance(parameter, ModelTensor) and (alike := _laid_like(tensor, parameter)) is not None:
        return become(tensor, parameter._origin, whole=not alike)
    return tensor


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor came from an operator on whole values: every rank holds all of it, in the original order."""
    return isinstance(tensor, ModelTensor) and tensor._whole


# ---- answering operators ---------------------------------------------------------------------------------------------------------------


def _run(func: OpOverload, args: Any, kwargs: Any) -> Any:
    if torch.is_grad_enabled():
        check_alike(func, args, kwargs)
    name, kind = _kind(func)
    if kind == "lists":
        return _lists(func, name, args, kwargs)
    if kind == "parts" and (quick := _on_parts_of_one(func, args, kwargs)) is not None:
        return quick
    found = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, DTensor)]
    origin = joined([t._origin for t in found if isinstance(t, ModelTensor)])
    if kind == "scaler":
        refuse_scaler(origin)
    like = next((t for t in found if isinstance(t, ModelTensor) and not t._whole), None)
    if kind == "new":
        result = _wrapped_whole(func(*_swap(args, local_of), **_swap(kwargs, local_of)), found[0], origin)
    elif kind == "parts" and like is not None and _fit(func, found, like, args, kwargs):
        result = _on_parts(func, args, kwargs, like, origin)
    elif kind == "sums" and like is not None and like.dtype.itemsize >= 4 and _adds_up(func, args, kwargs):
        result = _summed(func, args, kwargs, like, origin)
    else:
        result = _on_whole(func, args, kwargs, found, origin)
    if origin.apart:
        _check(name, kind, found, origin, result)
    return result


@cache
def _kind(func: OpOverload) -> tuple[str, str]:
    """The operator's name, and how it is answered."""
    name = func.overloadpacket.__name__
    if name == _SCALER:
        return name, "scaler"
    if name.startswith(("_foreach_", "_fused_")):
        return name, "lists"
    if name in _NEW:
        return name, "new"
    if name in ("linalg_vector_norm", "sum"):
        return name, "sums"
    elementwise = name in _PARTS or (torch.Tag.pointwise in func.tags and name not in _ANSWERS)  # (torch tags `equal` so)
    return name, "parts" if elementwise else "whole"


def _check(name: str, kind: str, found: Sequence[DTensor], origin: Origin, result: Any) -> None:
    """Refuse a number that is not that of one parameter, and outside of an optimizer's step any number."""
    answers, made = name in _ANSWERS, [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    numbers = answers or name == "_local_scalar_dense" or any(t.ndim == 0 for t in made)
    if numbers and len(origin.names) > 1 and name not in _ELEMENTS and name != "copy_":
        refuse_number(name, origin)
    several = any(t.numel() > 1 for t in found) and any(t.numel() == 1 for t in made)
    reduces = (answers or kind == "sums" or several) and name not in _ELEMENTS and kind != "new"
    if reduces and (answers or any(t.numel() == 1 for t in made)) and not inside_step():
        refuse_number(name, origin)


def _fit(func: OpOverload, found: Sequence[DTensor], like: ModelTensor, args: Any, kwargs: Any) -> bool:
    """Whether an elementwise operator gives something laid out as `like`, and every other operand can be brought to that."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    plain = [t for t in tensors if not isinstance(t, DTensor) and t.numel() != 1]
    if plain:
        raise ConfigError(
            f"{func.overloadpacket.__name__} of {like._origin}, a DTensor of shape {tuple(like.shape)}, with a plain tensor of shape "
            f"{tuple(plain[0].shape)}: make it from the parameter (torch.zeros_like(p), torch.randn_like(p), p.new_tensor)."
        )
    if torch.broadcast_shapes(*(t.shape for t in tensors)) != like.shape:
        return False
    written = _written(func, args, kwargs)
    return all(_alike(t, like) or _is_replicated(t) for t in found) and all(_alike(t, like) for t in written)


def _alike(tensor: DTensor, like: DTensor) -> bool:
    """Whether a tensor is laid out as `like`."""
    if isinstance(tensor, ModelTensor) and tensor._whole:
        return False
    same = tensor.shape == like.shape and tensor.placements == like.placements and tensor.device_mesh == like.device_mesh
    return same and (not isinstance(tensor, ModelTensor) or not isinstance(like, ModelTensor) or _same_layout(tensor._origin, like._origin))


def _same_layout(one: Origin, other: Origin) -> bool:
    if one is other or one.spec is other.spec:
        return True
    return one.spec is not None and other.spec is not None and one.spec.shards() == other.spec.shards()


def _is_replicated(tensor: DTensor) -> bool:
    return (isinstance(tensor, ModelTensor) and tensor._whole) or all(p.is_replicate() for p in tensor.placements)


def _laid_like(tensor: DTensor, like: ModelTensor) -> bool | None:
    """Whether a plain DTensor is laid out as `like`; False if it is whole, None if it is neither."""
    if tensor.shape == like.shape and tensor.placements == like.placements:
        return True
    return False if all(p.is_replicate() for p in tensor.placements) else None


def _on_parts_of_one(func: OpOverload, args: Any, kwargs: Any) -> ModelTensor | None:
    """The common case, at little cost: an elementwise operator on parts of one parameter, its gradient and its state."""
    like: ModelTensor | None = None
    given = []
    for arg in args:
        if type(arg) is ModelTensor:
            like = arg if like is None else like
            alike = arg._origin is like._origin and (arg._spec is like._spec or _same_cut(arg._spec, like._spec))
            if arg._whole or not alike:
                return None
            arg = local_of(arg)
        elif isinstance(arg, (list, tuple)) or (isinstance(arg, torch.Tensor) and (isinstance(arg, DTensor) or arg.numel() != 1)):
            return None
        given.append(arg)
    writes = written_names(func)
    if like is None or len(func._schema.returns) != 1 or writes not in ((), ("self",)) or (writes and type(args[0]) is not ModelTensor):
        return None
    if any(isinstance(value, torch.Tensor) for value in kwargs.values()):
        return None
    result = func(*given, **kwargs)
    if writes:
        return args[0]
    return _wrapped_part(result, like, like._origin) if result.shape == local_of(like).shape else None


def _same_cut(one: Any, other: Any) -> bool:
    return one.placements == other.placements and one.shape == other.shape and one.mesh is other.mesh


def _on_parts(func: OpOverload, args: Any, kwargs: Any, like: ModelTensor, origin: Origin) -> Any:
    """An elementwise operator, on this rank's part alone."""
    result = func(*_swap(args, lambda t: _part(t, like)), **_swap(kwargs, lambda t: _part(t, like)))
    written = _written(func, args, kwargs)
    return written[0] if written else pytree.tree_map_only(torch.Tensor, lambda t: _wrapped_part(t, like, origin), result)


def _part(tensor: DTensor, like: ModelTensor) -> torch.Tensor:
    if _alike(tensor, like):
        return local_of(tensor)
    value = _whole_of(tensor)
    return value if value.numel() == 1 else _cut(value.expand(like.shape), like)


def _cut(value: torch.Tensor, like: ModelTensor) -> torch.Tensor:
    """This rank's part of a whole tensor."""
    spec = like._origin.spec
    assert spec is not None
    return local_of(from_true(value, spec, like))


def _wrapped_part(local: torch.Tensor, like: ModelTensor, origin: Origin) -> ModelTensor:
    if local.dtype == like.dtype:
        made = dtensor_like(local, like)
    else:
        made = DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
    return become(made, origin.laid_out(like._origin))


def _summed(func: OpOverload, args: Any, kwargs: Any, like: ModelTensor, origin: Origin) -> ModelTensor:
    """A norm or a sum over all elements: that of the parts, brought together."""
    local = local_of(like)
    filled = local if local.numel() else local.new_zeros((1,) * local.ndim)  # an empty part adds nothing, and has no largest element
    plain = dtensor_like(filled, like)
    found = func(*_swap(args, lambda t: plain), **kwargs)
    whole = found.redistribute(placements=[Replicate()] * found.device_mesh.ndim)
    return become(whole, origin, whole=True)


def _adds_up(func: OpOverload, args: Any, kwargs: Any) -> bool:
    """Whether a norm or a sum is over all dims, and one to which zeros add nothing."""
    tensor = args[0]
    if func.overloadpacket is torch.ops.aten.linalg_vector_norm and kwargs.get("ord", args[1] if len(args) > 1 else 2) < 0:
        return False
    dim = kwargs.get("dim", args[2] if len(args) > 2 else args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else None)
    return dim is None or len({d % max(tensor.ndim, 1) for d in dim}) == tensor.ndim


def _on_whole(func: OpOverload, args: Any, kwargs: Any, found: Sequence[DTensor], origin: Origin) -> Any:
    """An operator on the gathered values of all its operands, in the original order; what it writes is written back."""
    values = {id(t): _whole_of(t) for t in found}
    result = func(*_swap(args, lambda t: values[id(t)]), **_swap(kwargs, lambda t: values[id(t)]))
    written = _written(func, args, kwargs)
    if draws(func):
        drawn = [values[id(t)] for t in written] or [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        for value in drawn:
            _from_first(value, next(t for t in found if isinstance(t, ModelTensor)))
    for tensor in written:
        _write_back(tensor, values[id(tensor)])
    if written:
        return written[0]
    made = pytree.tree_map_only(torch.Tensor, lambda t: _wrapped_whole(t, found[0], origin), result)
    if is_view_operator(func) and isinstance(found[0], ModelTensor):
        _remember(made, found[0], values[id(found[0])])
    return made


def _whole_of(tensor: DTensor) -> torch.Tensor:
    """All of a tensor, in the original order."""
    if not isinstance(tensor, ModelTensor):
        return local_of(tensor) if _is_replicated(tensor) else tensor.full_tensor()
    if not tensor._whole:
        return gathered(tensor, tensor._origin.spec)
    if tensor._source is not None:
        part, copy, version = tensor._source
        if part._version != version:
            copy.copy_(_whole_of(part))
            tensor._source = (part, copy, part._version)
    return local_of(tensor)


def _write_back(tensor: DTensor, value: torch.Tensor) -> None:
    if isinstance(tensor, ModelTensor) and not tensor._whole:
        local_of(tensor).copy_(_cut(value, tensor))
    elif isinstance(tensor, ModelTensor) and tensor._source is not None:
        part, copy, _ = tensor._source
        local_of(part).copy_(_cut(copy, part))
    elif not _is_replicated(tensor):  # (one of the user's own, laid out as its placements say)
        local_of(tensor).copy_(local_of(distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)))


def _remember(made: Any, source: ModelTensor, value: torch.Tensor) -> None:
    """Views know the part they look at."""
    base = source._source or ((source, value, source._version) if not source._whole else None)
    for view in pytree.tree_leaves(made):
        if isinstance(view, ModelTensor):
            view._source = base


def _wrapped_whole(value: torch.Tensor, like: DTensor, origin: Origin) -> ModelTensor:
    mesh = like.device_mesh
    made = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False, shape=value.shape, stride=value.stride())
    return become(made, origin, whole=True)


def _from_first(value: torch.Tensor, like: ModelTensor) -> None:
    """What the first rank drew, on all that hold the tensor."""
    if is_simulated() or isinstance(value, LocalTensor):
        return
    spec = like._origin.spec or spec_of(like)
    for name in like.device_mesh.mesh_dim_names or ():
        if like.device_mesh[name].size() > 1 and not (spec and isinstance(spec.placements.get(name), Owned)):
            dist.broadcast(value, group=like.device_mesh.get_group(name), group_src=0)


# ---- lists of tensors --------------------------------------------------------------------------------------------------------------------


def _lists(func: OpOverload, name: str, args: Any, kwargs: Any) -> Any:
    """torch's foreach and fused operators, on the parts of every position; those that make numbers, one tensor after the other."""
    if name in _NUMBERS:
        return tuple(_NUMBERS[name](tensor, *args[1:], **kwargs) for tensor in args[0])
    written = _written(func, args, kwargs)
    lists = [item for item in (*args, *kwargs.values()) if isinstance(item, (list, tuple))]
    leads = [_lead([one[i] for one in lists if i < len(one)], written) for i in range(len(args[0]))]
    values: dict[int, torch.Tensor] = {}

    def parts(item: Any) -> Any:
        if isinstance(item, (list, tuple)):
            return [_part_at(tensor, lead, values) for tensor, lead in zip(item, leads, strict=False)]  # fused ones take empty lists too
        return _whole_of(item) if isinstance(item, DTensor) else item

    result = func(*(parts(item) for item in args), **{key: parts(item) for key, item in kwargs.items()})
    for tensor in written:
        if values[id(tensor)] is not local_of(tensor):
            _write_back(tensor, values[id(tensor)])
    if result is None:
        return None
    return args[0] if written else tuple(_wrapped_at(value, lead) for value, lead in zip(result, leads, strict=True))


def _lead(tensors: Sequence[Any], written: Sequence[torch.Tensor]) -> DTensor | None:
    """What says how the tensors of one position are laid out: as parts, unless something whole is written."""
    known = [t for t in tensors if isinstance(t, ModelTensor)]
    whole = (t for t in known if t._whole and any(t is other for other in written))
    parts = (t for t in known if not t._whole)
    return next(iter((*whole, *parts, *known, *(t for t in tensors if isinstance(t, DTensor)))), None)


def _part_at(tensor: Any, lead: DTensor | None, values: dict[int, torch.Tensor]) -> Any:
    if not isinstance(tensor, DTensor) or lead is None:
        return tensor
    if not isinstance(lead, ModelTensor):
        value = local_of(tensor)
    else:
        value = _whole_of(tensor) if lead._whole else _part(tensor, lead)
    values[id(tensor)] = value
    return value


def _wrapped_at(value: torch.Tensor, lead: DTensor | None) -> torch.Tensor:
    if isinstance(lead, ModelTensor):
        return _wrapped_whole(value, lead, lead._origin) if lead._whole else _wrapped_part(value, lead, lead._origin)
    return value if lead is None else dtensor_like(value, lead)


_NUMBERS: Mapping[str, Callable[..., torch.Tensor]] = {
    "_foreach_norm": lambda tensor, ord=2, dtype=None: torch.linalg.vector_norm(tensor, ord, dtype=dtype),
    "_foreach_max": lambda tensor: tensor.max(),
}


def _swap(given: Any, change: Callable[[Any], Any]) -> Any:
    return pytree.tree_map_only(DTensor, change, given)


def _written(func: OpOverload, args: Any, kwargs: Any) -> list[DTensor]:
    """The DTensors that an operator writes to, as they were given."""
    names = written_names(func)
    if not names:
        return []
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    return [leaf for name in names for leaf in pytree.tree_leaves(given.get(name)) if isinstance(leaf, DTensor)]
