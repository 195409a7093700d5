"""Every typing of every operator of random programs: `python benchmarks/random_programs/typings.py --seeds 0:300`.

A program is captured, and its graph run node by node. For each node, all typings that the rules allow on 2, 3 and 4 ranks, whichever the
solver would take, are lowered and run on the parts of the real operands; the results must be the parts of the real result. What holds for
all values holds for gradients, so only values are compared. Costs a fraction of `run.py`, and sees typings no tiny model would be given.
"""

from __future__ import annotations

import argparse
import operator
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, fx, nn  # noqa: E402

from benchmarks.random_programs.programs import draw  # noqa: E402
from meshpar.capture.export import capture  # noqa: E402
from meshpar.errors import CaptureError  # noqa: E402
from meshpar.graph.facts import Facts, Info, facts, set_facts  # noqa: E402
from meshpar.graph.op import operands, value_info, value_of  # noqa: E402
from meshpar.mesh import Axis  # noqa: E402
from meshpar.passes.lower import Lower  # noqa: E402
from meshpar.plan import AxisPlan, NodePlan  # noqa: E402
from meshpar.sharding.infer import infer  # noqa: E402
from meshpar.sharding.price import Price  # noqa: E402
from meshpar.sharding.types import Partial, Shard, Type  # noqa: E402
from meshpar.sharding.typings import Choice, choices  # noqa: E402

SIZES = (2, 3, 4)


class Typings(fx.Interpreter):
    """Runs a captured graph and checks the typings of each of its calls on the way."""

    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Tensor], seen: set[object]) -> None:
        super().__init__(fx.GraphModule(nn.Module(), fx.Graph()), graph=graph)
        self.tensors, self.seen, self.inference = tensors, seen, infer(graph)
        extents = self.inference.extents
        every = (one for axes in self.inference.dims.values() for one in axes if one is not None)
        self.factors = sorted({f for one in every for f in (*extents.leaves(one), *extents.cuttable(one), extents.find(one))})
        self.checked: Counter[str] = Counter()
        self.without: Counter[str] = Counter()
        self.wrong: list[str] = []

    def fetch_attr(self, target: str) -> Tensor:
        return self.tensors[target].detach()

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.tensors[target]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and n.target is not operator.getitem:
            self._check(n, result)
        return result

    def _check(self, node: fx.Node, result: Any) -> None:
        call = self.inference.calls[node]
        if call.signature is None:
            self.without[call.op.name] += 1
            return
        args = self.fetch_args_kwargs_from_env(node)
        for size in SIZES:
            for choice in choices(call, self.inference, self.factors, size, Price(), 1.0):
                key = (call.kind, size, choice.uses, choice.outs)
                if key in self.seen or call.signature.gathers & set(choice.why.split()):
                    continue  # (what settles a cut with collectives of its own has its own tests)
                self.seen.add(key)
                self.checked[call.op.name] += 1
                try:
                    complaint = difference(node, args, result, choice, size)
                except Exception as error:
                    complaint = f"{type(error).__name__}: {str(error)[:300]}"
                if complaint:
                    types = f"{' '.join(map(str, choice.uses))} -> {' '.join(map(str, choice.outs))}"
                    shapes = f"{call.op.shapes} -> {[o.shape for o in call.op.outs if o is not None]}"
                    self.wrong.append(f"{node.format_node()}\n    {shapes} on {size} ranks as {types}: {complaint}")


