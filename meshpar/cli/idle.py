"""Options that would do nothing: refused, so that nobody takes a number for that of what was asked."""

from __future__ import annotations

from collections.abc import Mapping

from meshpar import roles
from meshpar.errors import ConfigError
from meshpar.mesh import format_mesh


def check_idle(sizes: Mapping[str, int], *, schedule: str | None, virtual_stages: int | None) -> None:
    """Raise ConfigError for options of a pipeline beside a mesh that has none."""
    axis = roles.stage_axis()
    given = [f"{name} {value}" for name, value in (("--schedule", schedule), ("--virtual-stages", virtual_stages)) if value is not None]
    if given and axis not in sizes:
        raise ConfigError(
            f"{', '.join(given)}: of a pipeline, and the mesh {format_mesh(sizes)} has no axis {axis}. "
            f"Add one (--mesh {format_mesh({axis: 2, **sizes})}), or leave this out."
        )
