"""Hardware as data: what a machine can do, as frozen values that each say where they come from.

Invariant: every number that may change a prediction is a `Figure` (value, tag, source), or a row of a table
whose rows carry a tag and a source. Nothing here reads a file; `distri.config.hardware` is the parser, and it
is the place that refuses. Units are in the names: `_s`, `_bytes`, `_bytes_per_s`, `_flops_per_s` (multiply
and add count as two).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import networkx as nx

_STRICT: Final[dict[str, Any]] = {"extra": "forbid"}
"""Read by pydantic when it parses these dataclasses: an unknown key is an error."""


class Word(str, Enum):
    """An enum whose members are written, in text and in messages, as their values."""

    __str__ = str.__str__


class Tag(Word):
    """How a figure is known, from best to worst."""

    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    FITTED = "fitted"
    DATA_SHEET = "data sheet"
    ASSUMED = "assumed"


class DeviceKind(Word):
    """What computes: it decides which bounds of plausibility hold and whether there is a launch queue."""

    GPU = "gpu"
    CPU = "cpu"


class NodeKind(Word):
    """What stands at a vertex of the link graph."""

    DEVICE = "device"
    NVSWITCH = "nvswitch"
    PCIE_SWITCH = "pcie_switch"
    ROOT_COMPLEX = "root_complex"
    HOST_MEMORY = "host_memory"
    NIC = "nic"
    NETWORK_SWITCH = "network_switch"


class LinkKind(Word):
    """What an edge of the link graph is made of."""

    NVLINK = "nvlink"
    PCIE = "pcie"
    SOCKET = "socket"
    MEMORY = "memory"
    INFINIBAND = "infiniband"
    ETHERNET = "ethernet"
    VIRTUAL = "virtual"


class Duplex(Word):
    """Whether the two directions of a link have a capacity each (full) or share one (half)."""

    FULL = "full"
    HALF = "half"


class Collective(Word):
    """The communication patterns that have a cost."""

    ALL_GATHER = "all_gather"
    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    BROADCAST = "broadcast"
    POINT_TO_POINT = "point_to_point"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, in the SI unit that its field's name ends with, and where it comes from."""

    value: float
    tag: Tag
    source: str


@dataclass(frozen=True)
class GemmParameters:
    """Free parameters of the matrix-product model of `distri.simulator.compute`.

    `efficiency`: share of peak of an endless product of the largest tile. `k_half`: columns of k that cost
    what a tile's prologue costs. `tile_side`: side of the square tile that reaches half of `efficiency`.
    `split_s`: extra time of a product split along k. `floor_s`: the shortest product.
    """

    efficiency: Figure
    k_half: Figure
    tile_side: Figure
    memory_efficiency: Figure
    split_s: Figure
    floor_s: Figure

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class AttentionParameters:
    """Free parameters of the fused attention model: a block of `tile_rows` queries walks over all the keys.

    `kv_half`: keys that cost what a block's prologue costs. `head_dim_half`: head dimension that reaches half
    of `efficiency`.
    """

    efficiency: Figure
    kv_half: Figure
    head_dim_half: Figure
    tile_rows: Figure
    memory_efficiency: Figure
    floor_s: Figure

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class StreamingParameters:
    """Normalisation, element-wise, resample and concatenation: bytes over achieved bandwidth, and a floor."""

    memory_efficiency: Figure
    floor_s: Figure

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class ComputeParameters:
    """The analytic compute model of one kind of device.

    `convolution_efficiency` is relative to a GEMM's. `kernel_gap_s` is what the device idles between a kernel and the
    one that depends on it, even in a CUDA graph.
    """

    gemm: GemmParameters
    attention: AttentionParameters
    streaming: StreamingParameters
    convolution_efficiency: Figure
    kernel_gap_s: Figure

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class DeviceModel:
    """One kind of device: peak rates by dtype, memory, launch costs and the analytic model's parameters.

    `reserved_bytes` is what the driver, the framework and the libraries keep on the device. `peer_to_peer`
    says whether two such devices reach each other's memory; where they do not, every message goes through the
    host's.
    """

    kind: DeviceKind
    peak_flops_per_s: Mapping[str, Figure]
    memory_bytes: Figure
    memory_bandwidth_bytes_per_s: Figure
    num_multiprocessors: Figure
    peer_to_peer: bool
    launch_eager_s: Figure
    launch_graph_s: Figure
    reserved_bytes: Figure
    compute: ComputeParameters

    __pydantic_config__ = _STRICT

    def with_figures(self, figures: Mapping[str, Figure]) -> DeviceModel:
        """This model with other parameters of its compute model, named as `kernel_gap_s` or `gemm.efficiency`.

        What calibration makes. Raises TypeError for a name that there is not.
        """
        compute = self.compute
        for name, figure in figures.items():
            group, _, field_name = name.rpartition(".")
            changes: dict[str, Any] = {field_name: figure}
            if group:
                changes = {group: replace(getattr(compute, group), **changes)}
            compute = replace(compute, **changes)
        return replace(self, compute=compute)


