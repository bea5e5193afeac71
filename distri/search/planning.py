"""From a question to an answer: recalled if it was asked before, searched for if not. What commands call."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distri.core.planner import to_jsonable
from distri.search import cache
from distri.search.request import SearchRequest

if TYPE_CHECKING:
    from distri.core.graph import LayerGraph
    from distri.simulator.costs import ComputeFactory

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Question:
    """A request about a model and a machine, by name. `graph_files` are what the model's layers depend on.

    profile: measured layer times of that machine. launch: how kernels are started, `graph` or `eager`.
    """

    request: SearchRequest
    hardware: str
    hosts: int | None
    graph_files: tuple[Path, ...]
    load_graph: Callable[[], LayerGraph]
    profile: Path | None = None
    launch: str = "graph"
    has_pareto: bool = False


def answer(question: Question, progress: Progress | None = None) -> dict[str, Any]:
    """The plan's JSON under `plan`, commentary under `search`, and whether it was recalled.

    Raises:
        UserError: nothing is possible; the sentence says what binds.
    """
    files = [*cache.hardware_files(question.hardware), *question.graph_files]
    if question.profile is not None:
        files.append(question.profile)
    asked = [
        to_jsonable(dataclasses.replace(question.request)), question.hardware, question.hosts,
        question.launch, question.has_pareto,
    ]  # fmt: skip
    key = cache.key_of(asked, files)
    kept = cache.recall(key)
    if kept is not None:
        return {**kept, "is_recalled": True}
    with _without_collector():
        made = _search(question, progress)
    cache.remember(key, made)
    return {**made, "is_recalled": False}


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """A search makes millions of small values and no cycles: looking for cycles takes a fifth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _search(question: Question, progress: Progress | None) -> dict[str, Any]:
    from distri.config.hardware import load_cluster
    from distri.config.plan import dump_plan
    from distri.search.answer import make_answer
    from distri.search.find import Search
    from distri.simulator.compute import LaunchMode
    from distri.simulator.options import SimulationOptions

    cluster = load_cluster(question.hardware, question.hosts)
    if question.hosts is None and question.request.num_devices > cluster.num_ranks:
        per_host = cluster.num_ranks // cluster.num_hosts
        cluster = load_cluster(question.hardware, -(-question.request.num_devices // per_host))
    search = Search(
        question.load_graph(),
        cluster,
        question.request,
        compute=_compute(question),
        options=SimulationOptions(launch=LaunchMode(question.launch)),
    )
    plan, commentary = make_answer(search, search.run(progress), question.has_pareto)
    return {"plan": dump_plan(plan), "search": commentary}


def _compute(question: Question) -> ComputeFactory:
    from distri.simulator.compute import AnalyticCompute

    if question.profile is None:
        return AnalyticCompute
    from distri.config.profile import load_profile
    from distri.simulator.measured import MeasuredOperations

    measurements = load_profile(question.profile).measurements
    return lambda device, launch: MeasuredOperations(measurements, AnalyticCompute(device, launch))
