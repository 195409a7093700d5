"""The constants of a `Price` for a machine: what a data sheet says, at the shares that programs reach, or what `calibrate` measured."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshpar.config import ParallelConfig
from meshpar.planner.hardware import Hardware
from meshpar.planner.measured import Curve, Measured
from meshpar.sharding.price import Price

REACHED = {"flops": 0.5, "memory": 0.75, "link": 0.55}
"""Shares of a data sheet's rates, those of `Price` for an H100."""
_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def priced(config: ParallelConfig, mesh: DeviceMesh) -> Price:
    """What time costs on the hardware of a configuration, all ranks of the mesh at work."""
    return price_of(config.hardware, config.precision.compute_dtype, mesh.size())


def price_of(machine: Hardware | None, dtype: torch.dtype | None, ranks: int) -> Price:
    """What time costs on a `machine` that computes in `dtype` on `ranks` ranks at once; without one, the constants of `Price`.

    With a machine the costs are taken as they are: a small model is planned as a small one, for which latencies count.
    """
    if machine is None:
        return Price()
    precision = _PRECISIONS.get(dtype or torch.float32, "fp32")
    if machine.measured is not None:
        return _measured(machine.measured, precision, ranks)
    rates = (machine.peak(precision) * REACHED["flops"], machine.bandwidth * REACHED["memory"], machine.link * REACHED["link"])
    return Price(*rates, as_is=True)


def _measured(measured: Measured, precision: str, ranks: int) -> Price:
    """The rates of the largest sizes, and the seconds of the smallest; ranks that share cores compute slower."""
    crowd = measured.slower(ranks)
    matrix = measured.kernels.get(f"matrix {precision}") or next(c for n, c in measured.kernels.items() if n.startswith("matrix "))
    plain, sums = measured.kernels["elementwise"], _sums(measured, ranks)
    call = measured.runtime["call"]
    link = float("inf") if sums is None else _rate(sums)
    latency = call if sums is None else sums.seconds[0] + call
    launch, start = ((curve.seconds[0] + call) * crowd for curve in (plain, matrix))
    return Price(matrix.rate / crowd, plain.rate / crowd, link, latency, launch, start, as_is=True)


def _sums(measured: Measured, ranks: int) -> Curve | None:
    """All-gathers between as many ranks, or the nearest number: of a device, seconds by bytes."""
    found = [(abs(int(name.split()[1]) - ranks), name) for name in measured.collectives if name.startswith("all_gather ")]
    return measured.collectives[min(found)[1]] if found else None


def _rate(curve: Curve) -> float:
    """Bytes per second, without what the smallest message takes."""
    return curve.sizes[-1] / max(1e-12, curve.seconds[-1] - curve.seconds[0])
