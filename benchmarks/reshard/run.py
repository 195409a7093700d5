"""Resharding against `cp` and against torch's own tools, interleaved: `python benchmarks/reshard/run.py --sizes 0.2 1 4`.

Every contender turns the same sharded checkpoint into whole tensors (a Hugging Face folder; DCP: its own format), from warm page cache, and
ends with its output on the disk (fsync); another one begins every round. `cp` copies the shards as they are. Times are medians over the
rounds, of the wall clock and of the processor (user and system, children too); imports are not counted. On a machine that others use,
compare processor times.
Memory is measured in a process of its own: the peak resident size, less that of the same process after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from meshpar.checkpoint.convert.dcp import to_dcp  # noqa: E402
from meshpar.checkpoint.convert.hf import to_hf  # noqa: E402
from meshpar.checkpoint.format.boxes import Cut  # noqa: E402
from meshpar.checkpoint.format.division import Division, Grid, Layout  # noqa: E402
from meshpar.checkpoint.format.files import Disk  # noqa: E402
from meshpar.checkpoint.format.partial import writing  # noqa: E402
from meshpar.checkpoint.move.transfer import Options  # noqa: E402
from meshpar.checkpoint.online.writer import Local, finish, merge, write_rank  # noqa: E402
from meshpar.sharding.types import plain  # noqa: E402

SHARDS = 4


@dataclass(frozen=True)
class Case:
    """What the tensors are, and which mesh axis cuts which dim."""

    name: str
    mesh: str
    cuts: tuple[tuple[str, int], ...]
    tensors: Callable[[int], dict[str, tuple[int, ...]]]
    unstack: bool = False


def matrices(nbytes: int) -> dict[str, tuple[int, ...]]:
    count = 12
    side = int((nbytes / 2 / count) ** 0.5) // 16 * 16
    return {f"layers.{k}.weight": (side, side) for k in range(count)}


def many(nbytes: int) -> dict[str, tuple[int, ...]]:
    return {f"layers.{k}.weight": (64, max(nbytes // 2 // 20_000 // 64, 1)) for k in range(20_000)}


def experts(nbytes: int) -> dict[str, tuple[int, ...]]:
    side = int((nbytes / 2 / 4 / 16) ** 0.5) // 16 * 16
    return {f"layers.{k}.experts.up": (16, side, side) for k in range(4)}


CASES = (
    Case("rows", "tp=4", (("tp", 0),), matrices),
    Case("columns", "tp=4", (("tp", 1),), matrices),
    Case("2-D", "dp=2,tp=2", (("tp", 1), ("dp", 0)), matrices),
    Case("20,000 small", "tp=4", (("tp", 0),), many),
    Case("experts", "ep=4", (("ep", 0),), experts, unstack=True),
)


def filled(noise: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """An array of a size, repeating the noise as often as it takes."""
    count = int(np.prod(size))
    return (noise[:count] if count <= noise.size else np.resize(noise, count)).reshape(size)


def make(root: Path, case: Case, nbytes: int) -> int:
    """Write the source; returns the bytes of its tensors."""
    grid, shapes = Grid.parse(case.mesh), case.tensors(nbytes)
    layouts = {n: Layout(tuple(Cut(axis, plain(dim, shape[dim])) for axis, dim in case.cuts)) for n, shape in shapes.items()}
    division, noise = Division(grid, layouts), np.random.default_rng(0).integers(0, 1 << 16, 1 << 22, "u2")
    held: list[list[Local]] = [[] for _ in range(grid.size)]
    for name, shape in shapes.items():
        for rank, runs in division.holders(name, shape):
            size = tuple(sum(b - a for a, b in row) for row in runs)
            held[rank].append(Local(name, "BF16", shape, runs, lambda size=size: filled(noise, size), "model", layouts[name]))
    with writing(root, "", Disk()) as partial:
        finish(partial, merge([write_rank(partial.path, r, rows, {}, partial.disk) for r, rows in enumerate(held)], grid))
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


def sync(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


def ours(case: Case, checksums: bool, workers: int) -> Callable[[Path, Path], None]:
    def run(source: Path, target: Path) -> None:
        options = Options(workers=workers, verify=checksums, checksums=checksums)
        report = to_hf(source / "ours", target, unstack=case.unstack, options=options)
        assert report.bytes_read <= 1.02 * report.nbytes and report.bytes_written <= 1.02 * report.nbytes

    return run


def cp(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source / "ours", target], check=True)
    sync(target)


def consolidate(source: Path, target: Path) -> None:
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    target.mkdir()
    names = json.loads((source / "ours" / "manifest.json").read_text())["names"]
    consolidate_safetensors_files(str(source / "ours"), str(target), dict.fromkeys(names, 1), num_threads=1)
    sync(target)


def dcp(source: Path, target: Path) -> None:
    import torch
    import torch.distributed.checkpoint as checkpoint

    meta = checkpoint.FileSystemReader(source / "dcp").read_metadata()
    state = {n: torch.empty(t.size, dtype=t.properties.dtype) for n, t in meta.state_dict_metadata.items()}
    checkpoint.load(state, checkpoint_id=source / "dcp", no_dist=True)
    checkpoint.save(state, checkpoint_id=target, no_dist=True)
    sync(target)


def processor() -> float:
    """Seconds of the processor so far, children too; `os.times` counts in steps of 10 ms."""
    rows = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(row.ru_utime + row.ru_stime for row in rows)


def bench(size: float, rounds: int, workers: int, root: Path, only: list[str], against: list[str]) -> list[dict[str, object]]:
    rows = []
    for case in CASES:
        if only and case.name not in only:
            continue
        source = root / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        nbytes = make(source / "ours", case, int(size * 1e9))
        if "DCP" in against:
            to_dcp(source / "ours", source / "dcp")
        contenders: dict[str, Callable[[Path, Path], None]] = {
            "cp": cp,
            "ours, no checksums": ours(case, False, workers),
            "ours": ours(case, True, workers),
            **{name: act for name, act in (("consolidate", consolidate), ("DCP", dcp)) if name in against},
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        cpu: dict[str, list[float]] = {name: [] for name in contenders}
        names = list(contenders)
        for turn in range(rounds):
            first = turn % len(names)  # whoever comes after another finds the page cache as that one left it
            for name in names[first:] + names[:first]:
                target = root / "target"
                os.sync()
                began, used = time.perf_counter(), processor()
                contenders[name](source, target)
                times[name].append(time.perf_counter() - began)
                cpu[name].append(processor() - used)
                shutil.rmtree(target)
        row: dict[str, object] = {"case": case.name, "GB": round(nbytes / 1e9, 3)}
        row["seconds"] = {name: statistics.median(values) for name, values in times.items()}
        row["cpu"] = {name: statistics.median(values) for name, values in cpu.items()}
        row["peak MiB over base"] = memory(source / "ours", root / "target", case.unstack, workers)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def memory(source: Path, target: Path, unstack: bool, workers: int) -> float:
    code = (
        "import sys;sys.path.insert(0,sys.argv[1])\n"
        "from meshpar.checkpoint.convert.hf import to_hf\nfrom meshpar.checkpoint.move.transfer import Options\n"
        "def status(key): return int(next(r for r in open('/proc/self/status') if r.startswith(key)).split()[1])\n"
        "open('/proc/self/clear_refs','w').write('5')\n"  # the peak counts from here
        "base=status('VmRSS')\n"
        "to_hf(sys.argv[2],sys.argv[3],unstack=sys.argv[4]=='1',options=Options(workers=int(sys.argv[5])))\n"
        "print((status('VmHWM')-base)/1024)"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(source), str(target), str(int(unstack)), str(workers)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shutil.rmtree(target)
    return round(float(out), 1)


def table(rows: list[dict[str, object]]) -> str:
    names = ["cp", "ours, no checksums", "ours", *(n for n in ("consolidate", "DCP") if n in rows[0]["cpu"])]  # type: ignore[operator]
    lines = ["| case | GB | " + " | ".join(names) + " | peak over base |", "|---|---|" + "---|" * (len(names) + 1)]
    for row in rows:
        seconds, cpu = row["seconds"], row["cpu"]
        cells = []
        for n in names:
            wall, busy = seconds[n] / seconds["cp"], cpu[n] / cpu["cp"]  # type: ignore[index]
            cells.append(f"{seconds[n]:.2f} s, {cpu[n]:.2f} cpu" + ("" if n == "cp" else f" ({wall:.1f}x, {busy:.1f}x)"))  # type: ignore[index]
        lines.append(f"| {row['case']} | {row['GB']} | " + " | ".join(cells) + f" | {row['peak MiB over base']} MiB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.2], help="gigabytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=None, help="where to write; a disk, not a RAM disk")
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument(
        "--against", nargs="*", default=["consolidate", "DCP"], help="torch's tools to compare with; DCP is slow for small tensors"
    )
    args = parser.parse_args()
    import torch.distributed.checkpoint._consolidate_hf_safetensors  # noqa: F401  before any clock runs

    with tempfile.TemporaryDirectory(dir=args.dir) as root:
        rows = [row for size in args.sizes for row in bench(size, args.rounds, args.workers, Path(root), args.cases, args.against)]
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}")
    sizes = " ".join(map(str, args.sizes))
    print(f"command: python benchmarks/reshard/run.py --sizes {sizes} --rounds {args.rounds} --workers {args.workers}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
