"""The plan on the simulated clock: values from another backend, time from the simulator.

Nothing is timed here. Every step moves the clock by what the simulator says it takes; the values, where there are any,
are those of the backend that this one is put around (in process: the definition of what a plan means).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from distri.backends.base import Backend, Span
from distri.core.exchanger import Transport
from distri.core.plan import Exchange, Plan
from distri.simulator.result import SimulationResult


class SimulatedClock:
    """Seconds that a run has taken so far, by the simulator: `now_s` grows with every step that ends."""

    def __init__(self, prediction: SimulationResult) -> None:
        self.prediction = prediction
        self.now_s = 0.0
        self._ends_s: list[float] = []
        total_s = prediction.outside_s
        for _, seconds, count in prediction.steps:
            for _ in range(count):
                total_s += seconds
                self._ends_s.append(total_s)

    @property
    def ends_s(self) -> tuple[float, ...]:
        """When each step ends."""
        return tuple(self._ends_s)

    def end_step(self, step: int) -> None:
        """Called when a step's output has been gathered."""
        self.now_s = self._ends_s[step]

    def begin_image(self) -> None:
        """Called when the next image starts."""
        self.now_s = 0.0


class SimulatedBackend:
    """A backend for values, and a clock that does not depend on how long this machine takes for them."""

    name = "sim"

    def __init__(self, values: Backend, prediction: SimulationResult) -> None:
        self.plan = values.plan
        self.local_ranks = values.local_ranks
        self.clock = SimulatedClock(prediction)
        self._values = values

    def transport(self, rank: int) -> Transport[Any]:
        """The transport of a rank; the first local one drives the clock."""
        inner = self._values.transport(rank)
        return _Clocked(inner, self.clock) if rank == self.local_ranks[0] else inner

    def broadcast(self, value: Any) -> Any:
        """As the backend for values does it."""
        return self._values.broadcast(value)

    def broadcast_like(self, tensor: Any) -> Any:
        """As the backend for values does it."""
        return self._values.broadcast_like(tensor)

    def recorder(self) -> None:
        """There is none: values are computed in process."""

    def traced(self, span: Span) -> AbstractContextManager[object]:
        """As the backend for values does it."""
        return self._values.traced(span)

    def collect(self, text: str) -> list[str] | None:
        """As the backend for values does it."""
        return self._values.collect(text)

    def for_plan(self, plan: Plan) -> Backend:
        """That of the values: what is not in the simulated plan does not move the clock."""
        return self._values.for_plan(plan)

    def abort(self, reason: BaseException) -> None:
        """Wake the ranks that wait."""
        self._values.abort(reason)

    def close(self) -> None:
        """Let go of every value."""
        self._values.close()


class _Clocked:
    """A transport whose gathers move the clock."""

    def __init__(self, values: Transport[Any], clock: SimulatedClock) -> None:
        self._values = values
        self._clock = clock

    def begin_image(self) -> None:
        self._clock.begin_image()
        self._values.begin_image()

    def place(self, exchange: Exchange, version: int, bucket: int | None) -> Any:
        return self._values.place(exchange, version, bucket)

    def send(self, exchange: Exchange, version: int, parts: Sequence[Any], bucket: int | None) -> None:
        self._values.send(exchange, version, parts, bucket)

    def receive(self, exchange: Exchange, version: int, own: Sequence[Any]) -> Sequence[Any]:
        return self._values.receive(exchange, version, own)

    def gather(self, exchange: Exchange, version: int, own: Any) -> Sequence[Any]:
        gathered = self._values.gather(exchange, version, own)
        self._clock.end_step(version)
        return gathered
