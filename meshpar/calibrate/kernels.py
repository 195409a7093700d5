"""Seconds of kernels on this machine: products, attention and the operators that models are made of, over sizes, alone on a core.

A row makes a call of about so many elements, or so many rows of a product; what the call costs in FLOPs and bytes is read off a tape, as a
dry run reads it off a program. All are timed in turn, in several rounds, and the least counts. It is time of the processor: what else the
machine does is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import meshpar.ops.experts  # noqa: F401
from meshpar.dry_run.tape import MachineTape
from meshpar.planner.measured import Curve, rising

KernelCall = Callable[[], object]
ELEMENTS = (2**8, 2**12, 2**15, 2**18, 2**20, 2**22)
TOKENS = ((16, 32), (64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024))
"""Rows of a product and its width."""
WARM = 2**24
"""Bytes of inputs that are gone through in turn: more than a core's own cache holds, as between the operators of a model."""
aten = torch.ops.aten


@dataclass
class KernelCase:
    """One point of a curve: calls alike on different memory, and the least seconds of one."""

    curve: str
    size: float
    calls: Sequence[KernelCall]
    repeats: int = 1
    least: float = float("inf")

    def run(self) -> None:
        """Time it once more."""
        count, calls = len(self.calls), self.calls
        begun = time.process_time()
        for i in range(self.repeats):
            calls[i % count]()
        self.least = min(self.least, (time.process_time() - begun) / self.repeats)


def measure(*, rounds: int, slice_seconds: float = 1.5e-3) -> dict[str, Curve]:
    """Curves of all rows."""
    cases = list(_cases())
    for case in cases:
        case.run()
        case.run()
        case.repeats = max(1, min(200, round(slice_seconds / case.least)))
        case.least = float("inf")
    for _ in range(rounds):
        for case in cases:
            case.run()
    return curves(cases)


def curves(cases: Sequence[KernelCase]) -> dict[str, Curve]:
    """The points of every curve in the order of sizes; several of one size, or nearly, are one of their mean."""
    found: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        found.setdefault(case.curve, []).append((case.size, case.least))
    return {name: _curve(sorted(points)) for name, points in found.items()}


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    groups: list[list[tuple[float, float]]] = []
    for point in points:
        if groups and point[0] <= groups[-1][0][0] * 1.05:
            groups[-1].append(point)
        else:
            groups.append([point])
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return rising(means)


def _cases() -> Iterator[KernelCase]:
    for name, operator in OPERATORS.items():
        for n in ELEMENTS:
            yield _case(name, partial(operator, n))
    for dtype, kind in PRECISIONS.items():
        for rows, width in TOKENS:
            for product in (_product, _product_for_input, _product_for_weight):
                yield _case(f"matrix {dtype}", partial(product, rows, width, kind))
    for rows, width in TOKENS[:-1]:
        yield _case("grouped fp32", partial(_grouped, rows, width))
    for seq, heads in SEQUENCES:
        yield _case("attention forward fp32", partial(_attention, seq, heads))
        yield _case("attention backward fp32", partial(_attention_backward, seq, heads))


