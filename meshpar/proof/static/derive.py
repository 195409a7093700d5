"""What one call of a lowered graph makes, derived from what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isclose, prod
from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import facts
from meshpar.graph.op import Op, Value, op_name, read, value_of
from meshpar.graph.operators import OPERATORS, draws, operator_of
from meshpar.proof.static import around, attention, beside, experts
from meshpar.proof.static.actions import OperatorAction, action_of, literal, reduction
from meshpar.proof.static.calls import PlainCall, plain_call
from meshpar.proof.static.claims import Claims, LocalValue, declared
from meshpar.proof.static.exchanging import exchange
from meshpar.proof.static.forms import AS_RESULT, PARTIAL, WHOLE, Outcome, through, told, unchanged
from meshpar.proof.static.layout import layout_of
from meshpar.proof.static.masks import Masks
from meshpar.proof.static.moves import Level, bounds, is_move, moved
from meshpar.proof.static.reader import GradientEdge, GradientStep, LocalKey, Made, ProgramReading, key_of
from meshpar.proof.static.repeated import Repeated
from meshpar.proof.static.report import Contradiction, Unproved
from meshpar.proof.static.shapes import LocalShapes
from meshpar.proof.static.spoken import check_arguments, is_same_operator
from meshpar.sharding.types import I, Partial, Ragged, Shard, Type

aten = torch.ops.aten


@dataclass(frozen=True)
class MatchedCall:
    """A call, and the one of the model's graph that it stands for, with operands in one order."""

    node: fx.Node
    call: PlainCall
    op: Op
    """That of the model's graph; its operands are those that the call reads, where it reads others of the same meaning."""
    held: tuple[LocalValue, ...]
    keys: tuple[LocalKey, ...]


