"""What `parallelize` is given, looked at before anything is made of it: every complaint at once, each with what to type instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshpar.capture.aliases import shared_memory
from meshpar.config import ParallelConfig
from meshpar.errors import ConfigError, raise_all
from meshpar.init.fit import Weights, shortened
from meshpar.plan import Plan
from meshpar.runtime.model import ParallelModel
from meshpar.settings import is_file

_WRAPPERS: Mapping[str, str] = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "module",
}
"""Classes that wrap a model to run it in their own way -> where the model is in them."""


def check_arguments(
    model: object,
    mesh: object,
    config: object,
    rules: object,
    loss_fn: object,
    *,
    plan: object = None,
    weights: object = None,
    caller: str = "parallelize",
) -> ParallelConfig:
    """The configuration that is meant. Raises ConfigError with all that cannot be meant."""
    raise_all(
        ConfigError,
        f"{caller}:",
        [
            *_model(model, mesh),
            *_config(config),
            *_rules(rules),
            *([] if plan is None or isinstance(plan, Plan) else _plan(plan)),
            *([] if loss_fn is None or callable(loss_fn) else [f"loss_fn={_shown(loss_fn)}: a function of (output, batch), or None."]),
            *_weights(weights),
        ],
    )
    if isinstance(config, (str, Path)):
        return ParallelConfig.from_toml(config)
    assert config is None or isinstance(config, ParallelConfig)
    return config or ParallelConfig()


def _model(model: object, mesh: object) -> list[str]:
    if isinstance(model, DeviceMesh):
        return [f"the model is a DeviceMesh and the mesh a {type(mesh).__name__}: write parallelize(model, mesh)."]
    if isinstance(model, ParallelModel):
        return ["the model is parallel already. Give the one it was made from, or use it as it is: pm.train_step(**batch)."]
    if isinstance(model, nn.Module) and (inner := [name for name, part in model.named_modules() if isinstance(part, ParallelModel)]):
        return [f"{inner[0]} of the model is parallel already. Put the module there that it was made from, and parallelize the whole."]
    if isinstance(model, type) and issubclass(model, nn.Module):
        return [f"the model is the class {model.__name__}: give a module made of it, {model.__name__}(...)."]
    if isinstance(model, torch.jit.ScriptModule):
        return ["the model is a ScriptModule, whose forward is no Python that could be captured: give the module it was scripted from."]
    if not isinstance(model, nn.Module):
        return [f"the model is a {type(model).__name__}, not an nn.Module. Put a function into the forward of one."]
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if kind in _WRAPPERS:
        return [
            f"the model is wrapped by {type(model).__name__}, which runs it in its own way. Give the model itself: "
            f"parallelize(model.{_WRAPPERS[kind]}, mesh); data parallelism is an axis of the mesh."
        ]
    return [*_quantised(model), *_shared(model)]


def _shared(model: nn.Module) -> list[str]:
    """Two tensors in one memory."""
    found = [f"{a} and {b}" for a, b in shared_memory(model)]
    if not found:
        return []
    return [
        f"{shortened(found, most=3)} lie in the same memory, so that what changes one changes the other; a parallel model holds them "
        "apart. To tie two parameters make them one: decoder.weight = encoder.weight. Else clone() where the second is made."
    ]


def _quantised(model: nn.Module) -> list[str]:
    """Weights in a code of their own, as those of QLoRA."""
    found = [name for name, p in model.named_parameters() if getattr(p, "quant_state", None) is not None or hasattr(p, "SCB")]
    if not found:
        return []
    return [
        f"{shortened(found, most=3)}: quantised weights. Their bytes are in blocks with scales beside them, not to be cut along a dim, "
        f"and their kernels are no operators that could be planned. Load the base model in bfloat16: on tp and dp every rank holds a part."
    ]


def _config(config: object) -> list[str]:
    if config is None or isinstance(config, ParallelConfig) or is_file(config):
        return []
    if isinstance(config, Mapping):
        fields = ", ".join(f"{name}={value!r}" for name, value in config.items())
        return [f"config= is a dict: write config=mp.ParallelConfig({fields})."]
    if isinstance(config, type):
        return [f"config= is the class {config.__name__}: write config={config.__name__}()."]
    if isinstance(config, str):
        return [f"config={config!r} is no .toml file, as `meshpar plan` writes. Its fields: config=mp.ParallelConfig(...)."]
    return [f"config= is a {type(config).__name__}, not a mp.ParallelConfig, and no .toml file."]


def _rules(rules: object) -> list[str]:
    form = 'a dict, as in rules={"*.q_proj.weight": "tp:0", "*.bias": "replicate"}.'
    if rules is None:
        return []
    if not isinstance(rules, Mapping):
        return [f"rules= is a {type(rules).__name__}: it wants {form}"]
    wrong = {pattern: where for pattern, where in rules.items() if not isinstance(pattern, str) or not isinstance(where, str)}
    return [f"rules={wrong!r}: names and what is done to them are texts, {form}"] if wrong else []


def _plan(plan: object) -> list[str]:
    return [
        f"plan={_shown(plan)}: a Plan, such as pm.plan. From a file: mp.Plan.from_json(Path(file).read_text()), where "
        "Path(file).write_text(pm.plan.to_json()) wrote it."
    ]


def _weights(weights: object) -> list[str]:
    if weights is None or isinstance(weights, (Weights, PathLike)):
        return []
    if isinstance(weights, str):
        return _path(weights)
    if isinstance(weights, (Mapping, nn.Module)):
        state = "weights" if isinstance(weights, Mapping) else "weights.state_dict()"
        return [f"weights= is a {type(weights).__name__}, not a path. What is in memory is loaded afterwards: pm.load_state_dict({state})."]
    return [f"weights= is a {type(weights).__name__}, not the path of a safetensors file, an index, or a directory of either."]


def _path(path: str) -> list[str]:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists() and not Path(path).parent.exists():
        return [
            f"weights={path!r}: there is no such path. If it names a repository of the Hugging Face Hub: nothing is downloaded here. "
            f"Once for all ranks: weights=huggingface_hub.snapshot_download({path!r}, allow_patterns=['*.safetensors*'])."
        ]
    if path.endswith((".bin", ".pt", ".pth", ".ckpt")):
        return [
            f"weights={path!r}: pickled files are not read, since every rank would have to load all of it. Write it once as safetensors: "
            f"safetensors.torch.save_file(torch.load({path!r}), 'model.safetensors')."
        ]
    return []


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"a {type(value).__name__}"
