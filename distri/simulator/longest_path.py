"""Tier 2: the longest path through the task list, with no contention. Thousands of plans a second.

The times of a rank's next step are maxima of sums of the times of the step before (a max-plus recursion; Baccelli et
al., Synchronization and Linearity, chapter 2): one pass over each template, all ranks at once, in integers. What makes
it more than max-plus is `stretched`: kernels that run beside a transfer take longer.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from operator import add

from distri.simulator.periodic import StepWalk
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
    Wait,
)

Interval = tuple[int, int]


@dataclass(frozen=True)
class Run:
    """What a simulation of a task list found."""

    total_ns: int
    walk: StepWalk
    record: Record | None


def longest_path_ns(
    tasks: TaskList, is_periodic: bool = True, known: dict[StepTemplate, int] | None = None
) -> int:
    """Nanoseconds of the whole run without contention.

    `known` keeps what closed templates took, for the next run that has them.
    """
    return _Evaluation(tasks, is_periodic, False, known).run().total_ns


def run_longest_path(tasks: TaskList, is_periodic: bool = True, is_recorded: bool = False) -> Run:
    """The whole run without contention; with a record of every span if asked for."""
    return _Evaluation(tasks, is_periodic, is_recorded, None).run()


def stretched(start: int, work: int, busy: list[Interval], slowdown: int) -> int:
    """When `work` nanoseconds of kernels end that start at `start`, beside transfers under way in `busy`, in order.

    >>> stretched(0, 100, [(50, 60)], 1000)
    105
    """
    alone = PARTS + slowdown
    rest, now = work * alone, start
    for begin, end in busy:
        if end <= now:
            continue
        if begin > now:
            if rest <= (begin - now) * alone:
                break
            rest -= (begin - now) * alone
            now = begin
        if rest <= (end - now) * PARTS:
            return now - -rest // PARTS
        rest -= (end - now) * PARTS
        now = end
    return now - -rest // alone


class _Evaluation:
    """One pass over a run. `clock`: where each rank's compute stream is; `free`: from when on its other streams are."""

    def __init__(
        self, tasks: TaskList, is_periodic: bool, is_recorded: bool, known: dict[StepTemplate, int] | None
    ) -> None:
        n = tasks.num_ranks
        self.tasks = tasks
        self.clock = [0] * n
        self.host = [0] * n
        self.free = [[0] * n for _ in range(tasks.num_streams)]
        self.done: dict[tuple[int, int], list[int]] = {}
        """By (slot, visit): when each rank's part ended."""
        self.begun: dict[tuple[int, int], list[int]] = {}
        self.busy: list[list[Interval]] = [[] for _ in range(n)]
        self.events: list[list[int]] = []
        self.visit = -1
        self.known = known
        self.is_clean = True
        self.record = Record() if is_recorded else None
        self.walk = StepWalk(tasks, self._signature, is_periodic)
        self.clock_cause = [-1] * n
        self.free_cause = [[-1] * n for _ in range(tasks.num_streams)]
        self.done_cause: dict[tuple[int, int], list[int]] = {}

    def run(self) -> Run:
        while (visit := self.walk.next(max(self.clock))) is not None:
            self.visit += 1
            self.events.append(list(self.clock))
            self.host = list(map(max, self.host, self.clock))
            if self.record is not None:
                self.record.totals.append([RankTotals() for _ in self.clock])
            template = self.tasks.templates[visit.template]
            begin = self.clock[0]
            if self.is_clean and self.known is not None and template in self.known:
                self.clock = [begin + self.known[template]] * self.tasks.num_ranks
                continue
            for action in template.actions:
                if type(action) is Compute:
                    self._compute(action)
                elif type(action) is Post:
                    self._post(action)
                elif type(action) is Wait:
                    self._wait(action)
            if self.is_clean and template.is_closed and self.known is not None:
                self.known[template] = max(self.clock) - begin
            self.is_clean = template.is_closed
        if self.record is not None:
            self.record.last = list(self.clock_cause)
        return Run(max(self.clock) + self.walk.skipped_ns, self.walk, self.record)

    def _signature(self, place: int) -> Hashable:
        base = self.walk.starts_ns[place]
        return tuple(time - base for time in self.events[place])

    def _compute(self, action: Compute) -> None:
        if action.host_ns or self.record is not None or any(self.busy):
            self._compute_beside(action)
        else:
            self.clock = list(map(add, self.clock, action.device_ns))

    def _compute_beside(self, action: Compute) -> None:
        slowdown = self.tasks.slowdown
        for rank, work in enumerate(action.device_ns):
            start = self.clock[rank]
            busy = self.busy[rank]
            while busy and busy[0][1] <= start:
                busy.pop(0)
            end = stretched(start, work, busy, slowdown) if busy else start + work
            issued = end
            if action.host_ns:
                issued = self.host[rank] + action.host_ends_ns[rank]
                self.host[rank] += action.host_ns[rank]
            if self.record is not None:
                self._record_compute(action, rank, start, end, issued)
            self.clock[rank] = max(end, issued)

    def _record_compute(self, action: Compute, rank: int, start: int, end: int, issued: int) -> None:
        assert self.record is not None
        totals = self.record.totals[self.visit][rank]
        totals.compute += end - start
        cause = self.clock_cause[rank]
        place = self.record.add(Span(rank, COMPUTE_STREAM, start, end, cause, self.visit, action))
        if issued > end:
            totals.launching += issued - end
            place = self.record.add(Span(rank, HOST_LANE, end, issued, place, self.visit, action))
        self.clock_cause[rank] = place

    def _post(self, action: Post) -> None:
        call = action.call
        free = self.free[call.stream]
        ready = list(map(max, self.clock, free))
        if action.host_ns:
            for rank in call.ranks:
                self.host[rank] += action.host_ns
                ready[rank] = max(ready[rank], self.host[rank])
        begun, ends = list(ready), list(ready)
        causes = self._ready_causes(call) if self.record is not None else []
        self._run_groups(call, ready, begun, ends, causes)
        if call.hops:
            self._run_hops(call, ready, begun, ends, causes)
        self.free[call.stream] = ends
        self.events[self.visit] += [*begun, *ends]
        key = (call.slot, self.visit)
        self.done[key], self.begun[key] = ends, begun
        if call.is_late and self.tasks.slowdown:
            for rank in call.ranks:
                if begun[rank] < ends[rank]:
                    self.busy[rank].append((begun[rank], ends[rank]))

    def _run_groups(
        self, call: Call, ready: list[int], begun: list[int], ends: list[int], causes: list[int]
    ) -> None:
        for group in call.groups:
            start = max([ready[rank] for rank in group.ranks])
            end = start + group.transfer.alone_ns + group.tail_ns
            cause = -1
            if self.record is not None:
                latest = min(rank for rank in group.ranks if ready[rank] == start)
                cause = causes[latest]
            for rank in group.ranks:
                begun[rank] = start
                ends[rank] = end
                if self.record is not None:
                    self._record_call(call, rank, start, end, cause)

    def _run_hops(
        self, call: Call, ready: list[int], begun: list[int], ends: list[int], causes: list[int]
    ) -> None:
        arrivals: list[int] = []
        first: dict[int, int] = {}
        spans: list[int] = []
        for hop in call.hops:
            source, reader, after, transfer = hop
            start = max(ready[source], ready[reader])
            binding = source if ready[source] == start else reader
            cause = causes[binding] if self.record is not None else -1
            if after >= 0 and arrivals[after] > start:
                start = arrivals[after]
                cause = spans[after] if self.record is not None else -1
            end = start + transfer.alone_ns
            arrivals.append(end)
            if self.record is not None:
                spans.append(self.record.add(Span(source, call.stream, start, end, cause, self.visit, call)))
            for rank in (source, reader):
                first[rank] = min(first.get(rank, start), start)
                if end >= ends[rank]:
                    ends[rank] = end
                    if self.record is not None:
                        self._set_call_cause(call, rank, spans[-1])
        for rank, start in first.items():
            begun[rank] = start

    def _ready_causes(self, call: Call) -> list[int]:
        free, n = self.free[call.stream], self.tasks.num_ranks
        return [
            self.clock_cause[rank] if self.clock[rank] >= free[rank] else self.free_cause[call.stream][rank]
            for rank in range(n)
        ]

    def _record_call(self, call: Call, rank: int, start: int, end: int, cause: int) -> None:
        assert self.record is not None
        self._set_call_cause(
            call, rank, self.record.add(Span(rank, call.stream, start, end, cause, self.visit, call))
        )

    def _set_call_cause(self, call: Call, rank: int, place: int) -> None:
        self.free_cause[call.stream][rank] = place
        causes = self.done_cause.setdefault((call.slot, self.visit), list(self.clock_cause))
        causes[rank] = place

    def _wait(self, action: Wait) -> None:
        key = (action.slot, self.visit - action.lag)
        done = self.done.get(key)
        if done is None:
            return
        if self.record is not None:
            self._record_wait(key, done)
        self.clock = list(map(max, self.clock, done))

    def _record_wait(self, key: tuple[int, int], done: list[int]) -> None:
        assert self.record is not None
        for rank, now in enumerate(self.clock):
            if done[rank] > now:
                totals = self.record.totals[self.visit][rank]
                exposed = done[rank] - max(now, min(self.begun[key][rank], done[rank]))
                totals.exposed += exposed
                totals.waiting += done[rank] - now - exposed
                self.clock_cause[rank] = self.done_cause[key][rank]
