"""`distri simulate`: how long a plan will take, what memory it needs and what each link carries."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distri.cli.options import (
    json_option,
    load_model_graph,
    plan_from_file,
    plan_options,
    plan_request_from,
    with_options,
)
from distri.cli.output import check_text_output, print_json, write_text
from distri.core.plan import Plan
from distri.core.planner import PlanRequest
from distri.errors import OutputError, PlanError
from distri.simulator.compute import LaunchMode
from distri.simulator.methods import Method, plan_of
from distri.simulator.options import CtaPolicy, SimulationOptions

if TYPE_CHECKING:
    from distri.core.graph import LayerGraph
    from distri.simulator.lowering import Lowering
    from distri.simulator.simulate import Simulation

PATTERNS = ("neighbours", "gather_all")

_simulation_options = with_options(
    click.option(
        "--hardware", default="a100-sxm", show_default=True, metavar="NAME|FILE", help="See `distri hardware list`."
    ),
    click.option("--hosts", type=int, metavar="N", help="So many hosts in place of the hardware file's own number."),
    click.option(
        "--method", type=click.Choice(tuple(method.value for method in Method)),
        help="Default: displaced; original on one device.",
    ),
    click.option(
        "--pattern", type=click.Choice(PATTERNS), default=PATTERNS[0], show_default=True,
        help="Messages as distri sends them, or as the published implementation does.",
    ),
    click.option(
        "--profile", "profile_path", type=click.Path(path_type=Path),
        help="Layer times that `distri profile` measured on such a device.",
    ),
    click.option(
        "--cuda-graphs/--eager", "has_graphs", default=True, show_default=True, help="How kernels are launched."
    ),
    click.option(
        "--ctas", type=click.Choice(tuple(policy.value for policy in CtaPolicy)), default=CtaPolicy.DEFAULT.value,
        show_default=True, help="Who moves bytes on a GPU: thread blocks, few of them, or copy engines.",
    ),
    click.option(
        "--num-ctas", type=click.IntRange(1, 1024), default=SimulationOptions.num_ctas, show_default=True,
        help="Thread blocks under --ctas limited.",
    ),
    click.option(
        "--contention/--no-contention", "has_contention", default=True, show_default=True,
        help="Whether concurrent transfers share links.",
    ),
    click.option(
        "--noise", type=float, default=0.0, show_default=True, metavar="SHARE",
        help="Standard deviation of a rank's speed; gives an interval.",
    ),
    click.option("--noise-seed", type=click.IntRange(0), default=0, show_default=True),
    click.option(
        "--per-step", "per_step_s", type=float, default=0.0, show_default=True, metavar="SECONDS",
        help="What else each step takes, such as the scheduler.",
    ),
    click.option(
        "--before", "before_s", type=float, default=0.0, show_default=True, metavar="SECONDS",
        help="What comes before the steps, such as text encoders.",
    ),
    click.option(
        "--after", "after_s", type=float, default=0.0, show_default=True, metavar="SECONDS",
        help="What comes after the steps, such as the VAE.",
    ),
)  # fmt: skip


@click.command("simulate")
@click.argument("plan_path", metavar="[PLAN]", required=False, type=click.Path(path_type=Path))
@plan_options("sdxl", 1)
@_simulation_options
@click.option("--trace", type=click.Path(path_type=Path), help="Write a Chrome / Perfetto trace.")
@click.option(
    "--trace-dir", type=click.Path(path_type=Path), help="Write one file a rank, for Holistic Trace Analysis."
)
@click.option("--html", type=click.Path(path_type=Path), help="Write a page that shows it all.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    plan_path: Path | None,
    trace: Path | None,
    trace_dir: Path | None,
    html: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Predict the time, the memory and the traffic of a run. Needs no GPU, loads no weights.

    Takes a PLAN that `distri plan -o` wrote, or the flags that make one.

    \b
    Examples:
      distri simulate --gpus 8 --cfg-split off
      distri simulate plan.json --hardware h100-sxm --trace trace.json --html report.html
      distri simulate --gpus 8 --method tensor_parallel --json
      distri simulate --model demo --gpus 2 --hardware cpu-gloo --profile profile.json
    """
    from distri.simulator.simulate import run_simulation

    for path in (trace, html):
        check_text_output(path)
    _check_directory(trace_dir)
    plan, graph, method = _plan_and_method(ctx, plan_path, flags)
    lowering = _lowering(plan, graph, flags)
    simulation = run_simulation(plan, lowering, method)
    if trace is not None or trace_dir is not None or html is not None:
        _write_pictures(simulation, plan, lowering, method, (trace, trace_dir, html))
    if as_json:
        from distri.cli.simulation_tables import warnings_of

        print_json(
            {**simulation.result.to_dict(), "warnings": warnings_of(simulation.result), "plan": plan.hash}
        )
        return
    from distri.cli.simulation_tables import show_simulation

    show_simulation(simulation.result, plan)
    _say_written(trace, trace_dir, html)


