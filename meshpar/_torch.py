"""The only file that imports private torch names: each with the release it was seen in and the public thing we wait for."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from traceback import FrameSummary, StackSummary
from types import ClassMethodDescriptorType, FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import sympy  # which torch's expressions are made of
import torch
import torch.distributed._functional_collectives  # torch 2.13; registers the functional collectives' shapes for fake and meta tensors
from torch import _C, nn
from torch import _fused_sdp_choice as chosen_attention  # torch 2.13; which kernel attention takes, wait for a public name
from torch._C import _set_grad_enabled as set_grad_enabled  # torch 2.13; what export sees of torch.no_grad
from torch._dispatch.python import enable_python_dispatcher  # torch 2.13; without it, operators in C++ ask for numbers
from torch._dynamo.source import ConstantSource
from torch._export.utils import (  # torch 2.13; which operators export writes out
    _check_valid_to_preserve,
    _is_cia_op,
    _is_preservable_cia_op,
)
from torch._ops import (
    OpOverload,  # torch 2.13; the type of an ATen operator in a graph, wait for a public name
    mode_stack_state_for_pre_dispatch,  # torch 2.13; the trace of an export under way, wait for a public way out of it
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # torch 2.13; wait for a public way to make tensors without memory
from torch.amp import _enter_autocast as enter_autocast  # torch 2.13; what export writes for torch.autocast, wait for a public one
from torch.amp import _exit_autocast as exit_autocast
from torch.autograd import _make_grads
from torch.autograd.graph import _engine_run_backward
from torch.distributed import _local_tensor  # torch 2.13; the states of generators, wait for a public simulation of ranks in one process
from torch.distributed._composable.contract import REGISTRY_KEY as COMPOSED  # torch 2.13; where fully_shard looks, wait for a public hook
from torch.distributed._local_tensor import (  # torch 2.13; wait for a public simulation of ranks in one process
    LocalTensor,
    LocalTensorMode,
    enabled_local_tensor_mode,
    local_tensor_mode,
    maybe_disable_local_tensor_mode,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupMember, GroupName, ProcessGroup, Store, _get_default_store, _resolve_process_group
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (  # torch 2.13; wait for public names of what `set_custom_...` take
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import (
    _StridedShard as StridedShard,  # torch 2.13; wait for a public placement of equal stretches
)
from torch.export import _trace as export_trace
from torch.export import exported_program  # torch 2.13; wait for decompositions that touch only what a program calls
from torch.fx import Node, _symbolic_trace
from torch.fx import graph as fx_graph
from torch.fx import proxy as fx_proxy
from torch.fx._lazy_graph_module import _use_lazy_graph_module  # torch 2.13; wait for graphs that are compiled when they are called
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv  # torch 2.13; see SizeSymbols
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # torch 2.13; what update_bn looks for, wait for a public name
from torch.testing._internal.distributed.fake_pg import FakeStore  # torch 2.13; the store of the "fake" backend, wait for a public one
from torch.utils import _pytree as pytree  # torch 2.13; wait for public pytrees
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import (
    TorchDispatchMode,  # torch 2.13; wait for public dispatch modes
    return_and_correct_aliasing,  # torch 2.13; wait for subclasses of tensors without it
)
from torch.utils._python_dispatch import (
    _disable_current_modes as without_modes,  # torch 2.13; export needs it inside simulated ranks; wait for a public way out of modes
)

# torch 2.13; wait for functional collectives whose autograd registration costs nothing when it is not used
below_autograd = _C._AutoDispatchBelowAutograd

grouped_mm = torch._grouped_mm  # torch 2.13; what F.grouped_mm calls, and what a TorchFunctionMode sees of it

functional = torch.ops._c10d_functional  # torch 2.13; wait for public functional collectives


def is_composite(operator: OpOverload) -> bool:
    """Whether an operator is nothing but calls of others (torch 2.13)."""
    return bool(_is_cia_op(operator))


@cache
def is_written_out(operator: OpOverload) -> bool:
    """Whether a functional program has no such calls: composite ones that may return their operand, or a view of it (torch 2.13)."""
    return is_composite(operator) and not _check_valid_to_preserve(operator)


@contextmanager
def only_composites(called: Collection[OpOverload]) -> Iterator[None]:
    """Inside, `run_decompositions` prepares only these composite operators to stay whole: to prepare all 500 of them, at six dispatch keys
    each, costs twice as much as the trace of a small model (torch 2.13)."""
    with patch.object(exported_program, "_collect_all_valid_cia_ops", lambda: {one for one in called if _is_preservable_cia_op(one)}):
        yield


@contextmanager
def without_dumps() -> Iterator[None]:
    """Inside, `torch.export` does not print the graph as far as it came when a forward asked what depends on data (torch 2.13)."""
    with patch.object(export_trace, "print", lambda *_, **__: None, create=True):
        yield


class _Forwards:
    """In place of torch's record of a stack: the frames that a trace keeps of it, without reading their lines of source."""

    def __init__(self, innermost: FrameType) -> None:
        self._innermost = innermost

    @classmethod
    def extract(cls) -> _Forwards:
        return cls(sys._getframe(1))

    def summary(self) -> StackSummary:
        """Those that are called forward, outermost first."""
        found = []
        frame: FrameType | None = self._innermost
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward":
                found.append(FrameSummary(code.co_filename, frame.f_lineno, code.co_name, lookup_line=False, line=""))
            frame = frame.f_back
        return StackSummary.from_list(reversed(found))


