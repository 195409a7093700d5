"""A dry run drawn: memory of every pipeline rank beside its limit, and where a step's time goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from meshpar.errors import ConfigError
from meshpar.planner.hardware import GiB

if TYPE_CHECKING:
    from meshpar.dry_run.result import DryRun

KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers", "reserve")


def draw(found: DryRun, path: str | Path) -> None:
    """Write a picture; the file's name says its format. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"a picture needs matplotlib, which is not installed: pip install 'meshpar[plot]' ({error}).") from error
    figure = Figure(figsize=(10, 0.4 * len(found.ranks) + 3.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(len(found.ranks) + 1, 2))
    names, left = [f"pp {one.rank}" for one in found.ranks], [0.0] * len(found.ranks)
    for kind in KINDS:
        sizes = [max(0.0, getattr(one, kind)) / GiB for one in found.ranks]
        above.barh(names, sizes, left=left, label=kind)
        left = [a + b for a, b in zip(left, sizes)]
    above.axvline(found.limit / GiB, color="black", linestyle="--", label="usable")
    above.invert_yaxis()
    above.set_xlabel("GiB at the fullest moment")
    above.legend(fontsize="small", ncols=4)
    start = 0.0
    for name, seconds in found.seconds.items():
        below.barh(["a step"], [seconds], left=[start], label=f"{name} {seconds:.3g} s")
        start += seconds
    below.set_xlabel("s")
    below.legend(fontsize="small", ncols=3)
    figure.suptitle(f"{found.gpus} x {found.hardware.name}: {found.mesh}")
    figure.savefig(str(path))
