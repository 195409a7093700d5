"""`meshpar dry-run`, `plan` and `calibrate`: a program on a cluster that is not there, the best mapping for one, a machine as hardware."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshpar.errors import ConfigError

if TYPE_CHECKING:
    from meshpar.config import ParallelConfig
    from meshpar.dry_run import DryRun

AnyModel = Annotated[
    str,
    typer.Argument(
        help="Sizes (layers=80,hidden=8192,heads=64,ffn=28672,vocab=128256), package.module:function for (model, batch), a type of "
        "transformers, or the folder of a configuration.",
    ),
]
Gpu = Annotated[
    str,
    typer.Option("--gpu", "--hardware", help="The accelerator: a100, h100, h200, b200, gb200, gb300, v100, ...; or a file of calibrate."),
]
StackName = Annotated[str, typer.Option("--stack", help="Whose software; meshpar counts what this package does.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def dry_run(
    model: AnyModel = "",
    mesh: Annotated[
        str, typer.Option("--mesh", help="Mesh axes, outermost first, such as pp=8,dp=8,tp=8; or a file of meshpar plan.")
    ] = "",
    config: Annotated[Path | None, typer.Option("--config", help="A file that meshpar plan wrote, with the mesh and the rest.")] = None,
    megatron: Annotated[Path | None, typer.Option("--megatron", help="A job in Megatron's names instead: YAML or JSON.")] = None,
    gpu: Gpu = "h100",
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="With --megatron: how many; else the mesh says so.")] = None,
    seq: Annotated[int | None, typer.Option("--seq", min=2, help="Tokens of a sample.")] = None,
    microbatch: Annotated[int | None, typer.Option("--microbatch", min=1, help="Samples of a microbatch on a data rank. [1]")] = None,
    microbatches: Annotated[int | None, typer.Option("--microbatches", min=1, help="Microbatches of a step. [1]")] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help="Of a pipeline. [1f1b]")] = None,
    virtual_stages: Annotated[int | None, typer.Option("--virtual-stages", min=1, help="Stages of a rank.")] = None,
    recompute: Annotated[str | None, typer.Option("--recompute", help="none, selective or full. [none]")] = None,
    data_parallel: Annotated[str | None, typer.Option("--data-parallel", help="replicate, zero1, zero2 or zero3. [zero3]")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="bf16, fp16, fp32. [bf16]")] = None,
    stack: StackName = "meshpar",
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it into this picture file.")] = None,
) -> None:
    """Memory, communication and time of a program on a cluster that is not there. Needs no GPUs, no ranks, and no memory for the model.

    Options beside --config replace what the file says.
    """
    from meshpar.dry_run import dry_run as run

    _check_place("--plot", plot)
    said: tuple[Any, ...] = ()
    options = {"schedule": schedule, "virtual_stages": virtual_stages, "recompute": recompute, "data_parallel": data_parallel}
    asked = {name: value for name, value in {**options, "microbatches": microbatches, "precision": precision}.items() if value is not None}
    if megatron is not None:
        _check_alone({"MODEL": model, "--mesh": mesh, "--config": config, "--seq": seq}, asked)
        found, said = _of_megatron(megatron, gpu, gpus, stack)
    else:
        from meshpar.cli.idle import check_idle
        from meshpar.cli.large import built
        from meshpar.mesh import parse_mesh

        if not model or not (mesh or config):
            raise ConfigError("dry-run wants a model and --mesh (or --config FILE), or --megatron FILE. meshpar dry-run --help")
        settings = _settings(config, asked)
        check_idle(parse_mesh(mesh or config or ""), schedule=schedule, virtual_stages=virtual_stages)
        made, batch = _of_batch(model, config, seq, microbatch, settings)
        found = run(built(made), mesh or config or "", settings, hardware=gpu, example=batch, stack=stack)
    if plot is not None:
        found.plot(plot)
    if as_json:
        print(json.dumps({**found.to_dict(), "translation": [str(line) for line in said]}, indent=2))
    else:
        _show(found, said)


def _check_place(option: str, path: Path | None) -> None:
    """Raise ConfigError, before anything is computed, for a file that could not be written."""
    if path is not None and not path.resolve().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.resolve().parent}.")


def _settings(path: Path | None, asked: dict[str, Any]) -> ParallelConfig:
    """The configuration of a file with what was asked for in its place, or that alone."""
    from meshpar.config import ParallelConfig

    if path is None:
        return ParallelConfig(**{"precision": "bf16", **asked})
    return replace(ParallelConfig.from_toml(path), **asked)


def _of_batch(model: str, path: Path | None, seq: int | None, microbatch: int | None, settings: ParallelConfig) -> tuple[Any, Any]:
    """A model, and the batch of one data rank: as asked for, else as a file of meshpar plan has it."""
    from meshpar.cli.large import large_model
    from meshpar.settings import read_batch

    samples, tokens = (None, None) if path is None else read_batch(path)
    return large_model(model, seq=seq or tokens, samples=(microbatch or samples or 1) * settings.microbatches)


def _check_alone(others: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ConfigError for what a job in Megatron's names says itself."""
    given = [name for name, value in others.items() if value] + [f"--{name.replace('_', '-')}" for name in asked]
    if given:
        raise ConfigError(f"--megatron FILE says what {', '.join(given)} would: change the file, or leave --megatron out.")


