"""Experts in a list and the loop over them: lifted when proven to be the weighted sum that an index chooses, run as written when not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask

from meshpar.capture.experts.body import NotLifted
from meshpar.capture.experts.lists import owners as expert_lists
from meshpar.capture.experts.lists.loops import UNFIT
from meshpar.capture.export import capture
from meshpar.graph.captured import Captured
from meshpar.graph.facts import facts
from tests.capture.models import assert_same, perturbed
from tests.capture.moe import LIFTED, H, Model, MoE, SwiGLU, tokens


def names(captured: Captured) -> list[str]:
    return [str(node.target) for node in captured.graph.nodes]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("style", LIFTED)
def test_every_way_to_loop(style: str) -> None:
    torch.manual_seed(0)
    captured = assert_same(perturbed(Model(MoE(style))), (), tokens(2, 4))
    targets = names(captured)
    assert targets.count("meshpar.dispatch.default") == targets.count("meshpar.combine.default") == 1
    assert targets.count("meshpar.grouped_mm.default") == 3
    stacks = [node for node in captured.graph.nodes if facts(node).expert_stack]
    assert {tuple(part.target for part in node.args[0]) for node in stacks} == {
        tuple(f"layers.0.experts.{e}.{name}" for e in range(4)) for name in ("w1.weight", "w2.weight", "w3.weight", "w3.bias")
    }
    assert len(stacks) == 4


@pytest.mark.sweep(2)
@pytest.mark.parametrize("style", ["mixtral", "hits", "flat"])
def test_as_many_positions_as_they_are_wide(style: str) -> None:
    """A square of hidden states is no mask."""
    captured = assert_same(perturbed(Model(MoE(style))), (), tokens(2, H))
    assert names(captured).count("meshpar.dispatch.default") == 1


@pytest.mark.sweep(2)
@pytest.mark.parametrize("style", ["select", "soft", "capped"])
def test_other_sums_are_left_as_they_are(style: str) -> None:
    torch.manual_seed(0)
    captured = assert_same(perturbed(Model(MoE(style))), (), tokens(2, 4))
    assert "meshpar.dispatch.default" not in names(captured)


class Inline(nn.Module):
    """The loop in the forward itself, in the branch for training; experts of another width; a loop variable read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, 4)
        self.members = nn.ModuleDict({name: nn.Sequential(nn.Linear(H, 12), nn.GELU(), nn.LayerNorm(12)) for name in "abcd"})

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        identity, shape = hidden, hidden.shape
        scores = F.softmax(self.gate(hidden), -1)
        weights, index = scores.topk(2, -1)
        if self.training:
            flat = hidden.reshape(-1, H).repeat_interleave(2, 0)
            y = torch.empty(flat.shape[0], 12, dtype=hidden.dtype)
            for i, expert in enumerate(self.members.values()):
                y[index.flatten() == i] = expert(flat[index.flatten() == i])
            y = (y.view(-1, 2, 12) * weights.view(-1, 2, 1)).sum(1)
            y = y.view(*shape[:-1], 12) * (i - 2)
        else:
            y = torch.cat([identity, hidden[..., :4]], -1)
        return y[..., :H] + y[..., 4:], weights.var()


