"""Predictions beside published figures: which were used for calibration, which were predicted, and how far off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distri.core.graph import LayerGraph
from distri.simulator.hardware import Cluster
from distri.simulator.lowering import Lowering
from distri.simulator.options import SimulationOptions
from distri.simulator.published import PublishedRow, Quantity, plan_of_row
from distri.simulator.simulate import run_simulation


@dataclass(frozen=True)
class ValidationRow:
    """One published figure and its prediction; `error` is predicted / published - 1."""

    row: PublishedRow
    is_used: bool
    predicted: float

    @property
    def error(self) -> float:
        """Relative error."""
        return self.predicted / self.row.value - 1


@dataclass(frozen=True)
class Validation:
    """All rows of a file."""

    hardware: str
    rows: tuple[ValidationRow, ...]

    @property
    def predicted(self) -> tuple[ValidationRow, ...]:
        """The rows that no calibration has seen."""
        return tuple(row for row in self.rows if not row.is_used)

    @property
    def mean_absolute_error(self) -> float:
        """Over the predicted rows."""
        return _mean(abs(row.error) for row in self.predicted)

    @property
    def worst(self) -> float:
        """Largest absolute error of the predicted rows."""
        return max((abs(row.error) for row in self.predicted), default=0.0)

    def table(self) -> str:
        """A Markdown table, and the two figures below it."""
        lines = [
            "| case | used or predicted | published | predicted | error |",
            "| --- | --- | ---: | ---: | ---: |",
        ]
        for row in self.rows:
            unit = "x" if row.row.quantity is Quantity.SPEEDUP else " s"
            case = row.row.key.rpartition(":")[0]
            used = "used" if row.is_used else "predicted"
            lines.append(
                f"| {case} | {used} | {row.row.value:g}{unit} | {row.predicted:.2f}{unit} | {row.error:+.1%} |"
            )
        lines += [
            "",
            f"Predicted rows: mean absolute error {self.mean_absolute_error:.1%}, worst {self.worst:.1%}.",
        ]
        return "\n".join(lines)


def validate(
    rows: Sequence[PublishedRow], graph: LayerGraph, cluster: Cluster, used: Iterable[str] = ()
) -> Validation:
    """Predict every row on a cluster. `used` are the keys of the rows that calibration has seen.

    Raises:
        PartitionError, PlanError, HardwareError: a row is impossible on this cluster.
    """
    lowering = Lowering(graph, cluster, SimulationOptions())
    seen = frozenset(used)
    return Validation(
        cluster.name, tuple(ValidationRow(row, row.key in seen, predict(row, lowering)) for row in rows)
    )


def predict(row: PublishedRow, lowering: Lowering) -> float:
    """The prediction of one row, in its own quantity."""
    result = run_simulation(plan_of_row(row, lowering.graph), lowering, row.method).result
    return result.speedup if row.quantity is Quantity.SPEEDUP else result.latency_s


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
