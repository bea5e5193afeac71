"""The public entry: a plan, a graph and a cluster in; a prediction out.

    simulate(plan, graph, cluster).latency_s

The plan's own schedule is run on simulated clocks: tier 3 (links shared) unless contention is turned off, tier 2
otherwise. `run_simulation` also returns what was busy when, for traces and pictures.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distri.core.graph import LayerGraph
from distri.core.plan import Plan
from distri.core.shape import Extent
from distri.errors import HardwareError
from distri.simulator.bounds import bytes_by_channel
from distri.simulator.compute import AnalyticCompute, LaunchMode
from distri.simulator.costs import ComputeFactory
from distri.simulator.hardware import Cluster, Tag
from distri.simulator.kernels import HEAD_SIZE, Layers, Service, Shard
from distri.simulator.longest_path import Run, longest_path_ns, run_longest_path
from distri.simulator.lowering import GATHER_ALL, TEXT_TOKENS, Lowering
from distri.simulator.memory import WORKSPACE_BYTES, memory_of
from distri.simulator.methods import Method, lower_method
from distri.simulator.options import CtaPolicy, SimulationOptions
from distri.simulator.result import RankTime, SimulationResult
from distri.simulator.spans import RankTotals, Segment, critical_path
from distri.simulator.steps import host_end
from distri.simulator.tasks import COMPUTE_STREAM, HOST_LANE, STREAM_NAMES, Compute, StepTemplate, TaskList

_NS = 1e9
_DEFAULT_OPTIONS = SimulationOptions()


@dataclass(frozen=True)
class Simulation:
    """A result with what it was read from: the tasks, and the run with its record of spans."""

    result: SimulationResult
    tasks: TaskList
    run: Run


def simulate(
    plan: Plan,
    graph: LayerGraph,
    cluster: Cluster,
    options: SimulationOptions = _DEFAULT_OPTIONS,
    method: Method | None = None,
    compute: ComputeFactory = AnalyticCompute,
) -> SimulationResult:
    """Predict one run. `method` is needed for `tensor_parallel` alone; all others are in the plan.

    Raises:
        HardwareError: the cluster has fewer devices than the plan, or lacks a rate or a route.
    """
    return run_simulation(plan, Lowering(graph, cluster, options, compute), method).result


def run_simulation(plan: Plan, lowering: Lowering, method: Method | None = None) -> Simulation:
    """Predict one run; a `Lowering` may serve many plans of one graph and cluster.

    Raises:
        HardwareError: as `simulate`.
    """
    cluster, options = lowering.cluster, lowering.options
    if plan.mesh.size > cluster.num_ranks:
        raise HardwareError(
            f"the plan is for {plan.mesh.size} devices, {cluster.name} has {cluster.num_ranks}"
        )
    chosen = method or (Method.ORIGINAL if plan.mesh.size == 1 else Method.DISPLACED)
    tasks = lower_method(lowering, plan, chosen)
    run = _run(tasks, lowering)
    assert run.record is not None
    end_ns = run.total_ns - run.walk.skipped_ns
    path = critical_path(run.record, run.walk.starts_ns, run.walk.skips, end_ns)
    outside_s = options.before_s + options.after_s + options.per_step_s * plan.image.num_inference_steps
    latency_s = run.total_ns / _NS + outside_s
    original_s = original_ns(plan, lowering) / _NS + outside_s
    busiest = _transfer_s(tasks)
    exposed_s = _on_path(path, STREAM_NAMES[1:HOST_LANE])
    result = SimulationResult(
        method=method.value if method else _method_name(plan, chosen),
        hardware=cluster.name,
        num_ranks=plan.mesh.size,
        latency_s=latency_s,
        original_s=original_s,
        speedup=original_s / latency_s,
        efficiency=original_s / latency_s / plan.mesh.size,
        compute_s=_on_path(path, (STREAM_NAMES[COMPUTE_STREAM],)),
        exposed_communication_s=exposed_s,
        launch_s=_on_path(path, (STREAM_NAMES[HOST_LANE],)),
        outside_s=outside_s,
        hidden_communication_s=max(0.0, busiest - exposed_s),
        ranks=_rank_times(run),
        bytes_on_link=_bytes_on_link(tasks, lowering),
        bytes_sent=_payload(tasks, sent=True),
        bytes_received=_payload(tasks, sent=False),
        memory=memory_of(plan, lowering.graph, cluster, chosen is Method.TENSOR_PARALLEL),
        critical_path=_compressed(path),
        interval_s=_interval(tasks, lowering, latency_s, outside_s),
        tags=_tags(plan, lowering),
        sources={kind: source for kind, (_, source) in sorted(lowering.table(plan.dtype).tags.items())},
        assumptions=_assumptions(plan, lowering, chosen),
        steps=_steps(run, tasks),
    )
    return Simulation(result, tasks, run)


def _run(tasks: TaskList, lowering: Lowering) -> Run:
    options = lowering.options
    if not options.has_contention or tasks.num_ranks == 1:
        return run_longest_path(tasks, options.is_periodic, is_recorded=True)
    from distri.simulator.machine import Machine

    channels = lowering.collectives.topology.channels
    return Machine(tasks, channels, True, options.is_periodic, is_recorded=True).run()


def _method_name(plan: Plan, chosen: Method) -> str:
    return chosen.value if chosen is Method.ORIGINAL else plan.policy.name


def original_ns(plan: Plan, lowering: Lowering) -> int:
    """The unmodified model, whole picture and whole batch, on the fastest of the plan's kinds of device."""
    whole = Extent(plan.image.batch, TEXT_TOKENS, plan.latent)
    shard = Shard(whole, whole)
    table = lowering.table(plan.dtype)
    kinds = sorted({device.model for device in lowering.cluster.devices[: plan.mesh.size]})
    found = []
    for kind in kinds:
        times = table.times(kind, shard, Layers.NATIVE, Service.NONE)
        device_ns, host_ns = int(times.device_ns.sum()), int(times.host_ns.sum())
        has_host = lowering.options.launch is LaunchMode.EAGER
        ends = (host_end(times),) if has_host else ()
        step = Compute((device_ns,), (host_ns,) if has_host else (), ends, 0, len(lowering.graph))
        template = StepTemplate("step", (step,), is_closed=True)
        steps = (0,) * plan.image.num_inference_steps
        found.append(longest_path_ns(TaskList(1, (template,), steps, 0)))
    return min(found)


