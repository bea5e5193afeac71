"""`distri profile`: measure the machine at hand, for the simulator to predict with."""

from __future__ import annotations

import os
import shlex
import sys
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from distri.cli.render import console, scaled, show_result, table
from distri.core.partition import FIXED_AXES, SplitAxis
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.errors import PartitionError, ProfileError

if TYPE_CHECKING:
    from distri.config.profile import Profile
    from distri.profiler.links import LinkProbe

STEPS = 22
"""Denoising steps of a pass; the first two are not timed."""
POLICIES = ("corrected", "local")
"""Between them, all ways to run a layer: by distri's own and by the unmodified model, whole or on a patch."""


@click.command("profile")
@model_option("demo")
@size_options
@click.option(
    "--gpus",
    "ranks",
    type=click.IntRange(1, 1024),
    multiple=True,
    default=(1, 2),
    show_default=True,
    help="Numbers of ranks whose shards to time; may be given several times.",
)
@click.option(
    "--split",
    "splits",
    type=click.Choice(tuple(axis.value for axis in FIXED_AXES)),
    multiple=True,
    default=("rows",),
    show_default=True,
    help="Ways to cut; may be given several times.",
)
@click.option(
    "--cfg-split/--no-cfg-split",
    default=True,
    show_default=True,
    help="Also time shards of one guidance branch, where ranks split the two.",
)
@click.option("--dtype", type=click.Choice(RUN_DTYPES), help="Default: the model's own.")
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of a rank, on a CPU."
)
@click.option(
    "--beside",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Processes that measure at once, as ranks of one host compute at once.",
)
@click.option(
    "--rounds", type=click.IntRange(1, 1000), default=7, show_default=True, help="Readings of each time."
)
@click.option("--steps/--no-steps", default=True, show_default=True, help="Also time whole forward passes.")
@click.option(
    "--links", "is_links", is_flag=True, help="Probe the links between --gpus ranks instead; writes YAML."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where the profile, or the hardware file, goes."
)
@json_option
def command(
    ranks: tuple[int, ...], is_links: bool, output: Path | None, as_json: bool, **flags: Any
) -> None:  # fmt: skip
    """Time a model's layers on the device at hand, or probe the links between ranks.

    The profile is for `distri simulate --profile`, the hardware file for `distri simulate --hardware`.

    \b
    Examples:
      distri profile -o profile.json
      distri profile --model sdxl --gpus 1 --gpus 8 --no-steps -o sdxl.json
      distri profile --beside 2 --gpus 2 -o beside.json
      distri profile --links --gpus 2 -o here.yaml
    """
    check_text_output(output)
    if is_links:
        _links(max(ranks), output, as_json)
    else:
        _layers(ranks, output, as_json, flags)


def _layers(ranks: tuple[int, ...], output: Path | None, as_json: bool, flags: dict[str, Any]) -> None:
    from distri.config.profile import dump_profile
    from distri.models.presets import defaults
    from distri.profiler.measure import ProfileRequest, measure

    dtype = flags["dtype"] or defaults(flags["model"]).dtype
    plans = _plans(ranks, flags, dtype)
    request = ProfileRequest(
        flags["model"],
        plans,
        dtype,
        flags["threads"],
        flags["beside"],
        flags["rounds"],
        flags["steps"],
        _command(),
    )
    profile = measure(request)
    if os.environ.get("RANK", "0") != "0":
        return
    text = dump_profile(profile)
    if output is not None:
        write_text(output, text)
    if as_json:
        click.echo(text, nl=False)
    else:
        _show(profile, output)


def _plans(ranks: tuple[int, ...], flags: dict[str, Any], dtype: str) -> tuple[Plan, ...]:
    """The plans whose shards are timed.

    Raises:
        PartitionError: the image splits in none of the ways asked for.
    """
    graph = load_model_graph(flags["model"])
    image = ImageRequest(*image_size_of(flags), STEPS)
    plans, refused = [], None
    for number, split, cfg_split, policy in product(ranks, flags["splits"], (False, True), POLICIES):
        if (cfg_split and (number % 2 or not flags["cfg_split"])) or (number == 1 and policy != POLICIES[0]):
            continue
        request = PlanRequest(
            image, number, cfg_split, policy_table(policy), warmup_steps=1, axis=SplitAxis(split), dtype=dtype
        )
        try:
            plans.append(make_plan(request, graph))
        except PartitionError as error:
            refused = error
    if refused is not None:
        raise refused
    return tuple(plans)


def _command() -> str:
    return shlex.join(["distri", *sys.argv[1:]])


def _show(profile: Profile, output: Path | None) -> None:
    made = table(
        f"{profile.model} on {profile.device} ({profile.dtype})",
        "kind",
        "times",
        "fastest",
        "slowest",
        "sum of one of each",
    )
    kinds: dict[str, list[float]] = {}
    for point in profile.operations:
        kinds.setdefault(point.key.kind.value, []).append(point.device_s)
    for kind, times in kinds.items():
        made.add_row(kind, str(len(times)), _ms(min(times)), _ms(max(times)), _ms(sum(times)))
    out = console()
    out.print(made)
    for step in profile.steps:
        key = step.key
        out.print(
            f"a pass over {key.rows}x{key.cols} of {key.num_patches} patches, batch {key.batch}, "
            f"{key.layers.value} layers: {_ms(step.seconds)}; its operations alone {_ms(step.parts_s)}"
        )
    if not profile.steps:
        out.print("no whole pass was timed")
    if output is not None:
        out.print(f"written to {output}; use it with: distri simulate --profile {output}", markup=False)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def _links(num_ranks: int, output: Path | None, as_json: bool) -> None:
    from distri.config.hardware import parse_cluster
    from distri.profiler.hardware_file import Provenance, hardware_text
    from distri.profiler.links import probe_links
    from distri.profiler.measure import device_name

    if num_ranks < 2:
        raise ProfileError("links are between ranks: --gpus 2 or more are needed")
    probe = probe_links(num_ranks)
    if os.environ.get("RANK", "0") != "0":
        return
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    device = device_name()
    name = output.stem if output is not None else "this-machine"
    text = hardware_text(probe, Provenance(device, created, _command()), name)
    parse_cluster(text)
    if output is not None:
        write_text(output, text)
    if as_json:
        print_json({"num_ranks": probe.num_ranks, "library": probe.library, "links": _as_dicts(probe)})
    else:
        _show_links(probe, output)


def _as_dicts(probe: LinkProbe) -> list[dict[str, Any]]:
    import dataclasses

    return [dataclasses.asdict(reading) for reading in probe.readings]


def _show_links(probe: LinkProbe, output: Path | None) -> None:
    rows = []
    for reading in probe.readings:
        way = "both directions share it" if reading.is_half_duplex else "each direction"
        found = (
            f"{reading.alpha_s * 1e6:.0f} us + bytes at {scaled(reading.bytes_per_s, 'B/s')} ({way}); "
            f"fit within {reading.mean_error:.0%}; {reading.awaited_s * 1e6:.0f} us for an awaited exchange; "
            f"computing slows down by {reading.slowdown:.0%}"
        )
        rows.append((f"ranks {reading.first} and {reading.second}", found))
    show_result(f"Links between {probe.num_ranks} ranks ({probe.library})", rows)
    if output is not None:
        console().print(
            f"written to {output}; use it with: distri simulate --hardware {output}", markup=False
        )
