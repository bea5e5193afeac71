"""A simulated run as Chrome / Perfetto trace JSON (Trace Event Format), and as one file a rank for
Holistic Trace Analysis.

Processes: one a rank, with a track for its steps, its kernels and each of its communication streams; and one for the
links, with a track for each direction of each link. Flow arrows lead from a send of step t to the kernels that read it
at step t + 1, so that staleness can be seen. Counters: what a link carries, what a rank's memory holds.

Times are microseconds, as the format wants them, with the simulator's nanoseconds behind the point.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Final

from distri.simulator.spans import Span
from distri.simulator.tasks import COMPUTE_STREAM, FRESH_STREAM, HOST_LANE, LATE_STREAM, STREAM_NAMES, Call
from distri.simulator.timeline import Timeline

Event = dict[str, Any]
STEP_TRACK: Final = 0
TRACKS: Final = {COMPUTE_STREAM: 1, LATE_STREAM: 2, FRESH_STREAM: 3, HOST_LANE: 4}
_FIRST_STREAM: Final = 7
"""HTA takes any stream number; PyTorch's own streams start here."""

Memory = Mapping[int, Sequence[int]]
"""By rank: bytes that are held during each operation."""


def chrome_trace(timeline: Timeline, memory: Memory | None = None) -> dict[str, Any]:
    """The JSON object of a trace of the whole run."""
    events = [
        *_spans(timeline),
        *_steps(timeline),
        *_idle(timeline),
        *_flows(timeline),
        *_links(timeline),
        *_memory(timeline, memory or {}),
    ]
    events.sort(key=event_order)
    return {
        "displayTimeUnit": "ms",
        "otherData": {"title": timeline.title, "simulated": "yes"},
        "traceEvents": [*_names(timeline), *events],
    }


def dump_trace(trace: Mapping[str, Any]) -> str:
    """Its text: one event a line, the same for the same run."""
    body = {key: value for key, value in trace.items() if key != "traceEvents"}
    head = json.dumps(body, sort_keys=True)[:-1]
    lines = ",\n".join(json.dumps(event, sort_keys=True) for event in trace["traceEvents"])
    return f'{head}, "traceEvents": [\n{lines}\n]}}\n'


def to_us(time_ns: int) -> float:
    """Microseconds; exact to the nanosecond for runs of weeks.

    >>> to_us(1_234_567)
    1234.567
    """
    return time_ns / 1000


def event_order(event: Event) -> tuple[float, int, int, str]:
    """By time; a slice before what lies inside of it, a flow behind the slices that it ties to."""
    rank = "XCsf".index(event["ph"])
    longest_first = -event.get("dur", 0.0)
    return event["ts"], rank, round(longest_first * 1000), f"{event['pid']:6}{event['tid']:6}"


def _names(timeline: Timeline) -> Iterator[Event]:
    used = {(span.rank, span.stream) for span in timeline.spans}
    for rank in range(timeline.num_ranks):
        yield from rank_names(rank, {stream for of, stream in used if of == rank})
    met = sorted({load.channel for load in timeline.loads})
    if met:
        yield name_event("process_name", timeline.num_ranks, 0, "links")
    for channel in met:
        yield name_event("thread_name", timeline.num_ranks, channel + 1, timeline.channels[channel].name)


def rank_names(rank: int, streams: Set[int]) -> Iterator[Event]:
    """How a rank, the track of its steps and those of the streams that it used are called."""
    yield name_event("process_name", rank, 0, f"rank {rank}")
    yield {**name_event("process_sort_index", rank, 0, ""), "args": {"sort_index": rank}}
    yield name_event("thread_name", rank, STEP_TRACK, "steps")
    for stream, track in TRACKS.items():
        if stream in streams:
            yield name_event("thread_name", rank, track, STREAM_NAMES[stream])


def name_event(name: str, pid: int, tid: int, value: str) -> Event:
    """What says how a process or a track is called."""
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "ts": 0, "args": {"name": value}}


def slice_event(
    name: str, category: str, pid: int, tid: int, start_ns: int, end_ns: int, **arguments: Any
) -> Event:
    """A slice on a track."""
    return {
        "ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid,
        "ts": to_us(start_ns), "dur": to_us(end_ns - start_ns), "args": arguments,
    }  # fmt: skip


def _spans(timeline: Timeline) -> Iterator[Event]:
    for span in timeline.spans:
        category = "communication" if isinstance(span.work, Call) else STREAM_NAMES[span.stream]
        track = TRACKS[span.stream]
        yield slice_event(
            timeline.name_of(span), category, span.rank, track, span.start_ns, span.end_ns, **_arguments(span)
        )


def _arguments(span: Span) -> dict[str, Any]:
    if isinstance(span.work, Call):
        place = span.work.ranks.index(span.rank)
        return {
            "step": span.visit,
            "sent_bytes": span.work.sent_bytes[place],
            "received_bytes": span.work.received_bytes[place],
        }
    return {"step": span.visit, "operations": [span.work.first, span.work.last]}