class _NoLeaves:
    """torch's pytrees, of which `tree_iter` finds nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pytree, name)

    def tree_iter(self, tree: Any) -> Iterator[Any]:
        return iter(())


@contextmanager
def quick_nodes() -> Iterator[None]:
    """Inside, the arguments of a new node are not searched for symbolic numbers, to warn of: half of what a node costs (torch 2.13)."""
    with patch.object(fx_graph, "pytree", _NoLeaves()):
        yield


@contextmanager
def quick_traces() -> Iterator[None]:
    """Inside, traces read no source for the stacks that their nodes note, and graphs on the way are not compiled: a fifth of an export.

    (torch 2.13 looks up and reads the line of every frame of the stack, for each node; wait for a way to ask for the frames alone.)
    """
    with patch.object(fx_proxy, "CapturedTraceback", _Forwards), _use_lazy_graph_module(True), quick_nodes():
        yield


def resolve_process_group(name: str) -> ProcessGroup:
    """The process group called `name` (torch 2.13; wait for a public look-up by name)."""
    return _resolve_process_group(GroupName(name))


def simulated_generators(mode: LocalTensorMode) -> dict[int, tuple[torch.Tensor, dict[int, torch.Tensor]]]:
    """Rank -> the states of its CPU and device generators, to read and write (torch 2.13; wait for a public simulation of ranks)."""
    return mode._per_rank_rng_states


def default_states() -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The states of the default generators, as simulated ranks keep them (torch 2.13; as above)."""
    return _local_tensor._get_rng_state()


def put_default_states(states: tuple[torch.Tensor, dict[int, torch.Tensor]]) -> None:
    """Put the default generators into these states (torch 2.13; as above)."""
    _local_tensor._set_rng_state(*states)


@contextmanager
def states_from_generators() -> Iterator[None]:
    """Inside, simulated ranks ask the default generators for their states, not `torch.get_rng_state`, which may be ours (torch 2.13)."""
    before = _local_tensor._get_rng_state, _local_tensor._set_rng_state

    def get() -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        return torch.default_generator.get_state(), _local_tensor._collect_accelerator_rng_states()

    def put(cpu_state: torch.Tensor, accelerator_states: dict[int, torch.Tensor]) -> None:
        torch.default_generator.set_state(cpu_state)
        _local_tensor._set_accelerator_rng_states(accelerator_states)

    _local_tensor._get_rng_state, _local_tensor._set_rng_state = get, put
    try:
        yield
    finally:
        _local_tensor._get_rng_state, _local_tensor._set_rng_state = before


_LAYOUT: Mapping[Any, Callable[[torch.Tensor], Any]] = {
    torch.ops.aten.sym_stride.default: lambda tensor: list(tensor.stride()),
    torch.ops.aten.sym_storage_offset.default: torch.Tensor.storage_offset,
}


def _layout(func: Any, tensor: LocalTensor) -> Any:
    """Where a tensor of simulated ranks lies, or how large it is; NotImplemented for other questions."""
    if func is torch.ops.aten.sym_size.default:
        return tuple(tensor._size)
    if func in _LAYOUT:
        return _local_tensor._combine_rank_results({r: _LAYOUT[func](t) for r, t in tensor._local_tensors.items()}, None)
    return NotImplemented


