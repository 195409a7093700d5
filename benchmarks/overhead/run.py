"""What a lowered graph costs on one rank: `python benchmarks/overhead/run.py --write`.

`mp.parallelize(model, mp.make_mesh("tp=1"))` against the model itself in eager mode: forward and backward of a small transformers Llama
with its loss, float32, one thread. In every round both take one step, in turn, first one, then the other first. Processor time of this
process is what is compared (it has one thread, and other work on the machine does not count); wall time is shown beside it.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.measuring import Times, in_turn, least_and_middle, line, machine, readme, table, write  # noqa: E402


@dataclass(frozen=True)
class Size:
    """One problem."""

    name: str
    layers: int
    hidden: int
    vocab: int
    batch: int
    length: int
    rounds: int

    def model(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama",
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=max(1, self.hidden // 128),
            vocab_size=self.vocab,
        )
        model: nn.Module = AutoModelForCausalLM.from_config(config).train()
        return model

    def data(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        ids = torch.randint(self.vocab, (self.batch, self.length))
        return {"input_ids": ids, "labels": ids}

    def __str__(self) -> str:
        return f"{self.layers} layers, hidden {self.hidden}, vocabulary {self.vocab}, {self.batch} x {self.length} tokens"


SIZES = (
    Size("small", 4, 256, 1024, 2, 64, 60),
    Size("middle", 4, 512, 4096, 2, 128, 30),
    Size("large", 2, 1024, 8192, 2, 128, 16),
)


EAGER, LOWERED = "eager", "lowered"


def measure(size: Size, mesh: DeviceMesh, rounds: int) -> Times:
    """Steps of the model in eager mode and of the lowered one."""
    model, data = size.model(), size.data()
    pm = mp.parallelize(model, mesh, example=data)
    _compare(model, pm, data)
    modules: dict[str, nn.Module] = {EAGER: model, LOWERED: pm}

    def clear(name: str) -> None:
        for parameter in modules[name].parameters():
            parameter.grad = None

    gc.collect()
    gc.disable()
    try:
        steps = {EAGER: lambda: model(**data).loss.backward(), LOWERED: lambda: pm.train_step(**data)}
        return in_turn(steps, rounds, before=clear, unmeasured=2)
    finally:
        gc.enable()


def _compare(model: nn.Module, pm: mp.ParallelModel, data: dict[str, Tensor]) -> None:
    loss = model(**data).loss
    loss.backward()
    torch.testing.assert_close(pm.train_step(**data), loss.detach())
    grads = {name: mp.full_grad(p) for name, p in pm.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def row(size: Size, times: Times) -> str:
    """One line of the table."""
    cells = [size.name, str(size)]
    for kind in (1, 0):
        least, middle = least_and_middle(times, kind)
        cells += [f"{least[name]:.1f} / {middle[name]:.1f}" for name in (EAGER, LOWERED)]
        cells.append(f"{least[LOWERED] / least[EAGER]:.3f} / {middle[LOWERED] / middle[EAGER]:.3f}")
    return line(cells)


HEAD = ("size", "model", "eager cpu", "lowered cpu", "lowered : eager", "eager wall", "lowered wall", "lowered : eager")


def report(rows: list[str]) -> str:
    """The README's text."""
    legend = "Milliseconds per step, minimum / median; ratios of minima / of medians."
    title, script = "Overhead of the lowered graph on one rank", "benchmarks/overhead/run.py"
    return readme(title, __doc__, legend, "", *table(HEAD, rows), where=machine(), script=script)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=[size.name for size in SIZES])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--write", action="store_true", help="write the table to README.md beside this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    mesh = mp.make_mesh("tp=1")
    rows = []
    for size in SIZES:
        if size.name in options.sizes:
            rows.append(row(size, measure(size, mesh, options.rounds or size.rounds)))
            print(rows[-1], flush=True)
    text = report(rows)
    print(text)
    if options.write:
        write(HERE / "README.md", text)


if __name__ == "__main__":
    main()
