"""From a plan to the list of timed tasks that all tiers share.

The program is `distri.core.program.step_program`, instruction by instruction: compute ranges become kernels with
costs, a publish posts its call at once or with its bucket's last member (so a bucket delays its first byte), an await
becomes a wait for exactly the version that it names. Waits that cannot bind any more (a bucket that was already waited
for in this step, a frozen value of steps ago) are left out, and neighbouring compute ranges are joined.

Steps that have the same program share a template: an SDXL run of fifty steps has about five.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from distri.core.codec import Codec
from distri.core.graph import LayerGraph
from distri.core.plan import Exchange, Plan
from distri.core.policy import READS_LATE, ExchangeKind, Phase, Policy
from distri.core.program import (
    Instruction,
    InstructionKind,
    awaited_version,
    is_published,
    step_program,
    travels_in_bucket,
)
from distri.core.shape import Extent
from distri.core.staleness import phase_of
from distri.simulator.calls import CallFactory, is_summed
from distri.simulator.collective import CollectiveModel
from distri.simulator.compute import AnalyticCompute, LaunchMode
from distri.simulator.costs import ComputeFactory, CostTable, Nanoseconds, OperationTimes, to_ns
from distri.simulator.hardware import Cluster
from distri.simulator.kernels import Layers, Service, Shard
from distri.simulator.options import CtaPolicy, SimulationOptions
from distri.simulator.tasks import (
    FRESH_STREAM,
    LATE_STREAM,
    PARTS,
    Action,
    Call,
    Compute,
    Post,
    StepTemplate,
    TaskList,
    Wait,
)

GATHER_ALL: Final = "gather_all"
"""The plan's pattern that follows the published implementation."""
TEXT_TOKENS: Final = 77


@dataclass(frozen=True)
class StepKey:
    """What a step's program depends on. Steps with equal keys share a template."""

    phase: Phase
    is_first: bool
    is_last: bool
    previous: Phase | None
    next_phase: Phase | None


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
        self._calls: dict[object, tuple[Call, ...]] = {}

    def table(self, dtype: str) -> CostTable:
        """The costs of operations in one dtype."""
        if dtype not in self._tables:
            self._tables[dtype] = CostTable(
                self.graph, self.cluster, dtype, self.options.launch, self._compute
            )
        return self._tables[dtype]

    def lower(self, plan: Plan) -> TaskList:
        """The tasks of a whole run."""
        return PlanLowering(self, plan).lower()

    def factory(self, plan: Plan) -> CallFactory:
        """What makes a plan's calls."""
        is_reference = plan.pattern == GATHER_ALL
        key = (plan.mesh, plan.partition.patches, is_reference, plan.dtype)
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


def layers_of(plan: Plan) -> Layers:
    """Whose layers a plan runs."""
    if plan.mesh.patch == 1 or not plan.is_attached:
        return Layers.NATIVE
    return Layers.REFERENCE if plan.pattern == GATHER_ALL else Layers.ATTACHED


_SERVICES: Final[Mapping[Policy, Service]] = {
    Policy.FRESH: Service.FRESH,
    Policy.STALE: Service.LATE,
    Policy.CORRECTED: Service.LATE,
    Policy.SHIFTED: Service.LATE,
    Policy.EXTRAPOLATED: Service.AHEAD,
    Policy.FROZEN: Service.KEPT,
    Policy.LOCAL: Service.NONE,
}
_CODED: Final[Mapping[Service, Service]] = {Service.LATE: Service.CODED, Service.AHEAD: Service.CODED_AHEAD}


