"""Step time of tensor parallelism, three ways: `python benchmarks/tensor_parallel/run.py --write`.

    meshpar              mp.parallelize(model, mesh), pm.train_step
    by hand              handwritten.py: the Megatron way, on local tensors
    parallelize_module   torch.distributed.tensor.parallel on the same module

A step is forward and backward of a few Llama-like blocks and a squared error, in float32, on local gloo ranks of one thread each. In every
round each contender takes one step, in turn, so that whatever else the machine does hits all alike; a step is timed between barriers, and
the slowest rank counts. Beside it stands the processor time of a rank, which waiting and other work on the machine do not
enter. Ratios are of the minima and of the medians over the rounds. Before any timing all three must give the gradients of the unparallel
model, in float64.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from handwritten import Handwritten, Model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard  # noqa: E402
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import meshpar as mp  # noqa: E402
from benchmarks.measuring import Times, in_turn, least_and_middle, line, machine, readme, table, write  # noqa: E402
from meshpar.proof import launch  # noqa: E402

MESHPAR, BY_HAND, MODULE = CONTENDERS = ("meshpar", "by hand", "parallelize_module")


@dataclass(frozen=True)
class Size:
    """One problem."""

    name: str
    layers: int
    hidden: int
    width: int
    batch: int
    length: int
    rounds: int
    head: int = 64

    def model(self) -> Model:
        torch.manual_seed(0)
        model = Model(self.layers, self.hidden, self.head, self.width)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        return model

    def data(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        x, target = torch.randn(2, self.batch, self.length, self.hidden, dtype=dtype)
        return x, target

    def __str__(self) -> str:
        return f"{self.name}: {self.layers} layers, hidden {self.hidden}, {self.batch} x {self.length} tokens"


SIZES = (
    Size("small", 4, 256, 768, 2, 64, 60),
    Size("medium", 2, 512, 1536, 2, 128, 40),
    Size("large", 2, 1024, 3072, 1, 256, 24),
)
TINY = Size("tiny", 2, 64, 128, 2, 16, 1, head=8)


@dataclass
class Contender:
    """A step, and the parameters it leaves gradients on."""

    module: nn.Module
    step: Callable[[], Tensor]
    gradients: Callable[[], dict[str, Tensor]]

    def clear(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None


def contenders(size: Size, mesh: DeviceMesh, sequence: bool, dtype: torch.dtype) -> dict[str, Contender]:
    """All three on equal weights and data. Gradients are whole, under the names of `Model`."""
    data = size.data(dtype)
    pm = mp.parallelize(size.model().to(dtype), mesh, example=data, config=mp.ParallelConfig(sequence_parallel=sequence))
    hand = Handwritten(size.model().to(dtype), sequence=sequence)
    module = by_module(size.model().to(dtype), mesh, sequence)

    def run(model: nn.Module) -> Callable[[], Tensor]:
        def step() -> Tensor:
            loss: Tensor = model(*data)
            loss.backward()
            return loss.detach()

        return step

    return {
        MESHPAR: Contender(pm, lambda: pm.train_step(*data), lambda: {n: mp.full_grad(p) for n, p in pm.named_parameters()}),
        BY_HAND: Contender(hand, run(hand), lambda: gathered(hand)),
        MODULE: Contender(module, run(module), lambda: {n: whole(p) for n, p in module.named_parameters()}),
    }


def by_module(model: Model, mesh: DeviceMesh, sequence: bool) -> nn.Module:
    """`parallelize_module` as its tutorial uses it."""
    plan: dict[str, ParallelStyle] = {}
    for i in range(len(model.layers)):
        at = f"layers.{i}"
        plan |= {f"{at}.attention.{n}": ColwiseParallel() for n in "qkv"} | {f"{at}.mlp.{n}": ColwiseParallel() for n in ("gate", "up")}
        out = Shard(1) if sequence else Replicate()
        plan |= {f"{at}.attention.o": RowwiseParallel(output_layouts=out), f"{at}.mlp.down": RowwiseParallel(output_layouts=out)}
        if sequence:
            plan |= {f"{at}.norm1": SequenceParallel(), f"{at}.norm2": SequenceParallel()}
            for name in ("attention", "mlp"):
                plan[f"{at}.{name}"] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    parallelize_module(model, mesh["tp"], plan)
    if sequence:
        first = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True)
        last = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
        parallelize_module(model.layers[0], mesh["tp"], first)
        parallelize_module(model.layers[-1], mesh["tp"], last)
    return model


def whole(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    assert grad is not None
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def gathered(hand: Handwritten) -> dict[str, Tensor]:
    """The gradients of the handwritten model, put together."""
    found = {}
    for i, gradients in enumerate(hand.gradients()):
        for name, grad in gradients.items():
            dim = 1 if name.rpartition(".")[0].endswith((".o", ".down")) else 0
            parts = [torch.empty_like(grad.contiguous()) for _ in range(hand.size)]
            dist.all_gather(parts, grad.contiguous())
            found[f"layers.{i}.{name}"] = grad if grad.dim() == 1 else torch.cat(parts, dim)
    return found


def check(mesh: DeviceMesh, sequence: bool) -> dict[str, float]:
    """The largest difference of any gradient from the unparallel model's, relative to the largest entry of that gradient."""
    model = TINY.model().double()
    model(*TINY.data(torch.float64)).backward()
    worst = {}
    for name, contender in contenders(TINY, mesh, sequence, torch.float64).items():
        contender.step()
        found = contender.gradients()
        worst[name] = max(
            ((found[n] - p.grad).abs().max() / p.grad.abs().max()).item() for n, p in model.named_parameters() if p.grad is not None
        )
        if worst[name] > 1e-9:
            raise SystemExit(f"{name}, sequence={sequence}: gradients differ by {worst[name]:.1e}")
    return worst


