"""The published runs as jobs and mappings of the planner: what a row says, what its source says elsewhere, and what is assumed."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from collections.abc import Mapping as Map
from dataclasses import dataclass, replace
from pathlib import Path

from meshpar.planner.constants import Constants
from meshpar.planner.cost import StepTime, step_time
from meshpar.planner.flops import flops_per_token
from meshpar.planner.hardware import Cluster, GiB
from meshpar.planner.layers import assemble
from meshpar.planner.mapping import RECOMPUTE, Job, Mapping, complaints
from meshpar.planner.memory import fullest, memory
from meshpar.planner.stack import STACKS, Stack
from meshpar.planner.transformer import Latent, Transformer
from meshpar.planner.workload import Workload

HERE = Path(__file__).resolve().parent
CSV = HERE / "published_runs.csv"


def _gpt(layers: int, hidden: int, heads: int, vocab: int = 51200, positions: int = 2048) -> Transformer:
    return Transformer(layers, hidden, heads, 4 * hidden, vocab, gated=False, tied=True, positions=positions)


def _llama(layers: int, hidden: int, heads: int, kv: int, ffn: int, vocab: int, tied: bool = False) -> Transformer:
    return Transformer(layers, hidden, heads, ffn, vocab, kv_heads=kv, tied=tied)


def _moe(
    layers: int, hidden: int, heads: int, kv: int, head: int, vocab: int, experts: int, top: int, width: int, window: int | None = None
) -> Transformer:
    return Transformer(
        *(layers, hidden, heads, width * top, vocab),
        kv_heads=kv,
        head_dim=head,
        experts=experts,
        top_k=top,
        expert_ffn=width,
        window=window,
    )


MODELS: Map[str, Transformer] = {
    "Llama3.1-8B": _llama(32, 4096, 32, 8, 14336, 128256),
    "Llama3.1-70B": _llama(80, 8192, 64, 8, 28672, 128256),
    "LLAMA3.1_405B": _llama(126, 16384, 128, 8, 53248, 128256),
    "LLAMA2-7B": _llama(32, 4096, 32, 32, 11008, 32000),
    "LLAMA2-13B": _llama(40, 5120, 40, 40, 13824, 32000),
    "LLAMA2-70B": _llama(80, 8192, 64, 8, 28672, 32000),
    "GPT3-5B": _gpt(24, 4096, 32),
    "GPT3-20B": _gpt(44, 6144, 48),
    "GPT3-175B": _gpt(96, 12288, 96),
    "Nemotron-8B": Transformer(32, 4096, 32, 16384, 256000, gated=False),
    "Nemotron-22B": Transformer(40, 6144, 48, 24576, 256000, gated=False),
    "Nemotron-340B": Transformer(96, 18432, 96, 73728, 256000, kv_heads=8, gated=False),
    "Llama-like 1.34B": _llama(16, 2048, 16, 16, 8192, 131072, tied=True),
    "Llama-like 8.86B": _llama(32, 4096, 32, 32, 14336, 131072),
    "Mixtral-8x22B": _moe(56, 6144, 48, 8, 128, 32768, 8, 2, 16384),
    "Mixtral-8x22B-G8T8": _moe(56, 6144, 48, 8, 128, 32768, 64, 8, 2048),
    "Qwen3_30B_a3B": _moe(48, 2048, 32, 4, 128, 151936, 128, 8, 768),
    "Qwen3_235B_a22B": _moe(94, 4096, 64, 4, 128, 151936, 128, 8, 1536),
    "GPT OSS 120B": _moe(36, 2880, 64, 8, 64, 201088, 128, 4, 2880, window=128),
    "DeepSeekV3": Transformer(
        *(61, 7168, 128, 18432, 129280),
        experts=256,
        top_k=8,
        expert_ffn=2048,
        shared_ffn=2048,
        dense_layers=3,
        latent=Latent(1536, 512, 128, 64, 128),
        predicts=1,
    ),
}
"""Dimensions from the models' own configurations; those of the heatmap from its repository. Model in the data -> dimensions."""
SAME = {"LLAMA3_8B": "Llama3.1-8B", "LLAMA3-8B": "Llama3.1-8B", "LLAMA3_70B": "Llama3.1-70B", "LLAMA3-70B": "Llama3.1-70B"}

