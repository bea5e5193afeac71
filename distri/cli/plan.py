"""`distri plan`: say what a run will do and cost, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from distri.cli.options import json_option, plan_from_flags, plan_options
from distri.cli.output import check_text_output, print_json, write_text
from distri.cli.render import show_plan
from distri.config.plan import dump_plan


@click.command("plan")
@plan_options("sdxl", 1)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the plan, for `distri run --plan`."
)
@json_option
def command(output: Path | None, as_json: bool, **flags: Any) -> None:
    """Make the plan of a run and print it. Needs no GPU, loads no weights.

    \b
    Examples:
      distri plan --gpus 8
      distri plan --gpus 4 --cfg-split off --height 1280 --width 1920 -o plan.json
      distri plan --gpus 3 --cfg-split off --bands 3,2,1 --json
    """
    check_text_output(output)
    plan = plan_from_flags(flags)
    if output is not None:
        write_text(output, json.dumps(dump_plan(plan)) + "\n")
    if as_json:
        print_json(dump_plan(plan))
    else:
        show_plan(plan)
