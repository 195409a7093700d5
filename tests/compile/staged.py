"""Models to split, and a reference that runs stages one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from meshpar.compile.split import StageGraph, mark, split
from meshpar.graph.captured import Captured
from tests.models import plain, text, tiny
from tests.sharding.models import captured_of


class UNet(nn.Module):
    """Skips across the middle, halves and doubles; the outermost skip crosses everything."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 6, 8)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip((3, *widths), widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.up = nn.ModuleList(nn.Conv2d(a + b, c, 3, padding=1) for a, b, c in ((8, 8, 6), (6, 6, 4), (4, 4, 3)))

    def forward(self, x: Tensor) -> Tensor:
        skips, target = [], x
        for conv, norm in zip(self.down, self.norms):
            x = F.relu(norm(conv(x)))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        for conv in self.up:
            x = conv(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return F.mse_loss(x, target)


class Uneven(nn.Module):
    """Layers of all kinds, one used twice, two results at once, a parameter nobody but the end uses, a penalty over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.wide, self.rnn = nn.Embedding(11, 6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 11)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        a, b, c = self.wide(x).chunk(3, -1)
        x = self.rnn(torch.tanh(self.rnn(a))) * b
        high, where = x.max(dim=1, keepdim=True)
        x = (x - high) * self.scale + c.sigmoid() + where
        penalty = sum(p.pow(2).sum() for p in self.parameters())
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()) + 0.01 * penalty, x


class Ring(nn.Module):
    """Buffers: one that two places update in turn, one that is read again later."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        old = self.mean.clone()
        y = self.one(x)
        self.mean.copy_(0.5 * self.mean + y.detach().mean(0))
        self.steps.add_(1)
        z = self.two(y).sin()
        return (z + old * self.steps).sum()


def model_of(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(11, (2, 5))
    made: dict[str, Any] = {
        "unet": lambda: (UNet(), {"x": torch.randn(2, 3, 8, 8)}),
        "uneven": lambda: (Uneven(), {"ids": ids, "labels": ids}),
        "ring": lambda: (Ring(), {"x": torch.randn(3, 4)}),
        "albert": lambda: (albert(), text(2, 6)),
        "t5": lambda: (t5(), text(2, 6)),
        "llama_tied": lambda: (tiny("llama", num_hidden_layers=3, tie_word_embeddings=True), text(2, 6)),
    }
    if name in made:
        model, batch = made[name]()
    elif name in ("gpt", "gpt_dropout", "encoder_decoder", "batch_norm", "mixer"):
        model, batch = plain(name)
    else:
        model, batch = tiny(name, num_hidden_layers=3), text(2, 6)
    return model.double(), {n: x.double() if x.is_floating_point() else x for n, x in batch.items()}


def albert() -> nn.Module:
    """All layers share one layer's parameters."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    sizes = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return AlbertForMaskedLM(AlbertConfig(vocab_size=131, hidden_dropout_prob=0.1, **sizes))  # type: ignore[no-any-return]


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=131, decoder_start_token_id=0, pad_token_id=0, **sizes))  # type: ignore[no-any-return]


@lru_cache(maxsize=32)
def captured_model(name: str) -> tuple[nn.Module, dict[str, Tensor], Captured]:
    """A model in float64, its batch and its graph: captured once for all tests."""
    model, batch = model_of(name)
    return model, batch, captured_of(model, batch)


# -- a reference that runs stages ----------------------------------------------------------------------------------------------------------


def run_graph(graph: fx.Graph, tensors: Mapping[str, Tensor], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The output of a graph, for its `get_attr` targets and its placeholders in order."""
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = tensors[str(node.target)]
        elif node.op == "output":
            return tuple(args[0])
        else:
            values[node] = node.target(*args, **kwargs)
    raise AssertionError("a graph without an output")


def run_stages(
    stages: Sequence[StageGraph], tensors: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> tuple[dict[int, Tensor], dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Outputs, new buffers, and every handed value as (what was sent, the leaf that was received)."""
    handed: tuple[Any, ...] = ()
    outputs: dict[int, Tensor] = {}
    updates: dict[str, Tensor] = {}
    crossings = []
    for stage in stages:
        found = run_graph(stage.graph, tensors, (*handed, *(inputs[name] for name in stage.inputs)))
        sent, rest = found[: len(stage.sends)], found[len(stage.sends) :]
        outputs |= dict(zip(stage.outputs, rest))
        updates |= dict(zip(stage.mutations, rest[len(stage.outputs) :], strict=True))
        handed = tuple(x.detach().requires_grad_(x.requires_grad) for x in sent)
        crossings.append(list(zip(sent, handed)))
    return outputs, updates, [pair for pairs in crossings for pair in pairs]


def backward(loss: Tensor, stages: Sequence[StageGraph], crossings: list[tuple[Tensor, Tensor]]) -> None:
    """The loss's gradient, from the last stage to the first."""
    loss.backward()
    left = list(crossings)
    for stage in reversed(stages[:-1]):
        pairs = [left.pop() for _ in stage.sends][::-1]
        pairs = [(sent, got) for sent, got in pairs if sent.requires_grad and got.grad is not None]
        if pairs:
            torch.autograd.backward([sent for sent, _ in pairs], [got.grad for _, got in pairs])


def state_of(model: nn.Module, captured: Captured) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
    return state | {n: b.clone() for n, b in model.named_buffers()} | dict(captured.constants)


def starts_of(graph: fx.Graph, stages: int) -> list[str]:
    """Cuts at equal numbers of calls, wherever that is: inside attention too."""
    calls = [n.name for n in graph.nodes if n.op == "call_function"]
    return [calls[len(calls) * s // stages] for s in range(1, stages)]


def check(stages: Sequence[StageGraph], inputs: Sequence[str]) -> None:
    """What holds for all stages."""
    for stage in stages:
        stage.graph.lint()
        names = [n.name for n in stage.graph.nodes if n.op == "placeholder"]
        assert tuple(names[: len(stage.receives)]) == stage.receives
        assert tuple(str(n.target) for n in stage.graph.nodes if n.op == "placeholder")[len(stage.receives) :] == stage.inputs
        assert list(stage.inputs) == [name for name in inputs if name in stage.inputs]
        assert all(node.users for node in stage.graph.nodes if node.op != "output"), "nothing is there for nobody"
    assert stages[0].receives == () and stages[-1].sends == ()
    for before, after in pairwise(stages):
        assert before.sends == after.receives


def compare(
    model: nn.Module, captured: Captured, batch: Mapping[str, Tensor], count: int, starts: Sequence[str] | None = None
) -> tuple[StageGraph, ...]:
    """Split, run and compare with the whole graph."""
    loss_at = captured.loss or 0
    mark(captured.graph, starts or starts_of(captured.graph, count), captured.parameters)
    stages = split(captured.graph, count, parameters=captured.parameters, mutations=captured.mutations)
    check(stages, captured.inputs)
    whole, parts = state_of(model, captured), state_of(model, captured)
    torch.manual_seed(3)
    found = run_graph(captured.graph, whole, [batch[name] for name in captured.inputs])
    found[loss_at].backward()
    torch.manual_seed(3)
    outputs, updates, crossings = run_stages(stages, parts, batch)
    backward(outputs[loss_at], stages, crossings)
    assert list(outputs) == list(range(len(found) - len(captured.mutations)))
    for index, value in outputs.items():
        assert torch.equal(value, found[index])
    for name, value in zip(captured.mutations, found[len(outputs) :], strict=True):
        assert torch.equal(updates[name], value), name
    for name in captured.parameters:
        assert whole[name].grad is not None
        torch.testing.assert_close(parts[name].grad, whole[name].grad, rtol=1e-12, atol=1e-14, msg=name)
    return stages
