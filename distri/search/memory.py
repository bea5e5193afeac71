"""What candidates need in memory: the simulator's own figures, kept by shape, against the device and the limit."""

from __future__ import annotations

from distri.core.plan import DTYPE_BYTES, Plan
from distri.search.costs import Bounder
from distri.search.sketch import Sketcher
from distri.search.space import Layout, Serving
from distri.simulator.hardware import Cluster
from distri.simulator.lowering import layers_of
from distri.simulator.memory import MemoryUse, buffer_bytes, peak_activations, stale_bytes


class MemoryModel:
    """Memory of candidates on one cluster; `limit_bytes` is a limit below the devices' own size."""

    def __init__(self, sketcher: Sketcher, cluster: Cluster, limit_bytes: int | None) -> None:
        self._sketcher = sketcher
        self._cluster = cluster
        self.limit_bytes = limit_bytes
        self._peaks: dict[object, tuple[int, str]] = {}
        self._known: dict[object, tuple[MemoryUse, ...]] = {}

    def limit_of(self, use: MemoryUse) -> int:
        """Bytes that a rank may use."""
        return use.limit if self.limit_bytes is None else min(use.limit, self.limit_bytes)

    def fits(self, use: MemoryUse) -> bool:
        """Whether a rank keeps the limit."""
        return use.total <= self.limit_of(use)

    def may_fit(self, layout: Layout, bounder: Bounder) -> bool:
        """Whether all but the stale values fits: no serving needs less."""
        plan = bounder.draft(layout)
        largest = max(range(layout.patches), key=lambda patch: plan.partition.patches[patch].area)
        if all(self.fits(use) for use in self._uses(plan, bounder, has_stale=False, only=largest)):
            return True  # no other patch needs more
        return all(self.fits(use) for use in self._uses(plan, bounder, has_stale=False))

    def uses(self, layout: Layout, serving: Serving, bounder: Bounder) -> tuple[MemoryUse, ...]:
        """Each rank's memory; how long the warm-up is does not matter to it."""
        key = (layout, serving.steady)
        if key not in self._known:
            plan = self._sketcher.with_bytes(self._sketcher.sketch(*key))
            self._known[key] = self._uses(plan, bounder, has_stale=True)
        return self._known[key]

    def _uses(
        self, plan: Plan, bounder: Bounder, has_stale: bool, only: int | None = None
    ) -> tuple[MemoryUse, ...]:
        """Each rank's memory; with `only`, as if each had that patch."""
        graph, cluster = self._sketcher.graph, bounder.lowering.cluster
        weights = graph.weight_elements * DTYPE_BYTES[plan.dtype]
        communication = buffer_bytes(self._cluster, plan.mesh.size)
        uses = []
        by_patch: dict[int, tuple[int, str, int]] = {}
        for rank in range(plan.mesh.size):
            patch = plan.mesh.patch_of(rank) if only is None else only
            if patch not in by_patch:
                stale = stale_bytes(plan, graph, patch) if has_stale else 0
                by_patch[patch] = (*self._peak(plan, patch), stale)
            activations, layer, stale = by_patch[patch]
            uses.append(MemoryUse.on(cluster, rank, weights, activations, stale, communication, layer))
        return tuple(uses)

    def _peak(self, plan: Plan, patch: int) -> tuple[int, str]:
        own = plan.extent(patch)
        sizes = tuple(own.rect.at_level(2**level).area for level in range(7))
        key = (own.batch, sizes, layers_of(plan))
        if key not in self._peaks:
            self._peaks[key] = peak_activations(plan, self._sketcher.graph, own)
        return self._peaks[key]
