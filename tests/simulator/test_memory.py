import dataclasses

import pytest

from distri.simulator.hardware import Cluster, Figure, Tag
from distri.simulator.memory import memory_of, peak_activations, stale_bytes
from tests.simulator.helpers import cluster_of, graph_of, plan_of


def small(cluster: Cluster, limit: float) -> Cluster:
    models = {
        name: dataclasses.replace(model, memory_bytes=Figure(limit, Tag.ASSUMED, "test"))
        for name, model in cluster.models.items()
    }
    return dataclasses.replace(cluster, models=models)


def test_activations_shrink_with_the_patch() -> None:
    whole, _ = peak_activations(
        plan_of(1, "naive_patch", size=1024), graph_of(), plan_of(1, "naive_patch", size=1024).extent(0)
    )
    plan = plan_of(8, "corrected", size=1024)
    part, layer = peak_activations(plan, graph_of(), plan.extent(0))
    assert part < whole
    assert any(operation.path == layer for operation in graph_of())


def test_the_peak_is_at_least_what_any_operation_holds() -> None:
    plan = plan_of(1, "naive_patch")
    peak, _ = peak_activations(plan, graph_of(), plan.extent(0))
    own = plan.extent(0)
    for operation in graph_of():
        held = sum(own.elements(graph_of().operations[parent].output) for parent in operation.parents)
        assert peak >= 2 * (held + own.elements(operation.output))


def test_stale_values_are_held_twice() -> None:
    late, fresh = plan_of(4, "stale"), plan_of(4, "fresh")
    assert stale_bytes(fresh, graph_of(), 1) < stale_bytes(late, graph_of(), 1)
    received = sum(e.bytes_received[1] for e in late.exchanges if e.kind.value != "output")
    assert stale_bytes(late, graph_of(), 1) >= 2 * received


def test_a_plan_that_does_not_fit_says_so_with_the_layer_at_the_peak() -> None:
    plan = plan_of(4, "corrected", size=1024)
    use = memory_of(plan, graph_of(), small(cluster_of(), 1e9))[0]
    assert not use.fits
    assert "exceeds the device by" in str(use)
    assert use.peak_layer in str(use)
    assert memory_of(plan, graph_of(), cluster_of())[0].fits


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_tensor_parallelism_splits_weights_and_keeps_activations(num_ranks: int) -> None:
    plan = plan_of(num_ranks, "naive_patch")
    patches = memory_of(plan, graph_of(), cluster_of())[0]
    channels = memory_of(plan, graph_of(), cluster_of(), is_tensor_parallel=True)[0]
    assert channels.weights < patches.weights
    assert channels.activations > patches.activations


def test_sdxl_at_3840_fits_an_a100_and_needs_most_for_weights_and_contexts() -> None:
    plan = plan_of(8, "corrected", model="sdxl", size=3840, steps=50, warmup_steps=5, layers_per_bucket=60)
    use = memory_of(plan, graph_of("sdxl"), cluster_of())[3]
    assert use.fits
    assert use.weights == 2 * graph_of("sdxl").weight_elements
    assert use.stale_values > use.weights


def test_codecs_and_extrapolation_pay_in_memory_for_what_they_rebuild() -> None:
    plain, coded, ahead = (
        stale_bytes(plan_of(4, policy), graph_of(), 1) for policy in ("stale", "int8", "extrapolated")
    )
    assert plain < coded
    assert plain < ahead
