"""A run's trace: what happened, under the names and on the tracks of the simulator's trace of the same plan."""

import json
from pathlib import Path

import pytest

from distri import executor
from distri.config.hardware import load_cluster
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.errors import OutputError, UserError
from distri.models.presets import load_graph
from distri.request import RunRequest
from distri.simulator.lowering import Lowering
from distri.simulator.options import SimulationOptions
from distri.simulator.simulate import run_simulation
from distri.simulator.timeline import make_timeline
from distri.simulator.trace import chrome_trace
from distri.tracing import traced_steps


def plan_of(steps: int, warmup: int) -> Plan:
    image = ImageRequest(128, 128, steps)
    request = PlanRequest(image, 2, False, warmup_steps=warmup, dtype="float32", layers_per_bucket=20)
    return make_plan(request, load_graph("demo"))


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    executor.run(RunRequest("demo", plan_of(9, 3), "a red ring", trace=path))
    assert [file.name for file in path.parent.iterdir()] == ["trace.json"]
    return json.loads(path.read_text())["traceEvents"]


def names(events: list[dict], category: str, rank: int = 0) -> list[str]:
    return [e["name"] for e in events if e.get("cat") == category and e["pid"] == rank]


def predicted_events(plan: Plan) -> list[dict]:
    lowering = Lowering(load_graph("demo"), load_cluster("cpu-gloo"), SimulationOptions())
    tasks = run_simulation(plan, lowering).tasks
    channels = lowering.collectives.topology.channels
    return chrome_trace(make_timeline(tasks, channels, lowering.options, lowering.graph, ""))["traceEvents"]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_last_step_of_warmup_and_four_steady_ones_are_there(events: list[dict], rank: int) -> None:
    expected = ["step 2, warmup", *(f"step {step}, steady" for step in range(3, 7))]
    assert names(events, "step", rank) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_every_layer_ran_in_every_step_and_waits_lie_inside_of_layers(events: list[dict], rank: int) -> None:
    plan = plan_of(9, 3)
    found = names(events, "compute", rank)
    for exchange in plan.exchanges[:-1]:
        if exchange.kind.value in ("halo", "moments"):  # a context's layer holds others
            assert found.count(exchange.layer) == 5, exchange.layer
    layers = [e for e in events if e.get("cat") == "compute" and e["pid"] == rank]
    for wait in (e for e in events if e.get("cat") == "wait" and e["pid"] == rank and "(halo)" in e["name"]):
        layer = wait["name"].removeprefix("waits for ").split(" (")[0]
        assert any(
            e["name"] == layer and e["ts"] <= wait["ts"] and wait["ts"] + wait["dur"] <= e["ts"] + e["dur"]
            for e in layers
        ), wait["name"]


def test_messages_have_the_names_and_the_tracks_of_the_simulators_trace(events: list[dict]) -> None:
    plan = plan_of(9, 3)
    simulated = predicted_events(plan)

    def messages(found: list[dict]) -> set[tuple[int, int, str]]:
        return {(e["pid"], e["tid"], e["name"]) for e in found if e.get("cat") == "communication"}

    def tracks(found: list[dict]) -> set[tuple[int, int, str]]:
        named = (e for e in found if e["name"] == "thread_name" and e["pid"] < 2)
        return {(e["pid"], e["tid"], e["args"]["name"]) for e in named}

    only_received = {(1, 3, f"down_blocks.{level}.downsamplers.0.conv") for level in (0, 1)}
    assert messages(events) == messages(simulated) | only_received  # the simulator draws the sender's side
    assert tracks(events) == tracks(simulated)


def test_times_begin_at_zero_and_slices_of_a_track_nest(events: list[dict]) -> None:
    slices = [e for e in events if e["ph"] == "X"]
    assert min(e["ts"] for e in slices) == 0
    open_until: dict[tuple[int, int], list[float]] = {}
    crossing = 0
    for event in slices:
        ends = open_until.setdefault((event["pid"], event["tid"]), [])
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        end = event["ts"] + event["dur"]
        crossing += bool(ends) and end > ends[-1]
        ends.append(end)
    assert crossing <= len(slices) // 1000  # the clocks of spans and operations may disagree by a tick


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"), [(5, 50, range(4, 9)), (0, 3, range(3)), (9, 6, range(5, 6))]
)
def test_which_steps_are_traced(warmup: int, steps: int, expected: range) -> None:
    from types import SimpleNamespace

    plan = SimpleNamespace(warmup_steps=min(warmup, steps), image=SimpleNamespace(num_inference_steps=steps))
    assert traced_steps(plan) == expected  # type: ignore[arg-type]


def test_what_cannot_be_traced_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    plan = plan_of(3, 1)
    with pytest.raises(UserError, match="--trace shows ranks that are processes of their own"):
        executor.run(RunRequest("demo", plan, "", backend="in_process", trace=tmp_path / "t.json"))
    with pytest.raises(OutputError, match="there is no directory"):
        executor.run(RunRequest("demo", plan, "", trace=tmp_path / "nowhere" / "t.json"))
