import dataclasses
import json
import math
from pathlib import Path

import pytest

from distri.config.hardware import load_cluster, parse_cluster
from distri.config.profile import Profile, dump_profile, load_profile, measured_compute, parse_profile
from distri.core.graph import LayerGraph
from distri.core.partition import SplitAxis
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.errors import HardwareError, ProfileError
from distri.models.presets import load_graph
from distri.profiler.hardware_file import Provenance, hardware_text
from distri.profiler.links import LinkProbe, LinkReading
from distri.profiler.measure import ProfileRequest, measure
from distri.profiler.subjects import distinct_operations, distinct_steps, layers_of, operations_of, shard_of
from distri.simulator.collective import CollectiveModel
from distri.simulator.compute import AnalyticCompute, LaunchMode
from distri.simulator.costs import CostTable
from distri.simulator.hardware import Cluster, Collective, Tag
from distri.simulator.kernels import KernelList, Layers, Service
from distri.simulator.measured import MeasuredOperation, MeasuredOperations, key_of
from distri.simulator.simulate import simulate
from tests.cli.conftest import Distri
from tests.cli.conftest import distri as distri_fixture

distri = distri_fixture
SIDE = 128


@pytest.fixture(scope="module")
def graph() -> LayerGraph:
    return load_graph("demo")


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return load_cluster("cpu-gloo")


def plan_for(
    graph: LayerGraph, ranks: int, side: int = SIDE, cfg_split: bool = False, **more: object
) -> Plan:
    request = PlanRequest(
        ImageRequest(side, side, 4), ranks, cfg_split, policy_table("corrected"), 1, dtype="float32", **more
    )
    return make_plan(request, graph)


@pytest.fixture(scope="module")
def profile(graph: LayerGraph) -> Profile:
    plans = (plan_for(graph, 1), plan_for(graph, 2), plan_for(graph, 2, axis=SplitAxis.COLS))
    request = ProfileRequest("demo", plans, "float32", num_threads=1, rounds=2, command="distri profile")
    return measure(request)


def test_every_operation_of_every_shard_was_timed_once(profile: Profile, graph: LayerGraph) -> None:
    keys = [point.key for point in profile.operations]
    assert len(keys) == len(set(keys))
    for plan in (plan_for(graph, 1), plan_for(graph, 2)):
        for patch in range(plan.mesh.patch):
            assert {subject.key for subject in operations_of(plan, patch, graph)} <= set(keys)
    assert all(point.device_s > 0 for point in profile.operations)


def test_split_layers_are_timed_apart_from_native_ones(graph: LayerGraph) -> None:
    found = distinct_operations([plan_for(graph, 2)], graph)
    split = [key for key in found if key.is_split]
    assert {key.kind.value for key in split} == {"convolution", "group_norm", "self_attention"}
    for key in split:
        if key.kind.value == "self_attention":
            assert key.keys == 2 * key.inputs[0][1], "queries of one patch, keys of both"


def test_whole_passes_take_at_least_a_part_of_their_operations(profile: Profile) -> None:
    assert {step.key.layers for step in profile.steps} == {Layers.NATIVE, Layers.ATTACHED}
    for step in profile.steps:
        assert 0.5 * step.parts_s < step.seconds
        assert step.num_operations > 300


