"""`distri evaluate`: what each synchronisation mode does to the picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distri.cli.options import json_option, model_option, parse_scale
from distri.cli.output import print_json
from distri.cli.render import progress_bar
from distri.errors import UserError

if TYPE_CHECKING:
    from distri.evaluation import Evaluation

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
    """The request and its rows."""
    return {
        "request": dataclasses.asdict(evaluation.request),
        "reference_words_obeyed": evaluation.reference_words_obeyed,
        "rows": [
            {
                **dataclasses.asdict(row.setting),
                **{k: v for k, v in dataclasses.asdict(row).items() if k != "setting"},
            }
            for row in evaluation.rows()
        ],
    }


def _print_table(evaluation: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Against the single device, from the same noise")
    for name in (
        "mode",
        "ranks",
        "sampler",
        "steps",
        "PSNR dB",
        "SSIM",
        "LPIPS",
        "seam",
        "words",
        "drift",
        "kB/step",
    ):
        table.add_column(name, justify="left" if name in ("mode", "sampler") else "right")
    for row in evaluation.rows():
        s = row.setting
        table.add_row(
            s.mode, str(s.ranks), s.sampler, str(s.steps), f"{row.psnr_db:.2f}", f"{row.ssim:.4f}",
            "-" if row.lpips is None else f"{row.lpips:.3f}", f"{row.seam:.2f}",
            "-" if row.words_obeyed is None else f"{100 * row.words_obeyed:.0f} %",
            f"{row.final_drift:.4f}", f"{row.bytes_per_step / 1e3:.0f}",
        )  # fmt: skip
    Console().print(table)
    if evaluation.reference_words_obeyed is not None:
        click.echo(
            f"The single device itself obeys its words in {100 * evaluation.reference_words_obeyed:.0f} %."
        )
