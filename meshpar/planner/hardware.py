"""Accelerators as data: peaks, memories, links and power limits from data sheets, and how many of them a cluster has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from meshpar.errors import ConfigError, near, raise_all

GB = 1e9
TERA = 1e12
GiB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One accelerator in the server and fabric it comes with. Rates are per accelerator and direction, as the data sheet states them."""

    name: str
    family: str
    """Accelerators of one family share efficiencies (`constants.py`)."""
    peaks: Mapping[str, float]
    """Precision -> dense FLOP/s."""
    memory: float
    """Bytes on the accelerator."""
    usable: float
    """Share of the memory a training process can allocate: the rest is context, communication buffers and fragments."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s inside the fast domain (NVLink), one direction."""
    nic: float
    """Bytes/s out of the domain, one direction."""
    node: int
    """Accelerators in a server."""
    domain: int
    """Accelerators that reach each other at `link`."""
    power: float
    """Watts this part may draw."""
    family_power: float
    """Watts of the part that the family's efficiencies were measured on."""
    hop: float
    """Seconds that one more rank adds to a ring that leaves the domain."""
    source: str
    softmax: float = 1.0
    """Speed of a fused attention relative to the family's."""

    def peak(self, precision: str) -> float:
        """Dense FLOP/s in a precision. Raises `ConfigError` with the precisions it has.

        >>> hardware("h100").peak("bf16") / 1e12
        989.0
        """
        wanted = ALIASES.get(precision, precision)
        if wanted not in self.peaks:
            raise ConfigError(f"{self.name} has no {precision} matrix units. Its precisions: {', '.join(self.peaks)}.")
        return self.peaks[wanted]


ALIASES: Mapping[str, str] = MappingProxyType({"mxfp8": "fp8"})
"""Precisions that run on the matrix units of another one."""


@dataclass(frozen=True)
class Cluster:
    """So many accelerators of a kind, in whole servers once there are more than one server's worth.

    >>> Cluster("h100", 512).domains
    64
    """

    kind: str | Hardware
    gpus: int

    def __post_init__(self) -> None:
        part, complaints = self.hardware, []
        if isinstance(self.gpus, bool) or not isinstance(self.gpus, int) or self.gpus < 1:
            complaints.append(f"gpus={self.gpus!r}; a cluster has a whole number of GPUs, at least 1.")
        elif self.gpus > part.node and self.gpus % part.node:
            below = self.gpus // part.node * part.node
            complaints.append(
                f"gpus={self.gpus} is no whole number of servers: {part.name} comes {part.node} to a server. "
                f"Nearest: {below} or {below + part.node}."
            )
        raise_all(ConfigError, "Cluster:", complaints)

    @property
    def hardware(self) -> Hardware:
        return self.kind if isinstance(self.kind, Hardware) else hardware(self.kind)

    @property
    def domains(self) -> int:
        """Fast domains, the last maybe not full."""
        return -(-self.gpus // self.hardware.domain)


def hardware(name: str) -> Hardware:
    """A part of `HARDWARE` by name. Raises `ConfigError` with all names.

    >>> hardware("a100").memory / 1e9
    80.0
    """
    if name not in HARDWARE:
        raise ConfigError(f"no accelerator {name!r}.{near(str(name), HARDWARE)} Known: {', '.join(HARDWARE)}. Or give a Hardware of your own.")
    return HARDWARE[name]


def _peaks(**tera: float) -> Mapping[str, float]:
    return MappingProxyType({name: value * TERA for name, value in tera.items()})


_HOPPER = _peaks(bf16=989, fp16=989, fp8=1979)
_IB = 4e-6
"""A rank more in a ring over InfiniBand: nccl-tests of 8-GPU nodes, small messages, about 0.3 ms for 64 GPUs."""

HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
        part.name: part
        for part in (
            Hardware(
                *("v100", "volta", _peaks(fp16=125), 32 * GB, 0.94, 900 * GB, 150 * GB, 6.25 * GB, 16, 16, 450, 450, _IB),
                "NVIDIA V100 data sheet; DGX-2 (16 x V100 SXM3 450 W, NVSwitch 300 GB/s, 8 x EDR 100 Gb/s for 16 GPUs)",
            ),
            Hardware(
                *("a100", "ampere", _peaks(bf16=312, fp16=312), 80 * GB, 0.94, 2039 * GB, 300 * GB, 25 * GB, 8, 8, 400, 400, _IB),
                "NVIDIA A100 80GB SXM data sheet; DGX A100 SuperPOD (8 x HDR 200 Gb/s)",
            ),
            Hardware(
                *("h100", "hopper", _HOPPER, 80 * GB, 0.94, 3350 * GB, 450 * GB, 50 * GB, 8, 8, 700, 700, _IB),
                "NVIDIA H100 SXM data sheet; DGX H100 SuperPOD (8 x NDR 400 Gb/s)",
            ),
            Hardware(
                *("h100-efa", "hopper", _HOPPER, 80 * GB, 0.94, 3350 * GB, 450 * GB, 50 * GB, 8, 8, 700, 700, 35e-6),
                "as h100; AWS p5.48xlarge (EFA 3200 Gb/s for 8 GPUs); 35 us per rank: all-gather of 256 MB from 16 to 512 GPUs (nanotron playbook)",
            ),
            Hardware(
                *("h100-500w", "hopper", _HOPPER, 96 * GB, 0.94, 2400 * GB, 450 * GB, 50 * GB, 8, 8, 500, 700, _IB),
                "torchtitan benchmarks 2024-12: H100 96GB, HBM2e, limited to 500 W, RDMA 400 Gb/s",
            ),
            Hardware(
                *("h200", "hopper", _HOPPER, 141 * GB, 0.94, 4800 * GB, 450 * GB, 50 * GB, 8, 8, 700, 700, _IB),
                "NVIDIA H200 SXM data sheet; DGX H200 (8 x NDR 400 Gb/s)",
            ),
            Hardware(
                *("b200", "blackwell", _peaks(bf16=2250, fp16=2250, fp8=4500, nvfp4=9000), 180 * GB, 0.94, 7700 * GB),
                *(900 * GB, 50 * GB, 8, 8, 1000, 1000, _IB),
                "NVIDIA DGX B200 data sheet (72 PFLOP/s fp8 sparse, 1.44 TB, 62 TB/s for 8; 8 x 400 Gb/s)",
            ),
            Hardware(
                *("gb200", "blackwell", _peaks(bf16=2500, fp16=2500, fp8=5000, nvfp4=10000), 186 * GB, 0.94, 8000 * GB),
                *(900 * GB, 50 * GB, 4, 72, 1200, 1000, _IB),
                "NVIDIA GB200 NVL72 data sheet (dense 180 PFLOP/s bf16, 360 fp8 for 72; 13.4 TB, 576 TB/s; 1.8 TB/s NVLink)",
            ),
            Hardware(
                *("gb300", "blackwell", _peaks(bf16=2500, fp16=2500, fp8=5000, nvfp4=15000), 288 * GB, 0.94, 8000 * GB),
                *(900 * GB, 100 * GB, 4, 72, 1400, 1000, _IB),
                "NVIDIA GB300 NVL72 data sheet (dense 360 PFLOP/s fp8, 1080 fp4 for 72; 800 Gb/s ConnectX-8)",
                softmax=1.33,  # exponentials twice as fast, about half of the kernel's time
            ),
        )
    }
)
"""Name -> accelerator. Every rate of the tensor cores is without sparsity."""
