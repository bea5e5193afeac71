"""Routes through the link graph, and the channels that flows share.

Invariants: a route never passes through a third device; a device without peer-to-peer access is reached
through its host's memory only; the same cluster gives the same routes. A full-duplex link is two channels, a
half-duplex link one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations
from typing import TYPE_CHECKING, Any, Final

from distri.errors import HardwareError
from distri.simulator.hardware import Cluster, Duplex, Link, NodeKind

if TYPE_CHECKING:
    import networkx as nx

NANOSECONDS: Final = 1_000_000_000
_ROUTING_BYTES: Final = 2**20
"""Routes are the fastest ones for a message of this size."""


@dataclass(frozen=True)
class Channel:
    """One direction of a link (or both, half duplex): what concurrent flows share."""

    name: str
    capacity_bytes_per_s: int
    link: Link


@dataclass(frozen=True)
class Route:
    """From one rank to another: `loads` are (channel, times that it is crossed), in channel order."""

    source: int
    target: int
    loads: tuple[tuple[int, int], ...]
    latency_ns: int
    bandwidth_bytes_per_s: int

    def alone_ns(self, num_bytes: int) -> int:
        """Time of one message alone on its route: the latencies, then the bytes at the narrowest channel."""
        return self.latency_ns + -(-num_bytes * NANOSECONDS // self.bandwidth_bytes_per_s)


class Topology:
    """A cluster's graph, its channels and its routes (found when first asked for, and kept)."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.graph = cluster.graph()
        channels: list[Channel] = []
        self._channel_of: dict[tuple[str, str], int] = {}
        for link in cluster.links:
            both = link.duplex is Duplex.HALF
            names = [f"{link.source} -- {link.target}"] if both else [f"{link.source} -> {link.target}"]
            names += [] if both else [f"{link.target} -> {link.source}"]
            self._channel_of[link.source, link.target] = len(channels)
            self._channel_of[link.target, link.source] = len(channels) + len(names) - 1
            channels += [Channel(name, int(link.bandwidth_bytes_per_s.value), link) for name in names]
        self.channels = tuple(channels)
        self._routes: dict[tuple[int, int], Route] = {}
        self._likeness: dict[tuple[int, int], int] = {}
        self._kinds: dict[object, int] = {}
        self._pair_loads: dict[tuple[int, ...], tuple[tuple[int, int], ...]] = {}
        self._trees: dict[str, dict[str, list[str]]] = {}
        self._cards: dict[int, list[str]] = {}

    def route(self, source: int, target: int) -> Route:
        """The route of a message between two different ranks. Raises `HardwareError` where there is none."""
        key = (source, target)
        if key not in self._routes:
            self._routes[key] = self._find(source, target)
        return self._routes[key]

    def likeness(self, source: int, target: int) -> int:
        """A number that two routes share if a message takes equally long over either, alone."""
        key = (source, target)
        if key not in self._likeness:
            route = self.route(source, target)
            capacities = tuple(sorted((self.channels[c].capacity_bytes_per_s, n) for c, n in route.loads))
            devices = self.cluster.devices
            is_local = devices[source].host == devices[target].host
            kind = (is_local, devices[source].model, route.latency_ns, capacities)
            self._likeness[key] = self._kinds.setdefault(kind, len(self._kinds))
        return self._likeness[key]

    def pair_loads(self, ranks: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """How often each channel is crossed when every one of `ranks` sends one message to every other."""
        if ranks not in self._pair_loads:
            crossed: Counter[int] = Counter()
            for source, reader in permutations(ranks, 2):
                for channel, times in self.route(source, reader).loads:
                    crossed[channel] += times
            self._pair_loads[ranks] = tuple(sorted(crossed.items()))
        return self._pair_loads[ranks]

    def host_of(self, rank: int) -> int:
        """The host that a rank's device is in."""
        return self.cluster.devices[rank].host

    def _find(self, source: int, target: int) -> Route:
        assert source != target, "a rank sends nothing to itself"
        stops = [
            self.cluster.devices[source].node,
            *self._detours(source, target),
            self.cluster.devices[target].node,
        ]
        crossed: Counter[int] = Counter()
        latency_ns = 0
        for first, second in pairwise(stops):
            path = self._path(first, second)
            for ends in pairwise(path):
                channel = self._channel_of[ends]
                crossed[channel] += 1
                latency_ns += round(self.channels[channel].link.latency_s.value * NANOSECONDS)
        bandwidth = min(self.channels[c].capacity_bytes_per_s // times for c, times in crossed.items())
        return Route(source, target, tuple(sorted(crossed.items())), latency_ns, bandwidth)

    def _detours(self, source: int, target: int) -> list[str]:
        """Where a message must pass: host memory without peer-to-peer access, each end's own network card."""
        is_remote = self.host_of(source) != self.host_of(target)
        sides = []
        for rank in (source, target):
            staged = [] if self.cluster.model_of(rank).peer_to_peer else [self._memory(self.host_of(rank))]
            sides.append(staged + (self._card(rank) if is_remote else []))
        return list(dict.fromkeys([*sides[0], *reversed(sides[1])]))

    def _card(self, rank: int) -> list[str]:
        """The network card of a rank: devices equally near to several cards take one each, in order."""
        nearest = self._nearest_cards(rank)
        if not nearest:
            return []
        sharing = [
            device.rank for device in self.cluster.devices if self._nearest_cards(device.rank) == nearest
        ]
        return [nearest[sharing.index(rank) % len(nearest)]]

    def _nearest_cards(self, rank: int) -> list[str]:
        if rank not in self._cards:
            prefix = f"host{self.host_of(rank)}/"
            cards = [
                n.name for n in self.cluster.nodes if n.kind is NodeKind.NIC and n.name.startswith(prefix)
            ]
            paths = self._tree(self.cluster.devices[rank].node)
            hops = {card: len(paths[card]) for card in cards if card in paths}
            self._cards[rank] = [card for card, number in hops.items() if number == min(hops.values())]
        return self._cards[rank]

    def _memory(self, host: int) -> str:
        found = _memories(self.cluster, host)
        if not found:
            raise HardwareError(
                f"{self.cluster.name}: host {host} has no host_memory for devices without peer-to-peer"
            )
        return found[0]

    def _path(self, source: str, target: str) -> list[str]:
        path = self._tree(source).get(target)
        if path is None:
            raise HardwareError(f"{self.cluster.name}: no links lead from {source} to {target}")
        return path

    def _tree(self, source: str) -> dict[str, list[str]]:
        if source not in self._trees:
            self._trees[source] = _shortest_paths(self.graph, source)
        return self._trees[source]


def _shortest_paths(graph: nx.Graph[str], source: str) -> dict[str, list[str]]:
    """Shortest paths from a node that do not go on through a device. Ties fall to the link listed first."""
    import networkx as nx

    devices = {name for name, node in graph.nodes.items() if node["kind"] is NodeKind.DEVICE}

    def weight(node: str, _: str, edge: dict[str, Any]) -> float | None:
        if node != source and node in devices:
            return None
        link: Link = edge["link"]
        return link.latency_s.value + _ROUTING_BYTES / link.bandwidth_bytes_per_s.value

    return dict(nx.single_source_dijkstra_path(graph, source, weight=weight))


def _memories(cluster: Cluster, host: int) -> list[str]:
    prefix = f"host{host}/"
    return [
        node.name
        for node in cluster.nodes
        if node.kind is NodeKind.HOST_MEMORY and node.name.startswith(prefix)
    ]


def unreachable(cluster: Cluster) -> tuple[int, int, str] | None:
    """The first two ranks that no route joins, and what is missing; None where all reach each other."""
    import networkx as nx

    graph = cluster.graph()
    nodes = {device.node for device in cluster.devices}
    island = {
        name: number
        for number, names in enumerate(nx.connected_components(graph.subgraph(set(graph) - nodes)))
        for name in names
    }
    touches = [frozenset(island[n] for n in graph[device.node] if n in island) for device in cluster.devices]
    for device in cluster.devices:
        memories = {island[name] for name in _memories(cluster, device.host)}
        if not cluster.models[device.model].peer_to_peer and not memories & touches[device.rank]:
            return (0, device.rank, "it has no peer-to-peer access and no link to a host_memory; add one")
    for first, second in combinations(range(cluster.num_ranks), 2):
        direct = graph.has_edge(cluster.devices[first].node, cluster.devices[second].node)
        if not direct and not touches[first] & touches[second]:
            return (first, second, "add a link or a switch that joins them")
    return None
