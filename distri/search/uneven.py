"""Bands solved, not sampled: the split of units over places that makes the slowest place as fast as can be.

Each place i has a cost c_i(u), its time for u units of rows, that does not fall as u grows. For a time T, place i can
take u_i(T) = the most units with c_i(u) <= T; T is feasible exactly if every place can take one unit and together they
can take all. Feasibility is monotone in T, so bisection finds the least feasible T, to the nanosecond: T - 1 is shown
to be infeasible, which is the certificate that no split is faster. (The argument is that of parametric search for
min-max allocation with monotone costs; Megiddo 1979, Ibaraki and Katoh 1988, chapter 5.)

NCCL's all-gather takes equal parts, so uneven ones are padded to the largest; `gather_costs` holds that against
messages of the true sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distri.simulator.collective import CollectiveModel
from distri.simulator.hardware import Collective

Cost = Callable[[int], int]


@dataclass(frozen=True)
class Bands:
    """A solved split. step_ns: the slowest place's time; bound_ns: no split is faster; even_ns: what even bands take.

    ideal_ns: what bands of any real size would take, work in proportion to speed.
    """

    units: tuple[int, ...]
    step_ns: int
    bound_ns: int
    even_ns: int
    ideal_ns: int

    @property
    def gap(self) -> float:
        """How far the split is from its certificate, as a share; 0 where the bisection ended."""
        return self.step_ns / self.bound_ns - 1

    @property
    def share_of_ideal(self) -> float:
        """Speed of this split against the ideal one."""
        return self.ideal_ns / self.step_ns

    @property
    def even_share_of_ideal(self) -> float:
        """Speed of even bands against the ideal ones."""
        return self.ideal_ns / self.even_ns


def solve(costs: Sequence[Cost], num_units: int) -> Bands:
    """The best split of `num_units` over `len(costs)` places, at least one unit each.

    >>> solve([lambda u: 10 * u, lambda u: 20 * u], 6).units
    (4, 2)
    """
    places = [_Place(cost, num_units) for cost in costs]
    assert 0 < len(places) <= num_units, "fewer units than places"
    even = _even(num_units, len(places))
    even_ns = max(place.cost(units) for place, units in zip(places, even, strict=True))
    low, high = max(place.cost(1) for place in places), even_ns
    while low < high:
        middle = (low + high) // 2
        if sum(place.most(middle) for place in places) >= num_units:
            high = middle
        else:
            low = middle + 1
    units = _trimmed(places, [place.most(low) for place in places], num_units)
    step_ns = max(place.cost(count) for place, count in zip(places, units, strict=True))
    return Bands(tuple(units), step_ns, min(low, step_ns), even_ns, _ideal_ns(places, num_units, low))


def _even(num_units: int, parts: int) -> list[int]:
    return [num_units // parts + (1 if place < num_units % parts else 0) for place in range(parts)]


class _Place:
    """One place's cost, remembered, and made monotone by what was seen."""

    def __init__(self, cost: Cost, num_units: int) -> None:
        self._cost = cost
        self._known: dict[int, int] = {}
        self._num_units = num_units

    def cost(self, units: int) -> int:
        if units not in self._known:
            self._known[units] = self._cost(units)
        return self._known[units]

    def most(self, time_ns: int) -> int:
        """The most units within a time; 0 if not even one."""
        low, high = 0, self._num_units
        while low < high:
            middle = (low + high + 1) // 2
            if self.cost(middle) <= time_ns:
                low = middle
            else:
                high = middle - 1
        return low

    def real(self, time_ns: float) -> float:
        """As `most`, for parts of units: linear between whole ones, and below the first."""
        whole = self.most(int(time_ns))
        if whole >= self._num_units:
            return float(self._num_units)
        above = self.cost(whole + 1)
        below = self.cost(whole) if whole else max(0, 2 * self.cost(1) - self.cost(2))
        return whole + max(0.0, min(1.0, (time_ns - below) / max(1, above - below)))


def _trimmed(places: Sequence[_Place], units: list[int], num_units: int) -> list[int]:
    """Take units away where that saves most, until they add up."""
    while sum(units) > num_units:
        movable = [place for place, count in enumerate(units) if count > 1]
        units[max(movable, key=lambda place: (places[place].cost(units[place]), place))] -= 1
    return units


def _ideal_ns(places: Sequence[_Place], num_units: int, high_ns: int) -> int:
    low, high = 0.0, float(high_ns)
    for _ in range(40):
        middle = (low + high) / 2
        if sum(place.real(middle) for place in places) >= num_units:
            high = middle
        else:
            low = middle
    return max(1, round(high))


@dataclass(frozen=True)
class GatherCosts:
    """Seconds of gathering uneven parts: padded to the largest in one all-gather, or as messages of true size."""

    padded_s: float
    messages_s: float

    @property
    def best(self) -> str:
        """The cheaper way, by name."""
        return "padding" if self.padded_s <= self.messages_s else "send/recv"


def gather_costs(model: CollectiveModel, ranks: Sequence[int], part_bytes: Sequence[int]) -> GatherCosts:
    """Both ways of gathering parts of different sizes among `ranks`.

    Messages go round the ring one after the other at a rank: it sends its own part to each of the others.
    """
    padded = model.cost(Collective.ALL_GATHER, max(part_bytes) * len(ranks), tuple(ranks)).alone_s
    slowest = 0.0
    for place, rank in enumerate(ranks):
        others = [other for other in range(len(ranks)) if other != place]
        costs = [
            model.cost(Collective.POINT_TO_POINT, part_bytes[other], (ranks[other], rank)) for other in others
        ]
        start = max((cost.fixed_s for cost in costs), default=0.0)
        slowest = max(slowest, start + sum(cost.alone_s - cost.fixed_s for cost in costs))
    return GatherCosts(padded, slowest)
