"""From the exchanges of a plan to calls with costs: which messages or which collective carry them.

`neighbours` is distri's own pattern, as the torch backend sends it: what travels together is one batch of messages.
Contexts go straight to all ranks of the guidance branch, halos to the ranks that read them, moments along the line of
patches, the output to all ranks (a local one to the guidance partner). `gather_all` is the published implementation's:
what travels together is one all-gather, halos and moments included, and the received parts are moved out of a staging
buffer one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final, TypeAlias

from distri.core.plan import DTYPE_BYTES, Exchange
from distri.core.policy import READS_LATE, ExchangeKind, Reach
from distri.core.shape import Rect
from distri.core.traffic import Message, message_bytes, messages_of
from distri.simulator.collective import CollectiveCost, CollectiveModel
from distri.simulator.compute import ComputeModel, KernelKind, OperationShape
from distri.simulator.costs import to_ns
from distri.simulator.hardware import Collective, Tag
from distri.simulator.link import Flow, alone_ns
from distri.simulator.options import CtaPolicy, SimulationOptions
from distri.simulator.tasks import Call, Group, Hop, Transfer

_REFERENCE_MOMENT_BYTES: Final = 2
_SPREAD: Final = (ExchangeKind.CONTEXT, ExchangeKind.OUTPUT)
_Piece: TypeAlias = tuple[tuple[int, int], int, tuple[int, int] | None]
CTA_BYTES_PER_S: Final = 20e9
"""What one thread block of communication moves: NCCL 2.30, tuning.cc, per channel on Ampere."""


class CallFactory:
    """Makes calls for one mesh on one cluster."""

    def __init__(
        self,
        collectives: CollectiveModel,
        options: SimulationOptions,
        copying: Sequence[ComputeModel],
        branches: tuple[tuple[int, ...], ...],
        patches: tuple[Rect, ...],
        is_reference: bool,
    ) -> None:
        self._collectives = collectives
        self._options = options
        self._copying = copying
        self.branches = branches
        self._patches = patches
        self._is_reference = is_reference
        self._ranks = tuple(rank for branch in branches for rank in branch)
        self._known: dict[object, Transfer] = {}
        self._alike: dict[tuple[int, int, bool], Transfer] = {}
        self._hops_by_place: dict[tuple[int, int, int, int, bool], Hop] = {}
        self._pieces_of: dict[object, tuple[_Piece, ...]] = {}
        self._shares_of: dict[object, tuple[int, ...]] = {}
        self.tags: dict[str, Tag] = {}
        """By collective: how its cost is known, at worst."""

    def of(
        self,
        slot: int,
        label: str,
        stream: int,
        is_late: bool,
        members: Sequence[Exchange],
        is_blocking: bool,
        resting: frozenset[Reach] = frozenset(),
    ) -> Call:
        """The call that carries `members`, which travel together; contexts of a `resting` reach to near ranks only."""
        first = members[0]
        if self._is_reference:
            return self.call(slot, label, stream, is_late, self._gathered(members, is_late, is_blocking))
        if first.stays_on_patch:
            return self._between_partners(slot, label, stream, first)
        everybody = first.kind is ExchangeKind.OUTPUT
        spread = [e for e in members if e.kind in _SPREAD and e.reach not in resting]
        groups: tuple[Group, ...] = ()
        if spread:
            share = sum(max(self._shares(e, is_late)) for e in spread)
            parties = (self._ranks,) if everybody else self.branches
            tail_ns = self._next_latent_ns(first) if everybody else 0
            groups = tuple(
                Group(ranks, self._direct(share, ranks, is_blocking), tail_ns) for ranks in parties
            )
        hops = self._hops([e for e in members if e not in spread], is_late, is_blocking)
        sent, received = self._payload(spread, is_late, hops)
        return Call(slot, label, stream, is_late, groups, hops, sent, received, self._ranks)

    def _between_partners(self, slot: int, label: str, stream: int, output: Exchange) -> Call:
        """A local output: each rank's goes to the rank of the same patch in the other guidance branch."""
        hops = tuple(
            self._hop(ranks, pair, size, -1, is_blocking=True)
            for ranks, size in zip(
                zip(*self.branches, strict=True), self._shares(output, is_late=False), strict=True
            )
            for pair in ((0, 1), (1, 0))
        )
        sent, received = self._payload((), is_late=False, hops=hops)
        return Call(slot, label, stream, False, (), hops, sent, received, self._ranks)

    def _next_latent_ns(self, output: Exchange) -> int:
        """What follows what all ranks gather: rank 0 tells them the next latent.

        That of the next step; or, behind a latent that was gathered because it stayed on its patches, the next image's.
        """
        if len(self._ranks) == 1:
            return 0
        latent = sum(self._shares(output, is_late=False)) * len(self.branches)
        return self.transfer(Collective.BROADCAST, latent, self._ranks, is_blocking=True).alone_ns

    def _gathered(self, members: Sequence[Exchange], is_late: bool, is_blocking: bool) -> tuple[Group, ...]:
        """The reference's: everything in one all-gather, but moments that it sums up."""
        share = sum(_reference_share(exchange, self._patches) for exchange in members)
        if members[0].kind is ExchangeKind.MOMENTS and not is_late and is_summed(members[0]):
            return tuple(
                Group(ranks, self.transfer(Collective.ALL_REDUCE, share, ranks, is_blocking), 0)
                for ranks in self.branches
            )
        parties = (self._ranks,) if members[0].kind is ExchangeKind.OUTPUT else self.branches
        return tuple(self._gather(ranks, share * len(ranks), is_blocking) for ranks in parties)

    def _payload(
        self, spread: Sequence[Exchange], is_late: bool, hops: Sequence[Hop]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes that each rank sends and receives."""
        sent, received = [0] * len(self._ranks), [0] * len(self._ranks)
        for exchange in spread:
            everybody = exchange.kind is ExchangeKind.OUTPUT
            shares = self._shares(exchange, is_late)
            for ranks in (self._ranks,) if everybody else self.branches:
                by_rank = shares * (len(ranks) // len(shares))
                for rank, share in zip(ranks, by_rank, strict=True):
                    sent[rank] += share * (len(ranks) - 1)
                    received[rank] += sum(by_rank) - share
        for hop in hops:
            sent[hop.source] += hop.transfer.num_bytes
            received[hop.reader] += hop.transfer.num_bytes
        return tuple(sent), tuple(received)

    def call(self, slot: int, label: str, stream: int, is_late: bool, groups: tuple[Group, ...]) -> Call:
        """A call of collectives; what a rank sends of it is what its link of the ring carries."""
        sent = [0] * len(self._ranks)
        for group in groups:
            for rank in group.ranks:
                sent[rank] += group.transfer.num_bytes
        return Call(slot, label, stream, is_late, groups, (), tuple(sent), tuple(sent), self._ranks)

    def _direct(self, share: int, ranks: tuple[int, ...], is_blocking: bool) -> Transfer:
        """Every rank sends its share to every other one at once: one flow, at the rate of a single message."""
        key = ("direct", share, ranks, is_blocking)
        if key not in self._known:
            peers = len(ranks) - 1
            cost = self._collectives.cost(Collective.ALL_TO_ALL, share * len(ranks), ranks, is_blocking)
            self._note(Collective.ALL_TO_ALL, cost)
            limit = max(1, int(self._limited(cost.bandwidth_bytes_per_s) / peers)) if peers else None
            loads = self._collectives.topology.pair_loads(ranks)
            flow = Flow((0, 0, 0), share if peers else 0, loads, to_ns(cost.fixed_s), limit)
            self._known[key] = self._transfer_of(flow)
        return self._known[key]

    def _limited(self, bandwidth: float) -> float:
        if self._options.cta_policy is not CtaPolicy.LIMITED:
            return bandwidth
        return min(bandwidth, self._options.num_ctas * CTA_BYTES_PER_S)

    def _note(self, collective: Collective, cost: CollectiveCost) -> None:
        known = self.tags.setdefault(collective.value, cost.tag)
        self.tags[collective.value] = max(known, cost.tag, key=list(Tag).index)

    def _gather(self, ranks: tuple[int, ...], size: int, is_blocking: bool) -> Group:
        """An all-gather into a list: the copies out of the staging buffer are part of what a blocking call adds."""
        extra_s = self._collectives.cluster.collectives.blocking_extra_s.value if is_blocking else 0.0
        tail_ns = max(self._copies_ns(ranks, size), to_ns(extra_s))
        return Group(ranks, self.transfer(Collective.ALL_GATHER, size, ranks), tail_ns)

    def _copies_ns(self, ranks: tuple[int, ...], size: int) -> int:
        """Moving a gathered list out of the staging buffer: one copy for each rank."""
        shape = OperationShape(
            KernelKind.ELEMENTWISE, bytes_read=size, bytes_written=size, num_kernels=len(ranks)
        )
        return max(to_ns(self._copying[rank].cost(shape).device_s) for rank in ranks)

    def transfer(
        self, collective: Collective, size: int, ranks: tuple[int, ...], is_blocking: bool = False
    ) -> Transfer:
        """The cost of one collective or message, under the policy for thread blocks."""
        key = (collective, size, ranks, is_blocking)
        if key not in self._known:
            cost = self._collectives.cost(collective, size, ranks, is_blocking)
            self._note(collective, cost)
            flow = cost.flow((0, 0, 0))
            if flow.limit_bytes_per_s is not None:
                cap = max(1, int(self._limited(flow.limit_bytes_per_s * cost.num_rings) / cost.num_rings))
                flow = dataclasses.replace(flow, limit_bytes_per_s=min(flow.limit_bytes_per_s, cap))
            self._known[key] = self._transfer_of(flow)
        return self._known[key]

    def _transfer_of(self, flow: Flow) -> Transfer:
        alone = flow.latency_ns
        if flow.num_bytes and (flow.loads or flow.limit_bytes_per_s is not None):
            alone = alone_ns(flow, self._collectives.topology.channels)
        return Transfer(flow.num_bytes, flow.loads, flow.latency_ns, flow.limit_bytes_per_s, alone)

    def _hops(self, members: Sequence[Exchange], is_late: bool, is_blocking: bool) -> tuple[Hop, ...]:
        """Halos straight to their readers, moments along the line, those of all members together."""
        straight: dict[tuple[int, int], int] = {}
        along: dict[tuple[int, int], int] = {}
        before: dict[tuple[int, int], tuple[int, int] | None] = {}
        for exchange in members:
            is_line = exchange.kind is ExchangeKind.MOMENTS
            sizes = along if is_line else straight
            for pair, size, passed_on in self._pieces(exchange, is_late):
                sizes[pair] = sizes.get(pair, 0) + size
                if is_line:
                    before[pair] = passed_on
        hops: list[Hop] = []
        for ranks in self.branches:
            places: dict[tuple[int, int], int] = {}
            hops += [self._hop(ranks, pair, straight[pair], -1, is_blocking) for pair in sorted(straight)]
            for pair in _in_order(before):
                passed_on = before[pair]
                after = places[passed_on] if passed_on is not None else -1
                places[pair] = len(hops)
                hops.append(self._hop(ranks, pair, along[pair], after, is_blocking))
        return tuple(hops)

    def _pieces(self, exchange: Exchange, is_late: bool) -> tuple[_Piece, ...]:
        """The messages of one exchange: (source, reader), bytes, and the message before; far context rests."""
        key = (exchange.index, exchange.kind, exchange.codec if is_late else None, exchange.reach)
        if key not in self._pieces_of:
            near = exchange.reach.near if exchange.reach is not None else len(self._patches)
            found = messages_of(exchange, self._patches)
            self._pieces_of[key] = tuple(
                (
                    (message.source, message.reader),
                    message_bytes(exchange, message, is_late),
                    None if message.after is None else (message.after, message.source),
                )
                for message in found
                if abs(message.source - message.reader) <= near
            )
        return self._pieces_of[key]

    def _shares(self, exchange: Exchange, is_late: bool) -> tuple[int, ...]:
        key = (exchange.index, exchange.kind, exchange.codec if is_late else None)
        if key not in self._shares_of:
            self._shares_of[key] = _shares(exchange, self._patches, is_late)
        return self._shares_of[key]

    def _hop(
        self, ranks: tuple[int, ...], pair: tuple[int, int], size: int, after: int, is_blocking: bool
    ) -> Hop:
        source, reader = ranks[pair[0]], ranks[pair[1]]
        is_head = is_blocking and after < 0  # once a call, not once a hop
        topology = self._collectives.topology
        place = (size, source, reader, after, is_head)
        if place not in self._hops_by_place:
            key = (size, topology.likeness(source, reader), is_head)
            if key not in self._alike:
                self._alike[key] = self.transfer(Collective.POINT_TO_POINT, size, (source, reader), is_head)
            alike = self._alike[key]
            loads = topology.route(source, reader).loads if alike.loads else ()
            self._hops_by_place[place] = Hop(source, reader, after, alike._replace(loads=loads))
        return self._hops_by_place[place]


def is_summed(exchange: Exchange) -> bool:
    """Whether the reference sums fresh moments up (it gathers them where it will read stale ones later)."""
    return exchange.kind is ExchangeKind.MOMENTS and exchange.steady not in READS_LATE


def _in_order(order: dict[tuple[int, int], tuple[int, int] | None]) -> list[tuple[int, int]]:
    """Pairs such that a message comes behind the one that it passes on."""
    done: dict[tuple[int, int], None] = {}
    waiting = sorted(order)
    while waiting:
        ready = [pair for pair in waiting if order[pair] is None or order[pair] in done]
        assert ready, "messages wait for each other in a circle"
        done.update(dict.fromkeys(ready))
        waiting = [pair for pair in waiting if pair not in done]
    return list(done)


def _shares(exchange: Exchange, patches: tuple[Rect, ...], is_late: bool) -> tuple[int, ...]:
    """Bytes of each patch's part of a context or an output, on the wire."""
    shape = exchange.shape
    depth = shape[1] * shape[2] if exchange.kind is ExchangeKind.CONTEXT else shape[0] * shape[1]
    parts = (Message(0, 0, patch.at_level(exchange.level).area * depth) for patch in patches)
    return tuple(message_bytes(exchange, part, is_late) for part in parts)


def _reference_share(exchange: Exchange, patches: tuple[Rect, ...]) -> int:
    """Bytes of the largest patch's part of an exchange in an all-gather; smaller parts would be padded."""
    shape, size = exchange.shape, DTYPE_BYTES[exchange.dtype]
    match exchange.kind:
        case ExchangeKind.MOMENTS:
            return 2 * shape[0] * shape[1] * _REFERENCE_MOMENT_BYTES
        case ExchangeKind.HALO:
            assert exchange.geometry is not None
            widest = max(patch.at_level(exchange.level).cols.size for patch in patches)
            return 2 * shape[0] * shape[1] * exchange.geometry.padding[0] * widest * size
    return max(_shares(exchange, patches, is_late=False))
