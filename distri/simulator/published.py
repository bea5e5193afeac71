"""Published figures as rows, and the plan that each row was measured with.

The format is that of `data/published.json`: latencies in seconds and speed-ups over one device, each with size, steps,
devices and method. A row may leave out whether the guidance branches were split; then the MACs published for the same
case decide, and where both fit, they were split (the published code's default).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from distri.core.graph import LayerGraph
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest
from distri.core.policy import policy_table
from distri.errors import UserError
from distri.simulator.hardware import Word
from distri.simulator.lowering import GATHER_ALL
from distri.simulator.methods import Method, method_of, plan_of

WARMUP_STEPS: Final = 5
"""The first step and four more are synchronous."""
_MACS_TOLERANCE: Final = 0.03


class Quantity(Word):
    """What a row's value is."""

    LATENCY = "latency"
    SPEEDUP = "speedup"


@dataclass(frozen=True)
class PublishedRow:
    """One published figure. `cfg_split` None: not said."""

    quantity: Quantity
    height: int
    width: int
    steps: int
    gpus: int
    method: Method
    cfg_split: bool | None
    value: float
    policy: str = "corrected"
    warmup_steps: int = WARMUP_STEPS

    @property
    def key(self) -> str:
        """What names a row, in calibrations and tables."""
        split = {None: "", True: ", guidance split", False: ""}[self.cfg_split]
        unit = "speed-up" if self.quantity is Quantity.SPEEDUP else "latency"
        return (
            f"{self.height}x{self.width}, {self.steps} steps, {self.gpus} GPUs, {self.method}{split}: {unit}"
        )


def shipped_rows() -> Path:
    """Where the published figures are shipped."""
    return Path(str(resources.files("distri.simulator") / "data" / "published.json"))


def read_rows(path: Path) -> tuple[PublishedRow, ...]:
    """The latency and speed-up rows of a file.

    Raises:
        UserError: the file cannot be read or a row is malformed.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: an object with latency_seconds and speedup is required")
    macs = data.get("macs_tera_per_device", [])
    rows = [_row(Quantity.LATENCY, item, macs, path) for item in data.get("latency_seconds", [])]
    rows += [_row(Quantity.SPEEDUP, item, macs, path) for item in data.get("speedup", [])]
    if not rows:
        raise UserError(f"{path}: no rows under latency_seconds or speedup")
    return tuple(rows)


def _row(quantity: Quantity, item: Any, macs: list[Mapping[str, Any]], path: Path) -> PublishedRow:
    try:
        return PublishedRow(
            quantity,
            int(item["height"]),
            int(item["width"]),
            int(item.get("steps", 50)),
            int(item["gpus"]),
            method_of(item["method"]),
            item["cfg_split"] if "cfg_split" in item else _said_with_macs(item, macs),
            float(item["value"]),
            item.get("policy", "corrected"),
            int(item.get("warmup_steps", WARMUP_STEPS)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: malformed row {item!r}: {error}") from error


def _said_with_macs(item: Mapping[str, Any], macs: list[Mapping[str, Any]]) -> bool | None:
    for other in macs:
        if all(other.get(name) == item.get(name) for name in ("height", "width", "gpus", "method")):
            split: bool | None = other.get("cfg_split")
            return split if split is not None else _same_macs(item, float(other["value"]), macs)
    return None


def _same_macs(item: Mapping[str, Any], value: float, macs: list[Mapping[str, Any]]) -> bool | None:
    """Patches that only see themselves have fewer MACs the more of them there are: not split, if fewer than a share."""
    whole = [float(o["value"]) for o in macs if o.get("gpus") == 1 and o.get("height") == item.get("height")]
    if item.get("method") == Method.NAIVE_PATCH and whole:
        return bool(value * item["gpus"] > whole[0] * 0.9)
    return None


def plan_of_row(row: PublishedRow, graph: LayerGraph) -> Plan:
    """The plan that a row was measured with, as the published implementation runs it.

    Raises:
        PartitionError, PlanError: the row is impossible.
    """
    is_split = row.cfg_split if row.gpus > 1 and row.gpus % 2 == 0 else False
    request = PlanRequest(
        ImageRequest(row.height, row.width, row.steps),
        row.gpus,
        is_split,
        policy_table(row.policy),
        row.warmup_steps,
        pattern=GATHER_ALL,
    )
    return plan_of(row.method, request, graph)
