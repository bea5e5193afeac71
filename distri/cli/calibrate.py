"""`distri calibrate`: fit the few free parameters of the cost models to given points, and say how well they fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from distri.cli.options import json_option, load_model_graph
from distri.cli.output import check_text_output, print_json
from distri.cli.render import console, table
from distri.errors import UserError

if TYPE_CHECKING:
    from distri.simulator.calibrate import Calibration
    from distri.simulator.published import PublishedRow


@click.command("calibrate")
@click.argument("rows_path", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@click.option("--hardware", default="a100-sxm", show_default=True, metavar="NAME|FILE")
@click.option(
    "--point",
    "keys",
    multiple=True,
    metavar="CASE",
    help="A row to fit to, as `distri validate` names it; several times. Default: those of the shipped calibration.",
)
@click.option(
    "--parameter",
    "parameters",
    multiple=True,
    metavar="PATH",
    help="A figure of the hardware file, such as compute.kernel_gap_s; several times.",
)
@click.option(
    "--write",
    "target",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Put the fitted values, with tag and source, into this hardware file.",
)
@click.option("--record", type=click.Path(path_type=Path), help="Write points, values and residuals as YAML.")
@json_option
def command(
    rows_path: Path | None, hardware: str, keys: tuple[str, ...], parameters: tuple[str, ...],
    target: Path | None, record: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Fit parameters of a hardware file to at most four measured or published points of SDXL.

    \b
    Examples:
      distri calibrate
      distri calibrate mine.json --hardware my.yaml --parameter compute.kernel_gap_s --write my.yaml
    """
    from distri.config.hardware import load_cluster
    from distri.simulator.calibrate import DEFAULT_PARAMETERS, calibrate, write_record, write_values
    from distri.simulator.published import read_rows, shipped_rows

    check_text_output(record)
    points = _points(read_rows(rows_path if rows_path is not None else shipped_rows()), keys, rows_path)
    found = calibrate(
        points, load_model_graph("sdxl"), load_cluster(hardware), parameters or DEFAULT_PARAMETERS
    )
    if target is not None:
        write_values(found, target)
    if record is not None:
        write_record(found, record)
    if as_json:
        print_json(_as_dict(found))
    else:
        _show(found)


def _points(rows: tuple[PublishedRow, ...], keys: tuple[str, ...], path: Path | None) -> list[PublishedRow]:
    """The rows to fit to.

    Raises:
        UserError: there is none of that name.
    """
    from distri.simulator.calibrate import used_keys

    if not keys and path is not None:
        return list(rows)
    by_key = {row.key: row for row in rows}
    chosen = keys or used_keys()
    for key in chosen:
        if key not in by_key:
            raise UserError(f"no row is called {key!r}; there are: {'; '.join(by_key)}")
    return [by_key[key] for key in chosen]


def _as_dict(found: Calibration) -> dict[str, object]:
    return {
        "hardware": found.hardware,
        "parameters": dict(found.values),
        "source": found.source,
        "points": [
            {"case": point.key, "given": point.given, "fitted": point.fitted, "error": point.error}
            for point in found.residuals
        ],
    }


def _show(found: Calibration) -> None:
    points = table(f"Fitted to, on {found.hardware}", "case", "given", "fitted", "residual")
    for point in found.residuals:
        points.add_row(point.key, f"{point.given:g}", f"{point.fitted:.3f}", f"{point.error:+.1%}")
    values = table("Parameters", "figure", "value")
    for name, value in found.values.items():
        values.add_row(name, f"{value:.4g}")
    out = console()
    out.print(points)
    out.print(values)
