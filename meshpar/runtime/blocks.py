"""The modules that run a lowered graph: one per block, at the block's original path, and a root for the rest.

    tree = build(graph, parameters, buffers)          # parameters and buffers under their original names
    tree.add_program("eval", other_graph)             # more programs over the same tensors
    loss, = tree.run("train", input_ids, labels)

Why modules at all: FSDP2, recompute and the state dict find parameters by module. Why one function per block *structure* and not per
block: the parameters are arguments of the function, so that all layers of a model share one code object, and `torch.compile` compiles it
once.
"""

from __future__ import annotations

import copy
import linecache
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
from torch import fx, nn
from torch.distributed.fsdp import FSDPModule

from meshpar.errors import ConfigError, PlanError
from meshpar.runtime.compiled import Code, as_it_is, compiled
from meshpar.runtime.cut import Cut, Piece, cut
from meshpar.runtime.hooks import refusing
from meshpar.runtime.likeness import Likeness
from meshpar.runtime.local import LocalParameters, Store
from meshpar.runtime.recompute import Mode, wrap


def build(
    graph: fx.Graph,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, torch.Tensor] | None = None,
    constants: Mapping[str, torch.Tensor] | None = None,
    *,
    key: str = "train",
    aliases: Mapping[str, str] | None = None,
    non_persistent: Collection[str] = (),
    mutations: Sequence[str] = (),
    recompute: Mode = "none",
    compile: Mapping[str, Any] | None = None,
) -> Tree:
    """The module tree that runs `graph`.

    `parameters` and `buffers` hold every tensor of the model by its canonical name; `aliases` maps each other name of a tied tensor to it.
    `constants` are the graph's other `get_attr` targets. `mutations` names the buffers whose new values are the last outputs of the graph.
    `recompute` is what blocks compute again in backward. `compile` holds keyword arguments of `torch.compile`, applied to each block's
    code; None runs it as it is.
    """
    tree = Tree(parameters, buffers or {}, aliases=aliases, non_persistent=non_persistent, recompute=recompute, compile=compile)
    tree.add_program(key, graph, constants=constants, mutations=mutations)
    return tree


_CLASS: Any = object.__dict__["__class__"]


def _made(kind: type[nn.Module]) -> nn.Module:
    """An instance, still empty."""
    return kind.__new__(kind)


