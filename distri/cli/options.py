"""Flags that several commands share, and what they mean: a plan made now, or one read from a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from distri.core.graph import LayerGraph
from distri.core.latent import LatentPlace
from distri.core.partition import SplitAxis
from distri.core.plan import DTYPE_BYTES, ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import PolicyTable, policy_table, table_names
from distri.core.refresh import RefreshRule
from distri.errors import PlanError

if TYPE_CHECKING:
    from distri.request import RunRequest

F = TypeVar("F", bound=Callable[..., Any])

RUN_DTYPES = tuple(name for name in DTYPE_BYTES if name.startswith(("float16", "float32", "bfloat")))
CFG_SPLITS = {"auto": None, "on": True, "off": False}
DESCRIBE_A_PLAN = (
    "cfg_split",
    "policy",
    "policy_table",
    "split",
    "bands",
    "warmup_steps",
    "refresh_above",
    "refresh_every",
    "latent",
)
"""Flags that leave nothing to search."""
IN_PLAN = (*DESCRIBE_A_PLAN, "dtype")
"""Flags that a plan from a file already answers."""


def parse_bands(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[Fraction, ...] | None:
    """Weights such as `3,2,1` or `1.5,1`, as exact fractions."""
    if text is None:
        return None
    try:
        weights = tuple(Fraction(part.strip()) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 3,2,1", ctx, param) from None
    if any(weight <= 0 for weight in weights):
        raise click.BadParameter(f"{text!r}: weights must be positive", ctx, param)
    return weights


def parse_scale(ctx: click.Context, param: click.Parameter, scale: float | None) -> float | None:
    """A finite number: click's own float takes nan and inf."""
    if scale is not None and not math.isfinite(scale):
        raise click.BadParameter(f"{scale} is not a finite number", ctx, param)
    return scale


def with_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def model_option(default: str) -> Callable[[F], F]:
    """`--model`."""
    return click.option(
        "--model",
        default=default,
        show_default=True,
        metavar="sdxl|demo|DIR",
        help="A preset, or a directory that holds a diffusers pipeline or UNet.",
    )


size_options = with_options(
    click.option("--height", type=int, metavar="PIXELS", help="Default: the model's own."),
    click.option("--width", type=int, metavar="PIXELS", help="Default: the model's own."),
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")


def plan_options(default_model: str, default_gpus: int) -> Callable[[F], F]:
    """All flags that make a plan."""
    return with_options(
        model_option(default_model),
        click.option(
            "--gpus", type=int, default=default_gpus, show_default=True, help="Ranks, one a device."
        ),
        size_options,
        click.option(
            "--num-inference-steps", type=int, metavar="N", help="Denoising steps. Default: the model's own."
        ),
        click.option(
            "--guidance-scale",
            type=float,
            callback=parse_scale,
            help="1 or less turns guidance off. Default: the model's own.",
        ),
        click.option(
            "--warmup-steps",
            type=int,
            default=PlanRequest.warmup_steps,
            show_default=True,
            help="First steps, at which ranks wait for each other.",
        ),
        click.option(
            "--refresh-above",
            type=click.FloatRange(min=0.0),
            metavar="X",
            help="Spend a synchronous step wherever the latent's relative change exceeds X.",
        ),
        click.option(
            "--refresh-every",
            type=click.IntRange(min=1),
            metavar="K",
            help="Spend a synchronous step after every K displaced ones.",
        ),
        click.option(
            "--cfg-split",
            type=click.Choice(tuple(CFG_SPLITS)),
            default="auto",
            show_default=True,
            help="Put the two guidance branches on different ranks.",
        ),
        click.option(
            "--policy",
            metavar="NAME",
            default="corrected",
            show_default=True,
            help=f"How exchanges are served: {', '.join(table_names())}.",
        ),
        click.option(
            "--policy-table",
            type=click.Path(path_type=Path),
            help="Rules for single layers or kinds of exchanges, on top of a table (docs/policies.md).",
        ),
        click.option(
            "--split",
            type=click.Choice(tuple(axis.value for axis in SplitAxis)),
            default=SplitAxis.ROWS.value,
            show_default=True,
            help="How the image is cut.",
        ),
        click.option(
            "--bands",
            callback=parse_bands,
            metavar="3,2,1",
            help="Sizes of the bands, as weights. Default: even.",
        ),
        click.option(
            "--latent",
            type=click.Choice(tuple(place.value for place in LatentPlace)),
            default=LatentPlace.WHOLE.value,
            show_default=True,
            help="What a rank keeps of the latent between steps: all of it, or its patch, which spares a gather.",
        ),
        click.option("--dtype", type=click.Choice(RUN_DTYPES), help="Default: the model's own."),
    )


run_options = with_options(
    click.option(
        "--plan",
        "plan_path",
        type=click.Path(path_type=Path),
        help="A plan that `distri plan -o` wrote, instead of the flags that make one.",
    ),
    plan_options("demo", 2),
    click.option(
        "--backend",
        type=click.Choice(("torch", "in_process", "sim")),
        default="torch",
        show_default=True,
        help="One process a rank (NCCL, gloo), all ranks in this one, or that on a simulated machine's clock.",
    ),
    click.option(
        "--hardware",
        default="a100-sxm",
        show_default=True,
        metavar="NAME|FILE",
        help="The machine of --backend sim; see `distri hardware list`.",
    ),
    click.option(
        "--prompt",
        default="a red circle above a blue square on a green ground",
        show_default=True,
        help="What to draw.",
    ),
    click.option("--negative-prompt", default="", help="What to keep out."),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True),
    click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=1.0),
        default=60.0,
        show_default=True,
        help="Seconds that a rank waits for another.",
    ),
)


