"""One self-contained page that shows a prediction: timeline, speed-up, where the time goes, memory, assumptions.

The page is a template that ships as data; the figures go into it as JSON. It asks for nothing from outside.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

from distri.core.partition import SplitAxis
from distri.core.plan import Plan
from distri.core.planner import PlanRequest
from distri.errors import UserError
from distri.simulator.lowering import Lowering
from distri.simulator.methods import Method, plan_of
from distri.simulator.result import SimulationResult
from distri.simulator.spans import Span
from distri.simulator.tasks import COMPUTE_STREAM, FRESH_STREAM, HOST_LANE, LATE_STREAM
from distri.simulator.timeline import Timeline

MOST_SPANS: Final = 60_000
MOST_FLOWS: Final = 6_000
MOST_LINKS: Final = 24
MOST_SEGMENTS: Final = 10
_KINDS: Final = {COMPUTE_STREAM: 0, LATE_STREAM: 1, FRESH_STREAM: 2, HOST_LANE: 3}
_KIND_NAMES: Final = ("compute", "late", "fresh", "host", "link")
_LINK_KIND: Final = 4
_SHORT: Final = {COMPUTE_STREAM: "compute", LATE_STREAM: "late", FRESH_STREAM: "sync", HOST_LANE: "host"}
_LONG: Final = {
    COMPUTE_STREAM: "computing",
    LATE_STREAM: "communication",
    FRESH_STREAM: "waited-for exchange",
    HOST_LANE: "launching",
}


@dataclass(frozen=True)
class ScalingPoint:
    """The same picture on so many devices."""

    devices: int
    latency_s: float
    speedup: float


def scaling_of(plan: Plan, lowering: Lowering, method: Method | None) -> tuple[ScalingPoint, ...]:
    """Predictions for 1 device up to the plan's number, as far as the picture splits."""
    from distri.simulator.simulate import run_simulation

    points = []
    for devices in _counts(plan.mesh.size):
        kind = Method.ORIGINAL if devices == 1 else method or Method.DISPLACED
        try:
            other = (
                plan
                if devices == plan.mesh.size
                else plan_of(kind, request_of(plan, devices), lowering.graph)
            )
        except UserError:
            continue
        result = run_simulation(other, lowering, kind).result
        points.append(ScalingPoint(devices, result.latency_s, result.speedup))
    return tuple(points)


def _counts(most: int) -> list[int]:
    """All numbers of devices up to 8, from there on powers of two; and the plan's own.

    >>> _counts(12)
    [1, 2, 3, 4, 5, 6, 7, 8, 12]
    """
    powers = [2**power for power in range(4, 11)]
    return sorted({*range(1, min(most, 8) + 1), *(power for power in powers if power <= most), most})


def request_of(plan: Plan, devices: int) -> PlanRequest:
    """The request that makes a plan like this one for another number of devices."""
    return PlanRequest(
        image=plan.image,
        num_ranks=devices,
        cfg_split=None if plan.mesh.cfg == 2 else False,
        policy=plan.policy,
        warmup_steps=max(1, plan.warmup_steps),
        axis=plan.partition.axis if plan.partition.axis is not SplitAxis.GRID else SplitAxis.ROWS,
        dtype=plan.dtype,
        pattern=plan.pattern,
    )


def html_report(
    result: SimulationResult,
    plan: Plan,
    lowering: Lowering,
    timeline: Timeline,
    scaling: Sequence[ScalingPoint],
    warnings: Sequence[str] = (),
) -> str:
    """The page."""
    data = report_data(result, plan, lowering, timeline, scaling, warnings)
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _template().replace("__DATA__", text)


@cache
def _template() -> str:
    return (resources.files("distri.simulator") / "data" / "report.html").read_text(encoding="utf-8")


