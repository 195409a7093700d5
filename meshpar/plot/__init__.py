"""Pictures, each a function that draws into matplotlib axes and returns them (pip install 'meshpar[plot]').

mesh("pp=2,dp=2,tp=4")                          who is who: ranks by stage, data and tensor coordinate
parameter(pm, "layers.0.mlp.up.weight")         which rank holds what of a parameter
collective("reduce_scatter", 4)                 what a collective moves, before and after
communication(pm)                               bytes by axis, direction and kind; `traffic(pm)`: from rank to rank
block(pm, "layers.0", axis="tp")                a block as a graph, types on its edges, collectives as boxes
causal_work(4096, 4, balanced=True)             who computes what of a causal square
expert_load([120, 80, ...], ranks=4)            tokens by expert and rank
expert_flow(pm.expert_flow()[name], ranks=4)    who sends how many rows to whose experts
memory(mp.dry_run(...), rank=0)                 what a rank holds over the time of a step
frontier(mp.search(...))                        mappings by time and memory, and those that nothing beats in both
schedule(pm.schedule, measured=events)          a pipeline as a Gantt chart; `chrome_trace` for Perfetto
COLOURS                                         those of ranks, for pictures of your own
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshpar.plot.ahead import frontier, memory
    from meshpar.plot.blocks import block
    from meshpar.plot.bytes_sent import communication, traffic
    from meshpar.plot.canvas import COLOURS
    from meshpar.plot.gantt import chrome_trace, schedule, schedule_table
    from meshpar.plot.holders import mesh, parameter
    from meshpar.plot.moves import collective
    from meshpar.plot.work import causal_work, expert_flow, expert_load

_HOME = {
    "COLOURS": "canvas",
    "block": "blocks",
    **dict.fromkeys(("frontier", "memory"), "ahead"),
    **dict.fromkeys(("chrome_trace", "schedule", "schedule_table"), "gantt"),
    **dict.fromkeys(("mesh", "parameter"), "holders"),
    "collective": "moves",
    **dict.fromkeys(("communication", "traffic"), "bytes_sent"),
    **dict.fromkeys(("causal_work", "expert_flow", "expert_load"), "work"),
}

__all__ = [
    "COLOURS",
    "block",
    "causal_work",
    "chrome_trace",
    "collective",
    "communication",
    "expert_flow",
    "expert_load",
    "frontier",
    "memory",
    "mesh",
    "parameter",
    "schedule",
    "schedule_table",
    "traffic",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)
