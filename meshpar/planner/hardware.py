"""Accelerators as data: peaks, memories, links and power limits from data sheets, and how many of them a cluster has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from meshpar.errors import ConfigError, near, raise_all
from meshpar.planner import files
from meshpar.planner.measured import Measured

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
    """Share of the memory a training process can allocate: published runs on 80 GB parts end near 75; the rest is context and NCCL."""
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
    plain: float = 0.0
    """FLOP/s of fp32 products outside of tensor cores; fp64 has half."""
    measured: Measured | None = None
    """Of a machine that was calibrated: then its seconds count, and rates above are only for utilisation and for words."""
    scale: float = 1.0
    """Measured / estimated time of a step that somebody took: what all estimates are multiplied with."""

    def peak(self, precision: str) -> float:
        """Dense FLOP/s in a precision. Raises `ConfigError` with the precisions it has.

        >>> hardware("h100").peak("bf16") / 1e12
        989.0
        """
        wanted = ALIASES.get(precision, precision)
        if wanted not in self.peaks and wanted in PLAIN and self.plain:
            return self.plain * PLAIN[wanted]
        if wanted not in self.peaks:
            raise ConfigError(f"{self.name} has no {precision} matrix units. Its precisions: {', '.join(self.peaks)}.")
        return self.peaks[wanted]


PLAIN: Mapping[str, float] = MappingProxyType({"fp32": 1.0, "fp64": 0.5, "int": 1.0})
"""Precisions outside of tensor cores -> speed relative to fp32."""
ALIASES: Mapping[str, str] = MappingProxyType({"mxfp8": "fp8"})
"""Precisions that run on the matrix units of another one."""


@dataclass(frozen=True)
class Cluster:
    """So many accelerators of a kind, in whole servers once there are more than one server's worth.

    >>> Cluster("h100", 512).domains
    64
    """

    kind: str | Path | Hardware
    gpus: int

    def __post_init__(self) -> None:
        if not isinstance(self.kind, Hardware):
            object.__setattr__(self, "kind", hardware(self.kind))  # a file is read once
        part, complaints = self.hardware, []
        if isinstance(self.gpus, bool) or not isinstance(self.gpus, int) or self.gpus < 1:
            complaints.append(f"gpus={self.gpus!r}; a cluster has a whole number of GPUs, at least 1.")
        elif part.measured is not None and self.gpus > part.measured.ranks:
            complaints.append(
                f"gpus={self.gpus}: {part.name} was measured with up to {part.measured.ranks} ranks. Ask for fewer, or measure with "
                f"`meshpar calibrate --ranks {self.gpus}`."
            )
        elif self.gpus > part.node and self.gpus % part.node:
            below = self.gpus // part.node * part.node
            complaints.append(
                f"gpus={self.gpus} is no whole number of servers: {part.name} comes {part.node} to a server. "
                f"Nearest: {below} or {below + part.node}."
            )
        raise_all(ConfigError, "Cluster:", complaints)

    @property
    def hardware(self) -> Hardware:
        assert isinstance(self.kind, Hardware)
        return self.kind

    @property
    def domains(self) -> int:
        """Fast domains, the last maybe not full."""
        return -(-self.gpus // self.hardware.domain)


def hardware(name: str | Path) -> Hardware:
    """A part of `HARDWARE` by name, or the machine in a file of `meshpar calibrate`. Raises `ConfigError` with all names.

    >>> hardware("a100").memory / 1e9
    80.0
    """
    if files.is_machine(name):
        return files.read(name, Hardware)
    if str(name) not in HARDWARE:
        raise ConfigError(
            f"no accelerator {name!r}.{near(str(name), HARDWARE)} Known: {', '.join(HARDWARE)}. Or a file that `meshpar calibrate` wrote, "
            f"or a Hardware of your own."
        )
    return HARDWARE[str(name)]


def _peaks(**tera: float) -> Mapping[str, float]:
    return MappingProxyType({name: value * TERA for name, value in tera.items()})


_IB = 4e-6
"""A rank more in a ring over InfiniBand: nccl-tests of 8-GPU nodes, small messages, about 0.3 ms for 64 GPUs."""


def _part(
    name: str, family: str, peaks: Mapping[str, float], numbers: str, source: str, *, hop: float = _IB, softmax: float = 1.0
) -> Hardware:
    """A row of the table; `numbers` in the order of its heading."""
    memory, bandwidth, link, nic, node, domain, power, rated, plain = map(float, numbers.split())
    rates = (memory * GB, 0.94, bandwidth * GB, link * GB, nic * GB)
    return Hardware(name, family, peaks, *rates, int(node), int(domain), power, rated, hop, source, softmax, plain * TERA)


_V100, _A100, _HOPPER = _peaks(fp16=125), _peaks(bf16=312, fp16=312), _peaks(bf16=989, fp16=989, fp8=1979)
_B200 = _peaks(bf16=2250, fp16=2250, fp8=4500, nvfp4=9000)
_GB200 = _peaks(bf16=2500, fp16=2500, fp8=5000, nvfp4=10000)
_GB300 = _peaks(bf16=2500, fp16=2500, fp8=5000, nvfp4=15000)
_SHEETS = {
    "v100": "NVIDIA V100 data sheet; DGX-2: 16 x SXM3 450 W, NVSwitch 300 GB/s both ways, 8 x EDR 100 Gb/s for 16 GPUs",
    "a100": "NVIDIA A100 80GB SXM data sheet; DGX A100 SuperPOD: 8 x HDR 200 Gb/s",
    "h100": "NVIDIA H100 SXM data sheet; DGX H100 SuperPOD: 8 x NDR 400 Gb/s",
    "h100-efa": "as h100 on AWS p5.48xlarge, EFA 3200 Gb/s; 35 us per rank: all-gather of 256 MB from 16 to 512 GPUs (nanotron playbook)",
    "h100-500w": "torchtitan benchmarks 2024-12: H100 96GB with HBM2e, limited to 500 W, RDMA 400 Gb/s",
    "h200": "NVIDIA H200 SXM data sheet; DGX H200: 8 x NDR 400 Gb/s",
    "b200": "NVIDIA DGX B200 data sheet: for 8, 72 PFLOP/s fp8 sparse, 1.44 TB, 62 TB/s, 8 x 400 Gb/s",
    "gb200": "NVIDIA GB200 NVL72 data sheet: for 72, dense 180 PFLOP/s bf16, 360 fp8, 13.4 TB, 576 TB/s; NVLink 1.8 TB/s both ways",
    "gb300": "NVIDIA GB300 NVL72 data sheet: for 72, dense 360 PFLOP/s fp8, 1080 fp4; 800 Gb/s; exponentials twice as fast: softmax",
}
_PARTS = (
    #                           memory  HBM   link  nic  node domain power, that of the family, fp32
    #                           GB      GB/s  GB/s  GB/s            W      W    TFLOP/s
    _part("v100", "volta", _V100, "32     900   150   6.25 16  16     450    450  15.7", _SHEETS["v100"]),
    _part("a100", "ampere", _A100, "80    2039  300   25   8   8      400    400  19.5", _SHEETS["a100"]),
    _part("h100", "hopper", _HOPPER, "80  3350  450   50   8   8      700    700  67", _SHEETS["h100"]),
    _part("h100-efa", "hopper", _HOPPER, "80 3350 450 50   8   8      700    700  67", _SHEETS["h100-efa"], hop=35e-6),
    _part("h100-500w", "hopper", _HOPPER, "96 2400 450 50  8   8      500    700  67", _SHEETS["h100-500w"]),
    _part("h200", "hopper", _HOPPER, "141 4800  450   50   8   8      700    700  67", _SHEETS["h200"]),
    _part("b200", "blackwell", _B200, "180 7700 900   50   8   8      1000   1000  75", _SHEETS["b200"]),
    _part("gb200", "blackwell", _GB200, "186 8000 900 50   4   72     1200   1000  80", _SHEETS["gb200"]),
    _part("gb300", "blackwell", _GB300, "288 8000 900 100  4   72     1400   1000  80", _SHEETS["gb300"], softmax=1.33),
)
HARDWARE: Mapping[str, Hardware] = MappingProxyType({part.name: part for part in _PARTS})
"""Name -> accelerator. Every rate of the tensor cores is without sparsity."""