@refusing(
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_backward_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
class Block(Likeness):
    """A place in the tree: the tensors registered there, and its share of every program that has one."""

    def __init__(self) -> None:
        super().__init__()
        self._programs: dict[str, ModuleCall] = {}
        self.__dict__["_original"] = None

    @property
    def __class__(self) -> type:
        """That of the module of the model: loops over modules ask `isinstance(module, nn.LayerNorm)`. `type(...)` tells what it is."""
        original = None if self.__dict__.get("_as_itself") else self.__dict__.get("_original")
        return type(self) if original is None else type(original)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        _CLASS.__set__(self, kind)

    def _save_to_state_dict(self, *args: Any) -> None:
        with self._as_it_is():
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._as_it_is():
            super()._load_from_state_dict(*args)

    @contextmanager
    def _as_it_is(self) -> Iterator[None]:
        """Inside, `__class__` is its own: torch asks that whether a module has extra state, which this one has not."""
        self.__dict__["_as_itself"] = True
        try:
            yield
        finally:
            del self.__dict__["_as_itself"]

    def __reduce_ex__(self, protocol: Any) -> Any:
        found: Any = super().__reduce_ex__(max(2, protocol))
        return (_made, *found[1:])  # (pickle makes instances of `__class__` alone)

    def forward(self, key: str, *args: Any) -> Any:
        """Run this block's share of program `key`. Raises ConfigError when a user calls it with values."""
        if not isinstance(key, str):
            original = self._original
            name = "A module" if original is None else f"The {type(original).__name__}"
            raise ConfigError(
                f"{name} of a parallel model cannot be called by itself: it holds its share of the programs, not a forward of its own. "
                f"Call pm(**batch), with the value wanted among the model's outputs; or the module of the model, before parallelize."
            )
        return self._programs[key](self, args)


class Tree(Block):
    """The root: all tensors under their original names, and the programs that run over them."""

    __class__ = property(lambda self: type(self), lambda self, kind: _CLASS.__set__(self, kind))

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, torch.Tensor],
        *,
        aliases: Mapping[str, str] | None = None,
        non_persistent: Collection[str] = (),
        recompute: Mode = "none",
        compile: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._aliases = {k: v for k, v in (aliases or {}).items() if v in parameters or v in buffers}
        self._compile, self._recompute = compile, recompute
        self._dtype: torch.dtype | None = None
        self._library = _Library({}, {})
        tied = {other: canonical for other, canonical in self._aliases.items()}
        for fqn, parameter in [*parameters.items(), *((o, parameters[c]) for o, c in tied.items() if c in parameters)]:
            path, name = _split(fqn)
            _module_at(self, path).register_parameter(name, parameter)
        for fqn, buffer in [*buffers.items(), *((o, buffers[c]) for o, c in tied.items() if c in buffers)]:
            path, name = _split(fqn)
            _module_at(self, path).register_buffer(name, buffer, persistent=fqn not in non_persistent)
        self._names = (frozenset(parameters), frozenset(buffers))

    def add_program(
        self,
        key: str,
        graph: fx.Graph,
        *,
        constants: Mapping[str, torch.Tensor] | None = None,
        mutations: Sequence[str] = (),
    ) -> None:
        """Add a graph over the same tensors, to be run as `run(key, *inputs)`; inputs come in the order of its placeholders.

        Raises ValueError when a tensor of the graph is unknown, PlanError when data parallelism shards by other blocks than the graph has.
        """
        made = cut(graph, *self._names, aliases=self._aliases, mutated=mutations, key=key)
        sharded = [path for path in made.inlined if _is_wrapped(_module_at(self, path))]
        if sharded:
            raise PlanError(
                f"this batch cannot run {sharded[0]} as a block ({made.inlined[sharded[0]]}), but its parameters were shared out as those "
                "of one, for the batches before. Call parallelize with such a batch as its example."
            )
        for path, piece in made.blocks.items():
            _module_at(self, path)._programs[key] = self._call(path, piece, constants or {})
        self._programs[key] = self._call("", made.root, constants or {}, mutations=mutations)
        self._library.cuts[key] = made

    def functions(self, key: str) -> dict[tuple[str, ...], fx.Graph]:
        """The different functions that a program runs: the blocks ("" for the root) that share one -> its graph."""
        made, shared = self._library.cuts[key], dict[int, list[str]]()
        for path in ("", *made.blocks):
            shared.setdefault(id(_module_at(self, path)._programs[key].code), []).append(path)
        return {tuple(paths): made.piece(paths[0]).graph for paths in shared.values()}

    def add_like(self, key: str, like: str, graphs: Mapping[tuple[str, ...], fx.Graph]) -> None:
        """Add a program that is the program `like` but for its functions, which are those of `graphs`, by the blocks that share one.

        The graphs are this tree's own from now on: the root's calls blocks by the `key`.
        """
        made, pieces = self._library.cuts[like], dict[str, Piece]()
        for paths, graph in graphs.items():
            for node in graph.nodes:
                if node.op == "call_module":
                    node.args = (key, *node.args[1:])
            code = self._code(graph, paths[0])
            for path in paths:
                block = _module_at(self, path)
                block._programs[key] = block._programs[like].running(code)
                pieces[path] = replace(made.piece(path), graph=graph)
        self._library.cuts[key] = replace(made, root=pieces[""], blocks={path: pieces[path] for path in made.blocks})

    def remove_program(self, key: str) -> None:
        """Forget a program, if it is known, and the code that no other runs."""
        if self._library.cuts.pop(key, None) is None:
            return
        for module in self.modules():
            if isinstance(module, Block):
                module._programs.pop(key, None)
        used = {id(call.code) for module in self.modules() if isinstance(module, Block) for call in module._programs.values()}
        for source in [source for source, (_, code) in self._library.codes.items() if id(code) not in used]:
            del self._library.codes[source]
            for filename in [name for name in linecache.cache if name.startswith("<meshpar ") and name.endswith(f" {_mark(source)}>")]:
                del linecache.cache[filename]

    def run(self, key: str, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run program `key`: its outputs, without the new buffer values, which are written back."""
        return self(key, *inputs)

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Compute in `dtype` from parameters of another one: where no FSDP2 unit does so. Gradients have the dtype of the parameters."""
        self._dtype = dtype
        for module in self.modules():
            for call in module._programs.values() if isinstance(module, Block) else ():
                call.parameters.dtype = dtype

    def _call(self, path: str, piece: Piece, constants: Mapping[str, torch.Tensor], *, mutations: Sequence[str] = ()) -> ModuleCall:
        unknown = [name for name in piece.constants if name not in constants]
        if unknown:
            raise ValueError(f"the graph reads {', '.join(unknown)}, which is neither a parameter, a buffer nor a constant.")
        call = ModuleCall(
            self._code(piece.graph, path),
            [self._store(fqn, parameter=True) for fqn in piece.parameters],
            [self._store(fqn, parameter=False) for fqn in piece.buffers],
            [constants[name] for name in piece.constants],
            frozenset(i for i, fqn in enumerate(piece.buffers) if fqn in mutations),
            [self._store(fqn, parameter=False) for fqn in mutations],
        )
        call.parameters.dtype = self._dtype
        return call

    def _store(self, fqn: str, *, parameter: bool) -> tuple[Store, str]:
        path, name = _split(fqn)
        module = _module_at(self, path)
        return (module._parameters if parameter else module._buffers), name  # type: ignore[return-value]

    def _code(self, graph: fx.Graph, path: str) -> Code:
        """The function of a graph; the same one for every graph that prints the same code over the same globals."""
        printed = graph.python_code("self")
        known = self._library.codes.get(printed.src)
        if known is not None and known[0] == printed.globals:
            return known[1]
        code = _exec(printed.src, printed.globals, path or "root")
        if path:
            code = wrap(code, self._recompute, graph)
            code = code if self._compile is None or as_it_is(graph) else compiled(code, self._compile, path)
        self._library.codes[printed.src] = (printed.globals, code)
        return code


@dataclass
class _Library:
    """What a tree knows of its programs apart from tensors: copies of the tree share it."""

    codes: dict[str, tuple[dict[str, Any], Code]]
    """Printed code -> its globals and the function."""
    cuts: dict[str, Cut]

    def __deepcopy__(self, memo: object) -> _Library:
        return _Library(dict(self.codes), dict(self.cuts))


class ModuleCall:
    """One module's share of one program: its code and where its tensors are found at the moment of the call."""

    __slots__ = ("buffers", "code", "constants", "copied", "mutations", "parameters")

    def __init__(
        self,
        code: Code,
        parameters: list[tuple[Store, str]],
        buffers: list[tuple[Store, str]],
        constants: list[torch.Tensor],
        copied: frozenset[int],
        mutations: list[tuple[Store, str]],
    ) -> None:
        self.code, self.parameters, self.buffers, self.constants = code, LocalParameters(parameters), buffers, constants
        self.copied, self.mutations = copied, mutations

    def running(self, code: Code) -> ModuleCall:
        """The same with another function."""
        new = copy.copy(self)
        new.code = code
        return new

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Run the code on the local tensors of this moment (FSDP2 swaps parameters between calls)."""
        buffers = [store[name] for store, name in self.buffers]
        for i in self.copied:  # what autograd saves, or recompute reads, must not be the tensor that is overwritten below
            buffers[i] = buffers[i].clone()  # type: ignore[union-attr]
        outputs = self.code(module, *self.parameters(), *buffers, *self.constants, *args)
        return self._write_back(outputs) if self.mutations else outputs

    def _write_back(self, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        count = len(outputs) - len(self.mutations)
        with torch.no_grad():
            for (store, name), value in zip(self.mutations, outputs[count:], strict=True):
                store[name].copy_(value)  # type: ignore[union-attr]
        return tuple(outputs[:count])


def block_paths(tree: Tree) -> tuple[str, ...]:
    """The paths of all blocks of all programs, in the order they first run."""
    return tuple(dict.fromkeys(path for made in tree._library.cuts.values() for path in made.blocks))


def shared_blocks(tree: Tree) -> tuple[tuple[str, ...], ...]:
    """All blocks, those that share a parameter together: what must be gathered and reduced as one."""
    groups: list[tuple[set[int], tuple[str, ...]]] = []
    for path in block_paths(tree):
        own = {id(p) for p in tree.get_submodule(path).parameters()}
        linked = [g for g in groups if g[0] & own]
        if not linked:
            groups.append((own, (path,)))
            continue
        merged = (own.union(*(g[0] for g in linked)), (*(p for g in linked for p in g[1]), path))
        groups[groups.index(linked[0])] = merged
        groups = [g for g in groups if g not in linked[1:]]
    return tuple(paths for _, paths in groups)


def inlined(tree: Tree) -> dict[str, str]:
    """Regions that run in the root because they cannot be blocks, with the reason."""
    return {path: reason for made in tree._library.cuts.values() for path, reason in made.inlined.items()}


def print_code(tree: Tree, key: str) -> str:
    """The code of a program: the root's, then that of each block structure once, with the blocks that share it."""
    made = tree._library.cuts[key]
    shared: dict[str, list[str]] = {}
    for path, piece in made.blocks.items():
        shared.setdefault(piece.graph.python_code("self").src, []).append(path)
    parts = [f"# root\n{made.root.graph.python_code('self').src.strip()}"]
    parts += [f"# {', '.join(paths)}\n{source.strip()}" for source, paths in shared.items()]
    return "\n\n".join(parts) + "\n"


# ---- helpers ---------------------------------------------------------------------------------------------------------------------------


def _mark(source: str) -> str:
    return f"{crc32(source.encode()):08x}"


def _exec(source: str, namespace: dict[str, Any], name: str) -> Code:
    filename = f"<meshpar {name} {_mark(source)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)  # tracebacks show the line
    namespace = dict(namespace)
    exec(compile(source, filename, "exec"), namespace)
    return namespace["forward"]


def _split(fqn: str) -> tuple[str, str]:
    path, _, name = fqn.rpartition(".")
    return path, name


def _module_at(root: nn.Module, path: str) -> Block:
    """The module at `path`, made on the way where there is none."""
    module = root
    for name in path.split(".") if path else ():
        if name not in module._modules:
            dict.__setitem__(module._modules, name, Block())  # (of a later program, too: see `Children`)
        module = module._modules[name]  # type: ignore[assignment]
    assert isinstance(module, Block)
    return module


def _is_wrapped(module: nn.Module) -> bool:
    """Whether FSDP2 manages the module: it gives it a class of its own."""
    return isinstance(module, FSDPModule)