def _of_megatron(path: Path, gpu: str, gpus: int | None, stack: str) -> tuple[DryRun, tuple[Any, ...]]:
    import torch

    from meshpar.cli.large import ids
    from meshpar.dry_run import dry_run as run
    from meshpar.dry_run.decoder import Decoder
    from meshpar.dry_run.megatron import read_megatron

    job = read_megatron(path, gpus=gpus)
    with torch.device("meta"):
        model = Decoder(job.sizes, dropout=job.dropout)
    found = run(model, job.mesh, job.config, hardware=gpu, example=ids(job.seq, job.local_batch), stack=stack)
    return found, (*job.translation, *job.remarks)


def _show(found: DryRun, said: tuple[Any, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    from meshpar.dry_run.result import LEDGER, MEMORY, ledger_row, memory_row
    from meshpar.planner.hardware import GiB

    console = Console(highlight=False, width=max(150, Console().width), soft_wrap=True)
    for line in said:
        console.print(f"  {line}", markup=False)
    console.print(
        f"{found.gpus} x {found.hardware.name} as {found.mesh}, {found.software}, {found.precision}\n{found.grids}\n", markup=False
    )
    fit = "" if found.fits else ": IT DOES NOT FIT"
    for title, heading, rows in (
        (f"Memory at the fullest moment, of {found.limit / GiB:.0f} GiB usable{fit}", MEMORY, map(memory_row, found.ranks)),
        ("Communication of a rank in a step", LEDGER, map(ledger_row, found.ledger)),
    ):
        table = Table(*heading, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in found.summary():
        console.print(line, markup=False)


def plan(
    model: AnyModel,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many accelerators.")],
    global_batch: Annotated[int, typer.Option("--global-batch", min=1, help="Samples of a step over all ranks.")],
    gpu: Gpu = "h100",
    seq: Annotated[int | None, typer.Option("--seq", min=2, help="Tokens of a sample.")] = None,
    precision: Annotated[str, typer.Option("--precision", help="bf16, fp16, fp8, ...")] = "bf16",
    stack: StackName = "meshpar",
    top: Annotated[int, typer.Option("--top", min=1, help="So many mappings.")] = 10,
    toml: Annotated[
        Path | None, typer.Option("--toml", help="Write the best mapping here, for --config, make_mesh and parallelize.")
    ] = None,
    check: Annotated[
        int, typer.Option("--check", min=0, help="Read the programs of the first so many by dry runs; the best is one that fits by that.")
    ] = 0,
    script: Annotated[str, typer.Option("--script", help="What the launch lines start.")] = "train.py",
    as_json: AsJson = False,
) -> None:
    """The mappings that fit a cluster, fastest first, why the others lost, and what to type to run the best one."""
    from meshpar.cli.large import large_model
    from meshpar.dry_run.searching import search

    _check_place("--toml", toml)
    made, batch = large_model(model, seq=seq, samples=1)
    length = seq or int(batch["input_ids"].shape[1]) if isinstance(batch, dict) and "input_ids" in batch else seq
    about: dict[str, Any] = {"global_batch": global_batch, "seq": length, "precision": precision, "stack": stack, "example": batch}
    found = search(made, (gpu, gpus), **about, top=top, check=check)
    if toml is not None:
        toml.write_text(found.toml() + "\n")
    if as_json:
        print(json.dumps(_as_dict(found), indent=2))
        return
    print(found)
    print(f"\n{found.toml()}\n\n{found.launch(script)}\n{found.launch(script, slurm=True)}")


def calibrate(
    file: Annotated[Path, typer.Argument(help="The JSON file to write; dry-run and plan take it as --hardware FILE.")] = Path(
        "machine.json"
    ),
    ranks: Annotated[int | None, typer.Option("--ranks", help="Up to so many local ranks. [as many as cores, at least 4]")] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="How often everything is timed; the least counts.")] = 10,
    step: Annotated[
        float | None,
        typer.Option("--step", help="Instead: a measured step, in seconds, of the program that the options below describe; its scale."),
    ] = None,
    model: Annotated[str, typer.Option("--model", help="With --step: as MODEL of dry-run.")] = "",
    mesh: Annotated[str, typer.Option("--mesh", help="With --step: mesh axes, or a file of meshpar plan.")] = "",
    config: Annotated[Path | None, typer.Option("--config", help="With --step: a file that meshpar plan wrote.")] = None,
    gpu: Annotated[str, typer.Option("--gpu", "--hardware", help="With --step: what it ran on, a name or a file. [FILE]")] = "",
    seq: Annotated[int | None, typer.Option("--seq", min=2, help="With --step: tokens of a sample.")] = None,
    microbatch: Annotated[int | None, typer.Option("--microbatch", min=1, help="With --step: samples of a microbatch. [1]")] = None,
    microbatches: Annotated[int | None, typer.Option("--microbatches", min=1, help="With --step: of a step.")] = None,
    stack: StackName = "meshpar",
    as_json: AsJson = False,
) -> None:
    """Measure this machine (cores, gloo) in two minutes, and write it as hardware. With --step, scale hardware by one measured step."""
    from meshpar.planner.files import check_path, write

    if step is None:
        from meshpar.calibrate import calibrate as run

        found = run(file, ranks=ranks, rounds=rounds, say=lambda text: None if as_json else print(f"measuring {text} ...", flush=True))
        assert found.measured is not None
        low, high = found.measured.spread
        if as_json:
            print(json.dumps({"file": str(file), "source": found.source, "ranks": found.measured.ranks, "low": low, "high": high}))
            return
        print(f"{file}: {found.source}, 1 to {found.measured.ranks} ranks. Its own programs took {low:.2f} to {high:.2f} of the estimate.")
        return
    from meshpar.cli.large import built
    from meshpar.dry_run import dry_run as run_dry

    check_path(file)
    if not model or not (mesh or config):
        raise ConfigError("calibrate --step wants --model and --mesh (or --config FILE) of the program that was measured.")
    settings = _settings(config, {} if microbatches is None else {"microbatches": microbatches})
    made, batch = _of_batch(model, config, seq, microbatch, settings)
    dry = run_dry(built(made), mesh or config or "", settings, hardware=gpu or file, example=batch, stack=stack)
    part = dry.scaled(step)
    write(part, file)
    if as_json:
        print(json.dumps({"file": str(file), "scale": part.scale, "estimated": dry.time.seconds, "measured": step}))
        return
    print(f"{file}: {part.name}, scale {part.scale:.3f} (estimated {dry.time.seconds:.3g} s, measured {step:.3g} s)")


def _as_dict(found: Any) -> dict[str, Any]:
    from dataclasses import asdict

    ranked = [
        {
            **asdict(one.mapping),
            "seconds": one.seconds,
            "bubble": one.time.bubble,
            "exposed": dict(one.exposed),
            "memory": {**one.memory.parts(), "total": one.memory.total / 2**30},
        }
        for one in found.ranked
    ]
    lost = [{"family": x.family, "mapping": asdict(x.best.mapping), "fits": x.fits, "why": x.why} for x in found.found.lost]
    checked = [
        {
            **asdict(one.estimate.mapping),
            "fits": one.fits,
            "why": one.why,
            **({} if one.program is None else {"seconds": one.program.time.seconds, "memory": one.memory / 2**30}),
        }
        for one in found.checked
    ]
    return {
        "ranked": ranked,
        **({"checked": checked} if checked else {}),
        "lost": lost,
        "tried": found.found.tried,
        "fit": found.found.fit,
        "toml": found.toml(),
        "launch": found.launch(),
    }
