import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distri.core.plan import Plan
from distri.core.policy import ExchangeKind
from distri.core.program import InstructionKind, step_program
from distri.simulator.options import CtaPolicy, SimulationOptions
from distri.simulator.tasks import Compute, Post, Wait
from tests.simulator.helpers import graph_of, lowering_of, plan_of, plans, tasks_of


@given(plans())
@settings(max_examples=40, deadline=None)
def test_what_is_sent_is_received(plan: Plan) -> None:
    for template in tasks_of(plan).templates:
        for call in template.calls:
            assert sum(call.sent_bytes) == sum(call.received_bytes)


@given(plans())
@settings(max_examples=40, deadline=None)
def test_every_operation_runs_once_a_step_and_every_step_has_a_template(plan: Plan) -> None:
    tasks = tasks_of(plan)
    assert len(tasks.steps) == plan.image.num_inference_steps
    for template in tasks.templates:
        ranges = [(a.first, a.last) for a in template.actions if isinstance(a, Compute)]
        assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
        assert ranges[-1][1] == len(graph_of())


@given(plans())
@settings(max_examples=40, deadline=None)
def test_nobody_waits_for_what_is_never_posted(plan: Plan) -> None:
    tasks = tasks_of(plan)
    for step, place in enumerate(tasks.steps):
        posted: set[int] = set()
        for action in tasks.templates[place].actions:
            if isinstance(action, Post):
                posted.add(action.call.slot)
            elif isinstance(action, Wait) and action.lag == 0:
                assert action.slot in posted
            elif isinstance(action, Wait):
                assert action.slot in {call.slot for call in tasks.template_of(step - action.lag).calls}


@pytest.mark.parametrize("policy", ["corrected", "stale", "sync_gn", "fresh", "int8"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_steady_step_receives_what_the_plan_says(policy: str, num_ranks: int) -> None:
    plan = plan_of(num_ranks, policy, steps=12)
    template = tasks_of(plan).template_of(6)
    received = [sum(call.received_bytes[rank] for call in template.calls) for rank in range(num_ranks)]
    assert received == list(plan.bytes_received_per_step)


def test_a_bucket_leaves_with_its_last_member() -> None:
    plan = plan_of(4, "corrected", layers_per_bucket=20)
    template = tasks_of(plan).template_of(6)
    late = [action for action in template.actions if isinstance(action, Post) and action.call.is_late]
    assert len(late) == plan.num_buckets
    for number, post in enumerate(late):
        last = max(e.index for e in plan.exchanges if e.bucket == number)
        before = [a for a in template.actions[: template.actions.index(post)] if isinstance(a, Compute)]
        assert before[-1].last == last


def test_the_reference_sends_what_is_left_when_the_step_is_over() -> None:
    template = tasks_of(plan_of(4, "corrected", "gather_all", layers_per_bucket=30)).template_of(6)
    labels = [
        a.call.label if isinstance(a, Post) else a.label
        for a in template.actions
        if not isinstance(a, Compute)
    ]
    assert labels.index("output") < labels.index("bucket 2")
    assert template.is_closed


def test_steady_steps_share_one_template() -> None:
    tasks = tasks_of(plan_of(4, "corrected", steps=12, warmup_steps=3))
    assert len(set(tasks.steps[4:-1])) == 1
    assert len(tasks.templates) <= 5


def test_instructions_become_actions_in_program_order() -> None:
    plan = plan_of(4, "fresh")
    program = step_program(plan, 0)
    expected = [i for i in program if i.kind in (InstructionKind.PUBLISH, InstructionKind.GATHER)]
    posts = [a for a in tasks_of(plan).templates[0].actions if isinstance(a, Post)]
    assert [post.call.label for post in posts] == [plan.exchanges[i.exchange].layer for i in expected]


def test_moments_go_along_the_line_and_halos_to_neighbours() -> None:
    plan = plan_of(4, "fresh")
    kinds = {e.layer: e.kind for e in plan.exchanges}
    for call in tasks_of(plan).templates[0].calls:
        if kinds[call.label] is ExchangeKind.MOMENTS:
            assert {abs(h.source - h.reader) for h in call.hops} == {1}
            assert sum(h.after >= 0 for h in call.hops) == 2 * (4 - 2)
        elif kinds[call.label] is ExchangeKind.HALO:
            assert {abs(h.source - h.reader) for h in call.hops} == {1}
            assert all(h.after < 0 for h in call.hops)


@given(st.sampled_from(list(CtaPolicy)))
def test_thread_blocks_for_communication_cost_kernels_their_speed(policy: CtaPolicy) -> None:
    lowering = lowering_of(options=SimulationOptions(cta_policy=policy))
    share = lowering.cluster.collectives.compute_slowdown.value
    expected = {CtaPolicy.DEFAULT: share, CtaPolicy.LIMITED: share * 8 / 24, CtaPolicy.COPY_ENGINE: 0.0}[
        policy
    ]
    assert lowering.slowdown == pytest.approx(1000 * expected, abs=1)


def test_uneven_bands_have_uneven_work() -> None:
    from fractions import Fraction

    plan = plan_of(2, "corrected", weights=(Fraction(3), Fraction(1)))
    first = next(a for a in tasks_of(plan).template_of(6).actions if isinstance(a, Compute))
    assert first.device_ns[0] > first.device_ns[1]


def test_a_single_rank_computes_and_sends_nothing() -> None:
    tasks = tasks_of(plan_of(1, "naive_patch"))
    assert all(isinstance(action, Compute) for template in tasks.templates for action in template.actions)


def test_plans_are_lowered_to_equal_tasks_each_time() -> None:
    plan = plan_of(4, "corrected")
    first, second = tasks_of(plan), tasks_of(dataclasses.replace(plan))
    assert first.steps == second.steps
    assert [[a for a in t.actions if isinstance(a, Compute)] for t in first.templates] == [
        [a for a in t.actions if isinstance(a, Compute)] for t in second.templates
    ]
