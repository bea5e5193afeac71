import pytest
from hypothesis import given, settings

from distri.core.plan import Plan
from distri.simulator.longest_path import run_longest_path
from distri.simulator.machine import Machine
from tests.simulator.helpers import lowering_of, plan_of, plans, tasks_of


@given(plans())
@settings(max_examples=60, deadline=None)
def test_the_shortcut_equals_the_long_way(plan: Plan) -> None:
    tasks = tasks_of(plan)
    assert run_longest_path(tasks).total_ns == run_longest_path(tasks, is_periodic=False).total_ns


@pytest.mark.parametrize("hardware", ["a100-sxm", "a100-pcie", "a100-sxm-2x8"])
@pytest.mark.parametrize("policy", ["corrected", "sync_gn", "full_sync"])
@pytest.mark.parametrize("cfg_split", [False, True])
def test_the_shortcut_equals_the_long_way_where_links_are_shared(
    hardware: str, policy: str, cfg_split: bool
) -> None:
    tasks = tasks_of(plan_of(8, policy, steps=20, cfg_split=cfg_split), hardware)
    channels = lowering_of(hardware).collectives.topology.channels
    short = Machine(tasks, channels).run()
    long = Machine(tasks, channels, is_periodic=False).run()
    assert short.total_ns == long.total_ns
    assert len(short.walk.visits) < len(long.walk.visits)


def test_totals_count_the_steps_that_were_not_simulated() -> None:
    tasks = tasks_of(plan_of(8, "corrected", steps=25))
    short, long = (run_longest_path(tasks, periodic, is_recorded=True) for periodic in (True, False))
    assert short.record is not None
    assert long.record is not None
    assert sum(short.walk.repeats()) == sum(long.walk.repeats()) == 25
    for rank in range(8):
        counted = sum(
            count * totals[rank].compute
            for totals, count in zip(short.record.totals, short.walk.repeats(), strict=True)
        )
        assert counted == sum(totals[rank].compute for totals in long.record.totals)


def test_fifty_steps_take_hardly_more_work_than_ten() -> None:
    visits = [
        len(run_longest_path(tasks_of(plan_of(8, "corrected", steps=steps))).walk.visits)
        for steps in (12, 50)
    ]
    assert visits[0] == visits[1]
