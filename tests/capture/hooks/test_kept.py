"""Hooks of a forward on its graph: where they act, what was seen of them, and which are refused, in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshpar.capture.export import capture
from meshpar.capture.hooks.trial import untouched
from meshpar.errors import CaptureError
from meshpar.graph.captured import Captured
from meshpar.graph.run import run
from meshpar.ops.hooks import PARTS, WHOLE
from tests.hook_models import branch, chain, clamp, half, nothing, shaped, unit

Act = Callable[["Model", Tensor], Any]


class Model(nn.Module):
    """Two layers; `act(self, h)` runs on what is between them, and returns what takes its place (None: itself)."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        other = self.act(self, h)
        return self.b(torch.tanh(h if other is None else other)).square().mean()


def captured_of(act: Act) -> tuple[Model, Tensor, Captured]:
    model, x = Model(act).double(), torch.randn(4, 8, dtype=torch.float64)
    return model, x, capture(model, (x,))


def hooks_of(captured: Captured) -> list[Any]:
    return [captured.hooks[node.args[1]] for node in captured.graph.nodes if node.target in (WHOLE, PARTS)]


def assert_same_gradients(model: nn.Module, x: Tensor, captured: Captured) -> None:
    state = dict(model.named_parameters())
    run(captured, state, dict(zip(captured.inputs, [x], strict=True)))[captured.loss or 0].backward()
    found = {name: p.grad for name, p in state.items()}
    model.zero_grad()
    model(x).backward()
    for name, p in state.items():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-12, atol=1e-15)


def used_before_and_after(model: Model, h: Tensor) -> Tensor:
    early = h.sin()
    h.register_hook(unit)
    h.register_hook(clamp)
    return early + h


def on_a_result_of_several(model: Model, h: Tensor) -> Tensor:
    first, second = h.chunk(2, -1)
    second.register_hook(half)
    return torch.cat([first, second], -1)


def after_a_write(model: Model, h: Tensor) -> Tensor:
    k = h * 2
    k.mul_(3)
    k.register_hook(unit)
    return k


def before_a_write(model: Model, h: Tensor) -> Tensor:
    k = h * 2
    k.register_hook(unit)
    return k.mul_(3)


def relu_in_place(model: Model, h: Tensor) -> Tensor:
    k = torch.relu_(h + 1)
    k.register_hook(clamp)
    return k


def removed_again(model: Model, h: Tensor) -> None:
    h.register_hook(clamp)
    with h.register_hook(half):
        pass


def in_a_forward_hook(model: Model, h: Tensor) -> Tensor:
    handle = model.b.register_forward_pre_hook(lambda module, args: args[0].register_hook(clamp) and None)
    out = model.b(h)
    handle.remove()
    return out


def without_gradients(model: Model, h: Tensor) -> None:
    with torch.no_grad():
        h.register_hook(clamp)


def through_another_dtype(model: Model, h: Tensor) -> None:
    h.register_hook(lambda grad: torch.where(grad > 0, grad.float().to(grad.dtype), grad))


EXACT: list[Act] = [
    through_another_dtype,
    used_before_and_after,
    on_a_result_of_several,
    after_a_write,
    before_a_write,
    relu_in_place,
    removed_again,
    in_a_forward_hook,
    without_gradients,
]


@pytest.mark.parametrize("act", EXACT, ids=lambda act: act.__name__)
def test_exact(act: Act) -> None:
    model, x, captured = captured_of(act)
    assert hooks_of(captured)
    assert_same_gradients(model, x, captured)


