"""Every architecture of a package through `mp.verify`: `python benchmarks/architectures/run.py --package timm`.

For each a tiny model with random weights is trained one step on one device and over dp=2 x tp=2 (simulated ranks), in float64, and loss,
every gradient, the gradient norm and the parameters after one AdamW step are compared. One process each, with a time limit; results are
appended to a file of JSON lines, and summed up by `--table`.

    built      transformers makes no such model of these sizes (not our concern)
    eager      the model itself does not run on this batch (not our concern either)
    refused    an error that meshpar raises and explains
    crash      any other error
    wrong      numbers that differ
    drawn      numbers that differ because the model draws random ones even without dropout: there is nothing to compare
    ok         all within 1e-9
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.architectures import packages  # noqa: E402
from meshpar.compile import planning, programs  # noqa: E402
from meshpar.config import ParallelConfig  # noqa: E402
from meshpar.errors import MeshparError  # noqa: E402
from meshpar.graph.cost import flops  # noqa: E402
from meshpar.graph.facts import facts, infos_of  # noqa: E402
from meshpar.graph.op import op_name  # noqa: E402
from meshpar.passes import order  # noqa: E402
from meshpar.proof.comparable import cast, comparable, only  # noqa: E402
from meshpar.proof.verify import verify  # noqa: E402
from meshpar.roles import ROLES  # noqa: E402


def case(package: packages.Package, task: str, kind: str, mesh: str | None, steps: int, config: ParallelConfig) -> dict[str, Any]:
    """Run one architecture in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seconds: dict[str, float] = {}
    _timed(programs, "capture", seconds)
    _timed(planning, "decide", seconds)
    plans: list[Any] = []
    graphs: list[Any] = []
    _kept(planning, "decide", plans)
    _kept(order, "lowered", graphs)
    start = time.perf_counter()
    try:
        made = package.made(task, kind)
        model, batch = made.model, made.batch
    except Exception as error:
        return {"status": "built", "why": _said(error)}
    alone = time.process_time()
    try:
        with only(torch.float64):
            _step(made, comparable(model, dtype=torch.float64, perturb=0.02, seed=0))
    except Exception as error:
        return {"status": "eager", "why": _said(error)}
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "eager_s": time.process_time() - alone}
    if mesh is None:
        return found | {"status": "ok"}
    try:
        report = verify(model, mesh, batch, config=config, loss_fn=made.loss_fn, steps=steps)
        found |= {"status": "ok" if report.ok else "wrong", "worst": {d.quantity: [d.largest, *d.worst[:2]] for d in report.differences}}
        found["notes"] = list(report.notes)
        if not report.ok and any("draws random numbers" in note for note in report.notes):
            found["status"] = "drawn"
    except MeshparError as error:
        found |= {"status": "refused", "why": _said(error)}
    except Exception as error:
        found |= {"status": "crash", "why": _said(error), "trace": traceback.format_exc()[-3000:]}
    if plans:
        found |= {"whole": _whole(plans[0]), "no_rule": list(plans[0].notes)}
    if plans and graphs:
        found |= {"repeated": {a.axis: _repeated(graphs[0], a.axis) for a in plans[0].axes if ROLES[a.axis].divides == "sequence"}}
    return found | {"seconds": time.perf_counter() - start, "cpu_s": time.process_time(), **{f"{k}_s": v for k, v in seconds.items()}}


def _step(made: packages.Made, model: Any) -> None:
    """Forward and backward on one device."""
    batch = cast(made.batch, torch.float64)
    output = model(**batch) if isinstance(batch, dict) else model(*batch)
    loss = output["loss"] if made.loss_fn is None else made.loss_fn(output, batch)
    assert loss is not None, "no loss"
    loss.backward()


def _whole(plan: Any) -> float:
    """The share of the parameters that stays whole over tp."""
    from math import prod

    sizes = [(prod(p.shape), "S" in str(p.placements.get("tp", "I"))) for p in plan.parameters.values()]
    return sum(n for n, cut in sizes if not cut) / max(1, sum(n for n, _ in sizes))


def _repeated(graph: Any, axis: str) -> dict[str, Any]:
    """What every rank of an axis that cuts the sequence computes although another one does too: the share of the arithmetic, and where."""
    work = {True: 0.0, False: 0.0}
    where: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op != "call_function" or facts(node).conversion is not None or not _differentiable(node):
            continue
        whole, cost, name = axis not in facts(node).cut, flops(node), op_name(node.target)
        work[whole] += cost
        if whole and (cost or name in SCANS):
            where[f"{name} in {re.sub(r'[0-9]+', '*', facts(node).module or 'the model')}"] += 1
    return {"share": work[True] / max(1.0, sum(work.values())), "where": dict(where)}