class Derive:
    """Makes the results of calls. One for a whole check, since it remembers."""

    def __init__(self, claims: Claims) -> None:
        self.claims = claims
        self.shapes, self.masks = LocalShapes(), Masks()
        self.level = {a.group: k for k, a in enumerate(claims.axes)}
        self._repeated = Repeated(claims)
        self._ops: dict[fx.Node, Op] = {}
        self._actions: dict[Any, OperatorAction | None] = {}
        self._routes: dict[fx.Node, experts.RowsRoute] = {}
        self._draws: dict[tuple[Any, int], fx.Node] = {}
        self._known: dict[Any, tuple[tuple[tuple[Type, ...], ...], tuple[tuple[GradientStep, ...], ...]]] = {}

    def __call__(self, reading: ProgramReading, node: fx.Node) -> Made:
        name = op_name(node.target)
        beside.check(node)
        if name.startswith("meshpar.ops.collectives.") or name in beside.CONVERSIONS:
            return exchange(self.claims, self.level, reading, node)
        if name in experts.MOVEMENTS:
            return experts.MOVEMENTS[name](self.claims, self.level, self._routes, reading, node)
        saying = self._repeated.saying(reading, node)
        if saying is not None and (made := self._repeated.made(saying)) is not None:
            return made
        if (made := self._scaled(reading, node)) is not None:
            return made
        if (origin := self._mean(reading, node)) is not None:
            return self._unscaled_sum(reading, node, origin)
        found = self._match(reading, node)
        made = self._derived(found)
        if saying is not None:
            self._repeated.learn(saying, made)
        return made

    # -- which call of the model it is ---------------------------------------------------------------------------------------------------

    def _match(self, reading: ProgramReading, node: fx.Node) -> MatchedCall:
        said = declared(node, self.claims)
        origin = None if said is None else said.value[0]
        call = plain_call(node, None if origin is None or origin.op != "call_function" else origin.target)
        keys = tuple(key_of(n) for n in call.nodes)
        held = tuple(self._held(reading, key) for key in keys)
        if call.transposed:
            held = (held[0], self._transposed(held[1]), *held[2:])
        values = tuple(h.value for h in held)
        if origin is not None and origin.op == "call_function" and self._stands_for(call, origin):
            op = self._op(origin)
            if tuple(value_of(a) for a in op.operands) == values:
                check_arguments(op.name, call.arguments, op.arguments)
                return MatchedCall(node, call, op, held, keys)
            if attention.is_attention(op):
                return MatchedCall(node, call, attention.aligned(op, call, values, self.masks), held, keys)
            if facts(origin).expert_stack:
                return MatchedCall(node, call, experts.own_part(op, values, self.claims), held, keys)
        alike = [op for other in self.claims.calls.get((call.target, values), ()) if _agree(op := self._op(other), call)]
        for op in (*(op for op in alike if _literally(op, call)), *alike):
            return MatchedCall(node, call, op, held, keys)
        raise self._mismatch(call, origin, values)

    def _stands_for(self, call: PlainCall, origin: fx.Node) -> bool:
        return is_same_operator(call.target, origin.target) or (
            attention.is_attention(self._op(origin)) and call.target is aten.scaled_dot_product_attention.default
        )

    def _mismatch(self, call: PlainCall, origin: fx.Node | None, values: tuple[Value, ...]) -> Exception:
        if origin is None or origin.op != "call_function":
            return Unproved("it stands for no call of the model's graph")
        if not self._stands_for(call, origin):
            return Unproved(f"it is done in the place of {op_name(origin.target)}")
        wanted = tuple(value_of(a) for a in self._op(origin).operands)
        places = [i for i, (a, b) in enumerate(zip(values, wanted)) if a != b]
        at = places[0] if places else min(len(values), len(wanted))
        return Contradiction(f"operand {at + 1} is another value than the model reads there")

    def _held(self, reading: ProgramReading, key: LocalKey) -> LocalValue:
        held = reading.held.get(key)
        if held is None:
            raise Unproved("it reads a value of which nothing is known")
        return held

    def _op(self, node: fx.Node) -> Op:
        if node not in self._ops:
            self._ops[node] = read(node)
        return self._ops[node]

    def _transposed(self, held: LocalValue) -> LocalValue:
        """What grouped_mm reads, of the parameter that is handed to it instead."""
        user = next((u for u in held.value[0].users if op_name(u.target) == "transpose" and {d % 3 for d in u.args[1:]} == {1, 2}), None)  # type: ignore[operator]
        if user is None:
            raise Contradiction("the model does not transpose this parameter")
        swapped = {0: 0, 1: 2, 2: 1}
        return LocalValue((user, 0), tuple(replace(t, dim=swapped[t.dim]) if isinstance(t, Shard) else t for t in held.types))

    # -- what it gives -------------------------------------------------------------------------------------------------------------------

    def _derived(self, found: MatchedCall) -> Made:
        types = tuple(h.types for h in found.held)
        words = (found.call.way, found.call.cut, found.call.group, literal(dict(found.call.told)), self._copies(found))
        origin = found.op.node
        key = (self.claims.kinds.get(origin), id(found.op) if found.op is not self._ops.get(origin) else 0, types, words)
        if key not in self._known:
            self._known[key] = self._levels(found)
        outs, steps = self._known[key]
        outs = self._created(found, outs)
        self._check_shapes(found, outs)
        self._check_bounds(found)
        self._check_draws(found, outs[0])
        edges = tuple(GradientEdge(k, s) for k, s, info in zip(found.keys, steps, found.op.infos, strict=True) if info.requires_grad)
        results = tuple(LocalValue((origin, i), types) for i, types in enumerate(outs))
        return Made(results, tuple(edges if info is not None and info.requires_grad else () for info in found.op.outs))

    def _levels(self, found: MatchedCall) -> tuple[tuple[tuple[Type, ...], ...], tuple[tuple[GradientStep, ...], ...]]:
        """Types of the results and ways of the gradients, axis by axis."""
        op, count = found.op, len(found.op.outs)
        before = [self.claims.shapes(h.value, h.types) for h in found.held]
        after = [tuple(o.shape) if o is not None else () for o in op.outs]
        outs: list[list[Type]] = [[] for _ in range(count)]
        steps: list[list[GradientStep]] = [[] for _ in found.held]
        for k, axis in enumerate(self.claims.axes):
            level = Level(axis.size, tuple(shapes[k] for shapes in before), tuple(after))
            try:
                outcome = self._on_axis(found, k, level)
            except (Contradiction, Unproved) as why:
                raise type(why)(f"on {axis.name}: {why}") from None
            for i, type_ in enumerate(outcome.outs):
                outs[i].append(type_)
                after[i] = _part(after[i], type_, axis.size, max(axis.rank, 0))
            own = frozenset(op.nature.shared) if op.nature is not None else frozenset[int]()
            for i, (one, gradient) in enumerate(zip(steps, outcome.back, strict=True)):
                free = i in own or (gradient is AS_RESULT and not _acts_on_whole(op))
                one.append(GradientStep(None if free else WHOLE, gradient))
        return tuple(tuple(o) for o in outs), tuple(tuple(s) for s in steps)

    def _on_axis(self, found: MatchedCall, k: int, level: Level) -> Outcome:
        op, call, count = found.op, found.call, len(found.op.outs)
        types = [h.types[k] for h in found.held]
        if call.way and self.level.get(call.group) == k:
            return _ON_ITS_AXIS.get(call.way, attention.on_its_axis)(op, call, types, level.ranks)
        if all(t == I for t in types):
            copies = self._copies(found)
            if op.nature is not None and op.nature.shared:  # terms of its own: the same on all ranks, whatever gradient comes in
                return Outcome((I,) * count, tuple(WHOLE if i in op.nature.shared else AS_RESULT for i in range(len(types))))
            return unchanged(count, len(types)) if copies is None or copies[k] == I else Outcome((copies[k],), (PARTIAL,))
        if (outcome := experts.on_rows(op, types)) is not None:
            return outcome
        if facts(op.node).expert_stack and (outcome := experts.stacked(op, types)) is not None:
            return outcome
        if op.name.startswith("meshpar.hooked") and op.name != "meshpar.hooked_parts":
            raise Contradiction("a hook is handed the gradient of a part")
        if (nature := op.nature) is not None and not nature.elementwise and op.name not in OPERATORS:
            raise Contradiction("its backward treats all elements together, and is handed a part")
        if nature is not None and nature.shared:
            raise Unproved("its backward adds terms of its own")
        if is_move(op.name):
            outs = moved(op, types, level)
            return Outcome(outs, (WHOLE,) * len(types))
        action = self._action(op)
        if action is None and operator_of(op.node.target).rule is None:
            raise Contradiction("nothing is known of what it does to parts, and it is handed one")
        if action is None:
            raise Unproved("what it does to parts of its operands is not known")
        return through(action, types, level.ranks)

    def _copies(self, found: MatchedCall) -> tuple[Type, ...] | None:
        """Of a call that copies a value along a dim: the parts of that dim which a rank is said to make. (Each is as good as any other.)"""
        op = found.op
        if op.name not in _COPYING or len(op.infos) != 1 or (said := declared(found.node, self.claims)) is None:
            return None
        before, after = op.shapes[0], op.out.shape
        shift = len(after) - len(before)
        copied = {d: 1 if d < shift else before[d - shift] for d in range(len(after))}
        return tuple(t if isinstance(t, Shard) and _of_copies(t, copied[t.dim], a.size, op.name) else I
                     for a, t in zip(self.claims.axes, said.types, strict=True))  # fmt: skip

    def _action(self, op: Op) -> OperatorAction | None:
        key = self.claims.kinds.get(op.node), op.shapes != self._op(op.node).shapes
        if key[1]:
            return action_of(op)
        if key not in self._actions:
            self._actions[key] = action_of(op)
        return self._actions[key]

    # -- whether it says so --------------------------------------------------------------------------------------------------------------

    def _created(self, found: MatchedCall, outs: tuple[tuple[Type, ...], ...]) -> tuple[tuple[Type, ...], ...]:
        """Tensors of one value: any part of one is such a tensor, so which part it is said to be is what it is."""
        sized = found.op.name in _FILLED and "size" in found.call.arguments
        if not sized or list(found.call.arguments["size"]) == list(found.op.arguments["size"]):
            return outs
        said = declared(found.node, self.claims)
        if said is None or any(isinstance(t, (Partial, Ragged)) for t in said.types):
            raise Unproved("a tensor of one value is said to be something else than a part")
        return (said.types,)

    def _check_shapes(self, found: MatchedCall, outs: Sequence[tuple[Type, ...]]) -> None:
        """A rank's call gives a rank's part, in size too."""
        call, op = found.call, found.op
        local = [self.claims.shapes(h.value, h.types)[-1] for h in found.held]
        examples = {n: (shape, info.dtype) for n, shape, info in zip(call.nodes, local, op.infos, strict=True)}
        if found.call.transposed:
            shape = local[1]
            examples[call.nodes[1]] = ((shape[0], shape[1], shape[2]), op.infos[1].dtype)
        if call.way in ("gathered", "ring") and call.nodes[0] in call.nodes[1:3]:
            raise Unproved("queries and keys are one value, of which it takes the part and the whole")
        if call.way in ("gathered", "ring"):  # keys and values are handed as parts, and attended to as a whole
            for node, shape, info in zip(call.nodes[1:3], local[1:3], op.infos[1:3], strict=True):
                examples[node] = ((*shape[:-2], info.shape[-2], shape[-1]), info.dtype)
        if call.way == "vocabulary" and len(call.nodes) > 2:  # the weights of classes are handed whole, and looked up by class
            examples[call.nodes[2]] = ((local[0][call.cut[0]],), op.infos[2].dtype)
        held = [i for i, info in enumerate(op.outs) if info is not None and 0 not in info.shape]
        wanted = tuple(self.claims.shapes((op.node, i), outs[i])[-1] for i in held)
        gives = self.shapes(call.target, call.args, call.kwargs, examples)
        if isinstance(gives, str):
            whole = {n: (info.shape, info.dtype) for n, info in zip(op.node.all_input_nodes, op.infos)}
            if len(whole) == len(op.infos) and isinstance(self.shapes(op.node.target, op.node.args, op.node.kwargs, whole), tuple):
                raise Contradiction(f"it does not run on what a rank has: {gives}")
            raise Unproved("it does not run on tensors without memory")
        found_shapes = tuple(one for i in held if i < len(gives) and (one := gives[i]) is not None)
        if found_shapes != wanted:
            raise Contradiction(f"a rank gets {_listed(found_shapes)}, its part is {_listed(wanted)}")

    def _check_bounds(self, found: MatchedCall) -> None:
        """A slice begins where the rank's part of what is sliced begins."""
        if found.op.name != "slice":
            return
        dim, held = found.op.dim(), found.held[0]
        shapes = self.claims.shapes(held.value, held.types)
        here = bounds(found.call.arguments, shapes[-1][dim])
        size = found.op.shapes[0][dim]
        there = bounds(found.op.arguments, size)
        cuts = [(a, t) for a, t in zip(self.claims.axes, held.types, strict=True) if isinstance(t, Shard) and t.dim == dim]
        if len(cuts) > 1:
            if there != (0, size, 1) or here != (0, shapes[-1][dim], 1):
                raise Unproved("a dim that several axes cut is sliced")
            return
        for axis, shard in cuts:
            ranges = shard.ranges(axis.size, max(axis.rank, 0))
            start, stop = (sum(max(0, min(high, b) - low) for low, high in ranges) for b in there[:2])
            there = (start, max(start, stop), there[2])
        if here != there:
            raise Contradiction(f"it takes {here[0]}:{here[1]} of what a rank has, its part of the model's slice is {there[0]}:{there[1]}")

    def _check_draws(self, found: MatchedCall, types: tuple[Type, ...]) -> None:
        """Ranks that hold the same draw the same, others do not; no two calls draw the same numbers."""
        call = found.call
        if call.shards is None:
            if draws(found.op.node) and facts(found.op.node).seed is not None:
                raise Contradiction("it draws from the process's generator, whose numbers differ between ranks")
            return
        own = {self.level.get(group, -1) for group, _, _ in call.shards if group in self.level}
        for k, (axis, type_) in enumerate(zip(self.claims.axes, types, strict=True)):
            if isinstance(type_, (Shard, Ragged)) and k not in own:
                raise Contradiction(f"on {axis.name}: every rank draws the same numbers for its part")
            if type_ == I and k in own:
                raise Contradiction(f"on {axis.name}: ranks draw numbers of their own for what they all have")
        assert call.draw is not None
        if self._draws.setdefault(call.draw, found.op.node) is not found.op.node:
            raise Contradiction("it draws the numbers that another call has drawn")

    # -- means ---------------------------------------------------------------------------------------------------------------------------

    def _mean(self, reading: ProgramReading, node: fx.Node) -> fx.Node | None:
        """The mean of the model's graph that a sum begins: a sum of parts, which is multiplied by one over the whole count next."""
        if op_name(plain_call(node, None).target) != "sum" or len(node.users) != 1:
            return None
        (user,) = node.users
        while op_name(user.target).startswith("meshpar.ops.collectives.") and len(user.users) == 1:
            (user,) = user.users
        said = declared(user, self.claims) if op_name(plain_call(user, None).target) == "mul" else None
        origin = said.value[0] if said is not None else None
        return origin if origin is not None and origin.op == "call_function" and op_name(origin.target) == "mean" else None

    def _unscaled_sum(self, reading: ProgramReading, node: fx.Node, origin: fx.Node) -> Made:
        op, call = self._op(origin), plain_call(node, None)
        key, here = key_of(call.nodes[0]), call.arguments
        held = self._held(reading, key)
        if held.value != value_of(op.operands[0]):
            raise Contradiction("operand 1 is another value than the model reads there")
        dims = tuple(sorted(d % max(1, len(op.shapes[0])) for d in here.get("dim") or range(len(op.shapes[0]))))
        if dims != op.dims() or bool(here.get("keepdim")) != bool(op.arguments.get("keepdim", False)):
            raise Contradiction(f"it sums over the dims {list(dims)}, the model takes the mean over {list(op.dims())}")
        action = reduction(linear=True, whole=False)(op)
        assert action is not None
        outs, steps = list[Type](), list[GradientStep]()
        for k, axis in enumerate(self.claims.axes):
            outcome = through(action, [held.types[k]], axis.size)
            outs.append(outcome.outs[0])
            steps.append(GradientStep(None if outcome.back[0] is AS_RESULT else WHOLE, outcome.back[0]))
        edges = (GradientEdge(key, tuple(steps)),) if op.infos[0].requires_grad else ()
        return Made((LocalValue((origin, UNSCALED), tuple(outs)),), (edges,))

    def _scaled(self, reading: ProgramReading, node: fx.Node) -> Made | None:
        """The product that makes a mean of a sum."""
        call = plain_call(node, None)
        keys = [key_of(a) for a in call.nodes]
        held = [reading.held.get(key) for key in keys]
        one = next((h for h in held if h is not None and h.value[1] == UNSCALED), None)
        if one is None:
            return None
        scale = call.args[1] if len(call.args) > 1 else None
        if op_name(call.target) != "mul" or len(keys) != 1 or not isinstance(scale, (int, float)):
            raise Contradiction("a sum that is to become a mean is not divided by its count")
        op = self._op(one.value[0])
        wanted = 1.0 / max(1, prod(op.shapes[0][d] for d in op.dims()))
        if not isclose(scale, wanted, rel_tol=1e-9):
            raise Contradiction(f"a sum is multiplied by {scale}, the mean of the whole is the sum times {wanted}")
        steps = tuple(GradientStep(None, AS_RESULT) if t == I else GradientStep(WHOLE, WHOLE) for t in one.types)
        return Made((LocalValue((op.node, 0), one.types),), ((GradientEdge(keys[0], steps),) if op.out.requires_grad else (),))


