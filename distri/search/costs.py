"""What candidates cost before they are simulated: compute times by shard, and lower bounds that grow tighter.

A graph of 1827 operations has about a hundred different ones; times are measured for one of each and copied. Three
bounds, each a sum of what no schedule avoids on one rank, over the whole run:

    compute   kernels, with what the served exchanges add to them
    waiting   + every fresh call, which the compute stream must wait for, and the gather of each step's output
    traffic   + what kernels lose beside late transfers: of C seconds of them, at most those hide where the stream idles

With k = slowdown / (1 + slowdown), kernels W, fresh calls F and late transfers C, a rank that idles for I >= F
seconds overlaps at least C - I of them with kernels, so its time is at least W + k C + (1 - k) F, and at least C.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from distri.core.codec import Codec
from distri.core.graph import LayerGraph, Operation, OperationKind
from distri.core.plan import Exchange, Plan
from distri.core.policy import READS_LATE, ExchangeKind, Policy
from distri.core.shape import Extent
from distri.search.sketch import Sketcher, is_output
from distri.search.space import ALL_FRESH, ALL_LOCAL, Layout, Serving, Structure, block_of
from distri.simulator.compute import AnalyticCompute
from distri.simulator.costs import CostTable, OperationTimes
from distri.simulator.kernels import Layers, Service, Shard, service_of
from distri.simulator.lowering import TEXT_TOKENS, Lowering, layers_of
from distri.simulator.tasks import FRESH_STREAM, LATE_STREAM, PARTS, Call

_KINDS: Final = (ExchangeKind.HALO, ExchangeKind.MOMENTS, ExchangeKind.CONTEXT)
Group = tuple[ExchangeKind, bool]


class ClassedCostTable(CostTable):
    """A cost table that measures one operation of each class; answers are the same."""

    _classes: dict[int, tuple[tuple[Operation, ...], np.ndarray]]

    def _measure(
        self, operations: tuple[Operation, ...], device: str, shard: Shard, layers: Layers, service: Service
    ) -> OperationTimes:
        if not hasattr(self, "_classes"):
            self._classes = {}
        key = len(operations)
        if key not in self._classes:
            self._classes[key] = _classified(self.graph, operations)
        representatives, place = self._classes[key]
        found = super()._measure(representatives, device, shard, layers, service)
        return OperationTimes(found.device_ns[place], found.host_ns[place])


def _classified(
    graph: LayerGraph, operations: tuple[Operation, ...]
) -> tuple[tuple[Operation, ...], np.ndarray]:
    joined: dict[int, int] = {}
    for operation in graph:
        if operation.kind is OperationKind.SELF_ATTENTION and len(operation.parents) == 3:
            joined |= {operation.parents[1]: 2, operation.parents[2]: 3}
    places: dict[object, int] = {}
    representatives: list[Operation] = []
    index = []
    for op in operations:
        made = tuple(graph.operations[parent].output for parent in op.parents)
        key = (
            op.kind, op.function, op.inputs, op.output, op.geometry, op.groups, op.weight_elements, made,
            joined.get(op.index, 1), op.exchange,
        )  # fmt: skip
        if key not in places:
            places[key] = len(representatives)
            representatives.append(op)
        index.append(places[key])
    return tuple(representatives), np.array(index, dtype=np.int64)


class SearchLowering(Lowering):
    """A lowering whose cost tables may be shared by several arrangements of the same devices."""

    shared: dict[str, CostTable] | None = None

    def table(self, dtype: str) -> CostTable:
        """The costs of operations in one dtype, one operation of each class."""
        tables = self._tables if self.shared is None else self.shared
        if dtype not in tables:
            tables[dtype] = ClassedCostTable(
                self.graph, self.cluster, dtype, self.options.launch, self._compute
            )
        return tables[dtype]


class ShardTime:
    """Kernels of one rank's forward pass: all of them, the text's part, and what serving each group adds."""

    def __init__(self, base_ns: int, text_ns: int, served: Callable[[Service], dict[Group, int]]) -> None:
        self.base_ns = base_ns
        self.text_ns = text_ns
        self._served = served
        self._added: dict[Service, dict[Group, int]] = {}

    def step_ns(self, services: dict[Group, Service], is_first: bool) -> int:
        """One step."""
        total = self.base_ns - (0 if is_first else self.text_ns)
        for group, service in services.items():
            if service is not Service.NONE:
                if service not in self._added:
                    self._added[service] = self._served(service)
                total += self._added[service][group]
        return total


class ShardTimes:
    """Kernel times of shards on devices, by area: bands and blocks of the same sizes cost the same."""

    def __init__(self, sketcher: Sketcher, table: CostTable) -> None:
        self.sketcher = sketcher
        self.table = table
        self._known: dict[object, ShardTime] = {}
        graph = sketcher.graph
        deep = set(sketcher.tables.deep_blocks)
        groups: dict[Group, list[int]] = {(kind, is_deep): [] for kind in _KINDS for is_deep in (False, True)}
        for operation in graph.exchanging:
            assert operation.exchange is not None
            groups[operation.exchange, block_of(operation.path) in deep].append(operation.index)
        self.groups = {group: np.array(found, dtype=np.int64) for group, found in groups.items()}
        self._is_analytic = all(isinstance(model, AnalyticCompute) for model in table.models.values())

    def services(self, structure: Structure, codec: Codec = Codec.NONE) -> dict[Group, Service]:
        """How each group of layers is served in the steady phase."""
        is_coded = codec is not Codec.NONE
        return {
            group: service_of(structure.policy(*group), is_coded and group[0] is not ExchangeKind.MOMENTS)
            for group in self.groups
        }

    def of(self, device: str, plan: Plan, place: int) -> ShardTime:
        """The kernels of a place of a plan on a device."""
        own = plan.extent(place)
        layers = layers_of(plan)
        rect = own.rect
        sizes = (rect.rows.size, rect.cols.size)
        area = tuple(rect.at_level(2**level).area for level in range(7)) if self._is_analytic else sizes
        key = (device, own.batch, area, layers, plan.mesh.patch > 1)
        if key not in self._known:
            self._known[key] = self._measure(device, plan, own, layers)
        return self._known[key]

    def _measure(self, device: str, plan: Plan, own: Extent, layers: Layers) -> ShardTime:
        whole = Extent(plan.batch_per_rank, TEXT_TOKENS, plan.latent)
        shard = Shard(own, whole, plan.mesh.patch)
        base = self.table.times(device, shard, layers, Service.NONE).device_ns

        def served(service: Service) -> dict[Group, int]:
            added = self.table.times(device, shard, layers, service).device_ns - base
            return {group: int(added[places].sum()) for group, places in self.groups.items()}

        is_native = layers is Layers.NATIVE
        text = 0 if is_native else int(base[self.table.text_only].sum())
        return ShardTime(int(base.sum()), text, served)


def steady_bound_ns(kernels: int, fresh: int, late: int, slowdown: int) -> int:
    """Nanoseconds that a rank's steady steps take at least; see the top of this file.

    >>> steady_bound_ns(1000, 100, 600, 1000)
    1350
    """
    hidden = max(0, late - fresh) * slowdown // (PARTS + slowdown)
    return max(kernels + fresh + hidden, late)


class Bounder:
    """Lower bounds of candidates on one arrangement of devices."""

    def __init__(self, sketcher: Sketcher, lowering: Lowering, times: ShardTimes) -> None:
        self.sketcher = sketcher
        self.lowering = lowering
        self.times = times
        self._drafts: dict[Layout, Plan] = {}
        self._fresh_of: dict[Layout, dict[Group | None, tuple[int, ...]]] = {}
        self._late_of: dict[tuple[Layout, Serving], tuple[int, ...]] = {}
        self._kernels_of: dict[object, tuple[tuple[int, int, int], ...]] = {}
        self._shards_of: dict[object, tuple[ShardTime, ...]] = {}

    def draft(self, layout: Layout) -> Plan:
        """Any plan with this layout."""
        if layout not in self._drafts:
            self._drafts[layout] = self.sketcher.sketch(layout, Serving(ALL_FRESH, 1))
        return self._drafts[layout]

    def compute_ns(self, layout: Layout, structure: Structure, warmup_steps: int) -> int:
        """Kernels alone: the busiest rank of every step."""
        steps = self.sketcher.image.num_inference_steps
        count = min(warmup_steps, steps)
        found = self._kernels(layout, structure)
        return max(
            first + (count - 1) * warm + (steps - count) * steady for first, warm, steady in set(found)
        )

    def bound_ns(self, layout: Layout, serving: Serving, has_traffic: bool) -> int:
        """Kernels and fresh calls; with `has_traffic`, what late transfers cost too."""
        steps = self.sketcher.image.num_inference_steps
        num_warm = min(serving.warmup_steps, steps)
        num_steady = steps - num_warm
        is_local = serving.structure == ALL_LOCAL
        in_warmup = self._fresh(layout, ALL_LOCAL if is_local else ALL_FRESH)
        in_steady = self._fresh(layout, serving.structure)
        late = self._late(layout, serving) if has_traffic else (0,) * layout.num_ranks
        kernels = self._kernels(layout, serving.structure, serving.codec)
        slowdown = self.lowering.slowdown
        found = 0
        for item in set(zip(kernels, in_warmup, in_steady, late, strict=True)):
            (first, warm, steady), warm_calls, steady_calls, late_ns = item
            before = first + (num_warm - 1) * warm + num_warm * warm_calls
            in_all = (num_steady * steady, num_steady * steady_calls, max(0, num_steady - 1) * late_ns)
            found = max(found, before + steady_bound_ns(*in_all, slowdown))
        return found

    def halo_ns(self, layout: Layout) -> tuple[int, ...]:
        """By place: the halos of one fresh step. Border bands have one neighbour, inner ones two."""
        draft = self.draft(layout)
        total = [0] * layout.num_ranks
        for exchange in draft.exchanges:
            if exchange.kind is ExchangeKind.HALO:
                call = self.lowering.factory(draft).of(0, "", FRESH_STREAM, False, [exchange], True)
                for hop in call.hops:
                    total[hop.reader] += hop.transfer.alone_ns
        return tuple(total[: layout.patches])

    def _kernels(
        self, layout: Layout, structure: Structure, codec: Codec = Codec.NONE
    ) -> tuple[tuple[int, int, int], ...]:
        """By rank: kernels of the first step, of any other of the warm-up, of a steady one."""
        key = (layout, structure, codec)
        if key not in self._kernels_of:
            warm = ALL_LOCAL if structure == ALL_LOCAL else ALL_FRESH
            in_warmup, in_steady = self.times.services(warm), self.times.services(structure, codec)
            if layout.patches == 1 or structure == ALL_LOCAL:
                in_warmup = in_steady = {}
            known: dict[int, tuple[int, int, int]] = {}
            for time in self._shards(layout, structure == ALL_LOCAL):
                if id(time) not in known:
                    known[id(time)] = (
                        time.step_ns(in_warmup, is_first=True), time.step_ns(in_warmup, is_first=False),
                        time.step_ns(in_steady, is_first=False),
                    )  # fmt: skip
            shards = self._shards(layout, structure == ALL_LOCAL)
            self._kernels_of[key] = tuple(known[id(time)] for time in shards)
        return self._kernels_of[key]

    def _shards(self, layout: Layout, is_local: bool) -> tuple[ShardTime, ...]:
        """By rank: its kernels."""
        key = (layout, is_local)
        if key not in self._shards_of:
            plan = self.draft(layout)
            if is_local and layout.patches > 1:
                plan = self.sketcher.sketch(layout, Serving(ALL_LOCAL, 1))
            devices = self.lowering.cluster.devices
            self._shards_of[key] = tuple(
                self.times.of(devices[rank].model, plan, plan.mesh.patch_of(rank))
                for rank in range(layout.num_ranks)
            )
        return self._shards_of[key]

    def _fresh(self, layout: Layout, structure: Structure) -> tuple[int, ...]:
        """By rank: the fresh calls of one step and the gather of its output."""
        if layout.num_ranks == 1:
            return (0,)
        if layout not in self._fresh_of:
            self._fresh_of[layout] = self._fresh_by_group(layout)
        total = [0] * layout.num_ranks
        for group, times in self._fresh_of[layout].items():
            if group is None or structure.policy(*group) is Policy.FRESH:
                total = [a + b for a, b in zip(total, times, strict=True)]
        return tuple(total)

    def _fresh_by_group(self, layout: Layout) -> dict[Group | None, tuple[int, ...]]:
        """By group of layers, None for the output, and by rank: all calls if the group is fresh."""
        draft = self.draft(layout)
        deep = self.sketcher.tables.deep_blocks
        calls: Counter[Any] = Counter()
        samples: dict[Any, Exchange] = {}
        for e in draft.exchanges:
            group = None if is_output(e) else (e.kind, block_of(e.layer) in deep)
            key = (group, e.shape, e.level, e.geometry)
            calls[key] += 1
            samples.setdefault(key, e)
        factory = self.lowering.factory(draft)
        found: dict[Group | None, tuple[int, ...]] = {None: (0,) * layout.num_ranks}
        for key, count in calls.items():
            call = factory.of(0, "", FRESH_STREAM, False, [samples[key]], True)
            times = least_ns(call, layout.num_ranks)
            before = found.get(key[0], (0,) * layout.num_ranks)
            found[key[0]] = tuple(a + count * b for a, b in zip(before, times, strict=True))
        return found

    def _late(self, layout: Layout, serving: Serving) -> tuple[int, ...]:
        """By rank: the late transfers of one step, which do not depend on how long the warm-up is."""
        key = (layout, serving.steady)
        if key not in self._late_of:
            self._late_of[key] = self._late_transfers(*key)
        return self._late_of[key]

    def _late_transfers(self, layout: Layout, serving: Serving) -> tuple[int, ...]:
        sketch = self.sketcher.sketch(layout, serving)
        together: dict[int, list[Exchange]] = {}
        for exchange in sketch.exchanges:
            if exchange.bucket is not None and exchange.steady in READS_LATE:
                together.setdefault(exchange.bucket, []).append(exchange)
        total = [0] * layout.num_ranks
        factory = self.lowering.factory(sketch)
        for members in together.values():
            resting = frozenset(e.reach for e in members if e.reach is not None)
            call = factory.of(0, "", LATE_STREAM, True, members, False, resting)
            for rank, time in enumerate(least_ns(call, layout.num_ranks)):
                total[rank] += time
        return tuple(total)


def least_ns(call: Call, num_ranks: int) -> tuple[int, ...]:
    """By rank: the longest transfer of a call that it takes part in."""
    least = [0] * num_ranks
    for group in call.groups:
        for rank in group.ranks:
            least[rank] = max(least[rank], group.transfer.alone_ns + group.tail_ns)
    for hop in call.hops:
        for rank in (hop.source, hop.reader):
            least[rank] = max(least[rank], hop.transfer.alone_ns)
    return tuple(least)