@dataclass(frozen=True)
class Device:
    """One rank's device: its place in the cluster and the name of its model."""

    rank: int
    node: str
    host: int
    model: str


@dataclass(frozen=True)
class Node:
    """One vertex of the link graph."""

    name: str
    kind: NodeKind


@dataclass(frozen=True)
class Link:
    """One edge of the link graph; the bandwidth is of one direction, of both together if half duplex."""

    source: str
    target: str
    kind: LinkKind
    bandwidth_bytes_per_s: Figure
    latency_s: Figure
    duplex: Duplex = Duplex.FULL


@dataclass(frozen=True)
class CollectiveFit:
    """One collective on one size of group: `t = fixed_s + seconds_per_root_byte sqrt(S) + f S / bandwidth`.

    S is nccl-tests' size in bytes (the total output of an all-gather), f its bus factor: (n-1)/n, twice that
    for an all-reduce. `mean_error` is the mean of |predicted / measured - 1| over the rows fitted to.
    """

    collective: Collective
    num_ranks: int
    fixed_s: float
    seconds_per_root_byte: float
    bandwidth_bytes_per_s: float
    mean_error: float

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Collectives:
    """The collectives of a cluster: fitted rows (one tag and source for all), and what surrounds a call.

    `compute_slowdown`: by how much kernels beside a collective slow down, as a share of their time, when the
    communication has `default_ctas` thread blocks. `buffer_bytes` by number of ranks.
    """

    library: str
    blocking_extra_s: Figure
    per_message_s: Figure
    default_ctas: Figure
    compute_slowdown: Figure
    buffer_bytes: Mapping[int, Figure]
    fits_tag: Tag = Tag.FITTED
    fits_source: str = ""
    fits: tuple[CollectiveFit, ...] = ()

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Cluster:
    """Devices in rank order, the graph of links between them, and what their collectives cost.

    Frozen and free of any rank's point of view. The graph is a value too: `graph()` builds a fresh networkx
    graph, `distri.simulator.topology.Topology` holds one and its routes.
    """

    name: str
    title: str
    num_hosts: int
    models: Mapping[str, DeviceModel]
    devices: tuple[Device, ...]
    nodes: tuple[Node, ...]
    links: tuple[Link, ...]
    collectives: Collectives
    aliases: tuple[str, ...] = field(default=())

    @property
    def num_ranks(self) -> int:
        """How many devices there are; rank r is `devices[r]`."""
        return len(self.devices)

    def model_of(self, rank: int) -> DeviceModel:
        """The device model of a rank."""
        return self.models[self.devices[rank].model]

    def graph(self) -> nx.Graph[str]:
        """An undirected networkx graph; nodes carry `kind`, edges carry their `Link` as `link`."""
        import networkx as nx

        graph: nx.Graph[str] = nx.Graph(name=self.name)
        for node in self.nodes:
            graph.add_node(node.name, kind=node.kind)
        for link in self.links:
            graph.add_edge(link.source, link.target, link=link)
        return graph
