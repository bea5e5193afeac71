"""`distri run`: draw one picture by a plan."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distri.cli.options import json_option, request_from, run_options
from distri.cli.output import print_json
from distri.cli.render import progress_bar, show_result
from distri.cli.run_choice import choose, report, with_prediction
from distri.cli.simulated_run import run_simulated
from distri.errors import RunError

if TYPE_CHECKING:
    from distri.executor import Progress, RunResult
    from distri.request import RunRequest

ELASTIC_EVERY = 5
ELASTIC_ATTEMPTS = 4


@click.command("run")
@run_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("distri.png"),
    show_default=True,
    help="Where the picture goes.",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=0),
    metavar="N",
    help="Keep what is needed to go on after a fault, every N steps. 0: never, the default; 5 with --elastic.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where it is kept; all hosts must see it. Default: beside the picture, PICTURE.checkpoint.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE",
    help="Go on from a checkpoint, on as many ranks as you like; on the same ranks the picture is the same.",
)
@click.option(
    "--elastic",
    is_flag=True,
    help="Go on by itself after a fault: restarted by torchrun (on the ranks that are left), or here.",
)
@click.option(
    "--check-finite",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Look for NaN and infinity in what is exchanged, every N steps. 0: never, the default.",
)
@click.option(
    "--compile", "compiles", is_flag=True, help="Compile what lies between exchanges (torch.compile)."
)
@click.option(
    "--compile-backend",
    metavar="NAME",
    help="The compiler: inductor, the default, or one that is installed, such as tensorrt or tvm.",
)
@click.option(
    "--cuda-graphs",
    is_flag=True,
    help="Record the steps that repeat as CUDA graphs, messages included, and replay them.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Write what some steps did when, as torch.profiler saw it, in the form of distri simulate --trace.",
)
@click.option(
    "--tile-decoder",
    "tiles_decoder",
    is_flag=True,
    help="Rank 0 decodes the picture tile by tile, for what does not fit. Default: each rank decodes its patch.",
)
@click.option(
    "--learn/--no-learn",
    default=True,
    help="Whether the next prediction on this machine takes in how long this run took.  [default: learn]",
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    output: Path,
    as_json: bool,
    checkpoint_every: int | None,
    checkpoint: Path | None,
    resume: Path | None,
    elastic: bool,
    check_finite: int,
    learn: bool,
    compiles: bool,
    compile_backend: str | None,
    cuda_graphs: bool,
    trace: Path | None,
    tiles_decoder: bool,
    **flags: Any,
) -> None:
    """Draw a picture on several ranks, as a plan says.

    Starts the ranks itself, or takes its place among those that torchrun started. Without a plan, and without flags
    that describe one, the best plan for this machine is searched for first.

    \b
    Examples:
      distri run -o scene.png
      distri run --gpus 4 --cfg-split off --prompt "a blue ring left of a red square on a white ground"
      distri plan --model demo --gpus 3 --bands 3,2,1 -o plan.json && distri run --plan plan.json
      torchrun --nproc-per-node 2 -m distri run --gpus 2
      torchrun --nproc-per-node 2 --max-restarts 3 -m distri run --elastic
    """
    from distri import executor
    from distri.outputs import check_output, is_writer

    check_output(output)
    if elastic and flags["plan_path"] is None:
        flags["gpus"] = int(os.environ.get("WORLD_SIZE", flags["gpus"]))
    choice = None if elastic or resume is not None else choose(ctx, flags)
    if choice is not None and not as_json:
        click.echo(choice.sentence, err=True)
    request = dataclasses.replace(
        request_from(flags, output, ctx, choice.plan if choice is not None else None),
        checkpoint_every=(ELASTIC_EVERY if elastic else 0) if checkpoint_every is None else checkpoint_every,
        checkpoint=resume_directory(resume) or checkpoint or output.with_name(f"{output.name}.checkpoint"),
        resume=resume,
        may_resume=elastic,
        check_finite=check_finite,
        compiler=(compile_backend or "inductor") if compiles or compile_backend else None,
        tiles_decoder=tiles_decoder,
        cuda_graphs=cuda_graphs,
        trace=trace,
    )
    if request.compiler is not None:
        from distri.models.compiling import check_compiler

        check_compiler(request.compiler)
    if request.backend == "sim":
        run_simulated(request, flags["hardware"], as_json)
        return
    with progress_bar("drawing", is_writer()) as progress:
        result = run_elastic(request, progress) if elastic else executor.run(request, progress)
    if not is_writer():
        return
    compared = report(choice, result.seconds_per_step, learn) if choice is not None else []
    if as_json:
        outcome = {
            "image": str(result.image),
            "seconds": result.seconds,
            "seconds_per_step": result.seconds_per_step,
            "ranks": result.ranks,
            "backend": result.backend,
        }
        print_json(with_prediction(choice, outcome))
        return
    show_result(
        f"Drawn by {result.ranks} ranks",
        [
            ("picture", str(result.image)),
            ("backend", result.backend),
            ("time, loading aside", f"{result.seconds:.2f} s"),
            ("time of a step", f"{result.seconds_per_step:.3f} s"),
            *([("trace", str(trace))] if trace is not None else []),
            *compared,
        ],
    )


def resume_directory(resume: Path | None) -> Path | None:
    """Where a resumed run goes on writing: beside what it resumes from."""
    return resume if resume is None or resume.is_dir() else resume.parent


def run_elastic(request: RunRequest, progress: Progress | None) -> RunResult:
    """Run, and after a fault go on from the last checkpoint, a few times; torchrun restarts its ranks itself."""
    from distri import executor

    for attempt in range(1, ELASTIC_ATTEMPTS if executor.starts_ranks(request) else 1):
        with saying_what_failed(attempt):
            return executor.run(request, progress)
    return executor.run(request, progress)


@contextmanager
def saying_what_failed(attempt: int) -> Iterator[None]:
    """Report a fault and go on after it."""
    try:
        yield
    except RunError as error:
        click.echo(f"distri: attempt {attempt} of {ELASTIC_ATTEMPTS}: {error}; going on", err=True)
