import pytest
from hypothesis import given, settings

from distri.core.plan import Plan
from distri.simulator.compute import LaunchMode
from distri.simulator.longest_path import run_longest_path
from distri.simulator.machine import Machine
from distri.simulator.options import SimulationOptions
from distri.simulator.spans import critical_path
from tests.simulator.helpers import PATTERNS, POLICIES, lowering_of, plan_of, plans, tasks_of

EAGER = SimulationOptions(launch=LaunchMode.EAGER)


@given(plans())
@settings(max_examples=25, deadline=None)
def test_without_contention_both_tiers_agree_to_the_nanosecond(plan: Plan) -> None:
    tasks = tasks_of(plan)
    quick = run_longest_path(tasks, is_periodic=False, is_recorded=True)
    slow = Machine(tasks, has_contention=False, is_periodic=False, is_recorded=True).run()
    assert quick.total_ns == slow.total_ns
    ends_apart = plan.mesh.cfg == 2 or plan.keeps_latent_on_patch
    assert quick.walk.starts_ns[:-1] == slow.walk.starts_ns[:-1] or ends_apart
    assert quick.record is not None
    assert slow.record is not None
    assert quick.record.totals == slow.record.totals
    times = [(s.rank, s.stream, s.start_ns, s.end_ns) for s in quick.record.spans if s.start_ns < s.end_ns]
    assert sorted(times) == sorted(
        (s.rank, s.stream, s.start_ns, s.end_ns) for s in slow.record.spans if s.start_ns < s.end_ns
    )


@pytest.mark.parametrize("policy", ["corrected", "fresh", "naive_patch"])
def test_both_tiers_agree_with_a_host_lane(policy: str) -> None:
    tasks = tasks_of(plan_of(4, policy), options=EAGER)
    assert (
        run_longest_path(tasks, is_periodic=False).total_ns
        == Machine(tasks, has_contention=False).run().total_ns
    )


@pytest.mark.parametrize("hardware", ["a100-sxm", "a100-pcie", "rtx4090"])
def test_sharing_links_never_makes_a_run_faster(hardware: str) -> None:
    tasks = tasks_of(plan_of(4, "corrected", size=1024), hardware)
    channels = lowering_of(hardware).collectives.topology.channels
    shared = Machine(tasks, channels).run().total_ns
    assert shared >= run_longest_path(tasks).total_ns


def test_two_guidance_branches_share_a_root_complex() -> None:
    plan = plan_of(4, "fresh", cfg_split=True, size=1024)
    tasks = tasks_of(plan, "a100-pcie")
    channels = lowering_of("a100-pcie").collectives.topology.channels
    assert Machine(tasks, channels).run().total_ns >= run_longest_path(tasks).total_ns


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_tasks_give_the_same_run(policy: str, pattern: str) -> None:
    tasks = tasks_of(plan_of(4, policy, pattern, steps=4))
    channels = lowering_of().collectives.topology.channels
    first, second = (Machine(tasks, channels, is_recorded=True).run() for _ in range(2))
    assert first.total_ns == second.total_ns
    assert first.record is not None
    assert second.record is not None
    assert first.record.spans == second.record.spans


def test_the_critical_path_explains_the_whole_run_with_contention() -> None:
    tasks = tasks_of(plan_of(8, "corrected", steps=25))
    run = Machine(tasks, lowering_of().collectives.topology.channels, is_recorded=True).run()
    assert run.record is not None
    path = critical_path(run.record, run.walk.starts_ns, run.walk.skips, run.total_ns - run.walk.skipped_ns)
    assert sum(segment.duration_ns * segment.count for segment in path) == run.total_ns
