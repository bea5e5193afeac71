"""Tier 3: the task list on SimPy's clock, with links that concurrent transfers share max-min fairly.

One process for each stream of each rank, none for a kernel. The rules are those of `distri.simulator.tasks`, and with
contention off every event falls on the same nanosecond as in `distri.simulator.longest_path`. Nothing depends on the
order of events within a nanosecond; where an order shows (which rank a collective had waited for), the lowest
(rank, stream, operation) stands for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable
from typing import Any, TypeAlias

import simpy

from distri.simulator.link import Flow, LinkNetwork
from distri.simulator.longest_path import Run
from distri.simulator.periodic import StepWalk, Visit
from distri.simulator.spans import RankTotals, Record, Span
from distri.simulator.tasks import (
    COMPUTE_STREAM,
    HOST_LANE,
    PARTS,
    Call,
    Compute,
    Post,
    StepTemplate,
    TaskList,
    Transfer,
    Wait,
)
from distri.simulator.topology import Channel

Process: TypeAlias = Generator[simpy.Event, Any, None]


class Machine:
    """One simulation. `network` is None where contention is off: transfers then take the time they take alone."""

    def __init__(
        self,
        tasks: TaskList,
        channels: tuple[Channel, ...] = (),
        has_contention: bool = True,
        is_periodic: bool = True,
        is_recorded: bool = False,
    ) -> None:
        self.tasks = tasks
        self.env = simpy.Environment()
        self.network = LinkNetwork(self.env, channels) if has_contention else None
        self.walk = StepWalk(tasks, self._signature, is_periodic)
        self.record = Record(last=[-1] * tasks.num_ranks) if is_recorded else None
        self.events: list[dict[tuple[int, int], tuple[int, int]]] = []
        self.starts: list[dict[int, int]] = []
        self._visits: list[Visit | None] = []
        self._parties: dict[tuple[int, int], _Party] = {}
        self._ranks = [_Rank(self, rank) for rank in range(tasks.num_ranks)]

    def run(self) -> Run:
        """Run to the end."""
        finished = [rank.process for rank in self._ranks]
        self.env.run(self.env.all_of(finished))
        return Run(max(rank.ended_ns for rank in self._ranks) + self.walk.skipped_ns, self.walk, self.record)

    @property
    def now(self) -> int:
        """The clock."""
        return int(self.env.now)

    def visit(self, number: int) -> StepTemplate | None:
        """The template of the `number`-th simulated step; the first rank that gets there decides for all."""
        if number == len(self._visits):
            visit = self.walk.next(self.now)
            self._visits.append(visit)
            self.events.append({})
            self.starts.append({})
            if self.record is not None and visit is not None:
                self.record.totals.append([RankTotals() for _ in self._ranks])
        known = self._visits[number]
        return None if known is None else self.tasks.templates[known.template]

    def party(self, call: Call, visit: int) -> _Party:
        """A call of a simulated step, made by the first rank that posts it."""
        key = (call.slot, visit)
        if key not in self._parties:
            self._parties[key] = _Party(self, call, visit)
        return self._parties[key]

    def find(self, slot: int, visit: int) -> _Party | None:
        """A call that was posted."""
        return self._parties.get((slot, visit))

    def transfer(self, transfer: Transfer, key: tuple[int, int, int], then: Callable[[], None]) -> None:
        """Move bytes, then go on."""
        if self.network is None or transfer.num_bytes == 0:
            self.after(transfer.alone_ns, then)
            return
        flow = Flow(key, transfer.num_bytes, transfer.loads, transfer.latency_ns, transfer.limit_bytes_per_s)
        done = self.network.start(flow)
        assert done.callbacks is not None
        done.callbacks.append(lambda _: then())

    def after(self, delay_ns: int, then: Callable[[], None]) -> None:
        """Go on after some time."""
        if delay_ns == 0:
            then()
            return
        timeout = self.env.timeout(delay_ns)
        assert timeout.callbacks is not None
        timeout.callbacks.append(lambda _: then())

    def toggle(self, rank: int, change: int) -> None:
        """A late transfer of a rank begins or ends."""
        self._ranks[rank].toggle(change)

    def _signature(self, place: int) -> Hashable:
        base = self.walk.starts_ns[place]
        starts = tuple(self.starts[place][rank] - base for rank in range(self.tasks.num_ranks))
        events = self.events[place]
        return starts, tuple((key, events[key][0] - base, events[key][1] - base) for key in sorted(events))


class _Party:
    """A call under way: who has come, what is still moving."""

    def __init__(self, machine: Machine, call: Call, visit: int) -> None:
        self.machine = machine
        self.call = call
        self.visit = visit
        self.ready: dict[int, tuple[int, int]] = {}
        """By rank that has come: when, and the span that it came from."""
        self.begun: dict[int, int] = {}
        self.ended: dict[int, int] = {}
        self.cause: dict[int, int] = {}
        self.finished = {rank: machine.env.event() for rank in call.ranks}
        self._missing = [len(group.ranks) for group in call.groups]
        self._parts = dict.fromkeys(call.ranks, 0)
        self._groups_of: dict[int, list[int]] = {rank: [] for rank in call.ranks}
        self._hops_of: dict[int, list[int]] = {rank: [] for rank in call.ranks}
        self._arrived: dict[int, tuple[int, int]] = {}
        self._started: set[int] = set()
        self._followers: dict[int, list[int]] = {}
        for place, group in enumerate(call.groups):
            for rank in group.ranks:
                self._parts[rank] += 1
                self._groups_of[rank].append(place)
        for place, hop in enumerate(call.hops):
            for rank in (hop.source, hop.reader):
                self._parts[rank] += 1
                self._hops_of[rank].append(place)
            if hop.after >= 0:
                self._followers.setdefault(hop.after, []).append(place)

    def arrive(self, rank: int, cause: int) -> None:
        """A rank's stream has come to this call."""
        self.ready[rank] = (self.machine.now, cause)
        if self._parts[rank] == 0:
            self._end(rank, self.machine.now)
            return
        for place in self._groups_of[rank]:
            self._missing[place] -= 1
            if self._missing[place] == 0:
                self._start_group(place)
        for place in self._hops_of[rank]:
            self._try_hop(place)

    def _start_group(self, place: int) -> None:
        group = self.call.groups[place]
        now = self.machine.now
        latest = min(rank for rank in group.ranks if self.ready[rank][0] == now)
        cause = self.ready[latest][1]
        for rank in group.ranks:
            self._begin(rank)

        def arrived() -> None:
            self.machine.after(group.tail_ns, ended)

        def ended() -> None:
            for rank in group.ranks:
                self.cause[rank] = self._span(rank, now, cause)
                self._end_part(rank)

        self.machine.transfer(group.transfer, self._key(group.ranks[0], place), arrived)

    def _try_hop(self, place: int) -> None:
        hop = self.call.hops[place]
        is_ready = hop.source in self.ready and hop.reader in self.ready
        if place in self._started or not is_ready or (hop.after >= 0 and hop.after not in self._arrived):
            return
        self._started.add(place)
        now = self.machine.now
        first = max(self.ready[hop.source][0], self.ready[hop.reader][0])
        binding = hop.source if self.ready[hop.source][0] == first else hop.reader
        cause = self.ready[binding][1] if now == first else self._arrived[hop.after][1]
        self._begin(hop.source)
        self._begin(hop.reader)

        def ended() -> None:
            span = self._span(hop.source, now, cause)
            self._arrived[place] = (self.machine.now, span)
            for rank in (hop.source, hop.reader):
                self.cause[rank] = span
                self._end_part(rank)
            for follower in self._followers.get(place, ()):
                self._try_hop(follower)

        self.machine.transfer(hop.transfer, self._key(hop.source, len(self.call.groups) + place), ended)

    def _key(self, rank: int, place: int) -> tuple[int, int, int]:
        number = (self.visit * len(self.machine.tasks.slot_labels) + self.call.slot) * 100_000 + place
        return (rank, self.call.stream, number)

    def _begin(self, rank: int) -> None:
        if rank not in self.begun:
            self.begun[rank] = self.machine.now
            if self.call.is_late:
                self.machine.toggle(rank, 1)

    def _end_part(self, rank: int) -> None:
        self._parts[rank] -= 1
        if self._parts[rank] == 0:
            if self.call.is_late:
                self.machine.toggle(rank, -1)
            self._end(rank, self.begun[rank])

    def _end(self, rank: int, begun: int) -> None:
        self.begun[rank], self.ended[rank] = begun, self.machine.now
        self.machine.events[self.visit][self.call.slot, rank] = (begun, self.machine.now)
        self.finished[rank].succeed()

    def _span(self, rank: int, start: int, cause: int) -> int:
        record = self.machine.record
        if record is None:
            return -1
        return record.add(Span(rank, self.call.stream, start, self.machine.now, cause, self.visit, self.call))