def test_a_profile_comes_back_from_its_file(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(dump_profile(profile), encoding="utf-8")
    assert load_profile(path) == profile
    assert path.read_text().count("\n") < len(profile.operations) + 60, "one point a line"


@pytest.mark.parametrize("share", [None, 0.7, 1.4])
def test_a_measured_step_is_predicted_as_measured(
    profile: Profile, graph: LayerGraph, cluster: Cluster, share: float | None
) -> None:
    """Also where a pass took more or less than its parts by themselves: `share` of them, if it is given."""
    plan = plan_for(graph, 1)
    (step,) = (step for step in profile.steps if step.key.num_patches == 1)
    if share is not None:
        step = dataclasses.replace(step, seconds=share * step.parts_s)
    result = simulate(plan, graph, cluster, compute=compute_of(dataclasses.replace(profile, steps=(step,))))
    assert result.latency_s == pytest.approx(4 * step.seconds, rel=1e-3)
    assert set(result.tags.values()) >= {Tag.MEASURED}


def compute_of(profile: Profile):  # type: ignore[no-untyped-def]
    return lambda device, launch: MeasuredOperations(profile.measurements, AnalyticCompute(device, launch))


def test_measured_layers_are_exact_and_said_to_be(
    profile: Profile, graph: LayerGraph, cluster: Cluster
) -> None:
    plan = plan_for(graph, 2)
    bare = dataclasses.replace(profile, steps=())
    table = CostTable(graph, cluster, "float32", LaunchMode.GRAPH, compute_of(bare))
    (name,) = cluster.models
    times = table.times(name, shard_of(plan, 0), layers_of(plan), Service.FRESH)
    known = {point.key: point.device_s for point in profile.operations}
    for subject in operations_of(plan, 0, graph):
        if subject.exchange is not None:
            assert times.device_ns[subject.operation.index] == round(known[subject.key] * 1e9)


def test_times_between_points_lie_between_theirs(
    profile: Profile, graph: LayerGraph, cluster: Cluster
) -> None:
    """Points that say twice what the analytic model says: so does everything near them."""
    model = AnalyticCompute(cluster.model_of(0))
    kernels = KernelList(graph, "float32")
    points = {}
    for side in (128, 256):
        plan = plan_for(graph, 1, side)
        for key, subject in distinct_operations([plan], graph).items():
            found = kernels.of(subject.operation, shard_of(plan, 0), Layers.NATIVE, Service.NONE)
            points[key] = MeasuredOperation(
                key, 2 * math.fsum(model.cost(kernel).device_s for kernel in found)
            )
    doubled = dataclasses.replace(profile, operations=tuple(points.values()), steps=())
    compute = compute_of(doubled)
    results = [
        simulate(plan_for(graph, 1, side), graph, cluster, compute=compute) for side in (128, 192, 256)
    ]
    latencies = [result.latency_s for result in results]
    assert latencies == sorted(latencies)
    assert results[1].tags["compute: linear"] is Tag.INTERPOLATED
    alone = simulate(plan_for(graph, 1, 192), graph, cluster).latency_s
    assert latencies[1] == pytest.approx(2 * alone, rel=0.15)


def test_far_from_all_points_the_analytic_model_answers(
    profile: Profile, graph: LayerGraph, cluster: Cluster
) -> None:
    model = compute_of(profile)(cluster.model_of(0), LaunchMode.GRAPH)
    plan = plan_for(graph, 1, 4096)
    shard = shard_of(plan, 0)
    operation = next(op for op in graph if op.kind.value == "self_attention")
    kernels = CostTable(graph, cluster, "float32", LaunchMode.GRAPH).kernels.of(
        operation, shard, Layers.NATIVE, Service.NONE
    )
    cost = model.operation_cost(operation, shard, Layers.NATIVE, Service.NONE, kernels)
    assert cost.tag is Tag.ASSUMED, "cpu-gloo's own figures"
    assert key_of(operation, shard, Layers.NATIVE, Service.NONE).keys == 256 * 256


def test_one_pass_a_shape_is_timed(graph: LayerGraph) -> None:
    plans = [plan_for(graph, 1), plan_for(graph, 2), plan_for(graph, 2, cfg_split=True)]
    found = distinct_steps(plans)
    assert len(found) == 3
    assert {key.batch for key in found} == {1, 2}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema_version": 7}, "this distri reads profiles of schema 1; this one is of schema 7"),
        ({"operations": None}, "not a profile: operations"),
        ({"num_threads": "many"}, "not a profile: num_threads"),
        ({"device": 3}, "not a profile: device"),
    ],
)
def test_a_malformed_profile_is_refused_by_place(
    profile: Profile, change: dict[str, object], complaint: str
) -> None:
    data = {**json.loads(dump_profile(profile)), **change}
    with pytest.raises(ProfileError, match=complaint):
        parse_profile(json.dumps(data))


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, 1e9])
def test_times_that_no_device_takes_are_refused(profile: Profile, seconds: float) -> None:
    data = json.loads(dump_profile(profile))
    data["operations"][3]["device_s"] = seconds
    with pytest.raises(ProfileError, match=r"operations\.3"):
        parse_profile(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '"profile"'])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ProfileError, match="not a profile"):
        parse_profile(text)