UNSCALED = -1
"""In the place of the number of a result: the sum that the mean of the model's graph is made of."""
_COPYING = frozenset("expand broadcast_to expand_as repeat repeat_interleave".split())
_FILLED = frozenset("zeros ones full empty new_zeros new_ones new_full new_empty rand randn".split())


def _of_copies(shard: Shard, size: int, ranks: int, name: str) -> bool:
    """Whether every part of a dim that is made of copies of `size` elements has as many copies of each of them."""
    repeat, segments = layout_of(shard, ranks)
    if name == "repeat_interleave":  # each element several times in a row
        return repeat % size == 0
    return size == 1 or (name == "repeat" and repeat == 1 and all(one % size == 0 for _, one in segments))


def _acts_on_whole(op: Op) -> bool:
    """Whether a backward of its own is right only for whole gradients: what it makes of summands does not add up."""
    if op.name.startswith("meshpar.hooked"):
        return op.nature is None or not op.nature.linear
    nature = op.nature
    return nature is not None and not nature.linear and (nature.ran or operator_of(op.node.target).rule is None)


def _agree(op: Op, call: PlainCall) -> bool:
    try:
        check_arguments(op.name, call.arguments, op.arguments)
    except Contradiction:
        return False
    return True


def _literally(op: Op, call: PlainCall) -> bool:
    return literal((call.args, dict(call.kwargs))) == literal((op.node.args, dict(op.node.kwargs)))


