"""The only file that imports private torch names: each with the release it was seen in and the public thing we wait for."""

from torch.distributed._local_tensor import (  # torch 2.13; wait for a public simulation of ranks in one process
    LocalTensor,
    LocalTensorMode,
    local_tensor_mode,
    maybe_disable_local_tensor_mode,
)
from torch.distributed.device_mesh import DeviceMesh


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The one-dimensional mesh over all axes of `mesh` (torch 2.13; wait for a public DeviceMesh.flatten)."""
    return mesh._flatten(name)


__all__ = [
    "LocalTensor",
    "LocalTensorMode",
    "flatten_mesh",
    "local_tensor_mode",
    "maybe_disable_local_tensor_mode",
]