def test_a_profile_of_another_model_or_dtype_is_refused(
    profile: Profile, graph: LayerGraph, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(dump_profile(profile), encoding="utf-8")
    other = load_graph("sdxl")
    plan = make_plan(PlanRequest(ImageRequest(1024, 1024, 4), 1), other)
    with pytest.raises(ProfileError, match=r"a profile of 'demo' .* not of 'sdxl'"):
        measured_compute(path, plan)
    half = make_plan(PlanRequest(ImageRequest(SIDE, SIDE, 4), 1, dtype="float16"), graph)
    with pytest.raises(ProfileError, match="a profile in float32, the plan is in float16"):
        measured_compute(path, half)


READING = LinkReading(0, 1, 2e-4, 1e7, 0.05, 3e-4, False, 0.02, ((64, 2e-4), (1048576, 0.105)))
PROVENANCE = Provenance("a processor", "2030-01-01", "distri profile --links")


def test_a_probed_machine_is_a_hardware_file_that_holds() -> None:
    slow = dataclasses.replace(READING, second=2, bytes_per_s=5e6, is_half_duplex=True)
    cluster = parse_cluster(hardware_text(LinkProbe(3, "gloo", (READING, slow)), PROVENANCE, "here"))
    assert [link.bandwidth_bytes_per_s.value for link in cluster.links] == [1e7, 1e7, 5e6]
    assert [link.duplex.value for link in cluster.links] == ["full", "full", "half"]
    assert cluster.links[0].latency_s.value == pytest.approx(1e-4)
    assert cluster.collectives.per_message_s.value == pytest.approx(1e-4)
    assert cluster.links[0].latency_s.tag is Tag.MEASURED
    assert "distri profile --links, on a processor" in cluster.links[0].latency_s.source
    assert cluster.collectives.compute_slowdown.value == 0.02
    cost = CollectiveModel(cluster).cost(Collective.POINT_TO_POINT, 1000, (0, 1))
    assert cost.tag is Tag.MEASURED
    assert "distri profile --links" in cost.source


def test_a_nonsensical_reading_makes_no_hardware_file() -> None:
    with pytest.raises(HardwareError):
        parse_cluster(
            hardware_text(
                LinkProbe(2, "gloo", (dataclasses.replace(READING, alpha_s=9.0, awaited_s=9.0),)), PROVENANCE
            )
        )


def test_the_command_measures_and_the_simulator_reads_it(distri: Distri) -> None:
    size = ("--height", SIDE, "--width", SIDE)
    outcome = distri(
        "profile",
        *size,
        "--gpus",
        1,
        "--gpus",
        2,
        "--no-cfg-split",
        "--rounds",
        1,
        "--no-steps",
        "-o",
        "p.json",
    )
    assert outcome.status == 0
    assert "no whole pass was timed" in outcome.out
    simulated = distri(
        "simulate", "--model", "demo", *size, "--gpus", 2, "--cfg-split", "off", "--hardware", "cpu-gloo",
        "--profile", "p.json", "--json",
    )  # fmt: skip
    tags = {tag for name, tag in simulated.value["tags"].items() if name.startswith("compute")}
    assert tags == {"measured"}


def test_links_need_two_ranks(distri: Distri) -> None:
    outcome = distri("profile", "--links", "--gpus", 1)
    assert outcome.status == 2
    assert "links are between ranks" in outcome.complaint


@pytest.mark.slow
def test_the_link_probe_writes_a_machine(distri: Distri) -> None:
    outcome = distri("profile", "--links", "--gpus", 2, "-o", "here.yaml")
    assert outcome.status == 0
    assert load_cluster("here.yaml").num_ranks == 2
