"""Hooks that act in backward against one device, in float64: on tensors, modules and parameters, over every axis; and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshpar as mp
from meshpar.capture.hooks.models import copied
from meshpar.errors import ConfigError
from meshpar.simulate import local_tensors
from tests.hook_models import chain, half, unit, without
from tests.moe_models import experts_in_a_list
from tests.pool import Pool

Case = tuple[str, str, str, dict[str, Any]]
"""Where the hook is, which, mesh, fields of ParallelConfig."""

SIMULATED: list[tuple[str, str]] = [
    *((where, "unit") for where in ("twice", "view", "weight", "output", "parameter")),
    *((where, "clamp") for where in ("twice", "weight", "output", "parameter")),
    ("output", "shaped"),
    ("output", "branch"),
    ("weight", "nothing"),
    ("twice", "half"),
    ("removed", "half"),
    ("module", "half"),
]
GLOO: list[Case] = [
    ("parameter", "unit", "tp=2", {}),
    ("parameter", "unit", "dp=2", {"data_parallel": "zero3"}),
    ("parameter", "unit", "dp=2", {"data_parallel": "zero1", "microbatches": 2}),
    ("parameter", "clamp", "dp=2", {"data_parallel": "replicate", "microbatches": 2}),
    ("parameter", "unit", "pp=2", {"microbatches": 4}),
    ("parameter", "unit", "pp=2", {"microbatches": 4, "schedule": "zbv"}),
    ("twice", "clamp", "pp=2", {"microbatches": 4, "schedule": "zero-bubble", "virtual_stages": 2}),
    ("output", "clamp", "pp=2", {"microbatches": 2, "recompute": "full"}),
    ("output", "unit", "pp=2", {}),
    ("output", "unit", "dp=2", {"data_parallel": "zero3", "recompute": "full"}),
    ("weight", "half", "dp=2", {"microbatches": 2}),
    ("module", "half", "dp=2", {"data_parallel": "zero2", "recompute": "full"}),
    ("module", "half", "pp=2", {"microbatches": 2}),
]


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("where", "hook"), SIMULATED, ids=lambda x: x)
def test_hooks_on_simulated_ranks(where: str, hook: str) -> None:
    model, batch = chain(where, hook)
    report = mp.verify(model, "dp=2,tp=2", batch, steps=2)
    assert report.ok, str(report)


@pytest.mark.parametrize("where", ["twice", "parameter", "module"])
def test_the_hooks_of_these_tests_matter(where: str) -> None:
    """The program of the model without its hooks is not that of the model: what is compared above would show a lost hook."""
    model, batch = chain(where, "unit")
    gradients = []
    for one in (model, without(model)):
        one(**batch)["loss"].backward()
        gradients.append(one.first.bias.grad)
    assert not torch.allclose(*gradients)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("where", ["output", "parameter", "module"])
def test_verify_sees_a_lost_hook(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = chain(where, "unit")
    monkeypatch.setattr("meshpar.ops.hooks.act", lambda hook, grads, *, parts: list(grads))
    monkeypatch.setattr("meshpar.runtime.hooks.ModelHooks.of", lambda self, name: {})
    assert not mp.verify(model, "tp=2", batch).ok


def test_a_hook_on_an_input_of_the_model() -> None:
    model, batch = chain("input", "unit")
    batch["x"].requires_grad_()
    report = mp.verify(model, "tp=2", batch)
    assert report.ok, str(report)


def verified(cases: list[Case]) -> list[str]:
    """On a rank: the report of every case that is not exact."""
    failed = []
    for where, hook, mesh, fields in cases:
        model, batch = chain(where, hook)
        report = mp.verify(model, mp.make_mesh(mesh), batch, config=mp.ParallelConfig(**fields), steps=2)
        if not report.ok:
            failed.append(f"{where} {hook} {fields}\n{report}")
    return failed


def test_hooks_on_gloo_ranks(gloo: Pool) -> None:
    assert gloo.run(verified, GLOO, world=2, timeout=240) == [[]] * 2


def test_hooks_on_four_ranks(gloo: Pool) -> None:
    cases: list[Case] = [("parameter", "unit", "pp=2,dp=2", {"microbatches": 2}), ("twice", "clamp", "dp=2,tp=2", {"microbatches": 2})]
    assert gloo.run(verified, cases, world=4, timeout=240) == [[]] * 4


def verified_experts() -> str:
    model, batch = experts_in_a_list()
    for name, parameter in model.named_parameters():
        if "experts" in name or "embed" in name or "gate" in name:
            parameter.register_hook(unit)
    report = mp.verify(model, mp.make_mesh("ep=2"), batch, steps=2)
    return "" if report.ok else str(report)


def test_hooks_on_the_parameters_of_experts(gloo: Pool) -> None:
    assert gloo.run(verified_experts, world=2, timeout=240) == [""] * 2


def module_over_stages() -> str:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), body, nn.Linear(8, 8)).double()
    body.register_full_backward_hook(lambda module, given, made: (given[0] * 2,))
    with pytest.raises(mp.MeshparError) as error:
        mp.parallelize(model, mp.make_mesh("pp=2"), example=(torch.randn(4, 8).double(),), loss_fn=lambda out, batch: out.square().mean())
    return str(error.value)


def test_a_module_on_several_ranks_is_refused(gloo: Pool) -> None:
    for text in gloo.run(module_over_stages, world=2):
        assert "of '1' spans stages on several ranks" in text


# ---- steps -----------------------------------------------------------------------------------------------------------------------------


def gradients(pm: nn.Module) -> dict[str, Tensor]:
    found = {name: mp.full_grad(p) for name, p in pm.named_parameters()}
    return {name: next(iter(local_tensors(grad).values())) for name, grad in found.items() if grad is not None}


@pytest.fixture
def on_two() -> Iterator[Any]:
    """Makes a parallel model on dp=2 (two simulated ranks), and a copy of the model to compare with."""
    with mp.simulate(2):

        def make(model: nn.Module, batch: dict[str, Tensor], **fields: Any) -> Any:
            mesh = mp.make_mesh("dp=2")
            local = mp.local_batch(batch, mesh)
            pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(**fields))
            return pm, local

        yield make


def assert_same(pm: nn.Module, model: nn.Module) -> None:
    ours = gradients(pm)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_steps_that_add_up_and_a_hook_removed_between_them(on_two: Any) -> None:
    model, batch = chain("nowhere")
    handle = model.first.weight.register_hook(unit)
    pm, local = on_two(model, batch)
    for step in range(3):
        if step == 2:
            handle.remove()
        pm.train_step(**local)
        model(**batch)["loss"].backward()
        assert_same(pm, model)


def test_a_hook_registered_on_the_given_models_parameter_later(on_two: Any) -> None:
    model, batch = chain("nowhere")
    pm, local = on_two(model, batch)
    pm.train_step(**local)
    model(**batch)["loss"].backward()
    model.first.weight.register_hook(unit)
    pm.train_step(**local)
    model(**batch)["loss"].backward()
    assert_same(pm, model)


def test_hooks_on_the_parallel_models_own_parameters(on_two: Any) -> None:
    model, batch = chain("nowhere")
    pm, local = on_two(model, batch, microbatches=2)
    seen, after = list[Tensor](), list[str]()
    handle = pm.get_parameter("first.weight").register_hook(lambda grad: seen.append(grad) or grad / grad.norm())
    last = pm.get_parameter("first.weight").register_post_accumulate_grad_hook(lambda p: after.append(str(tuple(p.grad.shape))))
    pm.train_step(**local)
    other = model.first.weight.register_hook(unit)
    model(**batch)["loss"].backward()
    assert_same(pm, model)
    assert [tuple(grad.shape) for grad in seen] == [(8, 8)] and after == ["(8, 8)"]  # once per step, whole
    for one in (handle, last, other):
        one.remove()
    pm.train_step(**local)
    model(**batch)["loss"].backward()
    assert_same(pm, model)
    assert len(seen) == len(after) == 1


def test_module_hooks_are_removed_at_any_time(on_two: Any) -> None:
    model, batch = chain("nowhere")
    calls = list[str]()
    handle = model.layers[0].register_full_backward_hook(lambda m, given, made: calls.append(type(m).__name__) or (given[0] * 0.5,))
    pm, local = on_two(model, batch)
    assert not calls  # the trial leaves no traces
    for step in range(2):
        pm.train_step(**local)
        model(**batch)["loss"].backward()
        assert_same(pm, model)
        if step == 0:
            assert calls == ["Block"] * 3  # each simulated rank, and the model itself
            handle.remove()
    assert len(calls) == 3


def optimizer_in_backward(mode: str) -> float:
    model, batch = chain("nowhere")
    mesh = mp.make_mesh("dp=2")
    local = mp.local_batch(batch, mesh)
    pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(microbatches=2, data_parallel=mode))
    for parameters in (pm.parameters(), model.parameters()):
        for parameter in parameters:
            optimizer = torch.optim.AdamW([parameter], lr=0.1, eps=1e-3)

            def step(p: Tensor, optimizer: Any = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        pm.train_step(**local)
        model(**batch)["loss"].backward()
    wanted = dict(model.named_parameters())
    return max(float((mp.full_tensor(p) - wanted[name]).abs().max()) for name, p in pm.named_parameters())


def test_an_optimizer_in_backward(gloo: Pool) -> None:
    for mode in ("zero3", "zero1", "replicate"):
        assert all(difference < 1e-12 for difference in gloo.run(optimizer_in_backward, mode, world=2))


def test_a_copy_for_averages_keeps_the_hooks(on_two: Any) -> None:
    import copy

    model, batch = chain("parameter", "unit")
    pm, local = on_two(model, batch)
    other = copy.deepcopy(pm)
    other.train_step(**local)
    model(**batch)["loss"].backward()
    assert_same(other, model)


def test_a_failing_step_puts_hooks_and_gradients_back(on_two: Any) -> None:
    model, batch = chain("nowhere")
    pm, local = on_two(model, batch)
    own = pm.get_parameter("first.weight")
    own.register_hook(half)
    pm.train_step(**local)
    before = own.grad
    with pytest.raises(mp.MeshparError):
        pm.train_step(x=local["x"][:, :, :3])
    assert own.grad is before and own._backward_hooks


# ---- what is refused -------------------------------------------------------------------------------------------------------------------


def test_backward_outside_of_a_step_is_refused_and_evaluation_is_not(on_two: Any) -> None:
    model, batch = chain("parameter")
    pm, local = on_two(model, batch)
    with pytest.raises(ConfigError, match="pm.train_step"):
        pm(**local)
    with torch.no_grad():
        pm(**local)
    pm.eval_step(**local)


def test_hooks_after_accumulation_on_the_given_model_are_refused(on_two: Any) -> None:
    model, batch = chain("nowhere")
    model.first.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ConfigError, match=r"first.weight: hooks after accumulation .*\n.*for p in pm.parameters\(\)"):
        on_two(model, batch)


def test_hooks_registered_too_late_are_refused(on_two: Any) -> None:
    model, batch = chain("nowhere")
    handle = model.layers[0].register_forward_hook(lambda m, args, out: out * 2)
    pm, local = on_two(model, batch)
    late = model.layers[1].register_forward_hook(lambda m, args, out: out * 2)
    with pytest.raises(ConfigError, match=r"registered on 'layers.1' of the given model after parallelize"):
        pm.train_step(**local)
    late.remove()
    handle.remove()
    with pytest.raises(ConfigError, match=r"a forward hook of 'layers.0' of the given model was removed"):
        pm.train_step(**local)


@pytest.mark.parametrize("name", ["register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"])
def test_backward_hooks_on_the_parallel_model_are_refused(on_two: Any, name: str) -> None:
    model, batch = chain("nowhere")
    pm, _ = on_two(model, batch)
    for module in (pm, pm.get_submodule("layers.0"), pm.get_submodule("layers")):
        with pytest.raises(ConfigError, match=f"{name} on a module of a parallel model"):
            getattr(module, name)(lambda *args: None)


def test_forward_hooks_on_the_parallel_model(on_two: Any) -> None:
    model, batch = chain("nowhere")
    pm, local = on_two(model, batch)
    with pytest.raises(ConfigError, match="register_forward_hook on a module of a parallel model"):
        pm.get_submodule("layers.0").register_forward_hook(lambda *args: None)
    seen = list[Any]()
    handle = pm.register_forward_hook(lambda module, args, output: seen.append(output["loss"]))
    assert pm(**local)["loss"] is seen[0]
    for step in (pm.train_step, pm.eval_step):
        with pytest.raises(ConfigError, match="forward hooks on the parallel model"):
            step(**local)
    handle.remove()
    pm.train_step(**local)


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
    ids=lambda f: f.__name__,
)
def test_hooks_on_all_modules_are_refused(on_two: Any, register: Any) -> None:
    model, batch = chain("nowhere")
    pm, local = on_two(model, batch)
    handle = register(lambda *args: None)
    try:
        for call in (lambda: on_two(model, batch), lambda: pm.train_step(**local), lambda: pm.eval_step(**local)):
            with pytest.raises(ConfigError, match="hook on all modules at once"):
                call()
    finally:
        handle.remove()
    pm.train_step(**local)


def test_a_hook_that_reads_the_given_model_is_refused(on_two: Any) -> None:
    model, batch = chain("nowhere")
    model.first.weight.register_hook(lambda grad: grad * model.first.bias.norm())
    pm, local = on_two(model, batch)
    with pytest.raises(mp.MeshparError, match=r"on the parameter 'first.weight' reads 'first.bias' of the model"):
        pm.train_step(**local)


def test_a_copy_has_the_hooks_on_parameters() -> None:
    model, batch = chain("parameter", "unit")
    new = copied(model)
    for one in (model, new):
        one(**batch)["loss"].backward()
    for a, b in zip(model.parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_optimizer_hooks_are_the_users_own(on_two: Any) -> None:
    model, batch = chain("nowhere")
    pm, local = on_two(model, batch)
    optimizer, seen = torch.optim.SGD(pm.parameters(), lr=0.1), list[str]()
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    pm.train_step(**local)
    optimizer.step()
    assert seen == ["before", "after"]


def test_hooks_on_state_dicts_are_refused_where_they_would_be_lost(on_two: Any) -> None:
    model, batch = chain("nowhere")
    model.first.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.__delitem__(prefix + "bias"))
    model.layers[0].register_load_state_dict_pre_hook(lambda module, state, *rest: None)
    pm, local = on_two(model, batch)
    pm.train_step(**local)
    for call in (pm.state_dict, lambda: pm.load_state_dict({})):
        with pytest.raises(ConfigError, match=r"'first', 'layers.0': there are hooks on state_dict\(\) or load_state_dict\(\)"):
            call()


def hooked_on_one_rank(spec: str, how: str) -> list[str]:
    """What every rank is told when rank 1 alone registers a hook, and that it works once all have it."""
    mesh, x = mp.make_mesh(spec, "cpu"), torch.linspace(-1, 1, 32, dtype=torch.double).view(4, 8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    (local,) = mp.local_batch((x,), mesh)
    config = mp.ParallelConfig(microbatches=2)
    pm = mp.parallelize(model, mesh, example=(local,), config=config, loss_fn=lambda output, batch: output.square().mean())
    pm.train_step(local)
    rank, told, seen = mesh.get_rank(), list[str](), list[float]()
    where = model if how == "model" else pm
    for late in (rank != 1, rank == 1):
        if not late:
            for name, parameter in where.named_parameters():
                if name.endswith("weight"):
                    parameter.register_hook(lambda grad: seen.append(float(grad.norm())))
        pm.zero_grad()
        try:
            pm.train_step(local)
        except mp.MeshparError as error:
            told.append(str(error))
        assert not seen or len(told) < 2
    assert seen
    return told


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("spec", "world", "how"), [("dp=2", 2, "pm"), ("tp=2", 2, "model"), ("pp=2,dp=2", 4, "pm")])
def test_a_hook_that_a_rank_lacks_is_named(gloo: Pool, spec: str, world: int, how: str) -> None:
    for told in gloo.run(hooked_on_one_rank, spec, how, world=world, timeout=120):
        assert len(told) == 1 and "register them on all" in told[0], told
        assert "rank 0 has 0 of the 1 on 0.weight" in told[0] or "of the 1 on" in told[0]
