"""`distri bench`: what each mode costs on this machine, beside the single device, in one run."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distri.cli.options import RUN_DTYPES, image_size_of, json_option, model_option, size_options
from distri.cli.output import check_text_output, print_json, write_text
from distri.cli.render import console, progress_bar, scaled, show_result, table
from distri.core.partition import FIXED_AXES, SplitAxis
from distri.core.planner import LAYERS_PER_BUCKET
from distri.errors import OutputError

if TYPE_CHECKING:
    from distri.bench.report import Row


@click.command("bench")
@model_option("demo")
@size_options
@click.option("--gpus", type=click.IntRange(min=2), default=2, show_default=True, help="Ranks, one a device.")
@click.option(
    "--modes",
    default="",
    metavar="A,B",
    help="Policies, gather_all (the reference's pattern), cfg_split, latent_on_patch. Default: those that matter.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Turns of each way.")
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Steps in a turn.")
@click.option(
    "--split",
    type=click.Choice(tuple(axis.value for axis in FIXED_AXES)),
    default=SplitAxis.ROWS.value,
    show_default=True,
    help="How the image is cut.",
)
@click.option(
    "--layers-per-bucket",
    type=click.IntRange(min=1),
    default=LAYERS_PER_BUCKET,
    show_default=True,
    help="Late exchanges in one message.",
)
@click.option("--dtype", type=click.Choice(RUN_DTYPES), help="Default: the model's own.")
@click.option(
    "--rank-of",
    type=click.IntRange(min=1),
    metavar="N",
    help="Instead, one rank of an N-rank plan alone, its exchanges served from memory.",
)
@click.option(
    "--patch", type=click.IntRange(min=0), default=0, show_default=True, help="Which, with --rank-of."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the readings, as JSON.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the comparison, as .png.")
@json_option
def command(**flags: Any) -> None:
    """Measure the steady step of every mode, in turn, in one run.

    \b
    Examples:
      distri bench --height 1024 --width 1024 -o bench.json --picture bench.png
      distri bench --modes corrected,fresh,gather_all --rounds 9
      distri bench --model sdxl --rank-of 8 --dtype float16
    """
    for path in (flags["output"], flags["picture"]):
        check_text_output(path)
    if flags["picture"] is not None and flags["picture"].suffix.lower() != ".png":
        raise OutputError(f"{flags['picture']}: the comparison is drawn as .png")
    if flags["rank_of"] is not None:
        _one_rank(flags)
        return
    _compare(flags)


def _compare(flags: dict[str, Any]) -> None:
    from distri.bench.chart import bar_chart
    from distri.bench.report import rows_of
    from distri.bench.variants import DEFAULT_MODES, BenchRequest, variants_of
    from distri.launch import run_ranks
    from distri.models.presets import defaults, load_graph
    from distri.outputs import is_writer, save

    height, width = image_size_of(flags)
    modes = tuple(part.strip() for part in flags["modes"].split(",") if part.strip()) or DEFAULT_MODES
    dtype = flags["dtype"] or defaults(flags["model"]).dtype
    request = BenchRequest(
        flags["model"], height, width, flags["gpus"], modes, flags["rounds"], flags["steps"], dtype,
        SplitAxis(flags["split"]), flags["layers_per_bucket"],
    )  # fmt: skip
    variants = variants_of(request, load_graph(request.model))
    with progress_bar("measuring", is_writer()) as progress:
        result = run_ranks(
            request.ranks,
            "distri.bench.ranks:measure_as_rank",
            {**dataclasses.asdict(request), "split": request.split.value},
            timeout_s=request.timeout_s,
            on_progress=progress,
        )
    if not is_writer():
        return
    rows = rows_of(result, variants)
    report = {
        "what": "seconds of a steady denoising step; medians of interleaved rounds; waits are all ranks' mean",
        "command": _command(flags),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "request": {**dataclasses.asdict(request), "split": request.split.value},
        "rows": [dataclasses.asdict(row) for row in rows],
        **result,
    }
    if flags["output"] is not None:
        import json

        write_text(flags["output"], json.dumps(report, indent=1) + "\n")
    title = f"{request.model}, {height}x{width}, {request.ranks} ranks, {request.dtype}; {result['device']}"
    if flags["picture"] is not None:
        save(bar_chart(rows, title), flags["picture"])
    if flags["as_json"]:
        print_json(report)
    else:
        _show(rows, f"{title}: seconds of a steady step")


def _command(flags: dict[str, Any]) -> str:
    names = (
        "model", "height", "width", "gpus", "modes", "rounds", "steps", "split", "layers_per_bucket", "dtype",
    )  # fmt: skip
    given = [f"--{name.replace('_', '-')} {flags[name]}" for name in names if flags[name]]
    return " ".join(["distri bench", *given])


def _show(rows: list[Row], title: str) -> None:
    shown = table(title, "way", "step", "speed-up", "waits", "received", "buffers")
    for row in rows:
        shown.add_row(
            row.name,
            f"{row.step_s * 1e3:.1f} ms",
            f"{row.speedup:.2f}x",
            f"{row.exposed:.1%}",
            scaled(row.bytes_per_step, "B"),
            scaled(row.buffer_bytes, "B"),
        )
    console().print(shown)


def _one_rank(flags: dict[str, Any]) -> None:
    from distri.bench.one_rank import OneRankRequest, measure_in_own_process
    from distri.models.presets import defaults

    height, width = image_size_of(flags)
    dtype = flags["dtype"] or defaults(flags["model"]).dtype
    result = measure_in_own_process(
        OneRankRequest(
            flags["model"], height, width, flags["rank_of"], flags["patch"], flags["rounds"], dtype
        )
    )
    if flags["output"] is not None:
        import json

        report = {
            "what": "one rank of a plan alone beside the unmodified model; medians of interleaved steps",
            "command": f"{_command(flags)} --rank-of {flags['rank_of']} --patch {flags['patch']}",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **dataclasses.asdict(result),
        }
        write_text(flags["output"], json.dumps(report, indent=1) + "\n")
    if flags["as_json"]:
        print_json(dataclasses.asdict(result))
        return
    show_result(
        f"Patch {flags['patch']} of {flags['rank_of']}, alone, on {result.device}",
        [
            ("the whole picture, unmodified", f"{result.whole_s * 1e3:.2f} ms"),
            ("this patch, unmodified", f"{result.patch_s * 1e3:.2f} ms"),
            ("this patch, exchanging, attending to itself", f"{result.own_patch_s * 1e3:.2f} ms"),
            ("overhead of the exchanges", f"{result.overhead:+.1%}"),
            ("this rank, attending to all", f"{result.rank_s * 1e3:.2f} ms"),
            ("efficiency against 1/N", f"{result.efficiency:.1%}"),
        ],
    )
