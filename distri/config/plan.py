"""Plans on disk: JSON to `Plan` and back, validated completely by pydantic and by `distri.core.verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distri.core.plan import SCHEMA_VERSION, Plan
from distri.core.planner import to_jsonable
from distri.core.verify import verify
from distri.errors import PlanError

MAX_PLAN_BYTES = 64 * 2**20
COMMENTARY = "search"
"""What `distri plan` found beside the plan: for people, not covered by the hash, not read by a run."""


def dump_plan(plan: Plan) -> dict[str, Any]:
    """The JSON object of a plan."""
    body = to_jsonable(plan)
    assert isinstance(body, dict)
    return {**body, "bands": bands_of(plan)}


def bands_of(plan: Plan) -> list[dict[str, list[int]]]:
    """Each patch's rows and columns of the latent, as half-open intervals."""
    return [{"rows": list(patch.rows), "cols": list(patch.cols)} for patch in plan.partition.patches]


def load_plan(path: Path) -> Plan:
    """Read, validate and verify a plan.

    Raises:
        PlanError: the file cannot be read, is no plan, was edited, or is of a newer schema.
    """
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise PlanError(f"{path}: larger than {MAX_PLAN_BYTES} bytes, which no plan is")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: not a plan: it is not text") from error
    try:
        return parse_plan(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def parse_plan(text: str) -> Plan:
    """A verified plan from its JSON text.

    Raises:
        PlanError: as `load_plan`.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not a plan: {error}") from error
    if not isinstance(data, dict) or "schema_version" not in data:
        raise PlanError("not a plan: a JSON object with a schema_version is required")
    if data["schema_version"] != SCHEMA_VERSION:
        raise PlanError(
            f"this distri reads plans of schema {SCHEMA_VERSION}; this one is of schema {data['schema_version']!r}"
        )
    data.pop(COMMENTARY, None)
    plan = _validate({key: value for key, value in data.items() if key != "bands"})
    verify(plan)
    if dump_plan(plan) != data:
        raise PlanError(
            "the plan holds more or other than its fields: it was edited; make it again with 'distri plan'"
        )
    return plan


def _validate(data: dict[str, Any]) -> Plan:
    from pydantic import TypeAdapter, ValidationError  # here, because writing a plan does without

    try:
        return TypeAdapter(Plan).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the plan"
        raise PlanError(f"not a plan: {place}: {first['msg']}") from error
