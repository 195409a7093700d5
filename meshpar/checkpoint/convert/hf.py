"""Hugging Face folders in and out. Configuration and tokenizer files travel along; names follow a key map that is proved invertible."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from meshpar.checkpoint.convert.execution import How, Progress, Report, execute
from meshpar.checkpoint.convert.resharding import divide, new_target, single_targets, with_dtype
from meshpar.checkpoint.convert.work import build
from meshpar.checkpoint.format.division import Division, Grid
from meshpar.checkpoint.format.faults import CorruptError, ImpossibleError
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.format.opened import Checkpoint, open_checkpoint
from meshpar.checkpoint.format.sink import folder_sink, rank_sink
from meshpar.checkpoint.inspection import first_difference
from meshpar.checkpoint.move.transfer import Options
from meshpar.checkpoint.names import keymap as keymaps
from meshpar.checkpoint.names import rules as keyrules
from meshpar.checkpoint.names.keymap import Mapped
from meshpar.checkpoint.names.matching import matches
from meshpar.checkpoint.names.spaces import Tensors
from meshpar.collection import uncollected
from meshpar.errors import ConfigError

SHARD_BYTES = 5 * 10**9


@uncollected()
def from_hf(
    source: Path | str,
    target: Path | str,
    mesh: str | Grid | None = None,
    *,
    rules: Iterable[str] | None = None,
    plan: Path | str | None = None,
    dtype: str | None = None,
    options: Options | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    disk: Disk | None = None,
) -> Report:
    """Read a Hugging Face folder (or one safetensors file) into a checkpoint over a mesh.

    `rules` is a key map; None stacks experts named one by one into `[E, ...]` and changes nothing else; an empty one changes nothing.
    The map is recorded, so that `to_hf` leads back to the same names.

    >>> from_hf("weights", "start", "tp=2,dp=2")                                                   # doctest: +SKIP
    """
    how = How(options or Options(), disk or Disk(), resume, dry_run, progress)
    opened = open_checkpoint(Path(source), how.disk)
    if opened.form != "hf":
        raise ConfigError(f"{source} is a meshpar checkpoint already; use `meshpar checkpoint reshard`.")
    path = new_target(target, resume)
    mapped, notes = _map_in(opened.manifest.tensors.each(lambda g: (g.dtype, g.shape)), rules)
    _check_ties(opened, mapped, how.disk)
    mapped = with_dtype(mapped, {}, dtype)
    grid = Grid.parse(mesh) if isinstance(mesh, str) else mesh
    division = divide(mapped.tensors, {}, grid, plan, {})
    sink = rank_sink(mapped.tensors, division, {})
    work = build(opened, path, "meshpar", mapped, sink, division, aliases=mapped.aliases, keymap=mapped.rules, notes=notes)
    return execute(work, how)


@uncollected()
def to_hf(
    source: Path | str,
    target: Path | str,
    *,
    rules: Iterable[str] | None = None,
    unstack: bool = False,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    options: Options | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    disk: Disk | None = None,
) -> Report:
    """Write the model's tensors as a Hugging Face folder: `model.safetensors`, or an index and files of at most `shard_bytes`.

    `rules` is a key map from our names to theirs; None undoes the one recorded by `from_hf`. Where nothing was recorded, `unstack` splits
    `...experts.x` of `[E, ...]` into `...experts.0.x`, ...
    """
    how = How(options or Options(), disk or Disk(), resume, dry_run, progress)
    opened = open_checkpoint(Path(source), how.disk)
    path = new_target(target, resume)
    m = opened.manifest
    tensors = single_targets(m.tensors.each(lambda g: (g.dtype, g.shape)), m.tensors.each(lambda g: g.kind))
    mapped = with_dtype(_map_out(tensors, rules, m.keymap, unstack), {}, dtype)
    sink = folder_sink(mapped.tensors, shard_bytes)
    left_out = len(m.tensors) - len(tensors)
    notes = [f"{left_out} tensors of the optimizer and other state are not part of a Hugging Face folder"] if left_out else []
    work = build(opened, path, "hf", mapped, sink, Division(), notes=notes)
    return execute(work, how)


def _map_in(tensors: Tensors, rules: Iterable[str] | None) -> tuple[Mapped, list[str]]:
    if rules is not None:
        parsed = keyrules.parse(rules)
        return (keymaps.apply(parsed, tensors) if parsed else keymaps.identity(tensors)), []
    stack = keyrules.parse([keyrules.STACK_EXPERTS])
    if not any(matches(stack[0], name) for name in tensors):
        return keymaps.identity(tensors), []
    try:
        return keymaps.apply(stack, tensors), ["experts were stacked; to-hf undoes it"]
    except ImpossibleError as error:
        return keymaps.identity(tensors), [f"experts were not stacked: {error}"]


def _map_out(tensors: Tensors, rules: Iterable[str] | None, recorded: tuple[str, ...], unstack: bool) -> Mapped:
    if rules is not None:
        parsed = keyrules.parse(rules)
    elif recorded:
        parsed = keyrules.inverted(keyrules.parse(recorded))
    elif unstack:
        parsed = keyrules.inverted(keyrules.parse([keyrules.STACK_EXPERTS]))
    else:
        parsed = ()
    return keymaps.apply(parsed, tensors) if parsed else keymaps.identity(tensors)


def _check_ties(opened: Checkpoint, mapped: Mapped, disk: Disk) -> None:
    """Tensors declared tied must hold the same bytes; otherwise one of them would be lost."""
    sources = mapped.sources
    for alias, name in mapped.aliases.items():
        where = first_difference(opened, alias, opened, sources[name], disk)
        if where is not None:
            raise CorruptError(f"{alias} is declared tied to {sources[name]}, but they differ {where}.")
