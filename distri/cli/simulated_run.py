"""`distri run --backend sim`: the picture from ranks in this process, the time from the simulator, named as such."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distri.cli.hardware_tables import seconds
from distri.cli.options import load_model_graph
from distri.cli.output import print_json
from distri.cli.render import console, progress_bar, show_result
from distri.cli.simulation_tables import warnings_of

if TYPE_CHECKING:
    from distri.executor import RunResult
    from distri.request import RunRequest
    from distri.simulator.result import SimulationResult


def run_simulated(request: RunRequest, hardware: str, as_json: bool) -> None:
    """Predict, draw if the weights are at hand, and report.

    Raises:
        UserError: the hardware is unknown or too small, or the model is unusable.
        RunError: drawing failed.
    """
    from distri.config.hardware import load_cluster
    from distri.simulator.simulate import simulate

    prediction = simulate(request.plan, load_model_graph(request.model), load_cluster(hardware))
    drawn = _draw(request) if has_weights(request.model) else None
    if as_json:
        print_json(_as_dict(request, prediction, drawn))
    else:
        _show(request, prediction, drawn)


def has_weights(model: str) -> bool:
    """Whether the weights are on this disk; nothing is fetched for a simulation."""
    from distri.models.presets import PRESETS

    return model == "demo" or (model not in PRESETS and (Path(model) / "model_index.json").is_file())


def _draw(request: RunRequest) -> RunResult:
    from distri import executor
    from distri.outputs import is_writer

    with progress_bar("drawing", is_writer()) as progress:
        return executor.run(dataclasses.replace(request, backend="in_process"), progress)


def _as_dict(request: RunRequest, prediction: SimulationResult, drawn: RunResult | None) -> dict[str, Any]:
    return {
        "image": str(drawn.image) if drawn is not None else None,
        "seconds": prediction.latency_s,
        "seconds_per_step": prediction.latency_s / request.plan.image.num_inference_steps,
        "ranks": prediction.num_ranks,
        "backend": "sim",
        "hardware": prediction.hardware,
        "seconds_are_simulated": True,
        "drawing_seconds": drawn.seconds if drawn is not None else None,
        "warnings": warnings_of(prediction),
    }


def _show(request: RunRequest, prediction: SimulationResult, drawn: RunResult | None) -> None:
    per_step_s = prediction.latency_s / request.plan.image.num_inference_steps
    rows = [
        (f"time, simulated on {prediction.hardware}", seconds(prediction.latency_s)),
        ("time of a step, simulated", seconds(per_step_s)),
        ("speed-up, simulated", f"{prediction.speedup:.2f}x"),
    ]
    if drawn is not None:
        rows.append(("picture, drawn by all ranks in this process", str(drawn.image)))
        rows.append(("time of drawing it here, no prediction", f"{drawn.seconds:.2f} s"))
    else:
        rows.append(("picture", f"none: the weights of {request.model} are not on this disk"))
    show_result(f"Simulated on {prediction.num_ranks} ranks: no such machine was used", rows)
    for warning in warnings_of(prediction):
        console().print(warning, style="bold red", markup=False)
