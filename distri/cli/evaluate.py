"""`distri evaluate`: what each synchronisation mode does to the picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distri.cli.options import json_option, model_option, parse_scale
from distri.cli.output import print_json
from distri.cli.render import console, progress_bar, scaled, table
from distri.errors import UserError

if TYPE_CHECKING:
    from distri.evaluation import Evaluation, Observation, Row

ALL_MODES = "full_sync,corrected_async_gn,stale_gn,separate_gn,sync_gn,no_sync,naive_patch"


def parse_numbers(ctx: click.Context, param: click.Parameter, text: str) -> tuple[int, ...]:
    """A list such as `2,4,8`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a list of whole numbers such as 2,4,8", ctx, param
        ) from None


def parse_names(ctx: click.Context, param: click.Parameter, text: str) -> tuple[str, ...]:
    """A list such as `ddim,euler`."""
    return tuple(part.strip() for part in text.split(","))


@click.command("evaluate")
@model_option("demo")
@click.option("--prompt", "prompts", multiple=True, help="A sentence; may be given several times.")
@click.option(
    "--num-prompts",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Of the demo's held-out ones.",
)
@click.option("--seeds", callback=parse_numbers, default="0", show_default=True)
@click.option(
    "--modes",
    callback=parse_names,
    default=ALL_MODES,
    show_default=True,
    help="Policies, or YAML files with a table of your own; @cols for columns, +every=K for refreshes.",
)
@click.option("--ranks", callback=parse_numbers, default="2,4,8", show_default=True, help="Patches.")
@click.option(
    "--samplers", callback=parse_names, default="ddim", show_default=True, help="ddim, euler, dpm-solver++."
)
@click.option("--steps", callback=parse_numbers, default="50", show_default=True)
@click.option("--height", type=int, default=256, show_default=True)
@click.option("--width", type=int, default=256, show_default=True)
@click.option("--warmup-steps", type=click.IntRange(1), default=5, show_default=True)
@click.option("--guidance-scale", type=float, default=3.0, show_default=True, callback=parse_scale)
@click.option(
    "--dtype", type=click.Choice(("float32", "float16", "bfloat16")), default="float32", show_default=True
)
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet of all pictures here.")
@json_option
def command(as_json: bool, sheet: Path | None, num_prompts: int, **flags: Any) -> None:
    """Draw prompts x seeds x modes x ranks from identical noise, and hold each against the single device's picture.

    \b
    Examples:
      distri evaluate --num-prompts 4 --ranks 4 --modes corrected,local --sheet sheet.png
      distri evaluate --steps 4,10,25,50 --samplers ddim,euler,dpm-solver++ --ranks 4 --json
    """
    from distri.contact_sheet import contact_sheet
    from distri.evaluation import EvaluationRequest, demo_prompts, evaluate
    from distri.models.presets import load_graph
    from distri.models.samplers import SAMPLERS
    from distri.outputs import check_output, save

    check_output(sheet)
    unknown = [name for name in flags["samplers"] if name not in SAMPLERS]
    if unknown:
        raise UserError(f"unknown sampler {unknown[0]!r}; known: {', '.join(SAMPLERS)}")
    if not flags["prompts"]:
        if flags["model"] != "demo":
            raise UserError("--prompt is needed for a model other than demo")
        flags["prompts"] = demo_prompts(num_prompts)
    request = EvaluationRequest(**flags)
    with progress_bar("drawing") as progress:
        evaluation = evaluate(request, load_graph(request.model), progress)
    if sheet is not None:
        save(contact_sheet(evaluation), sheet)
    if as_json:
        print_json(to_json(evaluation))
    else:
        _print_table(evaluation)


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """The request, its rows, and the figures of each picture."""
    return {
        "request": dataclasses.asdict(evaluation.request),
        "reference_words_obeyed": evaluation.reference_words_obeyed,
        "rows": [_figures(row) for row in evaluation.rows()],
        "pictures": [_figures(observation, "picture", "drift") for observation in evaluation.observations],
    }


def _figures(record: Row | Observation, *left_out: str) -> dict[str, Any]:
    """The fields of a record, its setting's first."""
    names = [f.name for f in dataclasses.fields(record) if f.name not in ("setting", *left_out)]
    return {**dataclasses.asdict(record.setting), **{name: getattr(record, name) for name in names}}


def _print_table(evaluation: Evaluation) -> None:
    """A column for what differs between rows; what all rows share stands in the title."""
    request, rows = evaluation.request, evaluation.rows()
    has_samplers, has_lengths = len(request.samplers) > 1, len(request.steps) > 1
    has_refreshes = any("+" in mode for mode in request.modes)
    has_lpips = any(row.lpips is not None for row in rows)
    columns = {
        "mode": [row.setting.mode for row in rows],
        "ranks": [str(row.setting.ranks) for row in rows],
        **({"sampler": [row.setting.sampler for row in rows]} if has_samplers else {}),
        **({"steps": [str(row.setting.steps) for row in rows]} if has_lengths else {}),
        **({"waits at": [f"{row.synchronous_steps:g}" for row in rows]} if has_refreshes else {}),
        "PSNR, dB": [f"{row.psnr_db:.2f}" for row in rows],
        "+-": [_or_dash(row.psnr_error_db, "{:.2f}") for row in rows],
        "SSIM": [f"{row.ssim:.4f}" for row in rows],
        **({"LPIPS": [_or_dash(row.lpips, "{:.3f}") for row in rows]} if has_lpips else {}),
        "seam": [f"{row.seam:.2f}" for row in rows],
        "words": [_or_dash(row.words_obeyed, "{:.0%}") for row in rows],
        "drift": [f"{row.final_drift:.4f}" for row in rows],
        "a step": [scaled(row.bytes_per_step, "B") for row in rows],
    }
    count = len(request.prompts) * len(request.seeds)
    shared = [
        f"{request.height}x{request.width} pixels",
        *([] if has_lengths else [f"{request.steps[0]} steps"]),
        *([] if has_samplers else [request.samplers[0]]),
        f"{count} {'picture' if count == 1 else 'pictures'} a row",
    ]
    found = table(f"Against the single device, from the same noise: {', '.join(shared)}", *columns)
    for cells in zip(*columns.values(), strict=True):
        found.add_row(*cells)
    console().print(found)
    click.echo(
        "+-: standard error of the mean PSNR. seam: gradient across the patches' borders, relative to elsewhere.\n"
        "drift: relative RMS difference of the last latent. a step: what a rank receives in a late one, at most."
        + ("\nwaits at: steps at which ranks wait, of warm-up and refreshes." if has_refreshes else "")
    )
    if evaluation.reference_words_obeyed is not None:
        click.echo(f"The single device itself obeys its words in {evaluation.reference_words_obeyed:.0%}.")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
