"""What time costs while a plan is chosen: a few constants of a current accelerator. Only their ratios matter to the choice."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds per unit of work on one device.

    Defaults: dense bf16 at half the peak of an H100 (989 TFLOP/s, NVIDIA data sheet), HBM3 at three quarters of 3.35 TB/s, 8 GPUs on NVLink
    reaching 250 GB/s per device in collectives and 10 us each (bus bandwidths as measured in the nanotron playbook).
    """

    flops: float = 5e14
    memory: float = 2.5e12
    link: float = 2.5e11
    latency: float = 1e-5
    launch: float = 2e-7
    start: float = 5.8e-6
    """Seconds of starting a product, whatever its size."""
    as_is: bool = False
    """Whether these are the constants of the machine that will run: then small models are not planned as large ones."""

    def at_scale(self, largest: float, full: float = 2.0**26) -> Price:
        """Prices under which a small model is planned as a large one would be: the fixed costs shrink with its largest activation.

        `largest`: bytes of the largest value; `full`: bytes from which on fixed costs count in full (64 MiB: 4 x 2048 x 4096 in bf16).
        """
        if self.as_is:
            return self
        share = min(1.0, largest / full)
        return replace(self, latency=self.latency * share, launch=self.launch * share)

    def collective(self, nbytes: float) -> float:
        """One collective that sends `nbytes` per device."""
        return self.latency + nbytes / self.link

    def touch(self, nbytes: float) -> float:
        """Reading or writing `nbytes` of memory once."""
        return self.launch + nbytes / self.memory

    def compute(self, flops: float, nbytes: float) -> float:
        """An operator: bound by arithmetic or by memory."""
        return max(flops / self.flops, nbytes / self.memory)
