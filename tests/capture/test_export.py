"""capture(): the graph, run node by node, is the original module: loss, every gradient, every buffer, in float64."""

from __future__ import annotations

import dataclasses
import linecache
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import graph_module as fx_graph_module

from meshpar.capture.export import capture
from meshpar.errors import BatchError, CaptureError, ConfigError
from meshpar.graph.captured import Slot
from meshpar.graph.facts import Info, facts, info_of
from tests.capture import models
from tests.capture.models import GPT, TRANSFORMERS, ConvNet, Odd, Translator, ViT, assert_same, causal_lm, perturbed


def test_the_smallest() -> None:
    model = nn.Linear(4, 2)
    captured = capture(model, (torch.randn(8, 4),))
    (x, weight, bias, linear, output) = captured.graph.nodes
    assert (x.op, x.target, weight.op, weight.target, bias.target) == ("placeholder", "input", "get_attr", "weight", "bias")
    assert linear.target is torch.ops.aten.linear.default
    assert info_of(linear) == Info((8, 2), torch.float32, True)
    assert output.args == ((linear,),)
    assert (captured.parameters, captured.loss, captured.batch_dims) == (("weight", "bias"), None, {"input": 0})


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_causal_language_models(kind: str) -> None:
    model, batch = causal_lm(kind)
    captured = assert_same(perturbed(model), (), batch, tolerance=1e-6 if kind == "gptj" else 1e-10)  # it computes attention in float32
    assert captured.inputs == ("input_ids", "labels")
    assert all(facts(node).info is not None and facts(node).module is not None for node in captured.graph.nodes if node.op != "output")
    regions = [r for r in dict.fromkeys(facts(node).region for node in captured.graph.nodes if node.op == "call_function") if r]
    assert len(regions) == 2 and all(region.endswith(f".{i}") for i, region in enumerate(regions))


def test_t5() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
    ids, labels = torch.randint(3, 61, (2, 7)), torch.randint(3, 61, (2, 5))
    captured = assert_same(perturbed(T5ForConditionalGeneration(config)), (), {"input_ids": ids, "labels": labels})
    assert captured.aliases["encoder.embed_tokens.weight"] == "shared.weight"


def test_vit() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4, num_labels=3
    )
    batch = {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.double), "labels": torch.tensor([0, 2])}
    assert_same(perturbed(ViTForImageClassification(models.without_dropout(config))), (), batch)


def test_gpt_with_a_tied_head() -> None:
    ids = torch.randint(0, 37, (4, 12))
    captured = assert_same(perturbed(GPT()), (ids, ids), {}, loss=lambda output: output[1])
    assert captured.inputs == ("ids", "targets")
    assert captured.aliases == {"head.weight": "tokens.weight"}
    assert [leaf for leaf in captured.out_leaves] == [Slot(0), Slot(1)]
    assert captured.loss == 1


def test_encoder_decoder() -> None:
    assert_same(perturbed(Translator()), (), {"source": torch.randint(0, 23, (2, 5)), "target": torch.randint(0, 29, (2, 6))})


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training: bool) -> None:
    model = perturbed(ConvNet()).train(training)
    image, label = torch.randn(4, 3, 8, 8, dtype=torch.double), torch.tensor([0, 1, 2, 4])

    def loss_fn(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, label_of(batch))

    def label_of(batch: Any) -> Tensor:
        return torch.arange(4, device=batch["image"].device)

    del label
    captured = assert_same(model, (), {"image": image}, loss=lambda output: F.cross_entropy(output, torch.arange(4)), loss_fn=loss_fn)
    updated = [f"features.{i}.{name}" for i in (1, 5) for name in ("running_mean", "running_var", "num_batches_tracked")]
    assert sorted(captured.mutations) == (sorted(updated) if training else [])


def test_einops_layers() -> None:
    image = torch.randn(4, 3, 8, 8, dtype=torch.double)
    assert_same(perturbed(ViT()), (image,), {}, loss=lambda y: y.square().mean(), loss_fn=lambda output, batch: output.square().mean())


def test_mutation_and_no_grad() -> None:
    captured = assert_same(perturbed(Odd()), (torch.randn(5, 6, dtype=torch.double),), {})
    assert set(captured.mutations) == {"scale", "steps"}
    assert [leaf for leaf in captured.out_leaves if not isinstance(leaf, Slot)] == ["odd", 3, None]
    assert not info_of(next(node for node in captured.graph.nodes if node.target == "frozen")).requires_grad
    assert [tuple(value.shape) for value in captured.constants.values()] == [(), (6,)]


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_requires_grad_is_what_autograd_says(kind: str) -> None:
    model, batch = causal_lm(kind)
    captured = capture(model, (), batch)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    values: dict[Any, Any] = {}
    for node in captured.graph.nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            break
        values[node] = (
            batch[node.target]
            if node.op == "placeholder"
            else state[node.target]
            if node.op == "get_attr"
            else node.target(*args, **kwargs)
        )
        if isinstance(values[node], Tensor):
            info = facts(node).info
            assert (tuple(values[node].shape), values[node].dtype, values[node].requires_grad) == (
                info.shape,
                info.dtype,
                info.requires_grad,
            ), node


def test_dropout_is_numbered_and_reproducible() -> None:
    model = perturbed(GPT(dropout=0.3))
    ids = torch.randint(0, 37, (4, 12))
    captured = assert_same(model, (ids, ids), {}, loss=lambda output: output[1], seed=7)
    seeds = [facts(node).seed for node in captured.graph.nodes if facts(node).seed is not None]
    assert seeds == [0, 1, 2]