def guidance_scale_of(flags: Mapping[str, Any]) -> float:
    """The scale asked for, or the model's own."""
    from distri.models.presets import defaults

    given = flags["guidance_scale"]
    return float(given if given is not None else defaults(flags["model"]).guidance_scale)


def load_model_graph(model: str) -> LayerGraph:
    """The layer graph of `--model`."""
    from distri.models.presets import load_graph

    return load_graph(model)


def image_size_of(flags: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width asked for; the model's own side where none was."""
    from distri.models.presets import defaults

    height, width = flags["height"], flags["width"]
    if height is None or width is None:
        side = defaults(flags["model"]).side
        height, width = height if height is not None else side, width if width is not None else side
    return height, width


def plan_from_flags(flags: Mapping[str, Any]) -> Plan:
    """The plan that the flags describe.

    Raises:
        UserError: there is none.
    """
    return make_plan(plan_request_from(flags), load_model_graph(flags["model"]))


def plan_request_from(flags: Mapping[str, Any]) -> PlanRequest:
    """The request for a plan that the flags describe.

    Raises:
        UserError: the model or the policy is unknown.
    """
    from distri.models.presets import defaults

    own = defaults(flags["model"])
    height, width = image_size_of(flags)
    steps = flags["num_inference_steps"]
    image = ImageRequest(
        height=height,
        width=width,
        num_inference_steps=own.num_inference_steps if steps is None else steps,
        guidance=guidance_scale_of(flags) > 1,
    )
    return PlanRequest(
        image=image,
        num_ranks=flags["gpus"],
        cfg_split=CFG_SPLITS[flags["cfg_split"]],
        policy=policy_of(flags),
        warmup_steps=flags["warmup_steps"],
        axis=SplitAxis(flags["split"]),
        weights=flags["bands"],
        dtype=flags["dtype"] or own.dtype,
        refresh=refresh_rule_of(flags),
        latent=LatentPlace(flags["latent"]),
    )


def policy_of(flags: Mapping[str, Any]) -> PolicyTable:
    """The table by name, or the user's own.

    Raises:
        PolicyError: there is no such table, or the file is none.
    """
    path: Path | None = flags.get("policy_table")
    if path is None:
        return policy_table(flags["policy"])
    from distri.config.policy import load_policy_table

    ctx = click.get_current_context(silent=True)
    is_asked = (
        ctx is not None and ctx.get_parameter_source("policy") is click.core.ParameterSource.COMMANDLINE
    )
    return load_policy_table(path, flags["policy"], load_model_graph(flags["model"]), is_asked)


def refresh_rule_of(flags: Mapping[str, Any]) -> RefreshRule | None:
    """The rule that the flags describe; None if they describe none."""
    above, every = flags["refresh_above"], flags["refresh_every"]
    return RefreshRule(above, every) if above is not None or every is not None else None


def plan_from_file(path: Path, flags: Mapping[str, Any], ctx: click.Context) -> Plan:
    """A plan from a file, held against its model and against the flags that were given beside it.

    Raises:
        UserError: the file is no sound plan, is for another model, or contradicts a flag.
    """
    from distri.config.plan import load_plan
    from distri.core.verify import verify_against

    plan = load_plan(path)
    given = {
        name for name in flags if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    model = flags["model"] if "model" in given else plan.model.name
    verify_against(plan, load_model_graph(model))
    for name in IN_PLAN:
        if name in given:
            raise PlanError(
                f"--{name.replace('_', '-')} belongs to the plan in {path}; give one or the other"
            )
    stored = {
        "height": plan.image.height,
        "width": plan.image.width,
        "num_inference_steps": plan.image.num_inference_steps,
        "gpus": plan.mesh.size,
    }
    for name, value in stored.items():
        if name in given and flags[name] != value:
            raise PlanError(
                f"{path} is a plan for --{name.replace('_', '-')} {value}, not {flags[name]}; make another plan"
            )
    if "guidance_scale" in given and (flags["guidance_scale"] > 1) != plan.image.guidance:
        state = "on" if plan.image.guidance else "off"
        raise PlanError(
            f"{path} is a plan with guidance {state}; --guidance-scale {flags['guidance_scale']:g} is not"
        )
    return plan


def request_from(
    flags: Mapping[str, Any], output: Path, ctx: click.Context, plan: Plan | None = None
) -> RunRequest:
    """What `distri run` and `distri compare` hand to the executor; `plan` if it was searched for.

    Raises:
        UserError: there is no such plan or model.
    """
    from distri.models.presets import defaults
    from distri.request import RunRequest

    path = flags["plan_path"]
    if plan is None:
        plan = plan_from_flags(flags) if path is None else plan_from_file(path, flags, ctx)
    scale = flags["guidance_scale"]
    if scale is None:
        scale = defaults(plan.model.name).guidance_scale if plan.image.guidance else 1.0
    return RunRequest(
        model=plan.model.name,
        plan=plan,
        prompt=flags["prompt"],
        negative_prompt=flags["negative_prompt"],
        seed=flags["seed"],
        guidance_scale=scale,
        backend=flags["backend"],
        output=output,
        timeout_s=flags["timeout_s"],
    )