def difference(node: fx.Node, args: tuple[Any, Any], result: Any, choice: Choice, size: int) -> str:
    """What is wrong with one typing of one call, run on parts; "" when nothing is."""
    infos = [value_info(value_of(o)) for o in operands(node)]
    parts = [_run(node, args, infos, choice, size, rank) for rank in range(size)]
    several = isinstance(result, (tuple, list))
    for index, (want, type_) in enumerate(zip(result if several else [result], choice.outs, strict=True)):
        have = [p[index] if several else p for p in parts]
        if want is None:
            continue
        if isinstance(type_, Partial):
            total = torch.stack(have).any(0) if want.dtype == torch.bool else sum(have[1:], have[0])
            have, wanted = [total], [want]
        else:
            wanted = [part(want, type_, size, rank) for rank in range(size)]
        for rank, (ours, theirs) in enumerate(zip(have, wanted, strict=True)):
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                return f"result {index} on rank {rank} is {ours.dtype} {tuple(ours.shape)}, not {theirs.dtype} {tuple(theirs.shape)}"
            if not torch.allclose(ours, theirs, rtol=1e-8, atol=1e-9, equal_nan=True):
                return f"result {index} on rank {rank} has other values"
    return ""


def _run(node: fx.Node, args: tuple[Any, Any], infos: list[Info], choice: Choice, size: int, rank: int) -> Any:
    """The call as `rank` runs it, on its parts of the operands."""
    graph, mine, plan = fx.Graph(), list[Tensor](), dict[str, NodePlan]()

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            index = len(mine)
            mine.append(part(value, choice.uses[index], size, rank))
            made = graph.placeholder(f"x{index}")
            set_facts(made, Facts(infos[index]))
            plan[made.name] = NodePlan((), (choice.uses[index],), "")
            return made
        if isinstance(value, (list, tuple)):
            return type(value)(placed(v) for v in value)
        return {k: placed(v) for k, v in value.items()} if isinstance(value, dict) else value

    call = graph.call_function(node.target, placed(args[0]), placed(args[1]))
    set_facts(call, facts(node))
    plan[call.name] = NodePlan(choice.uses, choice.outs, "")
    graph.output(())
    lowered = Lower(AxisPlan("tp", size, plan, ()), Axis("tp", size, rank, ""))(graph)
    made = [n for n in lowered.nodes if n.op == "call_function" and n.target is not operator.getitem][-1]
    lowered.erase_node(next(iter(reversed(lowered.nodes))))
    lowered.output(made)
    return fx.GraphModule(nn.Module(), lowered)(*mine)


def part(full: Tensor, type_: Type, size: int, rank: int) -> Tensor:
    """What `rank` holds of a value at a type."""
    if isinstance(type_, Shard):
        ranges = type_.ranges(size, rank)
        return torch.cat([full.narrow(type_.dim, a, b - a) for a, b in ranges], type_.dim) if ranges else full.narrow(type_.dim, 0, 0)
    if not isinstance(type_, Partial):
        return full.clone()
    if full.dtype == torch.bool:  # only ever a mask: all of it on one rank
        return full if rank == 0 else torch.zeros_like(full)

    size_of = full.abs().max() if full.is_floating_point() and full.numel() else 7  # (larger shares would cancel with a larger rounding)

    def share(of: int) -> Tensor:
        return (size_of * torch.sin(torch.arange(full.numel(), dtype=torch.double) + of)).reshape(full.shape).to(full.dtype)

    return share(rank) if rank < size - 1 else full - sum(share(r) for r in range(size - 1))


def main() -> int:
    """Check the programs of the seeds; exit status 1 when a typing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:100", help="first:last")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.double)
    warnings.simplefilter("ignore")
    seen, checked, without, wrong = set[object](), Counter[str](), Counter[str](), 0
    for seed in range(*(int(n) for n in args.seeds.split(":"))):
        program = draw(seed, lines=14)
        model, batch = program.model(), program.batch()
        try:
            captured = capture(model, (), batch)
        except CaptureError:
            continue
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **captured.constants, **batch}
        found = Typings(captured.graph, tensors, seen)
        with torch.no_grad():
            found.run()
        checked, without, wrong = checked + found.checked, without + found.without, wrong + len(found.wrong)
        for line in found.wrong:
            print(f"seed {seed}: {line}\n", flush=True)
    print(f"{checked.total()} typings of {len(checked)} operators, {wrong} wrong")
    print("without a rule:", ", ".join(f"{name} {count}" for name, count in without.most_common()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