SEQUENCES = ((32, 2), (64, 4), (128, 4), (256, 4), (512, 4), (1024, 4))
"""Tokens of a sample and heads."""
PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _case(curve: str, make: Callable[[], KernelCall]) -> KernelCase:
    first = make()
    with MachineTape() as tape:
        first()
    kernels = [call.kernel for call in tape.calls if call.kernel.kind != "collective"]
    flops, moved = sum(k.flops for k in kernels), sum(k.bytes for k in kernels)
    copies = max(1, min(8, WARM // max(1, moved)))
    return KernelCase(curve, flops or moved, [first, *(make() for _ in range(copies - 1))])


def _r(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def _product(rows: int, width: int, dtype: torch.dtype) -> KernelCall:
    x, w = _r(rows, width, dtype=dtype), _r(2 * width, width, dtype=dtype)
    return lambda: aten.mm.default(x, w.t())


def _product_for_input(rows: int, width: int, dtype: torch.dtype) -> KernelCall:
    g, w = _r(rows, 2 * width, dtype=dtype), _r(2 * width, width, dtype=dtype)
    return lambda: aten.mm.default(g, w)


def _product_for_weight(rows: int, width: int, dtype: torch.dtype) -> KernelCall:
    g, x = _r(rows, 2 * width, dtype=dtype), _r(rows, width, dtype=dtype)
    return lambda: aten.mm.default(g.t(), x)


def _grouped(rows: int, width: int) -> KernelCall:
    x, w = _r(rows, width), _r(4, width, width)
    ends = torch.arange(1, 5, dtype=torch.int32) * (rows // 4)
    return lambda: torch.ops.meshpar.grouped_mm(x, w, ends)


def _qkv(seq: int, heads: int) -> list[Tensor]:
    return [_r(2, heads, seq, 32) for _ in range(3)]


def _attention(seq: int, heads: int) -> KernelCall:
    q, k, v = _qkv(seq, heads)
    return lambda: aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, True)


def _attention_backward(seq: int, heads: int) -> KernelCall:
    q, k, v = _qkv(seq, heads)
    out, sums = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, True)
    g = torch.randn_like(out)
    return lambda: aten._scaled_dot_product_flash_attention_for_cpu_backward.default(g, q, k, v, out, sums, 0.0, True)


def _one(call: Callable[[Tensor], object]) -> Callable[[int], KernelCall]:
    def make(n: int) -> KernelCall:
        x = _rows(n)
        return lambda: call(x)

    return make


def _two(call: Callable[[Tensor, Tensor], object]) -> Callable[[int], KernelCall]:
    def make(n: int) -> KernelCall:
        x, y = _rows(n), _rows(n)
        return lambda: call(x, y)

    return make


WIDTH = 128
"""Elements of a row of what is normalised."""


def _rows(n: int) -> Tensor:
    return _r(max(1, n // WIDTH), WIDTH)


def _norm_backward(n: int) -> KernelCall:
    x, g, w = _rows(n), _rows(n), torch.ones(WIDTH)
    _, mean, scale = aten.native_layer_norm.default(x, [WIDTH], w, None, 1e-5)
    return lambda: aten.native_layer_norm_backward.default(g, x, [WIDTH], mean, scale, w, None, [True, True, False])


def _norm(n: int) -> KernelCall:
    x, w = _rows(n), torch.ones(WIDTH)
    return lambda: aten.native_layer_norm.default(x, [WIDTH], w, None, 1e-5)


def _logits(n: int) -> Tensor:
    return _r(max(1, n // 1024), 1024)


def _log_softmax(n: int) -> KernelCall:
    x = _logits(n)
    return lambda: aten._log_softmax.default(x, 1, False)


def _log_softmax_backward(n: int) -> KernelCall:
    g, y = _logits(n), F.log_softmax(_logits(n), 1)
    return lambda: aten._log_softmax_backward_data.default(g, y, 1, torch.float32)


def _softmax_backward(n: int) -> KernelCall:
    g, y = _rows(n), F.softmax(_rows(n), 1)
    return lambda: aten._softmax_backward_data.default(g, y, 1, torch.float32)


def _embedding(n: int) -> KernelCall:
    table, index = _r(1024, WIDTH), torch.randint(0, 1024, (max(1, n // WIDTH),))
    return lambda: aten.embedding.default(table, index)


def _embedding_backward(n: int) -> KernelCall:
    g, index = _rows(n), torch.randint(0, 1024, (max(1, n // WIDTH),))
    return lambda: aten.embedding_dense_backward.default(g, index, 1024, -1, False)


def _selected(n: int) -> KernelCall:
    x = _rows(n)
    index = torch.randint(0, x.shape[0], (x.shape[0],))
    return lambda: aten.index_select.default(x, 0, index)


def _copied(n: int) -> KernelCall:
    x, y = _rows(n), _rows(n)
    return lambda: aten.copy_.default(x, y)


def _slice_backward(n: int) -> KernelCall:
    g = _rows(n)
    return lambda: aten.slice_backward.default(g, [2 * g.shape[0], WIDTH], 0, 0, g.shape[0], 1)


def _transposed(n: int) -> KernelCall:
    x = _r(4, max(1, n // WIDTH), WIDTH // 4).transpose(0, 1)
    return lambda: aten.clone.default(x, memory_format=torch.contiguous_format)


OPERATORS: Mapping[str, Callable[[int], KernelCall]] = {
    "elementwise": _two(aten.add.Tensor),
    "aten.add": _two(aten.add.Tensor),
    "aten.mul": _two(aten.mul.Tensor),
    "aten.div": _one(lambda x: aten.div.Tensor(x, 3.0)),
    "aten.neg": _one(aten.neg.default),
    "aten.clone": _transposed,
    "aten.copy_": _copied,
    "aten._to_copy": _one(lambda x: aten._to_copy.default(x, dtype=torch.bfloat16)),
    "aten.cat": _two(lambda x, y: aten.cat.default([x, y], 1)),
    "aten.slice_backward": _slice_backward,
    "aten.relu": _one(aten.relu.default),
    "aten.threshold_backward": _two(lambda x, y: aten.threshold_backward.default(x, y, 0)),
    "aten.gelu": _one(aten.gelu.default),
    "aten.gelu_backward": _two(aten.gelu_backward.default),
    "aten.silu": _one(aten.silu.default),
    "aten.silu_backward": _two(aten.silu_backward.default),
    "aten.tanh": _one(aten.tanh.default),
    "aten.pow": _one(lambda x: aten.pow.Tensor_Scalar(x, 2)),
    "aten.rsqrt": _one(aten.rsqrt.default),
    "aten.mean": _one(lambda x: aten.mean.dim(x, [-1], True)),
    "aten.sum": _one(lambda x: aten.sum.dim_IntList(x, [0], True)),
    "aten.native_layer_norm": _norm,
    "aten.native_layer_norm_backward": _norm_backward,
    "aten._softmax": _one(lambda x: aten._softmax.default(x, 1, False)),
    "aten._softmax_backward_data": _softmax_backward,
    "aten._log_softmax": _log_softmax,
    "aten._log_softmax_backward_data": _log_softmax_backward,
    "aten.embedding": _embedding,
    "aten.embedding_dense_backward": _embedding_backward,
    "aten.index_select": _selected,
    "aten.native_dropout": _one(lambda x: aten.native_dropout.default(x, 0.1, True)),
}
"""Curve -> what makes a call of about so many elements; "elementwise" stands for every operator that has no row."""
