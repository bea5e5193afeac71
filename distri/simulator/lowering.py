"""From a plan to the list of timed tasks that all tiers share.

The program is that of `distri.core.program.step_program`: compute ranges become kernels with costs, a publish posts its
call at once or with its bucket's last member (so a bucket delays its first byte), an await becomes a wait for exactly
the version that it names. Waits that cannot bind any more (a bucket that was already waited for in this step, a frozen
value of steps ago) are left out, and neighbouring compute ranges are joined.

Steps that have the same program share a template: an SDXL run of fifty steps has about five.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Final

import numpy as np

from distri.core.codec import Codec
from distri.core.graph import LayerGraph
from distri.core.latent import latent_exchange
from distri.core.plan import Exchange, Plan
from distri.core.policy import READS_LATE, ExchangeKind, Phase, Policy, Reach
from distri.core.program import awaited_version, held_buckets, is_published, travels_in_bucket
from distri.core.refresh import PhaseControl
from distri.core.shape import Extent
from distri.core.staleness import version_from
from distri.simulator.calls import CallFactory, is_summed
from distri.simulator.collective import CollectiveModel
from distri.simulator.compute import AnalyticCompute, LaunchMode
from distri.simulator.costs import ComputeFactory, CostTable, Nanoseconds, OperationTimes
from distri.simulator.hardware import Cluster
from distri.simulator.kernels import Layers, Service, Shard, service_of
from distri.simulator.longest_path import longest_path_ns
from distri.simulator.options import CtaPolicy, SimulationOptions
from distri.simulator.steps import Decision, StepBuilder, WaitKind, slot_of
from distri.simulator.tasks import (
    FRESH_STREAM,
    LATE_STREAM,
    PARTS,
    Call,
    StepTemplate,
    TaskList,
)

GATHER_ALL: Final = "gather_all"
"""The plan's pattern that follows the published implementation."""
TEXT_TOKENS: Final = 77


class Lowering:
    """Lowers plans for one graph and cluster; what shards and calls cost is kept between plans."""

    def __init__(
        self,
        graph: LayerGraph,
        cluster: Cluster,
        options: SimulationOptions,
        compute: ComputeFactory = AnalyticCompute,
        collectives: CollectiveModel | None = None,
    ) -> None:
        self.graph = graph
        self.cluster = cluster
        self.options = options
        self.collectives = collectives or CollectiveModel(cluster)
        self._compute = compute
        self._tables: dict[str, CostTable] = {}
        self._factories: dict[object, CallFactory] = {}
        self.templates: dict[object, StepTemplate] = {}
        self.durations: dict[StepTemplate, int] = {}
        """What closed templates took (tier 2)."""

    def table(self, dtype: str) -> CostTable:
        """The costs of operations in one dtype."""
        if dtype not in self._tables:
            self._tables[dtype] = CostTable(
                self.graph, self.cluster, dtype, self.options.launch, self._compute
            )
        return self._tables[dtype]

    def lower(self, plan: Plan) -> TaskList:
        """The tasks of a whole run."""
        return _in_turn([PlanLowering(self, turn).lower() for turn in plan.turns])

    def latency_ns(self, plan: Plan) -> int:
        """Tier 2's answer for a plan, by the quickest way: for searches. The plan's hash and sums are not read."""
        return longest_path_ns(self.lower(plan), known=self.durations)

    def factory(self, plan: Plan) -> CallFactory:
        """What makes a plan's calls."""
        is_reference = plan.pattern == GATHER_ALL
        key = (plan.mesh, plan.partition.patches, plan.batch_per_rank, is_reference, plan.dtype)
        if key not in self._factories:
            branches = tuple(
                tuple(plan.mesh.rank_of(branch, patch) for patch in range(plan.mesh.patch))
                for branch in range(plan.mesh.cfg)
            )
            models = self.table(plan.dtype).models
            copying = [models[device.model] for device in self.cluster.devices]
            self._factories[key] = CallFactory(
                self.collectives, self.options, copying, branches, plan.partition.patches, is_reference
            )
        return self._factories[key]

    @property
    def slowdown(self) -> int:
        """Parts of `PARTS` by which kernels slow down beside a transfer."""
        table = self.cluster.collectives
        share = {
            CtaPolicy.DEFAULT: 1.0,
            CtaPolicy.LIMITED: min(1.0, self.options.num_ctas / max(1.0, table.default_ctas.value)),
            CtaPolicy.COPY_ENGINE: 0.0,
        }[self.options.cta_policy]
        return round(PARTS * table.compute_slowdown.value * share)


def _in_turn(runs: Sequence[TaskList]) -> TaskList:
    """One run whose steps are taken from each of `runs` in turn."""
    if len(runs) == 1:
        return runs[0]
    firsts = list(accumulate((len(run.templates) for run in runs), initial=0))
    steps = tuple(
        firsts[step % len(runs)] + runs[step % len(runs)].steps[step] for step in range(len(runs[0].steps))
    )
    return dataclasses.replace(
        runs[0], templates=tuple(t for run in runs for t in run.templates), steps=steps
    )


