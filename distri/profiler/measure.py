"""`measure`: a profile of a model's operations, on the device at hand, for all shards that some plans cut."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distri.config.plan import dump_plan, parse_plan
from distri.config.profile import PROFILE_SCHEMA, Profile, dump_profile, parse_profile
from distri.core.graph import LayerGraph
from distri.core.plan import Plan
from distri.models.presets import load_graph
from distri.profiler.calls import CallMaker
from distri.profiler.instant import InstantBackend
from distri.profiler.models import build_hollow, fill, fits, heads_of, step_arguments
from distri.profiler.subjects import StepSubject, Subject, distinct_operations, distinct_steps, operations_of
from distri.profiler.timing import Timing, time_calls
from distri.session import Session
from distri.simulator.kernels import Layers
from distri.simulator.measured import MeasuredOperation, MeasuredStep, OperationKey

SETTLING_STEPS = 2
"""Steps of a pass that are not timed: the first projects the text and makes buffers."""


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure. num_beside: ranks that compute on this host at the same time; num_threads: of each."""

    model: str
    plans: tuple[Plan, ...]
    dtype: str
    num_threads: int
    num_beside: int = 1
    rounds: int = 7
    has_steps: bool = True
    command: str = ""


def measure(request: ProfileRequest, on_progress: Callable[[Any], None] | None = None) -> Profile:
    """Measure in this process, or in as many as there are ranks beside each other; returns rank 0's profile.

    Raises:
        UserError: the model is unknown.
        RunError: a rank failed.
    """
    if request.num_beside == 1:
        return parse_profile(measure_here(request_to_json(request), lambda _: None))
    from distri.launch import run_ranks

    text: str = run_ranks(
        request.num_beside,
        "distri.profiler.measure:measure_here",
        request_to_json(request),
        on_progress=on_progress,
    )
    return parse_profile(text)


def request_to_json(request: ProfileRequest) -> dict[str, Any]:
    """A request as plain JSON values."""
    body = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    return {**body, "plans": [dump_plan(plan) for plan in request.plans]}


def measure_here(arguments: Mapping[str, Any], report: Callable[[Any], None]) -> str:
    """One process's part: the JSON text of its profile."""
    plans = tuple(parse_plan(json.dumps(body)) for body in arguments["plans"])
    request = ProfileRequest(**{**arguments, "plans": plans})
    place = int(os.environ.get("RANK", "0"))
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cpu":
        pin(place, request.num_threads)
    return dump_profile(_Bench(request, device, place).run())


def pin(place: int, num_threads: int) -> None:
    """Keep this process on cores of its own, as far as there are enough."""
    torch.set_num_threads(num_threads)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        mine = {cores[(place * num_threads + thread) % len(cores)] for thread in range(num_threads)}
        os.sched_setaffinity(0, mine)


class _Bench:
    """The measuring itself."""

    def __init__(self, request: ProfileRequest, device: torch.device, place: int) -> None:
        self.request = request
        self.device = device
        self.dtype: torch.dtype = getattr(torch, request.dtype)
        self.graph: LayerGraph = load_graph(request.model)
        self._place = place
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._shares_cores = request.num_beside * request.num_threads > max(cores, os.cpu_count() or 1)
        self._hollow = build_hollow(request.model)
        if request.num_beside > 1:
            dist.init_process_group("gloo")

    def run(self) -> Profile:
        """Operations first, then whole steps."""
        torch.manual_seed(0)
        operations = self._operations()
        times = {point.key: point.device_s for point in operations}
        steps = self._steps(times)
        if dist.is_initialized():
            dist.destroy_process_group()
        request = self.request
        return Profile(
            schema_version=PROFILE_SCHEMA,
            model=self.graph.name,
            fingerprint=self.graph.fingerprint,
            device=device_name(self.device),
            device_kind="gpu" if self.device.type == "cuda" else "cpu",
            dtype=request.dtype,
            num_threads=request.num_threads,
            num_beside=request.num_beside,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            torch_version=str(torch.__version__),
            command=request.command,
            operations=tuple(operations),
            steps=tuple(steps),
        )

    def _operations(self) -> list[MeasuredOperation]:
        subjects: dict[OperationKey, Subject] = distinct_operations(self.request.plans, self.graph)
        maker = CallMaker(self.device, self.dtype, heads_of(self._hollow))
        calls = [maker.make(subject) for subject in subjects.values()]
        self._meet()
        timings: list[Timing] = time_calls(calls, self.device, self.request.rounds, self._shares_cores)
        return [
            MeasuredOperation(key, timing.device_s, timing.launch_s)
            for key, timing in zip(subjects, timings, strict=True)
        ]

    def _steps(self, times: Mapping[OperationKey, float]) -> list[MeasuredStep]:
        if not self.request.has_steps or not fits(self._hollow, self.device, self.dtype):
            return []
        model = fill(self._hollow, self.device, self.dtype)
        found = []
        for subject in distinct_steps(self.request.plans).values():
            parts = self._parts(subject)
            self._meet()
            seconds = time_steps(model, subject, self.device, self.dtype, self._shares_cores)
            parts_s = math.fsum(times[part.key] for part in parts)
            found.append(MeasuredStep(subject.key, seconds, parts_s, len(parts)))
        return found

    def _parts(self, subject: StepSubject) -> list[Subject]:
        """The operations of one pass; where layers are attached, the text's projections were made at the first step."""
        parts = operations_of(subject.plan, subject.patch, self.graph)
        if subject.key.layers is not Layers.ATTACHED:
            return parts
        return [part for part in parts if not part.operation.depends_on_text_only]

    def _meet(self) -> None:
        if dist.is_initialized():
            dist.barrier()


def time_steps(
    model: nn.Module, subject: StepSubject, device: torch.device, dtype: torch.dtype, use_mean: bool
) -> float:
    """Seconds of one rank's forward pass whose messages are answered at once."""
    plan = subject.plan
    rows, cols = plan.latent.rows.size, plan.latent.cols.size
    arguments = step_arguments(model, plan.image.batch, rows, cols, device, dtype)
    readings = []
    backend = InstantBackend(plan, subject.patch, device, dtype)
    with torch.inference_mode(), Session(model, backend) as session:
        session.begin_image()
        for step in range(plan.image.num_inference_steps):
            start = time.perf_counter()
            model(**arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if step >= SETTLING_STEPS:
                readings.append(time.perf_counter() - start)
    return statistics.fmean(readings) if use_mean else statistics.median(readings)


def device_name(device: torch.device | None = None) -> str:
    """What a device calls itself; the one that a profile would be of, if none is given."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
