"""Steps that repeat are simulated until they do, and counted from there.

Two rules, both exact. *Closed* steps (nothing under way when they end, all ranks end together) depend on nothing but
their template: the second of a kind takes what the first took. Otherwise a step depends on the events of the step
before it, and on what that one still had under way from its predecessor: when three steps of one template have shown
the same events, relative to their starts, the state at the ends of the last two is the same, and all further steps of
that template are the last one, shifted. (A displaced run in a static order is a timed event graph: periodic after a
few steps; Baccelli et al., Synchronization and Linearity, section 3.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from distri.simulator.tasks import TaskList

_ALIKE = 3


@dataclass(frozen=True)
class Visit:
    """A step that is to be simulated; `repeats` of its kind follow it and are not, each `period_ns` long."""

    step: int
    template: int


@dataclass
class Skip:
    """`count` steps that repeat simulated visit `visit`, each `period_ns` long."""

    visit: int
    count: int
    period_ns: int


class StepWalk:
    """Which step comes next. `start(k, now)` must be told when the k-th simulated step starts.

    `signature(k)` is asked for the events of the k-th simulated step relative to its start, once step k + 1 is over.
    """

    def __init__(
        self, tasks: TaskList, signature: Callable[[int], Hashable], is_periodic: bool = True
    ) -> None:
        self.visits: list[Visit] = []
        self.skips: list[Skip] = []
        self.starts_ns: list[int] = []
        self._tasks = tasks
        self._signature = signature
        self._signatures: dict[int, Hashable] = {}
        self._is_periodic = is_periodic
        self._step = 0

    def next(self, now_ns: int) -> Visit | None:
        """The next step to simulate, which starts now; None when the run is over. Called once a step."""
        self.starts_ns.append(now_ns)
        if self._is_periodic and self.visits:
            self._skip(now_ns)
        if self._step == len(self._tasks.steps):
            return None
        visit = Visit(self._step, self._tasks.steps[self._step])
        self._step += 1
        self.visits.append(visit)
        return visit

    @property
    def skipped_ns(self) -> int:
        """Time of all the steps that were not simulated."""
        return sum(skip.count * skip.period_ns for skip in self.skips)

    def repeats(self) -> list[int]:
        """How many steps each simulated step stands for."""
        counts = [1] * len(self.visits)
        for skip in self.skips:
            counts[skip.visit] += skip.count
        return counts

    def _skip(self, now_ns: int) -> None:
        last = self.visits[-1].template
        alike = 0
        while self._step + alike < len(self._tasks.steps) and self._tasks.steps[self._step + alike] == last:
            alike += 1
        if alike and (self._is_clean(len(self.visits) - 1) or self._is_settled(last)):
            place = len(self.visits) - 1
            self.skips.append(Skip(place, alike, now_ns - self.starts_ns[place]))
            self._step += alike

    def _is_clean(self, place: int) -> bool:
        """Whether a closed step started from rest."""
        templates = self._tasks.templates
        before = place == 0 or templates[self.visits[place - 1].template].is_closed
        return before and templates[self.visits[place].template].is_closed

    def _is_settled(self, template: int) -> bool:
        """Whether the last three steps whose events are complete (all but the newest) are alike."""
        places = range(len(self.visits) - 1 - _ALIKE, len(self.visits))
        if places[0] < 0 or any(self.visits[place].template != template for place in places):
            return False
        shown = []
        for place in places[:-1]:
            if place not in self._signatures:
                self._signatures[place] = self._signature(place)
            shown.append(self._signatures[place])
        lengths = {self.starts_ns[place + 1] - self.starts_ns[place] for place in places}
        return len(lengths) == 1 and all(one == shown[0] for one in shown)
