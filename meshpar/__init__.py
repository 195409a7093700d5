"""meshpar: one call makes an unmodified PyTorch model parallel.

Names are imported when they are first used, so that what needs no torch (`meshpar checkpoint ls`) does not wait for it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import checkpoint, ops, pipeline, plot, schedule, timing
    from .api import parallelize
    from .capture.experts import register_experts
    from .config import ParallelConfig, Precision
    from .errors import BatchError, CaptureError, CheckpointError, ConfigError, MeshparError, PlanError, RankError, StageError
    from .mesh import data_rank, local_batch, make_mesh, rank_grid
    from .plan import Plan
    from .runtime.fit import Weights
    from .runtime.gradients import clip_grad_norm_, grad_norm
    from .runtime.init import meta
    from .runtime.model import ParallelModel
    from .runtime.parameters import full_grad, full_tensor
    from .runtime.scaler import GradScaler
    from .sharding.rules import add_rule
    from .simulate import simulate
    from .verify import Report, VerificationError, verify

_HOME = {
    "parallelize": "api",
    "ParallelConfig": "config",
    "Precision": "config",
    **dict.fromkeys(
        ("BatchError", "CaptureError", "CheckpointError", "ConfigError", "MeshparError", "PlanError", "RankError", "StageError"),
        "errors",
    ),
    **dict.fromkeys(("data_rank", "local_batch", "make_mesh", "rank_grid"), "mesh"),
    "Plan": "plan",
    **dict.fromkeys(("clip_grad_norm_", "grad_norm"), "runtime.gradients"),
    "GradScaler": "runtime.scaler",
    "Weights": "runtime.fit",
    "meta": "runtime.init",
    "ParallelModel": "runtime.model",
    **dict.fromkeys(("full_grad", "full_tensor"), "runtime.parameters"),
    "add_rule": "sharding.rules",
    "register_experts": "capture.experts",
    **dict.fromkeys(("Report", "VerificationError"), "verify"),
}
_NAMESAKES = ("simulate", "verify")
"""Functions called like the module they live in."""
_MODULES = ("checkpoint", "ops", "pipeline", "plot", "schedule", "timing")

__all__ = [
    "BatchError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
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
    "checkpoint",
    "clip_grad_norm_",
    "data_rank",
    "full_grad",
    "full_tensor",
    "grad_norm",
    "local_batch",
    "make_mesh",
    "meta",
    "ops",
    "parallelize",
    "pipeline",
    "plot",
    "rank_grid",
    "register_experts",
    "schedule",
    "simulate",
    "timing",
    "verify",
]


class _Package(ModuleType):
    """The package: importing the module of a namesake gives the package its function, not the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in _NAMESAKES and isinstance(value, ModuleType) else value)


def __getattr__(name: str) -> Any:
    if name in _NAMESAKES or name in _MODULES:
        import_module(f".{name}", __name__)
    elif name in _HOME:
        globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Package
