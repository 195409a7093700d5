"""The few numbers no data sheet states: shares of peak and bandwidth that real programs reach, latencies, what overlap leaves visible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from meshpar.errors import ConfigError, near


@dataclass(frozen=True)
class Prior:
    """What is believed of a constant before any run is looked at: a value, and by what factor it may be off (one standard deviation)."""

    value: float
    factor: float
    meaning: str
    source: str


_GEMM = "cuBLAS / cuBLASLt measurements of large square products; the trial of 474 lines"
_TRIAL = "trial of a cost model in 474 lines on the same published runs"
PRIORS: Mapping[str, Prior] = MappingProxyType(
    {
        "matrix volta": Prior(0.80, 1.10, "products / fp16 peak", _GEMM),
        "matrix ampere": Prior(0.80, 1.10, "products / 16-bit peak", _GEMM),
        "matrix hopper": Prior(0.75, 1.10, "products / 16-bit peak", _GEMM),
        "matrix hopper fp8": Prior(0.65, 1.15, "products / fp8 peak", _GEMM),
        "matrix blackwell": Prior(0.75, 1.10, "products / 16-bit peak", _GEMM),
        "matrix blackwell fp8": Prior(0.60, 1.15, "products / fp8 peak", _GEMM),
        "matrix blackwell nvfp4": Prior(0.45, 1.3, "products / fp4 peak", "guess: no run in the data"),
        "grouped": Prior(0.95, 1.10, "products of experts / other products", "derived: partial tiles of uneven groups"),
        "attention flash2": Prior(0.33, 1.08, "attention / 16-bit peak, Hopper with flash attention 2", "arXiv 2307.08691, 2407.08608"),
        "attention cudnn": Prior(0.50, 1.08, "attention / 16-bit peak, Hopper with cuDNN", "arXiv 2407.08608; cuDNN release notes"),
        "attention ampere": Prior(0.55, 1.15, "attention / 16-bit peak, Ampere with a fused kernel", "arXiv 2307.08691"),
        "attention blackwell": Prior(0.40, 1.15, "attention / 16-bit peak", _TRIAL),
        "memory": Prior(0.84, 1.08, "memory bandwidth / data sheet", "STREAM-like copies on A100 and H100: 0.80-0.92"),
        "link": Prior(0.72, 1.10, "collectives in a domain / NVLink", "nccl-tests: 340 of 450 GB/s per direction on H100"),
        "nic": Prior(0.75, 1.10, "collectives between domains / adapter", "nccl-tests: 37-45 of 50 GB/s"),
        "exposed tp": Prior(0.30, 1.4, "share of tp's time that stays visible where the stack hides it", _TRIAL),
        "exposed ep": Prior(1.0, 1.2, "visible time of the exchange of tokens / its closed form", _TRIAL),
        "exposed ep fused": Prior(0.6, 1.3, "the same with a fused dispatcher", "NVIDIA on Hybrid-EP: steps 1.05 to 1.14 times as fast"),
        "elementwise": Prior(1.0, 1.2, "traffic of fused kernels / the closed form", "derived"),
        "elementwise eager": Prior(1.9, 1.2, "further factor without fused kernels", _TRIAL),
        "matrix start": Prior(5.8e-6, 1.5, "seconds of starting a product", _TRIAL),
        "kernel start": Prior(2.5e-6, 1.5, "seconds of starting another kernel", "CUDA launch latency"),
        "layer": Prior(20e-6, 1.5, "seconds of a layer and pass that no operator shows", _TRIAL),
        "collective start": Prior(9.7e-6, 1.5, "seconds of starting a collective", _TRIAL),
        "moe 2025": Prior(0.35e-3, 2.0, "seconds of an expert layer and pass on the host, 2024-2025 dispatchers", _TRIAL),
        "moe 2026": Prior(
            0.10e-3, 2.0, "the same with CUDA graphs and a fused dispatcher", "Megatron-Bridge 26.08 recipes: moe_router graphs"
        ),
        "overlap window": Prior(0.77, 1.15, "share of computation that communication can hide behind", _TRIAL),
        "overlap slowdown": Prior(0.115, 1.4, "how much computation slows while it hides communication", _TRIAL),
        "step": Prior(25e-3, 1.5, "seconds of a step that belong to no part", _TRIAL),
        "doubling": Prior(0.0027, 1.4, "share of time lost per doubling of GPUs", _TRIAL),
        "power": Prior(0.45, 1.2, "exponent of speed in the power limit", "P ~ f V^2: between 1/3 and 1"),
        "memory buffers": Prior(1.0, 1.5, "GiB of workspaces and communication buffers", "NCCL and cuBLAS defaults"),
        "memory fragments": Prior(1.04, 1.03, "reserved / allocated", "PyTorch caching allocator"),
    }
)
"""Name -> prior. Shares are of data-sheet peaks without sparsity."""

FITTED: Mapping[str, float] = MappingProxyType(
    {
        "matrix volta": 0.821,
        "matrix ampere": 0.800,
        "matrix hopper": 0.736,
        "matrix hopper fp8": 0.622,
        "matrix blackwell fp8": 0.606,
        "nic": 0.764,
        "exposed ep": 1.06,
        "moe 2025": 0.434e-3,
        "power": 0.480,
    }
)
"""Fitted on the published runs by `benchmarks/planner_accuracy/run.py`, all sources; what is not here stays at its prior."""

SPREAD: Mapping[str, tuple[float, float]] = MappingProxyType({"dense": (0.90, 1.10), "experts": (0.91, 1.24), "memory": (0.95, 1.13)})
"""Measured / estimated, 10th and 90th percentile, on sources left out of the fit."""


@dataclass(frozen=True)
class Constants:
    """A value for every name in `PRIORS`.

    >>> Constants.default().changed({"step": 0.01})["step"]
    0.01
    """

    values: Mapping[str, float]
    spread: Mapping[str, tuple[float, float]] = field(default_factory=lambda: SPREAD)

    @classmethod
    def default(cls) -> Constants:
        """Priors, where a fit moved them the fitted values."""
        return cls({**{name: prior.value for name, prior in PRIORS.items()}, **FITTED})

    @classmethod
    def priors(cls) -> Constants:
        """Nothing fitted."""
        return cls({name: prior.value for name, prior in PRIORS.items()})

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def changed(self, values: Mapping[str, float]) -> Constants:
        """With some values replaced. Raises `ConfigError` for names there are none of."""
        unknown = [name for name in values if name not in PRIORS]
        if unknown:
            raise ConfigError(f"no constants {', '.join(unknown)}.{near(unknown[0], PRIORS)} Known: {', '.join(PRIORS)}.")
        return Constants({**self.values, **values}, self.spread)

    def matrix(self, family: str, dtype: str) -> float:
        """Share of peak that products reach. Raises `ConfigError` for a family without a value."""
        name = f"matrix {family}" + ("" if dtype in ("bf16", "fp16", "fp32", "fp64", "int") else f" {dtype}")
        if name not in self.values:
            raise ConfigError(f"no constant {name!r}: give one with Constants.changed, or a Hardware of a known family.")
        return self.values[name]

    def attention(self, family: str, kernel: str) -> float:
        """Share of the 16-bit peak that a fused attention reaches."""
        return self.values.get(f"attention {family}", self.values.get(f"attention {kernel}", self.values["attention flash2"]))
