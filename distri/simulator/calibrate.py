"""Fit the few free parameters of the analytic cost models to given points, and keep the result with its provenance.

A parameter is a figure of a hardware file, by its path: `compute.convolution_efficiency`, `compute.kernel_gap_s`,
`compute.attention.efficiency`, `collectives.blocking_extra_s` and their like. Least squares of the logarithm of
predicted over given values, by scipy (imported only here). Predictions are the simulator's own (tier 2).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from distri.core.graph import LayerGraph
from distri.errors import HardwareError, UserError
from distri.simulator.hardware import Cluster, Figure, Tag
from distri.simulator.longest_path import longest_path_ns
from distri.simulator.lowering import Lowering
from distri.simulator.methods import lower_method
from distri.simulator.options import SimulationOptions
from distri.simulator.published import PublishedRow, Quantity, plan_of_row
from distri.simulator.simulate import original_ns

MAX_POINTS: Final = 4
DEFAULT_PARAMETERS: Final = ("compute.convolution_efficiency", "compute.kernel_gap_s")
_LIMITS: Final = {"_s": (1e-8, 1e-3), "": (0.05, 1.2)}
_NS: Final = 1e9
_ORIGIN: Final = 10.0
"""Where the logarithms of scaled parameters start: scipy's steps are relative, so not at 0."""


@dataclass(frozen=True)
class Residual:
    """One point: its key, what was given and what the fitted model says."""

    key: str
    given: float
    fitted: float

    @property
    def error(self) -> float:
        """Relative error."""
        return self.fitted / self.given - 1


@dataclass(frozen=True)
class Calibration:
    """Fitted values by parameter, the points they were fitted to, and the cluster that has them."""

    hardware: str
    values: Mapping[str, float]
    residuals: tuple[Residual, ...]
    cluster: Cluster

    @property
    def source(self) -> str:
        """Provenance in a sentence."""
        worst = max(abs(residual.error) for residual in self.residuals)
        cases = "; ".join(residual.key for residual in self.residuals)
        return f"calibrated on {len(self.residuals)} points ({cases}), worst residual {worst:.1%}"

    def __str__(self) -> str:
        lines = [f"{self.hardware}: {len(self.residuals)} points, {len(self.values)} parameters"]
        lines += [
            f"  {r.key}: given {r.given:g}, fitted {r.fitted:.3f} ({r.error:+.1%})" for r in self.residuals
        ]
        lines += [f"  {name} = {value:.4g}" for name, value in self.values.items()]
        return "\n".join(lines)


def calibrate(
    points: Sequence[PublishedRow],
    graph: LayerGraph,
    cluster: Cluster,
    parameters: Sequence[str] = DEFAULT_PARAMETERS,
    max_points: int = MAX_POINTS,
) -> Calibration:
    """Fit `parameters` of all the cluster's devices to `points`.

    Raises:
        UserError: no points, more than `max_points`, fewer points than parameters, or an unknown parameter.
    """
    if not points or len(points) > max_points:
        raise UserError(
            f"calibration takes 1 to {max_points} points, not {len(points)}; the others are for judging"
        )
    if len(parameters) > len(points):
        raise UserError(
            f"{len(parameters)} parameters cannot be fitted to {len(points)} points; give more points"
        )
    from scipy.optimize import least_squares

    plans = [plan_of_row(row, graph) for row in points]
    start = [_figure(cluster, name).value for name in parameters]
    limits = [next(pair for suffix, pair in _LIMITS.items() if name.endswith(suffix)) for name in parameters]
    low, high = (
        [_ORIGIN + math.log(pair[side] / at) for pair, at in zip(limits, start, strict=True)]
        for side in (0, 1)
    )

    def values_of(x: Sequence[float]) -> dict[str, float]:
        scaled = (at * math.exp(z - _ORIGIN) for at, z in zip(start, x, strict=True))
        return dict(zip(parameters, scaled, strict=True))

    def predicted(values: Mapping[str, float]) -> list[float]:
        lowering = Lowering(graph, with_values(cluster, values), SimulationOptions())
        return [_predict(row, plan, lowering) for row, plan in zip(points, plans, strict=True)]

    def residuals(x: Sequence[float]) -> list[float]:
        return [math.log(p / row.value) for p, row in zip(predicted(values_of(x)), points, strict=True)]

    begin = [min(max(_ORIGIN, a + 1e-3), b - 1e-3) for a, b in zip(low, high, strict=True)]
    found = least_squares(residuals, begin, bounds=(low, high), diff_step=1e-3, xtol=1e-4, max_nfev=20).x
    values = {name: _rounded(value) for name, value in values_of(found).items()}
    pairs = zip(points, predicted(values), strict=True)
    kept = tuple(Residual(row.key, row.value, value) for row, value in pairs)
    draft = Calibration(cluster.name, values, kept, cluster)
    return dataclasses.replace(draft, cluster=with_values(cluster, values, draft.source))


