"""Mistakes that people make, and the words that each is answered with: what was asked, what was found, what to type instead."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.distributed.fsdp import fully_shard

import meshpar as mp

Batch = dict[str, torch.Tensor]
VOCABULARY = 32


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.q_proj, self.o_proj = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o_proj(torch.relu(self.q_proj(self.norm(x))))


class LM(nn.Module):
    """Named as models of languages are; it has methods and a configuration of its own."""

    def __init__(self, vocabulary: int = VOCABULARY, width: int = 16) -> None:
        super().__init__()
        self.config = {"vocabulary": vocabulary}
        self.embed, self.layers = nn.Embedding(vocabulary, width), nn.ModuleList(Block(width) for _ in range(2))
        self.heads = nn.ModuleDict({"words": nn.Linear(width, vocabulary, bias=False)})

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.heads["words"](x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    def generate(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self(input_ids)["logits"].argmax(-1)

    def gradient_checkpointing_enable(self) -> None:
        raise NotImplementedError

    def save_pretrained(self, folder: str) -> None:
        raise NotImplementedError


class Pair(nn.Module):
    """Returns what it calls its losses in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.up(x).square().mean(), self.up(x).abs().mean()


class Bare(nn.Module):
    """A parameter that nothing initialises."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.scale


@dataclass
class Here:
    """Four simulated ranks as dp=2,tp=2, a model, its parallel form, and the data ranks' batches."""

    mesh: Any
    model: LM
    pm: Any
    whole: Batch
    batch: Batch

    def parallelize(self, model: Any = None, **asked: Any) -> Any:
        asked.setdefault("example", self.batch)
        return mp.parallelize(self.model if model is None else model, asked.pop("mesh", self.mesh), **asked)

    def changed(self, name: str, value: int) -> Batch:
        tensor = self.batch[name].clone()
        tensor[0, 3] = value
        return {**self.batch, name: tensor}


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (4, 8))
    with mp.simulate(4):
        mesh = mp.make_mesh("dp=2,tp=2")
        model, whole = LM(), {"input_ids": ids, "labels": ids.clone()}
        batch = mp.local_batch(whole, mesh)
        yield Here(mesh, model, mp.parallelize(model, mesh, example=batch), whole, batch)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Bare()


