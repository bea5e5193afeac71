"""What a run is asked for: a frozen value that travels to the started ranks as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distri.core.plan import Plan

PATHS = ("output", "checkpoint", "resume", "trace")


@dataclass(frozen=True)
class RunRequest:
    """What to draw, by which plan, on which backend; and what is done against faults.

    checkpoint: where a checkpoint is written every `checkpoint_every` steps (0: never). resume: a checkpoint to go on
    from. may_resume: go on from `checkpoint` if there is one. check_finite: look for NaN once in so many steps.
    compiler: the `torch.compile` backend for what lies between exchanges. tiles_decoder: rank 0 decodes tile by tile.
    cuda_graphs: record steps that repeat, and replay them. trace: where what some steps did when is written.
    """

    model: str
    plan: Plan
    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    guidance_scale: float = 5.0
    backend: str = "torch"
    output: Path | None = None
    timeout_s: float = 60.0
    checkpoint_every: int = 0
    checkpoint: Path | None = None
    resume: Path | None = None
    may_resume: bool = False
    check_finite: int = 0
    compiler: str | None = None
    tiles_decoder: bool = False
    cuda_graphs: bool = False
    trace: Path | None = None


def request_to_json(request: RunRequest) -> dict[str, Any]:
    """A request as plain JSON values; `request_from_json` is its inverse."""
    from distri.config.plan import dump_plan

    body = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    body["plan"] = dump_plan(request.plan)
    return {**body, **{name: str(body[name]) for name in PATHS if body[name] is not None}}


def request_from_json(body: dict[str, Any]) -> RunRequest:
    """A request, its plan verified again."""
    from distri.config.plan import parse_plan

    names = {field.name for field in dataclasses.fields(RunRequest)}
    values = {name: value for name, value in body.items() if name in names}
    values["plan"] = parse_plan(json.dumps(body["plan"]))
    values |= {name: Path(body[name]) for name in PATHS if body[name] is not None}
    return RunRequest(**values)
