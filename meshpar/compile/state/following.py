"""Attributes that a user sets after parallelize, wherever he does: they act on the copy of the model that programs are captured from.

    pm.beta = 0.5                         pm hands it on at once, and shows what is there
    pm.get_submodule("layers.0").beta     a module of pm: looked at before every step, like its `training`
    pm.original_module.beta               that copy itself
    model.beta                            the model given to parallelize, while somebody has it: looked at before every step

What forward writes itself belongs to the parallel model from parallelize on, and so do `training`, parameters and buffers (`apart`).
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import nn

from meshpar.capture.hooks.models import forward_hooks, hand_on_library_hooks
from meshpar.capture.state.places import ABSENT, Place, copied, same
from meshpar.capture.state.reads import attributes
from meshpar.capture.state.taken import State, token_of
from meshpar.compile.state.apart import Apart
from meshpar.compile.state.bound import Bound
from meshpar.errors import ConfigError


class Following:
    """Hands on what is set on `original` to `skeleton`, its copy."""

    def __init__(self, original: nn.Module, skeleton: nn.Module) -> None:
        self._skeleton = skeleton
        self._seen = {place: copied(value) for place, value in attributes(original).items()}
        self._versions = _versions(original)
        self._watched: dict[Place, None] = {}
        self._written: set[Place] = set()
        self._bound: Bound | None = None
        shared = {path for path, _ in skeleton.named_modules()}
        self._hooks = {path: keys for path, keys in forward_hooks(original).items() if path in shared}
        children = [(path, module._modules, dict(module._modules)) for path, module in original.named_modules()]
        self._children = children
        self._apart = apart = Apart(original)

        def forget(_: object) -> None:  # nor are its parts kept alive
            children.clear()
            apart.forget()

        self._original = weakref.ref(original, forget)

    @property
    def original(self) -> weakref.ref[nn.Module]:
        """The model given to parallelize."""
        return self._original

    def copy(self, skeleton: nn.Module) -> Following:
        """The same for another copy."""
        new = copy.copy(self)
        new._skeleton, new._bound = skeleton, None
        new._seen, new._watched, new._written = dict(self._seen), dict(self._watched), set(self._written)
        return new

    def learn(self, state: State) -> None:
        """Look at what a program reads, before every step. What it writes is the parallel model's own."""
        self._written |= set(state.writes)
        own = {place: None for place in (*state.read, *state.numbers) if not place.root and place.steps[-1] != ("attr", "training")}
        self._watched = {place: None for place in (*self._watched, *own) if place not in self._written}
        self._bound = None
        if (original := self._original()) is not None:
            for place in self._watched:
                self._seen.setdefault(place, copied(place.value({"": original})))

    def follow(self) -> None:
        """Hand on what changed of what programs read. Raises ConfigError where the copy was set to something else."""
        original = self._original()
        if original is None:
            return
        self._check_children()
        self._apart.look()
        if not self._watched:
            return
        roots = {"": original}
        if self._bound is None:
            tensors = {
                place: (tensor, self._versions.get(place, token_of(tensor)))
                for place in self._watched
                if isinstance(tensor := self._seen[place], torch.Tensor)
            }
            self._bound = Bound({place: self._seen[place] for place in self._watched}, tensors, roots)
        if not self._bound.holds():
            self._hand_on(original, self._bound.changed())

    def _check_children(self) -> None:
        """Raise ConfigError for modules that were put in the place of others, added or removed."""
        if all(now == before for _, now, before in self._children):  # modules are compared by identity
            return
        moved = [
            f"{path}.{name}".lstrip(".")
            for path, now, before in self._children
            for name in dict.fromkeys((*before, *now))
            if now.get(name) is not before.get(name)
        ]
        raise ConfigError(
            f"{', '.join(moved) or 'the order of modules'} of the model given to parallelize: replaced, added or removed since, and the "
            "parallel model runs the modules of parallelize. Parallelize the model again, and make its optimizer anew."
        )

    def follow_all(self) -> None:
        """The same for everything there is: before a capture, which may read more than was read so far."""
        self.follow()
        original = self._original()
        if original is None:
            return
        now, versions = attributes(original), _versions(original)
        now = {**{place: place.value({"": original}) for place in self._seen}, **now}
        moved = [place for place, value in now.items() if not same(value, self._seen.get(place, ABSENT))]
        moved += [p for p, version in versions.items() if version != self._versions.get(p, version)]
        self._versions = versions
        self._hand_on(original, [p for p in moved if p not in self._written and p.steps[-1] != ("attr", "training")])

    def _hand_on(self, original: nn.Module, places: list[Place]) -> None:
        hand_on_library_hooks(original, self._skeleton, self._hooks)
        here, there = {"": self._skeleton}, {"": original}
        memo: dict[int, Any] = {id(module): self._skeleton.get_submodule(path) for path, module in _shared(original, self._skeleton)}
        both = []
        for place in sorted(places, key=lambda place: len(place.steps)):
            new, mine, before = place.value(there), place.value(here), self._seen.get(place, ABSENT)
            self._seen[place] = copied(new)
            if isinstance(new, torch.Tensor):
                self._versions[place] = token_of(new)
            if not (isinstance(new, torch.Tensor) or same(mine, before) or same(mine, new)):
                both.append(f"{place} is {new!r} there and {mine!r} here.")
            place.put(here, copy.deepcopy(new, memo))
        self._bound = None
        if both:
            raise ConfigError(
                "\n  ".join(["attributes were set on the model given to parallelize, and to something else on the parallel model:", *both])
                + "\n  Set them on one of the two, or to the same value on both."
            )


