"""From readings to what a comparison says: medians, ratios to the single device, and how much communication showed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distri.bench.variants import SINGLE, Variant


@dataclass(frozen=True)
class Row:
    """One way of drawing. Medians over the rounds, of the steady step, as rank 0 timed it.

    speedup: median of the ratios to the single device on one rank's threads in the same round. waited_s: of a step, by
    kind of exchange, the mean of all ranks. exposed: the part of a step that is waiting. planned_bytes: what the plan
    says a rank receives.
    """

    name: str
    step_s: float
    speedup: float
    waited_s: dict[str, float]
    exposed: float
    bytes_per_step: float
    planned_bytes: int
    buffer_bytes: int


def rows_of(result: Mapping[str, Any], variants: tuple[Variant, ...]) -> list[Row]:
    """One row a variant, in their order."""
    single = result["variants"][SINGLE]["step_s"]
    return [_row(variant, result["variants"][variant.name], single) for variant in variants]


def _row(variant: Variant, readings: Mapping[str, Any], single: list[float]) -> Row:
    step_s = statistics.median(readings["step_s"])
    kinds = sorted({kind for waited in readings["waited_s"] for kind in waited})
    waited = {kind: statistics.median(w.get(kind, 0.0) for w in readings["waited_s"]) for kind in kinds}
    exposed = [
        sum(w.values()) / step for w, step in zip(readings["waited_s"], readings["step_s"], strict=True)
    ]
    return Row(
        variant.name,
        step_s,
        statistics.median(alone / own for alone, own in zip(single, readings["step_s"], strict=True)),
        {kind: value for kind, value in waited.items() if value > 0},
        statistics.median(exposed),
        readings["bytes_per_step"],
        0 if variant.plan is None or variant.gathers_all else variant.plan.bytes_received_per_step[0],
        readings["buffer_bytes"],
    )
