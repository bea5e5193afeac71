import dataclasses
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distri.core.plan import Plan
from distri.simulator.bounds import bounds_of, serial_ns
from distri.simulator.longest_path import longest_path_ns, run_longest_path, stretched
from distri.simulator.options import CtaPolicy, SimulationOptions
from distri.simulator.spans import critical_path
from distri.simulator.tasks import Compute, Hop, Post, StepTemplate, TaskList, Transfer
from tests.simulator.helpers import lowering_of, plan_of, plans, tasks_of


@given(plans())
@settings(max_examples=40, deadline=None)
def test_a_run_is_never_shorter_than_its_bounds_nor_longer_than_everything_in_a_row(plan: Plan) -> None:
    tasks = tasks_of(plan)
    channels = lowering_of().collectives.topology.channels
    total = longest_path_ns(tasks)
    assert bounds_of(tasks, channels).latency_ns <= total
    slowed = serial_ns(tasks) * (1000 + tasks.slowdown) // 1000
    assert total <= slowed + len(tasks.steps)


@given(plans())
@settings(max_examples=40, deadline=None)
def test_the_critical_path_explains_the_whole_run(plan: Plan) -> None:
    tasks = tasks_of(plan)
    run = run_longest_path(tasks, is_recorded=True)
    assert run.record is not None
    path = critical_path(run.record, run.walk.starts_ns, run.walk.skips, run.total_ns - run.walk.skipped_ns)
    assert sum(segment.duration_ns * segment.count for segment in path) == run.total_ns


@given(plans())
@settings(max_examples=40, deadline=None)
def test_each_rank_computes_or_waits_and_nothing_else(plan: Plan) -> None:
    tasks = tasks_of(plan)
    run = run_longest_path(tasks, is_recorded=True)
    assert run.record is not None
    for rank in range(tasks.num_ranks):
        time_ns = sum(
            count * (totals[rank].compute + totals[rank].exposed + totals[rank].waiting)
            for totals, count in zip(run.record.totals, run.walk.repeats(), strict=True)
        )
        assert time_ns <= run.total_ns
        if rank == 0 and plan.mesh.cfg == 1:
            assert time_ns == run.total_ns


def faster(tasks: TaskList, percent: int, saved_ns: int) -> TaskList:
    """All transfers take `percent` of their time, less `saved_ns`."""

    def quick(transfer: Transfer) -> Transfer:
        return transfer._replace(alone_ns=max(0, transfer.alone_ns * percent // 100 - saved_ns))

    def changed(template: StepTemplate) -> StepTemplate:
        actions = []
        for action in template.actions:
            if isinstance(action, Post):
                groups = tuple(g._replace(transfer=quick(g.transfer)) for g in action.call.groups)
                hops = tuple(Hop(h.source, h.reader, h.after, quick(h.transfer)) for h in action.call.hops)
                action = action._replace(call=dataclasses.replace(action.call, groups=groups, hops=hops))
            actions.append(action)
        return dataclasses.replace(template, actions=tuple(actions))

    return dataclasses.replace(tasks, templates=tuple(map(changed, tasks.templates)))


@given(plans(), st.integers(1, 100), st.integers(0, 50_000))
@settings(max_examples=60, deadline=None)
def test_a_faster_link_never_makes_a_run_slower(plan: Plan, percent: int, saved_ns: int) -> None:
    # With kernels that slow down beside transfers this is no law: a transfer that arrives earlier may overlap more.
    tasks = tasks_of(plan, options=SimulationOptions(cta_policy=CtaPolicy.COPY_ENGINE))
    assert longest_path_ns(faster(tasks, percent, saved_ns)) <= longest_path_ns(tasks)


@given(
    st.integers(0, 10**6),
    st.integers(0, 10**5),
    st.lists(st.integers(0, 10**5), max_size=6),
    st.integers(0, 900),
)
def test_kernels_beside_transfers_take_longer_but_no_longer_than_wholly_beside_one(
    start: int, work: int, edges: list[int], slowdown: int
) -> None:
    times = sorted(start + edge for edge in edges)
    busy = list(zip(times[::2], times[1::2], strict=False))
    end = stretched(start, work, busy, slowdown)
    assert start + work <= end <= start + -(-work * (1000 + slowdown) // 1000)
    half = stretched(stretched(start, work // 2, busy, slowdown), work - work // 2, busy, slowdown)
    assert 0 <= half - end <= 2  # a nanosecond lost alone is up to 1.9 lost beside a transfer


def test_the_example_of_one_transfer_beside_a_kernel() -> None:
    assert stretched(0, 100, [(50, 60)], 1000) == 105


def test_displaced_hides_what_synchronous_patches_wait_for() -> None:
    plans_by_policy = {
        policy: plan_of(8, policy, size=1024, steps=50, warmup_steps=5, model="sdxl", layers_per_bucket=60)
        for policy in ("no_sync", "corrected", "fresh")
    }
    lowering = lowering_of(model="sdxl")
    latency = {policy: longest_path_ns(lowering.lower(plan)) for policy, plan in plans_by_policy.items()}
    assert latency["no_sync"] < latency["corrected"] < latency["fresh"]


def test_an_eager_run_is_bound_by_its_host_where_patches_are_small() -> None:
    from distri.simulator.compute import LaunchMode

    graphs = tasks_of(plan_of(8))
    eager = tasks_of(plan_of(8), options=SimulationOptions(launch=LaunchMode.EAGER))
    assert longest_path_ns(eager) > longest_path_ns(graphs)
    run = run_longest_path(eager, is_recorded=True)
    assert run.record is not None
    assert sum(totals[0].launching for totals in run.record.totals) > 0


@pytest.mark.parametrize("policy", ["corrected", "fresh"])
def test_a_plan_that_was_lowered_is_evaluated_in_milliseconds(policy: str) -> None:
    plan = plan_of(8, policy, size=1024, steps=50, warmup_steps=5, model="sdxl", layers_per_bucket=60)
    tasks = lowering_of(model="sdxl").lower(plan)
    begin = time.process_time()
    for _ in range(5):
        longest_path_ns(tasks)
    assert (time.process_time() - begin) / 5 < 0.05


def test_compute_alone_is_a_sum() -> None:
    template = StepTemplate(
        "step", (Compute((5,), (), (), 0, 1), Compute((7,), (), (), 1, 2)), is_closed=True
    )
    assert longest_path_ns(TaskList(1, (template,), (0, 0, 0), 0)) == 36
