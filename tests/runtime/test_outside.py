"""Steps with a loss outside of the model, over microbatches, stages and data ranks: loss and every gradient as on one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import meshpar as mp
from meshpar.simulate import local_tensors
from tests.models import text, tiny
from tests.pool import Pool
from tests.test_outputs import Causal

Batch = dict[str, torch.Tensor]


def batch() -> Batch:
    """Eight samples with uneven numbers of labels that count: two microbatches, and two data ranks, have others."""
    ids = torch.randint(24, (8, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 1:], labels[3, 3:], labels[6] = -100, -100, -100
    return {"ids": ids, "labels": labels}


def over_tokens(output: Any, batch: Batch) -> torch.Tensor:
    """The sum of losses of tokens, with logits used twice and hidden states."""
    logits, labels = output["logits"][:, :-1], batch["labels"][:, 1:]
    tokens = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(labels.shape)
    valid = (labels != -100).double()
    return (tokens * (1 + output["hidden"][:, 1:].square().mean(-1))).sum() + (logits.logsumexp(-1).square() * valid).sum()


def valid(batch: Batch) -> torch.Tensor:
    return (batch["labels"][:, 1:] != -100).sum()


def of_samples(output: Any, scores: torch.Tensor) -> torch.Tensor:
    """The mean over samples of something that targets tell, which forward does not take."""
    return (output["hidden"].mean((1, 2)) * scores).square().mean()


def steps(spec: str, **config: Any) -> None:
    """A step of each loss, and one more of the first, whose gradients add to those that are there."""
    torch.manual_seed(3)
    model, whole = Causal().double(), batch()
    scores = torch.linspace(-1, 1, 8, dtype=torch.float64)
    alone, mesh = copy.deepcopy(model), mp.make_mesh(spec)
    local, own = mp.local_batch((whole, scores), mesh)
    pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(microbatches=2, **config))
    tokens = {"count": valid}, lambda: over_tokens(alone(**whole), whole) / valid(whole)
    samples = {"target": own}, lambda: of_samples(alone(**whole), scores)
    for fn, (asked, wanted) in ((over_tokens, tokens), (of_samples, samples), (over_tokens, tokens)):
        expected = wanted()
        expected.backward()
        loss = pm.forward_backward(local, fn, **asked)
        for part in local_tensors(loss).values():
            torch.testing.assert_close(part, expected.detach(), msg=lambda text: f"{spec} {config}: {text}")
        named = {name: p.grad for name, p in alone.named_parameters()}
        for name, parameter in pm.named_parameters():
            for grad in local_tensors(mp.full_grad(parameter)).values():
                torch.testing.assert_close(grad, named[name], msg=lambda text, name=name: f"{name} on {spec} {config}: {text}")


@pytest.mark.sweep(1)
@pytest.mark.parametrize("spec", ["dp=2,tp=2", "cp=2"])
def test_without_stages(spec: str) -> None:
    with mp.simulate(4 if "dp" in spec else 2):
        steps(spec)


def staged() -> None:
    steps("pp=2,dp=2", schedule="zbv")
    steps("pp=2,tp=2", schedule="1f1b")


@pytest.mark.slow
def test_through_the_stages(gloo: Pool) -> None:
    gloo.run(staged, world=4, timeout=240)


def lengths() -> None:
    """Data ranks with other lengths, filled up to a multiple of four: the loss sees the positions that were passed."""
    model, mesh = tiny("llama").double(), mp.make_mesh("dp=2")
    local = [text(2, length) for length in (6, 7)]
    rank = mp.data_rank(mesh)[0]
    alone = copy.deepcopy(model)

    def squares(output: Any, batch: Batch) -> torch.Tensor:
        assert output.logits.shape[:2] == batch["input_ids"].shape == local[rank]["input_ids"][:1].shape
        return output.logits.square().sum()

    pm = mp.parallelize(model, mesh, example=local[rank], config=mp.ParallelConfig(microbatches=2, pad_to=4))
    loss = pm.forward_backward(local[rank], squares, count=lambda batch: batch["input_ids"].numel())
    expected = sum(alone(**batch).logits.square().sum() for batch in local) / 26
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    named = {name: p.grad for name, p in alone.named_parameters()}
    for name, parameter in pm.named_parameters():
        torch.testing.assert_close(mp.full_grad(parameter), named[name])


def test_padding_is_not_in_the_loss(gloo: Pool) -> None:
    gloo.run(lengths, world=2, timeout=240)


def refuses() -> None:
    x, total = torch.ones(4, 4), lambda y, _: y.sum()
    pm = mp.parallelize(nn.Linear(4, 2), mp.make_mesh("dp=1"), example=(x,))
    two = mp.parallelize(nn.Linear(4, 2), mp.make_mesh("dp=1"), example=(x,), config=mp.ParallelConfig(microbatches=2))
    with pytest.raises(mp.BatchError, match="this batch gives no loss"):
        two.train_step(x)
    with pytest.raises(mp.BatchError, match="2 microbatches do not divide the 3 samples"):
        two.forward_backward((torch.ones(3, 4),), total)
    with pytest.raises(mp.BatchError, match=r"target= has tensors of shape \[\[3\]\], and the local batch 4 samples"):
        two.forward_backward((x,), total, target=torch.ones(3))
    with pytest.raises(mp.ConfigError, match=r"this one gave a torch.float32 tensor of shape \[4, 2\]. For a mean over tokens"):
        pm.forward_backward((x,), lambda y, _: y)
    with pytest.raises(mp.ConfigError, match="this one gave a tuple"):
        pm.forward_backward((x,), lambda y, _: (y.sum(), 4))
    with pytest.raises(mp.BatchError, match=r"count\(batch\) is 0 over all data ranks"):
        pm.forward_backward((x,), total, count=lambda batch: 0)
    with pytest.raises(mp.ConfigError, match="depends on no parameter"):
        pm.forward_backward((x,), lambda y, _: y.detach().sum())
    with torch.no_grad(), pytest.raises(mp.ConfigError, match="gradients, and they are switched off"):
        pm.forward_backward((x,), total)
    with pytest.raises(mp.ConfigError, match="finished step"):
        pm.forward_backward((x,), total).backward()
    cut = mp.parallelize(nn.Linear(4, 2), mp.make_mesh("dp=1"), example=(x,), config=mp.ParallelConfig(outputs="cut"))
    with pytest.raises(mp.ConfigError, match='outputs="cut"'):
        cut.forward_backward((x,), total)


def test_errors_in_words(gloo: Pool) -> None:
    gloo.run(refuses, world=1)
