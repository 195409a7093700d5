"""Says on which stage of a pipeline every call of a graph runs, as a plan has it: marks that lowering keeps and `split` reads.

The graph a plan was made for is marked at the nodes the plan names. Another graph of the same model (another length, evaluation) follows
its parameters: a call runs where what it reads is, as early as possible.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from meshpar.compile.split import mark
from meshpar.errors import PlanError, raise_all
from meshpar.graph.captured import Captured
from meshpar.graph.facts import facts, set_facts
from meshpar.plan import Plan


def place(captured: Captured, plan: Plan) -> None:
    """Set the `stage` of every call of `captured`. Raises PlanError where a parameter is used on a stage that does not hold it."""
    starts = [stage.start for stage in plan.stages[1:]]
    if all(starts):
        mark(captured.graph, starts)
    else:
        _follow(captured.graph, {name: p.stages for name, p in plan.parameters.items()})


def _follow(graph: fx.Graph, held: dict[str, tuple[int, ...]]) -> None:
    complaints = []
    reads: dict[fx.Node, tuple[tuple[str, tuple[int, ...]], ...]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in held:
            reads[node] = ((str(node.target), held[str(node.target)]),)
        elif node.op == "call_function":
            parameters = tuple(dict.fromkeys(r for source in node.all_input_nodes for r in reads.get(source, ())))
            stages = [s for source in node.all_input_nodes if (s := facts(source).stage) is not None and source not in reads]
            if parameters and not stages and all(source in reads for source in node.all_input_nodes):
                reads[node] = parameters  # a parameter on its way to its use
            least = max(stages, default=0)
            fits = [s for s in range(least, 1 + max((max(h) for _, h in parameters), default=least)) if all(s in h for _, h in parameters)]
            if parameters and not fits:
                names = ", ".join(name for name, _ in parameters)
                complaints.append(f"{names} ({facts(node).source or node.name}) cannot be used after what is computed on stage {least}.")
            set_facts(node, replace(facts(node), stage=fits[0] if fits else least))
    raise_all(
        PlanError,
        "stages: this batch runs the model in another order than the one its stages were chosen for. Call parallelize with such a batch as "
        "its example:",
        complaints,
    )