class Masked(nn.Module):
    """Layers that may be experts beside a mask from a function of indices, whose indexing writes itself down in the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        known = torch.ones(batch, length, dtype=torch.bool, device=hidden.device).tril(length // 2)
        mask = create_mask(lambda b, h, q, kv: known[b, kv] & (kv <= q), batch, 1, length, length, device=hidden.device.type)
        for layer in self.layers:
            hidden = hidden + F.scaled_dot_product_attention(layer(hidden)[:, None], hidden[:, None], hidden[:, None], mask)[:, 0]
        return hidden.square().mean()


def test_trials_leave_no_trace_in_the_export() -> None:
    torch.manual_seed(0)
    assert_same(Masked().double(), (torch.randn(2, 4, H, dtype=torch.float64),), {}, loss=lambda y: y)


class Own(nn.ModuleList):
    """A list with a forward of its own, sums on top of what it is given, results by return."""

    def __init__(self) -> None:
        super().__init__(SwiGLU() for _ in range(3))
        self.top = 2

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = x * 0.5
        for i in range(len(self)):
            where = (index == i).nonzero()
            if len(where) == 0:
                continue
            token, slot = where[:, 0], where[:, 1]
            total = total.index_add(0, token, self[i](x[token]) * weights[token, slot, None])
        return total


class WithOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(H, 3), Own()

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.reshape(-1, H)
        weights, index = self.gate(x).sigmoid().topk(self.experts.top, -1)
        return self.experts(x, index, weights).view_as(hidden), weights.mean()


@pytest.mark.parametrize("layer", [Inline, WithOwn])
def test_loops_in_the_forward_itself(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    captured = assert_same(perturbed(Model(layer())), (), tokens(2, 4))
    assert names(captured).count("meshpar.dispatch.default") == 1
    assert not [name for name in names(captured) if "nonzero" in name]


class NearMiss(MoE):
    """Loops that almost are the weighted sum that the index chooses."""

    def __init__(self, style: str) -> None:
        super().__init__(style)
        self.other, self.capacity = nn.Linear(H, 4, bias=False), 100

    def detached(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """The values of the sum, other gradients."""
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(index == i)
            out = out.index_add(0, token, expert(x[token]) * weights.detach()[token, slot, None])
        return out

    def without_the_last(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(len(self.experts) - 1):
            token, slot = torch.where(index == i)
            out = out.index_add(0, token, self.experts[i](x[token]) * weights[token, slot, None])
        return out

    def one_scaled(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(index == i)
            y = expert(x[token]) * weights[token, slot, None]
            out = out.index_add(0, token, y * 1.001 if i == 3 else y)
        return out

    def light_ones_left_out(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where((index == i) & (weights > 1e-3))
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out

    def full(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """An expert takes so many tokens that it gets more of them only when nearly all want it."""
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(index == i)
            token, slot = token[: self.capacity], slot[: self.capacity]
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out

    def other_neighbour(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(len(self.experts)):
            token, slot = torch.where(index == i)
            out = out.index_add(0, token, self.experts[i - 1](x[token]) * weights[token, slot, None])
        return out

    def counted_once(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """Two routers may choose one expert; then the larger weight counts, not their sum."""
        index = torch.stack([self.gate(x).argmax(-1), self.other(x).argmax(-1)], -1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            weight = torch.where(index == i, weights, 0).amax(-1, keepdim=True)
            out = out + expert(x) * weight
        return out


def found(layer: nn.Module, *shape: int) -> expert_lists.LiftedLoop | NotLifted:
    return expert_lists.Lists().lifted(layer, ("experts",), (torch.randn(shape),), {})


@pytest.mark.parametrize("style", ["detached", "without_the_last", "one_scaled", "light_ones_left_out", "other_neighbour", "counted_once"])
def test_near_misses(style: str) -> None:
    reason = found(NearMiss(style), 2, 4, H)
    assert isinstance(reason, NotLifted) and str(reason) == UNFIT


def test_near_misses_run_as_they_are() -> None:
    captured = assert_same(perturbed(Model(NearMiss("detached"))), (), tokens(2, 4))
    assert "meshpar.dispatch.default" not in names(captured)
    assert captured.unrecognised == {"layers.0": UNFIT}


def test_what_happens_rarely_is_tried() -> None:
    """Of many experts, two routers choose the same one so rarely that random inputs do not show what happens then."""
    layer = NearMiss("counted_once")
    layer.gate, layer.other = (nn.Linear(H, 256, bias=False) for _ in range(2))
    layer.experts, layer.bias = nn.ModuleList(SwiGLU() for _ in range(256)), nn.Buffer(torch.zeros(256))
    assert isinstance(found(layer, 2, 4, H), NotLifted)


@pytest.mark.parametrize("shape", [(120, H), (10, 12, H)])
def test_as_many_tokens_as_there_are_are_tried(shape: tuple[int, ...]) -> None:
    assert isinstance(found(NearMiss("full"), *shape), NotLifted)
    assert isinstance(found(NearMiss("full"), 4, *shape[1:]), expert_lists.LiftedLoop)  # the limit is out of reach


class Unsorted(MoE):
    """The order of choices is not that of their weights."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, index, penalty = super().route(x)
        return weights.flip(-1), index.flip(-1), penalty


