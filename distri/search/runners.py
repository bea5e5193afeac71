"""The plans that did not win, and why each lost: one of every kind that people ask about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distri.core.codec import Codec
from distri.core.partition import SplitAxis
from distri.core.policy import Policy
from distri.search.breakdown import Breakdown, break_down
from distri.search.find import Search, SearchResult
from distri.search.space import ALL_FRESH, Layout, Serving, Structure


@dataclass(frozen=True)
class Runner:
    """One plan beside the chosen one. `value` is the objective's; `why` says what it loses by."""

    layout: Layout
    serving: Serving
    policy: str
    value: float
    breakdown: Breakdown
    memory_bytes: int
    why: str


class Runners:
    """Finds plans to show beside a result."""

    def __init__(self, search: Search, result: SearchResult) -> None:
        self.search = search
        self.result = result
        best = result.best
        self._layouts = tuple(search.layouts())
        self.best = self.look_at(best.layout, best.serving, best.breakdown)

    def look_at(self, layout: Layout, serving: Serving, known: Breakdown | None = None) -> Runner:
        """One plan with its breakdown: the known one, or that of the longest path, without shared links."""
        search = self.search
        bounder = search.bounder(layout)
        sketch = search.sketcher.sketch(layout, serving)
        found = known or break_down(sketch, bounder.lowering, is_settled=False)
        memory = max(use.total for use in search.memory.uses(layout, serving, bounder))
        policy = search.sketcher.tables.of(serving.structure, serving.codec).name
        policy = policy if layout.patches > 1 else "-"
        value = search.value(layout, found.latency_s * 1e9)
        return Runner(layout, serving, policy, value, found, memory, "")

    def found(self) -> tuple[Runner, ...]:
        """Plans in order of the objective, without the chosen one."""
        seen = {(self.best.layout, self.best.serving)}
        runners = []
        for layout, serving in self._wanted():
            if (layout, serving) in seen:
                continue
            seen.add((layout, serving))
            runner = self.look_at(layout, serving)
            why = self._why(runner)
            runners.append(
                Runner(
                    layout, serving, runner.policy, runner.value, runner.breakdown, runner.memory_bytes, why
                )
            )
        return tuple(sorted(runners, key=lambda runner: (not runner.why.startswith("memory"), runner.value)))

    def one_device(self) -> Runner:
        """The unsplit picture on one device."""
        layout = Layout(1, 1, SplitAxis.ROWS, (1, 1), None, self.search.ranks[:1])
        return self.look_at(layout, self.plain)

    def best_on(self, count: int) -> Runner | None:
        """The best plan of the chosen one's kind on so many devices; None if there is none that fits."""
        serving = self.result.best.serving if self.result.best.layout.patches > 1 else self.plain
        group = [layout for layout in self._layouts if layout.num_ranks == count]
        if not group:
            return None
        layout = min(group, key=lambda x: (self._guess(x, serving), x.complexity))
        runner = self.look_at(layout, self._fitting(layout, serving))
        uses = self.search.memory.uses(layout, runner.serving, self.search.bounder(layout))
        return runner if all(self.search.memory.fits(use) for use in uses) else None

    def _wanted(self) -> Iterator[tuple[Layout, Serving]]:
        """The same plan otherwise cut; with the branches the other way; all fresh; on fewer devices; on one."""
        best = self.result.best
        layouts = [layout for layout in self._layouts if layout.units is None]
        count = len(self.search.ranks)
        serving = best.serving if best.layout.patches > 1 else self.plain
        groups = [
            [x for x in layouts if x.num_ranks == best.layout.num_ranks and x.cfg == best.layout.cfg
             and x.axis != best.layout.axis],
            [x for x in layouts if x.num_ranks == count],
            [x for x in layouts if x.num_ranks == count and x.cfg != best.layout.cfg],
            [x for x in layouts if x.num_ranks == max(2, count // 2)],
            [x for x in layouts if x.num_ranks == 2],
            [x for x in layouts if x.num_ranks == 1],
        ]  # fmt: skip
        if best.layout.patches > 1 and best.serving.structure != ALL_FRESH:
            yield best.layout, Serving(ALL_FRESH, serving.warmup_steps)
        for group in groups:
            if group:
                layout = min(group, key=lambda x: (self._guess(x, serving), x.complexity))
                yield layout, self._fitting(layout, serving)

    @property
    def plain(self) -> Serving:
        """What displaced patches are served with unless something else is better."""
        steps = self.search.request.image.num_inference_steps
        structure = Structure(Policy.STALE, Policy.CORRECTED, Policy.STALE)
        return Serving(structure, min(self.search.request.limits.warmup_steps[0], steps))

    def _fitting(self, layout: Layout, serving: Serving) -> Serving:
        if layout.patches > 1:
            return serving
        return Serving(serving.structure, serving.warmup_steps, codec=Codec.NONE)

    def _guess(self, layout: Layout, serving: Serving) -> float:
        ns = self.search.bounder(layout).bound_ns(layout, self._fitting(layout, serving), has_traffic=False)
        return self.search.value(layout, ns)

    def _why(self, runner: Runner) -> str:
        """What a plan loses by, from where its time goes against the chosen one's."""
        search, best = self.search, self.best
        limit = search.memory.limit_bytes
        uses = search.memory.uses(runner.layout, runner.serving, search.bounder(runner.layout))
        excess = max(use.total - search.memory.limit_of(use) for use in uses)
        if excess > 0:
            bound = "--memory-limit" if limit is not None else "the device"
            return f"memory: {excess / 1e9:.2f} GB more than {bound} has"
        if runner.value < best.value:
            return "no slower without shared links; less plain"
        lost = runner.breakdown.latency_s - best.breakdown.latency_s
        if lost <= 0:
            return f"{runner.layout.num_ranks} devices busy for {runner.breakdown.latency_s:.2f} s each"
        if lost < 0.005 * best.breakdown.latency_s:
            return "as fast to half a percent; less plain"
        return _reason(runner, best, lost)


def _reason(runner: Runner, best: Runner, lost: float) -> str:
    waits = runner.breakdown.exposed_s - best.breakdown.exposed_s
    warm = runner.breakdown.warmup_s - best.breakdown.warmup_s
    kernels = runner.breakdown.compute_s - best.breakdown.compute_s
    fewer = runner.layout.num_ranks < best.layout.num_ranks
    if waits >= max(kernels, 0.5 * lost):
        return f"exposed communication: {waits:.2f} s more waiting"
    if warm >= 0.7 * lost and runner.serving.warmup_steps > best.serving.warmup_steps:
        return f"warm-up: {warm:.2f} s more in the first steps"
    if fewer:
        return f"fewer devices: {kernels:.2f} s more of kernels on each"
    return f"poor utilisation: smaller patches, yet {kernels:.2f} s more of kernels"
