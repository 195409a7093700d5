"""Rows chosen by a mask, at a fixed shape: every row is computed, and those that were not chosen are left out where rows are put back.

    top = mask.nonzero();  out.index_add_(0, top, f(x[top]))     ->     out.index_add_(0, all, where(mask, f(x[all]), 0))
    y[mask].sum()                                                ->     where(mask, y, 0).sum()
    cross_entropy(y[mask], labels[mask])                         ->     cross_entropy(y, where(mask, labels, -100))

Exact, as long as every operator in between treats rows alone; anything else is refused. A loop over a list of experts costs as many
rows per expert as there are choices.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from meshpar._torch import OpOverload, pytree
from meshpar.capture.simplify import emit
from meshpar.errors import CaptureError
from meshpar.graph.facts import DataSized, Info, facts, set_facts
from meshpar.graph.op import op_name, read
from meshpar.graph.operators import OperatorKind, draws, operator_of
from meshpar.sharding.infer import signature_of

aten = torch.ops.aten


def lift(graph: fx.Graph) -> None:
    """Give every selection of rows in `graph` a fixed shape. Raises CaptureError where an operator mixes the chosen rows."""
    if any(_ragged(node) or facts(node).symbol is not None for node in graph.nodes):
        _Lift(graph).run()


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are made in the same way."""
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return a is b or (not isinstance(a, fx.Node) and type(a) is type(b) and bool(a == b))
    if a.op != "call_function" or a.target is not b.target or _random(a):
        return False
    (left, spec), (right, other) = (pytree.tree_flatten((one.args, one.kwargs)) for one in (a, b))
    return spec == other and all(_equal(x, y) for x, y in zip(left, right, strict=True))


