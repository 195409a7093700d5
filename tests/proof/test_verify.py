"""verify() passes on right programs and fails on wrong ones."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from meshpar._torch import local_of
from meshpar.api import parallelize
from meshpar.config import ParallelConfig
from meshpar.errors import BatchError, ConfigError
from meshpar.graph.operators import OPERATORS
from meshpar.mesh import local_batch, make_mesh
from meshpar.ops import collectives
from meshpar.proof.report import Difference, Report, VerificationError
from meshpar.proof.verify import verify
from meshpar.sharding.rules import row
from meshpar.simulate import local_tensors, simulate
from tests.capture.models import GPT


def gpt(**options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(width=16, heads=4, layers=2, vocab=38, length=8, **options)


def ids(samples: int = 4, length: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 38, (samples, length), generator=generator)
    targets = tokens.clone()
    targets[0, :5] = -100  # uneven over samples
    return tokens, targets


def test_a_handwritten_gpt_with_fused_qkv_and_dropout() -> None:
    model = gpt(dropout=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = verify(model, "dp=2,tp=2", ids(), steps=2, config=ParallelConfig(microbatches=2))
    assert report.ok, str(report)
    assert max(d.largest for d in report.differences) < 1e-12
    assert report["gradients"].compared == len(before) and report["loss"].compared == 2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.blocks[0].mlp[3].p == 0.1  # the model itself is left alone


def test_a_model_that_computes_in_float32_inside_is_compared_in_float64() -> None:
    pytest.importorskip("transformers")
    from meshpar.cli.causal_lm import Corpus, SmallSizes, small_model

    model = small_model("llama", SmallSizes(layers=1, hidden=32, heads=4, kv_heads=2, sequence=16))
    report = verify(model, "tp=2", Corpus().batch(0, samples=2, sequence=16))
    assert report.ok and max(d.largest for d in report.differences) < 1e-12, str(report)


class Masked(nn.Module):
    """Buffers of booleans, infinities and complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.ones(4, 4).tril().bool())
        self.register_buffer("mask", torch.zeros(4, 4).masked_fill(~self.seen, -torch.inf))
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.linear(x) @ x.transpose(-1, -2) + self.mask).masked_fill(~self.seen, -torch.inf)
        return (scores.softmax(-1) @ torch.view_as_real(x * self.turn).sum(-1)).square().mean()


def test_buffers_of_any_kind() -> None:
    report = verify(Masked(), "dp=2,tp=2", (torch.randn(4, 4, 4),)).raise_if_failed()
    assert report["buffers"].compared == 3


def test_float32() -> None:
    report = verify(gpt(), "tp=2", ids(), dtype=torch.float32).raise_if_failed()
    assert report.tolerance == 1e-5 and max(d.largest for d in report.differences) > 1e-9


@pytest.mark.sweep(1)
@pytest.mark.parametrize("broken", ["i_to_r", "p_to_i"])
def test_a_missing_collective_is_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(x: Tensor, **where: Any) -> Tensor:
        return x.clone()

    nothing.__name__ = broken
    monkeypatch.setattr(collectives, broken, nothing)
    report = verify(gpt(), "tp=2", ids(), config=ParallelConfig(sequence_parallel=False), steps=1)
    assert not report.ok
    assert report["gradients"].largest > 1e-3
    assert (report["loss"].largest > 1e-3) == (broken == "p_to_i")  # the other breaks gradients alone
    with pytest.raises(VerificationError, match="FAILED"):
        report.raise_if_failed()


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).softmax(-1))


def squares(output: Tensor, batch: Any) -> Tensor:
    return output.pow(2).sum() / 32


def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 8)
    assert verify(Gate(), "tp=2", (x,), loss_fn=squares).ok
    for name in ("softmax", "_softmax"):
        monkeypatch.setitem(OPERATORS, name, replace(OPERATORS[name], rule=row("... c -> ... c")))  # it sums over c
    report = verify(Gate(), "tp=2", {"x": x}, loss_fn=squares)
    assert not report.ok and report["loss"].largest > 1e-3, str(report)


def test_a_loss_is_needed() -> None:
    with pytest.raises(BatchError, match="loss_fn="):
        verify(Gate(), "tp=2", (torch.randn(4, 8),))


def test_running_statistics_are_compared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    report = verify(model, "dp=2", (torch.randn(8, 8),), loss_fn=squares)
    assert report.ok, str(report)
    assert report["buffers"].compared == 3


def test_gradients_that_are_none() -> None:
    class Unused(Gate):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)
            self.up.bias.requires_grad_(False)

    assert verify(Unused(), "tp=2", (torch.randn(4, 8),), loss_fn=squares).ok