def layers_of(plan: Plan) -> Layers:
    """Whose layers a plan runs."""
    if plan.mesh.patch == 1 or not plan.is_attached:
        return Layers.NATIVE
    return Layers.REFERENCE if plan.pattern == GATHER_ALL else Layers.ATTACHED


class PlanLowering:
    """One plan on its way to a task list."""

    def __init__(self, lowering: Lowering, plan: Plan) -> None:
        self.lowering = lowering
        self.plan = plan
        self.num_ranks = plan.mesh.size
        self.layers = layers_of(plan)
        self.has_host = lowering.options.launch is LaunchMode.EAGER
        self.is_reference = plan.pattern == GATHER_ALL
        self.joins_steps = self.is_reference and not self.has_host and plan.mesh.patch > 1
        self.factory = lowering.factory(plan)
        self.phases = phases_of(plan)
        self._servings = tuple(serving_of(exchange) for exchange in plan.exchanges)
        self._rested = {e.reach for e in plan.exchanges if e.reach is not None}
        self._after = self._find_unfilled() if self.is_reference else held_buckets(plan)

    def lower(self) -> TaskList:
        """The tasks of the run."""
        templates: list[StepTemplate] = []
        places: dict[object, int] = {}
        steps = []
        for step in range(self.plan.image.num_inference_steps):
            key = self._place_in_run(step)
            if key not in places:
                template = self._template(step, self.decisions(step))
                places[key] = templates.index(template) if template in templates else len(templates)
                if places[key] == len(templates):
                    templates.append(template)
            steps.append(places[key])
        return TaskList(
            self.num_ranks, tuple(templates), tuple(steps), self.lowering.slowdown, slot_labels=self.labels
        )

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """What the call of each slot is called."""
        labels = [""] * (2 * len(self.lowering.graph) + 4)
        labels[slot_of(latent_exchange(self.plan), None)] = "latent"
        for exchange in self.plan.exchanges:
            labels[slot_of(exchange, None)] = exchange.layer
            if exchange.bucket is not None:
                labels[slot_of(exchange, exchange.bucket)] = f"bucket {exchange.bucket}"
        return tuple(labels)

    def decisions(self, step: int) -> dict[object, Decision]:
        """What a step does, by how exchanges are served. A test holds it to `step_program`."""
        samples = dict(zip(self._servings, self.plan.exchanges, strict=True))
        return {serving: self._decide(exchange, step) for serving, exchange in samples.items()}

    def _place_in_run(self, step: int) -> object:
        """What a step's decisions depend on."""
        warmup, last = self.plan.warmup_steps, self.plan.image.num_inference_steps - 1
        before = self.phases[step - 1] if step else None
        at = (step == 0, step < warmup, step == warmup - 1, step == last)
        return self.phases[step], before, at, self.resting(step) if self._rested else None

    def _decide(self, exchange: Exchange, step: int) -> Decision:
        plan, phase = self.plan, self.phases[step]
        is_late = exchange.policy(phase) is not Policy.FRESH
        published = is_published(plan, exchange, step, phase)
        if (
            self.is_reference and phase is Phase.STEADY
        ):  # its graph of a steady step sends at the last step too
            published = exchange.steady is Policy.FRESH or exchange.steady in READS_LATE
        version = awaited_version(plan, exchange, step, phase)
        wait = WaitKind.NOTHING
        if version == step:
            wait = WaitKind.OWN_STEP
        elif version == step - 1 and not self.joins_steps:
            before = self.phases[version]
            if awaited_version(plan, exchange, version, before) != version:
                alone = travels_in_bucket(plan, exchange, version, before) is None
                wait = WaitKind.LAST_ALONE if alone else WaitKind.LAST_BUCKET
        return Decision(self._service(exchange, phase), published, is_late, wait)

    def _service(self, exchange: Exchange, phase: Phase) -> Service:
        service = service_of(exchange.policy(phase), exchange.codec is not Codec.NONE)
        is_sum = service is Service.FRESH and self.is_reference and is_summed(exchange)
        return Service.SUMMED if is_sum else service

    def runs_text(self, step: int) -> bool:
        """Whether a step projects the text: the first of an image; the reference's graph of warm-up always does."""
        if self.layers is Layers.NATIVE:
            return True
        return step == 0 or (self.is_reference and self.phases[step] is Phase.WARMUP)

    def resting(self, step: int) -> frozenset[Reach]:
        """The reaches whose far contexts are not sent at a step."""
        far = self.plan.mesh.patch
        return frozenset(
            reach for reach in self._rested if version_from(reach, far, step, self.plan.warmup_steps) != step
        )

    def _template(self, step: int, decisions: Mapping[object, Decision]) -> StepTemplate:
        plan = self.plan
        chosen = tuple(decisions[serving] for serving in self._servings)
        resting = self.resting(step)
        ends_image = plan.keeps_latent_on_patch and step == plan.image.num_inference_steps - 1
        has_buckets = any(d.is_late or d.wait is WaitKind.LAST_BUCKET for d in chosen)
        key = (
            plan.mesh, plan.partition.patches, plan.batch_per_rank, plan.dtype, plan.pattern, self.layers, chosen,
            tuple((e.bucket, e.codec, e.reach) for e in plan.exchanges) if has_buckets else (),
            self.runs_text(step), resting, self.phases[step], ends_image,
        )  # fmt: skip
        kept = self.lowering.templates
        if key not in kept:
            builder = StepBuilder(self, chosen, resting, self._prefix_sums(step, chosen), ends_image)
            kept[key] = builder.build("warm-up" if self.phases[step] is Phase.WARMUP else "steady")
        return kept[key]

    def leaves_after(self, bucket: int) -> bool:
        """Whether a bucket is sent only when the step is over."""
        return bucket in self._after

    def _find_unfilled(self) -> frozenset[int]:
        """The bucket that never fills up: the reference sends it at the end."""
        counts: dict[int, int] = {}
        for exchange in self.plan.exchanges:
            if exchange.bucket is not None:
                counts[exchange.bucket] = counts.get(exchange.bucket, 0) + 1
        full = max(counts.values(), default=0)
        last = max(counts, default=-1)
        return frozenset({last} if counts and (counts[last] < full or len(counts) == 1) else ())

    def call(
        self, members: list[Exchange], bucket: int | None, is_late: bool, resting: frozenset[Reach]
    ) -> Call:
        """The call for exchanges that travel together."""
        is_output = members[0].kind is ExchangeKind.OUTPUT
        stream = LATE_STREAM if is_late or (self.is_reference and not is_output) else FRESH_STREAM
        slot = slot_of(members[0], bucket)
        return self.factory.of(slot, self.labels[slot], stream, is_late, members, not is_late, resting)

    def _prefix_sums(
        self, step: int, chosen: tuple[Decision, ...]
    ) -> list[tuple[Nanoseconds, Nanoseconds, OperationTimes]]:
        """By rank: device and host nanoseconds before each operation of a step."""
        places: dict[Service, list[int]] = {}
        for exchange, decision in zip(self.plan.exchanges, chosen, strict=True):
            if exchange.kind is not ExchangeKind.OUTPUT and decision.service is not Service.NONE:
                places.setdefault(decision.service, []).append(exchange.index)
        known: dict[object, tuple[Nanoseconds, Nanoseconds, OperationTimes]] = {}
        sums = []
        for rank in range(self.num_ranks):
            patch = self.plan.mesh.patch_of(rank)
            is_edge = self.is_reference and patch in (0, self.plan.mesh.patch - 1)
            device = self.lowering.cluster.devices[rank].model
            key = (device, self.plan.partition.patches[patch], is_edge)
            if key not in known:
                times = self._times(device, patch, is_edge, places, self.runs_text(step))
                known[key] = (_prefix(times.device_ns), _prefix(times.host_ns), times)
            sums.append(known[key])
        return sums

    def _times(
        self, device: str, patch: int, is_edge: bool, places: Mapping[Service, list[int]], runs_text: bool
    ) -> OperationTimes:
        plan = self.plan
        table = self.lowering.table(plan.dtype)
        whole = Extent(plan.batch_per_rank, TEXT_TOKENS, plan.latent)
        shard = Shard(plan.extent(patch), whole, plan.mesh.patch, is_edge)
        base = table.times(device, shard, self.layers, Service.NONE)
        device_ns, host_ns = base.device_ns.copy(), base.host_ns.copy()
        if self.layers is not Layers.NATIVE:
            for service, indices in places.items():
                served = table.times(device, shard, self.layers, service)
                device_ns[indices] = served.device_ns[indices]
                host_ns[indices] = served.host_ns[indices]
        if not runs_text:
            device_ns[table.text_only] = 0
            host_ns[table.text_only] = 0
        return OperationTimes(device_ns, host_ns)


def phases_of(plan: Plan) -> tuple[Phase, ...]:
    """The phase of each step; of a refresh rule, what does not depend on the picture."""
    control = PhaseControl(plan.warmup_steps, plan.refresh)
    return tuple(control.decide(step, change=0.0) for step in range(plan.image.num_inference_steps))


def serving_of(exchange: Exchange) -> tuple[object, ...]:
    """What exchanges have in common that a step treats alike."""
    is_moments = exchange.kind is ExchangeKind.MOMENTS
    return exchange.warmup, exchange.steady, exchange.codec, exchange.bucket is None, is_moments


def _prefix(times: Nanoseconds) -> Nanoseconds:
    sums: Nanoseconds = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(times)))
    return sums
