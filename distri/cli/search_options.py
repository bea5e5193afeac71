"""Flags of the search, and the question that they and the flags of a plan ask."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from distri.cli.options import DESCRIBE_A_PLAN, load_model_graph, plan_request_from, with_options
from distri.core.partition import Grain, check_image_size
from distri.core.planner import check_warmup, choose_mesh, make_plan
from distri.search.request import Limits, Objective, Risk, SearchRequest

if TYPE_CHECKING:
    from distri.search.planning import Question

MOST_DEVICES: Final = 1024
_SIZES: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """A size such as `20GB` or `16GiB`, in bytes."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?|)b?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise click.BadParameter(f"{text!r} is not a size such as 20GB or 16GiB", ctx, param)
    return int(float(found[1]) * _SIZES[found[2].lower()])


def parse_ranks(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...]:
    """Devices such as `3,5`."""
    if text is None:
        return ()
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of devices such as 3,5", ctx, param) from None


def parse_speeds(
    ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]
) -> tuple[tuple[int, float], ...]:
    """Speeds such as `3=0.5`."""
    found = {}
    for text in texts:
        device, _, speed = text.partition("=")
        try:
            found[int(device)] = float(speed)
        except ValueError:
            raise click.BadParameter(
                f"{text!r} is not a device and its share of full speed such as 3=0.5", ctx, param
            ) from None
    return tuple(sorted(found.items()))


search_options = with_options(
    click.option(
        "--hardware",
        default="a100-sxm",
        show_default=True,
        metavar="NAME|FILE",
        help="See `distri hardware list`.",
    ),
    click.option(
        "--hosts", type=click.IntRange(1), metavar="N", help="Hosts. Default: as many as --gpus needs."
    ),
    click.option(
        "--objective",
        type=click.Choice(tuple(item.value for item in Objective)),
        default=Objective.LATENCY.value,
        show_default=True,
        help="What is to be least (throughput: seconds per picture, replicas side by side).",
    ),
    click.option("--images", type=click.IntRange(1), default=1, show_default=True, help="Pictures wanted."),
    click.option(
        "--memory-limit", callback=parse_bytes, metavar="SIZE", help="Of a device. Default: all that it has."
    ),
    click.option(
        "--min-psnr",
        type=click.FloatRange(min=0.0, max=200.0),
        metavar="DB",
        help="Least likeness to the single device's picture, by the measured table, in place of --max-risk.",
    ),
    click.option(
        "--max-risk",
        type=click.Choice(tuple(item.value for item in Risk)),
        default=Risk.CORRECTED.value,
        show_default=True,
        help="The most that may be done to the picture, in this order.",
    ),
    click.option("--price-per-hour", type=click.FloatRange(min=0.0, min_open=True), help="Of one device."),
    click.option("--down", callback=parse_ranks, metavar="3,5", help="Devices that may not be used."),
    click.option(
        "--speed",
        "speeds",
        callback=parse_speeds,
        multiple=True,
        metavar="3=0.5",
        help="A device's share of its full speed; may be given several times.",
    ),
    click.option(
        "--profile",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Layer times that `distri profile` measured on these devices.",
    ),
)


def is_explicit(ctx: click.Context) -> bool:
    """Whether the flags ask for one plan rather than for the best one."""
    given = click.core.ParameterSource.COMMANDLINE
    return any(name in ctx.params and ctx.get_parameter_source(name) is given for name in DESCRIBE_A_PLAN)


def question_from(flags: Mapping[str, Any], has_pareto: bool = False) -> Question:
    """What the flags ask the planner.

    Raises:
        UserError: a figure is out of range, or the picture cannot be made at all.
    """
    from distri.search.planning import Question

    plan_request = plan_request_from({**flags, "gpus": max(1, flags["gpus"])})
    request = SearchRequest(
        image=plan_request.image,
        num_devices=flags["gpus"],
        dtype=plan_request.dtype,
        objective=Objective(flags["objective"]),
        num_images=flags["images"],
        memory_limit_bytes=flags["memory_limit"],
        min_psnr_db=flags["min_psnr"],
        max_risk=Risk(flags["max_risk"]),
        price_per_hour=flags["price_per_hour"],
        down=flags["down"],
        speeds=flags["speeds"],
        limits=Limits(),
    )
    check_warmup(plan_request, choose_mesh(plan_request))
    files, factor = graph_files(flags["model"])
    check_image_size(plan_request.image.height, plan_request.image.width, Grain(1, "", factor))
    if request.num_devices > MOST_DEVICES:
        graph = load_model_graph(flags["model"])
        make_plan(dataclasses.replace(plan_request, num_ranks=request.num_devices, cfg_split=False), graph)
    return Question(
        request,
        flags["hardware"],
        flags["hosts"],
        files,
        lambda: load_model_graph(flags["model"]),
        flags["profile"],
        has_pareto=has_pareto,
    )


def graph_files(model: str) -> tuple[tuple[Path, ...], int]:
    """The files that a model's layer graph depends on, and its VAE's factor.

    Raises:
        ModelError: there is no such model.
    """
    from distri.models.presets import DEFAULT_VAE_FACTOR, PRESETS, data_path, read_unet_config, vae_factor

    if model in PRESETS:
        return (data_path(model),), DEFAULT_VAE_FACTOR
    read_unet_config(model)
    folder = Path(model)
    candidates = (folder / "unet" / "config.json", folder / "config.json", folder / "vae" / "config.json")
    return tuple(path for path in candidates if path.is_file()), vae_factor(folder)
