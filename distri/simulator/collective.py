"""What collectives cost: `a + c sqrt(S) + f S / B` where they were measured, NCCL's own model elsewhere.

S is nccl-tests' size in bytes (all-gather: the whole output; all-reduce: the buffer; point-to-point: the
message), f the bus factor, B the bus bandwidth. The square root is the protocol's switch from LL to Simple.
Only the last term is shared with other traffic: a cost is a fixed time, and wire bytes at a limited rate over
the channels of its ring. `a + c sqrt(S)` and B come from measured tables (`benchmarks/fit_collectives.py`);
where a group has none, from the constants of NCCL 2.30, src/graph/tuning.cc (time = latency + bytes /
bandwidth, least over its protocols).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from distri.errors import HardwareError
from distri.simulator.hardware import Cluster, Collective, CollectiveFit, DeviceKind, LinkKind, Tag
from distri.simulator.link import Flow, Key
from distri.simulator.topology import NANOSECONDS, Topology

PRIOR_SOURCE: Final = "NCCL 2.30, src/graph/tuning.cc: ring latencies and protocol efficiencies"
_NETWORK_EFFICIENCY: Final = 0.9
"""Share of a network's rate that a ring gets (80 to 90 % of specification is usual; p5en at 32 ranks: 91 %).
"""


@dataclass(frozen=True)
class _Protocol:
    """NCCL's constants for one protocol on a ring, in microseconds; efficiency and cap of its bandwidth."""

    base_us: float
    nvlink_hop_us: float
    pcie_hop_us: float
    network_hop_us: float
    efficiency: float
    cap_bytes_per_s: float = math.inf


_PROTOCOLS: Final = (
    _Protocol(6.6, 0.6, 1.0, 2.7, 0.5, 87.7e9),
    _Protocol(14.0, 1.9, 2.5, 4.0, 0.92),
    _Protocol(8.4, 3.4, 5.7, 14.0, 1.0),
)
"""LL, LL128, Simple."""


