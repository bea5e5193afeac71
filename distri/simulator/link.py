"""Concurrent flows share channels max-min fairly: a fluid model on SimPy's clock, in integers.

Rates are whole bytes per second and are set anew when a flow starts or ends; times are whole nanoseconds;
latency passes before a flow's first byte and loads nothing. Invariants: no channel carries more than its
capacity at any time; a flow ends in the first nanosecond by which its last byte has gone; the order in which
flows are started within one nanosecond does not matter. Progressive filling: Bertsekas and Gallager, Data
Networks, section 6.5.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import simpy
from simpy.events import EventPriority

from distri.simulator.topology import NANOSECONDS, Channel, Route

Key: TypeAlias = tuple[int, int, int]
"""(rank, stream, operation): unique among the flows under way, and the order of events at the same
nanosecond.
"""

_AFTER_EVERYTHING: Final = EventPriority(2)
"""SimPy's priority of the rebalancing: behind every other event of the same nanosecond."""


@dataclass(frozen=True)
class Flow:
    """Some bytes over some channels at one rate; `loads` are (channel, multiple of the rate that it carries).

    A collective is one flow: its channels are all those of its ring, `limit_bytes_per_s` its own best rate.
    """

    key: Key
    num_bytes: int
    loads: tuple[tuple[int, int], ...]
    latency_ns: int = 0
    limit_bytes_per_s: int | None = None


def flow_of(key: Key, num_bytes: int, route: Route, extra_ns: int = 0) -> Flow:
    """One message over a route; `extra_ns` is time before the first byte beyond the route's latency."""
    return Flow(key, num_bytes, route.loads, route.latency_ns + extra_ns)


def alone_ns(flow: Flow, channels: Sequence[Channel]) -> int:
    """Closed form: the time of a flow that shares with no other."""
    capacities = {channel: channels[channel].capacity_bytes_per_s for channel, _ in flow.loads}
    rate = _max_min({flow.key: flow}, capacities)[flow.key]
    return flow.latency_ns + _duration_ns(flow.num_bytes * NANOSECONDS, rate)


def two_alone_ns(
    first_bytes: int, second_bytes: int, gap_ns: int, capacity_bytes_per_s: int
) -> tuple[int, int]:
    """Closed form: when two messages on one channel end, the second starting `gap_ns` after the first."""
    capacity, share = capacity_bytes_per_s, capacity_bytes_per_s // 2
    first, second = first_bytes * NANOSECONDS, second_bytes * NANOSECONDS
    if _duration_ns(first, capacity) <= gap_ns:
        return _duration_ns(first, capacity), gap_ns + _duration_ns(second, capacity)
    first -= capacity * gap_ns
    together = min(_duration_ns(first, share), _duration_ns(second, share))
    rest = [max(0, work - share * together) for work in (first, second)]
    ends = [gap_ns + together + _duration_ns(work, capacity) for work in rest]
    return ends[0], ends[1]


@dataclass
class _Active:
    """A flow under way; `work` is bytes times 1e9, so that rate times nanoseconds is exact."""

    flow: Flow
    done: simpy.Event
    work: int
    rate: int = 0
    since_ns: int = 0