def without_gradients(act: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return act()


def frozen() -> nn.Module:
    return LM().requires_grad_(False)


Mistake = tuple[str, str, Callable[[Here], Any]]
GIVEN: tuple[Mistake, ...] = (
    ("mesh in text", r'make_mesh\("dp=2,tp=2"\)', lambda h: h.parallelize(mesh="dp=2,tp=2")),
    ("swapped", r"write parallelize\(model, mesh\)", lambda h: mp.parallelize(h.mesh, h.model)),
    ("twice", "parallel already", lambda h: h.parallelize(h.pm)),
    ("a class", r"the class LM: give a module made of it, LM\(", lambda h: h.parallelize(LM)),
    ("a function", "is a function, not an nn.Module", lambda h: h.parallelize(on_meta)),
    ("in DataParallel", r"parallelize\(model.module, mesh\)", lambda h: h.parallelize(nn.DataParallel(LM()))),
    ("compiled", r"parallelize\(model._orig_mod, mesh\)", lambda h: mp.parallelize(torch.compile(LM()), h.mesh, example=h.batch)),
    ("a dict as config", r"mp.ParallelConfig\(microbatches=2\)", lambda h: h.parallelize(config={"microbatches": 2})),
    ("a word as config", "'zero3' is no .toml file", lambda h: h.parallelize(config="zero3")),
    ("a missing file as config", "No such file", lambda h: h.parallelize(config="none.toml")),
    ("the class as config", r"config=ParallelConfig\(\)", lambda h: h.parallelize(config=mp.ParallelConfig)),
    ("a list of rules", "rules= is a list: it wants a dict", lambda h: h.parallelize(rules=[("*.q_proj.weight", "tp:0")])),
    ("a number in rules", "are texts, a dict", lambda h: h.parallelize(rules={"*.q_proj.weight": 0})),
    ("the name of a loss", "a function of .output, batch.", lambda h: h.parallelize(loss_fn="cross_entropy")),
    ("a path as plan", r"Plan.from_json\(Path", lambda h: h.parallelize(plan="plan.json")),
    ("a name of the hub", r"snapshot_download\('org/name'", lambda h: h.parallelize(weights="org/name")),
    ("a pickled file", "safetensors.torch.save_file", lambda h: h.parallelize(weights="model.bin")),
    ("a state dict as weights", "pm.load_state_dict", lambda h: h.parallelize(weights=LM().state_dict())),
    ("a model as weights", "pm.load_state_dict", lambda h: h.parallelize(weights=LM())),
    ("a path without weights", "no weights at nowhere/at/all", lambda h: h.parallelize(weights="nowhere/at/all")),
    ("no example", "pass example=batch", lambda h: mp.parallelize(h.model, h.mesh)),
    ("a tensor as example", "must be a dict .* or a tuple", lambda h: h.parallelize(example=h.batch["input_ids"])),
    ("a list of dicts", r"Write \*\*batch \(or example=batch\)", lambda h: h.parallelize(example=[h.batch])),
    ("numpy", "no tensor.*as_tensor", lambda h: h.parallelize(example={"input_ids": h.whole["input_ids"].numpy()})),
    ("microbatches", "3 microbatches do not divide", lambda h: h.parallelize(config=mp.ParallelConfig(microbatches=3))),
    ("stages in simulation", "use processes", lambda h: h.parallelize(mesh=mp.make_mesh("pp=2,tp=2"))),
    ("experts of a dense model", "Use dp=2 instead", lambda h: h.parallelize(mesh=mp.make_mesh("ep=2,tp=2"))),
    (
        "nothing initialises it",
        "nothing gives these tensors a value.*scale",
        lambda h: h.parallelize(on_meta(), example=(torch.ones(2, 8),)),
    ),
    ("a loss of one argument", "takes 1 positional argument", lambda h: h.parallelize(loss_fn=lambda output: output["loss"])),
    ("a loss per row", "must return one floating number", lambda h: h.parallelize(loss_fn=lambda output, batch: output["logits"].sum(-1))),
    ("no loss at all", "it returned a NoneType", lambda h: h.parallelize(loss_fn=lambda output, batch: None)),
    ("verify of a parallel model", "verify: the model is parallel already", lambda h: mp.verify(h.pm, "tp=2", h.whole)),
    ("verify with a dict", r"verify: config= is a dict", lambda h: mp.verify(h.model, "tp=2", h.whole, config={"microbatches": 2})),
)
RULES: tuple[Mistake, ...] = (
    ("a letter", r"Did you mean \*\.q_proj\.weight, \*\.o_proj\.weight\?", lambda h: h.parallelize(rules={"*.q_prj.weight": "tp:0"})),
    ("a prefix", r"Did you mean \*\.q_proj\.weight\?", lambda h: h.parallelize(rules={"model.layers.*.attn.q_proj.weight": "tp:0"})),
    ("no stars", r"Did you mean \*q_proj\*\?", lambda h: h.parallelize(rules={"q_proj": "tp:0"})),
    ("a word", '"tp:DIM"', lambda h: h.parallelize(rules={"*.q_proj.weight": "colwise"})),
    ("another axis", '"tp:DIM"', lambda h: h.parallelize(rules={"*.q_proj.weight": "dp:0"})),
    ("no such dim", "it has no dim 2", lambda h: h.parallelize(rules={"*.q_proj.weight": "tp:2"})),
)
SETTINGS: tuple[Mistake, ...] = (
    ("a field", "no field 'microbatch'. Did you mean microbatches", lambda h: mp.ParallelConfig(microbatch=2)),  # type: ignore[call-arg]
    ("a field of precision", "no field 'param'. Did you mean param_dtype", lambda h: mp.Precision(param="bf16")),  # type: ignore[call-arg]
    ("case", "Did you mean 1f1b", lambda h: mp.ParallelConfig(schedule="1F1B")),  # type: ignore[arg-type]
    ("another tool's word", "one of replicate, zero1", lambda h: mp.ParallelConfig(data_parallel="fsdp")),  # type: ignore[arg-type]
    ("a number for a word", "one of replicate, zero1", lambda h: mp.ParallelConfig(data_parallel=3)),  # type: ignore[arg-type]
    ("none of it", "at least 1", lambda h: mp.ParallelConfig(microbatches=0)),
    ("no floating dtype", "one of fp64", lambda h: mp.ParallelConfig(precision="int8")),  # type: ignore[arg-type]
    ("a truth", "whole number", lambda h: mp.ParallelConfig(microbatches=True)),
    ("two at once", "microbatches=0(.|\n)*schedule='zb'", lambda h: mp.ParallelConfig(microbatches=0, schedule="zb")),  # type: ignore[arg-type]
    ("stages", "exactly 2", lambda h: mp.ParallelConfig(schedule="zbv", virtual_stages=3)),
)
MESHES: tuple[Mistake, ...] = (
    ("too few", 'Meshes that fit: "tp=4"', lambda h: mp.make_mesh("tp=3")),
    ("unknown", "unknown axis 'tensor'", lambda h: mp.make_mesh("dp=2,tensor=2")),
    ("order", 'Write "dp=2,tp=2"', lambda h: mp.make_mesh("tp=2,dp=2")),
    ("a list", 'written as "dp=2,tp=4"', lambda h: mp.make_mesh([2, 2])),  # type: ignore[arg-type]
    ("nothing", "this is None", lambda h: mp.make_mesh(None)),  # type: ignore[arg-type]
    ("half a rank", "a size is a whole number", lambda h: mp.make_mesh({"dp": 2.0, "tp": 2})),  # type: ignore[dict-item]
    ("colons", '"dp:2" is not name=size', lambda h: mp.make_mesh("dp:2,tp:2")),
    ("empty", "is not name=size", lambda h: mp.make_mesh("")),
    ("twice", "given 2 times", lambda h: mp.make_mesh("tp=2,tp=2")),
    ("local_batch swapped", r"mp.local_batch\(global_batch, mesh\)", lambda h: mp.local_batch(h.mesh, h.whole)),
    ("uneven", "the batch has 3 samples", lambda h: mp.local_batch(torch.ones(3, 2), h.mesh)),
    ("nested", "inside simulate", lambda h: mp.simulate(2).__enter__()),
)
BATCHES: tuple[Mistake, ...] = (
    ("missing", "input_ids is missing", lambda h: h.pm.train_step(labels=h.batch["labels"])),
    ("nothing", "input_ids is missing", lambda h: h.pm.train_step()),
    ("too much", "token_type_ids is none of its arguments", lambda h: h.pm.train_step(**h.batch, token_type_ids=h.batch["labels"])),
    ("misspelt", "Did you mean input_ids", lambda h: h.pm.train_step(inputs_ids=h.batch["input_ids"])),
    ("by position", r"Write \*\*batch", lambda h: h.pm.train_step(h.batch)),
    ("twice", "given twice", lambda h: h.pm.train_step(h.batch["input_ids"], **h.batch)),
    ("too many", "3 positional arguments, of 2 at most", lambda h: h.pm.train_step(*[h.batch["labels"]] * 3)),
    ("no labels", "gives no loss", lambda h: h.pm.train_step(input_ids=h.batch["input_ids"])),
    ("no samples", "has no samples", lambda h: h.pm.train_step(**{n: x[:0] for n, x in h.batch.items()})),
    ("lengths", "Expected input batch_size", lambda h: h.pm.train_step(h.batch["input_ids"], h.batch["labels"][:, :4])),
    ("floats", "Long, Int", lambda h: h.pm.train_step(h.batch["input_ids"].float(), h.batch["labels"])),
    ("elsewhere", r'input_ids is on meta.*value.to\("cpu"\)', lambda h: h.pm.train_step(**{n: x.to("meta") for n, x in h.batch.items()})),
    (
        "a token",
        r"input_ids of rank 0 is 99 at \[0, 3\], and embed .* has 32 rows",
        lambda h: h.pm.train_step(**h.changed("input_ids", 99)),
    ),
    ("below zero", r"input_ids of rank 0 is -1 at \[0, 3\]", lambda h: h.pm.eval_step(**h.changed("input_ids", -1))),
    ("a label", r"labels of rank 0 is 32 at \[0, 3\].* has 32 classes", lambda h: h.pm.train_step(**h.changed("labels", 32))),
    ("a token in forward", "input_ids of rank 0 is 99", lambda h: h.pm(**h.changed("input_ids", 99))),
)
STEPS: tuple[Mistake, ...] = (
    ("backward", r"Leave .backward\(\) out", lambda h: h.pm.train_step(**h.batch).backward()),
    ("settings of padding", "multiples lengths are padded to", lambda h: mp.ParallelConfig(pad_to=[])),
    ("backward of an evaluation", r"Leave .backward\(\) out", lambda h: h.pm.eval_step(**h.batch).backward()),
    ("no gradients", "pm.eval_step", lambda h: without_gradients(lambda: h.pm.train_step(**h.batch))),
    ("all is frozen", "all are frozen", lambda h: h.parallelize(frozen()).train_step(**h.batch)),
    ("no pipeline", "no pp axis", lambda h: h.pm.schedule_table()),
    ("clipping the model", r"mp.clip_grad_norm_\(pm.parameters\(\), 1.0\)", lambda h: mp.clip_grad_norm_(h.pm, 1.0)),
    ("clipping a number", "clip_grad_norm_ of a float", lambda h: mp.clip_grad_norm_(1.0, h.pm.parameters())),  # type: ignore[arg-type]
    ("clipping the original", "pm.train_step trains pm.parameters", lambda h: mp.clip_grad_norm_(h.model.parameters(), 1.0)),
    ("the original's optimizer", r"SGD\(pm.parameters\(\)", lambda h: torch.optim.SGD(h.model.parameters(), lr=0.1).step()),
    ("a part of the original's", r"Adam\(pm.parameters\(\)", lambda h: torch.optim.Adam(h.model.layers.parameters()).step()),
    ("a plain tensor", "make it from the parameter", lambda h: h.pm.heads["words"].weight.data.add_(torch.ones(VOCABULARY, 16))),
)
LIKE_A_MODEL: tuple[Mistake, ...] = (
    ("a layer called", "Block of a parallel model cannot be called", lambda h: h.pm.layers[0](torch.ones(1, 8, 16))),
    ("generate", "generate of LM is its own", lambda h: h.pm.generate(h.batch["input_ids"])),
    ("saving as Hugging Face", "no save_pretrained: mp.checkpoint.save", lambda h: h.pm.save_pretrained("folder")),
    ("checkpointing", 'recompute="full"', lambda h: h.pm.gradient_checkpointing_enable()),
    ("a module replaced", "cannot be replaced", lambda h: setattr(h.pm, "embed", nn.Embedding(2, 2))),
    ("a parameter replaced", "no other parameters", lambda h: setattr(h.pm.embed, "weight", nn.Parameter(torch.ones(32, 16)))),
    ("a parameter more", "no other parameters", lambda h: h.pm.register_parameter("more", nn.Parameter(torch.ones(1)))),
    ("a hook inside", "Register the hook on the model", lambda h: h.pm.layers[0].register_forward_hook(print)),
    ("a hook before", "Register the hook on the model", lambda h: h.pm.layers[0].norm.register_forward_pre_hook(print)),
    ("pickled", "mp.checkpoint.save", lambda h: pickle.dumps(h.pm)),
    ("copied", r"copy.deepcopy\(pm\)", lambda h: copy.copy(h.pm)),
    ("shared", "Start them with torchrun", lambda h: h.pm.share_memory()),
    ("compiled", "not compiled as a whole", lambda h: torch.compile(h.pm, backend="eager")),
    ("compiled in place", "not compiled as a whole", lambda h: h.pm.compile()),
    ("a step compiled", "outside of what is compiled", lambda h: torch.compile(h.pm.eval_step, backend="eager")(**h.batch)),
    ("in fully_shard", "fully_shard does not take a parallel model", lambda h: fully_shard(h.pm)),
    ("a layer in fully_shard", "fully_shard does not take a parallel model", lambda h: fully_shard(h.pm.layers[0])),
    ("quantized", "is not quantized.* and quantize it there", lambda h: quantize_dynamic(h.pm, {nn.Linear})),
    ("scripted", "not made into a script", lambda h: torch.jit.script(h.pm)),
    ("traced", "not made into a script", lambda h: torch.jit.trace(h.pm, (h.batch["input_ids"],))),
    ("exported", "not made into a script", lambda h: torch.export.export(h.pm, (), dict(h.batch))),
    ("traced by fx", "not traced by torch.fx", lambda h: torch.fx.symbolic_trace(h.pm)),
    ("mapped", "does not run inside of torch.func", lambda h: torch.func.vmap(lambda i: h.pm(i[None])["logits"])(h.whole["input_ids"])),
    ("state saved in simulation", "Simulated ranks cannot save", lambda h: torch.save(h.pm.state_dict(), io.BytesIO())),
    ("inside of another", "0 of the model is parallel already", lambda h: h.parallelize(nn.Sequential(h.pm))),
    ("converted", "dtype of a parallel model is fixed", lambda h: h.pm.to(torch.bfloat16)),
    ("halved", "dtype of a parallel model is fixed", lambda h: h.pm.half()),
    ("in DDP", "not wrapped in DistributedDataParallel", lambda h: nn.parallel.DistributedDataParallel(h.pm)),
    ("a state that is another's", "Missing key in state_dict: embed.weight", lambda h: h.pm.load_state_dict({"a": torch.ones(1)})),
    ("no such attribute", "has no attribute 'nothing'", lambda h: h.pm.nothing),
)
FILES: tuple[Mistake, ...] = (
    ("an optimizer by name", "the optimizer is a str", lambda h: mp.checkpoint.save("run", h.pm, "adam")),  # type: ignore[arg-type]
    ("swapped", r"write \(path, pm, optimizer\)", lambda h: mp.checkpoint.save(h.pm, "run")),  # type: ignore[arg-type]
    ("not there", "does not exist", lambda h: mp.checkpoint.load("not/there", h.pm)),
    ("a scheduler", "has no state_dict", lambda h: mp.checkpoint.save("run", h.pm, scheduler=0.1)),
    ("simulated", "Simulated ranks cannot save", lambda h: mp.checkpoint.save("run", h.pm)),
)
MISTAKES = [(f"{group}: {name}", words, act) for group, rows in (
    ("given", GIVEN), ("rules", RULES), ("settings", SETTINGS), ("meshes", MESHES), ("batches", BATCHES), ("steps", STEPS),
    ("like a model", LIKE_A_MODEL), ("files", FILES),
) for name, words, act in rows]  # fmt: skip


@pytest.mark.sweep(11)
@pytest.mark.parametrize(("words", "act"), [pytest.param(words, act, id=name) for name, words, act in MISTAKES])
def test_mistake_is_told(here: Here, words: str, act: Callable[[Here], Any]) -> None:
    with pytest.raises((mp.MeshparError, AttributeError), match=f"(?s){words}") as told:
        act(here)
    assert len(str(told.value)) < 2500


def test_there_are_enough_of_them() -> None:
    assert len(MISTAKES) >= 80


def test_one_batch_on_all_data_ranks(here: Here) -> None:
    pm = here.parallelize()
    with pytest.warns(UserWarning, match=r"all 2 data ranks gave the same samples.*mp.local_batch"):
        pm.train_step(**here.whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here.parallelize().train_step(**here.batch)


def test_an_optimizer_on_a_model_that_is_trained_too(here: Here) -> None:
    model = copy.deepcopy(here.model)
    pm = here.parallelize(model)
    model(**here.whole)["loss"].backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    optimizer = torch.optim.SGD(pm.parameters(), lr=0.1)
    optimizer.step()  # nothing to do yet, and nothing wrong
    pm.train_step(**here.batch)
    optimizer.step()


def test_a_long_capture_is_said(here: Here) -> None:
    pm = here.parallelize()
    pm._makes.seconds = 37.0
    with pytest.warns(UserWarning, match=r"captured once more, for tensors of shape \[2, 4\] in training: the first time took 37 s"):
        pm.train_step(**{name: x[:, :4] for name, x in here.batch.items()})


def test_containers_are_indexed_as_in_the_model(here: Here) -> None:
    layers = here.pm.layers
    assert len(layers) == 2 and layers[-1] is layers[1] and list(layers) == [layers[0], layers[1]] and layers[:1] == [layers[0]]
    assert here.pm.heads["words"].weight is dict(here.pm.named_parameters())["heads.words.weight"]
    assert list(here.pm.heads.keys()) == ["words"] and "words" in here.pm.heads
    assert here.pm.embed.num_embeddings == VOCABULARY and layers[0].q_proj.out_features == 16
    assert here.pm.config == here.model.config and here.pm.parallel_config.microbatches == 1
