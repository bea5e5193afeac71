"""Time calls: interleaved, so that a slow moment of the machine touches all alike; medians of several rounds.

On a CPU a call's time is that between two readings of the clock. On a GPU `repeats` calls are captured into a CUDA
graph, whose replay is timed by events; the time of the host is that of making the calls without waiting for them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
WARM_UPS = 2
GRAPH_REPEATS = 10
SHORTEST_S = 2e-4
"""A CPU reading covers at least this, so that the clock's own cost does not matter."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: of the device, and of the host if that is another one."""

    device_s: float
    launch_s: float = 0.0


def time_calls(
    calls: Sequence[Call], device: torch.device, rounds: int, use_mean: bool = False
) -> list[Timing]:
    """Time every call. use_mean: where ranks share cores, a median would show the undisturbed time only."""
    with torch.inference_mode():
        if device.type == "cuda":
            return [_time_on_gpu(call, rounds) for call in calls]
        return _time_on_cpu(calls, rounds, use_mean)


def _time_on_cpu(calls: Sequence[Call], rounds: int, use_mean: bool) -> list[Timing]:
    repeats = [_repeats(call) for call in calls]
    readings: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(repeats[place]):
                call()
            readings[place].append((time.perf_counter() - start) / repeats[place])
    average = statistics.fmean if use_mean else statistics.median
    return [Timing(average(values)) for values in readings]


def _repeats(call: Call) -> int:
    """Warm up, and find how many calls make a reading."""
    for _ in range(WARM_UPS):
        call()
    start = time.perf_counter()
    call()
    return max(1, min(50, round(SHORTEST_S / max(time.perf_counter() - start, 1e-7))))


def _time_on_gpu(call: Call, rounds: int) -> Timing:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS + 1):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_REPEATS):
            call()
    device_s = []
    for _ in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        device_s.append(start.elapsed_time(end) * 1e-3 / GRAPH_REPEATS)
    return Timing(statistics.median(device_s[1:]), _host_s(call))


def _host_s(call: Call) -> float:
    """Time of the host to issue one call, while the device has work before it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(GRAPH_REPEATS):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / GRAPH_REPEATS