class Unpaired(MoE):
    """Each choice has the weight of another."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, index, penalty = super().route(x)
        return weights.flip(-1), index, penalty


class Inherited(MoE):
    """The loop is in a function that is overridden."""

    def mixtral(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        return super().mixtral(x, weights.detach(), index) + x


class Switch(MoE):
    """One choice, whose weight is applied afterwards."""

    def mixtral(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out, first = torch.empty_like(x), index[:, 0]
        for i, expert in enumerate(self.experts):
            out[first == i] = expert(x[first == i])
        return out * weights[:, :1]


class TwoLists(MoE):
    """Shared experts in a list of their own."""

    def __init__(self, style: str) -> None:
        super().__init__(style)
        self.always = nn.ModuleList(SwiGLU() for _ in range(2))

    def mixtral(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        return super().mixtral(x, weights, index) + sum(member(x) for member in self.always)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", [Unsorted, Unpaired, Inherited, Switch, TwoLists])
def test_routers_and_layers_of_other_kinds(kind: type[MoE]) -> None:
    torch.manual_seed(0)
    before = kind.mixtral, MoE.mixtral
    captured = assert_same(perturbed(Model(kind("mixtral"))), (), tokens(2, 4))
    assert names(captured).count("meshpar.dispatch.default") == 1 and not captured.unrecognised
    assert (kind.mixtral, MoE.mixtral) == before


class Normed(SwiGLU):
    """Reductions over the features of a row."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(F.normalize(x, dim=-1))
        y = y / (y.var(-1, keepdim=True) + 1e-3) + y.std(-1, keepdim=True) - y.amin(-1, keepdim=True)
        return y * torch.logsumexp(y, -1, keepdim=True) + y.cumsum(-1)


class NormedTogether(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.linalg.vector_norm(x)


def test_reductions_in_experts() -> None:
    layer, together = MoE("mixtral"), MoE("dense")
    layer.experts = nn.ModuleList(Normed() for _ in range(4))
    assert names(assert_same(perturbed(Model(layer)), (), tokens(2, 4))).count("meshpar.dispatch.default") == 1
    together.experts = nn.ModuleList(NormedTogether() for _ in range(4))
    assert str(found(together, 2, 4, H)) == "aten.linalg_vector_norm.default is not known to treat rows alone"


class TwoLoops(MoE):
    """Two loops over two lists."""

    def __init__(self) -> None:
        super().__init__("mixtral")
        self.more = nn.ModuleList(SwiGLU() for _ in range(4))

    def mixtral(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = super().mixtral(x, weights, index)
        for i, expert in enumerate(self.more):
            out = out + expert(x) * torch.where(index == i, weights, 0).sum(-1, keepdim=True)
        return out


def test_one_loop_in_a_forward_is_replaced() -> None:
    captured = assert_same(perturbed(Model(TwoLoops())), (), tokens(2, 4))
    assert names(captured).count("meshpar.dispatch.default") == 1
    assert captured.unrecognised == {"layers.0.more": "one loop in a forward is replaced, here that over 'experts'"}


class Penalised(MoE):
    """A weight penalty reads the experts' parameters."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        out, penalty = super().forward(hidden)
        return out, penalty + self.experts[1].w1.weight.square().sum()


def test_parameters_of_experts_that_are_read_elsewhere() -> None:
    captured = assert_same(perturbed(Model(Penalised("masked"))), (), tokens(2, 4))
    assert captured.unrecognised == {"layers.0": "its forward reads 'w1' of its members, beside calling them"}


def test_random_numbers_are_left_as_they_were() -> None:
    model, batch = Model(MoE("mixtral")), tokens(2, 4)
    state = torch.get_rng_state()
    capture(model, (), batch)
    assert torch.equal(torch.get_rng_state(), state)


class Unlike(MoE):
    def __init__(self, style: str) -> None:
        super().__init__(style)
        self.experts[1] = nn.Sequential(nn.Linear(H, 6), nn.ReLU(), nn.Linear(6, H))


class OneBias(MoE):
    def __init__(self, style: str) -> None:
        super().__init__(style)
        self.experts[2].w2 = nn.Linear(6, H)


class Mixing(SwiGLU):
    """An expert whose rows depend on each other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True) if x.shape[0] else x)


def test_experts_that_are_not_alike_or_mix_rows() -> None:
    torch.manual_seed(0)
    assert "meshpar.dispatch.default" not in names(assert_same(perturbed(Model(Unlike("mixtral"))), (), tokens(2, 4)))
    captured = assert_same(perturbed(Model(OneBias("masked"))), (), tokens(2, 4))
    assert "meshpar.dispatch.default" not in names(captured)
    assert captured.unrecognised == {"layers.0": "its members are not alike"}
    layer = MoE("dense")
    layer.experts = nn.ModuleList(Mixing() for _ in range(4))
    assert "meshpar.dispatch.default" not in names(assert_same(perturbed(Model(layer)), (), tokens(2, 4)))


def test_many_experts_cost_no_more_to_capture() -> None:
    captured = capture(Model(MoE("skipping", experts=64, choices=2)), (), tokens(2, 4))
    assert sum(node.op == "call_function" for node in captured.graph.nodes) < 80