def _random(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and (draws(node) or node.target._schema.is_mutable)


def _ragged(node: fx.Node) -> bool:
    info = _info(node)
    return any(isinstance(i, DataSized) for i in (info if isinstance(info, tuple) else (info,)))


class _Lift:
    """The state of one pass: which mask each symbol counts, and which nodes hold its rows along which dim."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.masks: dict[str, fx.Node] = {}
        self.rows: dict[fx.Node, tuple[str, int]] = {}
        self.same: dict[str, str] = {}
        """Symbol -> an earlier one that counts an equal mask."""
        self.numbers: dict[fx.Node, Any] = {}
        """Numbers made of sizes -> what they are where all rows are there."""

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "output":
                if any(source in self.rows for source in node.all_input_nodes):
                    raise CaptureError(
                        "The forward returns rows chosen by a mask, whose number depends on data. Return all rows and the mask.",
                        modules=("",),
                    )
            elif node.op == "call_function":
                self._number(node) or self._choose(node) or self._put_back(node) or self._carry(node)

    def _size(self, symbol: str) -> int:
        return prod(_shape(self.masks[symbol]))

    def _number(self, node: fx.Node) -> bool:
        """A size as a number: where it is the size of something it becomes the number of all rows, else a tensor that counts the chosen."""
        symbol = facts(node).symbol
        if symbol is None:
            return False
        value = self._size(symbol) if symbol in self.masks else None
        if value is None and node.op == "call_function" and not isinstance(node.target, OpOverload):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.numbers.get(n, n))
            value = None if set(node.all_input_nodes) - set(self.numbers) else node.target(*args, **kwargs)  # type: ignore[operator]
        if value is not None:
            self.numbers[node] = value
            for user in list(node.users):
                self._told(user, node, value)
        return True

    def _told(self, user: fx.Node, node: fx.Node, value: Any) -> None:
        """Give a user of a number what it asks for: a size, or a count."""
        if facts(user).symbol is not None:
            return  # (made of numbers itself)

        def told(given: Any) -> Any:
            return map_arg(given, lambda n: value if n is node else n)

        schema = user.target._schema.arguments if isinstance(user.target, OpOverload) and not isinstance(value, bool) else ()
        given = dict(zip((a.name for a in schema), user.args, strict=False)) | user.kwargs
        counted = [a for a in schema if given.get(a.name) is node and "int" not in str(a.type).lower()]
        if any(a.name in user.kwargs for a in counted):
            self._uncounted(user)
        if counted and all(a.type.kind() != "TensorType" for a in counted):
            user.target = self._of_tensors(user)
        for place, argument in enumerate(user.args):
            counts = any(place < len(schema) and schema[place].name == a.name for a in counted)
            user.update_arg(place, self._counted(user, node) if counts else told(argument))
        user.kwargs = told(user.kwargs)

    def _of_tensors(self, user: fx.Node) -> OpOverload:
        """The form of an operator that takes a tensor for a number."""
        assert isinstance(user.target, OpOverload)
        packet = user.target.overloadpacket
        if user.target._overloadname != "Scalar" or "Tensor" not in packet.overloads():
            self._uncounted(user)
        return packet.Tensor

    def _counted(self, user: fx.Node, number: fx.Node) -> fx.Node:
        """The value of a number that counts chosen rows, as a tensor."""
        symbol, info = facts(number).symbol, Info((), torch.int64, False)
        if symbol in self.masks:
            mask = self.masks[str(symbol)]
            if _dtype(mask) != torch.bool:
                mask = emit(user, aten.ne.Scalar, (mask, 0), Info(_shape(mask), torch.bool, False))
            return emit(user, aten.sum.default, (mask,), info)
        target = _ON_COUNTS.get(number.target)
        if target is None or number.kwargs:
            self._uncounted(user)
        args = [self._counted(user, one) if isinstance(one, fx.Node) else one for one in number.args]
        tensors = [one for one in args if isinstance(one, fx.Node)]
        if target is aten.clamp.default or not isinstance(args[0], fx.Node):  # a bound is a number, and numbers come second
            others = [one for one in args if one not in tensors]
            if len(tensors) != 1 or number.target not in _EITHER_WAY:
                self._uncounted(user)
            args = [*tensors, *((None, *others) if number.target is torch.sym_min else others)]
        return emit(user, target, tuple(args), info)

    def _uncounted(self, user: fx.Node) -> None:
        where = f"{facts(user).module or 'the model'} ({facts(user).source or 'source unknown'})"
        raise CaptureError(
            f"{user.target} in {where} computes with the number of rows that a mask chooses, which depends on data.\n"
            "  Use the tensor mask.sum() for that number.",
            modules=(facts(user).module or "",),
        )

    def _choose(self, node: fx.Node) -> bool:
        """Where rows are chosen: positions of a mask, or a mask as an index."""
        source = node.args[0] if node.args else None
        if node.target in (aten.where.default, aten.nonzero_numpy.default):
            return self._count(_info(node)[0], source)
        if (
            node.target is operator.getitem
            and isinstance(source, fx.Node)
            and source.target in (aten.where.default, aten.nonzero_numpy.default)
        ):
            self._replace(node, self._positions(node, source.args[0], int(node.args[1])), 0)  # type: ignore[arg-type]
            return True
        if node.target is aten.masked_select.default and isinstance(source, fx.Node) and self._count(_info(node), node.args[1]):
            if _shape(source) != _shape(node.args[1]):
                self._refuse(node)
            flat = [prod(_shape(source))]
            self._replace(node, emit(node, aten.reshape.default, (source, flat), Info((flat[0],), _dtype(source), False)), 0)
            return True
        if node.target is aten.nonzero.default and self._count(_info(node), source):
            columns = [self._positions(node, source, d) for d in range(len(_shape(source)))]
            info = Info((prod(_shape(source)), len(columns)), torch.int64, False)
            self._replace(node, emit(node, aten.stack.default, (columns, 1), info), 0)
            return True
        if node.target is aten.index.Tensor and _ragged(node) and self.mask_of(node.args[1]) is not None:
            mask = self.mask_of(node.args[1])
            self._count(_info(node), mask)
            assert isinstance(source, fx.Node) and mask is not None
            shape = (prod(_shape(mask)), *_shape(source)[len(_shape(mask)) :])
            info = Info(shape, _info(node).dtype, False)
            self._replace(node, emit(node, aten.reshape.default, (source, list(shape)), info), 0)
            return True
        return False

    def _count(self, info: Any, mask: Any) -> bool:
        if not isinstance(info, DataSized) or info.rows is None:
            return False
        symbol = info.rows[0]
        self.same[symbol] = next((s for s, other in self.masks.items() if _equal(mask, other)), symbol)
        self.masks[symbol] = self.masks.get(self.same[symbol], mask)
        return True

    def _rows_of(self, info: DataSized) -> tuple[str, int] | None:
        return info.rows and (self.same.get(info.rows[0], info.rows[0]), info.rows[1])

    def mask_of(self, indices: Any) -> fx.Node | None:
        only = indices[0] if len(indices) == 1 else None
        return only if isinstance(only, fx.Node) and only not in self.rows and _dtype(only) == torch.bool else None

    def _positions(self, node: fx.Node, mask: Any, dim: int) -> fx.Node:
        """Coordinate `dim` of every position of `mask`, in order: (arange // stride) % size."""
        shape = _shape(mask)
        info = Info((prod(shape),), torch.int64, False)
        device = next(
            (n.kwargs["device"] for n in self.graph.nodes if n.op == "call_function" and "device" in n.kwargs), torch.device("cpu")
        )
        value = emit(node, aten.arange.default, (prod(shape),), info, {"device": device})
        if prod(shape[dim + 1 :]) > 1:
            value = emit(node, aten.floor_divide.default, (value, prod(shape[dim + 1 :])), info)
        return emit(node, aten.remainder.Scalar, (value, shape[dim]), info) if dim > 0 else value

    def _replace(self, node: fx.Node, value: fx.Node, dim: int) -> None:
        symbol = next(s for s, mask in self.masks.items() if s in _symbols(node))
        self.rows[value] = (self.same[symbol], dim)
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)

    def _put_back(self, node: fx.Node) -> bool:
        """Where rows leave the selection again."""
        handler = _SINKS.get(op_name(node.target))
        inputs = [source for source in node.all_input_nodes if source in self.rows]
        if handler is None or not inputs or _ragged(node):
            return False
        symbols = {self.rows[source][0] for source in inputs}
        if len(symbols) != 1 or not handler(self, node, symbols.pop()):
            self._refuse(node)
        return True

    def _carry(self, node: fx.Node) -> bool:
        """An operator on rows, each alone."""
        inputs = [source for source in node.all_input_nodes if source in self.rows]
        infos = _info(node)
        infos = infos if isinstance(infos, tuple) else (infos,)
        if not inputs and not _ragged(node):
            return False
        outputs = [self._rows_of(info) for info in infos if isinstance(info, DataSized)]
        symbols = {self.rows[source][0] for source in inputs} | {rows[0] for rows in outputs if rows}
        if not outputs or None in outputs or len(outputs) != len(infos) or len(symbols) != 1 or not symbols <= set(self.masks):
            self._refuse(node)
        if not inputs and op_name(node.target) not in _ALIKE:  # (the first n rows of a table do not lie where the chosen ones do)
            self._refuse(node)
        size = self._size(symbols.pop())
        fixed = tuple(Info(tuple(size if isinstance(n, str) else n for n in info.shape), info.dtype, False) for info in infos)
        set_facts(node, replace(facts(node), info=fixed if isinstance(_info(node), tuple) else fixed[0]))
        if not self._row_by_row(node, outputs):  # type: ignore[arg-type]
            self._refuse(node)
        self.rows[node] = outputs[0]  # type: ignore[assignment]
        return True

    def _row_by_row(self, node: fx.Node, outs: Sequence[tuple[str, int]]) -> bool:
        """Whether each row of the results is made of one row of the operands: rows may be cut, and come out where they went in."""
        if node.target is operator.getitem or self._size(outs[0][0]) == 1:
            return True
        op = read(node)
        found = signature_of(op)
        if found is None:
            return False
        given = [dims[self.rows[value][1]] for value, dims in zip(op.operands, found.inputs, strict=True) if value in self.rows]
        made = [dims[dim] for dims, (_, dim) in zip(found.outputs, outs, strict=True)]
        rows = made[0]
        return len(rows) == 1 and len(rows[0]) == 1 and rows[0][0] not in found.fixed and all(one == rows for one in (*given, *made))

    def _refuse(self, node: fx.Node) -> None:
        where = f"{facts(node).module or 'the model'} ({facts(node).source or 'source unknown'})"
        kind = "write" if op_name(node.target) == "index_put" else operator_of(node.target).kind
        raise CaptureError(
            f"{node.target} in {where} mixes rows chosen by a mask, whose number depends on data.\n  {_INSTEAD.get(kind, _OTHERWISE)}.",
            modules=(facts(node).module or "",),
        )

    def chosen(self, node: fx.Node, value: fx.Node, symbol: str) -> fx.Node:
        """The mask as booleans that broadcast against `value`, whose rows lie along one dim."""
        mask, dim = self.masks[symbol], self.rows[value][1]
        if _dtype(mask) != torch.bool:
            mask = emit(node, aten.ne.Scalar, (mask, 0), Info(_shape(mask), torch.bool, False))
        shape = tuple(self._size(symbol) if d == dim else 1 for d in range(len(_shape(value))))
        return emit(node, aten.reshape.default, (mask, list(shape)), Info(shape, torch.bool, False))

    def masked(self, node: fx.Node, value: fx.Node, symbol: str) -> fx.Node:
        """`value` with zeros in the rows that were not chosen."""
        return emit(node, aten.where.ScalarOther, (self.chosen(node, value, symbol), value, 0), _info(value))


_OTHERWISE = "Compute all rows and use torch.where(mask, value, 0) instead"
_INSTEAD: dict[OperatorKind, str] = {
    "search": "Search all rows, with -inf in those that are not chosen: torch.where(mask, value, -torch.inf)",
    "softmax": "Take it over all rows, with -inf in those that are not chosen: value.masked_fill(~mask, -torch.inf)",
    "norm": "Compute all rows, and mean and variance from torch.where(mask, value, 0).sum() and mask.sum()",
    "lookup": "Look up for all rows, torch.where(mask, index, 0) as the index, and leave the others out: torch.where(mask, found, 0)",
    "write": "Write for all rows, torch.where(mask, value, old) as what is written (one_hot for ones at the index of a class)",
    "join": "Put all rows together, and their masks in the same way",
}
"""What to write instead of operators of a kind that mixes chosen rows."""


def _index_add(lift: _Lift, node: fx.Node, symbol: str) -> bool:
    target, _, index, source = node.args[:4]
    if target in lift.rows or lift.rows.get(index) != (symbol, 0) or source not in lift.rows:  # type: ignore[arg-type]
        return False
    node.update_arg(3, lift.masked(node, source, symbol))  # type: ignore[arg-type]
    return True


def _index_put(lift: _Lift, node: fx.Node, symbol: str) -> bool:
    args: Any = node.args
    target, indices, values = args[:3]
    accumulate = len(args) > 3 and bool(args[3])
    if not isinstance(target, fx.Node) or not isinstance(values, fx.Node) or target in lift.rows or values not in lift.rows:
        return False
    if _equal(lift.mask_of(indices), lift.masks[symbol]):
        if lift.rows[values][1] != 0 or prod(_shape(values)) != prod(_shape(target)):
            return False
        return _put_by_mask(node, target, lift.masks[symbol], values, accumulate=accumulate)
    if any(lift.rows.get(index) != (symbol, 0) for index in indices if index is not None):
        return False
    if not accumulate:  # y[rows] = v  is  y[rows] += v - y[rows];  v is often y[rows] + d, then it is += d, to the bit
        values = _difference(lift, node, target, indices, values)
    node.args = (target, indices, lift.masked(node, values, symbol), True)
    return True


def _put_by_mask(node: fx.Node, target: fx.Node, mask: fx.Node, values: fx.Node, *, accumulate: bool) -> bool:
    info = Info(_shape(target), _dtype(target), False)
    value = emit(node, aten.reshape.default, (values, list(info.shape)), info)
    if accumulate:
        value = emit(node, aten.add.Tensor, (target, value), info)
    shape = (*_shape(mask), *(1 for _ in info.shape[len(_shape(mask)) :]))
    wide = emit(node, aten.reshape.default, (mask, list(shape)), Info(shape, torch.bool, False))
    node.target, node.args, node.kwargs = aten.where.self, (wide, value, target), {}
    return True


def _difference(lift: _Lift, node: fx.Node, target: fx.Node, indices: Any, values: fx.Node) -> fx.Node:
    if values.target is aten.add.Tensor and not values.kwargs:
        for old, new in (values.args[:2], values.args[1::-1]):
            if _reads(old, target, indices) and isinstance(new, fx.Node) and new in lift.rows and _shape(new) == _shape(values):
                return new
    read_back = emit(node, aten.index.Tensor, (target, indices), _info(values))
    difference = emit(node, aten.sub.Tensor, (values, read_back), _info(values))
    lift.rows[difference] = lift.rows[values]
    return difference


def _reads(node: Any, target: fx.Node, indices: Any) -> bool:
    """Whether `node` is `target[indices]`."""
    if not isinstance(node, fx.Node) or node.target is not aten.index.Tensor:
        return False
    args: Any = node.args
    return args[0] is target and list(args[1]) == list(indices)


def _sum(lift: _Lift, node: fx.Node, symbol: str) -> bool:
    node.update_arg(0, lift.masked(node, node.args[0], symbol))  # type: ignore[arg-type]
    return True


def _mean(lift: _Lift, node: fx.Node, symbol: str) -> bool:
    """A mean over the chosen rows: their sum over their number."""
    args: Any = node.args
    value, info, kwargs = args[0], _info(node), dict(node.kwargs)
    shape, rows = _shape(value), lift.rows[value][1]
    dims = sorted({int(d) % len(shape) for d in args[1]} if len(args) > 1 and args[1] else range(len(shape)))
    if rows not in dims:
        return False
    keep = bool(args[2]) if len(args) > 2 else bool(kwargs.pop("keepdim", False))
    total = emit(node, aten.sum.dim_IntList, (lift.masked(node, value, symbol), dims, keep), info, kwargs)
    chosen = lift.chosen(node, value, symbol)
    count = emit(node, aten.sum.default, (chosen,), Info((), torch.int64, False))
    others = prod(shape[d] for d in dims if d != rows)
    if others != 1:
        count = emit(node, aten.mul.Tensor, (count, others), Info((), torch.int64, False))
    node.target, node.args, node.kwargs = aten.div.Tensor, (total, count), {}
    return True


def _distance(lift: _Lift, node: fx.Node, symbol: str) -> bool:
    """A mean or sum of distances: of each row, with zeros for those that were not chosen (which may be no numbers); their mean or sum."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    x, y = node.args[:2]
    if (
        not isinstance(x, fx.Node)
        or not isinstance(y, fx.Node)
        or x not in lift.rows
        or lift.rows.get(y) != lift.rows[x]
        or _shape(x) != _shape(y)
        or any(source in lift.rows for source in node.all_input_nodes if source not in (x, y))
    ):
        return False
    mean = given.get("reduction", 1) == 1
    given["reduction"] = 0
    operands = (lift.masked(node, x, symbol), lift.masked(node, y, symbol))
    options = [given.pop(a.name, a.default_value) for a in schema[2:] if not a.kwarg_only]
    rest = {a.name: given[a.name] for a in schema if a.kwarg_only and a.name in given}
    each = emit(node, node.target, (*operands, *options), Info(_shape(x), _info(node).dtype, False), rest)
    lift.rows[each] = lift.rows[x]
    node.target, node.args, node.kwargs = (aten.mean.default if mean else aten.sum.default), (each,), {}
    return _mean(lift, node, symbol) if mean else _sum(lift, node, symbol)


def _label_loss(lift: _Lift, node: fx.Node, symbol: str) -> bool:
    """The label of a row that was not chosen is to be ignored."""
    args: Any = node.args
    logits, labels = args[:2]
    if not all(lift.rows.get(one) == (symbol, 0) for one in (logits, labels)) or _dtype(labels).is_floating_point:
        return False
    if any(source in lift.rows for source in node.all_input_nodes if source not in (logits, labels)):
        return False
    ignore = args[4] if len(args) > 4 else node.kwargs.get("ignore_index", -100)
    chosen = lift.chosen(node, labels, symbol)
    node.update_arg(1, emit(node, aten.where.ScalarOther, (chosen, labels, ignore), _info(labels)))
    return True


def _ctc_loss(lift: _Lift, node: fx.Node, symbol: str) -> bool:
    """Targets one sample after the other -> a row of targets per sample, those that were chosen first."""
    args: Any = node.args
    targets, lengths, mask = args[1], args[3], lift.masks[symbol]
    if any(source in lift.rows for source in node.all_input_nodes if source is not targets) or len(_shape(mask)) != 2:
        return False
    if not _counts_rows(lengths, mask):
        return False
    shape = _shape(mask)
    left_out = emit(node, aten.logical_not.default, (mask,), Info(shape, torch.bool, False))
    order = emit(node, aten.argsort.stable, (left_out,), Info(shape, torch.int64, False), {"stable": True, "dim": 1})
    info = Info(shape, _dtype(targets), False)
    wide = emit(node, aten.reshape.default, (targets, list(shape)), info)
    node.update_arg(1, emit(node, aten.gather.default, (wide, 1, order), info))
    return True


def _counts_rows(node: Any, mask: fx.Node) -> bool:
    """Whether `node` says how many of each row of `mask` are chosen."""
    while isinstance(node, fx.Node) and node.target in (aten._to_copy.default, aten.clone.default):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.sum.dim_IntList or not _equal(node.args[0], mask):
        return False
    return [int(d) % 2 for d in node.args[1]] == [1]  # type: ignore[union-attr, arg-type]


_SINKS: Mapping[str, Callable[[_Lift, fx.Node, str], bool]] = {
    "index_add": _index_add,
    "index_put": _index_put,
    "sum": _sum,
    "mean": _mean,
    **dict.fromkeys(("cross_entropy_loss", "nll_loss", "nll_loss_nd"), _label_loss),
    "meshpar.ctc_loss": _ctc_loss,
    **dict.fromkeys(("l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss"), _distance),
    **dict.fromkeys(("binary_cross_entropy_with_logits", "binary_cross_entropy", "soft_margin_loss", "kl_div"), _distance),
}
"""Operators that take chosen rows and give a tensor of fixed shape."""


_ALIKE = ("expand", "full", "ones", "zeros", "new_full", "new_ones", "new_zeros")
"""Operators that make as many rows as a number says, one like the other."""

_ON_COUNTS: Mapping[Any, OpOverload] = {
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    torch.sym_max: aten.clamp.default,
    torch.sym_min: aten.clamp.default,
}
"""Arithmetic with sizes -> the same with tensors."""
_EITHER_WAY = (operator.add, operator.mul, torch.sym_max, torch.sym_min)
"""Of these, what does not ask for an order."""


def _info(node: Any) -> Any:
    """What a node gives, whose size may depend on data."""
    return facts(node).info


def _shape(node: Any) -> tuple[int, ...]:
    return _info(node).shape


def _dtype(node: Any) -> torch.dtype:
    return _info(node).dtype


def _symbols(node: fx.Node) -> set[str]:
    info = _info(node)
    return {n for i in (info if isinstance(info, tuple) else (info,)) if isinstance(i, DataSized) for n in i.shape if isinstance(n, str)}
