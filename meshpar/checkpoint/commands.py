"""`meshpar checkpoint ...`: every command, with --json, a bar, an example in its help, an exit status that scripts can trust."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from meshpar.checkpoint import inspection
from meshpar.checkpoint.convert import dcp, resharding
from meshpar.checkpoint.convert import hf as convert
from meshpar.checkpoint.convert.execution import Report
from meshpar.checkpoint.format.casts import parse_dtype
from meshpar.checkpoint.format.partial import storage_errors
from meshpar.checkpoint.move.transfer import Options
from meshpar.errors import CheckpointError, ConfigError

STATUS = (
    "Exit status: 0 done, 1 differs, or files that do not belong there, 2 the command cannot be meant, 3 corrupt or incomplete, "
    "4 the plan is impossible, 5 the file system refused."
)
EXAMPLES = {
    "inspect": "meshpar checkpoint inspect run/step-100",
    "verify": "meshpar checkpoint verify run/step-100 --json",
    "diff": "meshpar checkpoint diff run/step-100 wide --tolerance 1e-6",
    "reshard": "meshpar checkpoint reshard run/step-100 wide --mesh tp=4,pp=2",
    "from-hf": "meshpar checkpoint from-hf downloaded/ start --mesh tp=2,dp=2",
    "to-hf": "meshpar checkpoint to-hf run/step-100 exported --dtype bf16",
    "from-dcp": "meshpar checkpoint from-dcp old start --mesh dp=8 --trust-pickle",
    "to-dcp": "meshpar checkpoint to-dcp run/step-100 for-torch",
    "ls": "meshpar checkpoint ls run",
    "gc": "meshpar checkpoint gc run --keep 3 --dry-run",
}

app = typer.Typer(
    help="Inspect, verify, compare, reshard and convert checkpoints: on the CPU, in bounded memory, without the model.",
    epilog=STATUS,
    no_args_is_help=True,
    rich_markup_mode=None,
)

Either = Annotated[Path, typer.Argument(help="A checkpoint, or a Hugging Face folder.")]
Source = Annotated[Path, typer.Argument(help="What is read.")]
Target = Annotated[Path, typer.Argument(help="A new folder; one that exists is refused.")]
Folder = Annotated[Path, typer.Argument(help="The folder that checkpoints lie in.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Mesh = Annotated[str, typer.Option("--mesh", help="The mesh to divide over, such as tp=4,pp=2,dp=2,ep=8.")]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", exists=True, dir_okay=False, help="A JSON file that says how each tensor is divided.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Decide and check everything, write nothing.")]
Memory = Annotated[str, typer.Option("--max-memory", help="Memory for buffers, such as 256MiB.")]
Workers = Annotated[int, typer.Option("--workers", min=1, max=256, help="Threads.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what an interrupted run left.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Cast the model's floating tensors: bf16, fp16, fp32, fp64.")]
Checksums = Annotated[bool, typer.Option("--checksums/--no-checksums", help="Verify what is read and record crc32 of what is written.")]
MapFile = Annotated[Path | None, typer.Option("--map", exists=True, dir_okay=False, help="A file with one key map rule per line.")]
Rules = Annotated[list[str] | None, typer.Option("--rule", help="A key map rule, such as 'model.{rest*} -> {rest*}'; may be repeated.")]


def parse_size(text: str) -> int:
    """Bytes from text.

    >>> parse_size("256MiB")
    268435456
    """
    hit = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not hit:
        raise ConfigError(f"{text!r} is not a size; write 256MiB, 1GB or a number of bytes.")
    power = " kmgt".index(hit.group(2).lower() or " ")
    return int(float(hit.group(1)) * (1024 if hit.group(3) else 1000) ** power)


def _register(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with an example and the status in its help, whose errors are a message and a status."""

    def register(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(context: typer.Context, **given: Any) -> None:
            with _ending(given["as_json"], debug=bool(context.obj)):
                command(**given)

        own = signature(command, eval_str=True).parameters.values()  # typer reads the signature: the context, which it gives, and these
        first = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        run.__signature__ = Signature([first, *own])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (first, *own)}
        first_line = (command.__doc__ or "").partition("\n")[0]  # (typer would cut it at the edge of the screen)
        app.command(name, short_help=first_line, epilog=f"Example: {EXAMPLES[name]}\n\n{STATUS}")(run)
        return command

    return register


@_register("inspect")
def inspect(path: Either, as_json: Json = False) -> None:
    """Show mesh, files and tensors of a checkpoint or a Hugging Face folder."""
    _print(inspection.inspect(path), as_json, _show_inspect)


@_register("verify")
def verify(path: Either, workers: Workers = 1, as_json: Json = False) -> None:
    """Check every byte against its checksum, and the directory against the manifest."""
    with _bar("verify", as_json) as progress:
        found = inspection.verify(path, workers=workers, progress=progress)
    _print(found.to_json(), as_json, _show_verify)
    raise typer.Exit(found.status)


