"""The one place where a layer meets other ranks: it publishes its own value and collects theirs.

Layers know neither policies nor steps nor networks. The `Exchanger` of a rank looks up how the plan serves a layer at
the current step, and asks a `Transport`, the part that a backend supplies, for exactly the version that the staleness
contract names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from distri.core.plan import Exchange, Plan
from distri.core.policy import ExchangeKind, Phase
from distri.core.program import awaited_version, is_published, travels_in_bucket
from distri.core.staleness import phase_of
from distri.errors import ScheduleMismatchError

T = TypeVar("T")


class Transport(Protocol[T]):
    """Moves one rank's values; values are opaque to the exchanger.

    What `parts` and results are, by kind:

    halo     sent: one piece for each message that leaves this patch; received: one for each message that reaches it
             (both in the order of `distri.core.traffic.messages`)
    moments  sent: [own moments]; received: [merged before, merged after], without the one that an end of the line lacks
    context  sent: [own keys and values, tokens first]; received: [the whole picture's, this rank's own being fresh]
    """

    def begin_image(self) -> None:
        """Forget all versions of the last image."""

    def place(self, exchange: Exchange, version: int, bucket: int | None) -> T | None:
        """Where this rank's keys and values of this version may be written before they are sent; None: nowhere.

        Who writes there sends what it was given: then nothing is copied.
        """

    def send(self, exchange: Exchange, version: int, parts: Sequence[T], bucket: int | None) -> None:
        """Hand over a value; with a bucket it may leave later, with the bucket's last value. Does not block."""

    def receive(self, exchange: Exchange, version: int, own: Sequence[T]) -> Sequence[T]:
        """Wait for exactly this version of the others' values."""

    def gather(self, exchange: Exchange, version: int, own: T) -> Sequence[T]:
        """The output of this version of the ranks that `distri.core.traffic.output_ranks` names, in that order."""


class Exchanger(Generic[T]):
    """One rank's view of a plan in progress."""

    def __init__(self, plan: Plan, rank: int, transport: Transport[T]) -> None:
        self.plan = plan
        self.rank = rank
        self.patch = plan.mesh.patch_of(rank)
        self.branch = plan.mesh.branch_of(rank)
        self.step = -1
        self.phase = Phase.WARMUP
        self._transport = transport
        self._by_layer = plan.by_layer
        self._order = [e.layer for e in plan.exchanges if e.kind is not ExchangeKind.OUTPUT]
        self._met = 0
        self._own: dict[str, Sequence[T]] = {}

    def begin_image(self) -> None:
        """Start again at step 0."""
        self.step = -1
        self._transport.begin_image()

    def begin_step(self, phase: Phase | None = None) -> int:
        """Start the next step, in the phase of the plan's warm-up unless a refresh decided otherwise."""
        self.step += 1
        self.phase = phase or phase_of(self.step, self.plan.warmup_steps)
        self.restart_step()
        return self.step

    def restart_step(self) -> None:
        """Begin the current step again: nothing of it was done."""
        self._met = 0
        self._own.clear()

    def skip_layers(self) -> None:
        """Take the layers of the current step as met: they were done without being asked."""
        self._met = len(self._order)

    def exchange_of(self, layer: str) -> Exchange:
        """The plan's entry for a layer."""
        return self._by_layer[layer]

    def is_alone(self, layer: str) -> bool:
        """Whether the layer neither sends nor reads anything at the current step."""
        exchange = self._by_layer[layer]
        is_read = awaited_version(self.plan, exchange, self.step, self.phase) is not None
        return not is_read and not is_published(self.plan, exchange, self.step, self.phase)

    def place(self, layer: str) -> T | None:
        """Where a layer may write the keys and values that it publishes next; None: where it likes."""
        exchange = self._by_layer[layer]
        if not is_published(self.plan, exchange, self.step, self.phase):
            return None
        bucket = travels_in_bucket(self.plan, exchange, self.step, self.phase)
        return self._transport.place(exchange, self.step, bucket)

    def publish(self, layer: str, parts: Sequence[T]) -> None:
        """Hand over this rank's value of the current step.

        Raises:
            ScheduleMismatchError: at the first step, the layer is not the one that the plan has next.
        """
        self._check_order(layer)
        exchange = self._by_layer[layer]
        self._own[layer] = parts
        if is_published(self.plan, exchange, self.step, self.phase):
            bucket = travels_in_bucket(self.plan, exchange, self.step, self.phase)
            self._transport.send(exchange, self.step, parts, bucket)

    def collect(self, layer: str) -> Sequence[T] | None:
        """The other ranks' values, of the version that the contract requires; None if the policy is `local`."""
        exchange = self._by_layer[layer]
        version = awaited_version(self.plan, exchange, self.step, self.phase)
        if version is None:
            return None
        return self._transport.receive(exchange, version, self._own[layer])

    def gather(self, own: T) -> Sequence[T]:
        """The output of this step of every rank, or of those that the plan has it from, in rank order.

        Raises:
            ScheduleMismatchError: a layer of the plan never ran.
        """
        if self.plan.is_attached and self._met != len(self._order):
            raise ScheduleMismatchError(
                f"rank {self.rank}, step {self.step}: {self._order[self._met]} is in the plan but did not run"
            )
        return self._transport.gather(self.plan.exchanges[-1], self.step, own)

    def _check_order(self, layer: str) -> None:
        expected = self._order[self._met] if self._met < len(self._order) else "the end of the step"
        if layer != expected:
            raise ScheduleMismatchError(
                f"rank {self.rank}, step {self.step}: {layer} ran where the plan has {expected}; "
                "the plan was made for another model or for other inputs"
            )
        self._met += 1
