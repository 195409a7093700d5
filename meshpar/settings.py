"""A mesh and a `ParallelConfig` as a file: what `meshpar plan` writes, and `make_mesh`, `parallelize` and the command line read.

mesh = "pp=2,dp=16,tp=2"

[config]
microbatches = 8
schedule = "interleaved-1f1b"

[batch]
microbatch = 2
seq = 4096
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from meshpar.errors import ConfigError, near, raise_all

_PARTS = ("mesh", "config", "batch")


def is_file(spec: object) -> bool:
    """Whether a mesh or a configuration is given as a file."""
    return isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith(".toml"))


def read_mesh(path: str | Path) -> str:
    """The mesh in a file. Raises ConfigError where it says none."""
    body = _read(path)
    if not isinstance(body.get("mesh"), str):
        raise ConfigError(f'{path} names no mesh: it wants a line like mesh = "pp=2,dp=2,tp=2".')
    return str(body["mesh"])


def read_fields(path: str | Path, known: Iterable[str]) -> Mapping[str, Any]:
    """The `[config]` table of a file. Raises ConfigError for names that are not `known`."""
    body, names = _read(path), sorted(known)
    complaints = [f"{name!r} is not mesh, config or batch.{near(name, _PARTS)}" for name in body if name not in _PARTS]
    fields = body.get("config", {})
    complaints += [f"[config] {name}: there is no such field.{near(name, names)}" for name in fields if name not in names]
    raise_all(ConfigError, f"{path}:", [*complaints, *_of_batch(body)])
    return dict(fields)


def read_batch(path: str | Path) -> tuple[int | None, int | None]:
    """The samples of a microbatch on a data rank and the tokens of one, that the plan in a file is for, if it says so."""
    body = _read(path)
    raise_all(ConfigError, f"{path}:", _of_batch(body))
    batch = body.get("batch", {})
    return batch.get("microbatch"), batch.get("seq")


def _of_batch(body: Mapping[str, Any]) -> list[str]:
    """What is wrong with the `[batch]` table."""
    batch = body.get("batch", {})
    if not isinstance(batch, Mapping):
        return [f"batch = {batch!r}: a table is wanted, [batch]."]
    wrong = [f"[batch] {name}: microbatch and seq are known." for name in batch if name not in ("microbatch", "seq")]
    return wrong + [
        f"[batch] {name} = {n!r}: a whole number of at least 1." for name, n in batch.items() if not isinstance(n, int) or n < 1
    ]


def _read(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. `meshpar plan` writes such a file, --toml FILE.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}.") from error
