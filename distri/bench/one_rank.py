"""One rank of an N-rank plan, alone: what it computes, launches and copies, free of any network.

Its exchanges are answered from memory that lies ready (`distri.profiler.instant`). Beside it stand the unmodified model
on the whole picture, whose 1/N is the ideal, and on a picture of the rank's patch. The rank's own work is more than
the latter's by what attention reads of the others; with that left out (`own patch`), what remains is our overhead.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from distri.core.graph import LayerGraph
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import ExchangeKind, Phase, Policy, PolicyRule, policy_table
from distri.launch import run_ranks
from distri.models.presets import load_graph
from distri.profiler.instant import InstantBackend
from distri.profiler.measure import device_name
from distri.profiler.models import build_hollow, fill, step_arguments
from distri.session import Session

WARMUP, SETTLING = 1, 2
LONGEST_S = 6 * 3600.0


@dataclass(frozen=True)
class OneRankRequest:
    """Which rank of which plan; cfg_split puts the guidance branches on different ranks where the number is even."""

    model: str
    height: int
    width: int
    ranks: int
    patch: int = 0
    rounds: int = 7
    dtype: str = "float32"
    policy: str = "corrected"
    cfg_split: bool = False
    device: str | None = None


@dataclass(frozen=True)
class OneRankResult:
    """Medians of a steady step in seconds. GPUs only: launches, kernels of a step; graph_s, as a CUDA graph."""

    device: str
    whole_s: float
    patch_s: float
    own_patch_s: float
    rank_s: float
    overhead: float
    efficiency: float
    launches: int | None
    graph_s: float | None
    peak_bytes: int | None


def measure_in_own_process(request: OneRankRequest) -> OneRankResult:
    """`measure_one_rank` in a process that is started as a rank is: with its environment and its share of the cores.

    Raises:
        UserError, RunError: as `distri.launch.run_ranks`.
    """
    target = "distri.bench.one_rank:measure_as_rank"
    return OneRankResult(**run_ranks(1, target, asdict(request), timeout_s=LONGEST_S))


def measure_as_rank(arguments: Mapping[str, Any], report: Callable[[Any], None]) -> dict[str, Any]:
    """The rank's part: plain JSON values."""
    return asdict(measure_one_rank(OneRankRequest(**arguments)))


def measure_one_rank(request: OneRankRequest) -> OneRankResult:
    """Measure the rank and what it stands beside, in turn.

    Raises:
        UserError: the image does not split so.
    """
    device = torch.device(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, request.dtype)
    graph = load_graph(request.model)
    torch.manual_seed(0)
    model = fill(build_hollow(request.model), device, dtype)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan, alone = (_plan(request, graph, own) for own in (False, True))
    patch = plan.partition.patches[request.patch]
    batch = plan.image.batch
    with torch.inference_mode():
        whole = step_arguments(model, batch, plan.latent.rows.size, plan.latent.cols.size, device, dtype)
        part = step_arguments(model, plan.batch_per_rank, patch.rows.size, patch.cols.size, device, dtype)
        rank, rank_alone = (_open(model, p, request.patch, device, dtype) for p in (plan, alone))
        calls: list[Callable[[], object]] = [
            lambda: model(**whole),
            lambda: model(**part),
            lambda: rank_alone[0](**whole),
            lambda: rank[0](**whole),
        ]
        readings = _in_turn(calls, request.rounds, device)
        launches = _launches(calls[3]) if device.type == "cuda" else None
        graph_s = _as_graph(calls[3], request.rounds) if device.type == "cuda" else None
    for _, session in (rank, rank_alone):
        session.close()
    whole_s, patch_s, own_patch_s, rank_s = (statistics.median(values) for values in readings)
    overheads = [own / plain - 1 for own, plain in zip(readings[2], readings[1], strict=True)]
    return OneRankResult(
        device_name(device),
        whole_s,
        patch_s,
        own_patch_s,
        rank_s,
        statistics.median(overheads),
        statistics.median(w / (request.ranks * r) for w, r in zip(readings[0], readings[3], strict=True)),
        launches,
        graph_s,
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _plan(request: OneRankRequest, graph: LayerGraph, own_context: bool) -> Plan:
    table = policy_table(request.policy)
    if own_context:
        table = table.with_rules((PolicyRule(ExchangeKind.CONTEXT, Phase.STEADY, Policy.LOCAL),))
    steps = WARMUP + SETTLING + request.rounds + 8
    return make_plan(
        PlanRequest(
            ImageRequest(request.height, request.width, steps),
            request.ranks,
            request.cfg_split,
            table,
            WARMUP,
            dtype=request.dtype,
        ),
        graph,
    )


def _open(
    model: nn.Module, plan: Plan, patch: int, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, Session]:
    own = copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})
    session = Session(own, InstantBackend(plan, patch, device, dtype))
    session.begin_image()
    return own, session


def _in_turn(calls: list[Callable[[], object]], rounds: int, device: torch.device) -> list[list[float]]:
    readings: list[list[float]] = [[] for _ in calls]
    for number in range(-WARMUP - SETTLING, rounds):
        for place in range(len(calls)) if number % 2 else reversed(range(len(calls))):
            seconds = _seconds(calls[place], device)
            if number >= 0:
                readings[place].append(seconds)
    return readings


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _as_graph(call: Callable[[], object], rounds: int) -> float | None:
    """Seconds of a step that was captured into a CUDA graph; None, with a warning, if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        warnings.warn(f"no CUDA graph: {str(error).splitlines()[0]}", RuntimeWarning, stacklevel=2)
        return None
    readings = [_seconds(graph.replay, torch.device("cuda")) for _ in range(rounds + SETTLING)]
    return statistics.median(readings[SETTLING:])


def _launches(call: Callable[[], object]) -> int:
    """Kernels that one step launches."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    events: Any = profile.events()
    return sum(1 for event in events if "CUDA" in str(event.device_type) and not event.name.startswith("Mem"))
