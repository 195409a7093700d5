"""Pipelines by hand: cutting any captured graph into stages, without a mesh and without the rest of `parallelize`.

captured = capture(model, args, kwargs)          from meshpar.capture.export
staging = choose(captured, 4)                    where four stages of equal cost begin, and what is handed on there
mark(captured.graph, staging.starts)
stages = split(captured.graph, 4, parameters=captured.parameters, mutations=captured.mutations)
"""

from __future__ import annotations

from .passes.split import StageGraph, mark, shared_parameters, split
from .passes.stages import Memory, Staging, choose

__all__ = ["Memory", "StageGraph", "Staging", "choose", "mark", "shared_parameters", "split"]