HARDWARE = (
    ("GB300", "gb300"),
    ("GB200", "gb200"),
    ("DGX-B200", "b200"),
    ("EFA", "h100-efa"),
    ("500W", "h100-500w"),
    ("H100", "h100"),
    ("A100", "a100"),
    ("V100", "v100"),
)
"""Part of the data's text -> accelerator; the first that fits."""

SOURCES: Map[str, tuple[str, str]] = {
    "arXiv:2104.04473": ("megatron-2021", "with-recompute"),
    "NVIDIA dgxc": ("nemo-2025", "noncausal"),
    "NVIDIA Megatron-Bridge perf summary 26.08": ("nemo-2026", "causal"),
    "NVIDIA Megatron-Bridge perf summary 25.09": ("nemo-2025", "causal"),
    "arXiv:2504.14960": ("megatron-2024", "causal"),
    "torchtitan": ("torchtitan", "noncausal"),
    "HF Ultra-Scale": ("nanotron", "noncausal"),
    "NVIDIA NeMo": ("nemo-2024", "noncausal"),
    "Megatron-LM 2020": ("megatron-2020", "with-recompute"),
}
"""Start of the source -> software stack, convention of its FLOPs."""
BASELINES = {*range(79, 82), *range(84, 87), *range(97, 105), *range(113, 121)}
"""Rows of 2504.14960 that are baselines with unknown batch and recompute."""
MAPPED = {
    ("Mixtral-8x22B", False): (2, 8, 4),
    ("Mixtral-8x22B", True): (2, 8, 8),
    ("Mixtral-8x22B-G8T8", False): (2, 8, 8),
    ("Mixtral-8x22B-G8T8", True): (4, 8, 8),
}
"""Model and folding -> tp, pp, ep of table 3 of 2504.14960, which table 4 refers to."""
ASSUMED_BATCH = 128
"""Samples of a step in the NeMo 24.03 long-sequence runs, which do not state it: that of the same model in NeMo 24.07."""

ASSUMED_ROUTED = 0.9
"""Share of tokens that experts take with capacity factor 1 and token drop (2504.14960), which does not say."""


@dataclass(frozen=True)
class Run:
    """A published measurement and what the planner is asked about it."""

    row: int
    source: str
    name: str
    job: Job
    mapping: Mapping
    declared: bool
    """The source states what is recomputed."""
    seconds: float
    published_memory: float | None = None
    """Bytes."""

    @property
    def sparse(self) -> bool:
        return bool(self.job.model.experts)

    @property
    def key(self) -> tuple[object, ...]:
        """The configuration apart from how many GPUs repeat it."""
        return (
            self.source,
            self.name,
            self.job.cluster.hardware.name,
            self.job.dtype,
            self.job.seq,
            self.mapping,
            self.mapping.microbatches(self.job),
            self.job.stack,
        )

    def needs(self, constants: Constants, work: Workload | None = None) -> float:
        """Bytes estimated for the rank whose memory was published: the fullest, in the heatmap (see README) the first stage's."""
        ranks = memory(work or self.work(), self.job.software, constants)
        return ranks[0].total if self.source.startswith("HF") else max(one.total for one in ranks)

    def work(self) -> Workload:
        return assemble(self.job, self.mapping)

    def estimate(self, constants: Constants, work: Workload | None = None) -> StepTime:
        return step_time(work or self.work(), self.job.cluster.hardware, self.job.software, constants)


def load() -> tuple[list[Run], dict[int, str]]:
    """All runs that can be asked about, and for the other rows why not."""
    runs: list[Run] = []
    left: dict[int, str] = {}
    with CSV.open() as file:
        for number, row in enumerate(csv.DictReader(file)):
            try:
                runs += _runs(number, row)
            except LeftOut as reason:
                left[number] = str(reason)
    return runs, left


