"""Do processes that order sets of strings differently make the same programs? `python benchmarks/hash_seeds/run.py --tasks causal`.

Every architecture is captured, planned and lowered for a mesh in one process per hash seed (PYTHONHASHSEED), without a process group, and
what the ranks of a job must have alike is compared: the captured graph as text, the plan, and the code of the lowered graph and its blocks.

    same       all alike
    differs    with the first lines that do
    refused    an error that meshpar raises and explains, in every process
    built      transformers makes no such model of these sizes (not our concern)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

AFFECTED = (
    "causal:gemma3_text causal:gemma3n_text causal:gemma4_text causal:olmo3 causal:modernbert-decoder causal:mimo_v2_flash "
    "causal:llama4_text causal:deepseek_v4 causal:dots1 causal:dory causal:exaone_moe causal:laguna causal:lara_mini causal:lfm3 "
    "causal:mellum causal:zaya causal:cohere_compass_text causal:dots3_note_text causal:gemma4_unified_text masked:modernbert "
    "masked:neomme masked:ultrabert seq2seq:t5gemma2 token:beam multimodal:gemma3 multimodal:gemma3n multimodal:diffusion_gemma "
    "multimodal:step3p7"
).split()
"""Those whose modules loop over a set of strings."""


def made(task: str, kind: str, mesh: str) -> dict[str, Any]:
    """What one process makes of an architecture, as texts."""
    from benchmarks.architectures import small

    try:
        model, batch = small.made(task, kind)
    except Exception as error:
        return {"status": "built", "why": repr(error)[:300]}
    return texts(model, batch, mesh)


def texts(model: Any, batch: Any, mesh: str) -> dict[str, Any]:
    """The captured graph, the plan and the code of a model, as texts."""
    import meshpar as mp
    from meshpar.compile.programs import Programs
    from meshpar.errors import MeshparError
    from meshpar.graph.text import lines
    from meshpar.mesh import parse_mesh
    from meshpar.runtime.cut import cut

    size = 1
    for count in parse_mesh(mesh).values():
        size *= count
    try:
        with mp.simulate(size):
            program = Programs(model, mp.make_mesh(mesh, "cpu"), mp.ParallelConfig()).make((), batch, training=model.training)
    except MeshparError as error:
        return {"status": "refused", "why": str(error)[:300]}
    captured = program.captured
    blocks = cut(program.graph, captured.parameters, captured.buffers, aliases=captured.aliases, mutated=captured.mutations)
    pieces = [("", blocks.root), *blocks.blocks.items()]
    plan = program.plan.to_json().replace("],", "],\n").splitlines()
    code = [f"{path}: {line}" for path, piece in pieces for line in str(piece.graph).splitlines()]
    return {"status": "made", "graph": lines(captured), "plan": plan, "code": code}


def child(cases: list[str], mesh: str) -> None:
    """Print one line of JSON for every case."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print
    for case in cases:
        task, _, kind = case.partition(":")
        start = time.perf_counter()
        try:
            found = made(task, kind, mesh)
        except Exception as error:
            found = {"status": "crash", "why": repr(error)[:300]}
        out.write(json.dumps({"case": case, "seconds": time.perf_counter() - start, **found}) + "\n")
        out.flush()


def compared(results: list[dict[str, Any]]) -> tuple[str, str]:
    """What became of one case in all processes, and why."""
    first = results[0]
    if len({result["status"] for result in results}) > 1:
        return "differs", " | ".join(f"{r['status']} {r.get('why', '')}" for r in results)
    if first["status"] != "made":
        return first["status"], first["why"]
    for part in ("graph", "plan", "code"):
        for other in results[1:]:
            for a, b in zip([*first[part], ""], [*other[part], ""], strict=False):
                if a != b:
                    return "differs", f"{part}:\n    {a[:400]}\n    {b[:400]}"
    return "same", f"{len(first['graph'])} lines"


def runs(cases: list[str], seeds: list[int], mesh: str) -> Iterator[tuple[str, str, str]]:
    """Each case with what became of it."""
    command = [sys.executable, __file__, "--child", "--mesh", mesh, "--cases", *cases]
    started = [
        subprocess.Popen(
            command, env={**os.environ, "PYTHONHASHSEED": str(seed)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for seed in seeds
    ]
    for case in cases:
        found = [json.loads(line) if (line := process.stdout.readline()) else None for process in started]  # type: ignore[union-attr]
        if None in found:
            yield case, "killed", "a process ended"
            return
        yield case, *compared([one for one in found if one is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="task:kind; by default those whose modules loop over a set of strings")
    parser.add_argument("--tasks", nargs="+", help="all architectures of these tasks")
    parser.add_argument("--every", type=int, default=1, help="of --tasks, only one in so many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mesh", default="dp=2,tp=2")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.cases, options.mesh)
    cases = options.cases or list(AFFECTED)
    if options.tasks:
        from benchmarks.architectures import small

        cases = [f"{task}:{kind}" for task in options.tasks for kind in small.kinds(task)][:: options.every]
    count: Counter[str] = Counter()
    for case, status, why in runs(cases, options.seeds, options.mesh):
        count[status] += 1
        print(f"{case}: {status} ({why})", flush=True)
    print(dict(count))


if __name__ == "__main__":
    main()
