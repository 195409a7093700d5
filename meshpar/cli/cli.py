"""`meshpar` on the command line: demo, explain, verify, dry-run, plan, calibrate, checkpoint.

Exit status: 0 all is well, 1 the parallel program differs from the original (or the comparison proves nothing), 2 the command cannot be
meant, 3 it failed on the way. What fails is a message; `meshpar --debug COMMAND ...` shows where.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

from meshpar.errors import ConfigError, MeshparError, RankError, near

try:
    import typer
except ImportError:  # the command line is an extra: say so instead of a traceback
    typer = None  # type: ignore[assignment]

SLOTS = 40
"""So many slots of a schedule fit on a screen."""
STATUS = "Exit status: 0 done, 1 the parallel program differs or nothing is proved, 2 the command cannot be meant, 3 it failed on the way."
EXAMPLES = {
    "demo": "meshpar demo --mesh dp=2,tp=2 --steps 20",
    "explain": "meshpar explain --mesh pp=2,dp=2,tp=2 --microbatches 4 --code",
    "verify": "meshpar verify --model train:build --mesh dp=2,tp=2",
    "dry_run": "meshpar dry-run layers=32,hidden=4096,heads=32,ffn=14336,vocab=128256 --mesh pp=2,dp=8,tp=4 --microbatches 16 --seq 4096",
    "plan": "meshpar plan layers=32,hidden=4096,heads=32,ffn=14336,vocab=128256 --gpus 64 --global-batch 512 --seq 4096 --toml best.toml",
    "calibrate": "meshpar calibrate here.json",
}
MISSING = "the meshpar command needs typer and rich, which are not installed. Type: pip install 'meshpar[demo]'"


def main() -> None:
    """The entry point."""
    try:
        import rich  # noqa: F401
    except ImportError:
        sys.exit(_complain(MISSING))
    if typer is None:
        sys.exit(_complain(MISSING))
    application()()


def _complain(text: str) -> int:
    print(f"error: {text}", file=sys.stderr, flush=True)
    return 2


if typer is not None:
    Model = Annotated[
        str,
        typer.Option("--model", "-m", help="A causal language model type of transformers, or package.module:function for (model, batch)."),
    ]
    Mesh = Annotated[str, typer.Option("--mesh", help="Mesh axes, outermost first: pp=2,dp=2,tp=2.")]
    Layers = Annotated[int, typer.Option("--layers", min=1, help="Blocks of the model.")]
    Hidden = Annotated[int, typer.Option("--hidden", min=8, help="Width of the model.")]
    Heads = Annotated[int, typer.Option("--heads", min=1, help="Attention heads.")]
    KvHeads = Annotated[int, typer.Option("--kv-heads", min=1, help="Heads of keys and values, where the model has fewer of them.")]
    Sequence = Annotated[int, typer.Option("--seq", min=2, help="Length of a sample in bytes.")]
    Samples = Annotated[int, typer.Option("--batch", min=1, help="Samples of a global batch.")]
    Seed = Annotated[int, typer.Option("--seed", min=0, help="Of weights and batches.")]
    Rules = Annotated[
        list[str] | None, typer.Option("--rule", help="Where a parameter lies, such as '*.q_proj.weight=tp:0'; may be repeated.")
    ]
    Microbatches = Annotated[int, typer.Option("--microbatches", min=1, help="Parts into which a rank cuts its batch.")]
    Schedule = Annotated[
        str | None,
        typer.Option("--schedule", help="Of a pipeline: gpipe, 1f1b, looped-bfs, interleaved-1f1b, zero-bubble, zbv or dualpipev. [1f1b]"),
    ]
    VirtualStages = Annotated[
        int | None, typer.Option("--virtual-stages", min=1, help="Pipeline stages on a rank; by default the fewest the schedule allows.")
    ]
    Recompute = Annotated[str, typer.Option("--recompute", help="none, selective or full.")]
    DataParallel = Annotated[str, typer.Option("--data-parallel", help="replicate, zero1, zero2 or zero3.")]
    AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
    SequenceParallel = Annotated[
        bool, typer.Option("--sequence-parallel/--no-sequence-parallel", help="Cut activations between blocks too, where that costs less.")
    ]


def application() -> Any:
    """The typer application, with `checkpoint` where that part is there."""
    app = typer.Typer(
        help="Trains unmodified PyTorch models over pipeline, data and tensor parallel axes.",
        epilog=f"meshpar COMMAND --help has the options and an example of each.\n\n{STATUS} (meshpar checkpoint has its own.)",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_shared)
    from meshpar.cli import planning

    for command in (demo, explain, verify, planning.dry_run, planning.plan, planning.calibrate):
        first_line = (command.__doc__ or "").partition("\n")[0]  # (typer would cut it at the edge of the screen)
        app.command(short_help=first_line, epilog=f"Example: {EXAMPLES[command.__name__]}\n\n{STATUS}")(_with_messages(command))
    try:
        from meshpar.checkpoint.commands import app as checkpoint
    except ImportError as error:
        print(f"note: meshpar checkpoint is not available: {error}", file=sys.stderr)
    else:
        app.add_typer(checkpoint, name="checkpoint", short_help="Inspect, verify, compare, reshard and convert checkpoints.")
    return app


def demo(
    model: Model = "llama",
    mesh: Mesh = "dp=2,tp=2",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 30,
    seq: Sequence = 128,
    batch: Samples = 8,
    data: Annotated[str | None, typer.Option(help="A file to train on, read as bytes; without it, sources of Python.")] = None,
    layers: Layers = 3,
    hidden: Hidden = 128,
    heads: Heads = 8,
    kv_heads: KvHeads = 4,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 2e-3,
    seed: Seed = 0,
    rule: Rules = None,
    microbatches: Microbatches = 1,
    schedule: Schedule = None,
    virtual_stages: VirtualStages = None,
    recompute: Recompute = "none",
    data_parallel: DataParallel = "zero3",
    sequence_parallel: SequenceParallel = True,
    plan: Annotated[bool, typer.Option("--plan/--no-plan", help="Print the plan.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train a small model on local ranks, and the same on one process beside it; say how far they are apart.

    Starts the ranks by itself, or uses those of torchrun. Exit status 1 when the two trainings differ.
    """
    from meshpar.cli import demo as demonstration
    from meshpar.cli.causal_lm import SmallSizes

    asked = _asked(mesh, rule, microbatches, schedule, virtual_stages, recompute, data_parallel, sequence_parallel)
    found = demonstration.run(
        demonstration.Demo(
            model=model,
            mesh=mesh,
            steps=steps,
            batch=batch,
            sizes=SmallSizes(layers, hidden, heads, kv_heads, seq),
            data=data,
            learning_rate=lr,
            seed=seed,
            **asked,
            show_plan=plan and not as_json,
            silent=as_json,
        )
    )
    if found is not None and as_json:
        print(json.dumps(found.to_dict(), indent=2))
    if found is not None and not found.ok:
        raise typer.Exit(1)


