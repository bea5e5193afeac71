import dataclasses
import json
from typing import Any

import pytest

from distri.core.plan import ImageRequest
from distri.core.planner import PlanRequest
from distri.errors import HardwareError, PlanError, UserError
from distri.simulator.methods import Method, method_of, plan_of
from distri.simulator.options import SimulationOptions
from distri.simulator.result import SimulationResult
from distri.simulator.simulate import run_simulation, simulate
from distri.simulator.tensor_parallel import Split, TensorParallelLowering, TensorSplit
from tests.simulator.helpers import cluster_of, graph_of, lowering_of
from tests.simulator.helpers import plan_of as small_plan


def request(gpus: int, cfg_split: bool | None = False, size: int = 1024, **more: Any) -> PlanRequest:
    return PlanRequest(ImageRequest(size, size, 50), gpus, cfg_split, **more)


def predicted(method: Method, gpus: int = 8, hardware: str = "a100-sxm", **more: Any) -> SimulationResult:
    plan = plan_of(method, request(gpus, **more), graph_of("sdxl"))
    return run_simulation(plan, lowering_of(hardware, model="sdxl"), method).result


def test_methods_are_ordered_as_published_at_1024_on_eight() -> None:
    order = (Method.NO_COMMUNICATION, Method.DISPLACED, Method.FULL_SYNC, Method.TENSOR_PARALLEL)
    for pattern in ("gather_all", "neighbours"):
        latencies = [predicted(method, pattern=pattern).latency_s for method in order]
        assert latencies == sorted(latencies)
        assert latencies[-1] < predicted(Method.ORIGINAL, 1).latency_s


def test_displaced_patches_without_nvlink_can_be_slower_than_one_device() -> None:
    result = predicted(Method.DISPLACED, 8, "l40s", pattern="gather_all")
    assert result.is_slower_than_one_device
    assert result.exposed_communication_s > result.compute_s


def test_tensor_parallelism_communicates_what_the_paper_says() -> None:
    plan = plan_of(Method.TENSOR_PARALLEL, request(8), graph_of("sdxl"))
    elements = TensorParallelLowering(lowering_of(model="sdxl"), plan).elements_communicated
    assert elements == pytest.approx(1.33e9, rel=0.01)


def test_tensor_parallelism_pairs_products_with_one_sum_behind_each() -> None:
    split = TensorSplit(graph_of("sdxl"), 8)
    summed = [op for op in graph_of("sdxl") if split.of[op.index] is Split.ROWS]
    assert (
        len(summed) == 3 * 70 + 17 + 2 + 2 + 1
    )  # blocks of a transformer, residual blocks, resampling, the last one
    first = next(op for op in graph_of("sdxl") if op.path == "conv_in")
    assert split.of[first.index] is Split.WHOLE


def test_tensor_parallelism_needs_whole_groups() -> None:
    plan = small_plan(2, "naive_patch")
    plan = dataclasses.replace(plan, mesh=dataclasses.replace(plan.mesh, patch=5))
    with pytest.raises(PlanError, match="groups do not split over 5 ranks; use a divisor of"):
        TensorParallelLowering(lowering_of(), plan)


@pytest.mark.parametrize(
    "method", [Method.DISPLACED, Method.FULL_SYNC, Method.NAIVE_PATCH, Method.TENSOR_PARALLEL]
)
def test_every_method_goes_with_split_guidance(method: Method) -> None:
    whole, split = (predicted(method, cfg_split=cfg_split) for cfg_split in (False, True))
    assert split.num_ranks == whole.num_ranks == 8
    assert split.latency_s != whole.latency_s


def test_a_result_adds_up() -> None:
    result = predicted(Method.DISPLACED, pattern="gather_all")
    parts = result.compute_s + result.exposed_communication_s + result.launch_s + result.outside_s
    assert parts == pytest.approx(result.latency_s, abs=1e-9)
    assert result.speedup == pytest.approx(result.original_s / result.latency_s)
    assert sum(result.bytes_sent) == sum(result.bytes_received)
    assert sum(count for _, _, count in result.steps) == 50
    assert sum(seconds * count for _, seconds, count in result.steps) == pytest.approx(
        result.latency_s, abs=1e-9
    )
    assert len(result.memory_bytes) == 8
    assert result.fits


def test_the_same_plan_gives_the_same_bytes() -> None:
    texts = {json.dumps(predicted(Method.DISPLACED, 4).to_dict(), sort_keys=True) for _ in range(2)}
    assert len(texts) == 1


def test_no_link_carries_more_than_its_capacity_allows() -> None:
    result = predicted(Method.FULL_SYNC, 8, "a100-pcie")
    channels = lowering_of("a100-pcie", model="sdxl").collectives.topology.channels
    capacity = {channel.name: channel.capacity_bytes_per_s for channel in channels}
    for name, num_bytes in result.bytes_on_link.items():
        assert num_bytes <= capacity[name] * result.latency_s


def test_noise_gives_an_interval_and_waits_for_the_slowest() -> None:
    plan = small_plan(8, "fresh")
    options = SimulationOptions(noise=0.05)
    result = simulate(plan, graph_of(), cluster_of(), options)
    assert result.interval_s is not None
    low, high = result.interval_s
    assert low < high
    assert high > result.latency_s
    assert simulate(plan, graph_of(), cluster_of(), options).interval_s == result.interval_s


def test_encoders_and_scheduler_are_outside_of_the_steps() -> None:
    plan = small_plan(2)
    bare = simulate(plan, graph_of(), cluster_of())
    full = simulate(
        plan, graph_of(), cluster_of(), SimulationOptions(before_s=0.1, after_s=0.2, per_step_s=0.01)
    )
    assert full.latency_s == pytest.approx(bare.latency_s + 0.3 + 0.12)
    assert full.outside_s == pytest.approx(0.42)


def test_a_cluster_that_is_too_small_is_refused() -> None:
    plan = small_plan(8)
    with pytest.raises(HardwareError, match=r"the plan is for 8 devices, .* has 4"):
        simulate(plan, graph_of(), dataclasses.replace(cluster_of(), devices=cluster_of().devices[:4]))


def test_unknown_methods_and_options_are_refused_in_a_sentence() -> None:
    with pytest.raises(PlanError, match="unknown method 'magic'; known: original"):
        method_of("magic")
    with pytest.raises(PlanError, match="method 'original' is for 1 device, not 4"):
        plan_of(Method.ORIGINAL, request(4), graph_of("sdxl"))
    with pytest.raises(UserError, match="at least 0 and below 1, not 2"):
        SimulationOptions(noise=2)