BASELINE_MAPPINGS: Map[tuple[str, str], Mapping] = {
    ("Mixtral-8x22B", "FSDP"): Mapping(tp=8, data_parallel="zero3"),
    ("Mixtral-8x22B", "FSDP+EP"): Mapping(tp=2, ep=8, etp=2, data_parallel="zero3"),
    ("Mixtral-8x22B", "TP+EP+DP"): Mapping(tp=4, ep=8, etp=4),
    ("Mixtral-8x22B-G8T8", "FSDP"): Mapping(tp=8, data_parallel="zero3"),
    ("Mixtral-8x22B-G8T8", "FSDP+EP"): Mapping(tp=4, ep=8, etp=4, data_parallel="zero3"),
    ("Mixtral-8x22B-G8T8", "TP+EP+DP"): Mapping(tp=8, ep=8, etp=8),
}
"""Model and strategy -> mapping of table 3 of 2504.14960; microbatches of one sample and no recompute are assumed."""


def baselines() -> list[tuple[str, Run]]:
    """The rows of `BASELINES`, which no fit sees, with their strategies."""
    found = []
    with CSV.open() as file:
        for number, row in enumerate(csv.DictReader(file)):
            if number in BASELINES:
                strategy = row["notes"].split(";")[0]
                model = replace(MODELS[row["model"]], routed=ASSUMED_ROUTED)
                job = Job(model, Cluster("h100", int(row["gpus"])), 4096, int(row["gbs"]), "bf16", "megatron-2024")
                mapping = BASELINE_MAPPINGS[row["model"], strategy]
                found.append((strategy, Run(number, row["source"], row["model"], job, mapping, False, _seconds(row, job, "causal"))))
    return found


WIDER = ((2, 3, 14167.25), (4, 9, 13460.16), (8, 18, 10888.53), (16, 40, 6159.30), (32, 90, 3609.73))
"""tp, samples of a microbatch, tokens/s of a GPU: one step of one microbatch of a 3.57B on as many GPUs as tp has, which a comment of
huggingface/nanotron's scripts/scaling_benchmarks.py states; with its FLOP/s, from which the sequence of 4096 follows."""


def wider() -> list[Run]:
    """Tensor parallelism alone on 2 to 32 GPUs, which no fit sees: `WIDER`."""
    model = replace(_llama(28, 3072, 32, 32, 8192, 131072, tied=True), head_dim=96)
    found = []
    for tp, samples, rate in WIDER:
        job = Job(model, Cluster("h100-efa", tp), 4096, samples, "bf16", "nanotron")
        mapping = Mapping(tp, microbatch=samples, data_parallel="replicate")
        found.append(Run(-1, "nanotron scaling_benchmarks.py", "Llama-like 3.57B", job, mapping, True, samples * 4096 / tp / rate))
    return found


class LeftOut(Exception):
    """A row that does not say enough."""


def _runs(number: int, row: dict[str, str]) -> Iterator[Run]:
    if number in BASELINES:
        raise LeftOut("baseline with unknown batch and recompute")
    first = _one(
        number, {k: re.sub(r"\s*\(.*\)", "", v) if k not in ("source", "hardware", "notes", "model") else v for k, v in row.items()}
    )
    yield first
    if "Bridge perf summary 25.09" in row["source"] and "(" in row["tok_s_gpu"]:
        yield _one(
            number,
            {
                k: re.sub(r".*\((.*)\)", r"\1", v)
                if k not in ("source", "hardware", "notes", "model", "precision")
                else re.sub(r" \(25.09\)", "", v)
                if k == "precision"
                else v
                for k, v in row.items()
            },
        )


