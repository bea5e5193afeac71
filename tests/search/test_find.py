"""The search finds what brute force finds, says the same twice, and says what binds when nothing is possible."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings

from distri.core.graph import LayerGraph
from distri.core.plan import ImageRequest
from distri.errors import HardwareError, PlanError
from distri.search import find
from distri.search.answer import make_answer
from distri.search.find import Search
from distri.search.quality import QualityRow, QualityTable
from distri.search.request import Objective, SearchRequest
from distri.simulator.hardware import Cluster
from distri.simulator.simulate import simulate
from tests.search.spaces import (
    SMALL,
    brute_force,
    cluster_of,
    clusters,
    every_candidate,
    graph_of,
    graphs,
    requests,
    search_for,
    small_graph,
)


@settings(max_examples=15)
@given(graph=graphs(), cluster=clusters(), request=requests())
def test_the_pruned_search_finds_the_optimum_of_brute_force(
    graph: LayerGraph, cluster: Cluster, request: SearchRequest
) -> None:
    search = Search(graph, cluster, request)
    found = search.run()
    everything = brute_force(search, found.best.value)
    assert found.counts.considered == len(every_candidate(search))
    assert found.best.value == pytest.approx(min(everything.values()), rel=1e-9)
    assert everything[found.best.layout, found.best.serving] == pytest.approx(found.best.value, rel=1e-9)


@settings(max_examples=5)
@given(graph=graphs(), cluster=clusters(), request=requests())
def test_every_bound_is_below_what_it_bounds(
    graph: LayerGraph, cluster: Cluster, request: SearchRequest
) -> None:
    search = Search(graph, cluster, request)
    for layout, serving in every_candidate(search)[::7]:
        bounder = search.bounder(layout)
        bounds = [
            bounder.compute_ns(layout, serving.structure, serving.warmup_steps),
            bounder.bound_ns(layout, serving, has_traffic=False),
            bounder.bound_ns(layout, serving, has_traffic=True),
            bounder.lowering.latency_ns(search.sketcher.sketch(layout, serving)),
        ]
        assert bounds == sorted(bounds), (layout, serving)


@settings(max_examples=5)
@given(graph=graphs(), cluster=clusters(), request=requests())
def test_a_sketch_costs_and_holds_what_the_full_plan_does(
    graph: LayerGraph, cluster: Cluster, request: SearchRequest
) -> None:
    search = Search(graph, cluster, request)
    for layout, serving in every_candidate(search)[::11]:
        bounder = search.bounder(layout)
        result = simulate(
            search.sketcher.plan(layout, serving), graph, bounder.lowering.cluster,
            dataclasses.replace(search.options, has_contention=False),
        )  # fmt: skip
        latency_ns = bounder.lowering.latency_ns(search.sketcher.sketch(layout, serving))
        assert latency_ns == round(result.latency_s * 1e9)
        assert search.memory.uses(layout, serving, bounder) == result.memory


@pytest.mark.parametrize("name", ["a100-sxm", "rtx4090"])
@pytest.mark.parametrize("has_attention", [True, False])
def test_cuts_that_make_no_patch_smaller_never_win(
    monkeypatch: pytest.MonkeyPatch, name: str, has_attention: bool
) -> None:
    request = SearchRequest(
        ImageRequest(96, 160, 4, True),
        8,
        "float16",
        limits=dataclasses.replace(SMALL, layers_per_bucket=(2,)),
    )
    graph = small_graph(320, 1, has_attention)
    few = Search(graph, cluster_of(name), request).run()
    monkeypatch.setattr(find, "has_idle_cuts", lambda grid, units: False)
    all_of_them = Search(graph, cluster_of(name), request).run()
    assert few.counts.considered < all_of_them.counts.considered
    assert few.best.value == pytest.approx(all_of_them.best.value, rel=1e-9)


def test_the_same_question_has_the_same_answer() -> None:
    answers = []
    for _ in range(2):
        search = search_for(512, 4, model="demo", steps=10)
        answers.append(make_answer(search, search.run()))
    assert answers[0] == answers[1]


def test_thousands_of_plans_are_considered_and_few_are_simulated() -> None:
    found = search_for().run()
    assert found.counts.considered > 5000
    assert found.counts.evaluated < 60
    assert found.counts.simulated <= 5
    assert (
        found.counts.bounded_away + found.counts.evaluated + found.counts.excluded == found.counts.considered
    )
    assert found.gap <= 0.005


def test_one_device_is_chosen_and_said_where_it_is_fastest() -> None:
    search = search_for(256, 4, "rtx4090", "demo", 10, guidance=False)
    plan, answer = make_answer(search, search.run())
    assert plan.mesh.size == 1
    assert answer["one_device_is_best"] is True


def test_a_device_that_is_down_is_planned_around() -> None:
    search = search_for(1024, 4, "a100-sxm", steps=10, down=(1,))
    plan, answer = make_answer(search, search.run())
    assert 1 not in answer["devices"]
    assert {"device": 1, "why": "listed as down"} in answer["left_out"]
    assert plan.mesh.size <= 3


def test_a_slow_device_that_hurts_is_left_out_with_the_reason() -> None:
    search = search_for(1024, 5, steps=10, speeds=((2, 0.1),))
    _, answer = make_answer(search, search.run())
    assert 2 not in answer["devices"]
    (why,) = [item["why"] for item in answer["left_out"] if item["device"] == 2]
    assert "10% of the speed of the others" in why


def test_replicas_serve_throughput() -> None:
    search = search_for(1024, 8, steps=10, objective=Objective.THROUGHPUT, num_images=8)
    found = search.run()
    assert found.best.layout.num_ranks == 1
    assert found.best.value == pytest.approx(found.best.latency_ns / 1e9)


def test_price_follows_devices() -> None:
    search = search_for(1024, 8, steps=10, objective=Objective.PRICE, price_per_hour=2.0)
    found = search.run()
    assert found.best.layout.num_ranks == 1
    assert found.best.value == pytest.approx(found.best.latency_ns / 1e9 * 2.0 / 3600)


def test_a_memory_limit_is_kept() -> None:
    free = search_for(2048, 8, steps=10)
    limit = max(use.total for use in free.run().best.memory) - 1
    limited = search_for(2048, 8, steps=10, memory_limit_bytes=limit).run()
    assert all(use.total <= limit for use in limited.best.memory)
    assert limited.counts.excluded > 0


def test_what_fits_nowhere_is_refused_with_the_limit_and_the_nearest_request() -> None:
    with pytest.raises(
        PlanError, match=r"memory binds: 2048x2048 needs at least .* GB on a device.* more than"
    ):
        search_for(2048, 8, steps=10, memory_limit_bytes=10**9).run()


def quality(psnr_db: float) -> QualityTable:
    return QualityTable((QualityRow("corrected", 8, 5, 50, psnr_db),), "a test")


def test_a_quality_budget_admits_only_what_was_measured_as_good_enough() -> None:
    request = SearchRequest(ImageRequest(1024, 1024, 50), 8, "float16", min_psnr_db=30.0)
    for psnr_db, policy in ((31.0, "corrected"), (29.0, "fresh")):
        search = Search(graph_of("sdxl"), cluster_of("a100-sxm"), request, quality(psnr_db))
        plan, _ = make_answer(search, search.run())
        assert plan.policy.name == policy


def test_too_many_devices_are_refused() -> None:
    request = SearchRequest(ImageRequest(512, 512, 4), 9, "float16", limits=SMALL)
    with pytest.raises(HardwareError, match="9 devices were asked for, a100-sxm has 8"):
        Search(small_graph(32, 1, True), cluster_of("a100-sxm"), request)


def test_a_device_that_is_down_must_exist() -> None:
    request = SearchRequest(ImageRequest(512, 512, 4), 2, "float16", down=(8,), limits=SMALL)
    with pytest.raises(HardwareError, match="devices 0 to 7; there is no device 8"):
        Search(small_graph(32, 1, True), cluster_of("a100-sxm"), request)
