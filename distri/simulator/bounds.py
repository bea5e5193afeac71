"""Tier 1: closed-form lower bounds of a task list, for pruning. No schedule can be faster.

Three reasons why not: each rank's kernels must run; each rank's communication streams run one call after another; each
channel has a capacity. The bound of a run is the largest of the three.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from distri.simulator.tasks import Compute, StepTemplate, TaskList
from distri.simulator.topology import Channel

_NS: Final = 1_000_000_000


@dataclass(frozen=True)
class Bounds:
    """Lower bounds of a run's nanoseconds: kernels alone, communication streams alone, the busiest channel alone."""

    compute_ns: int
    communication_ns: int
    link_ns: int

    @property
    def latency_ns(self) -> int:
        """No run is shorter."""
        return max(self.compute_ns, self.communication_ns, self.link_ns)


def bounds_of(tasks: TaskList, channels: tuple[Channel, ...] = ()) -> Bounds:
    """The bounds of a run. A rank waits for the slowest at the end of each closed step, which counts too."""
    repeats = Counter(tasks.steps)
    compute = sum(count * max(_compute_ns(tasks.templates[place])) for place, count in repeats.items())
    if not all(template.is_closed for template in tasks.templates):
        by_rank = [0] * tasks.num_ranks
        for place, count in repeats.items():
            by_rank = [
                a + count * b for a, b in zip(by_rank, _compute_ns(tasks.templates[place]), strict=True)
            ]
        compute = max(by_rank)
    streams: Counter[tuple[int, int]] = Counter()
    for place, count in repeats.items():
        for key, busy in _stream_ns(tasks.templates[place]).items():
            streams[key] += count * busy
    carried = bytes_by_channel(tasks)
    link = max(
        (num_bytes * _NS // channels[channel].capacity_bytes_per_s for channel, num_bytes in carried.items()), default=0
    ) if channels else 0  # fmt: skip
    return Bounds(compute, max(streams.values(), default=0), link)


def serial_ns(tasks: TaskList) -> int:
    """An upper bound: everything of every rank, one after the other, with no overlap at all."""
    total = 0
    for place, count in Counter(tasks.steps).items():
        template = tasks.templates[place]
        for action in template.actions:
            if isinstance(action, Compute):
                total += count * (sum(action.device_ns) + sum(action.host_ends_ns))
        for call in template.calls:
            total += count * sum(group.transfer.alone_ns + group.tail_ns for group in call.groups)
            total += count * sum(hop.transfer.alone_ns for hop in call.hops)
    return total


def bytes_by_channel(tasks: TaskList) -> Counter[int]:
    """What each channel carries in the whole run."""
    carried: Counter[int] = Counter()
    for place, count in Counter(tasks.steps).items():
        for call in tasks.templates[place].calls:
            transfers = [group.transfer for group in call.groups] + [hop.transfer for hop in call.hops]
            for transfer in transfers:
                for channel, weight in transfer.loads:
                    carried[channel] += count * weight * transfer.num_bytes
    return carried


def _compute_ns(template: StepTemplate) -> list[int]:
    columns = [action.device_ns for action in template.actions if isinstance(action, Compute)]
    return [sum(column) for column in zip(*columns, strict=True)]


def _stream_ns(template: StepTemplate) -> Counter[tuple[int, int]]:
    """By (rank, stream): time that the stream is taken; hops of one call run side by side, so the longest counts."""
    busy: Counter[tuple[int, int]] = Counter()
    for call in template.calls:
        for group in call.groups:
            for rank in group.ranks:
                busy[rank, call.stream] += group.transfer.alone_ns + group.tail_ns
        longest: dict[int, int] = {}
        for hop in call.hops:
            for rank in (hop.source, hop.reader):
                longest[rank] = max(longest.get(rank, 0), hop.transfer.alone_ns)
        for rank, time in longest.items():
            busy[rank, call.stream] += time
    return busy
