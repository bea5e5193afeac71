import pytest
import torch

from distri.backends.in_process import InProcessBackend
from distri.backends.simulated import SimulatedBackend
from distri.config.hardware import load_cluster
from distri.core.graph import LayerGraph
from distri.core.plan import Plan
from distri.errors import UserError
from distri.pipeline import open_backend
from distri.session import Session
from distri.simulator.result import SimulationResult
from distri.simulator.simulate import simulate
from tests.toys import inputs_of, run_in_process, toy, toy_plan


def prediction_of(plan: Plan, graph: LayerGraph) -> SimulationResult:
    return simulate(plan, graph, load_cluster("a100-sxm"))


@torch.no_grad()
def test_values_are_in_process_and_time_is_the_simulators() -> None:
    model, graph = toy()
    plan = toy_plan(graph, 2, steps=5)
    prediction = prediction_of(plan, graph)
    backend = SimulatedBackend(InProcessBackend(plan, timeout_s=20.0), prediction)
    times = []
    with Session(model, backend) as session:
        session.begin_image()
        outputs = []
        for step in range(5):
            outputs.append(model(**inputs_of(plan, step))[0])
            times.append(backend.clock.now_s)
    for ours, theirs in zip(outputs, run_in_process(model, plan), strict=True):
        assert torch.equal(ours, theirs)
    assert times == sorted(times)
    assert times == list(backend.clock.ends_s)
    assert times[-1] == pytest.approx(prediction.latency_s)


def test_the_clock_starts_again_with_each_image() -> None:
    model, graph = toy()
    plan = toy_plan(graph, 2, steps=3)
    backend = SimulatedBackend(InProcessBackend(plan, timeout_s=20.0), prediction_of(plan, graph))
    with torch.no_grad(), Session(model, backend) as session:
        for _ in range(2):
            session.begin_image()
            assert backend.clock.now_s == 0.0
            for step in range(3):
                model(**inputs_of(plan, step))
        assert backend.clock.now_s == backend.clock.ends_s[-1]


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_step_has_an_end(ranks: int) -> None:
    _, graph = toy()
    plan = toy_plan(graph, ranks, steps=7)
    backend = SimulatedBackend(InProcessBackend(plan), prediction_of(plan, graph))
    assert len(backend.clock.ends_s) == 7


def test_an_unknown_machine_is_refused_by_name() -> None:
    _, graph = toy()
    plan = toy_plan(graph, 2)
    with pytest.raises(UserError, match="unknown backend 'simulated'"):
        open_backend("simulated", plan)
