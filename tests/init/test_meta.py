"""Models built without memory get the values that building them for real gives, bit for bit, one tensor at a time."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import meshpar as mp
from meshpar.errors import MeshparError
from meshpar.init.meta import materialise, meta


def computed(model: nn.Module, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All parameters and buffers as `materialise` gives them."""
    values: dict[str, torch.Tensor] = {}
    buffers = materialise(model, [name for name, _ in model.named_parameters()], values.__setitem__, **options)
    return values, buffers


def check_same(build: Callable[[], nn.Module]) -> nn.Module:
    """Build for real, and under `meta()` with the same seed: every parameter and buffer must be the same."""
    torch.manual_seed(3)
    real = build()
    torch.manual_seed(3)
    with meta():
        model = build()
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    torch.manual_seed(99)  # what happens in between must not matter
    before = torch.get_rng_state()
    values, buffers = computed(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(values) and values.keys() == dict(real.named_parameters()).keys()
    for name, parameter in real.named_parameters():
        assert values[name].dtype == parameter.dtype and values[name].stride() == parameter.stride(), name
        assert torch.equal(values[name], parameter), name
    assert buffers.keys() == dict(real.named_buffers()).keys()
    for name, buffer in real.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    again, _ = computed(model, seed=3)
    assert all(torch.equal(again[name], values[name]) for name in values)
    return model


class Filled(nn.Module):
    """Every way to fill a parameter, a buffer or an attribute that constructors use."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = nn.Parameter(torch.randn(20, 20) * 0.3)
        nn.init.trunc_normal_(self.scaled, std=0.02, a=-0.01, b=0.01)
        self.log = nn.Parameter(torch.arange(1, 5).float().log())
        self.tied = self.log
        self.linear = nn.Linear(20, 20)
        nn.init.orthogonal_(self.linear.weight)
        self.like = nn.Parameter(torch.randn_like(torch.arange(5.0)))
        self.table = nn.Embedding(7, 4, padding_idx=2)
        with torch.no_grad():
            self.linear.weight.div_(2.0)
            self.linear.weight[3].normal_()
            self.scaled.mul_(self.scaled.std())
        self.sparse = nn.Linear(3, 3)
        nn.init.sparse_(self.sparse.weight, 0.3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.assigned = nn.Linear(4, 4)
        self.assigned.weight.data = torch.eye(4)
        self.copied = nn.Linear(4, 4)
        self.copied.weight.data.copy_(self.assigned.weight)
        self.copied.weight.data = self.copied.weight.data * 3
        self.clone = copy.deepcopy(self.copied)
        self.low = nn.Parameter(torch.rand(17).to(torch.bfloat16))
        self.noise = nn.Parameter(torch.bernoulli(torch.full((9,), 0.5)))
        self.rows = nn.Parameter(torch.stack([torch.randn(3) for _ in range(3)]).t())
        self.drawn = nn.Parameter(torch.multinomial(torch.rand(9), 3).float())
        own = torch.Generator().manual_seed(3)
        self.own = nn.Parameter(torch.randn(5, generator=own))
        self.own_again = nn.Parameter(torch.empty(20).uniform_(generator=own))
        plain = torch.zeros(33)
        plain.normal_()
        self.plain = nn.Parameter(plain)
        data = torch.arange(40.0)
        data.normal_()
        self.data = nn.Parameter(data)
        self.register_buffer("positions", torch.zeros(6, 4))
        self.positions[:, 0::2] = torch.sin(torch.arange(6.0)[:, None])
        self.register_buffer("view", torch.zeros(6, 4).unsqueeze(0), persistent=False)
        self.register_buffer("random", torch.randn(4))
        self.norm = nn.BatchNorm1d(4)
        self.scale = torch.ones(3) * 2
        self.rates = [x.item() for x in torch.linspace(0, 0.1, 3)]
        self.order = torch.randperm(5)
        self.maximum = float(self.scaled.detach().abs().max())
        self.numbers = (torch.ones(2).tolist(), torch.full((2,), 3.0).numpy().sum(), self.own.detach().numpy().tolist())
        self.last = nn.Linear(50, 50)


class OnCpuOnly(nn.Module):
    """Constructors that skip their work on meta, or put new tensors where their weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        if self.linear.weight.device.type != "meta" and not self.linear.weight.is_meta:
            nn.init.normal_(self.linear.weight)
        self.offset = nn.Parameter(torch.zeros(3, device=self.linear.weight.device))


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(3, 4),
        lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GRU(4, 5, bidirectional=True), nn.MultiheadAttention(8, 2)),
        Filled,
        OnCpuOnly,
    ],
    ids=["linear", "transformer", "modules", "filled", "on cpu only"],
)
def test_the_values_are_those_of_real_construction(build: Callable[[], nn.Module]) -> None:
    model = check_same(build)
    if isinstance(model, Filled):
        assert model.tied is model.log and model.scale.tolist() == [2, 2, 2]
        torch.manual_seed(3)
        real = Filled()
        assert (model.order.tolist(), model.rates, model.maximum) == (real.order.tolist(), real.rates, real.maximum)
        assert model.numbers == real.numbers