class PlanLowering:
    """One plan on its way to a task list."""

    def __init__(self, lowering: Lowering, plan: Plan) -> None:
        self.lowering = lowering
        self.plan = plan
        self.num_ranks = plan.mesh.size
        self.layers = layers_of(plan)
        self._is_reference = plan.pattern == GATHER_ALL
        self._factory = lowering.factory(plan)
        self.has_host = lowering.options.launch is LaunchMode.EAGER
        self.joins_steps = self._is_reference and not self.has_host and plan.mesh.patch > 1
        self._slots: dict[tuple[str, int], int] = {}
        self.labels: list[str] = []
        self._unfilled = self._find_unfilled() if self._is_reference else frozenset()

    def lower(self) -> TaskList:
        """The tasks of the run."""
        templates: list[StepTemplate] = []
        places: dict[StepKey, int] = {}
        by_program: dict[object, int] = {}
        steps = []
        for step in range(self.plan.image.num_inference_steps):
            key = self._key(step)
            if key not in places:
                program = step_program(self.plan, step)
                relative = tuple(
                    (i.kind, i.first, i.last, i.exchange, step - i.version if i.version >= 0 else 0)
                    for i in program
                )
                services = tuple(self._service(exchange, key.phase) for exchange in self.plan.exchanges)
                reads_late = any(i.kind is InstructionKind.AWAIT and i.version < step for i in program)
                alike = (relative, services, self._runs_text(step), key.previous if reads_late else None)
                if alike not in by_program:
                    by_program[alike] = len(templates)
                    templates.append(self._template(step, program))
                places[key] = by_program[alike]
            steps.append(places[key])
        return TaskList(
            self.num_ranks,
            tuple(templates),
            tuple(steps),
            self.lowering.slowdown,
            slot_labels=tuple(self.labels),
        )

    def _key(self, step: int) -> StepKey:
        plan = self.plan
        last = plan.image.num_inference_steps - 1

        def phase(at: int) -> Phase | None:
            return phase_of(at, plan.warmup_steps) if 0 <= at <= last else None

        here = phase_of(step, plan.warmup_steps)
        is_first = step == 0
        previous = phase(step - 1) if here is Phase.STEADY else None
        is_last = step == last and not self._is_reference
        return StepKey(here, is_first, is_last, previous, None if is_last else phase(step + 1))

    def _template(self, step: int, program: tuple[Instruction, ...]) -> StepTemplate:
        builder = _StepBuilder(self, step, self._prefix_sums(step))
        plan = self.plan
        for instruction in program:
            exchange = plan.exchanges[instruction.exchange]
            match instruction.kind:
                case InstructionKind.COMPUTE:
                    builder.compute_until(instruction.last)
                case InstructionKind.PUBLISH:
                    builder.publish(exchange)
                case InstructionKind.AWAIT:
                    builder.wait(exchange, instruction.version)
                case InstructionKind.GATHER:
                    builder.gather(exchange)
        if self.joins_steps:
            builder.join()
        return builder.build(self._name(step))

    def _name(self, step: int) -> str:
        phase = phase_of(step, self.plan.warmup_steps)
        return "warm-up" if phase is Phase.WARMUP else "steady"

    def publishes(self, exchange: Exchange, step: int) -> bool:
        """Whether a step sends a value; the reference's graph of a steady step sends at the last step too."""
        if self._is_reference and phase_of(step, self.plan.warmup_steps) is Phase.STEADY:
            return exchange.steady is Policy.FRESH or exchange.steady in READS_LATE
        return is_published(self.plan, exchange, step)

    def members(self, step: int) -> dict[int, list[Exchange]]:
        """The exchanges that each bucket of a step carries."""
        found: dict[int, list[Exchange]] = {}
        for exchange in self.plan.exchanges:
            bucket = travels_in_bucket(self.plan, exchange, step)
            if bucket is not None and self.publishes(exchange, step):
                found.setdefault(bucket, []).append(exchange)
        return found

    def is_unfilled(self, bucket: int) -> bool:
        """Whether the reference sends a bucket only when the step is over, because it never fills up."""
        return bucket in self._unfilled

    def _find_unfilled(self) -> frozenset[int]:
        counts: dict[int, int] = {}
        for exchange in self.plan.exchanges:
            if exchange.bucket is not None:
                counts[exchange.bucket] = counts.get(exchange.bucket, 0) + 1
        full = max(counts.values(), default=0)
        last = max(counts, default=-1)
        return frozenset({last} if counts and (counts[last] < full or len(counts) == 1) else ())

    def slot(self, exchange: Exchange, bucket: int | None) -> int:
        """The slot of the call that carries an exchange: its bucket's, or its own."""
        key, label = (("alone", exchange.index), exchange.layer)
        if bucket is not None:
            key, label = ("bucket", bucket), f"bucket {bucket}"
        if key not in self._slots:
            self._slots[key] = len(self.labels)
            self.labels.append(label)
        return self._slots[key]

    def call(self, members: list[Exchange], bucket: int | None, is_late: bool) -> Call:
        """The call for exchanges that travel together."""
        is_output = members[0].kind is ExchangeKind.OUTPUT
        stream = LATE_STREAM if is_late or (self._is_reference and not is_output) else FRESH_STREAM
        slot = self.slot(members[0], bucket)
        return self._factory.of(slot, self.labels[slot], stream, is_late, members, is_blocking=not is_late)

    def _prefix_sums(self, step: int) -> list[tuple[Nanoseconds, Nanoseconds, OperationTimes]]:
        """By rank: device and host nanoseconds before each operation of a step."""
        phase = phase_of(step, self.plan.warmup_steps)
        known: dict[object, tuple[Nanoseconds, Nanoseconds, OperationTimes]] = {}
        sums = []
        for rank in range(self.num_ranks):
            patch = self.plan.mesh.patch_of(rank)
            is_edge = self._is_reference and patch in (0, self.plan.mesh.patch - 1)
            device = self.lowering.cluster.devices[rank].model
            key = (device, self.plan.partition.patches[patch], is_edge)
            if key not in known:
                times = self._times(device, patch, is_edge, phase, step)
                known[key] = (_prefix(times.device_ns), _prefix(times.host_ns), times)
            sums.append(known[key])
        return sums

    def _times(self, device: str, patch: int, is_edge: bool, phase: Phase, step: int) -> OperationTimes:
        plan = self.plan
        table = self.lowering.table(plan.dtype)
        whole = Extent(plan.batch_per_rank, TEXT_TOKENS, plan.latent)
        shard = Shard(plan.extent(patch), whole, plan.mesh.patch, is_edge)
        base = table.times(device, shard, self.layers, Service.NONE)
        device_ns, host_ns = base.device_ns.copy(), base.host_ns.copy()
        if self.layers is not Layers.NATIVE:
            for service, places in self._places_by_service(phase).items():
                served = table.times(device, shard, self.layers, service)
                device_ns[places] = served.device_ns[places]
                host_ns[places] = served.host_ns[places]
            if not self._runs_text(step):
                device_ns[table.text_only] = 0
                host_ns[table.text_only] = 0
        return OperationTimes(device_ns, host_ns)

    def _runs_text(self, step: int) -> bool:
        """Whether a step projects the text: the first of an image; the reference's graph of warm-up always does."""
        if self.layers is Layers.NATIVE:
            return True
        return step == 0 or (self._is_reference and phase_of(step, self.plan.warmup_steps) is Phase.WARMUP)

    def _service(self, exchange: Exchange, phase: Phase) -> Service:
        service = _SERVICES[exchange.policy(phase)]
        if service is Service.FRESH and self._is_reference and is_summed(exchange):
            return Service.SUMMED
        return service if exchange.codec is Codec.NONE else _CODED.get(service, service)

    def _places_by_service(self, phase: Phase) -> dict[Service, list[int]]:
        places: dict[Service, list[int]] = {}
        for exchange in self.plan.exchanges:
            service = self._service(exchange, phase)
            if exchange.kind is not ExchangeKind.OUTPUT and service is not Service.NONE:
                places.setdefault(service, []).append(exchange.index)
        return places


