"""Are real ranks that order sets of strings differently exact? `python benchmarks/hash_seeds/ranks.py --cases causal:gemma3_text`.

Four gloo ranks with hash seeds of their own (PYTHONHASHSEED=0..3), dp=2,tp=2: loss and all gradients against the single device, in float64.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CASES = ("causal:gemma3_text", "masked:modernbert")


def rank(cases: list[str], mesh: str) -> None:
    """What one rank does; the first one prints."""
    import torch

    import meshpar as mp
    from benchmarks.architectures import small

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    device_mesh = mp.make_mesh(mesh, "cpu")
    for case in cases:
        torch.manual_seed(0)
        model, batch = small.made(*case.split(":"))
        report = mp.verify(model, device_mesh, batch)
        if os.environ["RANK"] == "0":
            print(f"{case}: {'exact' if report.ok else 'WRONG'}\n{report}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="task:kind")
    parser.add_argument("--mesh", default="dp=2,tp=2")
    options = parser.parse_args()
    if "RANK" in os.environ:
        return rank(options.cases, options.mesh)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**common, "RANK": str(i), "LOCAL_RANK": str(i), "PYTHONHASHSEED": str(i)})
        for i in range(4)
    ]
    sys.exit(max(abs(process.wait()) for process in ranks))


if __name__ == "__main__":
    main()
