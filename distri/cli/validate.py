"""`distri validate`: predictions beside published figures, the ones used for calibration and the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from distri.cli.options import json_option, load_model_graph
from distri.cli.output import check_text_output, print_json, write_text
from distri.cli.render import console, table

if TYPE_CHECKING:
    from distri.simulator.validate import Validation

HEAD = """# Predictions beside published figures

Written by `distri validate -o docs/validation.md`; [the simulator](simulator.md) says how.

"""


@click.command("validate")
@click.argument("rows_path", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--hardware", default="a100-sxm", show_default=True, metavar="NAME|FILE", help="What they were taken on."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the table as Markdown.")
@json_option
def command(rows_path: Path | None, hardware: str, output: Path | None, as_json: bool) -> None:
    """Predict published latencies and speed-ups of SDXL, and say how far off the predictions are.

    FILE holds other rows, in the form of the shipped ones (latency_seconds and speedup lists).

    \b
    Examples:
      distri validate
      distri validate my-measurements.json --hardware h100-sxm
    """
    from distri.config.hardware import load_cluster
    from distri.simulator.calibrate import used_keys
    from distri.simulator.published import read_rows, shipped_rows
    from distri.simulator.validate import validate

    check_text_output(output)
    rows = read_rows(rows_path if rows_path is not None else shipped_rows())
    found = validate(rows, load_model_graph("sdxl"), load_cluster(hardware), used_keys())
    if output is not None:
        write_text(output, f"{HEAD}{found.table()}\n")
    if as_json:
        print_json(_as_dict(found))
    else:
        _show(found)


def _as_dict(found: Validation) -> dict[str, object]:
    return {
        "hardware": found.hardware,
        "mean_absolute_error": found.mean_absolute_error,
        "worst": found.worst,
        "rows": [
            {
                "case": row.row.key,
                "used": row.is_used,
                "published": row.row.value,
                "predicted": row.predicted,
                "error": row.error,
            }
            for row in found.rows
        ],
    }


def _show(found: Validation) -> None:
    made = table(f"Published figures on {found.hardware}", "case", "was", "published", "predicted", "error")
    for row in found.rows:
        unit = "x" if row.row.quantity.value == "speedup" else " s"
        made.add_row(
            row.row.key,
            "used" if row.is_used else "predicted",
            f"{row.row.value:g}{unit}",
            f"{row.predicted:.2f}{unit}",
            f"{row.error:+.1%}",
        )
    out = console()
    out.print(made)
    out.print(
        f"Predicted rows: mean absolute error {found.mean_absolute_error:.1%}, worst {found.worst:.1%}."
    )