class _StepBuilder:
    """Collects the actions of one step."""

    def __init__(
        self, lowering: PlanLowering, step: int, sums: list[tuple[Nanoseconds, Nanoseconds, OperationTimes]]
    ) -> None:
        self._lowering = lowering
        self._plan = lowering.plan
        self._step = step
        self._sums = sums
        self._actions: list[Action] = []
        self._done = 0
        self._reached = 0
        self._members = lowering.members(step)
        self._missing = {bucket: len(members) for bucket, members in self._members.items()}
        self._posted: set[int] = set()
        self._waited: set[tuple[int, int]] = set()

    def compute_until(self, last: int) -> None:
        self._reached = last

    def publish(self, exchange: Exchange) -> None:
        bucket = travels_in_bucket(self._plan, exchange, self._step)
        if bucket is None:
            self._post([exchange], None, awaited_version(self._plan, exchange, self._step) != self._step)
            return
        self._missing[bucket] -= 1
        if self._missing[bucket] == 0 and not self._lowering.is_unfilled(bucket):
            self._post(self._members[bucket], bucket, is_late=True)

    def wait(self, exchange: Exchange, version: int) -> None:
        lag = self._step - version
        bucket = travels_in_bucket(self._plan, exchange, version) if lag else None
        if lag and bucket is None and awaited_version(self._plan, exchange, version) == version:
            return  # it was waited for in the step that sent it
        if lag > 1 or (lag and self._lowering.joins_steps):
            return  # it was waited for in an earlier step
        self._wait(self._lowering.slot(exchange, bucket), lag)

    def gather(self, exchange: Exchange) -> None:
        self._reached = len(self._lowering.lowering.graph)
        self._flush()
        if self._plan.mesh.size > 1:
            self._post([exchange], None, is_late=False)
            self._wait(self._lowering.slot(exchange, None), 0)

    def join(self) -> None:
        """End the step as a CUDA graph ends: unsent buckets leave, and every call is waited for."""
        self._post_rest()
        for slot in sorted(self._posted):
            self._wait(slot, 0)

    def build(self, name: str) -> StepTemplate:
        self._post_rest()
        self._flush()
        waits = [action for action in self._actions if isinstance(action, Wait)]
        waited = {action.slot for action in waits if action.lag == 0}
        is_closed = self._posted <= waited and all(action.lag == 0 for action in waits)
        ends_together = not (self._lowering.joins_steps and self._members) or self._plan.mesh.cfg == 1
        return StepTemplate(name, tuple(self._actions), is_closed and ends_together)

    def _post_rest(self) -> None:
        for bucket, members in self._members.items():
            if (
                self._lowering.is_unfilled(bucket)
                and self._lowering.slot(members[0], bucket) not in self._posted
            ):
                self._post(members, bucket, is_late=True)

    def _post(self, members: list[Exchange], bucket: int | None, is_late: bool) -> None:
        self._flush()
        host_ns = 0
        if self._lowering.has_host:
            host_ns = to_ns(self._lowering.lowering.cluster.collectives.per_message_s.value)
        call = self._lowering.call(members, bucket, is_late)
        self._actions.append(Post(call, host_ns))
        self._posted.add(call.slot)

    def _wait(self, slot: int, lag: int) -> None:
        if (slot, lag) not in self._waited:
            self._waited.add((slot, lag))
            self._flush()
            self._actions.append(Wait(slot, lag, self._lowering.labels[slot]))

    def _flush(self) -> None:
        first, last = self._done, self._reached
        if first == last:
            return
        device = tuple(int(sums[0][last] - sums[0][first]) for sums in self._sums)
        host: tuple[int, ...] = ()
        ends: tuple[int, ...] = ()
        if self._lowering.has_host:
            host = tuple(int(sums[1][last] - sums[1][first]) for sums in self._sums)
            ends = tuple(
                host_end(OperationTimes(times.device_ns[first:last], times.host_ns[first:last]))
                for _, _, times in self._sums
            )
        self._actions.append(Compute(device, host, ends, first, last))
        self._done = last


def _prefix(times: Nanoseconds) -> Nanoseconds:
    sums: Nanoseconds = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(times)))
    return sums


def host_end(times: OperationTimes) -> int:
    """Earliest end of operations if the device is idle: each starts when the host has issued it."""
    after = times.device_ns[::-1].cumsum()[::-1]
    return int((times.host_ns.cumsum() + after).max())
