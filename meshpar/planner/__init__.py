"""See a plan before paying for it: time, memory and the best mapping on clusters one does not have. Imports no torch.

    >>> from meshpar.planner import Cluster, Job, Mapping, Transformer, estimate
    >>> model = Transformer(layers=80, hidden=8192, heads=64, kv_heads=8, ffn=28672, vocab=128256)
    >>> job = Job(model, Cluster("h100", 512), seq=8192, batch=1024)
    >>> found = estimate(job, Mapping(tp=4, pp=4, virtual=5, cp=2))
    >>> 12 < found.seconds < 18 and found.memory.total < 80e9
    True

`search(job)` ranks every mapping that fits, `explain(found)` says why. `fit(measurements)` adjusts constants to a machine; `scaled` does
with one measured step. `build(job, mapping)` is the `Workload` behind an estimate; one made elsewhere goes into `step_time` and `memory`
just as well.
How far to trust it all: `benchmarks/planner_accuracy/README.md`.
"""

from meshpar.planner.constants import FITTED, PRIORS, Constants
from meshpar.planner.cost import StepTime, step_time
from meshpar.planner.explain import explain, interval, launch, toml, usual_path
from meshpar.planner.fit import Calibration, Measurement, fit, scaled
from meshpar.planner.flops import CONVENTIONS, flops_per_token, mfu
from meshpar.planner.hardware import HARDWARE, Cluster, Hardware, hardware
from meshpar.planner.layers import build
from meshpar.planner.mapping import Job, Mapping, check, complaints
from meshpar.planner.memory import PeakMemory, memory, state_bytes
from meshpar.planner.search import Candidate, Search, Space, estimate, search
from meshpar.planner.stack import STACKS, Stack, stack
from meshpar.planner.transformer import Latent, Transformer
from meshpar.planner.workload import AxisSpan, Collective, Layer, Operator, StageLoad, Workload

__all__ = [
    "Cluster",
    "Hardware",
    "HARDWARE",
    "hardware",
    "Stack",
    "STACKS",
    "stack",
    "Transformer",
    "Latent",
    "Job",
    "Mapping",
    "check",
    "complaints",
    "estimate",
    "search",
    "Space",
    "Candidate",
    "Search",
    "explain",
    "usual_path",
    "interval",
    "toml",
    "launch",
    "build",
    "Workload",
    "StageLoad",
    "Layer",
    "Operator",
    "Collective",
    "AxisSpan",
    "step_time",
    "StepTime",
    "memory",
    "PeakMemory",
    "state_bytes",
    "CONVENTIONS",
    "flops_per_token",
    "mfu",
    "Constants",
    "PRIORS",
    "FITTED",
    "fit",
    "Calibration",
    "Measurement",
    "scaled",
]
