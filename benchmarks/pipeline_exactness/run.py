"""Every model with every schedule over 2 and 4 ranks against one device: `python benchmarks/pipeline_exactness/run.py`.

In float64: loss, every gradient, gradient norm and the parameters after three AdamW steps with clipping; the largest relative difference of
each is printed. The suite (`tests/test_pipeline_parity.py`) runs a part of this.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import meshpar as mp
from meshpar.errors import MeshparError
from meshpar.mesh import parse_mesh
from tests.pool import Pool, WorkerError, WorkerTimeout
from tests.test_pipeline_parity import model_and_batch

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gemma2": ("gemma2", {}),
    "qwen3": ("qwen3", {}),
    "bart": ("bart", {}),
    "t5": ("t5", {}),
    "encoder_decoder": ("encoder_decoder", {}),
    "unet": ("unet", {}),
    "mamba": ("mamba", {}),
}
SCHEDULES = {"gpipe": 1, "1f1b": 1, "looped-bfs": 2, "interleaved-1f1b": 2, "zero-bubble": 1, "zbv": 2, "dualpipev": 2}


def exact(name: str, mesh: str, fields: dict[str, Any]) -> tuple[bool, list[tuple[str, float]]]:
    """On a rank: whether all is within the tolerance, and the largest differences."""
    warnings.simplefilter("ignore")
    kind, changes = MODELS[name]
    model, batch = model_and_batch(kind, changes)
    report = mp.verify(model, mp.make_mesh(mesh), batch, config=mp.ParallelConfig(**fields), steps=3)
    return report.ok, [(d.quantity, d.largest) for d in report.differences]


def main() -> int:
    """Print a line per case; exit status 1 if one is not exact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--meshes", nargs="+", default=["pp=2", "pp=4"])
    parser.add_argument("--microbatches", type=int, default=8)
    options = parser.parse_args()
    worlds = [prod(parse_mesh(mesh).values()) for mesh in options.meshes]
    pool, failed = Pool(max(worlds)), 0
    for name in options.models:
        for mesh, world in zip(options.meshes, worlds, strict=True):
            for schedule in options.schedules:
                start = time.monotonic()
                try:
                    fields = {"microbatches": options.microbatches, "schedule": schedule}
                    ok, found = pool.run(exact, name, mesh, fields, world=world, timeout=300)[0]
                    text = "  ".join(f"{quantity} {value:.1e}" for quantity, value in found)
                except (MeshparError, WorkerError, WorkerTimeout) as error:
                    ok, text = False, str(error)[-500:]
                failed += not ok
                took = time.monotonic() - start
                print(f"{'ok  ' if ok else 'FAIL'} {name:16} {mesh:8} {schedule:17} {took:5.1f} s  {text}", flush=True)
    pool.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
