"""Whether an earlier plan is one for this graph, mesh and configuration: it is obeyed as it is, or refused with what differs."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from meshpar.errors import PlanError, near, raise_all
from meshpar.graph.captured import Captured
from meshpar.graph.facts import facts
from meshpar.graph.op import op_name
from meshpar.graph.text import fingerprint, inputs_of
from meshpar.mesh import format_mesh
from meshpar.plan import ParameterPlan, Plan
from meshpar.sharding.types import Owned

_RUN = ("microbatches", "recompute", "data_parallel", "schedule", "virtual_stages", "outputs")
"""What the runtime does besides the graph: a plan holds for one value of each."""
_ASKED = ("sequence_parallel", "context", "context_chunks", "stages", "rules", "hardware")
"""What was asked of the solver: a plan is the answer, so not to ask is no contradiction."""

ParameterFacts = Mapping[str, tuple[tuple[int, ...], str, bool]]
"""Name of a parameter -> shape, dtype, trainable."""


def check_given(
    plan: Plan,
    captured: Captured,
    parameters: ParameterFacts,
    mesh: Mapping[str, int],
    options: Mapping[str, Any],
    ranks: Sequence[int] = (),
    *,
    simulated: bool = False,
) -> None:
    """Raise PlanError with all that differs, unless `plan` was made for this graph, these parameters, this mesh and these options.

    `ranks`: the rank of every stage, in the order of the stages. `simulated`: whether all ranks run one program.
    """
    found = [*_mesh(plan, mesh), *_options(plan, options), *_parameters(plan, parameters), *_inputs(plan, captured)]
    if plan.graph != fingerprint(captured) and not found:
        found.append(_operators(plan, captured))
    if not found and [stage.rank for stage in plan.stages] != list(ranks):
        found.append(f"its stages are on the ranks {[stage.rank for stage in plan.stages]}, those of this schedule on {list(ranks)}.")
    if simulated and any(isinstance(type_, Owned) for one in plan.parameters.values() for type_ in one.placements.values()):
        found.append("it gives whole experts to single ranks, and simulated ranks run one program: use processes.")
    if found:
        found.append("A plan holds for what it was made for: pass that, or leave plan= out and a new plan is made.")
    raise_all(PlanError, "plan=: the plan was made for something else than what it is given for:", found)


def _mesh(plan: Plan, mesh: Mapping[str, int]) -> Iterator[str]:
    if dict(plan.mesh) != dict(mesh):
        yield f"the plan was made for mesh {format_mesh(dict(plan.mesh))}, this is {format_mesh(mesh)}."


def _options(plan: Plan, options: Mapping[str, Any]) -> Iterator[str]:
    for name in _RUN:
        if plan.options.get(name) != options.get(name):
            yield f"it was made for {name}={plan.options.get(name)!r}, this configuration has {options.get(name)!r}."
    for name in _ASKED:
        asked, answered = options.get(name), plan.options.get(name)
        if asked not in (None, "auto", {}) and asked != answered:
            yield f"{name}={asked!r} is asked for, and the plan answers {name}={answered!r}."


def _parameters(plan: Plan, parameters: ParameterFacts) -> Iterator[str]:
    for name in plan.parameters.keys() - parameters.keys():
        yield f"it has a parameter {name}, the model has not.{near(name, parameters)}"
    for name, known in parameters.items():
        one = plan.parameters.get(name)
        if one is None:
            yield f"the model has a parameter {name}, the plan has not.{near(name, plan.parameters)}"
        elif (one.shape, one.dtype, one.trainable) != known:
            yield f"{name} is {_facts(one)} in the plan, {_facts(ParameterPlan(*known, {}, ''))} in the model."


def _facts(plan: ParameterPlan) -> str:
    return f"{plan.dtype} {list(plan.shape)}{'' if plan.trainable else ', frozen'}"


def _inputs(plan: Plan, captured: Captured) -> Iterator[str]:
    here = inputs_of(captured)
    for name in dict.fromkeys([*plan.inputs, *here]):
        then, now = plan.inputs.get(name, "absent"), here.get(name, "absent")
        if then != now:
            yield f"the input {name} is {then} in the plan, {now} here (in a microbatch of all data ranks together)."


def _operators(plan: Plan, captured: Captured) -> str:
    """The first operation of one of the two that the other has not, where the plan has types of operations."""
    known = plan.axes[0].nodes if plan.axes else {}
    here = {node.name: node for node in captured.graph.nodes if node.op == "call_function" and node.target is not operator.getitem}
    for name, node in here.items() if known else ():
        if name not in known:
            return f"the forward differs: the plan knows no such {op_name(node.target)} as the one {_where(node)}."
    if known.keys() - {node.name for node in captured.graph.nodes}:
        return "the forward differs: the plan has operations that this one does not run (in another mode, train() or eval()?)."
    return "the forward differs in constants, in the order or in the connections of its operations."


def _where(node: fx.Node) -> str:
    return f"at {facts(node).source or 'a line unknown'} in {facts(node).module or 'the model'}"