def _predict(row: PublishedRow, plan: Any, lowering: Lowering) -> float:
    seconds = longest_path_ns(lower_method(lowering, plan, row.method)) / _NS
    return original_ns(plan, lowering) / _NS / seconds if row.quantity is Quantity.SPEEDUP else seconds


def with_values(cluster: Cluster, values: Mapping[str, float], source: str = "being fitted") -> Cluster:
    """The cluster with other values of some parameters, tagged as fitted.

    Raises:
        UserError: a parameter is unknown.
    """
    for name, value in values.items():
        figure = Figure(value, Tag.FITTED, source)
        head, *rest = name.split(".")
        if head == "collectives":
            cluster = dataclasses.replace(cluster, collectives=_set(cluster.collectives, rest, figure, name))
        else:
            models = {key: _set(model, [head, *rest], figure, name) for key, model in cluster.models.items()}
            cluster = dataclasses.replace(cluster, models=models)
    return cluster


def _set(value: Any, path: Sequence[str], figure: Figure, name: str) -> Any:
    head, *rest = path
    if not dataclasses.is_dataclass(value) or not hasattr(value, head):
        raise UserError(f"unknown parameter {name!r}; for example: {', '.join(DEFAULT_PARAMETERS)}")
    inner = _set(getattr(value, head), rest, figure, name) if rest else figure
    return dataclasses.replace(value, **{head: inner})  # type: ignore[type-var]


def _figure(cluster: Cluster, name: str) -> Figure:
    head, *rest = name.split(".")
    value: Any = cluster if head == "collectives" else cluster.model_of(0)
    for part in (head, *rest):
        value = getattr(value, part, None)
    if not isinstance(value, Figure):
        raise UserError(f"unknown parameter {name!r}; for example: {', '.join(DEFAULT_PARAMETERS)}")
    return value


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def record_path() -> Path:
    """Where the shipped calibration is recorded."""
    return Path(str(resources.files("distri.simulator") / "data" / "calibration.json"))


def write_record(calibration: Calibration, path: Path) -> None:
    """Write points, values and residuals as JSON."""
    record = {
        "hardware": calibration.hardware,
        "parameters": dict(calibration.values),
        "points": [
            {"key": r.key, "given": r.given, "fitted": round(r.fitted, 4), "error": round(r.error, 4)}
            for r in calibration.residuals
        ],
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def used_keys(path: Path | None = None) -> tuple[str, ...]:
    """The keys of the rows that a recorded calibration has seen; none if there is no record."""
    chosen = path or record_path()
    if not chosen.is_file():
        return ()
    return tuple(point["key"] for point in json.loads(chosen.read_text(encoding="utf-8"))["points"])


def write_values(calibration: Calibration, path: Path) -> None:
    """Put the fitted values into a hardware file, in place, with tag and source.

    Raises:
        HardwareError: the file does not have a parameter on one line of its own.
    """
    text = path.read_text(encoding="utf-8")
    for name, value in calibration.values.items():
        leaf = name.rpartition(".")[2]
        shown = f"{value * 1e6:.4g} us" if leaf.endswith("_s") else f"{value:.4g}"
        line = re.compile(rf"^(\s*{leaf}: )\{{.*\}}$", re.MULTILINE)
        if len(line.findall(text)) != 1:
            raise HardwareError(
                f"{path}: {leaf!r} is not on exactly one line of its own; put the value in by hand"
            )
        text = line.sub(rf"\g<1>{{value: {shown}, tag: fitted, source: calibration}}", text)
    if not re.search(r"^  calibration: ", text, re.MULTILINE):
        note = (
            f'  calibration: "least squares on {len(calibration.residuals)} published latencies; '
            'points and residuals in calibration.json"'
        )
        text = re.sub(r"^sources:\n", f"sources:\n{note}\n", text, count=1, flags=re.MULTILINE)
    path.write_text(text, encoding="utf-8")
