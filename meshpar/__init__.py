"""meshpar: one call makes an unmodified PyTorch model parallel.

Names are imported when they are first used, so that what needs no torch (`meshpar checkpoint ls`) does not wait for it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshpar import checkpoint, data, notebook, ops, pipeline, plot
    from meshpar.api import parallelize
    from meshpar.calibrate import calibrate
    from meshpar.capture.experts.seam import register_experts
    from meshpar.config import ParallelConfig, Precision
    from meshpar.dry_run import DryRun, dry_run
    from meshpar.dry_run.searching import search
    from meshpar.errors import BatchError, CaptureError, CheckpointError, ConfigError, MeshparError, PlanError, RankError, StageError
    from meshpar.graph.operators import add_rule
    from meshpar.init.fit import Weights
    from meshpar.init.meta import meta
    from meshpar.mesh import data_rank, local_batch, make_mesh, rank_grid
    from meshpar.pipeline import schedule, timing
    from meshpar.plan import Plan
    from meshpar.proof.report import Report, VerificationError
    from meshpar.proof.verify import verify
    from meshpar.runtime.model import ParallelModel
    from meshpar.runtime.parameters.gradients import clip_grad_norm_, grad_norm
    from meshpar.runtime.parameters.scaler import GradScaler
    from meshpar.runtime.parameters.specs import full_grad, full_tensor
    from meshpar.simulate import simulate
    from meshpar.waiting import progress

_HOME = {
    "parallelize": "api",
    "ParallelConfig": "config",
    "Precision": "config",
    **dict.fromkeys(
        ("BatchError", "CaptureError", "CheckpointError", "ConfigError", "MeshparError", "PlanError", "RankError", "StageError"),
        "errors",
    ),
    **dict.fromkeys(("data_rank", "local_batch", "make_mesh", "rank_grid"), "mesh"),
    "DryRun": "dry_run",
    "search": "dry_run.searching",
    "Plan": "plan",
    "progress": "waiting",
    **dict.fromkeys(("clip_grad_norm_", "grad_norm"), "runtime.parameters.gradients"),
    "GradScaler": "runtime.parameters.scaler",
    "Weights": "init.fit",
    "meta": "init.meta",
    "ParallelModel": "runtime.model",
    **dict.fromkeys(("full_grad", "full_tensor"), "runtime.parameters.specs"),
    "add_rule": "graph.operators",
    "register_experts": "capture.experts.seam",
    "verify": "proof.verify",
    **dict.fromkeys(("Report", "VerificationError"), "proof.report"),
}
_NAMESAKES = ("calibrate", "dry_run", "simulate")
"""Functions called like the module they live in."""
_MODULES = {
    **{name: name for name in ("checkpoint", "data", "notebook", "ops", "pipeline", "plot")},
    **{name: f"pipeline.{name}" for name in ("schedule", "timing")},
}

__all__ = [
    "BatchError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DryRun",
    "GradScaler",
    "MeshparError",
    "ParallelConfig",
    "ParallelModel",
    "Plan",
    "PlanError",
    "Precision",
    "RankError",
    "Report",
    "StageError",
    "VerificationError",
    "Weights",
    "add_rule",
    "calibrate",
    "checkpoint",
    "clip_grad_norm_",
    "data",
    "data_rank",
    "dry_run",
    "full_grad",
    "full_tensor",
    "grad_norm",
    "local_batch",
    "make_mesh",
    "meta",
    "notebook",
    "ops",
    "parallelize",
    "pipeline",
    "plot",
    "progress",
    "rank_grid",
    "register_experts",
    "schedule",
    "search",
    "simulate",
    "timing",
    "verify",
]


class _Package(ModuleType):
    """The package: importing the module of a namesake gives the package its function, not the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in _NAMESAKES and isinstance(value, ModuleType) else value)


def __getattr__(name: str) -> Any:
    if name in _NAMESAKES:
        import_module(f".{name}", __name__)
    elif name in _MODULES:
        globals()[name] = import_module(f".{_MODULES[name]}", __name__)
    elif name in _HOME:
        globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    elif name == "__version__":
        globals()[name] = _version()
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def _version() -> str:
    """The release that was installed; a checkout that was not has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:
        return "0 (not installed)"


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Package