def test_inside_simulated_ranks_with_their_mesh() -> None:
    model, x = Gate(), torch.randn(4, 8)
    with simulate(2):
        report = verify(model, make_mesh("tp=2", "cpu"), (x,), loss_fn=squares)
    assert report.ok and report.ranks == "simulated ranks"


def test_a_difference_on_ranks_that_exist_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("softmax", "_softmax"):
        monkeypatch.setitem(OPERATORS, name, replace(OPERATORS[name], rule=row("... c -> ... c")))
    with simulate(2):
        report = verify(Gate(), make_mesh("tp=2", "cpu"), (torch.randn(4, 8),), loss_fn=squares)
    assert not report.agrees and "where they part first was not looked for" in str(report)
    assert 'mp.verify(model, "tp=2", batch) names the first operation' in report.where[0]


def test_real_processes() -> None:
    report = verify(gpt(), "dp=2,tp=2", ids(), processes=True, steps=2)
    assert report.ok, str(report)
    assert report.ranks == "gloo processes" and report["loss"].compared == 2


def test_what_cannot_be_meant() -> None:
    with pytest.raises(ConfigError, match="float32 or torch.bfloat16"):
        verify(Gate(), "tp=2", (torch.randn(4, 8),), dtype=torch.float16)
    with pytest.raises(ConfigError, match="at least 1"):
        verify(Gate(), "tp=2", (torch.randn(4, 8),), steps=0)
    with pytest.raises(ConfigError, match="not a dict"):
        verify(Gate(), "tp=2", torch.randn(4, 8))  # type: ignore[arg-type]
    with torch.device("meta"):
        bare = Gate()
    with pytest.raises(ConfigError, match="up.weight is on the meta device"):
        verify(bare, "tp=2", (torch.randn(4, 8),))


def test_the_table() -> None:
    good = Difference("loss", 1, 2e-16, (("step 1", 2e-16),))
    bad = Difference("gradients", 2, inf, (("a.weight", inf), ("b.weight", 1e-15)))
    report = Report("Net", {"dp": 1, "tp": 2}, "simulated ranks", torch.float64, 1, 1e-9, (good, bad), ("look here",))
    assert not report.ok
    assert str(report).splitlines() == [
        "verify Net on dp=1,tp=2 (2 simulated ranks) against one device, in float64: FAILED",
        "             compared  largest relative difference   (tolerance 1e-09)",
        "  loss              1  2.0e-16  ok",
        "  gradients         2     inf   FAILED  a.weight inf, b.weight 1.0e-15",
        "  note: look here",
    ]
    dead = Report("Net", {"tp": 2}, "simulated ranks", torch.float64, 1, 1e-9, (good,), unproved=("all is zero.",))
    assert not dead.ok and dead.agrees
    assert str(dead).splitlines()[0].endswith(": PROVES NOTHING") and str(dead).splitlines()[-1] == "  proves nothing: all is zero."
    with pytest.raises(VerificationError, match="all is zero"):
        dead.raise_if_failed()


class Pictured(nn.Module):
    """Images in texts: the patches of all images one after the other, as many rows as an image has patches for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.vision = nn.Embedding(11, 8), nn.Linear(6, 8)
        self.layer, self.head = nn.Linear(8, 16), nn.Linear(16, 11)

    def forward(self, ids: Tensor, labels: Tensor, patches: Tensor, count: Tensor) -> Tensor:
        x, mask = self.embed(ids), ids == 1
        features = torch.cat([each - each.mean(0) for each in self.vision(patches).split(count.tolist())])
        if int(mask.sum()) != features.shape[0]:
            raise ValueError("images and tokens do not match")
        x = x.masked_scatter(mask.unsqueeze(-1).expand_as(x), features)
        return nn.functional.cross_entropy(self.head(self.layer(x).relu()).flatten(0, 1), labels.flatten())


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("mesh", "microbatches"), [("dp=2,tp=2", 1), ("dp=2", 2), ("pp=2", 2)])
def test_several_rows_of_each_sample(mesh: str, microbatches: int) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(2, 11, (4, 7))
    tokens[:, 1:4] = 1
    batch = {"ids": tokens, "labels": torch.randint(0, 11, (4, 7)), "patches": torch.randn(12, 6), "count": torch.full((4,), 3)}
    report = verify(Pictured(), mesh, batch, config=ParallelConfig(microbatches=microbatches))
    assert report.ok, str(report)


def test_several_rows_of_each_sample_of_a_local_batch() -> None:
    """Every data rank passes its own samples' rows, as `local_batch` cuts them."""
    torch.manual_seed(0)
    tokens = torch.randint(2, 11, (4, 7))
    tokens[:, 1:4] = 1
    batch = {"ids": tokens, "labels": torch.randint(0, 11, (4, 7)), "patches": torch.randn(12, 6), "count": torch.full((4,), 3)}
    model = Pictured().double()
    batch["patches"] = batch["patches"].double()
    wanted = model(**batch)
    (gradient,) = torch.autograd.grad(wanted, [model.vision.weight])
    with simulate(2):
        mesh = make_mesh("dp=2")
        local = local_batch(batch, mesh)
        pm = parallelize(model, mesh, example=local)
        loss = pm.train_step(**local)
        found = dict(pm.named_parameters())["vision.weight"].grad
        assert found is not None
        for part in (*local_tensors(loss).values(),):
            torch.testing.assert_close(part.reshape(()), wanted.detach())
        for part in local_tensors(local_of(found)).values():
            torch.testing.assert_close(part, gradient)