def _differentiable(node: Any) -> bool:
    return any(info is not None and info.requires_grad for info in infos_of(node))


SCANS = ("cumsum", "cumprod", "logcumsumexp", "_thnn_fused_lstm_cell", "lstm", "gru")
"""Operators that go along positions and are not counted as arithmetic."""


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1500]


def _timed(module: Any, name: str, seconds: dict[str, float]) -> None:
    inner: Callable[..., Any] = getattr(module, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return inner(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - start

    setattr(module, name, timed)


def _kept(module: Any, name: str, kept: list[Any]) -> None:
    inner: Callable[..., Any] = getattr(module, name)

    def keeping(*args: Any, **kwargs: Any) -> Any:
        kept.append(inner(*args, **kwargs))
        return kept[-1]

    setattr(module, name, keeping)


def forked(
    package: packages.Package, task: str, kind: str, mesh: str | None, limit: float, steps: int, config: ParallelConfig
) -> dict[str, Any]:
    """`case` in a child process, which has `limit` seconds of CPU time, and ten times as long by the clock."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        spent = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + int(limit), spent + int(limit)))
        try:
            result = case(package, task, kind, mesh, steps, config)
        except BaseException as error:
            result = {"status": "crash", "why": repr(error)[:1000], "trace": traceback.format_exc()[-3000:]}
        with os.fdopen(write, "w") as out:
            out.write(json.dumps(result, default=str))
        os._exit(0)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(int(10 * limit))
    with os.fdopen(read) as come:
        text = come.read()
    signal.alarm(0)
    os.waitpid(child, 0)
    return json.loads(text) if text else {"status": "timeout", "why": f"killed (after {limit} s of CPU time, or for memory)"}


def table(path: Path) -> str:
    """The last result of every architecture, summed up."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        last[row["task"], row["kind"]] = row
    statuses = ("ok", "wrong", "crash", "refused", "drawn", "timeout", "eager", "built")
    lines = ["| task | all | " + " | ".join(statuses) + " |", "|" + "---|" * (len(statuses) + 2)]
    for task in dict.fromkeys(task for task, _ in last):
        count = Counter(r["status"] for (t, _), r in last.items() if t == task)
        if count:
            lines.append(f"| {task} | {sum(count.values())} | " + " | ".join(str(count[s]) for s in statuses) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", default="transformers", choices=packages.NAMES)
    parser.add_argument("--tasks", nargs="+", help="only these; all, unless given")
    parser.add_argument("--kinds", nargs="+", help="only these")
    parser.add_argument("--mesh", default="dp=2,tp=2")
    parser.add_argument("--context", default="auto", choices=("auto", "gather", "heads", "ring"), help="attention over cp")
    parser.add_argument("--eager", action="store_true", help="only build the models, and run them on one device")
    parser.add_argument("--every", default="1/0", help="n/k: of the kinds of each task every n-th, from the k-th on")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of CPU time for one")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps compared")
    parser.add_argument("--out", type=Path, default=Path("architectures.jsonl"))
    parser.add_argument("--resume", action="store_true", help="leave out what the file has already")
    parser.add_argument("--table", action="store_true", help="only sum up what is in the file")
    options = parser.parse_args()
    if not options.table:
        package = packages.of(options.package)
        done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.resume and options.out.exists() else []
        skip = {(row["task"], row["kind"]) for row in done}
        for task in options.tasks or package.TASKS:
            step, first = map(int, options.every.split("/"))
            for kind in package.kinds(task)[first::step]:
                if (options.kinds and kind not in options.kinds) or (task, kind) in skip:
                    continue
                mesh = None if options.eager else options.mesh
                found = forked(package, task, kind, mesh, options.limit, options.steps, ParallelConfig(context=options.context))
                result = {"task": task, "kind": kind, "mesh": mesh, **found}
                with options.out.open("a") as out:
                    out.write(json.dumps(result) + "\n")
                print(f"{task} {kind}: {result['status']} {result.get('cpu_s', 0):.1f} s {result.get('why', '')[:150]}", flush=True)
    print(table(options.out))


if __name__ == "__main__":
    main()
