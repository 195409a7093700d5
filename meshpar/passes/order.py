"""The sequence of passes, and why it is that one.

    captured ── before() ── decided on ── lowered() ── deferred() ── cut into stages ── chunked() ── finished() ── what the runtime is given

before     Batch norm is written out first: its statistics then are sums like any other, and the types see them. Attention that is written
           out becomes attention, and masks are read, while they are whole: a part of a causal mask is not causal. Losses of all positions
           but some at the ends take all, while the slice can be seen. Convolutions with a padding before or a slice after them become ones
           that give a result for each position, and so do shifts that are left: a padding of a convolution is its own.
lowered    `Lower`, outermost axis first, as they were typed: the types of the next one speak of the sizes that are left.
           `SimplifyAttention` again: a mask that is causal with the sizes of this rank need not be read.
           `ReduceGradients`: the sum of a gradient becomes a conversion of the parameter, so every use of it must be in the graph.
           `Coalesce` joins conversions of small parameters: those of every axis must be there.
           `SeedRandom` and `TallyExperts` ask for inputs of their own; they read the operators that are left, and nothing reads them.
deferred   Only for schedules that put the gradients of weights off, and after lowering: the products that are split must be local ones.
chunked    Where logits are to be few at a time, in graphs that return the loss alone: a reader of all logits must be gone.
finished   `CutExpertsIntoPieces`, `CutTokensIntoPieces`, `CutIntoPieces` and `HideGradientSums` join products and what sends for them, of
           one block, so stages must be cut; they leave those alone that were put off. All but the last take what is next to each other,
           that one what is left, and what they left to do. (`CutIntoPieces` would take what experts are chosen by.)
           `ComputeAgain` joins what is cheap, when nobody looks for single operators any more.
           `Reuse` is the last: memory that nothing reads any more is known when no pass adds a reader, and when stages are cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from meshpar.mesh import Axis
from meshpar.passes.again import ComputeAgain
from meshpar.passes.attention import SimplifyAttention
from meshpar.passes.batch_norm import expand_batch_norm
from meshpar.passes.chunked_loss import ChunkLoss
from meshpar.passes.coalesce import Coalesce
from meshpar.passes.convolutions import AlignConvolutions
from meshpar.passes.experts_in_pieces import CutExpertsIntoPieces
from meshpar.passes.lower import Lower
from meshpar.passes.pieces import CutIntoPieces
from meshpar.passes.products import HideGradientSums
from meshpar.passes.randomness import SeedRandom
from meshpar.passes.reduce import ReduceGradients
from meshpar.passes.reuse import Reuse
from meshpar.passes.shifted import IgnoreEnds
from meshpar.passes.shifts import AlignShifts
from meshpar.passes.tally import TallyExperts
from meshpar.passes.tokens_in_pieces import CutTokensIntoPieces
from meshpar.passes.weight_gradients import DeferWeightGradients
from meshpar.passes.written_out import recognise_attention
from meshpar.plan import AxisPlan
from meshpar.roles import ROLES
from meshpar.sharding.price import Price


def before(graph: fx.Graph, axes: Sequence[Axis]) -> None:
    """What is made of the captured graph, in place, before anything is decided about it. `axes`: those that values are typed on."""
    divided = {ROLES[axis.name].divides for axis in axes if axis.size > 1}
    if any(axis.size > 1 and ROLES[axis.name].own_batches for axis in axes):
        expand_batch_norm(graph)
    if "sequence" in divided:
        recognise_attention(graph)
        SimplifyAttention(windows=True)(graph)
        IgnoreEnds()(graph)
        AlignConvolutions()(graph)
        AlignShifts()(graph)


def lowered(
    graph: fx.Graph,
    plans: Mapping[str, AxisPlan],
    axes: Sequence[Axis],
    parameters: frozenset[str],
    summed: Mapping[str, frozenset[str]] | None = None,
) -> fx.Graph:
    """The graph as this rank runs it; the given one is left as it is.

    `plans`: axis -> the types decided on it. `axes`: in the order of typing. `summed`: axis -> parameters whose gradients the graph itself
    sums over it; those of the others are left to whoever shares parameters out.
    """
    whole = graph
    for axis in axes:
        if axis.name in plans:
            graph = Lower(plans[axis.name], axis)(graph)
    if graph is whole:
        graph = _copied(graph)
    graph = SimplifyAttention()(graph)
    for axis in axes:
        names = (summed or {}).get(axis.name)
        if names and axis.size > 1:
            graph = ReduceGradients(axis, names & parameters)(graph)
    graph = Coalesce(parameters)(graph)
    graph = SeedRandom(tuple(axes))(graph)
    return TallyExperts()(graph)


def deferred(graph: fx.Graph, parameters: frozenset[str]) -> fx.Graph:
    """The lowered graph with the gradients of weights put off, for schedules that compute them in actions of their own."""
    return DeferWeightGradients(parameters)(graph)


def finished(graph: fx.Graph, *, results: bool, overlap: bool, again: bool = False, price: Price | None = None) -> fx.Graph:
    """The graph that runs. `overlap`: what can be computed while a collective runs, is; memory that nothing reads again is used again.

    `results`: also that of results, which recompute may need. `again`: backward may gather and compute again what keeps less, since blocks
    are not computed again as they are: products beside their own collectives in pieces, and what is cheap. `price`: the constants of the
    machine, where they are known; then pieces are made where they take less there.
    """
    if overlap:
        graph = HideGradientSums()(_in_pieces(graph, price) if again else graph)
    if again:
        graph = ComputeAgain()(graph)
    return Reuse(results=results)(graph)


def _in_pieces(graph: fx.Graph, price: Price | None) -> fx.Graph:
    for cut in (CutExpertsIntoPieces(price=price), CutTokensIntoPieces(price=price), CutIntoPieces(price=price)):
        graph = cut(graph)
    return graph


def chunked(graph: fx.Graph, nbytes: int) -> fx.Graph:
    """The lowered graph with at most `nbytes` of the logits of its losses at once: one that returns no logits."""
    return ChunkLoss(nbytes)(graph)


def _copied(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = new.node_copy(node, lambda n: mapping[n])
    return new
