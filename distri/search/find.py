"""The search itself: best first, by bounds that grow tighter, until nothing that is left can win.

Every candidate goes through up to five stages, each at least as large as the one before: kernels alone, fresh calls
too, late traffic too (closed forms), the longest path without contention, SimPy with shared links. A heap holds what is
known; whatever is on top is looked at more closely, or, once it has been simulated, is the optimum: all others are
bounded below by more. Groups of candidates stay one entry until they are opened.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from distri.core.graph import LayerGraph
from distri.core.partition import SplitAxis
from distri.core.plan import Plan
from distri.core.policy import Policy
from distri.errors import PlanError
from distri.search import fleet
from distri.search.breakdown import Breakdown, break_down
from distri.search.costs import Bounder, SearchLowering, ShardTimes
from distri.search.memory import MemoryModel
from distri.search.quality import QualityTable, load_quality, risk_of
from distri.search.refusal import Refusals
from distri.search.request import Objective, Risk, SearchRequest
from distri.search.sketch import Sketcher
from distri.search.space import (
    Layout,
    Serving,
    Structure,
    buckets_of,
    codecs_of,
    grids,
    has_idle_cuts,
    structures,
    units_of,
    warmups_of,
)
from distri.search.uneven import Bands, solve
from distri.simulator.compute import AnalyticCompute
from distri.simulator.costs import ComputeFactory, CostTable
from distri.simulator.hardware import Cluster
from distri.simulator.memory import MemoryUse
from distri.simulator.options import SimulationOptions

Progress: TypeAlias = Callable[[int, int], None]
_NS = 1e9
FEWEST_UNITS = 12


@dataclass(frozen=True)
class Counts:
    """What happened to the candidates: considered = bounded away + excluded (memory) + evaluated."""

    considered: int
    evaluated: int
    simulated: int
    excluded: int

    @property
    def bounded_away(self) -> int:
        """Candidates that a closed form showed to lose."""
        return self.considered - self.evaluated - self.excluded


@dataclass(frozen=True)
class Finalist:
    """A candidate that was evaluated. latency_ns: by SimPy if there is a breakdown, else by the longest path."""

    layout: Layout
    serving: Serving
    value: float
    latency_ns: int
    breakdown: Breakdown | None
    memory: tuple[MemoryUse, ...]


@dataclass(frozen=True)
class SearchResult:
    """The chosen candidate, those that were evaluated beside it, and a certificate.

    gap: the share by which any other candidate of the space could be better, at most.
    """

    best: Finalist
    others: tuple[Finalist, ...]
    too_large: tuple[Finalist, ...]
    counts: Counts
    gap: float
    bands: dict[Layout, Bands]


@dataclass(frozen=True)
class _Entry:
    """A candidate or a group of them: what is not decided yet is None."""

    layout: Layout
    structure: Structure | None = None
    warmup_steps: int = 0
    serving: Serving | None = None
    stage: int = 0


class Search:
    """One search: a graph, a cluster, a request."""

    def __init__(
        self,
        graph: LayerGraph,
        cluster: Cluster,
        request: SearchRequest,
        quality: QualityTable | None = None,
        compute: ComputeFactory = AnalyticCompute,
        options: SimulationOptions | None = None,
    ) -> None:
        self.graph = graph
        self.request = request
        self.cluster = fleet.degraded(cluster, dict(request.speeds))
        self.ranks = fleet.usable(self.cluster, request.num_devices, request.down)
        self.quality = quality or load_quality()
        self.options = options or SimulationOptions()
        self.sketcher = Sketcher(graph, request.image, request.dtype)
        self.bands: dict[Layout, Bands] = {}
        self._compute = compute
        self._tables: dict[str, CostTable] = {}
        self._bounders: dict[tuple[str, ...], Bounder] = {}
        base = self.lowering(self.ranks)
        self.times = ShardTimes(self.sketcher, base.table(request.dtype))
        self.memory = MemoryModel(self.sketcher, self.cluster, request.memory_limit_bytes)
        self._speeds: dict[str, float] = {}
        self._structures = tuple(structures(self.max_risk, request.limits, self.sketcher.tables))

    @property
    def max_risk(self) -> Risk:
        """A quality budget takes the place of the order of risks."""
        return Risk.LOCAL if self.request.min_psnr_db is not None else self.request.max_risk

    def lowering(self, order: tuple[int, ...]) -> SearchLowering:
        """What lowers plans for the devices in an order; those in the cluster's own order share one."""
        arranged = fleet.arranged(self.cluster, order)
        key = tuple(device.node for device in arranged.devices)
        if key not in self._bounders:
            made = SearchLowering(self.graph, arranged, self.options, self._compute)
            made.shared = self._tables
            times = getattr(self, "times", None) or ShardTimes(self.sketcher, made.table(self.request.dtype))
            self._bounders[key] = Bounder(self.sketcher, made, times)
        found = self._bounders[key].lowering
        assert isinstance(found, SearchLowering)
        return found

    def bounder(self, layout: Layout) -> Bounder:
        """What bounds candidates of a layout."""
        self.lowering(layout.devices)
        arranged = fleet.arranged(self.cluster, layout.devices)
        return self._bounders[tuple(device.node for device in arranged.devices)]

    def layouts(self) -> Iterator[Layout]:
        """All layouts, in a fixed order.

        Among equal devices, those are left out whose largest patch is no smaller than with one cut fewer: they wait
        for that patch as long, and send more.
        """
        request = self.request
        models = {self.cluster.devices[rank].model for rank in self.ranks}
        is_uniform = len(models) == 1 and not request.is_exact
        rows, cols = units_of(request.image, self.graph)
        for cfg in (1, 2) if request.image.guidance else (1,):
            for patches in range(1, len(self.ranks) // cfg + 1):
                if request.is_exact and cfg * patches != len(self.ranks):
                    continue
                for order in fleet.orders(self.cluster, self.ranks, cfg * patches, cfg, self.speed):
                    for axis, grid in grids(patches, rows, cols, request.limits.axes):
                        if is_uniform and has_idle_cuts(grid, (rows, cols)):
                            continue
                        even = Layout(cfg, patches, axis, grid, None, order)
                        yield even
                        if request.limits.has_uneven_bands and axis is not SplitAxis.GRID:
                            yield from self._uneven(even, rows if axis is SplitAxis.ROWS else cols)

    def speed(self, model: str) -> float:
        """Whole pictures a second of a device model, for comparison."""
        if model not in self._speeds:
            layout = Layout(1, 1, SplitAxis.ROWS, (1, 1), None, (0,))
            draft = self.sketcher.sketch(layout, Serving(self._structures[0], 1))
            self._speeds[model] = 1e9 / self.times.of(model, draft, 0).base_ns
        return self._speeds[model]

    def _uneven(self, even: Layout, num_units: int) -> Iterator[Layout]:
        """The solved bands, where they can differ from even ones: devices differ, or units do not divide."""
        models = {self.cluster.devices[rank].model for rank in even.devices}
        is_coarse = num_units < FEWEST_UNITS * even.patches  # one unit more costs more than a border saves
        if even.patches < 2 or (len(models) == 1 and (even.patches < 3 or is_coarse)):
            return
        solved = self.solve_bands(even, num_units)
        if max(solved.units) - min(solved.units) <= 1 and len(models) == 1:
            return
        layout = Layout(even.cfg, even.patches, even.axis, even.grid, solved.units, even.devices)
        self.bands[layout] = solved
        yield layout

    def solve_bands(self, even: Layout, num_units: int) -> Bands:
        """The best bands for a layout's devices, by the kernels of a steady step and the halos of a fresh one."""
        structure = Structure(Policy.STALE, Policy.CORRECTED, Policy.STALE)
        bounder = self.bounder(even)
        halos = bounder.halo_ns(even)

        def cost_of(place: int) -> Callable[[int], int]:
            ranks = [branch * even.patches + place for branch in range(even.cfg)]
            models = sorted({bounder.lowering.cluster.devices[rank].model for rank in ranks})
            edge = halos[place]

            def cost(units: int) -> int:
                shard = self._band_of(even, place, units, num_units)
                return edge + max(self.band_ns(model, shard, structure) for model in models)

            return cost

        return solve([cost_of(place) for place in range(even.patches)], num_units)

    def _band_of(self, even: Layout, place: int, units: int, num_units: int) -> Plan:
        """A plan of two patches whose first is so many units: a band's size is all that counts."""
        rest = max(1, num_units - units)
        two = Layout(even.cfg, 2, even.axis, (2, 1) if even.axis is SplitAxis.ROWS else (1, 2),
                     (units, rest), even.devices[: 2 * even.cfg])  # fmt: skip
        if units >= num_units:
            two = Layout(even.cfg, 2, even.axis, two.grid, (num_units - 1, 1), two.devices)
        return self.bounder(even).draft(two)

    def band_ns(self, model: str, plan: Plan, structure: Structure) -> int:
        """Kernels of a steady step of the first patch of a plan."""
        time = self.times.of(model, plan, 0)
        return time.step_ns(self.times.services(structure), is_first=False)

    def value(self, layout: Layout, latency_ns: float) -> float:
        """What the objective makes of a latency; it grows with it."""
        request = self.request
        seconds = latency_ns / _NS
        match request.objective:
            case Objective.LATENCY if request.num_images == 1:
                return seconds
            case Objective.LATENCY | Objective.THROUGHPUT:
                replicas = fleet.num_replicas(self.cluster, self.ranks, layout.devices)
                if request.num_images == 1:
                    return seconds / replicas
                return seconds * -(-request.num_images // replicas)
            case Objective.DEVICE_SECONDS:
                return seconds * layout.num_ranks
        return seconds * layout.num_ranks * (request.price_per_hour or 0.0) / 3600

    def score(self, layout: Layout, structure: Structure | None, value: float) -> float:
        """The value, a little worse for what is less plain: equal plans are told apart by it."""
        tolerance = self.request.limits.tolerance
        if tolerance == 0:
            return value
        axes = {SplitAxis.ROWS: 0.0, SplitAxis.COLS: 0.2, SplitAxis.GRID: 0.5}
        doubt = axes[layout.axis] + 0.3 * layout.num_ranks / len(self.ranks)
        doubt += 0.1 if layout.units is not None else 0.0
        if structure is not None and structure.deep:
            doubt += 0.1
        return value * (1 + tolerance * doubt)

    def admits(self, layout: Layout, structure: Structure, serving: Serving) -> bool:
        """Whether the quality budget allows a candidate."""
        request = self.request
        if request.min_psnr_db is None or layout.patches == 1:
            return True
        table = self.sketcher.tables.of(structure, serving.codec)
        if risk_of(table) is Risk.FRESH:
            return True
        found = self.quality.psnr_db(
            self.sketcher.tables.measured_name(structure, serving.codec), layout.patches,
            serving.warmup_steps, request.image.num_inference_steps,
        )  # fmt: skip
        return found is not None and found >= request.min_psnr_db

    def run(self, progress: Progress | None = None) -> SearchResult:
        """Search.

        Raises:
            PlanError: nothing is possible; the sentence names what binds and the nearest request that is.
        """
        return _Run(self, progress).run()


class _Run:
    """The heap and the books of one search."""

    def __init__(self, search: Search, progress: Progress | None) -> None:
        self.search = search
        self.progress = progress
        self.heap: list[tuple[float, int, int, tuple[int, int, int], int, _Entry]] = []
        self._numbers = itertools.count()
        self.considered = self.evaluated = self.simulated = self.excluded = 0
        self.settled: list[Finalist] = []
        self.estimated: list[Finalist] = []
        self.too_large: list[Finalist] = []
        self.latencies: dict[_Entry, tuple[int, tuple[MemoryUse, ...]]] = {}
        self.servings: dict[tuple[Structure, int], tuple[Serving, ...]] = {}
        self.best_score = float("inf")

    def run(self) -> SearchResult:
        search = self.search
        limits = search.request.limits
        for layout in search.layouts():
            self._open_layout(layout)
        if self.considered == 0:
            raise PlanError(Refusals(search).nothing())
        bound = float("inf")
        while self.heap:
            score, *_, entry = heapq.heappop(self.heap)
            if score >= self.best_score * (1 - limits.slack) or len(self.settled) >= limits.max_settled:
                bound = score
                break
            self._advance(entry)
            if self.progress is not None:
                self.progress(self.considered - len(self.heap), self.considered)
        if not self.settled:
            raise PlanError(Refusals(search).nothing_fits(self.too_large))
        return self._result(bound)

    def _result(self, bound: float) -> SearchResult:
        best = min(self.settled, key=self._score)
        done = {(f.layout, f.serving): f for f in [*self.estimated, *self.settled]}
        rest = sorted((f for f in done.values() if f is not best), key=lambda f: f.value)
        counts = Counts(self.considered, self.evaluated, self.simulated, self.excluded)
        gap = max(0.0, 1 - bound / self._score(best))
        return SearchResult(best, tuple(rest), tuple(self.too_large), counts, gap, self.search.bands)

    def _score(self, finalist: Finalist) -> float:
        return self.search.score(finalist.layout, finalist.serving.structure, finalist.value)

    def _push(self, value: float, entry: _Entry, risk: int = 0) -> None:
        score = self.search.score(entry.layout, entry.structure, value)
        item = (score, -entry.stage, risk, entry.layout.complexity, next(self._numbers), entry)
        heapq.heappush(self.heap, item)

    def _servings(self, layout: Layout, structure: Structure) -> tuple[Serving, ...]:
        """The servings of a structure that the quality budget allows."""
        key = (structure, layout.patches)
        if key not in self.servings:
            self.servings[key] = tuple(self._list_servings(layout, structure))
        return self.servings[key]

    def _list_servings(self, layout: Layout, structure: Structure) -> Iterator[Serving]:
        search = self.search
        limits, steps = search.request.limits, search.request.image.num_inference_steps
        if layout.patches == 1:
            yield Serving(structure, min(limits.warmup_steps[0], steps))
            return
        for warmup in warmups_of(structure, limits, steps):
            for codec in codecs_of(structure, search.max_risk):
                for bucket in reversed(buckets_of(structure, limits)):
                    serving = Serving(structure, warmup, bucket, codec)
                    if search.admits(layout, structure, serving):
                        yield serving

    def _open_layout(self, layout: Layout) -> None:
        search = self.search
        found = search._structures[:1] if layout.patches == 1 else search._structures
        bounder = search.bounder(layout)
        best = float("inf")
        count = 0
        for structure in found:
            servings = self._servings(layout, structure)
            if servings:
                count += len(servings)
                fewest = min(serving.warmup_steps for serving in servings)
                most = max(serving.warmup_steps for serving in servings)
                ns = min(bounder.compute_ns(layout, structure, warmup) for warmup in {fewest, most})
                best = min(best, search.value(layout, ns))
        self.considered += count
        if count:
            self._push(best, _Entry(layout))

    def _unfit(self, layout: Layout, structure: Structure) -> Finalist:
        serving = next(iter(self._servings(layout, structure)), Serving(structure, 1))
        memory = self.search.memory.uses(layout, serving, self.search.bounder(layout))
        return Finalist(layout, serving, float("inf"), 0, None, memory)

    def _advance(self, entry: _Entry) -> None:
        if entry.structure is None:
            self._open(entry)
        elif entry.serving is None:
            self._open_structure(entry)
        elif entry.stage == 1:
            self._tighten(entry)
        elif entry.stage == 2:
            self._evaluate(entry)
        else:
            self._settle(entry)

    def _open(self, entry: _Entry) -> None:
        """A layout: its structures and warm-ups, by kernels and fresh calls."""
        search = self.search
        bounder = search.bounder(entry.layout)
        found = search._structures[:1] if entry.layout.patches == 1 else search._structures
        if not search.memory.may_fit(entry.layout, bounder):
            self.excluded += sum(len(self._servings(entry.layout, structure)) for structure in found)
            self.too_large.append(self._unfit(entry.layout, found[0]))
            return
        for structure in found:
            for warmup in dict.fromkeys(s.warmup_steps for s in self._servings(entry.layout, structure)):
                ns = bounder.bound_ns(entry.layout, Serving(structure, warmup), has_traffic=False)
                risk = risk_of(
                    search.sketcher.tables.of(structure, codecs_of(structure, Risk.FRESH)[0])
                ).order
                self._push(search.value(entry.layout, ns), _Entry(entry.layout, structure, warmup), risk)

    def _open_structure(self, entry: _Entry) -> None:
        """A structure and a warm-up: its buckets and wire formats."""
        assert entry.structure is not None
        search = self.search
        ns = search.bounder(entry.layout).bound_ns(
            entry.layout, Serving(entry.structure, entry.warmup_steps), has_traffic=False
        )
        for serving in self._servings(entry.layout, entry.structure):
            if serving.warmup_steps == entry.warmup_steps:
                opened = _Entry(entry.layout, entry.structure, entry.warmup_steps, serving, 1)
                risk = risk_of(search.sketcher.tables.of(entry.structure, serving.codec)).order
                self._push(search.value(entry.layout, ns), opened, risk)

    def _tighten(self, entry: _Entry) -> None:
        """A candidate: late traffic too."""
        assert entry.serving is not None
        search = self.search
        ns = search.bounder(entry.layout).bound_ns(entry.layout, entry.serving, has_traffic=True)
        tighter = _Entry(entry.layout, entry.structure, entry.warmup_steps, entry.serving, 2)
        self._push(search.value(entry.layout, ns), tighter)

    def _evaluate(self, entry: _Entry) -> None:
        """A candidate: memory, then the longest path."""
        assert entry.serving is not None
        search = self.search
        bounder = search.bounder(entry.layout)
        memory = search.memory.uses(entry.layout, entry.serving, bounder)
        if not all(search.memory.fits(use) for use in memory):
            self.excluded += 1
            self.too_large.append(Finalist(entry.layout, entry.serving, float("inf"), 0, None, memory))
            return
        self.evaluated += 1
        ns = bounder.lowering.latency_ns(search.sketcher.sketch(entry.layout, entry.serving))
        deeper = _Entry(entry.layout, entry.structure, entry.warmup_steps, entry.serving, 3)
        self.latencies[deeper] = (ns, memory)
        self._push(search.value(entry.layout, ns) * (1 - search.request.limits.slack), deeper)
        self.estimated.append(
            Finalist(entry.layout, entry.serving, search.value(entry.layout, ns), ns, None, memory)
        )

    def _settle(self, entry: _Entry) -> None:
        """A finalist: SimPy, with shared links."""
        assert entry.serving is not None
        search = self.search
        ns, memory = self.latencies.pop(entry)
        self.simulated += 1
        lowering = search.bounder(entry.layout).lowering
        found = break_down(search.sketcher.sketch(entry.layout, entry.serving), lowering, is_settled=True)
        ns = max(ns, round(found.latency_s * _NS))
        done = Finalist(entry.layout, entry.serving, search.value(entry.layout, ns), ns, found, memory)
        self.settled.append(done)
        self.best_score = min(self.best_score, self._score(done))
