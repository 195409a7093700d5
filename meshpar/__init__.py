"""meshpar: one call makes an unmodified PyTorch model 4D-parallel."""

from .api import parallelize
from .config import ParallelConfig, Precision
from .errors import BatchError, CaptureError, CheckpointError, ConfigError, MeshparError, PlanError, RankError
from .mesh import data_rank, local_batch, make_mesh, rank_grid
from .plan import Plan
from .runtime.gradients import clip_grad_norm_
from .runtime.init import meta
from .runtime.model import ParallelModel
from .runtime.parameters import full_grad, full_tensor
from .sharding.rules import add_rule
from .simulate import simulate
from .verify import Report, VerificationError, verify

__all__ = [
    "BatchError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "MeshparError",
    "ParallelConfig",
    "ParallelModel",
    "Plan",
    "PlanError",
    "Precision",
    "RankError",
    "Report",
    "VerificationError",
    "add_rule",
    "clip_grad_norm_",
    "data_rank",
    "full_grad",
    "full_tensor",
    "local_batch",
    "make_mesh",
    "meta",
    "parallelize",
    "rank_grid",
    "simulate",
    "verify",
]
