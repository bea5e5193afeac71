"""What was busy when, and what it had waited for: the record of a simulation, and the critical path through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from distri.simulator.periodic import Skip
from distri.simulator.tasks import COMPUTE_STREAM, HOST_LANE, STREAM_NAMES, Call, Compute


class Span(NamedTuple):
    """One piece of work of one rank. `cause` is the place of the span whose end let this one start, -1 for none."""

    rank: int
    stream: int
    start_ns: int
    end_ns: int
    cause: int
    visit: int
    work: Compute | Call


@dataclass
class RankTotals:
    """Nanoseconds of one rank's compute stream: busy, and idle for a transfer, for other ranks, for the host."""

    compute: int = 0
    exposed: int = 0
    waiting: int = 0
    launching: int = 0

    def add(self, other: RankTotals, times: int) -> None:
        """Count another's as often as that."""
        self.compute += times * other.compute
        self.exposed += times * other.exposed
        self.waiting += times * other.waiting
        self.launching += times * other.launching


@dataclass
class Record:
    """Spans in the order of their ends being known, and by simulated step and rank the totals."""

    spans: list[Span] = field(default_factory=list)
    totals: list[list[RankTotals]] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    """By rank: the span that ended its run."""

    def add(self, span: Span) -> int:
        """Keep a span; returns its place."""
        self.spans.append(span)
        return len(self.spans) - 1


@dataclass(frozen=True)
class Segment:
    """A stretch of the critical path: `count` times `duration_ns`."""

    rank: int
    stream: str
    label: str
    duration_ns: int
    count: int = 1
    operations: tuple[int, int] | None = None


def critical_path(
    record: Record, starts_ns: Sequence[int], skips: Sequence[Skip], end_ns: int
) -> list[Segment]:
    """The chain of spans that decided when the run ended, from its start; repeated steps are counted.

    The durations times the counts add up to the run's time without what lies outside of its steps.
    """
    counts = {skip.visit: 1 + skip.count for skip in skips}
    ends = max(range(len(record.last)), key=lambda rank: (_end_of(record, rank), -rank))
    found: list[Segment] = []
    place, until = record.last[ends], end_ns
    while place >= 0:
        span = record.spans[place]
        start = record.spans[span.cause].end_ns if span.cause >= 0 else 0
        found.extend(_cut(span, min(start, until), until, starts_ns, counts))
        place, until = span.cause, min(start, until)
    return _joined(found[::-1])


def _end_of(record: Record, rank: int) -> int:
    place = record.last[rank]
    return record.spans[place].end_ns if place >= 0 else 0


def _cut(span: Span, start: int, end: int, starts_ns: Sequence[int], counts: dict[int, int]) -> list[Segment]:
    """A span's stretch from `start` to `end`, latest part first, cut where a counted step begins or ends."""
    borders = {starts_ns[at] for visit in counts for at in (visit, visit + 1) if start < starts_ns[at] < end}
    edges = sorted(borders | {start, end})
    pieces = []
    for low, high in pairwise(edges):
        count = next((n for visit, n in counts.items() if starts_ns[visit] <= low < starts_ns[visit + 1]), 1)
        pieces.append(_segment(span, high - low, count))
    return pieces[::-1]


def _segment(span: Span, duration_ns: int, count: int) -> Segment:
    operations = (span.work.first, span.work.last) if isinstance(span.work, Compute) else None
    label = "compute" if isinstance(span.work, Compute) else span.work.label
    if span.stream == HOST_LANE:
        label = "launch"
    return Segment(span.rank, STREAM_NAMES[span.stream], label, duration_ns, count, operations)


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbours of the same rank, stream and count, if both are kernels, as one."""
    joined: list[Segment] = []
    for segment in segments:
        if segment.duration_ns == 0:
            continue
        before = joined[-1] if joined else None
        if (
            before is not None
            and (before.rank, before.stream, before.count) == (segment.rank, segment.stream, segment.count)
            and segment.stream == STREAM_NAMES[COMPUTE_STREAM]
            and before.operations is not None
            and segment.operations is not None
            and before.operations[1] == segment.operations[0]
        ):
            joined[-1] = Segment(
                segment.rank, segment.stream, segment.label, before.duration_ns + segment.duration_ns,
                segment.count, (before.operations[0], segment.operations[1]),
            )  # fmt: skip
        else:
            joined.append(segment)
    return joined
