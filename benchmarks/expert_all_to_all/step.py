"""Step time of a small mixture of experts over `ep`, against the same model in one process: `python benchmarks/expert_all_to_all/step.py`.

    one process   the model in eager mode on the whole batch
    ep=N          the same batch over N ranks: experts divided among them, everything else data parallel (zero2)

Forward and backward, float32, one thread per rank. In every round each contender takes one step, in turn; the slowest rank counts. Before
any timing the loss must be that of the eager model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import meshpar as mp  # noqa: E402
from meshpar.proof import launch  # noqa: E402

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
}


def model(experts: str = "eager") -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES), experts_implementation=experts)
    return made.train()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, SIZES["vocab_size"], (8, 128))
    return {"input_ids": ids, "labels": ids}


def worker(rounds: int) -> dict[str, list[float]]:
    """On every rank: seconds of each round's steps."""
    warnings.filterwarnings("ignore")
    world = dist.get_world_size()
    mesh = mp.make_mesh({"ep": world})
    own = mp.local_batch(batch(), mesh)
    pm = mp.parallelize(model(), mesh, example=own, config=mp.ParallelConfig(data_parallel="zero2"))
    eager = model()
    whole = batch()
    steps: dict[str, Callable[[], float]] = {f"ep={world}": lambda: pm.train_step(**own).item()}
    if dist.get_rank() == 0:
        steps["one process"] = lambda: _step(eager, whole)
        assert abs(_step(eager, whole) - steps_loss(pm, own)) < 1e-4
    else:
        steps_loss(pm, own)
    found: dict[str, list[float]] = {f"ep={world}": [], "one process": []}
    for _ in range(rounds):
        for name in found:
            dist.barrier()
            start = time.perf_counter()
            if name in steps:
                steps[name]()
            dist.barrier()
            found[name].append(time.perf_counter() - start)
            for parameter in (*pm.parameters(), *eager.parameters()):
                parameter.grad = None
    return found


def steps_loss(pm: mp.ParallelModel, own: dict[str, Tensor]) -> float:
    """The loss of one parallel step."""
    return float(pm.train_step(**own).item())


def _step(eager: nn.Module, whole: dict[str, Tensor]) -> float:
    loss = eager(**whole).loss
    loss.backward()
    return float(loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    print("| ranks | one process, ms | over ep, ms | over ep : one process |\n|---|---|---|---|")
    for world in options.worlds:
        found = launch.run(worker, options.rounds, world=world)[0]
        one, many = (sorted(found[name])[: options.rounds] for name in ("one process", f"ep={world}"))
        middle = statistics.median(one), statistics.median(many)
        print(
            f"| {world} | {1e3 * one[0]:.0f} / {1e3 * middle[0]:.0f} | {1e3 * many[0]:.0f} / {1e3 * middle[1]:.0f} | "
            f"{many[0] / one[0]:.2f} / {middle[1] / middle[0]:.2f} |"
        )


if __name__ == "__main__":
    main()
