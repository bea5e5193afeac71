"""The body of a measuring rank: every way of drawing stays open, and each takes its turn in every round.

So a slow moment of the machine touches all of them alike, and a ratio is one of neighbours in time. What counts is
the steady step: before the measured steps of a round comes one that is not, so that messages are under way as in a
run. Waiting is measured where a layer waits, by kind of exchange; not on a GPU, where the host does not wait.
"""

from __future__ import annotations

import copy
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distri.bench.gather_all import GatherAllTransport
from distri.bench.variants import WARMUP, BenchRequest, Variant, variants_of
from distri.core.policy import ExchangeKind
from distri.models.presets import load_graph
from distri.pipeline import open_backend
from distri.profiler.measure import device_name
from distri.profiler.models import build_hollow, fill, step_arguments
from distri.session import Session

KINDS = (*(kind.value for kind in ExchangeKind), "broadcast", "buffers")


@dataclass
class Readings:
    """What was read of one variant, each round: seconds of a step, and how many this rank waited in it, by kind."""

    step_s: list[float] = field(default_factory=list)
    waited_s: list[dict[str, float]] = field(default_factory=list)
    bytes_per_step: float = 0.0
    buffer_bytes: int = 0


@dataclass
class _Way:
    """A variant, ready to run: `step` does one, on this rank."""

    variant: Variant
    step: Callable[[], object]
    threads: int
    waited_s: Callable[[], dict[str, float]]
    bytes_received: Callable[[], int]
    buffer_bytes: Callable[[], int]
    close: Callable[[], None]
    readings: Readings = field(default_factory=Readings)


def measure_as_rank(arguments: dict[str, Any], progress: Any = None) -> dict[str, Any]:
    """Measure everything that a request (see `distri.bench.variants.BenchRequest`) asks for; rank 0 has the result."""
    request = request_from_json(arguments)
    threads = torch.get_num_threads()
    variants = variants_of(request, load_graph(request.model))
    first = next(v.plan for v in variants if v.plan is not None)
    owner: Any = open_backend("torch", first, None, request.timeout_s)  # starts the process groups for all
    device: torch.device = owner.device
    torch.manual_seed(0)
    model = fill(build_hollow(request.model), device, getattr(torch, request.dtype))
    with torch.inference_mode():
        inputs = step_arguments(
            model,
            first.image.batch,
            first.latent.rows.size,
            first.latent.cols.size,
            device,
            torch_dtype(request),
        )
        ways = [_open(variant, model, inputs, device, request, threads) for variant in variants]
        try:
            _measure(ways, request, device, progress)
            _share_waits(ways, owner)
        finally:
            for way in ways:
                way.close()
            owner.close()
    return {
        "device": device_name(device),
        "threads_per_rank": threads,
        "torch": str(torch.__version__),
        "peak_bytes": peak_bytes(device),
        "variants": {way.variant.name: vars(way.readings) for way in ways},
    }


def torch_dtype(request: BenchRequest) -> torch.dtype:
    """The request's dtype as torch has it."""
    found: torch.dtype = getattr(torch, request.dtype)
    return found


def request_from_json(arguments: dict[str, Any]) -> BenchRequest:
    """A request from its JSON object."""
    from distri.core.partition import SplitAxis

    body = {**arguments, "modes": tuple(arguments["modes"]), "split": SplitAxis(arguments["split"])}
    return BenchRequest(**body)


def _open(
    variant: Variant,
    model: nn.Module,
    inputs: dict[str, Any],
    device: torch.device,
    request: BenchRequest,
    threads: int,
) -> _Way:
    """Make a variant ready, with a model of its own that shares the weights."""
    own = copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})
    if variant.plan is None:
        is_first = dist.get_rank() == 0
        return _Way(
            variant,
            (lambda: own(**inputs)) if is_first else (lambda: None),
            torch.get_num_threads() if not variant.uses_all_cores else _all_cores(),
            dict,
            int,
            int,
            lambda: None,
        )
    backend = open_backend("torch", variant.plan, device, request.timeout_s)
    transport: Any = backend.transport(backend.local_ranks[0])
    stats, counted = transport.stats, transport.stats
    if variant.gathers_all:
        counted = GatherAllTransport(variant.plan, transport.rank, transport, device)
        backend = _with_transport(backend, counted)
    session = Session(own, backend)
    session.begin_image()
    return _Way(
        variant,
        lambda: own(**inputs),
        threads,
        lambda: _sum(stats.waited_by, getattr(counted, "waited_s", {}) if variant.gathers_all else {}),
        lambda: stats.bytes_received + (counted.bytes_received if variant.gathers_all else 0),
        lambda: transport.arena.num_bytes,
        session.close,
    )


def _with_transport(backend: Any, transport: Any) -> Any:
    """The same backend with another transport."""
    served = copy.copy(backend)
    served.transport = lambda _: transport
    return served


def _all_cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sum(*parts: dict[str, float]) -> dict[str, float]:
    return {kind: sum(part.get(kind, 0.0) for part in parts) for kind in KINDS}


def _measure(ways: list[_Way], request: BenchRequest, device: torch.device, progress: Any) -> None:
    for way in ways:
        for _ in range(WARMUP):
            _turn(way, 1, device)
    for number in range(request.rounds):
        order = ways if number % 2 == 0 else ways[::-1]
        for way in order:
            _turn(way, 1, device)
            waited, received = way.waited_s(), way.bytes_received()
            way.readings.step_s.append(_turn(way, request.steps, device) / request.steps)
            after = way.waited_s()
            way.readings.waited_s.append({k: (after[k] - waited[k]) / request.steps for k in after})
            way.readings.bytes_per_step = (way.bytes_received() - received) / request.steps
            way.readings.buffer_bytes = way.buffer_bytes()
        if progress is not None:
            progress(number + 1, request.rounds)


def _share_waits(ways: list[_Way], backend: Any) -> None:
    """On rank 0, each way's waits as the mean of all ranks': one that is late makes the others wait."""
    texts = backend.collect(json.dumps([way.readings.waited_s for way in ways]))
    for place, way in enumerate(ways if texts is not None else ()):
        ranks = [json.loads(text)[place] for text in texts]
        if way.variant.plan is not None:
            way.readings.waited_s = [
                {kind: statistics.fmean(waited[kind] for waited in same_round) for kind in same_round[0]}
                for same_round in zip(*ranks, strict=True)
            ]


def _turn(way: _Way, steps: int, device: torch.device) -> float:
    """Seconds of these steps, from when all ranks are ready until all are done."""
    torch.set_num_threads(way.threads)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        way.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if way.variant.plan is not None:
        dist.barrier()
    return time.perf_counter() - start


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had: of the GPU, or of the host."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
