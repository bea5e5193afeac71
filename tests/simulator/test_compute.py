import itertools
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distri.config.hardware import load_cluster
from distri.errors import HardwareError
from distri.simulator.compute import (
    AnalyticCompute,
    KernelKind,
    LaunchMode,
    MeasuredTable,
    OperationShape,
    total_cost,
)
from distri.simulator.hardware import Figure, Tag

DEVICES = {name: load_cluster(name).model_of(0) for name in ("a100-sxm", "h100-sxm", "h200", "l40s")}
MODELS = {name: AnalyticCompute(device) for name, device in DEVICES.items()}

# Times in microseconds at m = 256, 512, 1024, 2048, 4096, 8192, collected by NVIDIA aiconfigurator (Apache-2.0).
GEMMS = {
    ("a100-sxm", 1024, 1024): (8.4, 10.9, 17.9, 30, 62, 94),
    ("a100-sxm", 4096, 1024): (18, 31, 59, 89, 153, 289),
    ("a100-sxm", 5120, 5120): (68, 127, 252, 378, 804, 1678),
    ("h100-sxm", 1024, 1024): (4.8, 4.9, 6.2, 8.5, 14, 26),
    ("h100-sxm", 4096, 1024): (7.0, 9.1, 15, 26, 51, 111),
    ("h200", 4096, 1024): (6.5, 9.0, 14, 26, 51, 109),
    ("l40s", 4096, 1024): (13, 24, 36, 75, 154, 321),
}
# Self-attention of SDXL's heads of 64: (device, images times heads, length): microseconds, from the same source.
ATTENTIONS = {
    ("h100-sxm", 10, 1024): 23,
    ("h100-sxm", 10, 4096): 111,
    ("h100-sxm", 20, 4096): 265,
    ("h100-sxm", 20, 14400): 2079,
    ("h200", 40, 4096): 377,
    ("h200", 40, 14400): 4186,
    ("l40s", 10, 4096): 250,
    ("l40s", 10, 14400): 2388,
}


def gemm(m: int, n: int, k: int, kind: KernelKind = KernelKind.LINEAR) -> OperationShape:
    return OperationShape(kind, m, n, k, 1, 2 * (m * k + n * k), 2 * m * n)


def attention(batch: int, queries: int, keys: int, head_dim: int = 64) -> OperationShape:
    moved = 2 * batch * head_dim
    return OperationShape(
        KernelKind.ATTENTION, queries, head_dim, keys, batch, moved * (queries + 2 * keys), moved * queries
    )


