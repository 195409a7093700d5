"""How even pipeline stages are: `python benchmarks/split_balance/run.py --write`.

Every model is cut into 2, 4 and 8 stages by meshpar's cost and, for comparison, into equal numbers of layers (embedding on the first stage,
head and loss on the last, what remains of the division on the first ones). Imbalance is the most costly stage over the mean: an ideal
schedule takes that many times longer than with perfectly even stages. Estimated: from the FLOPs and bytes of every operator, forward and
backward, priced with this processor's own speeds. Measured: processor time of each stage's forward and backward on real data, one thread,
the least of several rounds; all stages are timed in turn in every round. `cut` is the largest number of bytes that crosses a cut.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.measuring import line, machine, readme, table, write  # noqa: E402
from meshpar.sharding.price import Price  # noqa: E402


class Uneven(nn.Module):
    """Residual layers of very different widths, as in models found by search or pruned."""

    def __init__(self, width: int, inner: Sequence[int], classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, i), nn.GELU(), nn.Linear(i, width)) for i in inner)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def language_model(name: str, layers: int, hidden: int, inner: int, vocab: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocab}
    config = AutoConfig.for_model(name, num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4, **sizes)
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


INNER = (1536, 256, 256, 512, 2048, 128, 128, 128, 1024, 256, 512, 1536, 128, 256, 3072, 512)


@dataclass(frozen=True)
class Case:
    """One model."""

    name: str
    make: Callable[[], nn.Module]
    layers: int
    vocab: int
    tokens: int
    what: str

    def batch(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        ids = torch.randint(self.vocab, (1, self.tokens))
        return {"input_ids": ids, "labels": ids}


CASES = (
    Case("llama", lambda: language_model("llama", 16, 256, 704, 4096), 16, 4096, 128, "16 layers, hidden 256, vocabulary 4096"),
    Case("gemma", lambda: language_model("gemma2", 16, 192, 768, 32768), 16, 32768, 128, "16 layers, hidden 192, vocabulary 32768"),
    Case("uneven", lambda: Uneven(256, INNER, 2048), 16, 2048, 128, "16 layers, hidden 256, inner widths 128 to 3072, vocabulary 2048"),
)


def this_processor() -> Price:
    """Measured: a matrix product of the size of a layer's, and a pointwise operator larger than the caches."""
    a, b, x = torch.randn(128, 512), torch.randn(512, 512), torch.randn(1 << 23)
    product = _least(lambda: a @ b, 50)
    added = _least(lambda: x + 1.0, 10)
    return Price(flops=2 * 128 * 512 * 512 / product, memory=2 * x.nbytes / added)


def _least(run: Callable[[], object], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def measured(stages: Sequence[mp.pipeline.Stage], batch: Mapping[str, Tensor], rounds: int) -> list[float]:
    """Seconds of each stage, forward and backward."""
    least = [float("inf")] * len(stages)
    for _ in range(rounds):
        handed: tuple[Tensor, ...] = ()
        for index, stage in enumerate(stages):
            given = [x.detach().requires_grad_(x.requires_grad) for x in handed]
            start = time.process_time()
            out = stage(*given, **batch)
            values = out if isinstance(out, tuple) else (out,)
            flowing = [x for x in values if x.requires_grad]
            torch.autograd.backward(flowing, [torch.ones_like(x) for x in flowing])
            least[index] = min(least[index], time.process_time() - start)
            handed = values
        for stage in stages:
            stage.zero_grad()
    return least


def by_count(layers: int, stages: int) -> list[int]:
    """Equal numbers of layers."""
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


def row(case: Case, count: int, price: Price, rounds: int) -> str:
    """One line of the table."""
    cells = [case.name, str(count)]
    for where in (by_count(case.layers, count), None):
        model, batch = case.make().train(), case.batch()
        stages = mp.pipeline.split(model, batch, count, where=where, price=price)
        staging = stages[0].staging
        seconds = measured(stages, batch, rounds)
        cells += [f"{staging.imbalance:.3f}", f"{max(seconds) * count / sum(seconds):.3f}", f"{max(staging.crossing) // 1024} KiB"]
    cells.append(staging.why.removeprefix("balanced by cost "))
    return line(cells)


HEAD = (
    *("model", "stages", "by count: estimated", "measured", "cut"),
    *("by cost: estimated", "measured", "cut", "kind of cut"),
)


def report(rows: Sequence[str], price: Price) -> str:
    """The README's text."""
    speeds = f"{price.flops / 1e9:.1f} GFLOP/s in matrix products and {price.memory / 1e9:.1f} GB/s in pointwise operators, as measured"
    cases = [f"- {case.name}: {case.what}, {case.tokens} tokens" for case in CASES]
    where, script = f"{machine()}; {speeds}", "benchmarks/split_balance/run.py"
    return readme("How even pipeline stages are", __doc__, *table(HEAD, rows), "", *cases, where=where, script=script)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="write the table to README.md beside this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    price = this_processor()
    rows = []
    for case in CASES:
        for count in options.stages if case.name in options.models else ():
            rows.append(row(case, count, price, options.rounds))
            print(rows[-1], flush=True)
    text = report(rows, price)
    print(text)
    if options.write:
        write(HERE / "README.md", text)


if __name__ == "__main__":
    main()
