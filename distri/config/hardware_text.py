"""The shape of a hardware file, and its expansion into a `Cluster`.

One host is written once, and names count in brackets.

`gpu[0-7]` names eight nodes, `pcie[0,0,1,1]` four in that order; the two ends of a link are zipped, and a
single end is repeated. Every host is a copy of `host`, its nodes prefixed with `host0/`, `host1/`; `network`
joins them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from distri.config.marked_yaml import Location, Marked
from distri.simulator.hardware import (
    _STRICT,
    Cluster,
    Collectives,
    Device,
    DeviceModel,
    Duplex,
    Figure,
    Link,
    LinkKind,
    Node,
    NodeKind,
)

MAX_DEVICES: Final = 1024
MAX_LINKS: Final = 32768
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_COUNTED: Final = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*)\[([0-9,\- ]+)\]")


@dataclass(frozen=True)
class DevicesText:
    """Some devices of a host: their names and their model."""

    name: str
    model: str

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class NodesText:
    """Some vertices of the graph that are not devices."""

    name: str
    kind: NodeKind

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class LinksText:
    """Some edges of the graph, with the same figures."""

    between: tuple[str, str]
    kind: LinkKind
    bandwidth_bytes_per_s: Figure
    latency_s: Figure
    duplex: Duplex = Duplex.FULL

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class HostText:
    """What every host has."""

    devices: tuple[DevicesText, ...]
    nodes: tuple[NodesText, ...] = ()
    links: tuple[LinksText, ...] = ()

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class NetworkText:
    """What joins the hosts: each link goes from a node of every host to a node of the network."""

    nodes: tuple[NodesText, ...]
    links: tuple[LinksText, ...]

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class HardwareText:
    """A whole hardware file."""

    version: int
    name: str
    title: str
    device_models: Mapping[str, DeviceModel]
    host: HostText
    collectives: Collectives
    num_hosts: int = 1
    network: NetworkText | None = None
    aliases: tuple[str, ...] = ()
    sources: Mapping[str, str] | None = None
    extends: str | None = None

    __pydantic_config__ = _STRICT


def expand(text: HardwareText, marked: Marked) -> Cluster:
    """The cluster that a file describes; `HardwareError` by line and field where it contradicts itself."""
    if text.num_hosts > 1 and text.network is None:
        raise marked.error(
            ("num_hosts",), f"{text.num_hosts} hosts need a 'network' that joins them; this file has none"
        )
    devices, nodes = _nodes(text, marked)
    known = {node.name for node in nodes}
    links = tuple(_links(text, marked, known))
    if len(links) > MAX_LINKS:
        raise marked.error(("host", "links"), f"{len(links)} links in all; at most {MAX_LINKS} are supported")
    return Cluster(
        name=text.name,
        title=text.title,
        num_hosts=text.num_hosts,
        models=text.device_models,
        devices=devices,
        nodes=nodes,
        links=links,
        collectives=text.collectives,
        aliases=text.aliases,
    )


def names_of(pattern: str, marked: Marked, location: Location) -> tuple[str, ...]:
    """The names that a pattern counts: `gpu[0-2]` is gpu0, gpu1, gpu2; a plain name is itself."""
    if _NAME.fullmatch(pattern):
        return (pattern,)
    match = _COUNTED.fullmatch(pattern)
    if match is None:
        raise marked.error(location, f"{pattern!r} is not a name such as nvswitch, gpu[0-7] or pcie[0,0,1,1]")
    numbers: list[int] = []
    for part in match.group(2).replace(" ", "").split(","):
        ends = part.split("-")
        if (
            len(ends) > 2
            or not all(re.fullmatch(r"\d{1,5}", end) for end in ends)
            or int(ends[0]) > int(ends[-1])
        ):
            raise marked.error(
                location, f"{pattern!r} has the malformed range {part!r}; write it as 0-7 or 0,0,1,1"
            )
        if int(ends[-1]) >= MAX_DEVICES:
            raise marked.error(location, f"{pattern!r} counts past {MAX_DEVICES}, the most that is supported")
        numbers.extend(range(int(ends[0]), int(ends[-1]) + 1))
    if len(numbers) > MAX_DEVICES:
        raise marked.error(
            location, f"{pattern!r} names {len(numbers)} nodes; at most {MAX_DEVICES} are supported"
        )
    return tuple(f"{match.group(1)}{number}" for number in numbers)


def _nodes(text: HardwareText, marked: Marked) -> tuple[tuple[Device, ...], tuple[Node, ...]]:
    local_devices: list[tuple[str, str]] = []
    local: dict[str, NodeKind] = {}
    for index, group in enumerate(text.host.devices):
        location: Location = ("host", "devices", index, "model")
        if group.model not in text.device_models:
            known = ", ".join(text.device_models) or "none"
            raise marked.error(location, f"unknown device model {group.model!r}; device_models has: {known}")
        at: Location = ("host", "devices", index, "name")
        names = _new_names(group.name, local, NodeKind.DEVICE, marked, at)
        local_devices.extend((name, group.model) for name in names)
    for index, nodes in enumerate(text.host.nodes):
        _new_names(
            nodes.name,
            local,
            _not_a_device(nodes.kind, marked, index),
            marked,
            ("host", "nodes", index, "name"),
        )
    if not local_devices:
        raise marked.error(("host", "devices"), "a host needs at least one device")
    if len(local_devices) * text.num_hosts > MAX_DEVICES:
        raise marked.error(
            ("num_hosts",), f"more than {MAX_DEVICES} devices in all, the most that is supported"
        )
    shared: dict[str, NodeKind] = {}
    for index, nodes in enumerate(text.network.nodes if text.network is not None else ()):
        _new_names(nodes.name, shared, nodes.kind, marked, ("network", "nodes", index, "name"))
    hosts = range(text.num_hosts)
    places = [(host, name, model) for host in hosts for name, model in local_devices]
    devices = tuple(Device(rank, f"host{h}/{name}", h, model) for rank, (h, name, model) in enumerate(places))
    all_nodes = [Node(f"host{host}/{name}", kind) for host in hosts for name, kind in local.items()]
    return devices, (*all_nodes, *(Node(name, kind) for name, kind in shared.items()))


def _new_names(
    pattern: str, known: dict[str, NodeKind], kind: NodeKind, marked: Marked, location: Location
) -> tuple[str, ...]:
    names = names_of(pattern, marked, location)
    for name in names:
        if name in known:
            raise marked.error(location, f"the name {name!r} is given twice; names are unique within a host")
        known[name] = kind
    return names


def _not_a_device(kind: NodeKind, marked: Marked, index: int) -> NodeKind:
    if kind is NodeKind.DEVICE:
        raise marked.error(
            ("host", "nodes", index, "kind"), "devices are listed under 'devices', with their model"
        )
    return kind


def _links(text: HardwareText, marked: Marked, known: set[str]) -> Iterator[Link]:
    seen: set[frozenset[str]] = set()
    for index, group in enumerate(text.host.links):
        for source, target in _ends(group, marked, ("host", "links", index)):
            for host in range(text.num_hosts):
                ends = (f"host{host}/{source}", f"host{host}/{target}")
                yield _link(group, ends, known, seen, marked, ("host", "links", index))
    for index, group in enumerate(text.network.links if text.network is not None else ()):
        for source, target in _ends(group, marked, ("network", "links", index)):
            for host in range(text.num_hosts):
                ends = (f"host{host}/{source}", target)
                yield _link(group, ends, known, seen, marked, ("network", "links", index))


def _ends(group: LinksText, marked: Marked, location: Location) -> list[tuple[str, str]]:
    first, second = (
        names_of(pattern, marked, (*location, "between", end)) for end, pattern in enumerate(group.between)
    )
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        problem = (
            f"{group.between[0]!r} names {len(first)} nodes and {group.between[1]!r} names {len(second)}"
        )
        raise marked.error((*location, "between"), f"{problem}; give as many at both ends, or one at one end")
    count = max(len(first), len(second))
    return list(zip(first * (count // len(first)), second * (count // len(second)), strict=True))


def _link(
    group: LinksText,
    ends: tuple[str, str],
    known: set[str],
    seen: set[frozenset[str]],
    marked: Marked,
    location: Location,
) -> Link:
    for end in ends:
        if end not in known:
            name = end.split("/", 1)[-1]
            raise marked.error(
                (*location, "between"), f"unknown device or node {name!r}; list it before linking it"
            )
    pair = frozenset(ends)
    names = " and ".join(end.split("/", 1)[-1] for end in ends)
    if len(pair) == 1:
        raise marked.error((*location, "between"), f"{ends[0].split('/', 1)[-1]!r} is linked to itself")
    if pair in seen:
        raise marked.error(
            (*location, "between"), f"{names} are linked twice; give one link with the total bandwidth"
        )
    seen.add(pair)
    return Link(*ends, group.kind, group.bandwidth_bytes_per_s, group.latency_s, group.duplex)
