"""`distri compare`: a plan's picture beside the single device's, from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from distri.cli.options import json_option, request_from, run_options
from distri.cli.output import print_json
from distri.cli.render import progress_bar, show_result


@click.command("compare")
@run_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("distri-compare.png"),
    show_default=True,
    help="Where the two pictures go, side by side.",
)
@json_option
@click.pass_context
def command(ctx: click.Context, /, output: Path, as_json: bool, **flags: Any) -> None:
    """Draw a picture by a plan and once more on one device, and say how far they are apart.

    \b
    Examples:
      distri compare -o side-by-side.png
      distri compare --gpus 4 --cfg-split off --policy local
      distri compare --backend in_process --gpus 3 --split cols --json
    """
    from distri.comparison import compare
    from distri.outputs import check_output, is_writer

    check_output(output)
    request = request_from(flags, output, ctx)
    with progress_bar("drawing twice", is_writer()) as progress:
        result = compare(request, progress)
    if not is_writer():
        return
    if as_json:
        print_json(
            {
                "psnr_db": result.psnr_db,
                "ssim": result.ssim,
                "max_latent_difference": result.max_latent_difference,
                "mean_latent_difference": result.mean_latent_difference,
                "seconds": result.seconds,
                "single_seconds": result.single_seconds,
                "image": str(result.image),
            }
        )
        return
    show_result(
        f"{request.plan.mesh.size} ranks against one",
        [
            ("PSNR", f"{result.psnr_db:.2f} dB"),
            ("SSIM", f"{result.ssim:.4f}"),
            ("largest latent difference", f"{result.max_latent_difference:.3g}"),
            ("mean latent difference", f"{result.mean_latent_difference:.3g}"),
            ("time by the plan", f"{result.seconds:.2f} s"),
            ("time on one device", f"{result.single_seconds:.2f} s"),
            ("pictures, the plan's first", str(result.image)),
        ],
    )
