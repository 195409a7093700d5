"""An accelerator or a machine as a JSON file: what `meshpar calibrate` writes, and every `hardware=` takes by its path."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshpar.errors import ConfigError, near, raise_all
from meshpar.planner.measured import RUNTIME, Curve, Measured

if TYPE_CHECKING:
    from meshpar.planner.hardware import Hardware

ADVICE = "`meshpar calibrate FILE` writes such a file."


def is_machine(name: object) -> bool:
    """Whether hardware is given as a file."""
    return isinstance(name, Path) or (isinstance(name, str) and name.endswith(".json"))


def path_complaints(path: str | Path) -> Iterator[str]:
    """What keeps a machine from being written there, and read by that name."""
    if not str(path).endswith(".json"):
        yield f"path={str(path)!r}: a name that ends in .json, by which hardware= knows it."
    elif not Path(path).resolve().parent.is_dir():
        yield f"path={str(path)!r}: there is no folder {Path(path).resolve().parent}."


def check_path(path: str | Path) -> None:
    """Raise ConfigError with `path_complaints`."""
    raise_all(ConfigError, "calibrate:", list(path_complaints(path)))


def write(machine: Hardware, path: str | Path) -> None:
    """Write hardware into a file."""
    Path(path).write_text(json.dumps({"meshpar": "machine", **_plain(machine)}, indent=1) + "\n")


def read(path: str | Path, kind: type[Hardware]) -> Hardware:
    """The machine in a file. Raises ConfigError for a file that is none, with everything that is wrong in it."""
    body = _body(path)
    raise_all(ConfigError, f"{path}:", [*_complaints(body, kind), *([ADVICE] if list(_complaints(body, kind)) else [])])
    values = {f.name: body[f.name] for f in fields(kind) if f.name in body}
    return kind(**{**values, "measured": _measured(body["measured"]) if body.get("measured") else None})


def _plain(machine: Hardware) -> dict[str, Any]:
    rest = {f.name: getattr(machine, f.name) for f in fields(machine) if f.name != "measured"}
    return {**rest, "peaks": dict(machine.peaks), "measured": None if machine.measured is None else asdict(machine.measured)}


def _body(path: str | Path) -> dict[str, Any]:
    try:
        body = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. {ADVICE}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no JSON: {error}. {ADVICE}") from error
    if not isinstance(body, dict) or body.get("meshpar") != "machine":
        raise ConfigError(f"{path} is no hardware. {ADVICE}")
    return body


def _complaints(body: Mapping[str, Any], kind: type[Hardware]) -> Iterator[str]:
    known = [f.name for f in fields(kind)]
    yield from (f"{name!r} is no field of a machine.{near(name, known)}" for name in body if name not in (*known, "meshpar"))
    wanted = [
        "name",
        "family",
        "peaks",
        "memory",
        "usable",
        "bandwidth",
        "link",
        "nic",
        "node",
        "domain",
        "power",
        "family_power",
        "hop",
        "source",
    ]
    yield from (f"{name} is missing." for name in wanted if name not in body)
    for name in ("memory", "usable", "bandwidth", "link", "nic", "node", "domain", "scale"):
        if name in body and not (isinstance(body[name], (int, float)) and body[name] > 0):
            yield f"{name}={body[name]!r}; a number above 0."
    if isinstance(body.get("measured"), dict):
        yield from _measured_complaints(body["measured"])
    elif body.get("measured") is not None:
        yield "measured is no table."


def _measured_complaints(body: Mapping[str, Any]) -> Iterator[str]:
    known = [f.name for f in fields(Measured)]
    yield from (f"measured.{name} is no field of a machine.{near(name, known)}" for name in body if name not in known)
    yield from (f"measured.{name} is missing." for name in known if name not in body)
    crowd = body.get("crowd")
    if crowd is not None and not (isinstance(crowd, list) and crowd and all(isinstance(x, (int, float)) and x > 0 for x in crowd)):
        yield f"measured.crowd={crowd!r}; a number above 0 for 1, 2, ... ranks."
    for table in ("kernels", "collectives"):
        for name, curve in dict(body.get(table) or {}).items():
            sizes, seconds = (curve.get(key) or [] for key in ("sizes", "seconds")) if isinstance(curve, dict) else ([], [])
            rising = all(isinstance(x, (int, float)) and x > 0 for x in (*sizes, *seconds)) and list(sizes) == sorted(set(sizes))
            if not sizes or len(sizes) != len(seconds) or not rising:
                yield f"measured.{table}[{name!r}]: as many seconds as sizes, all above 0, sizes rising."
            elif table == "collectives" and len(name.split()) != 4:
                yield f"measured.collectives[{name!r}]: a kind and ranks, such as 'all_reduce 2 of 2'."
    if "kernels" in body and "elementwise" not in (body["kernels"] or {}):
        yield "measured.kernels has no 'elementwise'."
    yield from (f"measured.runtime.{name} is missing." for name in RUNTIME if name not in (body.get("runtime") or {}))


def _measured(body: Mapping[str, Any]) -> Measured:
    def curves(name: str) -> dict[str, Curve]:
        return {key: Curve(tuple(one["sizes"]), tuple(one["seconds"])) for key, one in body[name].items()}

    tuples = {name: tuple(body[name]) for name in ("crowd", "spread")}
    plain = {name: body[name] for name in ("cores", "runtime")}
    return Measured(**{**plain, **tuples, "kernels": curves("kernels"), "collectives": curves("collectives")})
