"""What runs of random programs add up to: `run.py --table a.jsonl b.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
STATUS = ("ok", "rounding", "wrong", "crash", "refused", "averaged", "nothing")

GROUPS: Mapping[str, Callable[[Row], bool]] = {
    "all": lambda row: True,
    "simulated ranks": lambda row: not row["processes"],
    "gloo processes": lambda row: bool(row["processes"]),
    "written line by line": lambda row: row["kind"] == "lines",
    "stacks of blocks": lambda row: row["kind"] != "lines",
    "tp": lambda row: "tp=" in row["mesh"],
    "cp": lambda row: "cp=" in row["mesh"],
    "ep": lambda row: "ep=" in row["mesh"],
    "pp": lambda row: "pp=" in row["mesh"],
    **{f"schedule {name}": lambda row, name=name: row["config"].get("schedule") == name for name in (
        "gpipe", "1f1b", "looped-bfs", "interleaved-1f1b", "zero-bubble", "zbv", "dualpipev")},
    **{f"data_parallel={name}": lambda row, name=name: row["config"].get("data_parallel") == name for name in (
        "replicate", "zero1", "zero2", "zero3")},
    "recompute": lambda row: "recompute" in row["config"],
    "microbatches without pp": lambda row: "microbatches" in row["config"] and "pp=" not in row["mesh"],
    "bf16": lambda row: row["dtype"] == "bf16",
    "mixed precision": lambda row: row["dtype"] == "mixed",
    "several steps": lambda row: row["steps"] > 1,
    "batches of several shapes": lambda row: len({tuple(s) for s in row["shapes"]}) > 1,
    "chunks of logits": lambda row: "logits_bytes" in row["config"],
    "overlap switched off": lambda row: any(name.startswith("overlap") for name in row["config"]),
    "passes that take what is small": lambda row: bool(row.get("eager")),
    **{f"... {what}": lambda row, name=name: any(name in p for p in row.get("passes", ())) for name, what in (
        ("again.", "computed again"), ("pieces.", "in pieces"),
        ("expert_pieces.", "experts in pieces"),
        ("token_pieces.", "tokens in pieces"), ("chunked_loss.", "loss in chunks"), ("products.", "sums hidden"))},
    "programs told by the code of others": lambda row: row.get("told", 0) > 0,
    "graphs made without a capture": lambda row: row.get("made", 0) > 0,
}  # fmt: skip


def table(paths: Sequence[Path]) -> str:
    """Programs x meshes x configurations by kind, and what became of them; what was run twice counts as it was last."""
    rows = {(row["seed"], row["processes"], row.get("at")): row for path in paths for row in map(json.loads, path.read_text().splitlines())}
    lines = [f"| | programs | {' | '.join(STATUS)} | proved | proof and numbers disagree |", "|---" * (len(STATUS) + 4) + "|"]
    for name, belongs in GROUPS.items():
        found = [row for row in rows.values() if belongs(row)]
        counts = [sum(row["status"] == status for row in found) for status in STATUS]
        proved, against = sum(row["static"] == "proved" for row in found), sum(row["contradicts"] for row in found)
        lines.append(f"| {name} | {len(found)} | {' | '.join(map(str, counts))} | {proved} | {against} |")
    return "\n".join(lines)
