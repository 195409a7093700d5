"""A job in Megatron's words, dry run: what each entry becomes here, and the program that follows, on ranks that do not exist."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from meshpar import roles
from meshpar.config import ParallelConfig, Translation
from meshpar.errors import ConfigError, raise_all
from meshpar.megatron import MODEL, megatron_mesh
from meshpar.mesh import parse_mesh
from meshpar.planner import Transformer

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "seq_length", "micro_batch_size", "global_batch_size")

_BATCHES = ("micro_batch_size", "global_batch_size")
_MODEL: Mapping[str, str] = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_query_groups": "kv_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "ffn",
    "vocab_size": "vocab",
    "make_vocab_size_divisible_by": "vocab",
    "gated_linear_unit": "gated",
    "swiglu": "gated",
    "untie_embeddings_and_output_weights": "tied",
    "padded_vocab_size": "vocab",
    "position_embedding_type": "positions",
    "use_rotary_position_embeddings": "positions",
    "no_position_embedding": "positions",
    "max_position_embeddings": "positions",
    "num_moe_experts": "experts",
    "num_experts": "experts",
    "group_query_attention": "kv_heads",
    "moe_router_topk": "top_k",
    "moe_ffn_hidden_size": "expert_ffn",
    "moe_shared_expert_intermediate_size": "shared_ffn",
    "hidden_dropout": "dropout",
    "seq_length": "seq",
}
"""Name -> what of the model it is, in our words."""


@dataclass(frozen=True)
class MegatronJob:
    """What a file says, in our words."""

    sizes: Transformer
    dropout: float
    mesh: str
    config: ParallelConfig
    seq: int
    local_batch: int
    """Samples of a step on one data rank."""
    remarks: tuple[str, ...]
    """What follows from the entries together."""

    @property
    def translation(self) -> tuple[Translation, ...]:
        """What each entry became: of the configuration, or of the model and its batches, which are made of the file, too."""
        return tuple(self._told(one) for one in self.config.translation)

    def _told(self, one: Translation) -> Translation:
        if one.becomes:
            return one
        if one.name in _BATCHES:
            return replace(one, becomes=f"microbatches={self.config.microbatches}, {self.local_batch} samples of a data rank", why="")
        if one.name in _MODEL:
            field = _MODEL[one.name]
            made = self.dropout if field == "dropout" else self.seq if field == "seq" else getattr(self.sizes, field)
            return replace(one, becomes=f"{field}={made!r} of the model", why="")
        if one.name in MODEL or one.name.startswith("moe_"):
            return replace(one, why="the model that is dry run is made of sizes, and has no such part")
        return one


def read_megatron(source: str | Path | Mapping[str, Any], *, gpus: int | None = None) -> MegatronJob:
    """A job from Megatron's names: a dict, or a YAML or JSON file; parts such as `ddp_config` may be dicts of their own.

    Raises ConfigError with everything that is missing, unknown or contradicts itself at once.

    >>> job = read_megatron({"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128, "seq_length": 32,
    ...     "micro_batch_size": 2, "global_batch_size": 32, "tensor_model_parallel_size": 2, "bf16": True}, gpus=8)
    >>> job.mesh, job.config.microbatches
    ('dp=4,tp=2', 4)
    """
    given = _flat(source if isinstance(source, Mapping) else _read(Path(source)))
    world = gpus or given.pop("world_size", None)
    connections = given.pop(CONNECTIONS, None)
    complaints = [f"{name} is missing." for name in NEEDED if name not in given]
    complaints += [
        f"{name}={given[name]!r}: a whole number of at least 1." for name in NEEDED if name in given and not _counts(given[name])
    ]
    if world is None:
        complaints.append("the number of GPUs is missing: give world_size in the file, or --gpus.")
    elif not _counts(world):
        complaints.append(f"world_size={world!r}: a whole number of at least 1.")
    raise_all(ConfigError, "megatron:", complaints)
    config = ParallelConfig.from_megatron(given)
    mesh = megatron_mesh({k: v for k, v in given.items() if k != "data_parallel_size"}, int(world or 1))
    dp = _data(mesh)
    share = given["micro_batch_size"] * dp
    if given["global_batch_size"] % share:
        low = given["global_batch_size"] // share * share
        raise ConfigError(
            f"megatron: global_batch_size={given['global_batch_size']} is no multiple of micro_batch_size x data parallel size = "
            f"{given['micro_batch_size']} x {dp} = {share}. Nearest: {max(low, share)} or {low + share}."
        )
    if given.get("data_parallel_size") not in (None, dp):
        raise ConfigError(f"megatron: data_parallel_size={given['data_parallel_size']}, but {world} GPUs leave {dp} for data parallelism.")
    config = replace(config, microbatches=given["global_batch_size"] // share)
    return MegatronJob(
        _sizes(given),
        float(given.get("hidden_dropout", 0.1)),
        mesh,
        config,
        given["seq_length"],
        given["micro_batch_size"] * config.microbatches,
        tuple(_remarks(given, config, mesh, dp, connections)),
    )


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"--megatron {path}: {error.strerror}.") from error
    found = _of_json(text, path) if path.suffix == ".json" else _of_yaml(text, path)
    if not isinstance(found, Mapping):
        raise ConfigError(f"--megatron {path}: names and values are wanted, this is a {type(found).__name__}.")
    return found


def _of_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--megatron {path} is no JSON: {error}.") from error


def _of_yaml(text: str, path: Path) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(f"reading YAML needs pyyaml, which is not installed: write {path.stem}.json instead ({error}).") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--megatron {path} is no YAML: {error}") from error


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of a file that are dicts of their own, together with the rest; command-line spelling becomes that of configurations."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            found |= _flat(value)
        else:
            plain = name.lstrip("-")
            found[plain if plain == CONNECTIONS else plain.replace("-", "_")] = value
    return found


def _data(mesh: str) -> int:
    sizes = parse_mesh(mesh)
    return prod(sizes[name] for name in roles.with_own_batches(sizes))


def _sizes(given: Mapping[str, Any]) -> Transformer:
    hidden, tp = given["hidden_size"], given.get("tensor_model_parallel_size") or 1
    unit = given.get("make_vocab_size_divisible_by", 128) * tp
    kind = "rope" if given.get("use_rotary_position_embeddings") or given.get("no_position_embedding") else "learned_absolute"
    learned = given.get("position_embedding_type", kind) == "learned_absolute"
    experts = given.get("num_moe_experts") or given.get("num_experts") or 0
    ffn = given.get("ffn_hidden_size") or 4 * hidden
    return Transformer(
        layers=given["num_layers"],
        hidden=hidden,
        heads=given["num_attention_heads"],
        kv_heads=given.get("num_query_groups") or None,
        head_dim=given.get("kv_channels") or None,
        ffn=ffn,
        vocab=given.get("padded_vocab_size") or -(-given["vocab_size"] // unit) * unit,
        gated=bool(given.get("gated_linear_unit", given.get("swiglu", False))),
        tied=not given.get("untie_embeddings_and_output_weights", False),
        positions=(given.get("max_position_embeddings") or given["seq_length"]) if learned else 0,
        experts=experts,
        top_k=given.get("moe_router_topk", 2) if experts else 0,
        expert_ffn=(given.get("moe_ffn_hidden_size") or ffn) if experts else 0,
        shared_ffn=(given.get("moe_shared_expert_intermediate_size") or 0) if experts else 0,
    )


def _remarks(given: Mapping[str, Any], config: ParallelConfig, mesh: str, dp: int, connections: Any) -> Iterator[str]:
    m, b, batch = config.microbatches, given["micro_batch_size"], given["global_batch_size"]
    yield f"num_microbatches = global_batch_size / (micro_batch_size x data parallel size) = {batch} / ({b} x {dp}) = {m}"
    if (asked := given.get("num_microbatches")) not in (None, m):
        yield f"num_microbatches={asked} is not what follows from the batch sizes: {m} is used."
    p, v = parse_mesh(mesh).get(roles.stage_axis(), 1), config.stages_per_rank
    if p > 1:
        yield f"the bubble is (p - 1) / (v m) = ({p} - 1) / ({v} x {m}) = {100 * (p - 1) / (v * m):.2f} % of the work"
    if p > 1 and v > 1 and m % p:
        yield f"interleaving wants microbatches in rounds of {p}: {m} are none."
    shards = config.data_parallel == "zero3"
    if shards and str(connections) == "1":
        yield (
            f"{CONNECTIONS}=1 is wrong beside fully sharded parameters: with one queue, gathers wait behind computation instead of running "
            f"beside it. Unset it (or 8 and more)."
        )
    elif shards:
        yield f"parameters are fully sharded: {CONNECTIONS} must not be 1."
    elif str(connections) == "1":
        yield f"{CONNECTIONS}=1 is for overlapping collectives of tp with products; this package does not depend on it."
    if not {"use_distributed_optimizer", "use_megatron_fsdp", "use_custom_fsdp", "data_parallel_sharding_strategy"} & set(given):
        yield f"nothing is said of data parallelism: this package's default is data_parallel={config.data_parallel!r}."
