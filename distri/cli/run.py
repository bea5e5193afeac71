"""`distri run`: draw one picture by a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from distri.cli.options import json_option, request_from, run_options
from distri.cli.output import print_json
from distri.cli.render import progress_bar, show_result


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
@json_option
@click.pass_context
def command(ctx: click.Context, /, output: Path, as_json: bool, **flags: Any) -> None:
    """Draw a picture on several ranks, as a plan says.

    Starts the ranks itself, or takes its place among those that torchrun started.

    \b
    Examples:
      distri run -o scene.png
      distri run --gpus 4 --cfg-split off --prompt "a blue ring left of a red square on a white ground"
      distri plan --model demo --gpus 3 --bands 3,2,1 -o plan.json && distri run --plan plan.json
      torchrun --nproc-per-node 2 -m distri run --gpus 2
    """
    from distri import executor

    executor.check_output(output)
    request = request_from(flags, output, ctx)
    with progress_bar("drawing", executor.is_writer()) as progress:
        result = executor.run(request, progress)
    if not executor.is_writer():
        return
    if as_json:
        print_json(
            {
                "image": str(result.image),
                "seconds": result.seconds,
                "seconds_per_step": result.seconds_per_step,
                "ranks": result.ranks,
                "backend": result.backend,
            }
        )
        return
    show_result(
        f"Drawn by {result.ranks} ranks",
        [
            ("picture", str(result.image)),
            ("backend", result.backend),
            ("time, loading aside", f"{result.seconds:.2f} s"),
            ("time of a step", f"{result.seconds_per_step:.3f} s"),
        ],
    )