def _plan_and_method(
    ctx: click.Context, path: Path | None, flags: dict[str, Any]
) -> tuple[Plan, LayerGraph, Method | None]:
    """What is to be simulated.

    Raises:
        UserError: there is no such plan, or a flag contradicts it.
    """
    name = flags["method"]
    if path is None:
        graph = load_model_graph(flags["model"])
        request = plan_request_from(flags)
        method = Method(name) if name else Method.ORIGINAL if request.num_ranks == 1 else Method.DISPLACED
        _check_policy(ctx, method)
        return (
            plan_of(method, _patterned(request, flags["pattern"]), graph),
            graph,
            Method(name) if name else None,
        )
    for flag in ("method", "pattern"):
        if ctx.get_parameter_source(flag) is click.core.ParameterSource.COMMANDLINE:
            raise PlanError(
                f"--{flag} belongs to the plan in {path}; give the flags that make a plan instead"
            )
    plan = plan_from_file(path, flags, ctx)
    given = ctx.get_parameter_source("model") is click.core.ParameterSource.COMMANDLINE
    return plan, load_model_graph(flags["model"] if given else plan.model.name), None


def _check_policy(ctx: click.Context, method: Method) -> None:
    is_given = ctx.get_parameter_source("policy") is click.core.ParameterSource.COMMANDLINE
    if is_given and method not in (Method.DISPLACED, Method.ORIGINAL):
        raise PlanError(f"method {method.value!r} has a policy of its own; --policy goes with displaced")


def _patterned(request: PlanRequest, pattern: str) -> PlanRequest:
    return dataclasses.replace(request, pattern=pattern)


def options_from(flags: dict[str, Any]) -> SimulationOptions:
    """The options that the flags describe.

    Raises:
        UserError: one is out of range.
    """
    return SimulationOptions(
        launch=LaunchMode.GRAPH if flags["has_graphs"] else LaunchMode.EAGER,
        has_contention=flags["has_contention"],
        cta_policy=CtaPolicy(flags["ctas"]),
        num_ctas=flags["num_ctas"],
        noise=flags["noise"],
        noise_seed=flags["noise_seed"],
        before_s=flags["before_s"],
        after_s=flags["after_s"],
        per_step_s=flags["per_step_s"],
    )


def _lowering(plan: Plan, graph: LayerGraph, flags: dict[str, Any]) -> Lowering:
    from distri.config.hardware import load_cluster
    from distri.simulator.lowering import Lowering

    cluster = load_cluster(flags["hardware"], flags["hosts"])
    options = options_from(flags)
    path = flags["profile_path"]
    if path is None:
        return Lowering(graph, cluster, options)
    from distri.config.profile import measured_compute

    return Lowering(graph, cluster, options, measured_compute(path, plan))


def _check_directory(path: Path | None) -> None:
    if path is not None and not path.is_dir():
        raise OutputError(f"{path}: there is no such directory; make it first")


def _write_pictures(
    simulation: Simulation,
    plan: Plan,
    lowering: Lowering,
    method: Method | None,
    paths: tuple[Path | None, Path | None, Path | None],
) -> None:
    """Simulate once more, every step of it, and write what was asked for."""
    from distri.simulator.timeline import make_timeline

    trace, trace_dir, html = paths
    title = f"{plan.model.name} {plan.image.height}x{plan.image.width} on {plan.mesh.size} x {lowering.cluster.name}"
    channels = lowering.collectives.topology.channels
    timeline = make_timeline(simulation.tasks, channels, lowering.options, lowering.graph, title)
    if trace is not None:
        from distri.simulator.memory import held_at
        from distri.simulator.trace import chrome_trace, dump_trace

        is_split = method is Method.TENSOR_PARALLEL
        held = None if is_split else held_at(plan, lowering.graph, lowering.cluster)
        write_text(trace, dump_trace(chrome_trace(timeline, held)))
    if trace_dir is not None:
        from distri.simulator.trace import dump_trace, rank_trace

        for rank in range(plan.mesh.size):
            write_text(trace_dir / f"rank{rank}.json", dump_trace(rank_trace(timeline, rank)))
    if html is not None:
        from distri.cli.simulation_tables import warnings_of
        from distri.simulator.html_report import html_report, scaling_of

        scaling = scaling_of(plan, lowering, method)
        write_text(
            html,
            html_report(simulation.result, plan, lowering, timeline, scaling, warnings_of(simulation.result)),
        )


def _say_written(*paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            click.echo(f"written: {path}")
