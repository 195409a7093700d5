"""What compiling blocks costs and gains: `python benchmarks/compile/run.py --write`.

`mp.parallelize(model, mp.make_mesh("tp=1"))` of a small transformers Llama, as it is and with `ParallelConfig(compile=True)`: forward and
backward, float32, one thread. The first step of the compiled one holds the compilation, of one block for all layers. Then in every round
both take one step, in turn, first one, then the other first.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.measuring import in_turn, least_and_middle, line, machine, readme, table, write  # noqa: E402
from benchmarks.overhead.run import SIZES, Size  # noqa: E402

PLAIN, COMPILED = "as it is", "compiled"


def measure(size: Size, mesh: DeviceMesh, rounds: int, recompute: str) -> str:
    """One line of the table."""
    model, data = size.model(), size.data()
    config = {name: mp.ParallelConfig(compile=name == COMPILED, recompute=recompute) for name in (PLAIN, COMPILED)}
    pms = {name: mp.parallelize(model, mesh, example=data, config=one) for name, one in config.items()}
    first = {}
    for name, pm in pms.items():
        start = time.perf_counter()
        pm.train_step(**data)
        first[name] = time.perf_counter() - start
    _compare(pms)

    def clear(name: str) -> None:
        pms[name].zero_grad()

    gc.collect()
    gc.disable()
    try:
        times = in_turn({name: lambda pm=pm: pm.train_step(**data) for name, pm in pms.items()}, rounds, before=clear, unmeasured=2)
    finally:
        gc.enable()
    cells = [size.name, str(size), recompute, f"{first[COMPILED] - first[PLAIN]:.1f} s"]
    for kind in (1, 0):
        least, middle = least_and_middle(times, kind)
        cells += [f"{least[name]:.1f} / {middle[name]:.1f}" for name in (PLAIN, COMPILED)]
        cells.append(f"{least[COMPILED] / least[PLAIN]:.3f} / {middle[COMPILED] / middle[PLAIN]:.3f}")
    return line(cells)


def _compare(pms: dict[str, mp.ParallelModel]) -> None:
    plain, ours = ({name: mp.full_grad(p) for name, p in pms[which].named_parameters()} for which in (PLAIN, COMPILED))
    for name, grad in plain.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


HEAD = ("size", "model", "recompute", "first step, more", "cpu", "compiled cpu", "compiled : as it is")
HEAD += ("wall", "compiled wall", "compiled : as it is")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["small", "middle"])
    parser.add_argument("--recompute", nargs="+", default=["none", "full"])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--write", action="store_true", help="write the table to README.md beside this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    mesh = mp.make_mesh("tp=1")
    chosen = [size for size in SIZES if size.name in options.sizes]
    rows = [measure(size, mesh, options.rounds or size.rounds, kind) for size in chosen for kind in options.recompute]
    legend = "Milliseconds per step, minimum / median; ratios of minima / of medians. The first step: by how many seconds it is longer."
    text = readme("Compiled blocks", __doc__, legend, "", *table(HEAD, rows), where=machine(), script="benchmarks/compile/run.py")
    print(text)
    if options.write:
        write(HERE / "README.md", text)


if __name__ == "__main__":
    main()
