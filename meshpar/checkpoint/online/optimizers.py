"""The state of any torch optimizer, keyed by parameter name: tensors beside the model's, everything else as values.

    tensor  "optimizer/exp_avg/layers.0.weight"              laid out like its parameter, so it moves between meshes like one
    values  {"class": "AdamW", "groups": {"0": {"lr": 0.1, ...}}, "of": {"layers.0.weight": 0}, "state": {...what is no tensor...}}

A rank knows the parameters of its own stages only. Groups are therefore compared by their number: all ranks must build the same groups,
also those that are empty on some of them, and a hyper-parameter that differs between ranks is an error when saving. When loading, a
parameter takes the hyper-parameters it had; parameters that share a group must have had the same.

`foreach`, `fused`, `capturable` and `differentiable` say how a step is computed, not what: they stay as the new optimizer has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from meshpar._torch import local_of, part_here
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.manifest import Manifest
from meshpar.checkpoint.format.table import Stored
from meshpar.checkpoint.online.placed import Held, held, torch_dtype
from meshpar.checkpoint.online.values import decode, encode
from meshpar.checkpoint.online.writer import PerRank
from meshpar.errors import CheckpointError, ConfigError
from meshpar.runtime.parameters.tensors import of_parameter

PREFIX = "optimizer/"
_HOW = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")
Names = Mapping[int, str]
"""id of a parameter -> its name."""


def stored_name(key: str, fqn: str) -> str:
    """The name of a tensor of a parameter's state.

    >>> stored_name("exp_avg", "head.weight")
    'optimizer/exp_avg/head.weight'
    """
    if "/" in key:
        raise CheckpointError(f"The optimizer keeps state called {key!r} of {fqn}; names with a slash cannot be stored.")
    return f"{PREFIX}{key}/{fqn}"


def collect(optimizer: torch.optim.Optimizer, names: Names) -> tuple[dict[str, Held], dict[str, Any]]:
    """The tensors and the values of an optimizer on this rank."""
    _check_known(optimizer, names)
    tensors: dict[str, Held] = {}
    state: dict[str, dict[str, Any]] = {}
    for parameter, own in optimizer.state.items():
        fqn = names[id(parameter)]

        def keep(path: str, item: Any, parameter: torch.Tensor = parameter, fqn: str = fqn) -> None:
            if isinstance(item, PerRank):
                raise CheckpointError(f"{path} of {fqn}: per-rank values in an optimizer cannot be stored.")
            tensors[stored_name(path, fqn)] = held(item, like=parameter)

        for key, value in own.items():
            if isinstance(value, torch.Tensor):
                keep(key, value)
            else:
                state.setdefault(fqn, {})[key] = encode(value, key, keep)
    groups = {str(k): {key: _hyper(value, key) for key, value in group.items() if key not in _HOW} for k, group in _numbered(optimizer)}
    of = {names[id(p)]: k for k, group in _numbered(optimizer) for p in group["params"]}
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "of": of, "state": state}


@dataclass
class Restoring:
    """An optimizer about to be loaded: its new state, whose tensors are filled before `finish` hands them over."""

    optimizer: torch.optim.Optimizer
    values: Mapping[str, Any]
    names: Mapping[torch.Tensor, str]
    tensors: dict[str, torch.Tensor | Held] = field(default_factory=dict)
    state: dict[torch.Tensor, dict[str, Any]] = field(default_factory=dict)

    def finish(self) -> None:
        """Give the optimizer its state and hyper-parameters."""
        for parameter, own in self.state.items():
            if own:
                self.optimizer.state[parameter] = own
            else:
                self.optimizer.state.pop(parameter, None)
        for k, group in _numbered(self.optimizer):
            for key, value in self._hypers(k, group).items():
                value = decode(value, _no_reference)
                if isinstance(group.get(key), torch.Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value

    def check(self) -> None:
        """Refuse, before anything is changed, what `finish` could not do."""
        for k, group in _numbered(self.optimizer):
            self._hypers(k, group)

    def _hypers(self, index: int, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """What was stored for the parameters of a group; for a group without any, what its number says."""
        of, groups = self.values["of"], self.values["groups"]
        found = {of[self.names[p]]: self.names[p] for p in group["params"] if self.names[p] in of}
        if not found:
            return {} if group["params"] else groups.get(str(index), {})
        rows = [(name, groups[str(k)]) for k, name in sorted(found.items())]
        for name, row in rows[1:]:
            for key in {**rows[0][1], **row}:
                if rows[0][1].get(key) != row.get(key):
                    raise CorruptError(
                        f"Group {index} of the optimizer holds {rows[0][0]} and {name}, but they were saved with {key}="
                        f"{rows[0][1].get(key)!r} and {row.get(key)!r}. Put them into groups of their own."
                    )
        return rows[0][1]


def restoring(
    optimizer: torch.optim.Optimizer, names: Names, manifest: Manifest, resolve: Callable[[str], str], *, partly: bool = False
) -> Restoring:
    """Prepare to load: for each parameter, tensors like those that were saved, the optimizer's own ones where they fit.

    `resolve` turns a parameter's name into the stored one. Raises CorruptError when no optimizer of this class was saved, or, unless
    `partly`, when a parameter is not known to it.
    """
    _check_known(optimizer, names)
    values = manifest.values.get("optimizer")
    if values is None:
        raise CorruptError("It holds no optimizer. To load the model alone, leave the optimizer out.")
    if values["class"] != type(optimizer).__name__:
        raise CorruptError(
            f"It holds the state of {values['class']}, which {type(optimizer).__name__} cannot continue. To start a new optimizer, leave "
            "it out and pass unexpected='skip'."
        )
    stored = _by_parameter(manifest)
    out = Restoring(optimizer, values, {p: resolve(names[id(p)]) for _, group in _numbered(optimizer) for p in group["params"]})
    twice = (
        sorted({fqn for fqn in out.names.values() if list(out.names.values()).count(fqn) > 1})
        if len(set(out.names.values())) < len(out.names)
        else []
    )
    if twice:
        raise CorruptError(f"{', '.join(twice[:5])} was tied when it was saved, and is not here: one state cannot continue as two.")
    unknown = [fqn for fqn in out.names.values() if fqn not in values["of"]]
    if unknown and not partly:
        raise CorruptError(f"It holds no optimizer settings for {', '.join(unknown[:5])}. To go on without, missing='skip'.")
    for _, group in _numbered(optimizer):
        for parameter in group["params"]:
            fqn = out.names[parameter]
            if fqn in values["of"]:
                out.state[parameter] = _new_state(out, parameter, group, fqn, stored.get(fqn, {}))
    out.check()
    return out


def _new_state(out: Restoring, parameter: torch.Tensor, group: Mapping[str, Any], fqn: str, stored: Mapping[str, Stored]) -> dict[str, Any]:
    current = out.optimizer.state.get(parameter, {})
    made: dict[str, torch.Tensor] = {}
    for path, row in stored.items():
        old = current.get(path)
        fits = isinstance(old, torch.Tensor) and tuple(old.shape) == row.shape and held(old, like=parameter).dtype == row.dtype
        made[path] = old if fits else allocate(parameter, row, path, group)
        out.tensors[stored_name(path, fqn)] = held(made[path], like=parameter)
    rest = {key: decode(value, lambda kind, path: made[path]) for key, value in out.values["state"].get(fqn, {}).items()}
    nested = {path for path in made if path.split(".")[0] in rest}
    return {**{path: tensor for path, tensor in made.items() if path not in nested}, **rest}


def allocate(parameter: torch.Tensor, stored: Stored, key: str, group: Mapping[str, Any]) -> torch.Tensor:
    """A tensor for a parameter's state, placed as the optimizer itself would have: like the parameter if it has its shape, else whole."""
    dtype, shape = torch_dtype(stored.dtype), torch.Size(stored.shape)
    if not shape and (parameter.ndim or key == "step"):
        on_device = group.get("capturable") or group.get("fused")  # torch keeps counters in host memory otherwise
        return torch.zeros((), dtype=dtype, device=_device(parameter) if on_device else "cpu")
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    mesh, local = parameter.device_mesh, local_of(parameter)
    if shape == parameter.shape:
        own = torch.zeros_like(local, dtype=dtype)
        like = DTensor.from_local(own, mesh, parameter.placements, run_check=False, shape=shape, stride=parameter.stride())
        return of_parameter(like, parameter)
    whole = torch.zeros(shape, dtype=dtype, device=local.device)
    return of_parameter(DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False), parameter)