class Statistics(nn.Module):
    """Normalised over samples, and a table whose gradients are divided by how often its rows are read."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(5, 6, scale_grad_by_freq=True), nn.BatchNorm1d(6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.table(ids)).square().mean(-1).mean()


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2"])
def test_statistics_of_microbatches_are_named(mesh: str) -> None:
    batch = {"ids": torch.tensor([0, 1, 2, 3, 4, 0, 0, 1])}
    report = verify(Statistics(), mesh, batch, config=ParallelConfig(microbatches=2))
    assert any("the samples of a microbatch, not of the whole batch: table, norm." in note for note in report.notes), report
    assert not any("capture that differs" in note for note in report.notes)
    assert verify(Statistics(), mesh, batch).ok


# ---- torch.utils.checkpoint ------------------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Computes in float32 inside what is checkpointed, once within another checkpoint."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.how = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8), how

    def block(self, x: Tensor) -> Tensor:
        wide = x.float() * x.float().square().mean(-1, True).rsqrt()
        return self.down(torch.tanh(self.up(wide.to(x.dtype))))

    def twice(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.block(x), use_reentrant=self.how == "nested reentrant")

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.norm.weight
        if self.how == "sequential":
            return checkpoint_sequential([self.block, self.block], 2, x, use_reentrant=False).square().mean()
        run = self.twice if "nested" in self.how else self.block
        return checkpoint(run, x, use_reentrant=self.how.endswith("reentrant")).square().mean()


@pytest.mark.sweep(4)
@pytest.mark.parametrize("how", ["reentrant", "plain", "nested reentrant", "nested", "sequential"])
def test_checkpoints_inside_the_model(how: str) -> None:
    torch.manual_seed(0)
    report = verify(Checkpointed(how), "tp=2", {"x": torch.randn(4, 8)}).raise_if_failed()
    assert max(d.largest for d in report.differences) < 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(reentrant: bool) -> None:
    pytest.importorskip("transformers")
    from meshpar.cli.causal_lm import Corpus, SmallSizes, small_model

    model = small_model("llama", SmallSizes(layers=1, hidden=32, heads=4, kv_heads=2, sequence=16))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    report = verify(model, "tp=2", Corpus().batch(0, samples=2, sequence=16)).raise_if_failed()
    assert max(d.largest for d in report.differences) < 1e-12


# ---- what proves nothing ---------------------------------------------------------------------------------------------------------------


class Dead(nn.Module):
    """`how` its loss says nothing of what it computes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(8, 16), nn.Linear(16, 8), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.up(x))
        losses = {
            "zero": lambda: y.square().mean() * 0,
            "relu": lambda: (self.down(nn.functional.relu(self.up(x) - 1e3)) * 0 + y * 0).square().sum(),
            "penalty": lambda: sum(p.square().sum() for p in self.parameters()),
            "detached input": lambda: y.detach().square().mean() + self.up.weight.sum() + self.down.weight.square().sum(),
            "alike": lambda: self.alike(nn.functional.normalize(self.down(self.up(x * 0)), dim=1)),
            "nan": lambda: (y.sum() - y.sum()) / 0,
            "inf": lambda: y.square().mean() / 0,
            "ignored": lambda: nn.functional.cross_entropy(y, torch.full((len(x),), -100)),
        }
        return losses[self.how]()  # type: ignore[no-any-return]

    def alike(self, rows: Tensor) -> Tensor:
        """A contrastive loss of samples that are all the same: what they gain by each other cancels, up to rounding."""
        return nn.functional.cross_entropy(rows @ rows.t(), torch.arange(len(rows)))


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("zero", "every gradient of the model on one device is zero"),
        ("relu", "every gradient of the model on one device is zero"),
        ("alike", "every gradient of the model on one device is zero but for rounding"),
        ("penalty", "do not depend on the batch"),
        ("detached input", "do not depend on the batch"),
        ("nan", "is nan in step 1"),
        ("inf", "is inf in step 1"),
        ("ignored", "is nan in step 1"),
    ],
)
def test_two_dead_models_prove_nothing(how: str, words: str) -> None:
    report = verify(Dead(how), "tp=2", {"x": torch.randn(4, 8)}, steps=1)
    assert not report.ok and words in report.unproved[0], report
    assert words in str(report)