def _on_path(path: Sequence[Segment], streams: Sequence[str]) -> float:
    return sum(segment.duration_ns * segment.count for segment in path if segment.stream in streams) / _NS


def _compressed(path: Sequence[Segment]) -> tuple[Segment, ...]:
    """Hops of one call that follow each other, over however many ranks, are one segment of the first one's rank."""
    joined: list[Segment] = []
    for segment in path:
        before = joined[-1] if joined else None
        alike = before is not None and segment.operations is None and before.operations is None
        if before is not None and alike and _kind_of(before) == _kind_of(segment):
            joined[-1] = dataclasses.replace(before, duration_ns=before.duration_ns + segment.duration_ns)
        else:
            joined.append(segment)
    return tuple(joined)


def _kind_of(segment: Segment) -> tuple[str, str, int]:
    return segment.stream, segment.label, segment.count


def _rank_times(run: Run) -> tuple[RankTime, ...]:
    assert run.record is not None
    num_ranks = len(run.record.last)
    totals = [RankTotals() for _ in range(num_ranks)]
    for visit, count in enumerate(run.walk.repeats()):
        for rank in range(num_ranks):
            totals[rank].add(run.record.totals[visit][rank], count)
    return tuple(
        RankTime(total.compute / _NS, total.exposed / _NS, total.waiting / _NS, total.launching / _NS)
        for total in totals
    )


def _transfer_s(tasks: TaskList) -> float:
    """Transfer time of the rank that has most of it."""
    by_rank = [0] * tasks.num_ranks
    for place, count in Counter(tasks.steps).items():
        for call in tasks.templates[place].calls:
            for group in call.groups:
                for rank in group.ranks:
                    by_rank[rank] += count * (group.transfer.alone_ns + group.tail_ns)
            longest: dict[int, int] = {}
            for hop in call.hops:
                for rank in (hop.source, hop.reader):
                    longest[rank] = max(longest.get(rank, 0), hop.transfer.alone_ns)
            for rank, time in longest.items():
                by_rank[rank] += count * time
    return max(by_rank) / _NS


def _bytes_on_link(tasks: TaskList, lowering: Lowering) -> dict[str, int]:
    channels = lowering.collectives.topology.channels
    carried = bytes_by_channel(tasks)
    return {channels[channel].name: carried[channel] for channel in sorted(carried)}


def _payload(tasks: TaskList, sent: bool) -> tuple[int, ...]:
    by_rank = [0] * tasks.num_ranks
    for place, count in Counter(tasks.steps).items():
        for call in tasks.templates[place].calls:
            for rank, num_bytes in enumerate(call.sent_bytes if sent else call.received_bytes):
                by_rank[rank] += count * num_bytes
    return tuple(by_rank)


