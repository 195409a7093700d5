"""The gradient norm over any mixture of layouts against torch's norm of the full gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from meshpar.errors import ConfigError
from meshpar.runtime.parameters import gradients
from meshpar.runtime.parameters.gradients import clip_grad_norm_, grad_norm
from tests.pool import Pool
from tests.runtime.models import make_net, make_tree, world_mesh

SHAPES = ((5, 3), (3, 5), (1, 4), (7,), (2, 2))


def full_parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for shape in SHAPES:
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
        made.append(p)
    return [*made, nn.Parameter(torch.zeros(3, dtype=dtype))]  # the last one has no gradient


def spread(mesh: DeviceMesh) -> list[nn.Parameter]:
    """The same parameters: uneven and empty shards over both axes, over one axis of the mesh, replicated, plain."""
    layouts: tuple[Any, ...] = (
        (mesh, (Shard(0), Shard(1))),
        (mesh["tp"], (Shard(0),)),
        (mesh["dp"], (Shard(0),)),
        (mesh, (Replicate(), Shard(0))),
        None,
        (mesh, (Replicate(), Replicate())),
    )
    made = []
    for p, layout in zip(full_parameters(), layouts):
        if layout is None:
            made.append(p)
            continue
        q = nn.Parameter(distribute_tensor(p.detach(), *layout))
        q.grad = None if p.grad is None else distribute_tensor(p.grad, *layout)
        made.append(q)
    return made


def clip_spread(norm_type: float, foreach: bool | None, max_norm: float) -> tuple[torch.Tensor, list[Any]]:
    parameters = spread(world_mesh("dp=2,tp=2"))
    norm = clip_grad_norm_(parameters, max_norm, norm_type, foreach=foreach)
    return norm, [g.full_tensor() if isinstance(g := p.grad, DTensor) else g for p in parameters]


@pytest.mark.parametrize("norm_type, foreach, max_norm", [(2.0, None, 1.0), (1.0, False, 1.0), (math.inf, True, 0.1), (3.0, None, 1e9)])
def test_clipping_over_meshes_equals_clipping_full_gradients(gloo: Pool, norm_type: float, foreach: bool | None, max_norm: float) -> None:
    expected = full_parameters()
    total = torch.nn.utils.clip_grad_norm_(expected, max_norm, norm_type)
    for norm, grads in gloo.run(clip_spread, norm_type, foreach, max_norm, world=4):
        assert type(norm) is torch.Tensor and norm.ndim == 0 and norm.dtype == torch.float64
        torch.testing.assert_close([norm, *grads], [total, *(p.grad for p in expected)], rtol=1e-13, atol=0)


def stages() -> float:
    """A pipeline: every stage has parameters of its own on its own slice of the mesh; one has none."""
    mesh = world_mesh("pp=2,tp=2")
    stage, inner = mesh.get_local_rank("pp"), mesh["tp"]
    if stage == 1:
        return grad_norm([], mesh=mesh).item()
    p = nn.Parameter(distribute_tensor(torch.zeros(4), inner, (Replicate(),)))
    p.grad = distribute_tensor(torch.tensor([1.0, 2.0, 2.0, 4.0]), inner, (Replicate(),))
    return grad_norm([p]).item()


def both_stages() -> float:
    mesh = world_mesh("pp=2,tp=2")
    p = nn.Parameter(distribute_tensor(torch.zeros(2), mesh["tp"], (Shard(0),)))
    p.grad = distribute_tensor(torch.tensor([3.0, 4.0]) * (1 + mesh.get_local_rank("pp")), mesh["tp"], (Shard(0),))
    return grad_norm([p]).item()


def test_pipeline_stages_hold_different_parameters(gloo: Pool) -> None:
    assert gloo.run(stages, world=4) == [5.0] * 4
    assert gloo.run(both_stages, world=4) == pytest.approx([math.sqrt(125)] * 4)


def test_low_precision_gradients_are_added_up_in_more() -> None:
    p = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.01)
    value = float(torch.tensor(0.01, dtype=torch.bfloat16))
    assert clip_grad_norm_([p], 1e9).item() == pytest.approx(value * math.sqrt(100_000), rel=3e-4)


def test_plain_parameters_and_none_at_all() -> None:
    parameters, expected = full_parameters(torch.float32), full_parameters(torch.float32)
    assert clip_grad_norm_(iter(parameters), 0.5).item() == pytest.approx(torch.nn.utils.clip_grad_norm_(expected, 0.5).item())
    torch.testing.assert_close([p.grad for p in parameters], [p.grad for p in expected])
    assert clip_grad_norm_([], 1.0).item() == 0.0
    assert clip_grad_norm_(parameters[0], 1.0).item() > 0


def test_complex_gradients_are_clipped_as_torch_does() -> None:
    ours, theirs = (nn.Parameter(torch.zeros(3, dtype=torch.complex128)) for _ in range(2))
    ours.grad, theirs.grad = (torch.tensor([3 + 4j, 1j, 2.0], dtype=torch.complex128) for _ in range(2))
    total = clip_grad_norm_([ours], 1.0)
    assert total.dtype == torch.float64 and total == nn.utils.clip_grad_norm_([theirs], 1.0)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_what_cannot_be_clipped() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([1.0, math.nan])
    with pytest.raises(RuntimeError, match="total norm of order 2.0 for gradients is nan, so it cannot be clipped to 1.0"):
        clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    with pytest.raises(ConfigError, match="norm_type=0: the order of a norm is a positive number or inf"):
        clip_grad_norm_([p], 1.0, 0)


def pending() -> str:
    mesh = world_mesh("tp=2")
    p = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, (Replicate(),)))
    p.grad = DTensor.from_local(torch.ones(2), mesh, (Partial(),), run_check=False)
    try:
        clip_grad_norm_([p], 1.0)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_pending_sum_is_refused(gloo: Pool) -> None:
    assert all("is a pending sum" in message for message in gloo.run(pending, world=2))


def test_simulated_ranks(simulated: Any) -> None:
    from meshpar.simulate import local_tensors

    expected = make_net()
    for p in expected.parameters():
        p.grad = p.detach().clone()
    total = torch.nn.utils.clip_grad_norm_([p for p in expected.parameters() if p.requires_grad], 0.5)
    net = make_net()
    with simulated(4):
        tree = make_tree(net, world_mesh("dp=2,tp=2"))
        for p in tree.parameters():
            if p.requires_grad:
                p.grad = p.detach().clone()
        found = clip_grad_norm_(tree.parameters(), 0.5)
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, total, rtol=1e-13, atol=0)
        clipped = tree.get_parameter("layers.0.norm.weight").grad.to_local()  # type: ignore[union-attr, attr-defined]
        for part in local_tensors(clipped).values():
            torch.testing.assert_close(part, expected.layers[0].norm.weight.grad)


def asked(count: int) -> int:
    """How often it is worked out which rank counts a gradient, of so many of one layout."""
    mesh, calls, real = world_mesh("dp=2"), [0], gradients._counts_here

    def counting(*args: Any) -> bool:
        calls[0] += 1
        return real(*args)

    parameters = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, (Shard(0),))) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    gradients._counts_here = counting
    try:
        assert grad_norm(parameters).item() == pytest.approx(math.sqrt(4 * count))
    finally:
        gradients._counts_here = real
    return calls[0]


def test_many_gradients_of_one_layout_cost_one_question(gloo: Pool) -> None:
    assert gloo.run(asked, 9, world=2) == [1, 1]