class _Rank:
    """One rank: its compute stream, its communication streams, its host lane."""

    def __init__(self, machine: Machine, rank: int) -> None:
        self.machine = machine
        self.rank = rank
        self.ended_ns = 0
        self._env = machine.env
        self._host = 0
        self._cause = -1
        self._num_busy = 0
        self._toggled = machine.env.event()
        self._queues = [_Queue(machine.env) for _ in range(machine.tasks.num_streams)]
        self.process = machine.env.process(self._compute_stream())
        for stream in range(1, machine.tasks.num_streams):
            machine.env.process(self._call_stream(self._queues[stream]))

    def toggle(self, change: int) -> None:
        """A late transfer begins or ends."""
        before = self._num_busy > 0
        self._num_busy += change
        if before != (self._num_busy > 0):
            toggled, self._toggled = self._toggled, self._env.event()
            toggled.succeed()

    def _compute_stream(self) -> Process:
        visit = 0
        while (template := self.machine.visit(visit)) is not None:
            self.machine.starts[visit][self.rank] = self.machine.now
            self._host = max(self._host, self.machine.now)
            for action in template.actions:
                if type(action) is Compute:
                    yield from self._compute(action, visit)
                elif type(action) is Post:
                    self._host += action.host_ns
                    not_before = self._host if action.host_ns else 0
                    party = self.machine.party(action.call, visit)
                    self._queues[action.call.stream].put((party, not_before, self._cause, self.machine.now))
                elif type(action) is Wait:
                    yield from self._wait(action, visit)
            visit += 1
        self.ended_ns = self.machine.now
        if self.machine.record is not None:
            self.machine.record.last[self.rank] = self._cause

    def _compute(self, action: Compute, visit: int) -> Process:
        start = self.machine.now
        yield from self._work(action.device_ns[self.rank])
        end, issued = self.machine.now, 0
        if action.host_ns:
            issued = self._host + action.host_ends_ns[self.rank]
            self._host += action.host_ns[self.rank]
            if issued > end:
                yield self._env.timeout(issued - end)
        record = self.machine.record
        if record is None:
            return
        totals = record.totals[visit][self.rank]
        totals.compute += end - start
        self._cause = record.add(Span(self.rank, COMPUTE_STREAM, start, end, self._cause, visit, action))
        if issued > end:
            totals.launching += issued - end
            self._cause = record.add(Span(self.rank, HOST_LANE, end, issued, self._cause, visit, action))

    def _work(self, work_ns: int) -> Process:
        """Kernels, at the speed that the transfers beside them leave."""
        slowdown = self.machine.tasks.slowdown
        if slowdown == 0:
            if work_ns:
                yield self._env.timeout(work_ns)
            return
        rest = work_ns * (PARTS + slowdown)
        while rest > 0:
            rate = PARTS if self._num_busy else PARTS + slowdown
            since = self.machine.now
            yield self._env.any_of((self._env.timeout(-(-rest // rate)), self._toggled))
            rest -= (self.machine.now - since) * rate

    def _wait(self, action: Wait, visit: int) -> Process:
        party = self.machine.find(action.slot, visit - action.lag)
        if party is None:
            return
        now = self.machine.now
        finished = party.finished[self.rank]
        if not finished.processed:
            yield finished
        record = self.machine.record
        done = party.ended[self.rank]
        if record is not None and done > now:
            totals = record.totals[visit][self.rank]
            exposed = done - max(now, party.begun[self.rank])
            totals.exposed += exposed
            totals.waiting += done - now - exposed
            self._cause = party.cause[self.rank]

    def _call_stream(self, queue: _Queue) -> Process:
        free, free_cause = 0, -1
        while True:
            if not queue.items:
                yield queue.filled
            party, not_before, cause, posted = queue.items.popleft()
            if not_before > self.machine.now:
                yield self._env.timeout(not_before - self.machine.now)
            party.arrive(self.rank, cause if posted >= free else free_cause)
            finished = party.finished[self.rank]
            if not finished.processed:
                yield finished
            free, free_cause = party.ended[self.rank], party.cause.get(self.rank, -1)


class _Queue:
    """Calls that a stream has still to come to."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self.items: deque[tuple[_Party, int, int, int]] = deque()
        self.filled = env.event()

    def put(self, item: tuple[_Party, int, int, int]) -> None:
        """Append, and wake the stream."""
        self.items.append(item)
        filled, self.filled = self.filled, self._env.event()
        filled.succeed()