@_register("diff")
def diff(
    a: Either,
    b: Either,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest absolute difference that counts as equal; 0 compares bits.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor, whatever meshes they are divided over."""
    with _bar("diff", as_json) as progress:
        found = inspection.diff(a, b, tolerance=tolerance, progress=progress)
    _print(found.to_json(), as_json, _show_diff)
    raise typer.Exit(0 if found.same else 1)


def conversion(name: str) -> Callable[[Callable[..., Report]], Callable[..., None]]:
    """Register a function as a command that converts: beside its own options it has those that all conversions share.

    The function gets them as `how`, the keyword arguments of the same names, and returns the report that is printed.
    """

    def register(convert: Callable[..., Report]) -> Callable[..., None]:
        def command(
            dry_run: DryRun = False,
            max_memory: Memory = "256MiB",
            workers: Workers = 1,
            resume: Resume = False,
            dtype: Dtype = None,
            checksums: Checksums = True,
            as_json: Json = False,
            **own: Any,
        ) -> None:
            with _bar(name, as_json) as progress:
                options = Options(memory=parse_size(max_memory), workers=workers, verify=checksums, checksums=checksums)
                how = {"dtype": None if dtype is None else parse_dtype(dtype), "options": options, "resume": resume, "dry_run": dry_run}
                report = convert(**own, how=how | {"progress": progress})
                _print(report.to_json(), as_json, _show_report)

        rows = [signature(convert, eval_str=True).parameters, signature(command, eval_str=True).parameters]
        shown = [p for row in rows for p in row.values() if p.name != "how" and p.kind is not p.VAR_KEYWORD]
        command.__signature__ = Signature(shown)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in shown}
        command.__doc__ = convert.__doc__
        _register(name)(command)
        return command

    return register


@conversion("reshard")
def reshard(src: Source, dst: Target, mesh: Mesh = "", plan: PlanFile = None, *, how: dict[str, Any]) -> Report:
    """Divide a checkpoint over another mesh."""
    _need_mesh(mesh, plan)
    return resharding.reshard(src, dst, mesh or None, plan=plan, **how)


@conversion("from-hf")
def from_hf(
    src: Source, dst: Target, mesh: Mesh = "", plan: PlanFile = None, map_file: MapFile = None, rule: Rules = None, *, how: dict[str, Any]
) -> Report:
    """Read a Hugging Face folder into a checkpoint. Without a key map, experts named one by one are stacked."""
    _need_mesh(mesh, plan)
    return convert.from_hf(src, dst, mesh or None, rules=_rules(map_file, rule), plan=plan, **how)


@conversion("to-hf")
def to_hf(
    src: Source,
    dst: Target,
    map_file: MapFile = None,
    rule: Rules = None,
    unstack_experts: Annotated[bool, typer.Option(help="Split stacked experts into one tensor per expert.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    *,
    how: dict[str, Any],
) -> Report:
    """Write a Hugging Face folder. Without a key map, the one recorded by from-hf is undone."""
    limit = parse_size(max_shard_size)
    return convert.to_hf(src, dst, rules=_rules(map_file, rule), unstack=unstack_experts, shard_bytes=limit, **how)


@conversion("from-dcp")
def from_dcp(
    src: Source,
    dst: Target,
    mesh: Mesh = "",
    plan: PlanFile = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Read the pickles in it, with an unpickler that runs nothing.")
    ] = False,
    model_prefix: Annotated[str, typer.Option(help="What the names of the model's tensors begin with; it is removed.")] = "",
    skip_objects: Annotated[bool, typer.Option("--skip-objects", help="Leave out Python objects that are not plain values.")] = False,
    *,
    how: dict[str, Any],
) -> Report:
    """Read a torch.distributed.checkpoint directory into a checkpoint."""
    _need_mesh(mesh, plan)
    return dcp.from_dcp(
        src,
        dst,
        mesh or None,
        trust_pickle=trust_pickle,
        model_prefix=model_prefix,
        skip_objects=skip_objects,
        plan=plan,
        **how,
    )


@_register("to-dcp")
def to_dcp(
    src: Source,
    dst: Target,
    model_prefix: Annotated[str, typer.Option(help="What to put before the names of the model's tensors.")] = "",
    dry_run: DryRun = False,
    max_memory: Memory = "256MiB",
    as_json: Json = False,
) -> None:
    """Write a directory that torch.distributed.checkpoint loads."""
    with _bar("to-dcp", as_json) as progress:
        options = Options(memory=parse_size(max_memory))
        report = dcp.to_dcp(src, dst, model_prefix=model_prefix, options=options, progress=progress, dry_run=dry_run)
        _print(report.to_json(), as_json, _show_report)


@_register("ls")
def ls(path: Folder = Path("."), as_json: Json = False) -> None:
    """List the checkpoints under a directory, complete or not."""
    _print({"path": str(path), "checkpoints": inspection.ls(path)}, as_json, _show_ls)


@_register("gc")
def gc(
    path: Folder,
    keep: Annotated[int | None, typer.Option(min=1, help="Also remove all but the newest N checkpoints.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove what interrupted runs left under a directory."""
    removed = inspection.gc(path, keep=keep, dry_run=dry_run)
    _print({"removed": removed, "dry_run": dry_run}, as_json, _show_gc)


@contextmanager
def _ending(as_json: bool, *, debug: bool) -> Iterator[None]:
    """Turn errors into one message and an exit status, unless `debug` asks for a traceback."""
    try:
        with storage_errors(Path("."), "The command"):
            yield
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            raise
        ours = isinstance(error, (CheckpointError, ConfigError))
        status = getattr(error, "status", 2 if isinstance(error, ConfigError) else 3)
        kind, text = type(error).__name__, str(error) if ours else f"{error} (meshpar --debug checkpoint ... shows where)"
        if as_json:
            print(json.dumps({"error": text, "kind": kind, "status": status}))
        else:
            print(f"{kind}: {text}", file=sys.stderr)
        raise typer.Exit(status) from None


@contextmanager
def _bar(what: str, as_json: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on the terminal's error stream; none for JSON or where nobody watches."""
    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _need_mesh(mesh: str, plan: Path | None) -> None:
    if not mesh and plan is None:
        raise ConfigError("Which mesh? Add --mesh tp=2,dp=2 (or --mesh tp=1 for one file), or --plan plan.json.")


def _rules(map_file: Path | None, rules: list[str] | None) -> list[str] | None:
    if map_file is None and not rules:
        return None
    lines = map_file.read_text().splitlines() if map_file else []
    return lines + (rules or [])


def _print(facts: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any], Console], None]) -> None:
    if as_json:
        print(json.dumps(facts))
    else:
        show(facts, Console(highlight=False))


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError


