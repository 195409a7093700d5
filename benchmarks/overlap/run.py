"""How much of communication a step stands still for: `python benchmarks/overlap/run.py --write`.

Local gloo ranks of one thread each, over a network that is slowed down (`link.py`): each collective takes a stated latency and its bytes
over a stated bandwidth, and leaves the core free. "Exposed" is the share of that time for which the step waits, "computing" the time of
the step without it. The network is a clock beside the processor time of a rank, which other work on the machine hardly touches; with
`--sleep` it is a thread that sleeps, and time is real (for an idle machine with a core for each rank, and one more).

With hidden 8192 in bf16 on 8 H100 of one node (half of 989 TFLOP/s, 250 GB/s in collectives) a message takes about 1.7 times as long as
the output projection beside it. So it does at 125 MB/s beside an AMD EPYC; beside the faster core of this table it takes 2.2 times as long
there, and 1.7 times at 160 MB/s (`--bandwidth`). `overlap_tensor_parallel` is on and off, in pipelines
(1F1B, 4 microbatches of 1 x 512 tokens) `overlap_p2p`; for the tensor-parallel Llama there is code by hand, too,
`benchmarks/tensor_parallel/handwritten.py`, which waits for each collective where it is called (its model ends in a squared error: no
embedding, no head), and for the pipeline torch's own runtime. A message to a stage takes its time from when the stage begins to receive it;
how late the other stage sends it is not counted. Over ep it is rows of experts alone that are counted; skewed, three of four go to the
experts of the first rank. Over cp a ring has no switch, gathers and all-to-alls wait. Over dp (32 layers, 2 x 512 tokens a rank, every
parameter shared out) it is `overlap_grad_reduce` and `overlap_param_gather`; beside it FSDP2 as its documentation has it, which waits for
each collective on CPUs. Gradients are compared, on against off, before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from link import Link, Sleeping, slow  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.measuring import line, machine, readme, table, write  # noqa: E402
from benchmarks.peers.others import fsdp, pipeline  # noqa: E402
from benchmarks.tensor_parallel.handwritten import Handwritten, Model  # noqa: E402
from meshpar.proof import launch  # noqa: E402

LATENCY, BANDWIDTH = 1e-4, 1.25e8
HIDDEN, LENGTH, LAYERS = 512, 512, 4


@dataclass(frozen=True)
class Case:
    """One row of the table: a model, a mesh, whether the sequence is cut, and what moves where `cp` cuts it."""

    model: str
    mesh: str
    sequence: bool = False
    context: str = "auto"

    def __str__(self) -> str:
        form = "" if self.context == "auto" else f", {self.context}"
        return f"{self.model}, {self.mesh}" + (", sequence parallel" if self.sequence else form)

    @property
    def axis(self) -> str:
        return self.mesh.partition("=")[0]

    @property
    def alone(self) -> bool:
        """Whether it is somebody else's."""
        return self.model in OTHERS

    @property
    def overlaps(self) -> tuple[str, ...]:
        """Both, if there is a switch, else what it does."""
        if self.axis == "cp":
            return ("on",) if self.context == "ring" else ("off",)
        return ("off",) if self.alone else ("off", "on")


CASES = (
    Case("llama", "tp=2"),
    Case("llama", "tp=2", True),
    Case("by hand", "tp=2"),
    Case("by hand", "tp=2", True),
    Case("mixtral", "tp=2"),
    Case("mixtral", "tp=2", True),
    Case("mixtral", "ep=2"),
    Case("mixtral, skewed", "ep=2"),
    Case("llama", "cp=2", context="ring"),
    Case("llama", "cp=2", context="gather"),
    Case("llama", "cp=2", context="heads"),
    Case("llama", "dp=2"),
    Case("FSDP2 by hand", "dp=2"),
    Case("llama", "pp=2"),
    Case("torch.distributed.pipelining", "pp=2"),
)
MICROBATCHES = 4
SWITCHES: Mapping[str, tuple[str, ...]] = {
    "tp": ("overlap_tensor_parallel",),
    "ep": ("overlap_tensor_parallel",),
    "dp": ("overlap_grad_reduce", "overlap_param_gather"),
    "pp": ("overlap_p2p",),
    "cp": (),
}
OTHERS = ("by hand", "FSDP2 by hand", "torch.distributed.pipelining")
DEEP = 32