@dataclass(frozen=True)
class CollectiveCost:
    """One call: `fixed_s` passes first; then `wire_bytes` a rank at no more than `bandwidth_bytes_per_s`.

    `loads` are (channel, weight) of a ring's rate; `num_rings` rings share the bytes.
    """

    collective: Collective
    ranks: tuple[int, ...]
    num_bytes: int
    fixed_s: float
    wire_bytes: int
    bandwidth_bytes_per_s: float
    loads: tuple[tuple[int, int], ...]
    num_rings: int
    tag: Tag
    source: str

    @property
    def alone_s(self) -> float:
        """Seconds of the call with no other traffic."""
        return self.fixed_s + self.wire_bytes / self.bandwidth_bytes_per_s

    def flow(self, key: Key) -> Flow:
        """The call as one flow on the link network; `key` orders it among simultaneous events."""
        limit = max(1, int(self.bandwidth_bytes_per_s / self.num_rings))
        ring_bytes = -(-self.wire_bytes // self.num_rings)
        return Flow(key, ring_bytes, self.loads, round(self.fixed_s * NANOSECONDS), limit)


class CollectiveModel:
    """The costs of a cluster's collectives. Answers are kept by (collective, bytes, ranks, blocking)."""

    def __init__(self, cluster: Cluster, topology: Topology | None = None) -> None:
        self.cluster = cluster
        self.topology = topology if topology is not None else Topology(cluster)
        self._table = cluster.collectives
        self._fits: dict[Collective, list[CollectiveFit]] = {}
        for fit in sorted(self._table.fits, key=lambda fit: fit.num_ranks):
            self._fits.setdefault(fit.collective, []).append(fit)
        self._known: dict[tuple[Collective, int, tuple[int, ...], bool], CollectiveCost] = {}
        self._rings: dict[tuple[int, ...], tuple[tuple[tuple[int, int], ...], int, float]] = {}

    def cost(
        self, collective: Collective, num_bytes: int, ranks: Sequence[int], is_blocking: bool = False
    ) -> CollectiveCost:
        """The cost of one call among `ranks` (for point-to-point: source, target).

        `is_blocking` adds what a call costs whose caller waits on the host (`blocking_extra_s`). Raises
        `HardwareError` for ranks that the cluster does not have.
        """
        key = (collective, num_bytes, tuple(ranks), is_blocking)
        if key not in self._known:
            self._check(collective, num_bytes, key[2])
            self._known[key] = self._find(collective, num_bytes, key[2], is_blocking)
        return self._known[key]

    def _check(self, collective: Collective, num_bytes: int, ranks: tuple[int, ...]) -> None:
        if len(set(ranks)) != len(ranks) or not all(0 <= rank < self.cluster.num_ranks for rank in ranks):
            have = f"{self.cluster.name} has ranks 0 to {self.cluster.num_ranks - 1}"
            raise HardwareError(
                f"a group needs different ranks of the cluster; got {list(ranks)}, and {have}"
            )
        if collective is Collective.POINT_TO_POINT and len(ranks) != 2:
            raise HardwareError(
                f"a point-to-point message has a source and a target; got ranks {list(ranks)}"
            )
        assert num_bytes >= 0

    def _find(
        self, collective: Collective, num_bytes: int, ranks: tuple[int, ...], is_blocking: bool
    ) -> CollectiveCost:
        extra_s = self._table.blocking_extra_s.value if is_blocking else 0.0
        if len(ranks) < 2 or num_bytes == 0:
            return CollectiveCost(
                collective, ranks, num_bytes, extra_s, 0, 1e18, (), 1, Tag.DATA_SHEET, "no traffic"
            )
        wire_bytes = math.ceil(bus_factor(collective, len(ranks)) * num_bytes)
        loads, num_rings, wire_limit = self._ring(collective, ranks)
        hosts = {self.topology.host_of(rank) for rank in ranks}
        fit = self._fit(collective, len(ranks)) if len(hosts) == 1 else None
        if fit is not None:
            row, tag = fit
            fixed_s = row.fixed_s + row.seconds_per_root_byte * math.sqrt(_fitted_size(collective, num_bytes))
            bandwidth, source = min(row.bandwidth_bytes_per_s, wire_limit), self._table.fits_source
        else:
            fixed_s, bandwidth = self._prior(collective, wire_bytes, ranks, wire_limit)
            tag, source = self._prior_provenance(ranks)
        fixed_s += extra_s
        return CollectiveCost(
            collective, ranks, num_bytes, fixed_s, wire_bytes, bandwidth, loads, num_rings, tag, source
        )

    def _fit(self, collective: Collective, num_ranks: int) -> tuple[CollectiveFit, Tag] | None:
        """The fitted row of a collective and group size, of its stand-in, or between two sizes."""
        rows = self._fits.get(collective)
        tag = self._table.fits_tag
        if not rows:
            stand_in = _STAND_INS.get(collective)
            rows, tag = (self._fits.get(stand_in), Tag.INTERPOLATED) if stand_in is not None else (None, tag)
        if not rows:
            return None
        if collective is Collective.POINT_TO_POINT:
            return rows[0], tag
        exact = next((row for row in rows if row.num_ranks == num_ranks), None)
        if exact is not None:
            return exact, tag
        if not rows[0].num_ranks < num_ranks < rows[-1].num_ranks:
            return None
        above = next(index for index, row in enumerate(rows) if row.num_ranks > num_ranks)
        return _between(rows[above - 1], rows[above], num_ranks), Tag.INTERPOLATED

    def _prior(
        self, collective: Collective, wire_bytes: int, ranks: tuple[int, ...], wire_limit: float
    ) -> tuple[float, float]:
        """NCCL's own model: fixed time and bandwidth of its best protocol at this size."""
        num_hosts = len({self.topology.host_of(rank) for rank in ranks})
        passes = 2 if collective is Collective.ALL_REDUCE else 1
        is_one_hop = collective is Collective.POINT_TO_POINT
        network_hops = (1 if is_one_hop else passes * (num_hosts - 1)) if num_hosts > 1 else 0
        local_hops = 1 - network_hops if is_one_hop else passes * (len(ranks) - 1) - network_hops
        limit = min(wire_limit, self._asymptote(collective))
        if self.cluster.model_of(ranks[0]).kind is DeviceKind.CPU:
            route = self.topology.route(ranks[0], ranks[1])
            hop_s = route.latency_ns / NANOSECONDS + self._table.per_message_s.value
            return (network_hops + local_hops) * hop_s, limit
        choices = []
        for protocol in _PROTOCOLS:
            hop_us = protocol.nvlink_hop_us if self._has_nvlink else protocol.pcie_hop_us
            base_us = protocol.base_us + local_hops * hop_us + network_hops * protocol.network_hop_us
            bandwidth = min(limit * protocol.efficiency, protocol.cap_bytes_per_s)
            choices.append((base_us * 1e-6 + wire_bytes / bandwidth, base_us * 1e-6, bandwidth))
        _, fixed_s, bandwidth = min(choices)
        return fixed_s, bandwidth

    def _prior_provenance(self, ranks: tuple[int, ...]) -> tuple[Tag, str]:
        """NCCL's constants; between processors, the weakest of the figures that a message is made of."""
        if self.cluster.model_of(ranks[0]).kind is not DeviceKind.CPU:
            return Tag.DATA_SHEET, PRIOR_SOURCE
        figures = [self._table.per_message_s]
        for link in self.cluster.links:
            figures += [link.bandwidth_bytes_per_s, link.latency_s]
        weakest = max(figures, key=lambda figure: list(Tag).index(figure.tag))
        return weakest.tag, weakest.source

    def _asymptote(self, collective: Collective) -> float:
        """The best bus bandwidth of the largest fitted group: a ring over hosts is no faster inside them."""
        rows = self._fits.get(collective) or self._fits.get(_STAND_INS.get(collective, collective)) or []
        return rows[-1].bandwidth_bytes_per_s if rows else math.inf

    @property
    def _has_nvlink(self) -> bool:
        return any(link.kind is LinkKind.NVLINK for link in self.cluster.links)

    def _ring(
        self, collective: Collective, ranks: tuple[int, ...]
    ) -> tuple[tuple[tuple[int, int], ...], int, float]:
        """Channels of the rings over `ranks`, their number, and the bandwidth that the channels leave them.

        Within a host, one ring in rank order. Over hosts, one ring for each rank of a host: each enters and
        leaves a host by another network card, as NCCL's channels do.
        """
        if collective is Collective.POINT_TO_POINT:
            route = self.topology.route(*ranks)
            return route.loads, 1, float(route.bandwidth_bytes_per_s)
        if ranks not in self._rings:
            self._rings[ranks] = self._find_ring(ranks)
        return self._rings[ranks]

    def _find_ring(self, ranks: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], int, float]:
        by_host: dict[int, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self.topology.host_of(rank), []).append(rank)
        num_rings = min(len(members) for members in by_host.values()) if len(by_host) > 1 else 1
        crossed: Counter[int] = Counter()
        for ring in range(num_rings):
            order = [rank for members in by_host.values() for rank in (*members[ring:], *members[:ring])]
            for source, target in zip(order, order[1:] + order[:1], strict=True):
                for channel, times in self.topology.route(source, target).loads:
                    crossed[channel] += times
        channels = self.topology.channels
        share = (
            min(channels[channel].capacity_bytes_per_s / times for channel, times in crossed.items())
            * num_rings
        )
        efficiency = _NETWORK_EFFICIENCY if len(by_host) > 1 else 1.0
        return tuple(sorted(crossed.items())), num_rings, share * efficiency


