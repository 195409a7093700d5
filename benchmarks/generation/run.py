"""What a generated token costs on one rank: `python benchmarks/generation/run.py --write`.

`pm.generate(...)` of a small transformers Llama on `mp.make_mesh("tp=1")`, greedy, with and without its cache of keys and values, against
`model.generate(...)` of the model itself, which has one: float32, one thread. In every round each generates once, first another one each
time. Tokens are compared before. Processor time of this process is what is compared (other work on the machine does not count).
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.measuring import Times, in_turn, least_and_middle, line, machine, readme, table, write  # noqa: E402
from benchmarks.overhead.run import Size as Model  # noqa: E402


@dataclass(frozen=True)
class Size:
    """One problem: a model, the length of its prompts, and how many tokens are generated."""

    name: str
    model: Model
    prompt: int
    new: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.model}; {self.model.batch} prompts of {self.prompt}, {self.new} new tokens each"


SIZES = (
    Size("small", Model("small", 4, 256, 1024, 2, 64, 0), 64, 32, 8),
    Size("middle", Model("middle", 4, 512, 4096, 4, 128, 0), 128, 128, 4),
)
MODEL, KEPT, WHOLE = "model", "with a cache", "without"


def measure(size: Size, mesh: DeviceMesh, rounds: int) -> Times:
    """Generations of the model, and of the parallel one in both ways."""
    model = size.model.model().eval()
    ids = torch.randint(3, size.model.vocab, (size.model.batch, size.prompt), generator=torch.Generator().manual_seed(2))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0  # type: ignore[union-attr]
    pm = mp.parallelize(model, mesh, example=size.model.data()).eval()
    asked = {"max_new_tokens": size.new, "do_sample": False}
    ways = {
        MODEL: lambda: model.generate(ids, **asked),  # type: ignore[operator]
        KEPT: lambda: pm.generate(ids, use_cache=True, **asked),
        WHOLE: lambda: pm.generate(ids, use_cache=False, **asked),
    }
    wanted = ways[MODEL]()
    for name in (KEPT, WHOLE):
        assert torch.equal(ways[name](), wanted), name
    return in_turn(ways, rounds, unmeasured=1)


HEAD = ("size", "model", "model, ms a token", "with a cache", ": model", "without", ": model")


def row(size: Size, times: Times) -> str:
    """One line of the table."""
    least, middle = least_and_middle(times, 1)
    each = {name: f"{least[name] / size.new:.2f} / {middle[name] / size.new:.2f}" for name in times}
    ratio = {name: f"{least[name] / least[MODEL]:.2f} / {middle[name] / middle[MODEL]:.2f}" for name in times}
    return line([size.name, str(size), each[MODEL], each[KEPT], ratio[KEPT], each[WHOLE], ratio[WHOLE]])


def report(rows: list[str]) -> str:
    """The README's text."""
    legend = "Milliseconds of the processor per new token of all prompts, the prompt's forward included, minimum / median; ratios of both."
    return readme("Generation", __doc__, legend, "", *table(HEAD, rows), where=machine(), script="benchmarks/generation/run.py")


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
