"""The transport of one rank: versions in, versions out, exactly as `distri.core.staleness` has them.

Invariants. A value is packed when it is handed over, so the layers keep nothing alive. A slot is packed or received
into only after its last messages have left. What is received is a view of the arena: read it in the step that asked
for it. Nothing is allocated after the first displaced step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distri.backends.base import Span
from distri.backends.torch_distributed.alarm import Alarm, LostPeerError
from distri.backends.torch_distributed.arena import Arena
from distri.backends.torch_distributed.deliveries import Deliveries, Delivery, OpenBucket
from distri.backends.torch_distributed.lane import Lane, StreamTicket, Ticket, nothing
from distri.backends.torch_distributed.routes import Route, Routes
from distri.backends.torch_distributed.wire import Addressed, Parcel, Wire
from distri.core.plan import Exchange, Plan
from distri.core.policy import ExchangeKind
from distri.core.program import held_buckets
from distri.core.shape import Rect
from distri.core.staleness import check_version, version_from
from distri.core.traffic import output_ranks
from distri.errors import RunError, ScheduleMismatchError


def no_span(name: str) -> AbstractContextManager[object]:
    """Nobody watches."""
    return nullcontext()


@dataclass
class TransportStats:
    """What a rank has done so far. `waited_s` is communication that computation did not hide (CPU lanes only).

    waited_by: the same by kind of exchange, and by "broadcast".
    """

    waited_s: float = 0.0
    waited_by: dict[str, float] = field(default_factory=dict)
    num_waits: int = 0
    num_parcels: int = 0
    bytes_received: int = 0

    @property
    def counts(self) -> tuple[int, int]:
        """Parcels and bytes so far."""
        return self.num_parcels, self.bytes_received

    def count(self, more: tuple[int, int], less: tuple[int, int] = (0, 0)) -> None:
        """Count further parcels and bytes, less some."""
        self.num_parcels += more[0] - less[0]
        self.bytes_received += more[1] - less[1]


@dataclass(frozen=True)
class Links:
    """What a transport sends through: its two lanes, and a process group for each of them and for the gather."""

    late: Lane
    urgent: Lane
    late_wire: Wire
    urgent_wire: Wire
    world_wire: Wire
    alarm: Alarm
    timeout_s: float


class TorchTransport:
    """Implements `distri.core.exchanger.Transport` for tensors.

    dtype: of halos and contexts; by default that of the first one handed over.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        links: Links,
        device: torch.device,
        who: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.who = who
        self.device = device
        self.stats = TransportStats()
        self.span: Span = no_span
        self.routes = Routes(plan, plan.mesh.patch_of(rank))
        self.arena = Arena(self.routes, device)
        self._links = links
        self._dtype = dtype
        self._step = 0
        self._layer = ""
        self._can_wait = held_buckets(plan)
        self._now = Deliveries()
        self._gather: Ticket | None = None
        self._outputs: dict[tuple[str, tuple[Rect, ...]], _Output] = {}

    @property
    def position(self) -> str:
        """Where the rank is: its step and the last layer that exchanged something."""
        if self._step >= self.plan.image.num_inference_steps:
            return "after the last step"
        return f"step {self._step}" + (f", {self._layer}" if self._layer else "")

    @property
    def is_within_step(self) -> bool:
        """Whether a layer of the current step has exchanged something, and the output was not gathered yet."""
        return bool(self._layer)

    def begin_image(self) -> None:
        """Forget all versions of the last image, after the messages under way have arrived."""
        for ticket in self._now.under_way:
            self.await_ticket(ticket, "the end of the last image")
        self._now = Deliveries()
        self._step, self._layer = 0, ""

    def place(self, exchange: Exchange, version: int, bucket: int | None) -> Tensor | None:
        """This patch's share of a context: attention reads it there, and it is sent from there."""
        if self.arena.dtype is None:
            return None
        self._arrive_at(exchange, version)
        is_late = bucket is not None
        route = self.routes.of(exchange, is_late)
        slot = version % route.depth
        self._await_user(self._now.slot_users.get((route.key, slot)), route)
        own_slot = self.arena.own_slot(route.key, slot, is_late)
        self._await_user(self._now.share_users.get((route.key, own_slot)), route)
        return self.arena.share(route.key, own_slot, self.routes.patch)

    def send(self, exchange: Exchange, version: int, parts: Sequence[Tensor], bucket: int | None) -> None:
        """Pack a value; it leaves at once, or with its bucket: when that is full, or when the next step begins."""
        self._arrive_at(exchange, version)
        route = self.routes.of(exchange, is_late=bucket is not None)
        slot = version % route.depth
        self._pack(route, slot, parts, is_late=bucket is not None)
        self._now.slot_versions[route.key, slot] = version
        if bucket is None:
            ticket = self._dispatch(
                self._links.urgent, self._links.urgent_wire, (route.key,), slot, False, None
            )
            self._hold(route, version, slot, ticket, is_late=False)
            return
        if bucket not in self._now.open:
            self._now.open[bucket] = OpenBucket(self._links.late.promise(), version, slot, [])
        self._now.open[bucket].keys.append(route.key)
        self._hold(route, version, slot, self._now.open[bucket].ticket, is_late=True)
        if route.key == self.routes.last_of_bucket[bucket] and bucket not in self._can_wait:
            self._flush(bucket)

    def receive(self, exchange: Exchange, version: int, own: Sequence[Tensor]) -> Sequence[Tensor]:
        """Wait for exactly this version of the others' values.

        Raises:
            StaleReadError: it was never sent for, or its place holds another one.
            LostPeerError: it did not come.
        """
        self._layer = exchange.layer
        self._release()
        delivery = self._now.held.get(exchange.layer, version)
        route, slot = delivery.route, delivery.slot
        check_version(exchange.layer, version, self._now.slot_versions[route.key, slot])
        kind = exchange.kind.value
        self.await_ticket(delivery.ticket, f"{exchange.layer} ({kind}), version {version}", kind)
        if exchange.kind is ExchangeKind.HALO:
            return self.arena.incoming[route.key, slot]
        if exchange.kind is ExchangeKind.MOMENTS:
            line = self.arena.lines[route.key, slot]
            return [merged for merged in (line.before, line.after) if merged is not None]
        if self._now.placed.pop(route.key, None) != slot:
            self._place_share(route, slot, own)
            del self._now.placed[route.key]
        return [self.arena.whole[route.key, slot]]

    def gather(self, exchange: Exchange, version: int, own: Tensor) -> Sequence[Tensor]:
        """The outputs of this version that this rank has in the end, in rank order; valid until the next gather."""
        self._step, self._layer = version, exchange.layer
        self._flush_full()
        if self.plan.mesh.size == 1:
            return [own]
        if isinstance(self._gather, StreamTicket):
            self._gather.wait_on_host(self._links.alarm, self._links.timeout_s)
        ranks = output_ranks(self.plan.mesh, exchange, self.rank)
        if ranks == (self.rank,):
            # Nothing to send, but a mark: the host stays within a step of the device, as it does where it gathers.
            self._gather = self._links.urgent.submit(nothing)
            self._step, self._layer = version + 1, ""
            return [own]
        key = exchange.layer, self.plan.partition.at_step(version)
        if key not in self._outputs:
            self._outputs[key] = _Output(self.plan, key[1], ranks, self.rank, own, self.device)
        output = self._outputs[key]
        output.pack(own, self.who)
        wire = self._links.world_wire

        def exchange_outputs() -> None:
            with self.span(f"fresh {exchange.layer}"):
                wire.exchange(output.sends, output.receives)

        self._gather = self._links.urgent.submit(exchange_outputs)
        self.await_ticket(self._gather, f"the output, version {version}", exchange.kind.value)
        self.stats.count((0, sum(t.nbytes for t, _ in output.receives)))
        self._step, self._layer = version + 1, ""
        return output.results(own)

    def join(self) -> None:
        """Let the computation go on only after everything that has left by the end of a step, or leaves then.

        Until the next message, nothing is under way: here a step can be cut off from the step before.
        """
        self._flush_full()
        self._links.late.join()
        self._links.urgent.join()
        self.resume(self._now, 0)

    def resume(self, deliveries: Deliveries, steps: int) -> None:
        """Be where the transport was with these deliveries, `steps` steps later; all that left has arrived."""
        self._now = deliveries.later(steps, self._links.late.promise)

    @property
    def deliveries(self) -> Deliveries:
        """What was handed over in this image; not to be changed."""
        return self._now

    def _hold(self, route: Route, version: int, slot: int, ticket: Ticket, is_late: bool) -> None:
        self._now.held.put(route.layer, version, Delivery(ticket, route, slot))
        self._now.slot_users[route.key, slot] = ticket
        if route.shares:
            self._now.share_users[route.key, self.arena.own_slot(route.key, slot, is_late)] = ticket

    def _arrive_at(self, exchange: Exchange, version: int) -> None:
        self._step, self._layer = version, exchange.layer
        self._release()

    def _release(self) -> None:
        """Let go what the last step's output had to come before."""
        for bucket in sorted(
            bucket for bucket, filled in self._now.open.items() if filled.version < self._step
        ):
            self._flush(bucket)

    def _flush_full(self) -> None:
        """At the end of a step, let go what no later layer can add to, and what need not come after the output."""
        for bucket in sorted(self._now.open.keys() - self._can_wait):
            self._flush(bucket)

    def _flush(self, bucket: int) -> None:
        """Let a bucket go with what it has: all of its layers, or those that published at this step."""
        full = self._now.open.pop(bucket)
        resting = frozenset(key for key in full.keys if self._rests(key, full.version))
        self._dispatch(
            self._links.late, self._links.late_wire, tuple(full.keys), full.slot, True, full.ticket, resting
        )

    def _rests(self, key: str, version: int) -> bool:
        """Whether only near shares of this version travel."""
        reach = self.routes.by_key[key].exchange.reach
        far = self.plan.mesh.patch
        return reach is not None and version_from(reach, far, version, self.plan.warmup_steps) != version

    def _dispatch(
        self,
        lane: Lane,
        wire: Wire,
        layers: tuple[str, ...],
        slot: int,
        is_late: bool,
        promise: Ticket | None,
        resting: frozenset[str] = frozenset(),
    ) -> Ticket:
        parcel: Parcel = self.arena.parcel(layers, slot, is_late, resting)
        self.stats.count((1, parcel.num_bytes))
        patch, parts = self.routes.patch, self.routes.parts
        name = f"late bucket {self.routes.by_key[layers[0]].bucket}" if is_late else f"fresh {layers[0]}"

        def deliver() -> None:
            with self.span(name):
                wire.deliver(parcel, patch, parts)

        return lane.submit(deliver, promise)

    def _pack(self, route: Route, slot: int, parts: Sequence[Tensor], is_late: bool) -> None:
        self._await_user(self._now.slot_users.get((route.key, slot)), route)
        kind = route.exchange.kind
        if kind is ExchangeKind.MOMENTS:
            self._copy(route, [self.arena.lines[route.key, slot].own], parts)
            return
        self._fix_dtype(route, parts)
        if kind is ExchangeKind.HALO:
            self._copy(route, self.arena.outgoing[route.key, slot], parts)
        else:
            self._place_share(route, self.arena.own_slot(route.key, slot, is_late), parts)

    def _place_share(self, route: Route, slot: int, own: Sequence[Tensor]) -> None:
        """Write this patch's keys and values beside the others' in `slot`."""
        self._await_user(self._now.share_users.get((route.key, slot)), route)
        self._copy(route, [self.arena.share(route.key, slot, self.routes.patch)], own)
        self._now.placed[route.key] = slot

    def _copy(self, route: Route, places: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Copy the parts into their places.

        Raises:
            ScheduleMismatchError: they are not what the plan says.
        """
        arrived = [(tuple(part.shape), part.dtype) for part in parts]
        if arrived != [(tuple(place.shape), place.dtype) for place in places]:
            raise ScheduleMismatchError(
                f"{self.who}: {self.position}: the plan has {_shapes(places)}, the layer made {_shapes(parts)}; "
                "the plan was made for another model, size or batch, or the layers differ in dtype"
            )
        for place, part in zip(places, parts, strict=True):
            if part is not place:  # a layer may have written it there
                place.copy_(part.detach())

    def _fix_dtype(self, route: Route, parts: Sequence[Tensor]) -> None:
        if self.arena.dtype is None:
            seen = parts[0].dtype if parts and not route.is_coded else getattr(torch, route.exchange.dtype)
            given = self._dtype or seen
            assert isinstance(given, torch.dtype)
            self.arena.fix_dtype(given)

    def _await_user(self, ticket: Ticket | None, route: Route) -> None:
        """Let the last messages from or into a place go first; they always have, unless versions were never read."""
        if ticket is not None and not ticket.is_done:
            self.await_ticket(ticket, f"{route.layer}: its buffer")

    def await_ticket(self, ticket: Ticket, what: str, kind: str = "buffers") -> None:
        """Wait for a lane's work, and say who waited at which step for what if that was in vain.

        Raises:
            LostPeerError: another rank is the cause.
        """
        started = time.perf_counter()
        try:
            with self.span(f"waits for {what}"):
                ticket.wait()
        except RunError as error:
            cause = self._links.alarm.settled() or str(error)
            self._links.alarm.ring(cause)  # from here on, whoever waits for anything stops
            raise LostPeerError(f"{self.who}: step {self._step}, {what}: {cause}") from error
        waited = time.perf_counter() - started
        self.stats.waited_s += waited
        self.stats.waited_by[kind] = self.stats.waited_by.get(kind, 0.0) + waited
        self.stats.num_waits += 1


class _Output:
    """Buffers of the gather: the patch of each of `ranks`, for both guidance branches."""

    def __init__(
        self,
        plan: Plan,
        patches: tuple[Rect, ...],
        ranks: tuple[int, ...],
        rank: int,
        own: Tensor,
        device: torch.device,
    ) -> None:
        self._rank = rank
        batch, channels = own.shape[:2]
        with torch.inference_mode(False):
            self._patches = {
                r: torch.zeros((batch, channels, p.rows.size, p.cols.size), dtype=own.dtype, device=device)
                for r, p in ((r, patches[plan.mesh.patch_of(r)]) for r in ranks)
            }
        others = [r for r in ranks if r != rank]
        self.sends: list[Addressed] = [(self._patches[rank], r) for r in others]
        self.receives: list[Addressed] = [(self._patches[r], r) for r in others]

    def pack(self, own: Tensor, who: str) -> None:
        """Copy this rank's output to where it is sent from."""
        place = self._patches[self._rank]
        if own.shape != place.shape or own.dtype != place.dtype:
            raise ScheduleMismatchError(
                f"{who}: the output is {_shapes([own])}, where the plan has {_shapes([place])}"
            )
        place.copy_(own.detach())

    def results(self, own: Tensor) -> list[Tensor]:
        """All outputs, in rank order; this rank's is the tensor it gave."""
        return [own if r == self._rank else patch for r, patch in self._patches.items()]


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors) or "nothing"
