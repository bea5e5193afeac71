"""Plans and clusters that the simulator's tests run on."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import strategies as st

from distri.config.hardware import load_cluster
from distri.core.graph import LayerGraph
from distri.core.latent import LatentPlace
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.models.presets import load_graph
from distri.simulator.hardware import Cluster
from distri.simulator.lowering import Lowering
from distri.simulator.options import SimulationOptions
from distri.simulator.tasks import TaskList

POLICIES = ("corrected", "stale", "fresh", "sync_gn", "separate_gn", "no_sync", "naive_patch", "extrapolated")
PATTERNS = ("neighbours", "gather_all")
PLACES = tuple(LatentPlace)


@cache
def graph_of(name: str = "demo") -> LayerGraph:
    return load_graph(name)


@cache
def cluster_of(name: str = "a100-sxm") -> Cluster:
    return load_cluster(name)


@cache
def lowering_of(
    hardware: str = "a100-sxm", options: SimulationOptions | None = None, model: str = "demo"
) -> Lowering:
    return Lowering(graph_of(model), cluster_of(hardware), options or SimulationOptions())


@cache
def plan_of(
    num_ranks: int = 4,
    policy: str = "corrected",
    pattern: str = "neighbours",
    *,
    model: str = "demo",
    size: int = 512,
    steps: int = 12,
    warmup_steps: int = 3,
    cfg_split: bool = False,
    layers_per_bucket: int = 20,
    **more: Any,
) -> Plan:
    request = PlanRequest(
        ImageRequest(size, size, steps), num_ranks, cfg_split, policy_table(policy), warmup_steps,
        dtype="float16", pattern=pattern, layers_per_bucket=layers_per_bucket, **more,
    )  # fmt: skip
    return make_plan(request, graph_of(model))


def tasks_of(plan: Plan, hardware: str = "a100-sxm", options: SimulationOptions | None = None) -> TaskList:
    return lowering_of(hardware, options).lower(plan)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans that differ in everything that the simulator's schedule depends on."""
    num_ranks = draw(st.sampled_from((2, 4, 8)))
    pattern = draw(st.sampled_from(PATTERNS))
    return plan_of(
        num_ranks,
        draw(st.sampled_from(POLICIES)),
        pattern,
        steps=draw(st.sampled_from((1, 2, 4, 9, 25))),
        warmup_steps=draw(st.integers(1, 4)),
        cfg_split=draw(st.booleans()),
        layers_per_bucket=draw(st.sampled_from((1, 7, 60))),
        latent=draw(st.sampled_from(PLACES)) if pattern == "neighbours" else LatentPlace.WHOLE,
    )