def _one(number: int, row: dict[str, str]) -> Run:
    name, model = _model(row)
    part = next(part for text, part in HARDWARE if text in row["hardware"])
    number_of = lambda key, other: int(row[key]) if row[key] not in ("", "n/a") else other  # noqa: E731
    stack, convention = next(v for k, v in SOURCES.items() if row["source"].startswith(k))
    seq = number_of("seq", 1024)
    gpus = number_of("gpus", 0)
    tp, pp, cp, ep = (number_of(k, 1) for k in ("tp", "pp", "cp", "ep"))
    v = number_of("vpp", 1)
    microbatch = number_of("mbs", 1)
    folded = "Folding" in row["notes"]
    etp: int | None = None
    if row["source"].startswith("arXiv:2504"):
        if not row["tp"]:
            tp, pp, ep = MAPPED[name, folded]
        etp, v = (1 if folded else tp), 7
        model = replace(model, routed=ASSUMED_ROUTED)
    batch = number_of("gbs", 0)
    mode = "zero1"
    if row["fsdp"] not in ("", "0", "1") or row["source"].startswith("torchtitan"):
        mode = "zero3"
    if "ZeRO-0" in row["notes"] or stack in ("megatron-2020", "megatron-2021"):
        mode = "replicate" if mode != "zero3" else mode
    recompute = row["recompute"] or ("full" if stack == "megatron-2020" else "")
    if "ZeRO-3" in row["model"]:
        stack = "deepspeed-2021"
    if stack == "torchtitan" and "compile" not in row["notes"]:
        stack = "torchtitan-eager"
    if stack == "megatron-2020":
        microbatch = batch // (gpus // tp)
    software: str | Stack = stack
    if stack == "nemo-2025" and part == "h100" and ep > 8:
        software = replace(STACKS[stack], hides_ep=True, dedups=name == "DeepSeekV3")  # recipes: moe_a2a_overlap, DeepEP for the large one
    if not batch:
        data = gpus // (tp * pp * cp)
        batch = data * microbatch if row["source"].startswith("torchtitan") else ASSUMED_BATCH
    precision = row["precision"].split()[0]
    job = Job(model, Cluster(part, gpus), seq, batch, precision, software)
    mapping = Mapping(
        *(tp, pp, v, cp, ep, etp, microbatch),
        data_parallel=mode,
        recompute=recompute or "none",
        sequence_parallel=stack not in ("megatron-2020", "megatron-2021"),
    )
    found = list(complaints(job, mapping))
    if found:
        raise LeftOut("; ".join(found))
    if not recompute:
        mapping = inferred(job, mapping)
    seconds = _seconds(row, job, convention)
    published = float(row["mem_gib"]) * GiB if row["mem_gib"] else None
    return Run(number, row["source"], name, job, mapping, bool(recompute), seconds, published)


def inferred(job: Job, mapping: Mapping) -> Mapping:
    """The first of none, activations, selective, full that fits the accelerator; the last if none does."""
    for recompute in RECOMPUTE:
        mapping = replace(mapping, recompute=recompute)
        need = fullest(assemble(job, mapping), job.software, Constants.priors()).total
        if need <= job.cluster.hardware.memory * job.cluster.hardware.usable:
            break
    return mapping


def _model(row: dict[str, str]) -> tuple[str, Transformer]:
    name = re.sub(r" \((tokendrop|dropless)\)| (ZeRO-3|PTD-P)$", "", row["model"])
    name = SAME.get(name, name)
    if row["layers"] and row["source"].startswith(("arXiv:2104", "Megatron-LM")):
        return name, _gpt(int(row["layers"]), int(row["hidden"]), int(row["heads"]), positions=int(row["seq"] or 1024))
    if name not in MODELS:
        raise LeftOut(f"no dimensions of {name}, or layers that are no transformer blocks")
    return name, MODELS[name]


def _seconds(row: dict[str, str], job: Job, convention: str) -> float:
    gpus = job.cluster.gpus
    if row["step_time_s"]:
        return float(row["step_time_s"])
    if row["tok_s_gpu"]:
        return job.tokens / gpus / float(row["tok_s_gpu"])
    rate = float(row["tflops_gpu"]) * 1e12 if row["tflops_gpu"] else float(row["mfu_pct"]) / 100 * float(row["peak_tflops"]) * 1e12
    return job.tokens / gpus * flops_per_token(job.model, job.seq, convention) / rate  # type: ignore[arg-type]