_STAND_INS: Final = {
    Collective.BROADCAST: Collective.ALL_GATHER,
    Collective.POINT_TO_POINT: Collective.ALL_TO_ALL,
    Collective.REDUCE_SCATTER: Collective.ALL_GATHER,
}
"""Whose fit answers where a collective was not measured: the same ring, or (for one message) an exchange of
two.
"""


def bus_factor(collective: Collective, num_ranks: int) -> float:
    """Bytes that a rank's link carries, per byte of S (nccl-tests, PERFORMANCE.md).

    >>> bus_factor(Collective.ALL_GATHER, 4), bus_factor(Collective.ALL_REDUCE, 4)
    (0.75, 1.5)
    """
    match collective:
        case Collective.BROADCAST | Collective.POINT_TO_POINT:
            return 1.0
        case Collective.ALL_REDUCE:
            return 2 * (num_ranks - 1) / num_ranks
        case _:
            return (num_ranks - 1) / num_ranks


def _fitted_size(collective: Collective, num_bytes: int) -> int:
    """The S at which to read a fit: a message of M bytes is an all-to-all of two with S = 2 M."""
    return 2 * num_bytes if collective is Collective.POINT_TO_POINT else num_bytes


def _between(below: CollectiveFit, above: CollectiveFit, num_ranks: int) -> CollectiveFit:
    """A group size between two fitted ones: linear in the logarithm of the number of ranks; 1/B, not B."""
    share = math.log(num_ranks / below.num_ranks) / math.log(above.num_ranks / below.num_ranks)

    def mix(first: float, second: float) -> float:
        return first + share * (second - first)

    return CollectiveFit(
        collective=below.collective,
        num_ranks=num_ranks,
        fixed_s=mix(below.fixed_s, above.fixed_s),
        seconds_per_root_byte=mix(below.seconds_per_root_byte, above.seconds_per_root_byte),
        bandwidth_bytes_per_s=1 / mix(1 / below.bandwidth_bytes_per_s, 1 / above.bandwidth_bytes_per_s),
        mean_error=max(below.mean_error, above.mean_error),
    )