class Half(nn.Module):
    """A trunk of three layers whose last output is switched off, under a head that learns its bias alone; `alive` gives the trunk a way."""

    def __init__(self, alive: float) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head, self.alive = nn.Linear(8, 8), alive

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.relu(self.trunk(x) - 1e3)) + self.alive * self.trunk(x)
        return (y - x).square().mean()


def test_a_dead_trunk_under_a_live_bias() -> None:
    x = torch.randn(4, 8)
    dead = verify(Half(0.0), "tp=2", {"x": x})
    assert dead.agrees and not dead.ok and "most of the model is silent: the gradients of trunk.0.weight, trunk.0.bias" in str(dead)
    assert "(7 of 8 parameters)" in dead.unproved[0] and "head.bias" not in dead.silent and len(dead.silent) == 7
    tiny = verify(Half(1e-13), "tp=2", {"x": x})
    assert not tiny.ok and tiny.silent == dead.silent, "not zero, but nobody would miss them"
    part = verify(Half(1.0), "tp=2", {"x": x})
    assert part.ok and part.silent == ("head.weight",) and not part.notes
    assert "of head.weight nothing is proved: zero gradients on one device" in str(part)


def test_samples_that_are_the_same_on_all_data_ranks() -> None:
    x = torch.randn(2, 8)
    report = verify(Gate(), "dp=2", (x.repeat(2, 1),), loss_fn=squares)
    assert report.agrees and not report.ok and "all 2 data ranks get the same samples" in report.unproved[0], report
    assert verify(Gate(), "tp=2", (x.repeat(2, 1),), loss_fn=squares).ok
    assert verify(Gate(), "tp=2", (x[:1],), loss_fn=squares).ok  # one sample is enough where samples are not divided


def test_bags_of_words_depend_on_their_batch() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids).sum(1)).square().mean()

    assert verify(Bag(), "tp=2", (torch.randint(11, (1, 6)),)).ok
    assert verify(Bag(), "dp=2", (torch.arange(12).remainder(11).view(2, 6),)).ok


def test_nothing_to_train() -> None:
    frozen = Gate().requires_grad_(False)
    with pytest.raises(ConfigError, match="every parameter has requires_grad=False"):
        verify(frozen, "tp=2", (torch.randn(4, 8),), loss_fn=squares)
    with pytest.raises(ConfigError, match="4 parameters are trained, but the loss is detached"):
        verify(Gate(), "tp=2", (torch.randn(4, 8),), loss_fn=lambda output, batch: output.detach().square().sum())


# ---- bfloat16 --------------------------------------------------------------------------------------------------------------------------


def test_bfloat16() -> None:
    report = verify(gpt(), "dp=2,tp=2", ids(), dtype=torch.bfloat16, steps=1).raise_if_failed()
    assert 1e-3 < max(d.largest for d in report.differences) < 4  # units of what the dtype does to the model itself: 6 are allowed
    assert "in units of what bfloat16 does to the model on one device" in str(report)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("broken", ["i_to_r", "p_to_i"])
def test_a_missing_collective_is_caught_in_bfloat16(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(x: Tensor, **where: Any) -> Tensor:
        return x.clone()

    nothing.__name__ = broken
    monkeypatch.setattr(collectives, broken, nothing)
    report = verify(gpt(), "tp=2", ids(), dtype=torch.bfloat16, config=ParallelConfig(sequence_parallel=False), steps=1)
    assert not report.ok and report["gradients"].largest > 20
    assert "on tp" in report.where[0]


def test_a_model_that_bfloat16_cannot_carry() -> None:
    class Cancelling(Gate):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return (y + 300) - 300

    report = verify(Cancelling(), "tp=2", (torch.randn(4, 8),), loss_fn=squares, dtype=torch.bfloat16)
    assert not report.ok and "Compare in float64" in report.unproved[0], report


# ---- notes -----------------------------------------------------------------------------------------------------------------------------


def test_no_notes_on_what_is_exact() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru = nn.LSTM(8, 8, num_layers=2, dropout=0.1), nn.GRU(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(self.lstm(x)[0])[0].square().mean()

    report = verify(Recurrent(), "tp=2", (torch.randn(4, 3, 8),)).raise_if_failed()
    assert report.notes == ()
    report = verify(Gate(), "tp=2", (torch.randn(4, 8),), loss_fn=lambda y, _: y.square().mean(), config=ParallelConfig(microbatches=2))
    assert report.ok and report.notes == ()  # the mean of means of equal parts is the mean