class LinkNetwork:
    """The channels of one run; `transmitted_bytes[c]` is what channel c carried for flows that have ended."""

    def __init__(self, env: simpy.Environment, channels: Sequence[Channel], record: bool = False) -> None:
        self.env = env
        self.channels = channels
        self.transmitted_bytes = [0] * len(channels)
        self.busy_ns = [0] * len(channels)
        self.load_history: list[tuple[int, int, int]] = []
        """(time in ns, channel, bytes per second from then on), where `record` is set."""
        self._record = record
        self._active: dict[Key, _Active] = {}
        self._on_channel: list[dict[Key, int]] = [{} for _ in channels]
        self._capacities = [channel.capacity_bytes_per_s for channel in channels]
        self._alone: dict[tuple[tuple[tuple[int, int], ...], int | None], int] = {}
        self._loads = [0] * len(channels)
        self._busy_since = [0] * len(channels)
        self._touched: set[int] = set()
        self._fresh: set[Key] = set()
        self._is_settling = False
        self._generation = 0

    def start(self, flow: Flow) -> simpy.Event:
        """Start a flow now; the event succeeds with its key when its last byte has arrived."""
        done = self.env.event()
        if flow.latency_ns == 0:
            self._enter(flow, done)
        else:
            wait = self.env.timeout(flow.latency_ns)
            assert wait.callbacks is not None
            wait.callbacks.append(lambda _: self._enter(flow, done))
        return done

    def loads_bytes_per_s(self) -> tuple[int, ...]:
        """What each channel carries at this instant."""
        return tuple(self._loads)

    def _enter(self, flow: Flow, done: simpy.Event) -> None:
        assert flow.key not in self._active, f"two flows under way have the key {flow.key}"
        if flow.num_bytes == 0 or (not flow.loads and flow.limit_bytes_per_s is None):
            done.succeed(flow.key)
            return
        self._active[flow.key] = _Active(flow, done, flow.num_bytes * NANOSECONDS, since_ns=self._now())
        for channel, weight in flow.loads:
            self._on_channel[channel][flow.key] = weight
        self._touched.update(channel for channel, _ in flow.loads)
        self._fresh.add(flow.key)
        self._settle_later()

    def _settle_later(self) -> None:
        if self._is_settling:
            return
        self._is_settling = True
        event = simpy.Event(self.env)
        event._ok, event._value = True, None
        assert event.callbacks is not None
        event.callbacks.append(lambda _: self._settle())
        self.env.schedule(event, priority=_AFTER_EVERYTHING)

    def _settle(self) -> None:
        """Give new rates to the flows that starts and ends can have touched; wait for the next end."""
        self._is_settling = False
        keys, channels = self._component()
        flows = {key: self._active[key].flow for key in keys}
        now = self._now()
        for key, rate in self._rates(flows).items():
            active = self._active[key]
            if rate != active.rate:
                active.work -= active.rate * (now - active.since_ns)
                active.rate, active.since_ns = rate, now
        self._set_loads(channels, flows)
        self._touched, self._fresh = set(), set()
        self._wait_for_next_end()

    def _rates(self, flows: dict[Key, Flow]) -> dict[Key, int]:
        """Max-min fair rates; the rate of a flow that is alone is kept, for the same ones come again and again."""
        if len(flows) != 1:
            return _max_min(flows, self._capacities)
        ((key, flow),) = flows.items()
        kind = (flow.loads, flow.limit_bytes_per_s)
        if kind not in self._alone:
            self._alone[kind] = _max_min(flows, self._capacities)[key]
        return {key: self._alone[kind]}

    def _component(self) -> tuple[list[Key], set[int]]:
        """The flows joined to what changed by shared channels, in order of keys, and those channels."""
        keys, channels, queue = set(self._fresh), set(self._touched), list(self._touched)
        if len(keys) == len(self._active):
            return sorted(keys), channels
        while queue:
            for key in self._on_channel[queue.pop()]:
                if key not in keys:
                    keys.add(key)
                    reached = {channel for channel, _ in self._active[key].flow.loads} - channels
                    channels |= reached
                    queue.extend(reached)
        return sorted(keys), channels

    def _set_loads(self, channels: set[int], flows: dict[Key, Flow]) -> None:
        """Note what each of the channels carries from now on; every flow on them is among `flows`."""
        loads = dict.fromkeys(channels, 0)
        for key, flow in flows.items():
            rate = self._active[key].rate
            for channel, weight in flow.loads:
                loads[channel] += rate * weight
        now, before = self._now(), self._loads
        changed = [(channel, load) for channel, load in loads.items() if load != before[channel]]
        for channel, load in sorted(changed) if self._record else changed:
            assert load <= self._capacities[channel], f"channel {channel} is over its capacity"
            if before[channel] == 0:
                self._busy_since[channel] = now
            elif load == 0:
                self.busy_ns[channel] += now - self._busy_since[channel]
            before[channel] = load
            if self._record:
                self.load_history.append((now, channel, load))

    def _wait_for_next_end(self) -> None:
        self._generation += 1
        if not self._active:
            return
        end_ns = min(
            active.since_ns + _duration_ns(active.work, active.rate) for active in self._active.values()
        )
        generation = self._generation
        timer = self.env.timeout(end_ns - self._now())
        assert timer.callbacks is not None
        timer.callbacks.append(lambda _: self._finish() if generation == self._generation else None)

    def _finish(self) -> None:
        now = self._now()
        ended = [key for key, a in self._active.items() if a.work <= a.rate * (now - a.since_ns)]
        for key in sorted(ended):
            active = self._active.pop(key)
            for channel, weight in active.flow.loads:
                del self._on_channel[channel][key]
                self.transmitted_bytes[channel] += active.flow.num_bytes * weight
                self._touched.add(channel)
            active.done.succeed(key)
        self._settle_later()

    def _now(self) -> int:
        return int(self.env.now)


def _duration_ns(work: int, rate: int) -> int:
    """Whole nanoseconds, rounded up, that `work` (bytes times 1e9) takes at a rate."""
    return -(-work // rate)


def _max_min(flows: dict[Key, Flow], capacities: Mapping[int, int] | Sequence[int]) -> dict[Key, int]:
    """Max-min fair whole rates: all rise together; a flow stops at its limit or its first full channel."""
    room: dict[int, int] = {}
    weights: dict[int, int] = {}
    for flow in flows.values():
        for channel, weight in flow.loads:
            room[channel] = capacities[channel]
            weights[channel] = weights.get(channel, 0) + weight
    rates: dict[Key, int] = {}
    rising = dict(flows)
    while rising:
        levels = {channel: room[channel] // weight for channel, weight in weights.items() if weight > 0}
        limits = [flow.limit_bytes_per_s for flow in rising.values() if flow.limit_bytes_per_s is not None]
        level = min([*levels.values(), *limits])
        assert level > 0, "a channel has less than one byte per second for each flow"
        full = {channel for channel, reached in levels.items() if reached == level}
        stopped = [
            k for k, f in rising.items() if f.limit_bytes_per_s == level or any(c in full for c, _ in f.loads)
        ]
        for key in stopped:
            rates[key] = level
            for channel, weight in rising.pop(key).loads:
                room[channel] -= level * weight
                weights[channel] -= weight
    return rates
