"""A forward may ask tensors for their values: it goes the way of the example, and the graph checks that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.capture.export import capture
from meshpar.compile.split import mark, split
from meshpar.errors import BatchError, CaptureError
from meshpar.graph.facts import facts
from meshpar.graph.run import run
from meshpar.ops.expect import EXPECT, expect
from tests.capture.models import assert_same, perturbed


class Asking(nn.Module):
    """Takes another way for a causal mask, found out by looking at the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        mask = (steps[:, None] >= steps).logical_not()
        if (mask == torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)).all() and steps[-1].item() == x.shape[1] - 1:
            x = self.layer(x)
        scores = (x @ x.transpose(1, 2)).masked_fill(mask, float("-inf"))
        return (scores.softmax(-1) @ x).pow(2).mean()


def test_a_mask_that_is_looked_at() -> None:
    captured = assert_same(perturbed(Asking()), (torch.randn(2, 5, 8, dtype=torch.double),), {}, loss=lambda output: output)
    assert any(node.target is torch.ops.aten.linear.default for node in captured.graph.nodes)


def test_nothing_is_printed_of_a_question_that_is_asked_in_another_way(capfd: pytest.CaptureFixture[str]) -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.layer(x)
            return y.sum() * 0 if y[mask].shape[0] == 0 else y[mask].square().mean()

    capture(Chosen(), (), {"x": torch.randn(6, 4), "mask": torch.tensor([True, False, True, True, False, False])})
    assert capfd.readouterr() == ("", "")


def test_torch_transformer_with_a_causal_mask() -> None:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.body = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1]).to(self.embed.weight.dtype)
            return F.mse_loss(self.body(self.embed(source), self.embed(target), tgt_mask=mask), self.embed(target))

    batch = {"source": torch.randint(0, 11, (2, 5)), "target": torch.randint(0, 11, (2, 4))}
    assert_same(perturbed(Translator()), (), batch, loss=lambda output: output)


@pytest.mark.parametrize("make", [lambda x: torch.rand(3), lambda x: torch.randn(3), lambda x: torch.zeros(3).uniform_()])
def test_a_branch_that_is_drawn_is_refused(make: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if make(x).sum() > 0.5 else x

    with pytest.raises(CaptureError, match="draws a random number to decide what to do at test_branches.py:.*make"):
        capture(Model(), (torch.randn(3),))


def test_a_draw_that_decides_nothing() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if torch.rand([]) < 0.0 else x * 2

    assert _checks(Model(), torch.randn(3)) == []


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.double))


class Choosing(Scaled):
    """Takes the way that `ask` says."""

    def __init__(self, ask: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale * 2 if self.ask(x * self.scale) else x * self.scale * 3).sum()


ASKING: list[Callable[[Tensor], Any]] = [
    lambda y: y.max() > 10,
    lambda y: (y > 10).any().item(),
    lambda y: torch.equal(y, y.clamp(max=10)) is False,
    lambda y: not torch.allclose(y, y.clamp(max=10)),
    lambda y: int((y > 10).any()) == 1,
    lambda y: (y > 10).sum(),  # a number as a truth
    lambda y: y.clamp(min=10).sum() - 10 * y.numel(),  # a floating one
    lambda y: y.clone().mul_(2).max() > 20,  # overwritten on the way
    lambda y: _overwritten_later(y),
]


def _overwritten_later(y: Tensor) -> bool:
    z = y.clone()
    high = z.max() > 10
    z.fill_(0)
    return bool(high) and not bool(z.any())


@pytest.mark.parametrize("ask", ASKING)
def test_the_way_of_the_example_is_kept_and_checked(ask: Callable[[Tensor], Any]) -> None:
    model = Choosing(ask)
    low, high = torch.arange(4, dtype=torch.double), torch.arange(4, dtype=torch.double) + 4
    for example, other in ((low, high), (high, low)):
        captured = assert_same(model, (example,), {}, loss=lambda output: output)
        state = dict(model.named_parameters())
        torch.testing.assert_close(run(captured, state, {"x": example + 0.125})[0], model(example + 0.125))
        with pytest.raises(BatchError, match="asks for a value at test_branches.py:.*for the example.*for this batch"):
            run(captured, state, {"x": other})


def test_numbers_of_the_batch_become_constants() -> None:
    class Model(Scaled):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            x = x * self.scale
            first, second = x.split(lengths.tolist())
            return first.sum() * int(lengths.max()) + second.pow(2).sum() * lengths[0].item()

    model, x, lengths = Model(), torch.randn(5, dtype=torch.double), torch.tensor([2, 3])
    captured = assert_same(model, (x, lengths), {}, loss=lambda output: output)
    for other, told in (([1, 3], "2 for the example.*1 for this batch"), ([2, 4], "3 for the example.*4 for this batch")):
        with pytest.raises(BatchError, match=f"lengths.tolist.*: {told}"):
            run(captured, dict(model.named_parameters()), {"x": x, "lengths": torch.tensor(other)})