@pytest.mark.parametrize(
    ("hook", "parts", "linear"),
    [
        (half, True, True),
        (clamp, True, False),
        (unit, False, False),
        (shaped, False, False),
        (branch, False, False),
        (nothing, False, False),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_what_is_seen_of_a_hook(hook: Any, parts: bool, linear: bool) -> None:
    _, _, captured = captured_of(lambda model, h: h.register_hook(hook) and None)
    (found,) = hooks_of(captured)
    assert (found.parts, found.parts and found.linear) == (parts, linear)


def test_one_that_keeps_its_gradient_sees_the_whole_and_the_trial_leaves_no_traces() -> None:
    seen, count = list[Tensor](), 0

    def hook(grad: Tensor) -> Tensor:
        nonlocal count
        count += 1
        seen.append(grad)
        return grad * 2

    _, _, captured = captured_of(lambda model, h: h.register_hook(hook) and None)
    assert [one.parts for one in hooks_of(captured)] == [False]
    assert not seen and count == 0


def test_untouched() -> None:
    class Log:
        def __init__(self) -> None:
            self.lines: list[int] = []
            self.count = 0

        def add(self, value: int) -> None:
            self.lines.append(value)
            self.count += 1

    log, table = Log(), {"a": 1}
    with untouched((log.add, lambda: table)):
        log.add(1)
        table["b"] = 2
    assert (log.lines, log.count, table) == ([], 0, {"a": 1})


def test_hooks_of_modules() -> None:
    model, batch = chain("module")
    captured = capture(model, (), batch)
    assert sum(node.target is WHOLE for node in captured.graph.nodes) == 4  # before and after each module


@pytest.mark.parametrize("keyed", [False, True])
def test_a_module_in_eager_terms(keyed: bool) -> None:
    """None for an argument without a gradient, several hooks in a row, a result that is a tuple, None returned for a gradient."""

    class Two(nn.Module):
        def forward(self, mask: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x * mask + y, x - y

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.two = nn.Linear(8, 8), Two()

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            p, q = self.two(x > 0, h.sin(), y=h.cos()) if keyed else self.two(x > 0, h.sin(), h.cos())
            return (p * q).square().mean()

    model, x = Outer().double(), torch.randn(4, 8, dtype=torch.float64)
    model.two.register_full_backward_pre_hook(lambda module, made: (made[0] * 2, None))
    model.two.register_full_backward_hook(lambda module, given, made: (None, given[1] + made[0], *given[2:]))
    model.two.register_full_backward_hook(lambda module, given, made: (None, given[1].cos(), *(None for _ in given[2:])))
    assert_same_gradients(model, x, capture(model, (x,)))


def grad_fn(model: Model, h: Tensor) -> None:
    assert h.grad_fn is not None and h.grad_fn.name()
    h.grad_fn.register_hook(lambda *grads: None)


def deep_grad_fn(model: Model, h: Tensor) -> None:
    h.sin().grad_fn.next_functions[0][0].register_prehook(lambda grads: None)


def edge(model: Model, h: Tensor) -> None:
    torch.autograd.graph.get_gradient_edge(h).node.register_hook(lambda *grads: None)


def saved(model: Model, h: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        return h.sin()


def several(model: Model, h: Tensor) -> None:
    torch.autograd.graph.register_multi_grad_hook([h, h.sin()], lambda grads: None)


def reads_a_value(model: Model, h: Tensor) -> None:
    scale = h.detach().norm()
    h.register_hook(lambda grad: grad * scale)


def reads_a_parameter(model: Model, h: Tensor) -> None:
    h.register_hook(lambda grad: grad * model.b.bias)


def overwrites(model: Model, h: Tensor) -> None:
    h.register_hook(lambda grad: grad.mul_(0.5))


def view_and_write(model: Model, h: Tensor) -> Tensor:
    k = h * 2
    k.view(-1).mul_(2)
    k.register_hook(half)
    return k


def of_another_kind(model: Model, h: Tensor) -> None:
    h.register_hook(lambda grad: grad.float())


REFUSED: list[tuple[Act, str]] = [
    (grad_fn, r"register_hook of a grad_fn \(AddmmBackward0\) at test_kept.py:\d+"),
    (deep_grad_fn, r"register_prehook of a grad_fn"),
    (edge, r"register_hook of a grad_fn"),
    (saved, r"hooks on what autograd saves at test_kept.py:\d+ .*\n.*recompute=\"full\""),
    (several, r"register_multi_grad_hook.*\n.*one hook on each tensor"),
    (reads_a_value, r"reads a tensor of the forward or of the model beside the gradient.*\n.*autograd.Function"),
    (reads_a_parameter, r"reads a tensor of the forward or of the model"),
    (overwrites, r"overwrites the gradient .*\n.*g \* 0.5"),
    (view_and_write, r"written to in place and seen by views"),
    (lambda model, h: h.retain_grad(), r"calls retain_grad on a tensor at test_kept.py:\d+"),
    (lambda model, h: model.a.weight.register_hook(half) and None, r"is on a parameter.*\n.*before parallelize"),
    (lambda model, h: model.a.weight.register_post_accumulate_grad_hook(half) and None, r"register_post_accumulate_grad_hook"),
]


@pytest.mark.parametrize(("act", "words"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_refused(act: Act, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        captured_of(act)


def test_what_a_hook_returns_must_be_a_gradient() -> None:
    with pytest.raises(CaptureError, match=r"was handed torch.float64 \[4, 8\] on cpu and returned torch.float32"):
        captured_of(of_another_kind)


def test_a_hook_that_does_something_else_later_is_refused() -> None:
    """It may have been handed parts, because it treated every element by itself."""
    late = [False]
    model, x, captured = captured_of(lambda model, h: h.register_hook(lambda grad: unit(grad) if late[0] else half(grad)) and None)
    assert_same_gradients(model, x, captured)
    late[0] = True
    with pytest.raises(CaptureError, match="treated every element by itself when the program was made, and now calls aten.linalg"):
        assert_same_gradients(model, x, captured)


@pytest.mark.filterwarnings("ignore:.*non-full backward hook")
def test_modules_that_are_refused() -> None:
    model, x = Model(lambda model, h: None), torch.randn(4, 8)
    model.a.register_backward_hook(lambda *args: None)
    with pytest.raises(CaptureError, match=r"'a': registered with register_backward_hook.*\n.*register_full_backward_hook"):
        capture(model, (x,))
    model = Model(lambda model, h: None)
    model.extra = nn.Linear(2, 2)
    model.extra.register_full_backward_hook(lambda *args: None)
    with pytest.raises(CaptureError, match="'extra': there are hooks that act in backward on what the captured forward does not call"):
        capture(model, (x,))


def saved_on_cpu(model: Model, h: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return h.sin()


def mutations_allowed(model: Model, h: Tensor) -> Tensor:
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        k = h.sin()
        return k * 2


def no_saved_hooks(model: Model, h: Tensor) -> Tensor:
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        return h.sin()


@pytest.mark.parametrize("act", [saved_on_cpu, no_saved_hooks], ids=lambda act: act.__name__)
def test_torchs_own_hooks_on_what_is_saved_hand_back_the_same_values(act: Act) -> None:
    assert_same_gradients(*captured_of(act))
    assert captured_of(mutations_allowed)


def test_names_are_the_same_on_ranks_with_another_history() -> None:
    """A rank that has captured the same model before agrees with one that has not."""
    from meshpar.graph.text import fingerprint

    act: Act = lambda model, h: h.register_hook(half) and None  # noqa: E731
    first, second = captured_of(act)[2], captured_of(act)[2]
    assert fingerprint(first) == fingerprint(second)
    assert {*first.hooks} != {*second.hooks}
