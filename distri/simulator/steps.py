"""One step on its way to a template: what is posted and waited for between which kernels.

Calls are posted where their last member is published, waits stand before the operation that reads; kernels between two
of them are one stretch of time. Some buckets leave when the step is over: those that `distri.core.program` has wait for
the next one, and those that the published implementation never fills.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from distri.core.latent import latent_exchange
from distri.core.plan import Exchange
from distri.core.policy import ExchangeKind, Reach
from distri.simulator.costs import Nanoseconds, OperationTimes, to_ns
from distri.simulator.hardware import Word
from distri.simulator.kernels import Service
from distri.simulator.tasks import Action, Compute, Post, StepTemplate, Wait

if TYPE_CHECKING:
    from distri.simulator.lowering import PlanLowering


class WaitKind(Word):
    """What an exchange waits for before the operation that reads it."""

    NOTHING = "nothing"
    OWN_STEP = "own step"
    LAST_ALONE = "last step, alone"
    LAST_BUCKET = "last step, in a bucket"


class Decision(NamedTuple):
    """How a step treats all exchanges of one kind and policy: `distri.core.program`, once for all of them."""

    service: Service
    is_published: bool
    is_late: bool
    wait: WaitKind


def slot_of(exchange: Exchange, bucket: int | None) -> int:
    """The slot of the call that carries an exchange: odd for its bucket's, even for its own."""
    return 2 * exchange.index if bucket is None else 2 * bucket + 1


class StepBuilder:
    """Collects the actions of one step."""

    def __init__(
        self,
        lowering: PlanLowering,
        chosen: tuple[Decision, ...],
        resting: frozenset[Reach],
        sums: list[tuple[Nanoseconds, Nanoseconds, OperationTimes]],
        ends_image: bool = False,
    ) -> None:
        self._lowering = lowering
        self._plan = lowering.plan
        self._chosen = chosen
        self._resting = resting
        self._sums = sums
        self._ends_image = ends_image
        self._actions: list[Action] = []
        self._done = 0
        self._reached = 0
        self._members: dict[int, list[Exchange]] = {}
        for exchange, decision in zip(self._plan.exchanges, chosen, strict=True):
            if decision.is_published and decision.is_late and exchange.bucket is not None:
                self._members.setdefault(exchange.bucket, []).append(exchange)
        self._last = {bucket: members[-1] for bucket, members in self._members.items()}
        self._posted: set[int] = set()
        self._waited: set[tuple[int, int]] = set()

    def build(self, name: str) -> StepTemplate:
        """The template of the step."""
        for exchange, decision in zip(self._plan.exchanges, self._chosen, strict=True):
            self._reached = exchange.index
            if exchange.kind is ExchangeKind.OUTPUT:
                self._gather(exchange)
                continue
            if decision.is_published:
                self._publish(exchange, decision)
            self._await(exchange, decision.wait)
        self._post_rest()
        if self._lowering.joins_steps:  # a CUDA graph ends when all of its streams have
            for slot in sorted(self._posted):
                self._wait(slot, 0)
        self._flush()
        waits = [action for action in self._actions if isinstance(action, Wait)]
        waited = {action.slot for action in waits if action.lag == 0}
        is_closed = self._posted <= waited and all(action.lag == 0 for action in waits)
        ends_together = not (self._lowering.joins_steps and self._members) or self._plan.mesh.cfg == 1
        ends_together = ends_together and (not self._plan.keeps_latent_on_patch or self._ends_image)
        return StepTemplate(name, tuple(self._actions), is_closed and ends_together)

    def _publish(self, exchange: Exchange, decision: Decision) -> None:
        if not decision.is_late or exchange.bucket is None:
            self._post([exchange], None, decision.wait is not WaitKind.OWN_STEP)
        elif exchange is self._last[exchange.bucket] and not self._lowering.leaves_after(exchange.bucket):
            self._post(self._members[exchange.bucket], exchange.bucket, is_late=True)

    def _await(self, exchange: Exchange, wait: WaitKind) -> None:
        match wait:
            case WaitKind.OWN_STEP:
                self._wait(slot_of(exchange, None), 0)
            case WaitKind.LAST_ALONE:
                self._wait(slot_of(exchange, None), 1)
            case WaitKind.LAST_BUCKET:
                self._wait(slot_of(exchange, exchange.bucket), 1)

    def _gather(self, exchange: Exchange) -> None:
        self._reached = len(self._lowering.lowering.graph)
        self._flush()
        gathered = [exchange] if self._plan.mesh.size > 1 else []
        if self._plan.keeps_latent_on_patch:
            gathered = [exchange] if self._plan.mesh.cfg == 2 else []
            gathered += [latent_exchange(self._plan)] if self._ends_image else []
        for output in gathered:
            self._post([output], None, is_late=False)
            self._wait(slot_of(output, None), 0)

    def _post_rest(self) -> None:
        """What leaves when the step is over."""
        for bucket, members in self._members.items():
            if self._lowering.leaves_after(bucket):
                self._post(members, bucket, is_late=True)

    def _post(self, members: list[Exchange], bucket: int | None, is_late: bool) -> None:
        self._flush()
        host_ns = 0
        if self._lowering.has_host:
            host_ns = to_ns(self._lowering.lowering.cluster.collectives.per_message_s.value)
        call = self._lowering.call(members, bucket, is_late, self._resting)
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


def host_end(times: OperationTimes) -> int:
    """Earliest end of operations if the device is idle: each starts when the host has issued it."""
    after = times.device_ns[::-1].cumsum()[::-1]
    return int((times.host_ns.cumsum() + after).max())
