"""Says on which stage of a pipeline every call of a graph runs, as a plan has it: marks that lowering keeps and `split` reads.

The graph a plan was made for is marked at the nodes the plan names. Another graph of the same model (another length, evaluation) follows
its parameters: a call runs where what it reads is, as early as possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from meshpar.compile.split import StageGraph, mark, updaters
from meshpar.errors import PlanError, raise_all
from meshpar.graph.facts import facts, infos_of, set_facts
from meshpar.plan import Plan, StagePlan


def place(graph: fx.Graph, stages: Sequence[StagePlan], held: Mapping[str, tuple[int, ...]]) -> None:
    """Set the `stage` of every call of a captured graph. `held`: parameter -> the stages that hold it.

    To be done before any axis is typed: which conversions there are depends on it, and a plan names the calls of what earlier axes became.
    Raises PlanError where a parameter is used on a stage that does not hold it.
    """
    starts = [stage.start for stage in stages[1:]]
    if all(starts):
        mark(graph, starts)
    else:
        _follow(graph, held)


def check_buffers(stages: Sequence[StageGraph], plan: Plan) -> None:
    """Raise PlanError where some stage's copy of a buffer would not be updated as the others are: a later step would read an old one."""
    if all(stage.start for stage in plan.stages[1:]):
        return  # (that is what says which stages keep it)
    raise_all(
        PlanError,
        _OTHER,
        [
            f"buffer {name} is updated on stages {_few(found)}, and kept on {_few(plan.buffers.get(name, ())) or 'all'}."
            for name, found in updaters(stages).items()
            if found != plan.buffers.get(name)
        ],
    )


def _follow(graph: fx.Graph, held: Mapping[str, tuple[int, ...]]) -> None:
    least = dict[fx.Node, int]()
    while True:
        complaints = _as_early_as_possible(graph, held, least)
        late = {node: stage for group, stage in _of_rows(graph) for node in group if facts(node).stage != stage}
        if complaints or not late:
            break
        least |= late
    raise_all(PlanError, _OTHER, complaints)


def _as_early_as_possible(graph: fx.Graph, held: Mapping[str, tuple[int, ...]], from_: Mapping[fx.Node, int]) -> list[str]:
    """Set the stages of all calls, those of `from_` not before the stage there. What cannot be, in words."""
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
            least = max([*stages, from_.get(node, 0)])
            fits = [s for s in range(least, 1 + max((max(h) for _, h in parameters), default=least)) if all(s in h for _, h in parameters)]
            if parameters and not fits:
                names = ", ".join(name for name, _ in parameters)
                complaints.append(f"{names} ({facts(node).source or node.name}) cannot be used after what is computed on stage {least}.")
            set_facts(node, replace(facts(node), stage=fits[0] if fits else least))
    return complaints


def _of_rows(graph: fx.Graph) -> list[tuple[set[fx.Node], int]]:
    """The calls that make or read the same rows of experts, and the last stage that any of them is on: there all must be, for how many
    rows there are is told by the routing of each batch, and a stage must know what it is sent."""
    group_of = dict[fx.Node, set[fx.Node]]()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        before = [n for n in node.all_input_nodes if n.op == "call_function" and _is_rows(n)]
        if before or _is_rows(node):
            joined = {node}.union(*(group_of[n] for n in before))
            group_of |= dict.fromkeys(joined, joined)
    groups = {id(group): group for group in group_of.values()}
    return [(group, max(facts(node).stage or 0 for node in group)) for group in groups.values()]


def _is_rows(node: fx.Node) -> bool:
    return any(info is not None and info.rows for info in infos_of(node))


def _few(stages: Sequence[int]) -> str:
    return ", ".join(map(str, stages))


_OTHER = (
    "stages: this batch runs the model in another order than the one its stages were chosen for. Call parallelize with such a batch as its "
    "example:"
)
