import json
from collections import Counter
from itertools import pairwise

import pytest

from distri.config.hardware import load_cluster
from distri.core.plan import ImageRequest
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.models.presets import load_graph
from distri.simulator.lowering import Lowering
from distri.simulator.options import SimulationOptions
from distri.simulator.simulate import run_simulation
from distri.simulator.timeline import Timeline, make_timeline
from distri.simulator.trace import chrome_trace, dump_trace, rank_trace

STEPS, WARMUP = 6, 2


def timeline_of(policy: str, ranks: int = 4, steps: int = STEPS) -> tuple[Timeline, int]:
    """A recorded run, and the nanoseconds that the simulator itself says it takes."""
    graph, cluster = load_graph("demo"), load_cluster("a100-sxm")
    request = PlanRequest(ImageRequest(512, 512, steps), ranks, False, policy_table(policy), WARMUP)
    lowering = Lowering(graph, cluster, SimulationOptions())
    simulation = run_simulation(make_plan(request, graph), lowering)
    channels = lowering.collectives.topology.channels
    made = make_timeline(simulation.tasks, channels, lowering.options, graph, "a title")
    return made, simulation.run.total_ns


@pytest.fixture(scope="module")
def displaced() -> Timeline:
    return timeline_of("corrected")[0]


@pytest.mark.parametrize("policy", ["corrected", "fresh", "local", "no_sync"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_timeline_ends_on_the_nanosecond_that_the_shortcut_predicts(policy: str, ranks: int) -> None:
    timeline, total_ns = timeline_of(policy, ranks, steps=20)
    assert timeline.end_ns == total_ns
    assert max(span.end_ns for span in timeline.spans) <= total_ns


def test_every_event_is_of_a_known_form_and_in_order(displaced: Timeline) -> None:
    events = json.loads(dump_trace(chrome_trace(displaced)))["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C", "s", "f"}
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    for event in events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0
        assert event["ph"] != "C" or all(isinstance(value, float) for value in event["args"].values())


def test_times_are_microseconds(displaced: Timeline) -> None:
    events = chrome_trace(displaced)["traceEvents"]
    last = max(event["ts"] + event["dur"] for event in events if event["ph"] == "X")
    assert last == pytest.approx(displaced.end_ns / 1000)


def test_ranks_streams_and_links_have_names(displaced: Timeline) -> None:
    events = chrome_trace(displaced)["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {0: "rank 0", 1: "rank 1", 2: "rank 2", 3: "rank 3", 4: "links"}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    used = {(e["pid"], e["tid"]) for e in events if e["ph"] in "Xsf"}
    assert used <= set(tracks)
    assert {"steps", "compute", "communication", "synchronous communication"} <= set(tracks.values())
    assert "host0/gpu0 -> host0/nvswitch" in tracks.values()


def test_arrows_lead_from_a_send_to_its_reader_one_step_later(displaced: Timeline) -> None:
    events = chrome_trace(displaced)["traceEvents"]
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == sum(e["ph"] in "sf" for e in events) // 2 > 0
    slices = {(e["pid"], e["tid"], e["ts"]): e for e in events if e["ph"] == "X"}
    for number, start in starts.items():
        end = ends[number]
        source, target = (slices[e["pid"], e["tid"], e["ts"]] for e in (start, end))
        assert target["args"]["step"] == source["args"]["step"] + 1
        assert source["cat"] == "communication"
        assert start["pid"] != end["pid"]
        assert end["ts"] >= source["ts"] + source["dur"]


def test_only_displaced_steps_have_arrows() -> None:
    fresh, _ = timeline_of("fresh")
    assert not list(fresh.readings())
    displaced, _ = timeline_of("corrected")
    readers = Counter(displaced.spans[reading.target].visit for reading in displaced.readings())
    assert set(readers) == set(range(WARMUP + 1, STEPS)), (
        "the first displaced step reads what warm-up brought"
    )


def test_slices_of_a_stream_do_not_overlap(displaced: Timeline) -> None:
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in chrome_trace(displaced)["traceEvents"]:
        if event["ph"] == "X" and event["cat"] in ("compute", "wait", "link"):
            tracks.setdefault((event["pid"], event["tid"]), []).append(
                (event["ts"], event["ts"] + event["dur"])
            )
    for spans in tracks.values():
        ordered = sorted(spans)
        for (_, end), (start, _) in pairwise(ordered):
            assert start >= end - 1e-6


def test_no_link_carries_more_than_it_can(displaced: Timeline) -> None:
    assert displaced.loads
    for load in displaced.loads:
        assert 0 < load.bytes_per_s <= displaced.channels[load.channel].capacity_bytes_per_s


def test_counters_come_back_to_zero(displaced: Timeline) -> None:
    last: dict[str, float] = {}
    for event in chrome_trace(displaced)["traceEvents"]:
        if event["ph"] == "C":
            (last[event["name"]],) = event["args"].values()
    assert last
    assert set(last.values()) == {0.0}


def test_memory_is_a_counter_of_its_rank(displaced: Timeline) -> None:
    assert displaced.graph is not None
    held = {1: [5_000_000] * len(displaced.graph)}
    counters = [e for e in chrome_trace(displaced, held)["traceEvents"] if e["name"] == "memory"]
    assert {event["pid"] for event in counters} == {1}
    assert {event["args"]["MB"] for event in counters} == {5.0}


def test_the_same_run_gives_the_same_bytes() -> None:
    first, second = (dump_trace(chrome_trace(timeline_of("corrected", 2)[0])) for _ in range(2))
    assert first == second


def test_a_rank_file_is_what_trace_analysis_reads(displaced: Timeline) -> None:
    trace = json.loads(dump_trace(rank_trace(displaced, 2)))
    assert trace["distributedInfo"]["rank"] == 2
    assert trace["distributedInfo"]["world_size"] == 4
    events = trace["traceEvents"]
    assert all(
        event["ph"] == "X" and {"cat", "ts", "dur", "pid", "tid", "name"} <= event.keys() for event in events
    )
    kernels = {e["args"]["correlation"]: e for e in events if e["cat"] == "kernel"}
    launches = {e["args"]["correlation"]: e for e in events if e["cat"] == "cuda_runtime"}
    assert kernels.keys() == launches.keys()
    assert all(launches[number]["ts"] <= kernel["ts"] for number, kernel in kernels.items())
    steps = [e["name"] for e in events if e["cat"] == "user_annotation"]
    assert steps == [f"ProfilerStep#{step}" for step in range(STEPS)]
    streams = Counter(e["name"].startswith("nccl") for e in kernels.values())
    assert streams[True]
    assert streams[False]
