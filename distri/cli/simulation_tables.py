"""A prediction for people: one line that says it, what is wrong with the plan in plain words, and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distri.cli.hardware_tables import seconds
from distri.cli.render import console, scaled, table
from distri.core.plan import Plan
from distri.simulator.html_report import longest_segments
from distri.simulator.result import SimulationResult

if TYPE_CHECKING:
    from rich.table import Table

MOST_RANKS = 16
MOST_SEGMENTS = 6
METHODS = {
    "original": "the unmodified model",
    "full_sync": "synchronous patches",
    "naive_patch": "patches without interaction",
    "no_sync": "displaced patches without communication after the warm-up",
    "no_communication": "displaced patches without communication after the warm-up",
    "tensor_parallel": "tensor parallelism",
}


def warnings_of(result: SimulationResult) -> list[str]:
    """What speaks against the plan, in sentences; empty if nothing does."""
    found = []
    if result.is_slower_than_one_device:
        found.append(
            f"This is slower than one device alone: {seconds(result.latency_s)} on {result.num_ranks} devices, "
            f"{seconds(result.original_s)} on one."
        )
    unfit = [(rank, use) for rank, use in enumerate(result.memory) if not use.fits]
    if unfit:
        rank, use = max(unfit, key=lambda item: item[1].total - item[1].limit)
        found.append(
            f"This does not fit in memory: rank {rank} needs {scaled(use.total, 'B')} of {scaled(use.limit, 'B')}; "
            f"activations are at their peak at {use.peak_layer or 'the model itself'} "
            f"({scaled(use.activations, 'B')})."
        )
    return found


def show_simulation(result: SimulationResult, plan: Plan) -> None:
    """Print it."""
    out = console()
    image = plan.image
    devices = "1 device" if result.num_ranks == 1 else f"{result.num_ranks} devices"
    out.print(
        f"{plan.model.name}: {image.height}x{image.width}, {image.num_inference_steps} steps, {plan.dtype}, "
        f"{devices} of {result.hardware}, {METHODS.get(result.method, f'policy {result.method}')}",
        markup=False,
    )
    for warning in warnings_of(result):
        out.print(warning, style="bold red", markup=False)
    out.print(_summary(result))
    out.print(_ranks(result))
    if len(result.critical_path) > 1:
        out.print(_path(result, plan))
    out.print(_known(result))
    out.print(f"Assumed: {'; '.join(result.assumptions)}.", markup=False)


def _summary(result: SimulationResult) -> Table:
    made = table("Prediction", "what", "value", "known")
    known = {name: tag.value for name, tag in result.tags.items()}
    made.add_row("time of the run", seconds(result.latency_s), known["latency_s"])
    if result.interval_s:
        low, high = result.interval_s
        made.add_row("  with noise, 5 to 95 %", f"{seconds(low)} to {seconds(high)}", known["latency_s"])
    made.add_row("one device alone", seconds(result.original_s), known["compute_s"])
    if result.num_ranks > 1:
        made.add_row(
            "speed-up", f"{result.speedup:.2f}x (efficiency {result.efficiency:.0%})", known["speedup"]
        )
    made.add_row("computing, on the critical path", seconds(result.compute_s), known["compute_s"])
    if result.num_ranks > 1:
        made.add_row(
            "communication that is not hidden", seconds(result.exposed_communication_s),
            known["exposed_communication_s"],
        )  # fmt: skip
        made.add_row(
            "communication that is hidden",
            seconds(result.hidden_communication_s),
            known["exposed_communication_s"],
        )
    if result.launch_s:
        made.add_row("launching kernels", seconds(result.launch_s), known["compute_s"])
    if result.outside_s:
        made.add_row("outside of the denoiser", seconds(result.outside_s), "given")
    if result.bytes_on_link:
        name, busiest = max(result.bytes_on_link.items(), key=lambda item: item[1])
        made.add_row("busiest link carries", f"{scaled(busiest, 'B')} ({name})", known["bytes_on_link"])
    return made


def _ranks(result: SimulationResult) -> Table:
    made = table("Ranks", "rank", "computing", "exposed", "waiting", "received", "memory", "peak at")
    made.columns[-1].justify = "left"
    for rank in range(min(result.num_ranks, MOST_RANKS)):
        time, use = result.ranks[rank], result.memory[rank]
        made.add_row(
            str(rank),
            seconds(time.compute_s),
            seconds(time.exposed_communication_s),
            seconds(time.waiting_s),
            scaled(result.bytes_received[rank], "B"),
            f"{scaled(use.total, 'B')} of {scaled(use.limit, 'B')}{'' if use.fits else ' !'}",
            use.peak_layer or "the model itself",
        )
    if result.num_ranks > MOST_RANKS:
        made.caption = f"and {result.num_ranks - MOST_RANKS} more; --json has all of them"
    return made


def _path(result: SimulationResult, plan: Plan) -> Table:
    made = table("Critical path, longest first", "what", "on", "time", "share")
    made.columns[1].justify = "left"
    for what, where, spent in longest_segments(result, plan)[:MOST_SEGMENTS]:
        made.add_row(what, where, seconds(spent), f"{spent / result.latency_s:.0%}")
    return made


def _known(result: SimulationResult) -> Table:
    made = table("How it is known", "figure", "tag", "source")
    made.columns[1].justify = made.columns[2].justify = "left"
    for name, tag in result.tags.items():
        kind, _, rest = name.partition(": ")
        if rest:
            made.add_row(name, tag.value, result.sources.get(rest, "") if kind == "compute" else "")
    return made