def _interval(
    tasks: TaskList, lowering: Lowering, latency_s: float, outside_s: float
) -> tuple[float, float] | None:
    """5th and 95th percentile over draws of every rank's speed; ranks in lock-step wait for the slowest."""
    options = lowering.options
    if not options.noise:
        return None
    generator = np.random.default_rng(options.noise_seed)
    nominal = longest_path_ns(tasks)
    ratios = []
    for _ in range(options.noise_samples):
        factors = np.maximum(0.1, 1 + options.noise * generator.standard_normal(tasks.num_ranks))
        ratios.append(longest_path_ns(_slowed(tasks, [float(factor) for factor in factors])) / nominal)
    low, high = (float(value) for value in np.quantile(ratios, (0.05, 0.95)))
    inside = latency_s - outside_s
    return inside * low + outside_s, inside * high + outside_s


def _slowed(tasks: TaskList, factors: Sequence[float]) -> TaskList:
    """The same tasks with each rank's kernels slower by a factor."""
    templates = tuple(
        dataclasses.replace(
            template,
            actions=tuple(
                action._replace(
                    device_ns=tuple(round(t * f) for t, f in zip(action.device_ns, factors, strict=True))
                )
                if isinstance(action, Compute)
                else action
                for action in template.actions
            ),
        )
        for template in tasks.templates
    )
    return dataclasses.replace(tasks, templates=templates)


def _tags(plan: Plan, lowering: Lowering) -> dict[str, Tag]:
    """How each figure is known: as well as the worst-known figure that it was made from."""
    order = list(Tag)
    tags = {f"compute: {kind}": tag for kind, (tag, _) in sorted(lowering.table(plan.dtype).tags.items())}
    communication = lowering.factory(plan).tags
    tags |= {f"communication: {name}": tag for name, tag in sorted(communication.items())}
    computing = [tag for name, tag in tags.items() if name.startswith("compute")]
    moving = [tag for name, tag in tags.items() if name.startswith("communication")]
    tags["compute_s"] = max(computing, key=order.index)
    tags["exposed_communication_s"] = max(moving, key=order.index, default=Tag.DATA_SHEET)
    tags["latency_s"] = max([*computing, *moving], key=order.index)
    tags["speedup"] = tags["latency_s"]
    tags["memory_bytes"] = Tag.ASSUMED
    tags["bytes_on_link"] = Tag.DATA_SHEET
    return tags


def _assumptions(plan: Plan, lowering: Lowering, chosen: Method) -> tuple[str, ...]:
    options = lowering.options
    found = [
        "activations are channels-first, element-wise operations are kernels of their own",
        f"attention heads have {HEAD_SIZE} channels",
        f"GEMM and convolution libraries take {WORKSPACE_BYTES // 2**20} MiB of workspace",
        "kernels are launched as CUDA graphs"
        if options.launch is LaunchMode.GRAPH
        else "kernels are launched one by one by the host",
    ]
    if plan.mesh.size > 1:
        if chosen is Method.TENSOR_PARALLEL:
            found.append(
                "channels are split over the ranks, activations between blocks are whole on every rank"
            )
        elif plan.pattern == GATHER_ALL:
            found.append(
                "layers and messages as in the published implementation: everything is gathered by every rank"
            )
        else:
            found.append("layers and messages as distri's own: halos to neighbours, moments along the line")
        found.append(
            "concurrent transfers share links max-min fairly"
            if options.has_contention
            else "every transfer takes the time it takes alone"
        )
        share = lowering.slowdown / 1000
        kept = {
            CtaPolicy.DEFAULT: "the library's own number of thread blocks",
            CtaPolicy.LIMITED: f"at most {options.num_ctas} thread blocks",
            CtaPolicy.COPY_ENGINE: "copy engines, no thread blocks",
        }[options.cta_policy]
        found.append(f"communication has {kept}; kernels beside it take {share:.0%} longer")
    if plan.refresh is not None and plan.refresh.max_change is not None:
        found.append("the latent never changes so much that a refresh is due early")
    if math.isclose(options.before_s + options.after_s + options.per_step_s, 0.0):
        found.append("text encoders, VAE and scheduler are not in the time")
    return tuple(found)


def _steps(run: Run, tasks: TaskList) -> tuple[tuple[str, float, int], ...]:
    repeats = run.walk.repeats()
    starts = [*run.walk.starts_ns, run.total_ns - run.walk.skipped_ns]
    return tuple(
        (tasks.templates[visit.template].name, (starts[place + 1] - starts[place]) / _NS, repeats[place])
        for place, visit in enumerate(run.walk.visits)
    )