def _device(parameter: torch.Tensor) -> torch.device:
    return part_here(parameter).device


def _by_parameter(manifest: Manifest) -> dict[str, dict[str, Stored]]:
    out: dict[str, dict[str, Stored]] = {}
    for name, stored in manifest.tensors.items():
        if name.startswith(PREFIX) and stored.kind == "optimizer":
            key, _, fqn = name.removeprefix(PREFIX).partition("/")
            out.setdefault(fqn, {})[key] = stored
    return out


def _check_known(optimizer: torch.optim.Optimizer, names: Names) -> None:
    strange = [tuple(p.shape) for _, group in _numbered(optimizer) for p in group["params"] if id(p) not in names]
    if strange:
        raise ConfigError(
            f"{len(strange)} parameters of the optimizer (the first of shape {list(strange[0])}) are not among the module's. Make the "
            "optimizer from the parameters of the module you pass, after it was parallelized."
        )


def _numbered(optimizer: torch.optim.Optimizer) -> list[tuple[int, dict[str, Any]]]:
    return list(enumerate(optimizer.param_groups))


def _hyper(value: Any, key: str) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        value = value.item()  # a learning rate kept as a tensor

    def refuse(path: str, item: Any) -> None:
        raise CheckpointError(f"The hyper-parameter {path} is a {type(item).__name__}, which cannot be stored.")

    return encode(value, key, refuse)


def _no_reference(kind: str, path: str) -> Any:
    raise CorruptError(f"A hyper-parameter refers to {kind} {path}.")