def transformer(name: str, samples: int, layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    name, _, skewed = name.partition(", ")
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if name == "mixtral" else {}
    config = AutoConfig.for_model(
        name,
        num_hidden_layers=layers,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 128,
        vocab_size=1024,
        use_cache=False,
        **more,
    )
    model: nn.Module = AutoModelForCausalLM.from_config(config).train()
    torch.manual_seed(1)
    ids = torch.randint(1024, (samples, LENGTH))
    if skewed:
        lean(model, ids)
    return model, {"input_ids": ids, "labels": ids}


@torch.no_grad()
def lean(model: Any, ids: Tensor) -> None:
    """Have three of four rows go to the first half of the experts."""

    def shift(gate: Any, args: Any) -> None:
        mean = args[0].flatten(0, -2).mean(0)
        gate.weight[: gate.weight.shape[0] // 2] += 0.3 * mean / mean.dot(mean)

    hooks = [layer.mlp.gate.register_forward_pre_hook(shift) for layer in model.model.layers]
    model(ids)
    for hook in hooks:
        hook.remove()


def step_of(case: Case, overlap: bool) -> tuple[nn.Module, Callable[[], Any]]:
    """A model, and a step of it."""
    if case.model == "by hand":
        torch.manual_seed(0)
        hand = Handwritten(Model(LAYERS, HIDDEN, 64, 3 * HIDDEN), sequence=case.sequence)
        x, target = torch.randn(2, 2, LENGTH, HIDDEN)
        return hand, lambda: hand(x, target).backward()
    samples = {"pp": MICROBATCHES, "dp": 4}.get(case.axis, 2)
    model, batch = transformer("llama" if case.alone else case.model, samples, DEEP if case.axis == "dp" else LAYERS)
    if case.model == "torch.distributed.pipelining":
        other = pipeline(model, batch, MICROBATCHES)
        return other.module or model, other.step
    mesh = mp.make_mesh(case.mesh)
    if case.axis in ("dp", "ep"):
        batch = mp.local_batch(batch, mesh)
    if case.model == "FSDP2 by hand":
        return model, fsdp(model, batch).step
    microbatches = MICROBATCHES if case.axis == "pp" else 1
    shared: Any = {"data_parallel": "zero3" if case.axis == "dp" else "replicate"}
    switches = dict.fromkeys(SWITCHES[case.axis], overlap)
    shared |= {"sequence_parallel": case.sequence, "context": case.context}
    config = mp.ParallelConfig(microbatches=microbatches, **shared, **switches)
    pm = mp.parallelize(model, mesh, example=batch, config=config)
    return pm, lambda: pm.train_step(**batch)


def gradients(module: nn.Module) -> list[Tensor]:
    found = [p.grad for p in module.parameters() if p.grad is not None]
    return [(g.to_local() if isinstance(g, torch.distributed.tensor.DTensor) else g).clone() for g in found]


def measure(case: Case, rounds: int, sleep: bool, bandwidth: float) -> dict[str, tuple[float, float, float]]:
    """By contender: seconds of a step, of communication in it, and of waiting for that; medians over the rounds, means over the ranks."""
    steps = {name: step_of(case, name == "on") for name in case.overlaps}
    link = (Sleeping if sleep else Link)(LATENCY, bandwidth)
    made = {name: list[tuple[float, float, float]]() for name in steps}
    seen = {}
    with slow(link):
        for turn in range(rounds + 1):
            for name, (module, step) in steps.items():
                for parameter in module.parameters():
                    parameter.grad = None
                dist.barrier()
                link.clear()
                step()
                took = link.now
                if turn:
                    made[name].append((took, link.busy, link.exposed))
                else:
                    seen[name] = gradients(module)
    if len(seen) == 2:
        worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(seen["on"], seen["off"], strict=True))
        if worst > 1e-4:
            raise SystemExit(f"{case}: gradients differ by {worst:.1e}")
    return {name: of_all_ranks([statistics.median(values) for values in zip(*found, strict=True)]) for name, found in made.items()}


def of_all_ranks(seconds: list[float]) -> tuple[float, float, float]:
    """Their means: stages wait for different messages."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found)
    took, busy, exposed = (found / dist.get_world_size()).tolist()
    return took, busy, exposed


def worker(rounds: int, only: list[str], sleep: bool, bandwidth: float) -> list[str]:
    """What every rank runs: the rows of the table."""
    warnings.simplefilter("ignore")
    rows = []
    for case in CASES:
        if only and not any(word in str(case) for word in only):
            continue
        for name, (took, busy, exposed) in measure(case, rounds, sleep, bandwidth).items():
            numbers = (f"{seconds * 1e3:.0f}" for seconds in (took, took - exposed, busy))
            rows.append(line([str(case), name, *numbers, f"{100 * exposed / busy:.0f} %"]))
            if dist.get_rank() == 0:
                print(rows[-1], flush=True)
    return rows


HEAD = ("case", "overlap", "step, ms", "computing, ms", "communication, ms", "exposed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=[], help="words of cases")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes per second and device")
    parser.add_argument("--sleep", action="store_true", help="real time, on a network that sleeps")
    parser.add_argument("--write", action="store_true", help="write the table to README.md beside this file")
    options = parser.parse_args()
    rows = launch.run(worker, options.rounds, options.only, options.sleep, options.bandwidth, world=2)[0]
    network = f"{LATENCY * 1e6:.0f} us and {options.bandwidth / 1e6:.0f} MB/s per device"
    size = f"{LAYERS} layers, hidden {HIDDEN}, 2 x {LENGTH} tokens, float32; {network}."
    where = machine("gloo", "both ranks share the cores")
    text = readme("Overlap: exposed communication", __doc__, size, "", *table(HEAD, rows), where=where, script="benchmarks/overlap/run.py")
    print(text)
    if options.write:
        write(HERE / "README.md", text)


if __name__ == "__main__":
    main()
