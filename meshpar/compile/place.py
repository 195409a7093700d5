"""Says on which stage of a pipeline every call of a graph runs, as a plan has it: marks that lowering keeps and `split` reads.

The graph a plan was made for is marked at the nodes the plan names. Another graph of the same model (another length, evaluation) follows
its parameters: a call runs where what it reads is, as early as possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from meshpar.compile.split import StageGraph, mark, remade, updaters
from meshpar.errors import PlanError, raise_all
from meshpar.graph.facts import facts, infos_of, set_facts
from meshpar.plan import Plan, StagePlan


def place(
    graph: fx.Graph, stages: Sequence[StagePlan], held: Mapping[str, tuple[int, ...]], buffers: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Set the `stage` of every call of a captured graph.

    `held`: parameter -> the stages that hold it; `buffers`: the same of those that keep to some.

    To be done before any axis is typed: which conversions there are depends on it, and a plan names the calls of what earlier axes became.
    Raises PlanError where a parameter is used on a stage that does not hold it.
    """
    starts = [stage.start for stage in stages[1:]]
    if all(starts):
        mark(graph, starts, frozenset(held))
    else:
        _follow(graph, {**held, **(buffers or {})})


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
    """Set the stages of all calls, those of `from_` not before the stage there. What cannot be, in words.

    What is made of parameters alone (a penalty) is made on the first stage that holds them all, and handed on.
    """
    complaints = []
    everywhere = remade(graph, frozenset(held))  # (on each stage that needs it)
    reads: dict[fx.Node, tuple[tuple[str, tuple[int, ...]], ...]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in held:
            reads[node] = ((str(node.target), held[str(node.target)]),)
        elif node.op == "call_function":
            made = [source for source in node.all_input_nodes if source in reads]
            parameters = tuple(dict.fromkeys(r for source in made for r in reads[source]))
            stages = [s for source in node.all_input_nodes if (s := facts(source).stage) is not None and source not in reads]
            least = max([*stages, from_.get(node, 0)])
            fits = _fitting(parameters, least)
            if made and len(made) == len(node.all_input_nodes) and fits:
                reads[node] = parameters
            elif made and not fits:  # on a stage that does not hold all: calls that were made before are handed to it
                least = max([least, *(facts(source).stage or 0 for source in made if source not in everywhere)])
                parameters = tuple(r for source in made if source in everywhere for r in reads[source])
                fits = _fitting(parameters, least)
            if not fits:
                names = ", ".join(name for name, _ in parameters)
                complaints.append(f"{names} ({facts(node).source or node.name}) cannot be used after what is computed on stage {least}.")
            _run_on(node, fits[0] if fits else least)
    return complaints


def _fitting(parameters: Sequence[tuple[str, tuple[int, ...]]], least: int) -> list[int]:
    """The stages from `least` on that hold all of these: of none, that one."""
    return [s for s in range(least, 1 + max((max(h) for _, h in parameters), default=least)) if all(s in h for _, h in parameters)]


def _run_on(node: fx.Node, stage: int) -> None:
    set_facts(node, replace(facts(node), stage=stage))


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
