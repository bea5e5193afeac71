"""Where a candidate's time goes: along its critical path, kernels, transfers that are waited for, launches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from distri.core.plan import Plan
from distri.simulator.longest_path import Run, run_longest_path
from distri.simulator.lowering import Lowering
from distri.simulator.spans import critical_path
from distri.simulator.tasks import COMPUTE_STREAM, HOST_LANE, STREAM_NAMES, TaskList

_NS = 1e9


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one run. hidden_s: transfers of the busiest rank that nobody waits for; warmup_s: the first steps."""

    latency_s: float
    compute_s: float
    exposed_s: float
    launch_s: float
    hidden_s: float
    warmup_s: float


def break_down(plan: Plan, lowering: Lowering, is_settled: bool) -> Breakdown:
    """Simulate a sketch, with shared links if `is_settled`, and say where its time goes."""
    tasks = lowering.lower(plan)
    options = lowering.options
    if is_settled and options.has_contention and tasks.num_ranks > 1:
        from distri.simulator.machine import Machine

        channels = lowering.collectives.topology.channels
        run = Machine(tasks, channels, True, options.is_periodic, is_recorded=True).run()
    else:
        run = run_longest_path(tasks, options.is_periodic, is_recorded=True)
    return _of(run, tasks)


def _of(run: Run, tasks: TaskList) -> Breakdown:
    assert run.record is not None
    path = critical_path(run.record, run.walk.starts_ns, run.walk.skips, run.total_ns - run.walk.skipped_ns)
    by_stream: Counter[str] = Counter()
    for segment in path:
        by_stream[segment.stream] += segment.duration_ns * segment.count
    exposed = sum(by_stream[name] for name in STREAM_NAMES[1:HOST_LANE])
    starts = [*run.walk.starts_ns, run.total_ns - run.walk.skipped_ns]
    warmup = sum(
        (starts[place + 1] - starts[place]) * repeats
        for place, (visit, repeats) in enumerate(zip(run.walk.visits, run.walk.repeats(), strict=True))
        if tasks.templates[visit.template].name == "warm-up"
    )
    return Breakdown(
        run.total_ns / _NS,
        by_stream[STREAM_NAMES[COMPUTE_STREAM]] / _NS,
        exposed / _NS,
        by_stream[STREAM_NAMES[HOST_LANE]] / _NS,
        max(0, _transfer_ns(tasks) - exposed) / _NS,
        warmup / _NS,
    )


def _transfer_ns(tasks: TaskList) -> int:
    """Transfer time of the rank that has most of it."""
    from distri.search.costs import least_ns

    by_rank = [0] * tasks.num_ranks
    for place, count in Counter(tasks.steps).items():
        for call in tasks.templates[place].calls:
            for rank, time in enumerate(least_ns(call, tasks.num_ranks)):
                by_rank[rank] += count * time
    return max(by_rank)
