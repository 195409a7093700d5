"""Collectives of a block on one rank, for one microbatch (arXiv 2104.04473, 2205.05198; experts 2504.14960)."""

from __future__ import annotations

from meshpar.planner.share import Portion
from meshpar.planner.workload import Collective, Phase


def around(share: Portion, name: str) -> list[Collective]:
    """Column-parallel product in, row-parallel product out: with sequence parallelism a gather and a scatter, else one sum."""
    size = 2 * share.tokens * share.model.hidden
    if share.tp == 1:
        return []
    if not share.sequence_parallel:
        return [
            Collective(name, "all_reduce", "tp", "forward", size, behind="matrix"),
            Collective(name, "all_reduce", "tp", "input", size, behind="matrix"),
        ]
    pairs: list[tuple[str, Phase]] = [
        ("all_gather", "forward"),
        ("reduce_scatter", "forward"),
        ("all_gather", "input"),
        ("reduce_scatter", "input"),
    ]
    again = Collective(f"{name} again", "all_gather", "tp", "weight", size, behind="compute")
    return [*(Collective(name, kind, "tp", phase, size, behind="matrix") for kind, phase in pairs), again]


def context(share: Portion, windowed: bool) -> list[Collective]:
    """Keys and values of the other parts of the sequence, and their gradients back."""
    if share.cp == 1:
        return []
    model = share.model
    per_token = 2 * max(1.0, model.keys / share.tp) * model.head if model.latent is None else model.heads / share.tp * model.score_width
    size = 2 * share.samples * share.seq * per_token
    return [
        Collective("keys and values", "ring", "cp", "forward", size, behind="attention"),
        Collective("keys and values", "ring", "cp", "input", 2 * size, behind="attention"),
    ]


def exchange(share: Portion) -> list[Collective]:
    """Tokens to their experts and back; with tp inside experts, gathers and scatters over it too."""
    model = share.model
    size = 2 * share.tokens / share.narrow * model.top_k * model.routed * model.hidden
    copies = model.top_k if share.stack.dedups else 1
    found: list[Collective] = []
    phases: tuple[Phase, Phase] = ("forward", "input")
    if share.ep > 1:
        found += [Collective("dispatch, combine", "all_to_all", "ep", phase, size, 2, "compute", copies) for phase in phases]
    if share.etp > 1:
        kinds = ("all_gather", "reduce_scatter")
        found += [Collective("experts", kind, "etp", phase, size * share.etp) for phase in phases for kind in kinds]
    return found


def gathered(share: Portion, own: float, inner: float) -> list[Collective]:
    """What is shared out in every microbatch: gradients are scattered; fully sharded parameters gathered for forward and for backward."""
    found = []
    phases: tuple[Phase, ...] = ("forward", "input") if share.shares == "zero3" else ()
    for axis, size in (("dp", own), ("edp", inner)):
        if size:
            found += [Collective("parameters", "all_gather", axis, phase, 2 * size, behind="compute") for phase in phases]
            found.append(Collective("gradients", "reduce_scatter", axis, "input", share.stack.gradient_sum * size, behind="compute"))
    return found