def explain(
    model: Model = "llama",
    mesh: Mesh = "dp=2,tp=2",
    seq: Sequence = 128,
    batch: Samples = 8,
    layers: Layers = 3,
    hidden: Hidden = 128,
    heads: Heads = 8,
    kv_heads: KvHeads = 4,
    rule: Rules = None,
    microbatches: Microbatches = 1,
    schedule: Schedule = None,
    virtual_stages: VirtualStages = None,
    recompute: Recompute = "none",
    data_parallel: DataParallel = "zero3",
    sequence_parallel: SequenceParallel = True,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Print what a rank keeps in memory.")] = True,
    code: Annotated[bool, typer.Option("--code/--no-code", help="Print the code that rank 0 runs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how a model would be laid out on a mesh, and why. Needs no ranks: this process stands for rank 0."""
    from meshpar.cli.look import explained

    asked = _asked(mesh, rule, microbatches, schedule, virtual_stages, recompute, data_parallel, sequence_parallel)
    made = _model_and_batch(model, batch, layers, hidden, heads, kv_heads, seq, seed=0)
    pm = explained(*made, mesh, **asked)
    if as_json:
        print(json.dumps({"plan": json.loads(pm.plan.to_json()), "memory": asdict(pm.memory()), "text": pm.explain()}, indent=2))
        return
    print(pm.explain())
    if pm.schedule is not None and len(pm.schedule.compute[0]) <= SLOTS:
        print(f"\n{pm.schedule_table()}")
    if memory:
        print(f"\n{pm.memory()}")
    if code:
        print()
        pm.print_readable()


def verify(
    model: Model = "llama",
    mesh: Mesh = "dp=2,tp=2",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2,
    seq: Sequence = 32,
    batch: Samples = 4,
    layers: Layers = 2,
    hidden: Hidden = 64,
    heads: Heads = 8,
    kv_heads: KvHeads = 4,
    seed: Seed = 0,
    rule: Rules = None,
    microbatches: Microbatches = 1,
    schedule: Schedule = None,
    virtual_stages: VirtualStages = None,
    recompute: Recompute = "none",
    data_parallel: DataParallel = "zero3",
    sequence_parallel: SequenceParallel = True,
    processes: Annotated[bool, typer.Option("--processes", help="On new gloo processes instead of simulated ranks.")] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Prove the program without running it, on any mesh: no ranks are needed.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float64",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative difference that passes (1e-9 or 1e-5 by dtype); in bfloat16 units of its rounding (6)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the parallel program with the original: loss, every gradient, gradient norm, optimizer steps.

    Exit status 1 on a difference, and where the comparison proves nothing (a loss that is no number, gradients that are all zero).

    On simulated ranks data parallelism is that of the graph; with --processes, and for a pipeline, it is FSDP2's, as in training.

    With --static nothing is run: the program is read back, and what cannot be proved of it is said (exit status 1 for a contradiction).
    """
    asked = _asked(mesh, rule, microbatches, schedule, virtual_stages, recompute, data_parallel, sequence_parallel)
    if static:
        from meshpar.proof.alone import static_report

        made = _model_and_batch(model, batch, layers, hidden, heads, kv_heads, seq, seed=seed)
        raise typer.Exit(_proved(lambda: static_report(made[0], mesh, made[1], **asked), as_json))
    import torch

    from meshpar.proof.verify import verify as check

    kinds = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise ConfigError(f"--dtype {dtype}: one of {', '.join(kinds)}.{near(dtype, kinds)}")
    made = _model_and_batch(model, batch, layers, hidden, heads, kv_heads, seq, seed=seed)
    report = check(
        made[0],
        mesh,
        made[1],
        **asked,
        steps=steps,
        processes=processes,
        dtype=kinds[dtype],
        seed=seed,
        tolerance=tolerance,
    )
    if _is_first():
        print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    raise typer.Exit(0 if report.ok else 1)


def _proved(check: Callable[[], Any], as_json: bool) -> int:
    """Print what a static check says; its exit status."""
    from meshpar.errors import ProgramFault

    try:
        found = check()
    except ProgramFault as fault:
        print(json.dumps({"ok": False, "fault": str(fault)}, indent=2) if as_json else fault, file=sys.stdout if as_json else sys.stderr)
        return 1
    said = {"ok": True, "proved": found.proved, "share": found.share, "unproved": [str(one) for one in found.unproved]}
    print(json.dumps(said, indent=2) if as_json else found)
    return 0


# ---- reading options -------------------------------------------------------------------------------------------------------------------


def _model_and_batch(
    model: str, samples: int, layers: int, hidden: int, heads: int, kv_heads: int, seq: int, *, seed: int
) -> tuple[Any, Any]:
    from meshpar.cli.causal_lm import Corpus, SmallSizes, own_model, quiet, small_model

    quiet()
    if ":" in model:
        return own_model(model)
    built = small_model(model, SmallSizes(layers, hidden, heads, kv_heads, seq), seed=seed)
    return built, Corpus().batch(0, samples=samples, sequence=seq, seed=seed)


def _asked(
    mesh: str,
    rules: list[str] | None,
    microbatches: int,
    schedule: str | None,
    virtual_stages: int | None,
    recompute: str,
    data_parallel: str,
    sequence_parallel: bool,
) -> dict[str, Any]:
    """Configuration and rules, read together with the mesh before a model is built, which may take long."""
    from meshpar.cli.idle import check_idle
    from meshpar.config import ParallelConfig
    from meshpar.mesh import parse_mesh
    from meshpar.pipeline.order import check_schedule

    fields: dict[str, Any] = {
        "virtual_stages": virtual_stages,
        "recompute": recompute,
        "data_parallel": data_parallel,
        **({} if schedule is None else {"schedule": schedule}),
    }
    config = ParallelConfig(microbatches=microbatches, sequence_parallel="auto" if sequence_parallel else False, **fields)
    sizes = parse_mesh(mesh)
    check_idle(sizes, schedule=schedule, virtual_stages=virtual_stages)
    check_schedule(sizes, config)
    return {"config": config, "rules": _rules(rules)}


def _rules(given: list[str] | None) -> dict[str, str]:
    rules = {}
    for text in given or ():
        pattern, equals, where = text.rpartition("=")
        if not equals or not pattern:
            raise ConfigError(f"--rule {text}: write PATTERN=WHERE, such as '*.q_proj.weight=tp:0' or '*.bias=replicate'.")
        rules[pattern] = where
    return rules


def _is_first() -> bool:
    """Whether this process speaks for all: rank 0, or the only one."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def _version(asked: bool) -> None:
    if asked:
        import meshpar

        print(f"meshpar {meshpar.__version__}")
        raise typer.Exit


def _shared(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised, not its message alone.")] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Say which release this is.")] = False,
) -> None:
    """Trains unmodified PyTorch models over pipeline, data and tensor parallel axes."""
    context.obj = debug


def _with_messages(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are a message and a status."""

    @wraps(command)
    def run(context: typer.Context, *args: Any, **kwargs: Any) -> None:
        with _ending(debug=bool(context.obj), as_json=bool(kwargs.get("as_json"))):
            _check_own(context, kwargs)
            command(*args, **kwargs)

    # typer reads the signature: the context, which it gives, and the options of the command
    hints = get_type_hints(command, include_extras=True)
    own = [each.replace(annotation=hints[name]) for name, each in signature(command).parameters.items()]
    first = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    run.__signature__ = Signature([first, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {"context": typer.Context, **hints}
    return run


OF_SIZES = ("layers", "hidden", "heads", "kv_heads", "seq", "batch", "microbatch")
"""Options for models that are made here; a function of the user's brings a model and a batch of its own."""


def _check_own(context: typer.Context, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for options that would do nothing to a model of the user's own."""
    if ":" not in (given.get("model") or ""):
        return
    sources = {name: str(context.get_parameter_source(name)) for name in OF_SIZES if name in given}
    typed = [f"--{name.replace('_', '-')}" for name, source in sources.items() if source.endswith("COMMANDLINE")]
    if typed and context.info_name != "plan":
        raise ConfigError(
            f"{', '.join(typed)}: {given['model']} returns a model and a batch of its own. Leave the option out, or change those."
        )


@contextmanager
def _ending(*, debug: bool = False, as_json: bool = False) -> Iterator[None]:
    """Errors are a message and a status, not a traceback, unless `debug` asks for one. As JSON, an object with both."""
    try:
        yield
    except (typer.Exit, typer.Abort, KeyboardInterrupt):
        raise
    except Exception as error:
        if debug:
            raise
        ours = isinstance(error, MeshparError)
        status = 2 if ours and not isinstance(error, RankError) else 3
        text = str(error) if ours else f"{type(error).__name__}: {error} (meshpar --debug COMMAND ... shows where)"
        if as_json:
            print(json.dumps({"error": text, "kind": type(error).__name__, "status": status}))
        else:
            print(f"error: {text}", file=sys.stderr, flush=True)
        raise typer.Exit(status) from None


if __name__ == "__main__":
    main()