def test_meta_model_and_scale() -> None:
    with torch.device("meta"):
        model = GPT()
    before = {name: id(p) for name, p in model.named_parameters()}
    ids = torch.randint(0, 37, (8, 12))
    captured = capture(model, (ids,), {"targets": ids}, divide=4, scale=6)
    assert all(info_of(node).shape == (12, 12) for node in captured.graph.nodes if node.op == "placeholder")
    assert {name: id(p) for name, p in model.named_parameters()} == before and all(p.is_meta for p in model.parameters())
    assert not any("meta" in str(node.kwargs.get("device")) for node in captured.graph.nodes)


def test_inputs_that_are_one_tensor_stay_two() -> None:
    ids = torch.randint(0, 37, (4, 12))
    captured = capture(GPT(), (), {"ids": ids, "targets": ids})
    assert all(node.users for node in captured.graph.nodes if node.op == "placeholder")


def test_batch_dims() -> None:
    class Late(nn.Module):
        def forward(self, x: Tensor, state: Tensor, table: Tensor, flag: bool) -> Tensor:
            return x + state.transpose(0, 1) + table.sum() + flag

    args = {"x": torch.zeros(4, 3), "state": torch.zeros(3, 4), "table": torch.zeros(7), "flag": True}
    captured = capture(Late(), (), args, scale=2, batch_dims={"state": 1})
    assert captured.batch_dims == {"x": 0, "state": 1}
    assert [info_of(node).shape for node in captured.graph.nodes if node.op == "placeholder"] == [(8, 3), (3, 8), (7,)]
    with pytest.raises(
        BatchError, match="3 microbatches do not divide the samples of a local batch: x has 4.* Numbers that do: .1, 2, 4.."
    ):
        capture(Late(), (), args, divide=3, batch_dims={"state": 1})
    with pytest.raises(BatchError, match="batch_dims names stat, but the tensors of the batch are x, state, table."):
        capture(Late(), (), args, batch_dims={"stat": 1})


def test_outputs_of_unknown_types() -> None:
    @dataclasses.dataclass
    class Output:
        loss: Tensor
        parts: dict[str, Tensor]

    class Cache:
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"out": Output((x * self.w).sum(), {"y": x + 1}), "cache": Cache(), "name": "n"}

    captured = capture(Model(), (torch.ones(2, 3),))
    assert captured.dropped == ("['cache']: Cache",)
    rebuilt = torch.utils._pytree.tree_unflatten(list(captured.out_leaves), captured.out_spec)
    assert rebuilt == {"out": Output(Slot(0), {"y": Slot(1)}), "cache": None, "name": "n"}  # type: ignore[arg-type]


class Blocked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x[: int(self.layer(x).argmax())]


class Counted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.sum().item())]


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.w.mul_(2)
        return (x * self.w).sum()


class Renorm(Grows):
    def forward(self, x: Tensor) -> Tensor:
        self.w.data.copy_(torch.ones(3))
        return (x * self.w).sum()


@pytest.mark.parametrize(
    ("model", "line", "reason"),
    [
        (Blocked(), "int(self.layer(x).argmax())", "turns the values of a tensor into Python numbers"),
        (Counted(), "item()", "turns the values of a tensor into Python numbers"),
        (Grows(), "", "aten.mul_.Tensor at test_export.py:"),
        (Renorm(), "", "changes w in place, a parameter or a plain tensor of the model"),
    ],
)
def test_what_cannot_be_captured(model: nn.Module, line: str, reason: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.ones(2, 3),))
    assert reason in str(caught.value) and line in str(caught.value)
    if line:
        assert "test_export.py:" in str(caught.value) and type(model).__name__ in str(caught.value)
        assert caught.value.__cause__ is not None
    assert all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters()), "the model was not put back"


def test_a_bad_loss() -> None:
    with pytest.raises(
        CaptureError, match="loss_fn.output, batch. must return one floating number as a tensor; it returned a torch.float32 tensor of"
    ):
        capture(nn.Linear(3, 2), (torch.ones(4, 3),), loss_fn=lambda output, batch: output)


def test_devices() -> None:
    with pytest.raises(ConfigError, match="Type device='cpu' or 'cuda'"):
        capture(nn.Linear(3, 2), (torch.ones(4, 3),), device="meta")


class HooksItself(nn.Module):
    """Puts a hook on its part in the first forward, and remembers that it did, as models that collect outputs do."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not getattr(self, "hooked", False):
            self.hooked = True
            self.part.register_forward_hook(lambda module, args, output: output + 1)
        return self.part(x)


def test_hooks_that_a_forward_registers_are_not_there_twice() -> None:
    model = HooksItself()
    first, second = (capture(model, (torch.randn(3, 2),)) for _ in range(2))
    assert len(first.graph.nodes) == len(second.graph.nodes)
    assert not model.part._forward_hooks


def test_neither_source_is_read_for_nodes_nor_graphs_compiled_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does it, the lines of all frames are looked up for every node: 11,500 here; each has its line anyway."""
    counts = {"lines": 0, "graphs": 0}

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        return count

    monkeypatch.setattr(linecache, "getline", counted("lines", linecache.getline))
    monkeypatch.setattr(fx_graph_module, "_exec_with_source", counted("graphs", fx_graph_module._exec_with_source))
    ids = torch.randint(0, 53, (2, 8))
    found = capture(GPT(), (ids, ids))
    assert counts["lines"] < 1000 and counts["graphs"] <= 3  # (some lines for records of torch.__trace)
    calls = [node for node in found.graph.nodes if node.op == "call_function"]
    assert calls and all(facts(node).source.startswith("models.py:") for node in calls)
