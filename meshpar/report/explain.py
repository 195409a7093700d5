"""A parallel model in words: how parameters lie, what is communicated, what is repeated on every rank, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from torch import fx

from meshpar.pipeline.schedule import Order
from meshpar.pipeline.timing import Costs, bubble, simulate
from meshpar.plan import Plan
from meshpar.report.context import attention, others
from meshpar.report.parameters import parameters
from meshpar.report.text import Readable, count, table
from meshpar.report.traffic import SHARED, communication, data_size, repeated, residual
from meshpar.roles import ROLES


def explain(
    plan: Plan,
    graph: fx.Graph,
    *,
    inlined: Mapping[str, str] | None = None,
    averaged: Sequence[str] = (),
    within: Sequence[str] = (),
    dropped: Sequence[str] = (),
    unrecognised: Mapping[str, str] | None = None,
    order: Order | None = None,
    shapes: Sequence[str] = (),
) -> Readable:
    """What a plan says, for people.

    `graph` is the lowered graph of the plan. `inlined`: blocks that run in the root, with the reason; `averaged`: terms of the loss that
    are means over microbatches; `within`: modules that take statistics of a microbatch; `dropped`: outputs of the model that are left out;
    `unrecognised`: modules that look like layers of experts and are none, with the reason. `order`: that of a pipeline.
    `shapes`: what became of batches of several shapes.
    """
    sections = [_mesh(plan), [] if order is None else _stages(plan, order), parameters(plan, graph), residual(plan, graph)]
    sections += [communication(plan, order), attention(plan, graph), others(plan, graph), repeated(plan, graph)]
    sections.append(_remarks(inlined or {}, averaged, within, dropped, unrecognised or {}))
    sections.append(["Shapes of batches", *(f"  {line}" for line in shapes)] if shapes else [])
    return Readable("\n\n".join("\n".join(lines) for lines in sections if lines))


def _mesh(plan: Plan) -> list[str]:
    sizes = dict(plan.mesh)
    data = prod(size for name, size in sizes.items() if ROLES[name].own_batches)
    options = plan.options
    lines = [
        f"Mesh {' x '.join(f'{n}={s}' for n, s in sizes.items())}: {prod(sizes.values())} ranks, {data} of them with samples of their own"
    ]
    mode = str(options.get("data_parallel", ""))
    if data > 1 and mode in SHARED:
        lines.append(f"  data parallel {mode}: {SHARED[mode]}")
    lines.append(
        f"  a step is {options.get('microbatches', 1)} microbatch(es) per rank; recomputed in backward: {options.get('recompute', 'none')}"
    )
    return lines


def _stages(plan: Plan, order: Order) -> list[str]:
    """Where stages begin and what they hold, what their order costs, and what several of them share."""
    shares = [stage.share or 1 / len(plan.stages) for stage in plan.stages]
    found = bubble(simulate(order, Costs(shares, shares, shares)), order.ranks)
    equal = bubble(simulate(order), order.ranks)
    cells = [("stage", "on rank", "begins at", "cost", "parameters", "hands on", "gets back", "in flight")]
    for index, stage in enumerate(plan.stages):
        numel = sum(prod(p.shape) for p in plan.parameters.values() if index in p.stages)
        sent = [sum(c.nbytes for c in plan.ledger if c.kind == "send" and (c.stage, c.phase) == at) for at in _around(index)]
        flying = max(held[index] for held in order.in_flight(stage.rank))
        forward, back = (count(n, "B") for n in sent)
        if index + 1 == len(plan.stages):
            forward, back = "", ""
        elif plan.stages[index + 1].rank == stage.rank:
            forward, back = "(same rank)", ""
        cells.append((str(index), str(stage.rank), stage.begins, f"{100 * stage.share:.1f}%", f"{numel:,}", forward, back, str(flying)))
    lines = [
        f"Stages: {order.stages} on {order.ranks} ranks of pp, {plan.stages[-1].why}; bytes and microbatches in flight are those of a rank",
        *table(cells, right=(3, 4, 5, 6, 7)),
        f"  schedule {order.schedule}, {order.microbatches} microbatches: idle for {100 * found:.1f}% of the time it computes with stages "
        f"that cost this much, {100 * equal:.1f}% with equal ones (backward twice a forward, sends free)",
    ]
    for name, one in plan.parameters.items():
        if len(one.stages) > 1:
            held = f"stages {', '.join(map(str, one.stages))}"
            lines.append(f"  {name} is used by {held}: each has a copy; gradients are summed over them once per step")
    if plan.options.get("data_parallel") == "zero3" and data_size(plan) > 1 and order is not None and order.defers():
        lines.append("  data parallel zero3: parameters stay gathered until the end of the step, for weight gradients are put off")
    idle = [
        r for r in range(order.ranks) if not any(p.trainable and set(order.stages_of(r)) & set(p.stages) for p in plan.parameters.values())
    ]
    if idle:
        lines.append(
            f"  rank{'s' * (len(idle) > 1)} {', '.join(map(str, idle))} of pp: nothing to train there; optimizers take it as "
            'AdamW([{"params": pm.parameters()}])'
        )
    return lines


def _around(stage: int) -> tuple[tuple[int, str], tuple[int, str]]:
    """Where the ledger has what goes from a stage to the next, and what comes back."""
    return (stage, "forward"), (stage + 1, "backward")


"""What it means to cut a dim, by what the dim is to the operator."""


def _remarks(
    inlined: Mapping[str, str], averaged: Sequence[str], within: Sequence[str], dropped: Sequence[str], unrecognised: Mapping[str, str]
) -> list[str]:
    lines = [f"  {path} runs outside of blocks: {reason}" for path, reason in inlined.items()]
    lines += [f"  a term of the loss in {name or 'the model'} is the mean over microbatches, not over the whole batch" for name in averaged]
    lines += [f"  {name or 'the model'} sees the samples of a microbatch, not of the whole batch" for name in within]
    lines += [f"  not returned: {path} (its type is unknown to pytree)" for path in dropped]
    lines += [f"  {path or 'the model'} is not recognised as experts, and runs as written: {why}" for path, why in unrecognised.items()]
    return ["Remarks", *lines] if lines else []