def transformers_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 131, "max_position_embeddings": 32, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=True)
    else:
        config = transformers.GPT2Config(vocab_size=131, n_positions=32, n_layer=2, n_embd=16, n_head=2)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_models(kind: str) -> None:
    model = check_same(lambda: transformers_model(kind))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_plain_meta_model_initialises_itself(kind: str) -> None:
    with torch.device("meta"):
        model = transformers_model(kind)
    real = transformers_model(kind)
    values, buffers = computed(model, seed=1)
    for name, buffer in real.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    for name, parameter in real.named_parameters():
        if parameter.ndim > 1:
            assert 0.5 < values[name].std() / parameter.std() < 2, name
        else:
            assert torch.equal(values[name], parameter), name
    assert all(torch.equal(value, values[name]) for name, value in computed(model, seed=1)[0].items())
    assert any(not torch.equal(value, values[name]) for name, value in computed(model, seed=2)[0].items())


def test_a_part_of_the_parameters_gets_the_same_values() -> None:
    """A rank of a pipeline asks for its own stage only."""
    torch.manual_seed(0)
    with meta():
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    everything, _ = computed(model)
    part: dict[str, torch.Tensor] = {}
    materialise(model, ["3.weight", "1.bias"], part.__setitem__)
    assert sorted(part) == ["1.bias", "3.weight"]
    assert all(torch.equal(value, everything[name]) for name, value in part.items())


def test_plain_meta_modules_reset_like_their_constructors() -> None:
    torch.manual_seed(0)
    real = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.BatchNorm1d(4))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.BatchNorm1d(4))
    values, buffers = computed(model, seed=0)
    assert torch.equal(values["0.weight"], real[0].weight)  # the first to draw
    assert not values["1.out_proj.bias"].any()  # the parent resets after the child
    assert buffers["2.running_var"].tolist() == [1, 1, 1, 1]


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.arange(3.0))


def test_what_nothing_initialises_is_named() -> None:
    with torch.device("meta"):
        model = Bare()
    with pytest.raises(MeshparError) as caught:
        computed(model)
    assert "nothing gives these tensors a value" in str(caught.value) and "mp.meta()" in str(caught.value)
    assert str(caught.value).splitlines()[1:] == ["  scale", "  table"]
    with meta():
        model = Bare()
    assert computed(model)[0]["scale"].tolist() == [1, 1]


def test_a_real_model_is_handed_on() -> None:
    model = Bare()
    values, buffers = computed(model)
    assert values["scale"].data_ptr() == model.scale.data_ptr() and buffers["table"] is model.table


def test_dtype_casts_floating_values() -> None:
    with meta():
        model = nn.Linear(2, 2)
    assert computed(model, dtype=torch.bfloat16)[0]["weight"].dtype == torch.bfloat16


def test_one_block_per_model() -> None:
    with meta():
        first = nn.Linear(2, 2)
    with pytest.raises(MeshparError, match="build the whole model in one"), meta():
        nn.init.zeros_(first.weight)


def test_simulated_ranks_share_one_value(simulated: Callable[[int], Any]) -> None:
    torch.manual_seed(0)
    real = nn.Linear(3, 3)
    torch.manual_seed(0)
    with meta():
        outside = nn.Linear(3, 3)
    with simulated(2):
        torch.manual_seed(0)
        with meta():
            inside = nn.Linear(3, 3)
        found = [computed(outside)[0], computed(inside)[0], computed(real)[0]]
    for values in found:
        assert all(torch.equal(values[name], parameter) for name, parameter in real.named_parameters())


MEMORY = """
import resource, torch
from torch import nn
from meshpar.init.meta import materialise, meta
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nn.Linear(8, 8)
start = peak()
with meta():
    model = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(16)])  # 256 MiB
    for layer in model:
        nn.init.normal_(layer.weight)   # as transformers does: all once more after all are built
    for layer in model:
        layer.weight.data.div_(3.0)     # and changed once more at the end
built = peak()
kept = {}
materialise(model, [n for n, _ in model.named_parameters()], lambda name, value: kept.update({name: value[:8].clone()}))
print(built - start, peak() - built)
"""


def test_memory_stays_at_a_few_tensors() -> None:
    """256 MiB of parameters: nothing while building, then one tensor of 16 MiB, its scratch memory, and what it is computed with."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    building, computing = (int(word) / (1 if sys.platform == "darwin" else 1024) for word in done.stdout.split())
    assert building < 16 and computing < 80, done.stdout


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_on_meta_on_simulated_ranks(inside: bool) -> None:
    def built() -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    outside = built()
    with mp.simulate(2):
        model = built() if inside else outside
        torch.manual_seed(0)
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=(torch.ones(4, 8),), loss_fn=lambda output, batch: output.mean())
        torch.manual_seed(0)
        expected = nn.Linear(8, 8)
        torch.testing.assert_close(mp.full_tensor(dict(pm.named_parameters())["0.weight"]), expected.weight.data)
        pm.train_step(torch.randn(4, 8))