@contextmanager
def layouts_at_once() -> Iterator[None]:
    """Inside, simulated ranks answer at once where a view lies: C++ asks for it thrice a view, and torch runs each question in a new mode,
    which costs four fifths of the view; and tensors that lie alike on all ranks are asked once how they do (torch 2.13)."""
    original = vars(LocalTensor)["__torch_dispatch__"]
    of_ranks = _local_tensor._compute_local_tensor_meta

    def dispatch(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _layout(func, args[0]) if len(args) == 1 else NotImplemented
        return original.__func__(cls, func, types, args, kwargs) if found is NotImplemented else found

    def layout(tensors: dict[int, torch.Tensor]) -> Any:
        (rank, first), *others = tensors.items()
        return of_ranks({rank: first} if all(_lie_alike(first, one) for _, one in others) else tensors)

    with patch.object(_local_tensor, "_compute_local_tensor_meta", layout):
        LocalTensor.__torch_dispatch__ = classmethod(dispatch)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            LocalTensor.__torch_dispatch__ = original  # type: ignore[method-assign]


def _lie_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    kinds = a.dtype == b.dtype and a.layout == b.layout and a.is_conj() == b.is_conj() and a.is_neg() == b.is_neg()
    return kinds and a.shape == b.shape and a.stride() == b.stride()


def on_simulated_ranks(mode: LocalTensorMode, func: OpOverload, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What `mode` makes of a call, for those that most calls are; NotImplemented for the others, which are torch's own to answer.

    torch flattens the arguments of every call four times, asks thrice where they lie, and takes and puts the generators' states for every
    rank: of 150 us a call, 3 are the operator's. Most calls draw nothing, and have tensors and lists of tensors alone.
    (torch 2.13; wait for a simulation of ranks that is as quick.)
    """
    if not types:  # tensors that all ranks share
        return func(*args, **kwargs) if mode._disable or any(isinstance(one, torch.Tensor) for one in args) else NotImplemented
    if any(one is not LocalTensor for one in types):
        return NotImplemented
    if len(args) == 1 and (found := _layout(func, args[0])) is not NotImplemented:
        return found
    if mode._disable or not (_is_alike(func) or (_is_in_place(func) and type(args[0]) is LocalTensor)):
        return NotImplemented
    results = {}
    for rank in sorted(mode.ranks):
        own = [_own(one, rank) for one in args]
        named = {name: _own(one, rank) for name, one in kwargs.items()}
        results[rank] = func(*own, **named)
    if _is_in_place(func):
        return args[0]
    combined = _local_tensor._combine_rank_results(results, None)
    return combined if _is_new(func) else return_and_correct_aliasing(func, tuple(args), kwargs, combined)


def _own(value: Any, rank: int) -> Any:
    if type(value) is LocalTensor:
        return value._local_tensors[rank]
    if type(value) in (list, tuple):
        return type(value)(_own(one, rank) for one in value)
    return _local_tensor._map_to_rank_local_val(value, rank) if isinstance(value, torch.SymInt) else value


@cache
def _is_alike(func: OpOverload) -> bool:
    """Whether every rank's result is the operator's own of that rank's arguments, and of nothing else."""
    odd = func in (torch.ops.aten.hash_tensor.default, torch.ops.aten.split.Tensor)  # (of empty tensors, and of short ones)
    return _draws_nothing(func) and bool(func._schema.returns) and not (odd or func._schema.is_mutable)


@cache
def _is_in_place(func: OpOverload) -> bool:
    """Whether it writes its first argument, in the place where that lies, and returns it."""
    written = [one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments]
    alone = written[:1] == [True] and not any(written[1:]) and len(func._schema.returns) == 1
    return alone and func._schema.name.endswith("_") and _draws_nothing(func) and torch.Tag.inplace_view not in func.tags


def _draws_nothing(func: OpOverload) -> bool:
    return func.namespace == "aten" and torch.Tag.nondeterministic_seeded not in func.tags


@cache
def _is_new(func: OpOverload) -> bool:
    return all(one.alias_info is None for one in (*func._schema.arguments, *func._schema.returns))


def generator_key(generator: torch.Generator) -> int:
    """What tells generators apart: operators are handed other Python objects for one and the same (torch 2.13; wait for `==`)."""
    return generator._cdata  # type: ignore[attr-defined]


@contextmanager
def as_one_process() -> Iterator[None]:
    """Inside, torch.distributed looks as it does in a program of one process: not initialized, however its functions were imported."""
    world: Any = GroupMember
    before, world.WORLD = world.WORLD, None
    try:
        yield
    finally:
        world.WORLD = before


def default_store() -> Store:
    """The store through which the job's processes found each other (torch 2.13; wait for a public accessor)."""
    return _get_default_store()


def clone_store(store: Store) -> Store:
    """A connection of its own to the same store, for another thread (torch 2.13; wait for it in the type stubs)."""
    return store.clone()  # type: ignore[attr-defined]


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The one-dimensional mesh over all axes of `mesh` (torch 2.13; wait for a public DeviceMesh.flatten)."""
    return mesh._flatten(name)


def alone(mesh: DeviceMesh, axis: str, name: str) -> DeviceMesh:
    """The mesh of this rank alone, with one axis called `name`, as a slice of the one-dimensional `mesh` (torch 2.13)."""
    return mesh._unflatten(0, (mesh.size(), 1), (axis, name))[name]


def overwrites(target: Any) -> bool:
    """Whether an operator changes one of its arguments, by its schema (torch 2.13; wait for a public way to ask)."""
    return isinstance(target, OpOverload) and bool(target._schema.is_mutable)


def draws(target: object) -> bool:
    """Whether an operator draws random numbers (torch 2.13: OpOverload is private by its module's name only)."""
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that `mesh` is a slice of, or itself (torch 2.13; wait for a public DeviceMesh.root)."""
    return mesh._get_root_mesh()


def local_of(tensor: DTensor) -> torch.Tensor:
    """The local tensor of a DTensor, outside autograd (torch 2.13; `DTensor.to_local` is 10 times slower)."""
    return tensor._local_tensor


def part_here(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: the local part of a DTensor, outside autograd; all of any other."""
    return local_of(tensor) if isinstance(tensor, DTensor) else tensor


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd knows `tensor` as a view of another one (torch 2.13; wait for a public question)."""
    return tensor._is_view()


def as_parameter(tensor: DTensor, requires_grad: bool) -> nn.Parameter:
    """`tensor` itself as a parameter (torch 2.13).

    `nn.Parameter(tensor)` detaches, and a cache of DTensor's dispatch may answer that with an equal mesh that is another object, even of an
    earlier process group, which FSDP2 refuses.
    """
    tensor.requires_grad_(requires_grad)
    tensor._is_param = True
    return tensor  # type: ignore[return-value]


def forget_meshes() -> None:
    """Let DTensor forget what it has worked out so far.

    torch 2.13: it answers with the mesh it saw first among equal ones, which may belong to a process group that is gone; wait for meshes
    that differ when their groups do.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def dtensor_like(local: torch.Tensor, like: DTensor) -> DTensor:
    """A DTensor of `local` with the layout of `like`, outside autograd (torch 2.13; `DTensor.from_local` takes 70 us, this 2)."""
    return DTensor.__new__(DTensor, local, like._spec, requires_grad=False)


def amp_unscale(grads: list[torch.Tensor], found_inf: torch.Tensor, inv_scale: torch.Tensor) -> None:
    """Multiply gradients of one dtype by `inv_scale`, noting in `found_inf` if one is not finite (torch 2.13; what GradScaler calls)."""
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)


def mesh_info(mesh: DeviceMesh, dims: Any) -> Any:
    """What FSDP2 knows of the axes over which it shares parameters out (torch 2.13; wait for a public way to give some others)."""
    from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info_from_named_dims

    return _get_mesh_info_from_named_dims(mesh, dims)


def shard_over(info: Any, dim: int) -> Any:
    """FSDP2's word for a parameter to be shared out over other axes than the rest of its unit (torch 2.13; wait for a public one)."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
    from torch.distributed.tensor import Shard

    return ShardPlacementResult(placement=Shard(dim), mesh_info=info)


def reduce_gradients(root: nn.Module) -> None:
    """Let FSDP2 sum the gradients that the units of `root` have gathered, outside of backward (torch 2.13; wait for a public call)."""
    from torch.distributed.fsdp import fully_shard

    for group in _unit_groups(root):
        group.post_backward()
    fully_shard.state(root)._root_post_backward_final_callback()  # type: ignore[attr-defined]


def accumulate_gradients(root: nn.Module) -> None:
    """Let FSDP2 add gradients that came outside of backward to those it keeps, in the dtype it sums in (torch 2.13; as above)."""
    for group in _unit_groups(root):
        for parameter in group.fsdp_params:
            if hasattr(parameter, "_unsharded_param"):
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


def groups_of(unit: nn.Module) -> list[Any]:
    """What FSDP2 gathers and sums together of a unit (torch 2.13; wait for a public call)."""
    from torch.distributed.fsdp import fully_shard

    return list(fully_shard.state(unit)._fsdp_param_groups)  # type: ignore[attr-defined]


def in_backward() -> bool:
    """Whether this thread runs a backward (torch 2.13; wait for a public question)."""
    return _C._current_graph_task_id() != -1


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run `callback` before the backward that is running returns (torch 2.13; wait for a public way)."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def forget_step(root: Any) -> bool:
    """Let FSDP2 forget a step that raised, and gradients that it had not summed yet; False where it cannot (before torch 2.13)."""
    if not hasattr(root, "reset_iter_state"):
        return False
    root.reset_iter_state()
    for parameter in (p for group in _unit_groups(root) for p in group.fsdp_params):
        parameter.unsharded_accumulated_grad = None
        if (gathered := getattr(parameter, "_unsharded_param", None)) is not None:
            gathered.grad = None
    return True


def is_unfinished(root: Any) -> bool:
    """Whether a forward or a backward of FSDP2 began and did not end: one that raised, where none is under way (torch 2.13)."""
    from torch.distributed.fsdp import fully_shard

    context = fully_shard.state(root)._state_ctx  # type: ignore[attr-defined]
    return context.iter_forward_root is not None or bool(context.post_backward_final_callback_queued)


def shares_out_over_several() -> bool:
    """Whether FSDP2 shares parameters out over several axes of a mesh as over one (from torch 2.13 on)."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    return hasattr(FSDPParam, "_build_spmd_sharding_spec")


def _unit_groups(root: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import fully_shard

    return [group for state in fully_shard.state(root)._state_ctx.all_states for group in state._fsdp_param_groups]  # type: ignore[attr-defined]


def written_arguments(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors among its arguments that an operator writes to (torch 2.13; wait for public schemas)."""
    written = written_names(func)
    if not written:
        return []
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    return [leaf for name in written for leaf in pytree.tree_leaves(given.get(name)) if isinstance(leaf, torch.Tensor)]


@contextmanager
def functions_called(instead: Callable[..., Any]) -> Iterator[None]:
    """Inside, `instead(apply, cls, args, kwargs)` answers every call of an `autograd.Function`; `apply(*args, **kwargs)` is the call.

    torch 2.13: `Function.apply` looks up `super().apply` when it is called, so that a name on its base is found from wherever `apply` was
    kept: a stored bound method, a partial, a class that overrides it. From torch 2.14 on it is a method in C, which looks up nothing but
    `forward`. Wait for a public way to watch Functions.
    """
    if isinstance(vars(torch.autograd.Function)["apply"], ClassMethodDescriptorType):
        with _forwards_called(instead):
            yield
        return
    base: Any = torch.autograd.function._SingleLevelFunction

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return instead(super(base, cls).apply, cls, args, kwargs)

    before = vars(base).get("apply")
    base.apply = classmethod(apply)
    try:
        yield
    finally:
        if before is None:
            del base.apply
        else:
            base.apply = before


@contextmanager
def _forwards_called(instead: Callable[..., Any]) -> Iterator[None]:
    """`functions_called` by the `forward` of every class: autograd takes the results for those of the Function, whatever they are."""
    before: list[tuple[Any, Any]] = []
    made = torch.autograd.function.FunctionMeta.__init__

    def answering(original: Any) -> Any:
        def forward(cls: Any, *given: Any, **kwargs: Any) -> Any:
            run = original.__get__(None, cls)
            if torch.is_grad_enabled():  # somebody calls it as a function: under autograd gradients are off in here
                return run(*given, **kwargs)
            context, args = ((), given) if cls.setup_context is not torch.autograd.Function.setup_context else (given[:1], given[1:])

            def apply(*args: Any, **kwargs: Any) -> Any:
                with _grad_mode(False):
                    return run(*context, *args, **kwargs)

            with _grad_mode(True):  # (whatever it is around the call)
                return instead(apply, cls, args, kwargs)

        forward.alone = original.__get__(None, torch.autograd.Function)  # type: ignore[attr-defined]
        return classmethod(forward)

    def watch(cls: Any) -> None:
        if "forward" in vars(cls):
            before.append((cls, vars(cls)["forward"]))
            cls.forward = answering(vars(cls)["forward"])

    def watched(cls: Any, *about: Any) -> None:
        made(cls, *about)
        watch(cls)

    for cls in list(_subclasses(torch.autograd.Function)):
        watch(cls)
    torch.autograd.function.FunctionMeta.__init__ = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autograd.function.FunctionMeta.__init__ = made  # type: ignore[method-assign]
        for cls, original in before:
            cls.forward = original


def forward_alone(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The forward of a Function, to be called as it is written: no call of the Function, whoever watches these."""
    found: Callable[..., Any] = function.forward
    return getattr(found, "alone", found)


def _subclasses(cls: type) -> Iterator[Any]:
    one: Any
    for one in cls.__subclasses__():
        yield one
        yield from _subclasses(one)


@contextmanager
def _grad_mode(enabled: bool) -> Iterator[None]:
    """`torch.set_grad_enabled` that no trace sees."""
    before = torch.is_grad_enabled()
    with _C.DisableTorchFunction():
        set_grad_enabled(enabled)
    try:
        yield
    finally:
        with _C.DisableTorchFunction():
            set_grad_enabled(before)


def takes_a_list(function: type[torch.autograd.Function]) -> bool:
    """Whether its backward is given all gradients in one list (from torch 2.13 on)."""
    return hasattr(torch.autograd.Function, "boxed_grads_call") and function.boxed_grads_call


def function_behind(node: Any) -> type[torch.autograd.Function] | str | None:
    """The Function that made a node of the autograd graph, in C++ its name alone; None for a derivative of torch's own.

    torch 2.13: the node of one in Python keeps its class, the node of one in C++ has only a name; wait for a public look at nodes.
    """
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        cls: type[torch.autograd.Function] = node._forward_cls  # type: ignore[attr-defined]
        return cls
    name: str = node.name()
    return name.split("CppNode<")[1].rstrip(">") if "CppNode<" in name else None


def functions_behind(results: Iterable[Any]) -> Iterator[type[torch.autograd.Function] | str]:
    """The Functions among all nodes of the autograd graph of some values."""
    stack = [value.grad_fn for value in results if isinstance(value, torch.Tensor) and value.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if (function := function_behind(node)) is not None:
            yield function
        new = {source for source, _ in node.next_functions if source is not None} - seen
        seen |= new
        stack.extend(new)


@cache
def written_names(func: OpOverload) -> tuple[str, ...]:
    """The names of the arguments that an operator writes to (torch 2.13; wait for public schemas)."""
    return tuple(a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)


@cache
def is_view_operator(func: OpOverload) -> bool:
    """Whether an operator's results look at the memory of its arguments (torch 2.13; wait for public schemas)."""
    return any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)


def takes(func: OpOverload, name: str) -> bool:
    """Whether an operator has an argument called `name` (torch 2.13; wait for public schemas)."""
    return any(argument.name == name for argument in func._schema.arguments)


@contextmanager
def opaque_initialisers(record: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside, `torch.nn.init` calls `record(initialiser, tensor, ...)` for initialisers whose course depends on what they draw.

    torch 2.13: `trunc_normal_` draws until all values lie inside, and does nothing on meta; wait for one that can be deferred.
    """
    original = torch.nn.init._no_grad_trunc_normal_
    torch.nn.init._no_grad_trunc_normal_ = partial(record, original)
    try:
        yield
    finally:
        torch.nn.init._no_grad_trunc_normal_ = original


@contextmanager
def lists_of_numbers(record: Callable[[list[Any], torch.Tensor], list[Any]]) -> Iterator[None]:
    """Inside, `tensor.tolist()` of a traced tensor returns what `record(numbers, tensor)` makes of the numbers.

    torch 2.13: these classes answer `tolist` themselves, so that no torch function mode sees it; wait for one that does.
    """
    from torch._subclasses.functional_tensor import FunctionalTensor

    originals = [(kind, kind.tolist) for kind in (FakeTensor, FunctionalTensor)]

    def watching(original: Callable[..., Any]) -> Callable[[torch.Tensor], list[Any]]:
        return lambda tensor: record(original(tensor), tensor)

    try:
        for kind, original in originals:
            kind.tolist = watching(original)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for kind, original in originals:
            kind.tolist = original  # type: ignore[method-assign]


@contextmanager
def untraced() -> Iterator[None]:
    """Inside, a trace that is under way does not see what other threads run (torch 2.13; wait for a public way out of a trace).

    It keeps a stack of the calls of modules, and loses count when one raises; in a model with a shared module, it hands out proxies in
    place of submodules; and what writes itself down in the trace (ModIndex, an indexing under vmap) finds it from every thread.
    """
    modes = mode_stack_state_for_pre_dispatch()
    traced = nn.Module.__call__, nn.Module.__getattr__
    under_way = modes.get(0), modes.get(1)
    nn.Module.__call__, nn.Module.__getattr__ = _symbolic_trace._orig_module_call, _symbolic_trace._orig_module_getattr  # type: ignore[method-assign]
    _replace_modes(modes, (None, None))
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = traced  # type: ignore[method-assign]
        _replace_modes(modes, under_way)


def _replace_modes(modes: Any, by: tuple[Any, Any]) -> None:
    for place, mode in enumerate(by):
        modes.set(place, mode)


def as_traced(module: nn.Module) -> nn.Module:
    """What stands for `module`, whose forward was just called, in a trace: in a model with a shared module, a proxy that knows its path.

    torch 2.13; wait for a public look at a trace.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    tracer: Any = getattr(get_proxy_mode(), "tracer", None)
    if not getattr(tracer, "enable_attr_proxy", False) or not tracer.module_stack:
        return module
    path, kind = next(reversed(tracer.module_stack.values()))
    made: nn.Module = tracer.proxy_type(module, path) if kind.__name__ == type(module).__name__ else module
    return made


def recorded_as(tensor: torch.Tensor) -> tuple[Node, nn.Module] | None:
    """The node that made `tensor` in the graph that is being recorded, and the module that holds its constants.

    torch 2.13; wait for a public look at a graph while it is recorded.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode = get_proxy_mode()
    if mode is None or not isinstance(tensor, FakeTensor):
        return None
    tracer: Any = mode.tracer
    slot: Any = get_proxy_slot(tensor, tracer, None)
    return None if slot is None else (slot.proxy.node, tracer.root)


def rerouted(tensor: torch.Tensor, through: torch.Tensor, behind: dict[Node, Node]) -> tuple[Node, Node]:
    """Let all uses of `tensor`, before and after, read `through` in the graph that is being recorded: the nodes of both.

    `through` was just computed from `tensor` by one call, which moves to where `tensor` was made. `behind` is kept from one time to the
    next: a tensor that is rerouted again is so at its source, in front of the earlier calls.

    torch 2.13; wait for a public look at a graph while it is recorded.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    tracer: Any = get_proxy_mode().tracer  # type: ignore[union-attr]
    slot: Any = get_proxy_slot(through, tracer)
    made: Node = slot.proxy.node
    seen: Node = get_proxy_slot(tensor, tracer).proxy.node
    node = behind.get(seen, seen)
    call = made if made.target is not operator.getitem else made.all_input_nodes[0]  # one of several results of the call
    call.replace_input_with(seen, node)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not call)
    leaves = [one for one in node.graph.nodes if one.op == "placeholder"]
    (leaves[-1] if node.op == "placeholder" else node).append(call)
    if call is not made:
        call.append(made)
    if "nn_module_stack" in node.meta:
        call.meta["nn_module_stack"] = made.meta["nn_module_stack"] = node.meta["nn_module_stack"]
    if seen is node:
        behind[made] = node
        del tracer.tensor_tracker[tensor]
        tracer.tensor_tracker[tensor] = slot
    return node, call


def under_saved_tensors() -> tuple[Any, str]:
    """Where hooks on what autograd saves are put in force: an object and the name of its function.

    torch 2.13; wait for a public question whether any are.
    """
    return _C._autograd, "_push_saved_tensors_default_hooks"


def saving_is_watched() -> bool:
    """Whether hooks on what autograd saves are in force: in backward, only while a checkpoint computes its forward again.

    torch 2.13; wait as above.
    """
    return _C._autograd._top_saved_tensors_default_hooks(True) is not None


def group_behind(group: Any) -> ProcessGroup:
    """The process group that an operator was given: its name, or the group as a script object (torch 2.13; wait for one form of both)."""
    return _resolve_process_group(GroupName(group)) if isinstance(group, str) else ProcessGroup.unbox(group)


@contextmanager
def storages_resized(tell: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Inside, `tell` is called after every `storage.resize_`, which no dispatch mode sees (torch 2.13; wait for one that does)."""
    resize = torch.UntypedStorage.resize_

    def told(storage: torch.UntypedStorage, size: int) -> Any:
        done = resize(storage, size)
        tell(storage)
        return done

    torch.UntypedStorage.resize_ = told  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def global_hooks() -> tuple[Mapping[int, Callable[..., Any]], ...]:
    """The hooks registered for all modules at once (torch 2.13; wait for a public look at them)."""
    from torch.nn.modules import module

    return (
        module._global_forward_pre_hooks,
        module._global_forward_hooks,
        module._global_backward_pre_hooks,
        module._global_backward_hooks,
    )


def active_modes() -> tuple[str, ...]:
    """The names of the modes that see what torch is asked to do, without torch's own and ours (torch 2.13; wait for a public list)."""
    if not torch._C._len_torch_function_stack() and not torch._C._len_torch_dispatch_stack():
        return ()
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())
    return tuple(type(mode).__name__ for mode in modes if type(mode).__module__.partition(".")[0] not in ("torch", "meshpar"))


def at_hints(value: Any) -> Any:
    """The tensors of a pytree whose sizes are symbols, as ones without memory of the sizes that the symbols stand for."""

    def plain(tensor: torch.Tensor) -> torch.Tensor:
        if all(isinstance(n, int) for n in tensor.shape):
            return tensor
        made = torch.empty([n if isinstance(n, int) else n.node.hint for n in tensor.shape], dtype=tensor.dtype, device="meta")
        return made.requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(torch.Tensor, plain, value)


class SizeSymbols:
    """Symbols in the place of sizes: what is asked of them is written down (torch 2.13; wait for a public run of a forward on symbols)."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        sources = [ConstantSource(f"size_{i}") for i in range(len(sizes))]
        self.symbols = [
            self._env.create_symbol(n, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
            for n, source in zip(sizes, sources, strict=True)
        ]
        self.sizes = [
            self._env.create_symintnode(symbol, hint=n, source=source)
            for symbol, n, source in zip(self.symbols, sizes, sources, strict=True)
        ]

    def asked(self) -> list[Any]:
        """What held for them, where it was asked: sympy's expressions."""
        equal = [sympy.Eq(symbol, other) for symbol, other in self._env.replacements.items()]
        return [*dict.fromkeys([*(guard.expr for guard in self._env.guards), *equal])]


def expression(number: torch.SymInt | torch.SymFloat) -> Any:
    """A number that was computed of `SizeSymbols`, as sympy's expression."""
    return number.node.expr


def at_sizes(expressions: Iterable[Any], symbols: Sequence[Any], sizes: Sequence[int]) -> Iterator[int | float | bool | None]:
    """The value of each of sympy's `expressions` where `symbols` are these sizes; None of one that has none."""
    values = {symbol: sympy.Integer(size) for symbol, size in zip(symbols, sizes, strict=True)}
    for one in expressions:
        found = one.xreplace(values)
        if found in (sympy.true, sympy.false):
            yield bool(found)
        elif found.is_Integer:
            yield int(found)
        else:
            yield float(found) if found.is_number and found.is_finite else None


def default_device() -> torch.device | None:
    """Where tensors are made by default; None for where torch does by itself (torch 2.13: `torch.get_default_device()` takes 12 us)."""
    return torch.get_default_device() if torch._C._len_torch_function_stack() else None


def transforms() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp) is under way (torch 2.13; wait for a public question)."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a wrapper that torch.func made: it lies nowhere in memory (torch 2.13; wait for a public way to ask)."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[no-any-return, unused-ignore]


def dcp_storage_info(file: str, offset: int, length: int) -> Any:
    """Where an item of a torch.distributed.checkpoint directory lies (torch 2.13; wait for a public record)."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(file, offset, length)


def pipeline_compute(schedule: str, ranks: int, stages: int, microbatches: int) -> list[list[tuple[str, int, int]]]:
    """What each rank of a pipeline computes, as `(kind, stage, microbatch)`; overlapped pairs one after the other.

    torch 2.13: the orders are made by the constructors of schedules that want stages; wait for schedules as data.
    """
    from torch.distributed.pipelining import schedules

    single = {"gpipe": schedules.ScheduleGPipe, "1f1b": schedules.Schedule1F1B}
    multi = {
        "looped-bfs": schedules.ScheduleLoopedBFS,
        "interleaved-1f1b": schedules.ScheduleInterleaved1F1B,
        "zero-bubble": schedules.ScheduleInterleavedZeroBubble,
        "zbv": schedules.ScheduleZBVZeroBubble,
        "dualpipev": schedules.ScheduleDualPipeV,
    }
    stage: Any = SimpleNamespace(num_stages=stages, group_size=ranks, group_rank=0, stage_index=0, submod=None)
    order: Mapping[int, Sequence[schedules._Action | None]] | None
    if schedule in single:
        order = single[schedule](stage, microbatches).pipeline_order
    else:
        unlowered = type(schedule, (multi[schedule],), {"_prepare_schedule_with_comms": lambda self, order: None})
        order = unlowered([stage] * (stages // ranks), microbatches).pipeline_order
    assert order is not None
    rows: list[list[tuple[str, int, int]]] = [
        [
            (part.computation_type.value, part.stage_index, part.microbatch_index or 0)
            for action in order[rank]
            if action is not None
            for part in action.sub_actions or (action,)
            if part.computation_type.value in ("F", "B", "I", "W")
        ]
        for rank in range(ranks)
    ]
    if schedule == "1f1b":  # torch's list, which it only prints, counts the last rank's forwards from 1; what it runs counts from 0
        first = rows[-1][0][2]
        rows[-1] = [(kind, at, microbatch - first if kind == "F" else microbatch) for kind, at, microbatch in rows[-1]]
    return rows


def pipeline_transfers(
    compute: Sequence[Sequence[tuple[str, int, int]]], place: Sequence[int], microbatches: int
) -> list[list[tuple[str, int, int]]]:
    """The same with sends and receives between ranks, and reductions of gradients (microbatch -1) (torch 2.13; wait for public ones).

    Every send is put down together with its receive, so ranks that wait for each other at every transfer would not hang either.
    """
    from torch.distributed.pipelining import schedules

    actions = {
        rank: schedules._add_reduce_grad([schedules._Action(at, schedules._ComputationType(kind), m) for kind, at, m in row], microbatches)
        for rank, row in enumerate(compute)
    }
    lowered = schedules._add_send_recv(actions, place.__getitem__, len(place))  # type: ignore[arg-type]
    return [
        [(a.computation_type.value, a.stage_index, -1 if a.microbatch_index is None else a.microbatch_index) for a in lowered[rank]]
        for rank in range(len(compute))
    ]


@contextmanager
def as_if_exporting() -> Iterator[None]:
    """Inside, a forward is told that it is exported (torch 2.13; wait for a public way to say so)."""
    before = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = before


@contextmanager
def checkpoints_only_call() -> Iterator[None]:
    """Inside, `torch.utils.checkpoint` without reentry only calls what it wraps.

    torch 2.13: what it keeps for backward, a checkpoint within a checkpoint keeps under `no_grad`, and export takes that for a part of the
    forward, whose gradient is lost. Wait for an export that sees through checkpoints.
    """

    def through(*_: Any, **__: Any) -> Iterator[None]:
        yield

    name = "_checkpoint_without_reentrant_generator"
    name = f"{name}_impl" if hasattr(torch_checkpoint, f"{name}_impl") else name  # (from torch 2.14 on)
    original = getattr(torch_checkpoint, name)
    setattr(torch_checkpoint, name, through)
    try:
        yield
    finally:
        setattr(torch_checkpoint, name, original)


def run_backward(
    tensors: torch.Tensor | Sequence[torch.Tensor],
    grad_tensors: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> None:
    """`torch.autograd.backward`, without handing itself to a TorchFunctionMode first, which is switched off for as long as it then runs.

    torch 2.13; wait for modes that stay on while a backward calls the forward again (torch.utils.checkpoint).
    """
    roots = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    given = grad_tensors if grad_tensors is not None else grad_variables
    given = (given,) if given is None or isinstance(given, torch.Tensor) else tuple(given)
    grads = _make_grads(roots, given if len(given) == len(roots) else (None,) * len(roots), is_grads_batched=False)
    leaves = () if inputs is None else (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    keep = create_graph if retain_graph is None else retain_graph
    _engine_run_backward(roots, grads, keep, create_graph, leaves, allow_unreachable=True, accumulate_grad=True)


def is_compiled_around() -> bool:
    """Whether torch.compile looks at every call that is made now. (torch 2.13; wait for a public question.)"""
    return torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def compile_errors() -> tuple[type[BaseException], ...]:
    """What torch.compile raises of its own. (torch 2.13; wait for public names.) Imported when asked for: it takes seconds."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def transform_level() -> int:
    """How many transforms of torch.func are under way. (torch 2.13; wait for a public question.)"""
    return torch._C._functorch.maybe_current_level() or 0  # type: ignore[no-any-return, unused-ignore]


__all__ = [
    "COMPOSED",
    "compile_errors",
    "is_compiled_around",
    "transform_level",
    "BatchNorm",
    "DefaultAllGather",
    "DefaultReduceScatter",
    "FakeStore",
    "FakeTensor",
    "FakeTensorMode",
    "LocalTensor",
    "LocalTensorMode",
    "OpOverload",
    "StridedShard",
    "SizeSymbols",
    "accumulate_gradients",
    "active_modes",
    "amp_unscale",
    "at_hints",
    "at_sizes",
    "alone",
    "as_one_process",
    "as_parameter",
    "below_autograd",
    "checkpoints_only_call",
    "chosen_attention",
    "clone_store",
    "default_store",
    "dcp_storage_info",
    "default_states",
    "default_device",
    "dtensor_like",
    "expression",
    "enable_python_dispatcher",
    "enabled_local_tensor_mode",
    "enter_autocast",
    "exit_autocast",
    "flatten_mesh",
    "forward_alone",
    "forget_meshes",
    "forget_step",
    "function_behind",
    "functional",
    "functions_behind",
    "functions_called",
    "generator_key",
    "global_hooks",
    "grouped_mm",
    "is_transformed",
    "is_unfinished",
    "is_view",
    "is_view_operator",
    "lists_of_numbers",
    "layouts_at_once",
    "local_of",
    "local_tensor_mode",
    "maybe_disable_local_tensor_mode",
    "on_simulated_ranks",
    "only_composites",
    "opaque_initialisers",
    "pipeline_compute",
    "pipeline_transfers",
    "put_default_states",
    "resolve_process_group",
    "root_mesh",
    "run_backward",
    "simulated_generators",
    "set_grad_enabled",
    "shares_out_over_several",
    "states_from_generators",
    "takes",
    "takes_a_list",
    "transforms",
    "quick_traces",
    "without_dumps",
    "without_modes",
    "written_arguments",
    "written_names",
    "TorchDispatchMode",
    "pytree",
    "recorded_as",
    "reduce_gradients",
    "rerouted",
    "under_saved_tensors",
]