def measure(size: Size, mesh: DeviceMesh, sequence: bool, rounds: int) -> Times:
    """Every step of every contender."""
    running = contenders(size, mesh, sequence, torch.float32)
    steps = {name: contender.step for name, contender in running.items()}
    return in_turn(steps, rounds, before=lambda name: running[name].clear())


def profile(size: Size, mesh: DeviceMesh, sequence: bool, name: str, steps: int) -> str:
    """What Python spends on one contender's steps."""
    import cProfile
    import io
    import pstats

    contender = contenders(size, mesh, sequence, torch.float32)[name]
    contender.step()
    profiler = cProfile.Profile()
    for _ in range(steps):
        contender.clear()
        profiler.runcall(contender.step)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(40)
    return text.getvalue()


def worker(sizes: list[str], rounds: int | None, profiled: str | None) -> dict[tuple[str, bool], Times] | str:
    """What every rank runs."""
    warnings.simplefilter("ignore")
    mesh = mp.make_mesh(f"tp={dist.get_world_size()}")
    results: dict[tuple[str, bool], Times] = {}
    if profiled is not None:
        return profile(next(s for s in SIZES if s.name == sizes[0]), mesh, True, profiled, 20)
    for sequence in (False, True):
        worst = check(mesh, sequence)
        if dist.get_rank() == 0:
            print(f"  gradients, sequence parallel {sequence}:", {n: f"{w:.1e}" for n, w in worst.items()}, flush=True)
        for size in SIZES:
            if size.name in sizes:
                results[size.name, sequence] = times = measure(size, mesh, sequence, rounds or size.rounds)
                if dist.get_rank() == 0:
                    print("  " + row(dist.get_world_size(), size, sequence, times), flush=True)
    return results


def row(world: int, size: Size, sequence: bool, times: Times) -> str:
    """One line of the table."""
    cells = [str(world), size.name, "yes" if sequence else "no"]
    for kind in (0, 1):
        least, middle = least_and_middle(times, kind)
        cells += [f"{least[name]:.1f} / {middle[name]:.1f}" for name in CONTENDERS]
        cells += [f"{least[MESHPAR] / least[other]:.2f} / {middle[MESHPAR] / middle[other]:.2f}" for other in (BY_HAND, MODULE)]
    return line(cells)


_COLUMNS = (*CONTENDERS, "meshpar : by hand", "meshpar : parallelize_module")
HEAD = ("ranks", "size", "sequence parallel", *_COLUMNS, *(f"cpu: {name}" for name in _COLUMNS))


def report(rows: list[str], rounds: int | None) -> str:
    """The README's text."""
    sizes = [f"- {size}, {rounds or size.rounds} rounds" for size in SIZES]
    legend = "Milliseconds per step, minimum / median, wall time first, then processor time; ratios of minima / of medians."
    where = machine("gloo", "all ranks share the cores")
    script = "benchmarks/tensor_parallel/run.py"
    return readme("Tensor parallelism: step time", __doc__, *sizes, "", legend, "", *table(HEAD, rows), where=where, script=script)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sizes", nargs="+", default=[size.name for size in SIZES])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--profile", choices=CONTENDERS, help="print where Python spends its time instead (rank 0, first size)")
    parser.add_argument("--write", action="store_true", help="write the table to README.md beside this file")
    options = parser.parse_args()
    rows = []
    for world in options.worlds:
        print(f"{world} ranks", flush=True)
        found = launch.run(worker, options.sizes, options.rounds, options.profile, world=world)[0]
        if options.profile:
            print(found)
            continue
        rows += [
            row(world, size, sequence, found[size.name, sequence])
            for size in SIZES
            for sequence in (False, True)
            if size.name in options.sizes
        ]
    text = report(rows, options.rounds)
    print(text)
    if options.write:
        write(HERE / "README.md", text)


if __name__ == "__main__":
    main()
