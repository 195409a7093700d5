"""Programs made of the code of others by numbers alone: exact, and only where known sizes tell them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.compile.shapes.fitted import Fitted
from meshpar.runtime.state import variants
from tests.runtime.state.test_shapes import batch, worst

LENGTHS = (12, 16, 14, 28, 13, 20, 24, 22, 26, 21)


class Mixed(nn.Module):
    """Embeddings, something that depends on the number of positions, logits, their loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.project, self.out = nn.Embedding(53, 16), nn.Linear(16, 16), nn.Linear(16, 53)

    def attend(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        heads = x.unflatten(-1, (4, 4)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask, is_causal=causal)
        return self.project(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def mix(self, x: Tensor, n: int) -> Tensor:
        raise NotImplementedError

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        return F.cross_entropy(self.out(x + self.mix(x, ids.shape[1])).flatten(0, 1), labels.flatten(), ignore_index=-100)


class Window(Mixed):
    """A mask made by comparing tensors: causal as long as the window is not reached, which nothing in Python asks."""

    def mix(self, x: Tensor, n: int) -> Tensor:
        at = torch.arange(n)
        distance = at[:, None] - at[None]
        return self.attend(x, (distance >= 0) & (distance < 17))


class Halves(Mixed):
    """The two halves in different ways; of an odd number, the second is longer. A scale of the length."""

    def mix(self, x: Tensor, n: int) -> Tensor:
        half = n // 2
        return torch.cat([x[:, :half].cumsum(1), x[:, half:] * 2], 1) * n**-0.5 + self.attend(x)


class Branches(Mixed):
    """Python that asks for the length."""

    def mix(self, x: Tensor, n: int) -> Tensor:
        return self.attend(x, causal=True) * min(n, 19) if n > 15 else self.attend(x) * 3


class Remainders(Mixed):
    """Filled up to a multiple, and another number of times for every remainder."""

    def mix(self, x: Tensor, n: int) -> Tensor:
        filled = F.pad(x, (0, 0, 0, -n % 4))
        return self.attend(x) * (n % 3 + 1) + filled.unflatten(1, (-1, 4)).mean((1, 2), keepdim=False)[:, None]


class Alike(Mixed):
    """A factor, and a number left behind, that are the same for the first lengths: all of these can be divided by three."""

    rest = -1

    def mix(self, x: Tensor, n: int) -> Tensor:
        self.rest = n % 3
        return self.attend(x) * (n % 3 + 1)


class LeftBehind(Alike):
    """The number alone."""

    def mix(self, x: Tensor, n: int) -> Tensor:
        self.rest = n % 3
        return self.attend(x)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", [Alike, LeftBehind])
def test_what_was_the_same_for_all_known_lengths_is_not_taken_for_granted(kind: type[Alike]) -> None:
    model = kind().double()
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch(4, 12))
        for length in (12, 24, 18, 21, 20, 16, 13):
            one = batch(4, length)
            assert worst(pm, model, one, one) < 1e-12, length
            assert pm.original_module.rest == length % 3


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("kind", "made"), [(Window, 2), (Halves, 4), (Branches, 2), (Remainders, 1)])
def test_new_lengths_are_exact(kind: type[Mixed], made: int) -> None:
    model = kind().double()
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch(4, LENGTHS[0]))
        for length in LENGTHS:
            one = batch(4, length)
            assert worst(pm, model, one, one) < 1e-12, length
        found = pm._variants._resized
        assert found.made >= made, found.reasons


def test_numbers_of_samples_and_positions_are_told_apart() -> None:
    model = Halves().double()
    sizes = [(4, 12), (8, 20), (4, 16), (2, 12), (4, 14), (6, 18), (4, 18), (6, 14), (2, 14)]
    with mp.simulate(2):
        mesh = mp.make_mesh("dp=2")
        pm = mp.parallelize(model, mesh, example=mp.local_batch(batch(4, 12), mesh))
        for samples, length in sizes:
            whole = batch(samples, length)
            assert worst(pm, model, mp.local_batch(whole, mesh), whole) < 1e-12, (samples, length)
        assert pm._variants._resized.made >= 3
        assert "programs made of the code of others, by numbers alone" in pm.explain()
        again = copy.deepcopy(pm)
        for samples, length in sizes[-2:]:
            whole = batch(samples, length)
            assert worst(again, model, mp.local_batch(whole, mesh), whole) < 1e-12


def test_a_program_that_is_told_wrong_is_found_before_it_runs(monkeypatch: Any) -> None:
    model = Halves().double()
    right = Fitted._told

    def wrong(self: Fitted, values: Any) -> Any:
        found = right(self, values)
        return found + 1 if isinstance(found, int) and found % 3 == 0 else found

    monkeypatch.setattr(Fitted, "_told", wrong)
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch(4, 12))
        for length in (12, 20, 16, 15, 18, 14):
            one = batch(4, length)
            assert worst(pm, model, one, one) < 1e-12, length
        assert pm._variants._resized.made == 0
        assert "was another one when it was made" in pm.explain()


def test_what_others_were_made_of_may_be_forgotten(monkeypatch: Any) -> None:
    monkeypatch.setattr(variants, "MOST", 2)
    model = Halves().double()
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch(2, 12))
        for length in (12, 20, 16, 18, 14, 16, 18, 14, 20, 12, 18):
            one = batch(2, length)
            assert worst(pm, model, one, one) < 1e-12, length
        assert len(pm._variants.programs()) == 2
        assert pm._variants._resized.made >= 4


def test_a_program_holds_for_the_state_of_python_that_others_were_made_with() -> None:
    class Scaled(Mixed):
        scale = 1

        def mix(self, x: Tensor, n: int) -> Tensor:
            return self.attend(x) if self.scale == 1 else self.attend(x, causal=True)

    model = Scaled().double()
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch(4, 12))
        for length, scale in ((12, 1), (20, 1), (16, 1), (18, 1), (14, 2), (15, 1), (14, 1), (13, 2)):
            model.scale = pm.scale = scale
            one = batch(4, length)
            assert worst(pm, model, one, one) < 1e-12, (length, scale)
        assert pm._variants._resized.made >= 1