def test_gemms_are_predicted_within_fifteen_percent_in_the_median() -> None:
    errors = []
    for (name, n, k), times in GEMMS.items():
        for m, measured_us in zip((256, 512, 1024, 2048, 4096, 8192), times, strict=True):
            errors.append(abs(MODELS[name].cost(gemm(m, n, k)).device_s * 1e6 / measured_us - 1))
    errors.sort()
    assert errors[len(errors) // 2] < 0.15
    assert errors[-1] < 0.50


def test_attention_is_predicted_within_twenty_percent_in_the_median() -> None:
    errors = sorted(
        abs(MODELS[name].cost(attention(batch, length, length)).device_s * 1e6 / measured_us - 1)
        for (name, batch, length), measured_us in ATTENTIONS.items()
    )
    assert errors[len(errors) // 2] < 0.20
    assert errors[-1] < 0.50


def test_small_shards_use_a_device_badly() -> None:
    whole, eighth = (MODELS["a100-sxm"].cost(gemm(m, 1280, 1280)).device_s for m in (4096, 512))
    assert eighth > 1.3 * whole / 8


def test_times_go_in_waves() -> None:
    times = [MODELS["a100-sxm"].cost(gemm(m, 5120, 5120)).device_s for m in range(1024, 2049, 64)]
    steps = sum(abs(after / before - 1) < 0.005 for before, after in itertools.pairwise(times))
    assert steps >= 4


shapes = st.builds(
    OperationShape,
    kind=st.sampled_from(list(KernelKind)),
    m=st.integers(1, 20000),
    n=st.integers(1, 10240),
    k=st.integers(1, 20000),
    batch=st.integers(1, 64),
    bytes_read=st.integers(0, 2**30),
    bytes_written=st.integers(0, 2**30),
    num_kernels=st.integers(1, 4),
)


@settings(deadline=None)
@given(st.sampled_from(sorted(MODELS)), shapes)
def test_no_shape_runs_faster_than_the_peak_or_the_floor(name: str, shape: OperationShape) -> None:
    device, cost = DEVICES[name], MODELS[name].cost(shape)
    assert cost.device_s * device.peak_flops_per_s["float16"].value * 1.001 >= 2 * shape.macs
    assert cost.device_s >= 1e-6 * shape.num_kernels


@settings(deadline=None)
@given(shapes, st.integers(1, 2**30))
def test_more_bytes_never_cost_less(shape: OperationShape, more: int) -> None:
    larger = replace(shape, bytes_read=shape.bytes_read + more)
    assert MODELS["h100-sxm"].cost(shape).device_s <= MODELS["h100-sxm"].cost(larger).device_s


@settings(deadline=None)
@given(shapes, st.integers(1, 4096))
def test_longer_sums_never_cost_less(shape: OperationShape, more: int) -> None:
    larger = replace(shape, k=shape.k + more)
    # A split along k opens at 128 columns a part, where the model may step down.
    if shape.k >= 1024 or shape.kind is KernelKind.ATTENTION:
        assert MODELS["a100-sxm"].cost(shape).device_s <= MODELS["a100-sxm"].cost(larger).device_s * (
            1 + 1e-12
        )


def test_launches_cost_the_host_and_graphs_almost_nothing() -> None:
    shape = replace(gemm(1024, 1280, 1280), num_kernels=3)
    eager = AnalyticCompute(DEVICES["a100-sxm"], LaunchMode.EAGER).cost(shape)
    graph = AnalyticCompute(DEVICES["a100-sxm"], LaunchMode.GRAPH).cost(shape)
    assert eager.launch_s == pytest.approx(15e-6)
    assert graph.launch_s < 1e-7
    assert eager.device_s == graph.device_s


def test_a_convolution_is_a_gemm_at_its_own_efficiency() -> None:
    shape = gemm(16384, 1280, 11520, KernelKind.CONVOLUTION)
    device = DEVICES["a100-sxm"]
    own = "a test's own value"
    as_fast, half_as_fast = (
        AnalyticCompute(
            device.with_figures(
                {"convolution_efficiency": Figure(share, tag, own), "kernel_gap_s": Figure(1e-6, tag, own)}
            )
        )
        for share, tag in ((1.0, Tag.ASSUMED), (0.5, Tag.FITTED))
    )
    fast, slow = as_fast.cost(shape), half_as_fast.cost(shape)
    assert fast.device_s == pytest.approx(as_fast.cost(gemm(16384, 1280, 11520)).device_s)
    assert slow.device_s == pytest.approx(2 * fast.device_s, rel=0.05)
    assert fast.tag is Tag.ASSUMED
    assert slow.tag is Tag.FITTED


def test_calibration_changes_the_parameters_that_it_names_and_no_others() -> None:
    device, figure = DEVICES["h200"], Figure(0.7, Tag.FITTED, "a test's own value")
    changed = device.with_figures({"gemm.efficiency": figure})
    assert changed.compute.gemm == replace(device.compute.gemm, efficiency=figure)
    assert changed.with_figures({"gemm.efficiency": device.compute.gemm.efficiency}) == device
    with pytest.raises(TypeError, match="colour"):
        device.with_figures({"gemm.colour": figure})


def test_every_kernel_waits_for_the_gap_before_it() -> None:
    device, shape = DEVICES["h200"], replace(gemm(512, 1280, 1280), num_kernels=3)
    wide = device.with_figures({"kernel_gap_s": Figure(5e-6, Tag.FITTED, "a test's own value")})
    longer_s = AnalyticCompute(wide).cost(shape).device_s - MODELS["h200"].cost(shape).device_s
    assert longer_s == pytest.approx(3 * (5e-6 - device.compute.kernel_gap_s.value))


def test_a_dtype_without_a_rate_is_refused() -> None:
    with pytest.raises(
        HardwareError, match=r"no peak rate for float8 on this device; it has bfloat16, float16, float32"
    ):
        MODELS["a100-sxm"].cost(replace(gemm(64, 64, 64), dtype="float8"))


def test_fifteen_hundred_shapes_take_milliseconds() -> None:
    model = AnalyticCompute(DEVICES["a100-sxm"])
    distinct = [gemm(128 + index, 1280, 1280) for index in range(1000)]
    distinct += [attention(20, 64 + index, 4096) for index in range(500)]
    start = time.perf_counter()
    total_cost(model, distinct)
    assert time.perf_counter() - start < 0.3  # about 15 ms on an idle core


def test_a_table_is_exact_at_its_points_and_level_between_them() -> None:
    analytic = MODELS["a100-sxm"]
    points = {gemm(m, 1280, 1280): 2 * analytic.cost(gemm(m, 1280, 1280)).device_s for m in (256, 1024, 4096)}
    table = MeasuredTable(points, "measured here, today", analytic, launch_s=1e-6)
    for shape, seconds in points.items():
        cost = table.cost(shape)
        assert (cost.device_s, cost.tag) == (seconds, Tag.MEASURED)
    between = table.cost(gemm(512, 1280, 1280))
    assert between.tag is Tag.INTERPOLATED
    assert between.device_s == pytest.approx(2 * analytic.cost(gemm(512, 1280, 1280)).device_s)
    far = gemm(16384, 64, 20000)
    assert table.cost(far) == analytic.cost(far)


def test_a_table_refuses_times_that_cannot_be() -> None:
    with pytest.raises(HardwareError, match=r"a measured time must be above 0 s; got 0\.0"):
        MeasuredTable({gemm(64, 64, 64): 0.0}, "a broken clock", MODELS["a100-sxm"])
