"""`distri graph`: what a model is made of, and what each operation would need of other ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from distri.cli.options import (
    RUN_DTYPES,
    image_size_of,
    json_option,
    load_model_graph,
    model_option,
    size_options,
)
from distri.cli.output import check_text_output, print_json, write_text
from distri.cli.render import show_totals
from distri.core.graph import LayerGraph
from distri.core.graph_text import describe, to_dot, totals
from distri.core.partition import check_image_size
from distri.core.plan import DTYPE_BYTES
from distri.core.planner import TEXT_TOKENS, reference_of
from distri.core.shape import Extent, full_rect
from distri.errors import OutputError


@click.command("graph")
@model_option("sdxl")
@size_options
@click.option("--dtype", type=click.Choice(RUN_DTYPES), default="float16", show_default=True)
@click.option(
    "--format",
    "form",
    type=click.Choice(("table", "json", "dot")),
    help="Default: json or dot where -o ends so, otherwise a table of totals.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write it to a file.")
@json_option
def command(
    model: str, dtype: str, form: str | None, output: Path | None, as_json: bool, **sides: Any
) -> None:
    """Print the layer graph of a model: one forward pass over one latent.

    \b
    Examples:
      distri graph
      distri graph --model demo -o demo.dot && dot -Tsvg demo.dot -o demo.svg
      distri graph --height 2048 --width 2048 --json
    """
    chosen = _format(form, output, as_json)
    check_text_output(output)
    graph = load_model_graph(model)
    height, width = image_size_of({"model": model, **sides})
    extent = Extent(1, TEXT_TOKENS, full_rect(*check_image_size(height, width, reference_of(graph).grain)))
    if output is not None:
        write_text(output, _text(chosen, graph, extent, DTYPE_BYTES[dtype]) + "\n")
    if as_json:
        print_json(describe(graph, extent, DTYPE_BYTES[dtype]))
    elif output is not None or chosen == "table":
        show_totals(f"{graph.name} at {height}x{width}", totals(graph, extent, DTYPE_BYTES[dtype]))
    else:
        click.echo(_text(chosen, graph, extent, DTYPE_BYTES[dtype]))


def _format(form: str | None, output: Path | None, as_json: bool) -> str:
    """The form that flags and file name ask for.

    Raises:
        OutputError: a table was asked for in a file.
    """
    if output is None:
        return form or ("json" if as_json else "table")
    chosen = form or {".json": "json", ".dot": "dot", ".gv": "dot"}.get(output.suffix, "")
    if chosen not in ("json", "dot"):
        raise OutputError(f"{output}: a graph is written as json or dot; use --format json or --format dot")
    return chosen


def _text(form: str, graph: LayerGraph, extent: Extent, element_bytes: int) -> str:
    if form == "dot":
        return to_dot(graph, extent)
    return json.dumps(describe(graph, extent, element_bytes))