def test_numbers_that_depend_on_parameters_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            best = int(self.layer(x).argmax())
            return x[:best].sum() if best else x.sum()

    with pytest.raises(CaptureError, match="turns the values of a tensor"):
        capture(Model(), (torch.randn(3),))


def test_numbers_for_numpy_are_refused() -> None:
    class Model(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            order = (x * self.scale).detach().numpy().argsort()
            return (x[torch.from_numpy(order)] * self.scale).cumsum(0).sum()

    with pytest.raises(CaptureError, match="at test_branches.py.*NumPy, whose results a graph cannot hold.\n.*custom_op"):
        capture(Model(), (torch.randn(3, dtype=torch.double),))


def test_values_that_are_not_there() -> None:
    """Parameters are guessed, whichever way the guess goes; inputs are not."""
    with torch.device("meta"):
        model = Choosing(ASKING[0])
    assert len(_checks(model, torch.arange(4, dtype=torch.double))) == 1
    with pytest.raises(CaptureError, match="turns the values of a tensor"):
        capture(model, (torch.arange(4, dtype=torch.double, device="meta"),))


def test_what_was_written_to_is_known() -> None:
    class Model(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            x = x * self.scale
            mask = torch.zeros(3, dtype=x.dtype)
            mask[1:2] = 3
            y = x * 2 if mask.sum() > 0 else x
            mask[0:1].add_(x[:1])
            return (y * 3 if mask.sum() > 10 else y).sum()

    x = torch.tensor([1.0, 2, 3], dtype=torch.double)
    assert_same(Model(), (x,), {}, loss=lambda output: output)
    assert len(_checks(Model(), x)) == 1
    assert_same(Model(), (x + 10,), {}, loss=lambda output: output)


def test_more_samples_than_the_example_has() -> None:
    model = Choosing(lambda y: y.max() > 10)
    captured = capture(model, (torch.tensor([1.0, 7.0], dtype=torch.double),), scale=3)
    assert [node.args[1] for node in captured.graph.nodes if node.target is EXPECT] == [[1]]


def test_sections_without_gradients_and_with_another_precision() -> None:
    class Model(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            x = x * self.scale
            with torch.no_grad():
                high = bool(x.max() > 1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                low = bool((x.float()[None] @ x.float()[:, None]).min() < 0)
            return (x * 2 if high and not low else x).sum()

    assert_same(Model(), (torch.tensor([0.5, 1.5], dtype=torch.double),), {}, loss=lambda output: output)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_one_rank_sees_counts_for_all(recompute: Any) -> None:
    """The labels of one data rank alone go another way: the step is refused as it would be on one device."""
    torch.manual_seed(0)
    model = Guarded()
    ids, labels = torch.randint(12, (4, 6)), torch.randint(11, (4, 6))
    with mp.simulate(4):
        mesh = mp.make_mesh("dp=2,tp=2")
        share = mp.local_batch({"ids": ids, "labels": labels}, mesh)
        parallel = mp.parallelize(model, mesh, example=share, config=mp.ParallelConfig(recompute=recompute))
        parallel.train_step(**share)
        labels[3, 5] = 12
        with pytest.raises(BatchError, match="labels.max.. >= 12.*False for the example.*True for this batch"):
            parallel.train_step(**mp.local_batch({"ids": ids, "labels": labels}, mesh))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_check_stays(backend: str) -> None:
    def double(x: Tensor) -> Tensor:
        expect(x.max() > 5, [0], "")
        return x * 2

    compiled = torch.compile(double, backend=backend)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    with pytest.raises(BatchError):
        compiled(torch.full((3,), 6.0))


def test_a_stage_keeps_its_checks() -> None:
    captured = capture(Guarded(), (), {"ids": torch.randint(12, (4, 6)), "labels": torch.randint(12, (4, 6))})
    checks = [node.name for node in captured.graph.nodes if node.target is EXPECT]
    second = next(n.name for n in captured.graph.nodes if n.op == "call_function" and facts(n).module == "blocks.1.0")
    mark(captured.graph, [second], captured.parameters)
    stages = split(captured.graph, 2, parameters=captured.parameters)
    found = [[node.name for node in stage.graph.nodes if node.target is EXPECT] for stage in stages]
    assert found == [checks[:2], checks[2:]]


def test_a_parameter_that_is_clamped_to_bounds_it_keeps() -> None:
    class Model(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            self.scale.data.clamp_(-3, 3)
            return (x * self.scale).square().sum()

    model, x = Model(), torch.randn(3, dtype=torch.double)
    captured = assert_same(model, (x,), {}, loss=lambda output: output)
    assert captured.mutations == ()
    with pytest.raises(BatchError, match="at test_branches.py:[0-9]+, whether scale keeps the bounds.*True for the example"):
        run(captured, {"scale": torch.tensor(4.0, dtype=torch.double)}, {"x": x})


def _checks(model: nn.Module, *args: Tensor) -> list[Any]:
    return [node for node in capture(model, args).graph.nodes if node.target is EXPECT]


class Guarded(nn.Module):
    """Two layers; the first block looks at the batch, the second at its activations, a module of its own at the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), Finite()) for _ in range(2)])
        self.head = nn.Linear(8, 12)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        if labels.max() >= 12:
            raise ValueError("labels out of range")
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Finite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.isnan().sum() == 0, "not a number"
        return x


class Attending(nn.Module):
    """Attention among the rows that a mask chooses of each sample."""

    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.choose = choose
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        chosen = self.choose(self.before(x), mask).reshape(x.shape[0], -1, 8)
        mixed = F.scaled_dot_product_attention(chosen, chosen, chosen)
        return self.after(mixed[:, -1]).pow(2).mean() + mixed.cumsum(1).mean()


CHOOSING: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, mask: x[mask],
    lambda x, mask: x[mask, :],
    lambda x, mask: x[~mask],
    lambda x, mask: x.masked_select(mask.unsqueeze(-1).expand(*x.shape)),
    lambda x, mask: x[(mask.sum(1) >= 0)][:, :3],  # all samples
]
EVEN = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 1], [0, 1, 1, 1, 0, 0]]).bool()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("choose", CHOOSING)
def test_as_many_rows_of_every_sample(choose: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Attending(choose).double(), torch.randn(4, 6, 8, dtype=torch.double)
    captured = assert_same(model, (x, EVEN), {}, loss=lambda output: output)
    other = EVEN.roll(1, 0)
    torch.testing.assert_close(run(captured, dict(model.named_parameters()), {"x": x, "mask": other})[0], model(x, other))
    if choose is not CHOOSING[-1]:
        uneven = EVEN.clone()
        uneven[1, 0], uneven[2, 5] = True, False
        with pytest.raises(BatchError, match="asks for a value at test_branches.py.*(3|24) for the example"):
            run(captured, dict(model.named_parameters()), {"x": x, "mask": uneven})


def _by_index(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "pp=2"])
def test_as_many_rows_of_every_sample_over_a_mesh(mesh: str) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 6, 8), "mask": EVEN}
    assert mp.verify(Attending(_by_index), mesh, batch).ok


SIZING: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, mask: x[mask],
    lambda x, mask: x.masked_select(mask.unsqueeze(-1)).view(-1, 8),
    lambda x, mask: x[mask.nonzero(as_tuple=True)],
    lambda x, mask: x.flatten(0, 1)[torch.nonzero(mask.flatten())[:, 0]],
    lambda x, mask: x[torch.where(mask)],
    lambda x, mask: x.flatten(0, 1).repeat_interleave(mask.flatten().long(), dim=0),
    lambda x, mask: x[0, mask.sum(0).unique()],
    lambda x, mask: x[0, torch.unique_consecutive(mask.sum(0))],
    lambda x, mask: torch.cat([each[:n] for each, n in zip(x, torch.tensor([m.sum() for m in mask]).tolist(), strict=True)]),
    lambda x, mask: torch.repeat_interleave(x[:, 0], mask.sum(1), 0),
    lambda x, mask: torch.cat([each[:n] for each, n in zip(x, mask.sum(1), strict=True)]),
    lambda x, mask: F.pad(x[0], (0, 0, 0, mask.sum() - 5)),
    lambda x, mask: x[0] * torch.ones(mask.sum() - 2, 6, 8),
    lambda x, mask: x.flatten(0, 1).view(mask.sum() - 2, 3, 8) * mask.sum().expand(3, 8),
]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("choose", SIZING)
def test_sizes_of_the_batch_are_those_of_the_example(choose: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Cumulative sums mix rows, whose number must be known."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 0]]).bool()
    model, x = Mixing(choose).double(), torch.randn(2, 6, 8, dtype=torch.double)
    captured = assert_same(model, (x, mask), {}, loss=lambda output: output)
    with pytest.raises(BatchError, match="asks for a value at test_branches.py"):
        run(captured, dict(model.named_parameters()), {"x": x, "mask": torch.ones_like(mask)})


class Mixing(nn.Module):
    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.choose = choose
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.choose(self.layer(x), mask).cumsum(0).pow(2).mean()


def test_rows_that_are_mixed_and_depend_on_parameters_are_refused() -> None:
    with pytest.raises(CaptureError, match="turns the values|mixes rows"):
        capture(Mixing(lambda x, mask: x[x[..., 0] > 0]), (torch.randn(2, 6, 8), EVEN[:2]))


def test_data_ranks_that_do_not_choose_as_many_are_refused() -> None:
    batch = {"x": torch.randn(4, 6, 8), "mask": EVEN & (torch.arange(4) > 0)[:, None]}
    with pytest.raises(CaptureError, match="not the same for every data rank at test_branches.py.*\n.*one data rank"):
        mp.verify(Mixing(_by_index), "dp=2", batch)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "pp=2"])
def test_checks_over_a_mesh(mesh: str) -> None:
    torch.manual_seed(0)
    model = Guarded()
    batch = {"ids": torch.randint(12, (4, 6)), "labels": torch.randint(12, (4, 6))}
    report = mp.verify(model, mesh, batch)
    assert report.ok, report
