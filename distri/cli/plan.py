"""`distri plan`: say what a run will do and cost, before anything is loaded.

With flags that name a plan (`--policy`, `--split`, `--bands`, ...) exactly that plan is made. Without them the planner
searches, and shows what it chose, what lost and why, and what would change the answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distri.cli.options import json_option, load_model_graph, plan_from_flags, plan_options
from distri.cli.output import check_text_output, print_json, write_text
from distri.cli.render import late_progress_bar, show_plan
from distri.cli.search_options import is_explicit, question_from, search_options
from distri.config.plan import dump_plan
from distri.errors import OutputError, PlanError

if TYPE_CHECKING:
    from distri.core.plan import Plan

NEEDS_SEARCH = ("html", "pareto", "picture")


@click.command("plan")
@plan_options("sdxl", 1)
@search_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the plan, for `distri run --plan`."
)
@click.option("--explain", metavar="LAYER", help="Show the life of one layer's exchange.")
@click.option(
    "--diff", type=click.Path(path_type=Path), nargs=2, metavar="A.json B.json", help="Compare two plans."
)
@click.option("--html", type=click.Path(path_type=Path), help="Write the same as a page.")
@click.option("--pareto", is_flag=True, help="Show latency against device-seconds.")
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Write that curve as a picture: .svg or .png."
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    output: Path | None,
    explain: str | None,
    diff: tuple[Path, Path] | None,
    html: Path | None,
    pareto: bool,
    picture: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Find the best plan of a run, or make the one that is asked for, and print it. Needs no GPU, loads no weights.

    Any of --cfg-split, --policy, --policy-table, --split, --bands, --warmup-steps, --refresh-* and --latent asks for
    exactly one plan; without them all plans are searched for the one that suits the hardware best.

    \b
    Examples:
      distri plan --gpus 8
      distri plan --gpus 64 --hosts 8 --objective price --price-per-hour 2.5
      distri plan --gpus 4 --hardware rtx4090 --memory-limit 20GB --html plan.html
      distri plan --gpus 4 --cfg-split off --height 1280 --width 1920 -o plan.json
      distri plan --gpus 3 --cfg-split off --bands 3,2,1 --json
    """
    for path in (output, html, picture):
        check_text_output(path)
    if picture is not None and picture.suffix not in (".svg", ".png"):
        raise OutputError(f"{picture}: a picture is written as .svg or .png")
    if diff is not None:
        from distri.cli.plan_diff import show_difference

        show_difference(*diff, as_json)
        return
    if is_explicit(ctx):
        for name in NEEDS_SEARCH:
            if ctx.params.get(name):
                raise PlanError(
                    f"--{name} shows what a search found; leave out the flags that ask for one plan"
                )
        _explicit(flags, output, explain, as_json)
        return
    found = _searched(flags, pareto or picture is not None)
    _write(found, output, html, picture)
    if explain is not None:
        _explain(_plan_of(found), explain, flags, as_json)
    elif as_json:
        print_json({**found["plan"], "search": found["search"]})
    else:
        from distri.cli.preview import show_pareto, show_preview

        show_preview(found)
        if pareto:
            show_pareto(found["search"]["pareto"])


def _explicit(flags: dict[str, Any], output: Path | None, explain: str | None, as_json: bool) -> None:
    plan = plan_from_flags(flags)
    if output is not None:
        write_text(output, json.dumps(dump_plan(plan)) + "\n")
    if explain is not None:
        _explain(plan, explain, flags, as_json)
    elif as_json:
        print_json(dump_plan(plan))
    else:
        show_plan(plan)


def _searched(flags: dict[str, Any], has_pareto: bool) -> dict[str, Any]:
    from distri.search.planning import answer

    question = question_from(flags, has_pareto)
    with late_progress_bar("searching") as progress:
        return answer(question, progress)


def _write(found: dict[str, Any], output: Path | None, html: Path | None, picture: Path | None) -> None:
    if output is not None:
        write_text(output, json.dumps({**found["plan"], "search": found["search"]}) + "\n")
    if html is not None:
        from distri.cli.plan_html import page

        write_text(html, page(found))
    if picture is not None:
        from distri.cli.plan_html import write_picture

        write_picture(picture, found["search"])


def _plan_of(found: dict[str, Any]) -> Plan:
    from distri.config.plan import parse_plan

    return parse_plan(json.dumps(found["plan"]))


def _explain(plan: Plan, layer: str, flags: dict[str, Any], as_json: bool) -> None:
    from distri.cli.plan_explain import show_life
    from distri.config.hardware import load_cluster

    cluster = load_cluster(flags["hardware"], flags["hosts"])
    show_life(plan, load_model_graph(flags["model"]), cluster, layer, as_json)