def _show_inspect(facts: dict[str, Any], console: Console) -> None:
    console.print(
        f"{facts['path']}: {facts['form']}, {facts['tensor_count']} tensors, {_size(facts['nbytes'])}, {facts['parameters']:,} parameters"
    )
    if facts["mesh"]:
        console.print(f"mesh {facts['mesh']} ({facts['ranks']} ranks), {len(facts['files'])} files")
    if facts["assets"]:
        console.print(f"carried along: {', '.join(facts['assets'])}", markup=False)
    for alias, name in facts["aliases"].items():
        console.print(f"tied: {alias} = {name}", markup=False)
    table = Table("tensor", "dtype", "shape", "kind", "cuts", "chunks", box=None, pad_edge=False)
    for name, row in facts["tensors"].items():
        cells = (name, row["dtype"], str(row["shape"]), row["kind"], ", ".join(row["cuts"]) or "-", str(row["chunks"]))
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    console.print(table)


def _show_verify(facts: dict[str, Any], console: Console) -> None:
    for problem in (*facts["corrupt"], *facts["unexpected"], *facts["notes"]):
        console.print(problem, markup=False, soft_wrap=True)
    fine = "ok" if facts["checked_bytes"] or not facts["nbytes"] else "the structure is right, values were not checked"
    state = fine if facts["ok"] else "CORRUPT" if facts["corrupt"] else "files that do not belong there"
    console.print(
        f"{facts['path']}: {state}; {facts['tensors']} tensors, {_size(facts['checked_bytes'])} of {_size(facts['nbytes'])} checked"
    )


def _show_diff(facts: dict[str, Any], console: Console) -> None:
    for row in facts["differences"]:
        console.print(f"{row['tensor']}: {row['kind']}: {row['detail']}", markup=False, soft_wrap=True)
    console.print(f"{facts['compared']} tensors compared: {'the same' if facts['same'] else 'different'}")


def _show_report(facts: dict[str, Any], console: Console) -> None:
    verb = "would write" if facts["dry_run"] else "wrote"
    mesh = f", mesh {facts['mesh']}" if facts["mesh"] else ""
    console.print(f"{verb} {facts['target']}: {facts['tensors']} tensors, {_size(facts['nbytes'])}, {facts['files']} files{mesh}")
    if facts["seconds"]:
        console.print(f"{facts['seconds']:.2f} s, {_size(facts['nbytes'] / facts['seconds'])}/s")
    if facts["resumed"]:
        console.print(f"{facts['resumed']} tensors were there from an earlier run")
    for note in facts["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _show_ls(facts: dict[str, Any], console: Console) -> None:
    table = Table("name", "state", "form", "mesh", "tensors", "size", box=None, pad_edge=False)
    for row in facts["checkpoints"]:
        table.add_row(row["name"], row["state"], row["form"], row.get("mesh", ""), str(row.get("tensors", "")), _size(row.get("nbytes", 0)))
    console.print(table)


def _show_gc(facts: dict[str, Any], console: Console) -> None:
    verb = "would remove" if facts["dry_run"] else "removed"
    for path in facts["removed"]:
        console.print(f"{verb} {path}", markup=False, soft_wrap=True)
    if not facts["removed"]:
        console.print("nothing to remove")
