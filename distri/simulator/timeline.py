"""Every step of a simulated run, written out: what a trace and a report are drawn from.

The periodic shortcut is off here, so that all steps are there; what was simulated is otherwise the same, and a test
holds that the end falls on the same nanosecond.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from distri.core.graph import LayerGraph
from distri.simulator.costs import to_ns
from distri.simulator.link import LinkNetwork
from distri.simulator.machine import Machine
from distri.simulator.options import SimulationOptions
from distri.simulator.spans import Span
from distri.simulator.tasks import COMPUTE_STREAM, Call, Compute, Post, TaskList, Wait
from distri.simulator.topology import Channel


class Reading(NamedTuple):
    """A value that was read in a later step than it was sent in; source and target are places of spans."""

    source: int
    target: int
    lag: int
    label: str


class Load(NamedTuple):
    """What one channel carried during [start_ns, end_ns)."""

    channel: int
    start_ns: int
    end_ns: int
    bytes_per_s: int


class Idle(NamedTuple):
    """A compute stream that waited."""

    rank: int
    start_ns: int
    end_ns: int
    label: str
    visit: int


@dataclass(frozen=True)
class Timeline:
    """One run. spans: in the order in which their ends became known; starts_ns: of each step, and the end of the last.

    before_ns, after_ns: what lies outside of the steps (text encoders, VAE); all times count from the first step.
    """

    title: str
    tasks: TaskList
    graph: LayerGraph | None
    spans: tuple[Span, ...]
    starts_ns: tuple[int, ...]
    end_ns: int
    channels: tuple[Channel, ...]
    loads: tuple[Load, ...]
    before_ns: int = 0
    after_ns: int = 0

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return self.tasks.num_ranks

    def step_name(self, visit: int) -> str:
        """What a step is called."""
        return f"step {visit} ({self.tasks.template_of(visit).name})"

    def name_of(self, span: Span) -> str:
        """What a span is called."""
        if isinstance(span.work, Call):
            return span.work.label
        if span.stream != COMPUTE_STREAM:
            return "launch"
        if self.graph is None or span.work.first >= span.work.last:
            return f"operations {span.work.first} to {span.work.last}"
        first, last = (self.graph.operations[at] for at in (span.work.first, span.work.last - 1))
        names = [operation.path or operation.kind.value for operation in (first, last)]
        return names[0] if names[0] == names[1] else " to ".join(names)

    @cached_property
    def computing(self) -> dict[tuple[int, int], list[int]]:
        """By (step, rank): the places of its compute spans, one for each compute action, in order."""
        found: dict[tuple[int, int], list[int]] = {}
        for place, span in enumerate(self.spans):
            if span.stream == COMPUTE_STREAM:
                found.setdefault((span.visit, span.rank), []).append(place)
        return found

    @cached_property
    def sending(self) -> dict[tuple[int, int, int], list[int]]:
        """By (step, slot, rank): the places of the spans of a call that this rank sent."""
        found: dict[tuple[int, int, int], list[int]] = {}
        for place, span in enumerate(self.spans):
            if isinstance(span.work, Call):
                found.setdefault((span.visit, span.work.slot, span.rank), []).append(place)
        return found

    def readings(self) -> Iterator[Reading]:
        """From each late send to the kernels that read it; of a collective, from the reader's left neighbour only."""
        for visit in range(len(self.starts_ns) - 1):
            actions = self.tasks.template_of(visit).actions
            for rank in range(self.num_ranks):
                yield from self._readings(visit, rank, actions)

    def _readings(self, visit: int, rank: int, actions: tuple[object, ...]) -> Iterator[Reading]:
        places = iter(self.computing.get((visit, rank), ()))
        awaited: list[Wait] = []
        for action in actions:
            if isinstance(action, Wait) and action.lag:
                awaited.append(action)
            elif isinstance(action, Compute):
                target = next(places, None)
                if target is None:
                    return
                for wait in awaited:
                    for source in self._sources(visit - wait.lag, wait.slot, rank):
                        yield Reading(source, target, wait.lag, wait.label)
                awaited = []

    def _sources(self, visit: int, slot: int, reader: int) -> list[int]:
        call = self._call(visit, slot)
        if call is None:
            return []
        senders = {hop.source for hop in call.hops if hop.reader == reader}
        for group in call.groups:
            if reader in group.ranks:
                senders.add(group.ranks[group.ranks.index(reader) - 1])
        found = []
        for sender in sorted(senders - {reader}):
            places = self.sending.get((visit, slot, sender), ())
            if places:
                found.append(max(places, key=lambda place: (self.spans[place].end_ns, place)))
        return found

    def _call(self, visit: int, slot: int) -> Call | None:
        return self._calls_by_step[self.tasks.steps[visit]].get(slot) if visit >= 0 else None

    @cached_property
    def _calls_by_step(self) -> list[dict[int, Call]]:
        return [{call.slot: call for call in template.calls} for template in self.tasks.templates]

    def idle(self) -> Iterator[Idle]:
        """Where compute streams waited, and for what."""
        for visit in range(len(self.starts_ns) - 1):
            actions = self.tasks.template_of(visit).actions
            for rank in range(self.num_ranks):
                yield from self._idle(visit, rank, actions)

    def _idle(self, visit: int, rank: int, actions: tuple[object, ...]) -> Iterator[Idle]:
        places = self.computing.get((visit, rank), [])
        if not places:
            return
        before = self.computing.get((visit - 1, rank))
        free = self.spans[before[-1]].end_ns if before else self.starts_ns[visit]
        label, at = "the end of the last step", 0
        for action in actions:
            if isinstance(action, Wait):
                label = action.label
            elif isinstance(action, Compute) and at < len(places):
                span = self.spans[places[at]]
                if span.start_ns > free:
                    yield Idle(rank, free, span.start_ns, label, visit)
                free, at = span.end_ns, at + 1
        if visit == len(self.starts_ns) - 2 and self.end_ns > free:
            yield Idle(rank, free, self.end_ns, label, visit)

    @property
    def posted(self) -> Iterator[Call]:
        """Every call of the run, step by step."""
        for template in self.tasks.steps:
            for action in self.tasks.templates[template].actions:
                if isinstance(action, Post):
                    yield action.call