def _shared(original: nn.Module, skeleton: nn.Module) -> list[tuple[str, nn.Module]]:
    paths = {path for path, _ in skeleton.named_modules()}
    return [(path, module) for path, module in original.named_modules() if path in paths]


def _versions(model: nn.Module) -> dict[Place, int]:
    return {place: token_of(value) for place, value in attributes(model).items() if isinstance(value, torch.Tensor)}


class Shown:
    """The modules of a parallel model as the user sees them: what he sets there is handed on, what he puts there in vain is refused."""

    def __init__(self, root: nn.Module, skeleton: nn.Module) -> None:
        self._skeleton = skeleton
        paths = {path for path, _ in skeleton.named_modules()}
        self._modules = [(path, module) for path, module in root.named_modules() if path in paths]
        self._tables = [module.__dict__ for _, module in self._modules]
        self._own = [frozenset(table) for table in self._tables]
        self._lengths = list(map(len, self._tables))
        self._modes = [table["training"] for table in self._tables]
        self._children = [module._modules for _, module in self._modules]
        self.modules_are()
        self._set: dict[tuple[int, str], Any] = {  # what modules show of the model's own
            (index, name): value
            for index, (path, module) in enumerate(self._modules)
            for name, value in module.__dict__.items()
            if path and name != "training" and name[:1] != "_" and name in skeleton.get_submodule(path).__dict__
        }

    def follow(self) -> None:
        """Hand on modes, and attributes that are new or changed. Raises ConfigError for modules that were put in the place of others."""
        if [table["training"] for table in self._tables] != self._modes:
            self._follow_modes()
        if list(map(len, self._tables)) != self._lengths:
            self._look()
        for (index, name), before in self._set.items():
            value = self._tables[index].get(name, ABSENT)
            if value is not before:
                self._hand_on(index, name, value)
        if self._present() != self._held:
            raise ConfigError(
                "a module of the parallel model was replaced, added or removed: its programs run over the modules of parallelize. Change "
                "the model, and parallelize it again."
            )

    def _follow_modes(self) -> None:
        for index, (path, module) in enumerate(self._modules):
            if module.training != self._modes[index]:
                self._modes[index] = module.training
                _set_mode(self._skeleton, path, module.training, {p for p, _ in self._modules})

    def modes_are(self) -> None:
        """Take the present modes for handed on."""
        self._modes = [table["training"] for table in self._tables]

    def modules_are(self) -> None:
        """Take the present modules for those of parallelize: a new program may have a part at a place that had none on this rank."""
        self._held = self._present()

    def _present(self) -> list[nn.Module | None]:
        return [child for children in self._children for child in children.values()]

    def _look(self) -> None:
        for index, table in enumerate(self._tables):
            for name in table.keys() - self._own[index]:
                if not name.startswith("_"):
                    self._set.setdefault((index, name), ABSENT)
        self._lengths = list(map(len, self._tables))

    def _hand_on(self, index: int, name: str, value: Any) -> None:
        if name == "forward" or isinstance(value, (torch.Tensor, nn.Module)):
            raise ConfigError(
                f"{name} of {self._modules[index][0] or 'the parallel model'} was set: programs see it where it is set on the model, or "
                f"on pm.original_module.{self._modules[index][0]}."
            )
        self._set[index, name] = value
        Place("", (("sub", self._modules[index][0]), ("attr", name))).put({"": self._skeleton}, value)


def _set_mode(skeleton: nn.Module, path: str, training: bool, known: set[str]) -> None:
    """The mode of one module, and of those below it that have no parameters, and so no place of their own in a parallel model."""
    module = skeleton.get_submodule(path)
    module.training = training
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if below not in known:
            child.train(training)


def show(skeleton: nn.Module, name: str) -> Any:
    """An attribute of the model, or a module without parameters, as `pm.name` shows it; ABSENT where there is none."""
    module = skeleton._modules.get(name)
    if module is not None and not any(True for _ in module.parameters()):
        return module
    value = skeleton.__dict__.get(name, ABSENT)
    return ABSENT if isinstance(value, nn.Module) else value
