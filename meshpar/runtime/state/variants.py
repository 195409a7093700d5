"""The programs of a parallel model, by batch and by the state that each was captured with; a step takes the one that holds.

state as at a capture           ->   that program
a number changed                ->   a capture with it as an input: from then on it costs nothing
that does not work, or          ->   a capture for the new value; the last few are kept
something else changed
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshpar.capture.state.ambient import TABLE
from meshpar.capture.state.places import Place, described, same
from meshpar.capture.state.taken import State
from meshpar.capture.symbolic import Formulas
from meshpar.capture.witness import Unseen
from meshpar.compile.program import Program
from meshpar.compile.programs import Programs
from meshpar.compile.shapes.classes import kind_of
from meshpar.compile.signature import BatchSignature
from meshpar.compile.state.following import Shown
from meshpar.compile.state.held import Held
from meshpar.errors import BatchError, CaptureError, ConfigError, PlanError
from meshpar.runtime.engine import Engine
from meshpar.runtime.state.alike import Alike, Hooks, Step
from meshpar.runtime.state.resized import Resized, Told
from meshpar.runtime.state.trainable import Trainable

Key = tuple[BatchSignature, int, str]
"""A batch, its number of microbatches, and which parameters require gradients."""

KEPT = 8
"""How many programs are kept for one batch."""
MOST = 32
"""How many programs are kept in all, but for the first: those used last."""


@dataclass(frozen=True)
class Variant:
    """A program, and for what it holds."""

    program: Program
    held: Held


class Variants:
    """All programs of `model`. Collective wherever a program is made."""

    def __init__(self, model: nn.Module, makes: Programs, engine: Engine, mesh: DeviceMesh, hooks: Hooks | None = None) -> None:
        self._model, self._makes, self._engine = model, makes, engine
        self._device = mesh.device_type
        self._alike, self._hooks = Alike(mesh), hooks
        self._variants: dict[Key, list[Variant]] = {}
        self._fixed: set[Place] = set()
        """Numbers that could not become inputs."""
        self._captures: Counter[Key] = Counter()
        self._last: list[Variant] | None = None
        """The programs of the batch before."""
        self._resized = Resized(engine)
        self.forgotten = 0
        """How many shapes were forgotten for others."""
        self._said: set[str] = set()
        self.rebind()

    def rebind(self) -> None:
        """Look at the modules and parameters that the model has now."""
        self._shown = Shown(self._model, self._makes.skeleton)
        self._trainable = Trainable(self._model, self._makes)

    def modes_are_known(self) -> None:
        """The modes of the modules were handed on already."""
        self._shown.modes_are()

    def known(self) -> list[tuple[BatchSignature, int]]:
        """The batches that there are programs for."""
        return [key[:2] for key in self._variants]

    def programs(self) -> list[tuple[Program, int, str]]:
        """Every program, with its microbatches and trainable parameters."""
        return [(one.program, key[1], key[2]) for key, found in self._variants.items() for one in found]

    def learn(self, program: Program, microbatches: int, token: str = "") -> Variant:
        """Keep a program that the engine knows."""
        key = replace(program.signature, state=""), microbatches, token
        state = program.captured.state
        known = self._held(state)
        found = Variant(program, known or Held(state, self._makes.skeleton, self._device))
        kept = self._variants.setdefault(key, [])
        kept.insert(0, found)
        for old in kept[KEPT:]:
            self._forget(old.program)
        del kept[KEPT:]
        if program.like is None and not program.alone:
            self._resized.learn(self._kind(key), program)
        if known is None:
            self._makes.following.learn(state)
        self._forget_oldest()
        return found

    def _held(self, state: State) -> Held | None:
        """What a program looks at that was made with this state, or of one that was."""
        return next((one.held for kept in self._variants.values() for one in kept if one.held.state is state), None)

    def _forget_oldest(self) -> None:
        """Forget the programs that were not used for longest; never that of parallelize, which reports are about."""
        _first, *others = self._variants
        while sum(map(len, self._variants.values())) > MOST and len(others) > 1:
            oldest, *others = others
            for old in self._variants.pop(oldest):
                self._forget(old.program)
            self._captures.pop(oldest, None)
            self.forgotten += 1

    def _forget(self, program: Program) -> None:
        self._engine.forget(program)
        self._resized.forget(program)

    def lost(self, name: str) -> str | None:
        """Where forward puts a tensor into an attribute of the model that nobody finds there, if it does."""
        place = Place("", (("sub", ""), ("attr", name)))
        return next((p.captured.state.lost[place] for p, _, _ in self.programs() if place in p.captured.state.lost), None)

    def match(self, signature: BatchSignature, microbatches: int, closer: Callable[[], None] | None) -> tuple[Key, Variant | None]:
        """The program that holds now, if there is one. `closer`: compares the batches of ranks, if they have not done so before."""
        self._shown.follow()
        self._makes.following.follow()
        self._trainable.follow()
        self._check_modes()
        key = signature, microbatches, self._trainable.token
        kept = self._variants.get(key, [])
        found = next((one for one in kept if one.held.holds()), None)
        # What a program does tells it from others, not what it was captured with: that may differ where it does not matter (an order).
        graph, numbers = (found.program.plan.graph, found.held.numbers()) if found is not None else ("none yet", {})
        self._alike.begin(Step(f"{signature.key} {microbatches}", key[2], graph, numbers), new=closer is not None, hooks=self._hooks)
        if found is None or closer is not None:
            self._alike.check(closer)
        if found is not None and kept[0] is not found:
            kept.remove(found)
            kept.insert(0, found)
        if found is not None and kept is not self._last:
            self._last = kept
            if kept is not next(iter(self._variants.values())):
                self._variants[key] = self._variants.pop(key)
        return key, found

    def told(self) -> tuple[str, ...]:
        """What became of the shapes of batches, for `explain`."""
        count = sum(map(len, self._variants.values()))
        gone = f"; {self.forgotten} used longest ago forgotten (at most {MOST} are kept)" if self.forgotten else ""
        return (f"{count} programs kept{gone}", *self._makes.shapes.told(self._makes.planner.plans.made), *self._resized.told())

    def make(self, key: Key, args: tuple[Any, ...], kwargs: Mapping[str, Any], say: Callable[[], None] = lambda: None) -> Variant:
        """A program for the state of this moment. `say`: called before one is made that others do not tell."""
        made = self._told_by_others(key, args, kwargs)
        if self._alike.all(made is not None and not made.tried) and made is not None:
            self._resized.add(made)
            return self.learn(made.program, *key[1:])
        say()
        self._makes.following.follow_all()
        kept = self._variants.get(key, [])
        changed = kept[0].held.changed() if kept else []
        self._alike.values({str(place): described(self._value(kept[0], place)) for place in changed})
        self._count(key, changed)
        found = self._made_as_ever(key, args, kwargs, kept, changed)
        if made is not None:
            self._resized.compare(made, found.program)
        return found

    def _told_by_others(self, key: Key, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Told | None:
        """The program for a new batch, if those of other sizes tell it."""
        like = self._resized.one_of(self._kind(key))
        if like is None or key in self._variants:
            return None

        def holds(state: State) -> bool:
            held = self._held(state)
            return held is not None and held.holds()

        def follow(symbol_of: Any, hints: Sequence[int]) -> Formulas:
            self._makes.following.follow_all()
            return self._makes.formulas(args, kwargs, like, key[1], symbol_of, hints)

        try:
            sizes = self._makes.sizes(args, kwargs, like, key[1])
        except (Unseen, BatchError):
            return None  # the capture tells what is wrong with it
        return self._resized.at(self._kind(key), sizes, key[0], holds, follow)

    def _kind(self, key: Key) -> Hashable:
        return kind_of(*key)

    def _made_as_ever(
        self, key: Key, args: tuple[Any, ...], kwargs: Mapping[str, Any], kept: list[Variant], changed: list[Place]
    ) -> Variant:
        numbers = self._numbers(kept[0], changed) if kept else ()
        if numbers:
            try:
                return self._made(key, args, kwargs, numbers, kept[0].held.roots)
            except (CaptureError, PlanError):
                self._fixed |= set(numbers)
        return self._made(key, args, kwargs, (), {})

    def done(self, variant: Variant) -> None:
        """After a step: ranks agreed, and what forward leaves behind is there."""
        self._alike.check()
        variant.held.leave()

    def _made(
        self, key: Key, args: tuple[Any, ...], kwargs: Mapping[str, Any], numbers: tuple[Place, ...], roots: Mapping[str, Any]
    ) -> Variant:
        program = self._makes.make(
            args,
            kwargs,
            training=key[0].training,
            microbatches=key[1],
            numbers=numbers,
            roots=roots,
            trainable=self._trainable.token,
        )
        self._engine.add(program)
        self._shown.modules_are()
        found = self.learn(program, *key[1:])
        if not found.held.holds():
            places = ", ".join(map(str, found.held.changed()))
            raise CaptureError(
                f"{places or 'What forward reads'} changes by being read: no program can hold for it.\n  Pass it in the batch as a tensor."
            )
        return found

    def _numbers(self, last: Variant, changed: list[Place]) -> tuple[Place, ...]:
        """The numbers that changed, and those that are inputs already; not those inside of expert layers, which run in another form."""
        experts = tuple(last.program.captured.experts)
        found = dict.fromkeys((*last.held.state.numbers, *(part for place in changed for part in self._parts(last, place))))
        if all(place in last.held.state.numbers for place in changed):
            return ()
        return tuple(p for p in found if p not in self._fixed and type(self._value(last, p)) in (int, float) and _may_vary(p, experts))

    def _parts(self, last: Variant, place: Place) -> Iterator[Place]:
        """A place, or those in a list or dict of plain values that changed."""
        now: Any = self._value(last, place)
        before: Any = last.held.state.read.get(place)
        if type(now) is type(before) and type(now) in (list, dict) and len(now) == len(before):
            keys = list(now) if isinstance(now, dict) else range(len(now))
            yield from (place.then("item", key) for key in keys if key in keys and not same(now[key], _item(before, key)))
        else:
            yield place

    def _value(self, last: Variant, place: Place) -> Any:
        return place.value(last.held.roots)

    def _count(self, key: Key, changed: list[Place]) -> None:
        """Say so when programs are made again and again."""
        self._captures[key] += bool(changed)
        count = self._captures[key]
        if count >= KEPT and count & (count - 1) == 0:
            warnings.warn(
                f"the model was captured {count} times more because {', '.join(map(str, changed[:5]))} changed, which costs seconds each "
                f"time. Pass what changes with the steps as a tensor in the batch, or compute with it in tensor arithmetic alone.",
                stacklevel=2,
            )

    def _check_modes(self) -> None:
        """What torch is asked to do to every operator around a step."""
        for row in TABLE:
            if row.done == "refused" and row.read is not None and row.read():
                raise ConfigError(f"{row.what}: a parallel model cannot run inside of them: {row.why}.")
            if row.done == "said" and row.read is not None and (found := row.read()) and str(found) not in self._said:
                self._said.add(str(found))
                warnings.warn(f"{', '.join(found)} around a step of a parallel model: {row.why}, not those of the model.", stacklevel=2)


def _item(container: Any, key: Any) -> Any:
    return container.get(key) if isinstance(container, dict) else container[key]


def _may_vary(place: Place, experts: tuple[str, ...]) -> bool:
    path = str(place.steps[0][1])
    return place.steps[-1][0] in ("attr", "item", "cell") and not any(path == e or path.startswith(f"{e}.") for e in experts)