def make_timeline(
    tasks: TaskList,
    channels: tuple[Channel, ...],
    options: SimulationOptions,
    graph: LayerGraph | None = None,
    title: str = "distri",
) -> Timeline:
    """Simulate a task list step by step and keep everything."""
    machine = Machine(tasks, channels, options.has_contention, is_periodic=False, is_recorded=True)
    if machine.network is not None:
        machine.network = LinkNetwork(machine.env, channels, record=True)
    run = machine.run()
    assert run.record is not None
    history = machine.network.load_history if machine.network is not None else []
    return Timeline(
        title,
        tasks,
        graph,
        tuple(run.record.spans),
        tuple(run.walk.starts_ns),
        run.total_ns,
        channels,
        tuple(_loads(history, run.total_ns)),
        to_ns(options.before_s),
        to_ns(options.after_s),
    )


def _loads(history: list[tuple[int, int, int]], end_ns: int) -> Iterator[Load]:
    """Intervals of constant load above zero, by channel and time."""
    by_channel: dict[int, list[tuple[int, int]]] = {}
    for now, channel, load in history:
        changes = by_channel.setdefault(channel, [])
        if changes and changes[-1][0] == now:
            changes.pop()
        changes.append((now, load))
    for channel, changes in sorted(by_channel.items()):
        ends = [*(now for now, _ in changes[1:]), max(end_ns, changes[-1][0])]
        for (start, load), end in zip(changes, ends, strict=True):
            if load and end > start:
                yield Load(channel, start, end, load)