def report_data(
    result: SimulationResult,
    plan: Plan,
    lowering: Lowering,
    timeline: Timeline,
    scaling: Sequence[ScalingPoint],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """What the page's script reads."""
    image, cluster = plan.image, lowering.cluster
    devices = "1 device" if result.num_ranks == 1 else f"{result.num_ranks} devices"
    return {
        "title": f"{plan.model.name}, {image.height}x{image.width}, on {devices}",
        "subtitle": (
            f"{devices} of: {cluster.title}. {image.num_inference_steps} steps ({plan.warmup_steps} of them "
            f"warm-up), guidance {'on' if image.guidance else 'off'}, {plan.mesh.cfg} x {plan.mesh.patch} patches by "
            f"{plan.partition.axis.value}, policy {plan.policy.name}, {plan.dtype}. Simulated: nothing was run."
        ),
        "footer": f"Plan {plan.hash[:16]}, model {plan.model.fingerprint}. Made by distri simulate.",
        "warnings": list(warnings),
        "facts": list(_facts(result)),
        "end_us": _us(timeline.end_ns),
        **_timeline(timeline),
        "scaling": [dataclasses.asdict(point) for point in scaling],
        "scaling_note": "Against the unmodified model on one device; dashed: ideal.",
        "ranks": list(_ranks(result)),
        "memory": list(_memory(result)),
        "memory_note": _memory_note(result),
        "links": list(_links(result, timeline)),
        "path": list(_path(result, plan)),
        "assumptions": list(_assumptions(result)),
    }


def _us(time_ns: float) -> float:
    return round(time_ns / 1000, 3)


def _facts(result: SimulationResult) -> Iterator[tuple[str, str, str]]:
    tags = {name: tag.value for name, tag in result.tags.items()}
    yield "time of the run", f"{result.latency_s:.3f} s", tags["latency_s"]
    if result.interval_s:
        low, high = result.interval_s
        yield "with noise", f"{low:.2f} to {high:.2f} s", "5th to 95th percentile"
    yield "one device", f"{result.original_s:.3f} s", tags["compute_s"]
    if result.num_ranks > 1:
        yield "speed-up", f"{result.speedup:.2f}x", f"efficiency {result.efficiency:.0%}"
        share = result.exposed_communication_s / result.latency_s
        yield "exposed communication", f"{result.exposed_communication_s:.3f} s", f"{share:.0%} of the run"
        yield "hidden communication", f"{result.hidden_communication_s:.3f} s", "behind computation"
    most = max(result.memory, key=lambda use: use.total)
    yield "memory, at most", f"{most.total / 1e9:.2f} GB", f"of {most.limit / 1e9:.0f} GB"


def _timeline(timeline: Timeline) -> dict[str, Any]:
    """Lanes, spans, flows and steps; of a long run the first and the last steps."""
    lanes, places = _lanes(timeline)
    labels: dict[str, int] = {}
    visits = _shown_visits(timeline)
    spans: list[tuple[int, float, float, int, int, float]] = []
    shown: dict[int, int] = {}
    for number, span in enumerate(timeline.spans):
        if span.visit in visits and span.end_ns > span.start_ns:
            shown[number] = places[span.rank, span.stream]
            label = labels.setdefault(timeline.name_of(span), len(labels))
            spans.append((*_place(places, span), _KINDS[span.stream], label, -1))
    gaps = _gaps(timeline, visits)
    for load in timeline.loads:
        place = places.get((-1, load.channel))
        if place is not None and not any(start <= load.start_ns < end for start, end, _ in gaps):
            capacity = timeline.channels[load.channel].capacity_bytes_per_s
            label = labels.setdefault(f"{load.bytes_per_s / 1e9:.4g} GB/s", len(labels))
            share = round(load.bytes_per_s / capacity, 3)
            spans.append((place, _us(load.start_ns), _us(load.end_ns), _LINK_KIND, label, share))
    flows: list[tuple[int, float, int, float]] = []
    for reading in timeline.readings():
        if reading.source in shown and reading.target in shown and len(flows) < MOST_FLOWS:
            source, target = timeline.spans[reading.source], timeline.spans[reading.target]
            flows.append(
                (shown[reading.source], _us(source.start_ns), shown[reading.target], _us(target.start_ns))
            )
    starts = timeline.starts_ns
    steps = [
        {"name": timeline.step_name(visit), "start": _us(starts[visit]), "end": _us(starts[visit + 1])}
        for visit in range(len(starts) - 1)
    ]
    left_out = [
        {
            "start": _us(start),
            "end": _us(end),
            "text": f"{count} {'step' if count == 1 else 'steps'} not drawn",
        }
        for start, end, count in gaps
    ]
    return {
        "lanes": lanes,
        "spans": spans,
        "flows": flows,
        "steps": steps,
        "labels": list(labels),
        "left_out": left_out,
    }


def _place(places: Mapping[tuple[int, int], int], span: Span) -> tuple[int, float, float]:
    return places[span.rank, span.stream], _us(span.start_ns), _us(span.end_ns)


def _lanes(timeline: Timeline) -> tuple[list[dict[str, Any]], dict[tuple[int, int], int]]:
    """A lane for each stream of each rank, and for the busiest links; links have rank -1 among the places."""
    used = sorted({(span.rank, span.stream) for span in timeline.spans})
    lanes: list[dict[str, Any]] = [
        {
            "name": f"rank {rank}: {_LONG[stream]}",
            "short": f"{rank} {_SHORT[stream]}",
            "kind": _KIND_NAMES[_KINDS[stream]],
            "group": rank,
        }
        for rank, stream in used
    ]
    places = {key: number for number, key in enumerate(used)}
    for channel in _busiest(timeline):
        places[-1, channel] = len(lanes)
        name = timeline.channels[channel].name.replace("host0/", "")
        lanes.append({"name": name, "short": name.split(" ")[0], "kind": "link", "group": -1})
    return lanes, places


def _busiest(timeline: Timeline) -> list[int]:
    carried: dict[int, int] = {}
    for load in timeline.loads:
        carried[load.channel] = carried.get(load.channel, 0) + load.bytes_per_s * (
            load.end_ns - load.start_ns
        )
    most = sorted(carried, key=lambda channel: (-carried[channel], channel))[:MOST_LINKS]
    return sorted(most)


def _shown_visits(timeline: Timeline) -> set[int]:
    """All steps, or so many that the page stays small: first of all one of each phase and those around the borders."""
    by_visit: dict[int, int] = {}
    for span in timeline.spans:
        by_visit[span.visit] = by_visit.get(span.visit, 0) + 1
    visits = sorted(by_visit)
    names = [timeline.tasks.template_of(visit).name for visit in visits]
    border = next((at for at in range(1, len(visits)) if names[at] != names[at - 1]), 0)
    telling = [0, border, border + 1, border + 2, len(visits) - 1, len(visits) - 2, 1, border - 1]
    order = [visits[at] for at in telling if 0 <= at < len(visits)] + visits
    shown: set[int] = set()
    total = 0
    for visit in dict.fromkeys(order):
        total += by_visit[visit]
        if total > MOST_SPANS and len(shown) > 1:
            break
        shown.add(visit)
    return shown


def _gaps(timeline: Timeline, shown: set[int]) -> list[tuple[int, int, int]]:
    """Stretches of steps that are not drawn: start and end in nanoseconds, and how many steps."""
    gaps: list[tuple[int, int, int]] = []
    starts = timeline.starts_ns
    for visit in range(len(starts) - 1):
        if visit in shown:
            continue
        if gaps and gaps[-1][1] == starts[visit]:
            gaps[-1] = (gaps[-1][0], starts[visit + 1], gaps[-1][2] + 1)
        else:
            gaps.append((starts[visit], starts[visit + 1], 1))
    return gaps


def _ranks(result: SimulationResult) -> Iterator[dict[str, Any]]:
    for rank, time in enumerate(result.ranks):
        busy = time.compute_s / result.latency_s
        yield {
            "name": f"rank {rank}",
            "compute_us": time.compute_s * 1e6,
            "exposed_us": time.exposed_communication_s * 1e6,
            "waiting_us": time.waiting_s * 1e6,
            "launching_us": time.launch_s * 1e6,
            "text": f"{busy:.0%} busy",
        }


def _memory(result: SimulationResult) -> Iterator[dict[str, Any]]:
    for rank, use in enumerate(result.memory):
        yield {
            "name": f"rank {rank}",
            "weights": use.weights,
            "activations": use.activations,
            "buffers": use.stale_values + use.communication,
            "workspace": use.workspace,
            "reserved": use.reserved,
            "limit": use.limit,
            "text": f"{use.total / 1e9:.2f} GB",
        }


def _memory_note(result: SimulationResult) -> str:
    most = max(result.memory, key=lambda use: use.total)
    place = most.peak_layer or "the model itself"
    return f"Activations are at their peak at {place}. The line is the device's limit, {most.limit / 1e9:.0f} GB."


def _links(result: SimulationResult, timeline: Timeline) -> Iterator[dict[str, Any]]:
    busy: dict[str, int] = {}
    for load in timeline.loads:
        name = timeline.channels[load.channel].name
        busy[name] = busy.get(name, 0) + load.end_ns - load.start_ns
    ordered = sorted(result.bytes_on_link.items(), key=lambda item: (-item[1], item[0]))
    for name, num_bytes in ordered[:MOST_LINKS]:
        yield {
            "name": name,
            "bytes": num_bytes,
            "busy": round(busy.get(name, 0) / max(1, timeline.end_ns), 4),
        }


def _path(result: SimulationResult, plan: Plan) -> Iterator[dict[str, Any]]:
    for what, where, spent_s in longest_segments(result, plan)[:MOST_SEGMENTS]:
        yield {
            "what": what,
            "where": where,
            "us": spent_s * 1e6,
            "share": round(spent_s / result.latency_s, 4),
        }


def longest_segments(result: SimulationResult, plan: Plan) -> list[tuple[str, str, float]]:
    """What the critical path is made of: (what, where, seconds), like with like, longest first."""
    kinds = {exchange.layer: exchange.kind.value for exchange in plan.exchanges}
    sums: dict[tuple[str, str], int] = {}
    for segment in result.critical_path:
        what = "kernels" if segment.label == "compute" else kinds.get(segment.label, segment.label)
        key = (what, segment.stream)
        sums[key] = sums.get(key, 0) + segment.duration_ns * segment.count
    ordered = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
    return [(what, where, total / 1e9) for (what, where), total in ordered]


def _assumptions(result: SimulationResult) -> Iterator[dict[str, str]]:
    for name, tag in result.tags.items():
        kind, _, rest = name.partition(": ")
        source = result.sources.get(rest, "") if kind == "compute" else ""
        yield {"what": name, "tag": tag.value, "source": source}
    for sentence in result.assumptions:
        yield {"what": sentence, "tag": "assumed", "source": ""}
