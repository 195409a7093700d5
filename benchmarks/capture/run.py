"""What it costs to plan a model nobody can build here: `python benchmarks/capture/run.py`.

A GPT of 12, 24, 48 and 96 layers (hidden 12288, 96 heads, 175 B parameters at 96) built on `meta`, on dp=64 x tp=8 = 512 ranks of the fake
process group. Every case runs in a process of its own: import, build, then the stages of `parallelize()` up to the lowered graph of rank 0:

    capture    the model as one flat graph            (capture.export.capture)
    solve      graph -> Plan                          (compile.decide.decide)
    lower      Plan -> local graph of this rank       (passes.order.lowered)
    ledger     the collectives of the lowered graph   (compile.ledger.ledger)
    proof      what the static check reads back       (compile.proved)
    blocks     the modules that run the graph         (runtime.blocks.build, parameters on meta)

Times are processor seconds of the one thread that does it all, which other work on the machine does not enter; the last is wall time.
Memory is the peak resident size of the process; "imports" is what it was before the model was built.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.measuring import machine  # noqa: E402
from meshpar.compile import lowering, planning, programs  # noqa: E402
from meshpar.compile.program import Program  # noqa: E402
from meshpar.passes import order  # noqa: E402
from meshpar.runtime import blocks  # noqa: E402

STAGES = ("build", "capture", "solve", "lower", "ledger", "proof", "blocks")


class Layer(nn.Module):
    """A pre-norm GPT layer with the fused projection of GPT-2."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        q, k, v = (part.view(b, s, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).reshape(b, s, h))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Embeddings, layers, a tied head and the next-token loss."""

    def __init__(self, layers: int, hidden: int, heads: int, vocab: int, positions: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, hidden), nn.Embedding(positions, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def build(kind: str, layers: int) -> nn.Module:
    """The model on `meta`."""
    with torch.device("meta"):
        if kind == "gpt":
            return GPT(layers, 12288, 96, 51200, 2048)
        from transformers import AutoConfig, AutoModelForCausalLM

        if kind in ("llama", "mixtral"):  # of the sizes that their configurations have by default: 7B, 8x7B
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=layers))
        config = AutoConfig.for_model(
            "gpt2",
            n_layer=layers,
            n_embd=12288,
            n_head=96,
            vocab_size=51200,
            n_positions=2048,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return AutoModelForCausalLM.from_config(config)


class Clock:
    """Processor seconds per stage; functions of the package are timed where `meshpar.compile` calls them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start

    def wrap(self, module: Any, function: str, name: str) -> None:
        inner: Callable[..., Any] = getattr(module, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return inner(*args, **kwargs)

        setattr(module, function, timed)


def case(kind: str, layers: int, spec: str, profile: str | None) -> dict[str, Any]:
    """Run one case in this process."""
    torch.set_num_threads(1)
    before = _peak()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=_ranks(spec))
    mesh = mp.make_mesh(spec)
    clock = Clock()
    clock.wrap(programs, "capture", "capture")
    clock.wrap(planning, "decide", "solve")
    clock.wrap(order, "lowered", "lower")
    clock.wrap(lowering, "ledger", "ledger")
    clock.wrap(programs, "proved", "proof")
    clock.wrap(programs, "proved_loss", "proof")
    with clock.stage("build"):
        model = build(kind, layers)
    batch = {name: torch.zeros(1, 2048, dtype=torch.long) for name in ("input_ids", "labels")}
    start, cpu = time.perf_counter(), time.process_time()
    made = _profiled(profile, lambda: _make(model, mesh, batch, clock))
    wall, total = time.perf_counter() - start, time.process_time() - cpu
    return {
        "kind": kind,
        "layers": layers,
        "ranks": _ranks(spec),
        "parameters": sum(p.numel() for p in model.parameters()),
        "nodes": len(made.graph.nodes),
        "collectives": sum(c.count for c in made.plan.ledger),
        **clock.seconds,
        "total": total,
        "wall": wall,
        "imports_mib": before,
        "peak_mib": _peak(),
    }


def _make(model: nn.Module, mesh: Any, batch: dict[str, torch.Tensor], clock: Clock) -> Program:
    made = programs.Programs(model, mesh, mp.ParallelConfig()).make((), batch, training=True)
    with clock.stage("blocks"):
        parameters = {n: nn.Parameter(p.detach().to("meta")) for n, p in model.named_parameters()}
        buffers = {n: b.detach().to("meta") for n, b in model.named_buffers()}
        blocks.build(made.graph, parameters, buffers, constants=made.captured.constants, mutations=made.captured.mutations)
    return made


def _profiled(path: str | None, run: Callable[[], Program]) -> Program:
    if path is None:
        return run()
    import cProfile

    profiler = cProfile.Profile()
    result = profiler.runcall(run)
    profiler.dump_stats(path)
    return result


def _ranks(spec: str) -> int:
    return prod(int(part.split("=")[1]) for part in spec.split(","))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(rows: list[dict[str, Any]]) -> str:
    """The results as markdown."""
    head = ["model", "layers", "parameters", "mesh", "graph nodes", *STAGES[1:], "total", "wall", "imports", "peak"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["kind"], r["layers"], f"{r['parameters'] / 1e9:.1f} B", r["mesh"], r["nodes"]]
        cells += [f"{r[name]:.2f} s" for name in STAGES[1:]] + [f"{r['total']:.1f} s", f"{r['wall']:.1f} s"]
        cells += [f"{r['imports_mib'] / 1024:.2f} GiB", f"{r['peak_mib'] / 1024:.2f} GiB"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48, 96])
    parser.add_argument("--kinds", nargs="+", default=["gpt", "gpt2"], help="gpt: plain torch; gpt2, llama, mixtral: transformers")
    parser.add_argument("--meshes", nargs="+", default=["dp=64,tp=8"], help='a smaller one shows that ranks cost nothing: "dp=2,tp=2"')
    parser.add_argument("--profile", help="write cProfile's statistics here")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        kind, layers, spec = options.case
        print("RESULT " + json.dumps(case(kind, int(layers), spec, options.profile)))
        return
    rows = []
    for kind in options.kinds:
        for mesh in options.meshes:
            for layers in options.layers:
                extra = ["--profile", options.profile] if options.profile else []
                command = [sys.executable, __file__, *extra, "--case", kind, str(layers), mesh]
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not found:
                    raise SystemExit(done.stdout + done.stderr)
                rows.append(json.loads(found[0].removeprefix("RESULT ")) | {"mesh": mesh})
                print(rows[-1], file=sys.stderr, flush=True)
    print(f"{machine()}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