def _steps(timeline: Timeline) -> Iterator[Event]:
    for visit in range(len(timeline.starts_ns) - 1):
        for rank in range(timeline.num_ranks):
            places = timeline.computing.get((visit, rank))
            if places:
                after = timeline.computing.get((visit + 1, rank))
                end = timeline.spans[after[0]].start_ns if after else timeline.end_ns
                start = timeline.spans[places[0]].start_ns
                yield slice_event(timeline.step_name(visit), "step", rank, STEP_TRACK, start, end, step=visit)


def _idle(timeline: Timeline) -> Iterator[Event]:
    for idle in timeline.idle():
        yield slice_event(
            f"waits for {idle.label}", "wait", idle.rank, TRACKS[COMPUTE_STREAM], idle.start_ns, idle.end_ns,
            step=idle.visit,
        )  # fmt: skip


def _flows(timeline: Timeline) -> Iterator[Event]:
    """Pairs of events that the viewers draw as arrows; each starts inside its source and ends inside its target."""
    for number, reading in enumerate(timeline.readings()):
        source, target = timeline.spans[reading.source], timeline.spans[reading.target]
        common = {"name": f"read {reading.lag} step later: {reading.label}", "cat": "staleness", "id": number}
        yield {
            **common, "ph": "s", "pid": source.rank, "tid": TRACKS[source.stream], "ts": to_us(source.start_ns),
        }  # fmt: skip
        yield {
            **common, "ph": "f", "bp": "e", "pid": target.rank, "tid": TRACKS[target.stream],
            "ts": to_us(target.start_ns),
        }  # fmt: skip


def _links(timeline: Timeline) -> Iterator[Event]:
    pid = timeline.num_ranks
    ends: dict[int, int] = {}
    for load in timeline.loads:
        name = timeline.channels[load.channel].name
        rate = load.bytes_per_s / 1e9
        yield slice_event(
            f"{rate:.4g} GB/s", "link", pid, load.channel + 1, load.start_ns, load.end_ns, link=name
        )
        if ends.get(load.channel, load.start_ns) < load.start_ns:
            yield _counter(name, pid, ends[load.channel], {"GB/s": 0.0})
        yield _counter(name, pid, load.start_ns, {"GB/s": rate})
        ends[load.channel] = load.end_ns
    for channel, end in ends.items():
        yield _counter(timeline.channels[channel].name, pid, end, {"GB/s": 0.0})


def _memory(timeline: Timeline, memory: Memory) -> Iterator[Event]:
    for (_, rank), places in timeline.computing.items():
        held = memory.get(rank)
        if held is None:
            continue
        for place in places:
            span = timeline.spans[place]
            assert not isinstance(span.work, Call)
            during = held[span.work.first : span.work.last]
            if during:
                yield _counter("memory", rank, span.start_ns, {"MB": max(during) / 1e6})


def _counter(name: str, pid: int, time_ns: int, values: dict[str, float]) -> Event:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": to_us(time_ns), "args": values}


def rank_trace(timeline: Timeline, rank: int) -> dict[str, Any]:
    """One rank's run in the form that PyTorch's profiler writes, for Holistic Trace Analysis: kernels on streams,
    each with the launch that it belongs to, steps as `ProfilerStep`, communication under NCCL's names.
    """
    events = list(_kernels(timeline, rank))
    for visit in range(len(timeline.starts_ns) - 1):
        start, end = timeline.starts_ns[visit : visit + 2]
        events.append(slice_event(f"ProfilerStep#{visit}", "user_annotation", rank, rank, start, end))
    events.sort(key=event_order)
    return {
        "schemaVersion": 1,
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": timeline.num_ranks},
        "deviceProperties": [{"id": rank, "name": timeline.title}],
        "traceEvents": events,
    }


def _kernels(timeline: Timeline, rank: int) -> Iterator[Event]:
    mine = (span for span in timeline.spans if span.rank == rank and span.stream in (0, 1, 2))
    for number, span in enumerate(sorted(mine, key=lambda span: (span.start_ns, span.stream, span.end_ns))):
        if span.end_ns == span.start_ns:
            continue
        name = timeline.name_of(span)
        if isinstance(span.work, Call):
            pattern = "AllGather" if span.work.groups else "SendRecv"
            name = f"ncclDevKernel_{pattern} {name}"
        launch = slice_event("cudaLaunchKernel", "cuda_runtime", rank, rank, span.start_ns, span.start_ns)
        launch["args"] = {"correlation": number + 1, "External id": number + 1}
        kernel = slice_event(name, "kernel", 0, _FIRST_STREAM + span.stream, span.start_ns, span.end_ns)
        kernel["args"] = {
            "device": 0, "stream": _FIRST_STREAM + span.stream, "correlation": number + 1,
            "External id": number + 1, **_arguments(span),
        }  # fmt: skip
        yield launch
        yield kernel


def write_rank_traces(timeline: Timeline, directory: Path) -> list[Path]:
    """One file a rank, `rank0.json` and so on, in a directory that exists."""
    paths = []
    for rank in range(timeline.num_ranks):
        path = directory / f"rank{rank}.json"
        path.write_text(dump_trace(rank_trace(timeline, rank)), encoding="utf-8")
        paths.append(path)
    return paths
