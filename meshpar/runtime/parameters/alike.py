"""What a loop computes from parameters and other tensors, with gradients: these must be the same on all data ranks.

    loss = pm(**batch).loss + 0.1 * (pm.head.weight @ prototypes).square().mean()      the same term on every rank: it counts once
    loss = pm(**batch).loss + 0.1 * (pm.head.weight @ own_samples).square().mean()     refused: every rank would train its own copy

The gradient of such a term goes to a parameter as it is. A number that is only added says nothing of it. Ranks ask each other, so all of
them compute such a term, as they do where a parameter has to be gathered; what one rank computes alone is computed without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshpar._torch import LocalTensor, OpOverload, maybe_disable_local_tensor_mode, pytree, resolve_process_group
from meshpar.errors import ConfigError
from meshpar.mesh import Axis, axis
from meshpar.roles import with_own_batches
from meshpar.simulate import is_simulated, local_tensors

_ADDS = frozenset("add add_ sub sub_ rsub".split())
_NEAR = 1e-5
"""How far the fingerprints of equal values may be apart: kernels may add in another order."""


def check_alike(func: OpOverload, args: Any, kwargs: Any) -> None:
    """Raise ConfigError where a parameter that wants a gradient meets a plain tensor that is another one on another data rank.

    Collective over the data ranks, if a plain tensor is there.
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    parts = [t for t in tensors if isinstance(t, DTensor)]
    adds = func.overloadpacket.__name__ in _ADDS
    plain = [t for t in tensors if not isinstance(t, DTensor) and t.numel() and not (adds and t.numel() == 1)]
    if not plain or not any(t.requires_grad for t in parts):
        return
    if not _same(plain, parts[0]):
        whose, shape = getattr(parts[0], "_origin", "a parameter"), tuple(plain[0].shape)
        raise ConfigError(
            f"{func.overloadpacket.__name__} of {whose} and a tensor of shape {shape} that is another one on every data rank: the gradient "
            "of what is computed outside of the model goes to the parameter as it is, and ranks would be trained apart. Put it into the "
            "model's forward, or into its loss_fn; or bring the tensor together before (all_reduce, all_gather)."
        )


def _same(plain: Sequence[torch.Tensor], like: DTensor) -> bool:
    if is_simulated():
        with maybe_disable_local_tensor_mode():
            return all(_near(*values) for t in plain if isinstance(t, LocalTensor) for values in _by_rank(t))
    prints = _fingerprint(plain)
    for one in data_axes(like.device_mesh):
        both = torch.cat([prints, -prints])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=resolve_process_group(one.group))
        if not _near(both[: len(prints)], -both[len(prints) :]):
            return False
    return True


def data_axes(mesh: DeviceMesh) -> list[Axis]:
    """The axes of a mesh whose ranks have batches of their own, and of which there are several."""
    found = [axis(mesh, name) for name in with_own_batches(mesh.mesh_dim_names or ())]
    return [one for one in found if one.size > 1]


def _by_rank(tensor: LocalTensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    prints = [_fingerprint([part]) for part in local_tensors(tensor).values()]
    return [(prints[0], other) for other in prints[1:]]


def _fingerprint(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Three numbers for each tensor: how large it is, and two sums as shares of that, one of them weighed by where elements are."""
    found = []
    for tensor in tensors:
        plain = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
        values = plain.reshape(-1).to(torch.float64)
        size = values.abs().sum()
        places = torch.arange(len(values), dtype=torch.float64, device=values.device)
        found += [size, values.sum() / size.clamp(min=1e-300), (values * torch.cos(places)).sum() / size.clamp(min=1e-300)]
    return torch.stack(found)


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=_NEAR, atol=_NEAR, equal_nan=True)
