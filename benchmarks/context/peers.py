"""What torch's own context parallelism computes on CPUs: `python benchmarks/context/peers.py --write`.

`torch.distributed.tensor.experimental.context_parallel` with 2 gloo ranks, as its tutorial uses it: ids, labels (shifted before), positions
and, where there are any, masks are buffers that it cuts; every rank takes the sum of its part of the loss over the count of all labels, and
gradients are summed. Tiny models of transformers in float64, against the same model on one device: the largest relative difference of the
loss, and of any gradient. "refuses" is an error, with its first words. Beside it the same by `mp.verify` on cp=2.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.architectures import small  # noqa: E402
from benchmarks.measuring import line, machine, readme, table, write  # noqa: E402
from meshpar.errors import RankError  # noqa: E402
from meshpar.proof import launch  # noqa: E402

CASES = ("llama", "llama, padding", "llama, packed", "gemma2", "gpt_oss", "bloom", "mamba")
S = 16


def made(case: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and a batch; of two documents in one sequence, or with padding at the end."""
    torch.manual_seed(0)
    model, _ = small.made("causal", case.split(",")[0])
    torch.manual_seed(1)
    ids = torch.randint(3, 90, (2, S))
    given = {"input_ids": ids, "labels": ids.clone()}
    if case.endswith("padding"):
        given["attention_mask"] = (torch.arange(S) < torch.tensor([[S - 3], [S]])).long()
        given["labels"] = given["labels"].masked_fill(given["attention_mask"] == 0, -100)
    if case.endswith("packed"):
        given["position_ids"] = torch.cat([torch.arange(7), torch.arange(S - 7)]).repeat(2, 1)
        given["labels"][:, 7] = -100
    return model.double().train(), given


def by_torch(case: str, note: Path) -> str:
    """The largest difference, or why there is no result. An error is noted: the other rank may then wait for ever."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    warnings.simplefilter("ignore")
    model, given = made(case)
    right = model(**given).loss
    right.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    labels = F.pad(given.pop("labels"), (0, 1), value=-100)[:, 1:].contiguous()
    count = (labels != -100).sum()
    given.setdefault("position_ids", torch.arange(S).repeat(2, 1))
    buffers = [*given.values(), labels]
    try:
        with context_parallel(init_device_mesh("cpu", (2,)), buffers=buffers, buffer_seq_dims=[1] * len(buffers)):
            logits = model(**given).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
            loss.backward()
    except Exception as error:
        why = f"refuses: {type(error).__name__}: {str(error).splitlines()[0][:110] if str(error) else ''}"
        if not note.exists():
            note.write_text(why)
        return note.read_text()
    total = loss.detach().clone()
    dist.all_reduce(total)
    worst = 0.0
    for name, p in model.named_parameters():
        if name in wanted:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(grad)
            worst = max(worst, float((grad - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-30)))
    return _said(float((total - right).abs() / right.abs()), worst)


def by_meshpar(case: str) -> str:
    """The same."""
    model, given = made(case)
    report = mp.verify(model, "cp=2", given)
    of: dict[str, Any] = {d.quantity: d.largest for d in report.differences}
    return _said(of["loss"], of["gradients"])


def _said(loss: float, gradients: float) -> str:
    return f"{'exact' if max(loss, gradients) < 1e-9 else 'WRONG'} (loss {loss:.0e}, gradients {gradients:.0e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one case of torch's")
    parser.add_argument("--write", action="store_true", help="write the table to PEERS.md beside this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            note = Path(folder) / "note"
            try:
                theirs = launch.run(by_torch, case, note, world=2, timeout=options.timeout)[0]
            except RankError as error:
                theirs = note.read_text() if note.exists() else f"no result: {str(error).splitlines()[0]}"
        rows.append(line([case, theirs, by_meshpar(case)]))
        print(rows[-1], flush=True)
    body = table(("model", "torch context_parallel", "meshpar cp=2"), rows)
    where = machine(f"transformers {transformers.__version__}", "gloo")
    text = readme("torch's context_parallel on CPUs", __doc__, *body, where=where, script="benchmarks/context/peers.py")
    print(text)
    if options.write:
        write(HERE / "PEERS.md", text)


if __name__ == "__main__":
    main()
