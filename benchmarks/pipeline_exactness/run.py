"""Every model with every schedule over 2 and 4 ranks against one device: `python benchmarks/pipeline_exactness/run.py`.

In float64: loss, every gradient, gradient norm and the parameters after three AdamW steps with clipping; the largest relative difference of
each is printed. The suite (`tests/pipeline/test_parity.py`) runs a part of this.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor, nn

import meshpar as mp
from benchmarks.architectures import small
from benchmarks.pipeline_exactness.models import EncoderDecoder, UNet, images, pairs
from meshpar.errors import MeshparError, RankError
from meshpar.mesh import parse_mesh
from meshpar.proof import launch

Made = tuple[nn.Module, dict[str, Tensor]]


def language(task: str, kind: str, *, layers: int = 4, tied: bool = False) -> Made:
    """One of transformers' architectures, with a batch of eight samples."""
    depth = dict.fromkeys(("num_hidden_layers", "n_layer", "encoder_layers", "decoder_layers", "num_layers"), layers)
    model, batch = small.made(task, kind, tie_word_embeddings=tied, **depth)
    return model.train(), {name: torch.cat([x, x.roll(1, -1)]) for name, x in batch.items()}


MODELS: dict[str, Callable[[], Made]] = {
    "llama": lambda: language("causal", "llama"),
    "llama tied": lambda: language("causal", "llama", tied=True),
    "gpt2": lambda: language("causal", "gpt2", tied=True),
    "gemma2": lambda: language("causal", "gemma2", tied=True),
    "qwen3": lambda: language("causal", "qwen3"),
    "bart": lambda: language("seq2seq", "bart", layers=2, tied=True),
    "t5": lambda: language("seq2seq", "t5", layers=2),
    "encoder_decoder": lambda: (EncoderDecoder(), pairs()),
    "unet": lambda: (UNet(), images()),
    "mamba": lambda: language("causal", "mamba"),
}
SCHEDULES = {"gpipe": 1, "1f1b": 1, "looped-bfs": 2, "interleaved-1f1b": 2, "zero-bubble": 1, "zbv": 2, "dualpipev": 2}


def exact(name: str, mesh: str, schedules: Sequence[str], microbatches: int) -> int:
    """On a rank: print a line per schedule (the first rank does), and return how many are not exact."""
    warnings.simplefilter("ignore")
    failed = 0
    for schedule in schedules:
        torch.manual_seed(3)
        model, batch = MODELS[name]()
        start = time.monotonic()
        try:
            config = mp.ParallelConfig(microbatches=microbatches, schedule=schedule)
            report = mp.verify(model, mp.make_mesh(mesh), batch, config=config, steps=3)
            ok, text = report.ok, "  ".join(f"{d.quantity} {d.largest:.1e}" for d in report.differences)
        except MeshparError as error:
            ok, text = False, str(error)[-500:]
        failed += not ok
        if dist.get_rank() == 0:
            print(_line(ok, name, mesh, schedule, text, time.monotonic() - start), flush=True)
    return failed


def _line(ok: bool, name: str, mesh: str, schedule: str, text: str, seconds: float) -> str:
    return f"{'ok  ' if ok else 'FAIL'} {name:16} {mesh:8} {schedule:17} {seconds:5.1f} s  {text}"


def main() -> int:
    """Print a line per case; exit status 1 if one is not exact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--meshes", nargs="+", default=["pp=2", "pp=4"])
    parser.add_argument("--microbatches", type=int, default=8)
    options = parser.parse_args()
    failed = 0
    for name in options.models:
        for mesh in options.meshes:
            start, world = time.monotonic(), prod(parse_mesh(mesh).values())
            try:
                failed += launch.run(exact, name, mesh, options.schedules, options.microbatches, world=world, timeout=1800)[0]
            except RankError as error:
                failed += 1
                print(_line(False, name, mesh, "a rank failed", str(error)[-500:], time.monotonic() - start), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