def _part(shape: tuple[int, ...], type_: Type, ranks: int, rank: int) -> tuple[int, ...]:
    if isinstance(type_, Shard):
        return tuple(type_.local_length(ranks, rank) if d == type_.dim else n for d, n in enumerate(shape))
    return (shape[0] // ranks, *shape[1:]) if isinstance(type_, Ragged) else shape


def _listed(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join(str(list(s)) for s in shapes)


def _vocabulary(op: Op, call: PlainCall, types: Sequence[Type], ranks: int) -> Outcome:
    """Look-up in, or cross entropy over, a vocabulary of which each rank has a part."""
    lookup = op.name == "embedding"
    dim = 0 if lookup or len(op.shapes[0]) == 1 else 1
    table = types[0]
    if not isinstance(table, Shard) or table.dim != dim:
        raise Contradiction(f"its vocabulary is {told(table)}, it takes a part")
    if call.cut[0] != dim or layout_of(Shard(*call.cut), ranks) != layout_of(table, ranks):
        raise Contradiction(f"it is told that ranks have {Shard(*call.cut)} of the vocabulary, they have {table}")
    if any(t != I for t in types[1:]):
        raise Contradiction("ids or labels are not the same on all ranks")
    return Outcome((Partial() if lookup else I,), (WHOLE,) * len(types))


_ON_ITS_AXIS = {"vocabulary": _vocabulary, "near": around.convolution, "prefix": around.cumulative}
"""Special ways that are no attention."""
