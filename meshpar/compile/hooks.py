"""Which hooks a program can keep: one that sees a microbatch's share of a gradient, or a module on several ranks, is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from meshpar.compile.split import StageGraph
from meshpar.errors import CaptureError, raise_all
from meshpar.graph.captured import Captured
from meshpar.graph.op import operands
from meshpar.ops.hooks import PARTS, WHOLE, Hook
from meshpar.sharding.infer import infer


def check_microbatches(captured: Captured) -> None:
    """Raise CaptureError for hooks that would do something else with the gradient of a microbatch than with that of the batch.

    Exact is what treats every element by itself, on a value that has rows of samples: a microbatch has the same rows of the gradient. On
    any other value the gradient is a sum over microbatches, on which a hook has to be linear.
    """
    nodes = _hooks(captured.graph)
    if not nodes:
        return
    inference = infer(captured.graph)
    samples: set[int] = set()
    for node in captured.graph.nodes:
        if node.op == "placeholder" and node.target in captured.batch_dims:
            one = inference.dims[node, 0][captured.batch_dims[str(node.target)]]
            samples.update(() if one is None else inference.extents.leaves(one))
    complaints = []
    for node in nodes:
        hook = captured.hooks[str(node.args[1])]
        rows = all(
            any(one is not None and samples & {*inference.extents.leaves(one)} for one in inference.dims[value, 0])
            for value in operands(node)
        )
        if not (hook.parts and (rows or hook.linear)):
            complaints.append(f"{hook.told} {_reason(hook)}.")
    raise_all(
        CaptureError,
        "With several microbatches a hook sees the gradient of one at a time (microbatches=1 keeps all hooks):",
        list(dict.fromkeys(complaints)),
    )


def _reason(hook: Hook) -> str:
    if hook.parts:
        return "is not linear, and its tensor has no dim of samples: its gradient is a sum over the microbatches"
    return "was not seen to treat every element of the gradient by itself (it looks at all of it, at its shape, or keeps it)"


def check_stages(stages: Sequence[StageGraph], ranks: Sequence[int], hooks: Mapping[str, Hook]) -> None:
    """Raise CaptureError for the hooks of a module whose inputs and outputs are on different ranks of the pipeline."""
    places: dict[tuple[str, str], set[int]] = {}
    for stage in stages:
        for hook in (hooks[str(node.args[1])] for node in _hooks(stage.graph)):
            if hook.pair:
                places.setdefault((hook.pair, hook.told), set()).add(ranks[stage.index])
    complaints = [f"{told} spans stages on several ranks." for (_, told), found in places.items() if len(found) > 1]
    raise_all(CaptureError, "Pipeline (put the hook on a smaller module, or choose other stages=):", complaints)


def _hooks(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target in (WHOLE, PARTS)]
