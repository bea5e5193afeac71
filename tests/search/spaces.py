"""Small graphs, clusters and requests that the tests of the search run on."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from hypothesis import strategies as st

from distri.config.hardware import load_cluster
from distri.core.graph import LayerGraph, Operation, OperationKind
from distri.core.ops.conv2d import ConvGeometry
from distri.core.partition import SplitAxis
from distri.core.plan import ImageRequest
from distri.models.presets import load_graph
from distri.search.find import Search
from distri.search.request import ALL, Limits, Objective, Risk, SearchRequest
from distri.search.space import Layout, Serving
from distri.simulator.hardware import Cluster, Figure
from distri.simulator.longest_path import longest_path_ns
from distri.simulator.simulate import simulate

SMALL = Limits(
    axes=(SplitAxis.ROWS, SplitAxis.GRID),
    warmup_steps=(1, 2),
    layers_per_bucket=(2, ALL),
    tolerance=0.0,
    slack=0.0,
    max_settled=10**6,
)


@cache
def graph_of(name: str) -> LayerGraph:
    return load_graph(name)


@cache
def cluster_of(name: str, hosts: int | None = None) -> Cluster:
    return load_cluster(name, hosts)


def small_graph(channels: int, num_blocks: int, has_attention: bool) -> LayerGraph:
    """Convolutions and norms at two levels, attention at the deeper one."""
    made: list[Operation] = []

    def add(path: str, kind: OperationKind, inputs: list[tuple[int | str, ...]], out: tuple[int | str, ...],
            parents: tuple[int, ...], geometry: ConvGeometry | None = None, groups: int = 1) -> int:  # fmt: skip
        made.append(
            Operation(len(made), path, kind, tuple(inputs), out, parents, 9 * channels, geometry, groups)
        )
        return len(made) - 1

    plain = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
    down = ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1))
    top: tuple[int | str, ...] = ("B", channels, "H/1", "W/1")
    deep: tuple[int | str, ...] = ("B", channels, "H/2", "W/2")
    tokens: tuple[int | str, ...] = ("B", "HW/2", channels)
    at = add("conv_in", OperationKind.CONVOLUTION, [("B", 4, "H/1", "W/1")], top, (), plain)
    for block in range(num_blocks):
        at = add(f"down.{block}.norm", OperationKind.GROUP_NORM, [top], top, (at,), groups=2)
        at = add(f"down.{block}.conv", OperationKind.CONVOLUTION, [top], top, (at,), plain)
    at = add("down.s.conv", OperationKind.CONVOLUTION, [top], deep, (at,), down)
    at = add("mid.0.norm", OperationKind.GROUP_NORM, [deep], deep, (at,), groups=2)
    at = add("mid.0.conv", OperationKind.CONVOLUTION, [deep], deep, (at,), plain)
    if has_attention:
        parts = tuple(
            add(f"mid.1.{name}", OperationKind.LINEAR, [tokens], tokens, (at,)) for name in ("q", "k", "v")
        )
        at = add("mid.1.attn", OperationKind.SELF_ATTENTION, [tokens] * 3, tokens, parts)
    at = add("up.resample", OperationKind.RESAMPLE, [deep], top, (at,))
    add("conv_out", OperationKind.CONVOLUTION, [top], ("B", 4, "H/1", "W/1"), (at,), plain)
    return LayerGraph("small", tuple(made), 4, 8)


def with_bandwidth(cluster: Cluster, share: float) -> Cluster:
    """The cluster with all links at a share of their rate."""
    links = tuple(
        dataclasses.replace(
            link,
            bandwidth_bytes_per_s=Figure(
                link.bandwidth_bytes_per_s.value * share, link.bandwidth_bytes_per_s.tag, "a test"
            ),
        )
        for link in cluster.links
    )
    return dataclasses.replace(cluster, links=links)


@st.composite
def graphs(draw: st.DrawFn) -> LayerGraph:
    return small_graph(draw(st.sampled_from((32, 320))), draw(st.integers(1, 2)), draw(st.booleans()))


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    name = draw(st.sampled_from(("a100-sxm", "rtx4090")))
    return with_bandwidth(cluster_of(name), draw(st.sampled_from((1.0, 0.1, 0.01))))


@st.composite
def requests(draw: st.DrawFn) -> SearchRequest:
    num_devices = draw(st.integers(2, 3))
    slow = draw(st.sampled_from((None, 0, num_devices - 1)))
    return SearchRequest(
        ImageRequest(draw(st.sampled_from((256, 1024))), 512, draw(st.integers(3, 5)), draw(st.booleans())),
        num_devices,
        "float16",
        objective=draw(st.sampled_from((Objective.LATENCY, Objective.DEVICE_SECONDS, Objective.THROUGHPUT))),
        max_risk=draw(st.sampled_from((Risk.FRESH, Risk.CORRECTED, Risk.STALE, Risk.LOCAL))),
        speeds=() if slow is None else ((slow, 0.5),),
        limits=dataclasses.replace(SMALL, has_deep_rules=draw(st.booleans())),
    )


def every_candidate(search: Search) -> list[tuple[Layout, Serving]]:
    """All candidates of a search, listed one by one."""
    from distri.search.find import _Run

    run = _Run(search, None)
    found = []
    for layout in search.layouts():
        structures = search._structures[:1] if layout.patches == 1 else search._structures
        for structure in structures:
            found += [(layout, serving) for serving in run._servings(layout, structure)]
    return found


def brute_force(search: Search, claimed: float) -> dict[tuple[Layout, Serving], float]:
    """The objective of every candidate that fits, by the simulator, from its full plan.

    Sharing links makes no plan faster (tests/simulator): one that is worse than `claimed` without it is left out.
    """
    values = {}
    for layout, serving in every_candidate(search):
        plan = search.sketcher.plan(layout, serving)
        lowering = search.bounder(layout).lowering
        if search.value(layout, longest_path_ns(lowering.lower(plan))) > claimed * (1 + 1e-6):
            continue
        result = simulate(plan, search.graph, lowering.cluster, search.options)
        if all(search.memory.fits(use) for use in result.memory):
            values[layout, serving] = search.value(layout, result.latency_s * 1e9)
    return values


def search_for(
    side: int = 1024,
    num_devices: int = 8,
    hardware: str = "a100-sxm",
    model: str = "sdxl",
    steps: int = 50,
    guidance: bool = True,
    **more: Any,
) -> Search:
    image = ImageRequest(side, side, steps, guidance)
    return Search(graph_of(model), cluster_of(hardware), SearchRequest(image, num_devices, "float16", **more))
