import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distri.core.latent import LatentPlace
from distri.core.partition import SplitAxis
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import ExchangeKind, Phase, policy_table
from distri.core.program import InstructionKind, held_buckets, step_program
from distri.core.refresh import RefreshRule
from distri.simulator.longest_path import run_longest_path
from distri.simulator.lowering import Lowering, PlanLowering, phases_of, serving_of
from distri.simulator.memory import memory_of
from distri.simulator.options import CtaPolicy, SimulationOptions
from distri.simulator.steps import WaitKind
from distri.simulator.tasks import Compute, Post, Wait
from tests.simulator.helpers import POLICIES, cluster_of, graph_of, lowering_of, plan_of, plans, tasks_of


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


@pytest.mark.parametrize("policy", ["corrected", "fresh", "naive_patch", "int8"])
@pytest.mark.parametrize(("num_ranks", "cfg_split"), [(3, False), (4, True)])
def test_a_latent_on_its_patch_is_gathered_once_and_else_only_partners_meet(
    policy: str, num_ranks: int, cfg_split: bool
) -> None:
    plan = plan_of(num_ranks, policy, cfg_split=cfg_split, latent=LatentPlace.PATCH)
    tasks = tasks_of(plan)
    template, last = tasks.template_of(6), tasks.template_of(plan.image.num_inference_steps - 1)
    received = [sum(call.received_bytes[rank] for call in template.calls) for rank in range(num_ranks)]
    assert received == list(plan.bytes_received_per_step)
    outputs = [call for call in template.calls if call.label == "output"]
    pairs = {(hop.source, hop.reader) for call in outputs for hop in call.hops}
    assert pairs == ({(0, 2), (2, 0), (1, 3), (3, 1)} if cfg_split else set())
    assert not any(call.groups for call in outputs)
    assert not template.is_closed
    (gathered,) = [call for call in last.calls if call.label == "latent"]
    assert not any(call.label == "latent" for call in template.calls)
    own = 2 * plan.image.num_images * 4 * plan.partition.patches[0].area
    whole = 2 * plan.image.num_images * 4 * plan.latent.area * plan.mesh.cfg
    assert gathered.received_bytes[0] == whole - own
    assert isinstance(last.actions[-1], Wait)


def test_what_reads_the_latent_waits_for_its_neighbours_where_no_rank_has_the_whole() -> None:
    labels = [call.label for call in tasks_of(plan_of(4, latent=LatentPlace.PATCH)).template_of(6).calls]
    assert labels[0] == "conv_in"
    assert "conv_in" not in [call.label for call in tasks_of(plan_of(4)).template_of(6).calls]


def test_sparing_the_gather_saves_time_where_a_link_is_slow() -> None:
    lowering = lowering_of("rtx4090")
    times = {place: lowering.latency_ns(plan_of(4, size=1024, latent=place)) for place in LatentPlace}
    assert times[LatentPlace.PATCH] < times[LatentPlace.WHOLE]


def test_a_bucket_leaves_with_its_last_member_or_when_the_output_is_there() -> None:
    plan = plan_of(4, "corrected", layers_per_bucket=20)
    held = held_buckets(plan)
    template = tasks_of(plan).template_of(6)
    late = [action for action in template.actions if isinstance(action, Post) and action.call.is_late]
    assert len(late) == plan.num_buckets
    assert 0 < len(held) < plan.num_buckets
    for number, post in enumerate(late):
        last = plan.exchanges[-1].index
        if number not in held:
            last = max(e.index for e in plan.exchanges if e.bucket == number)
        before = [a for a in template.actions[: template.actions.index(post)] if isinstance(a, Compute)]
        assert before[-1].last == last
    actions = [a.call.label if isinstance(a, Post) else "" for a in template.actions]
    assert all(actions.index("output") < actions.index(f"bucket {number}") for number in held)


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


@given(plans())
@settings(max_examples=40, deadline=None)
def test_a_step_publishes_and_awaits_what_its_program_says(plan: Plan) -> None:
    if plan.pattern == "gather_all":
        return  # its graphs send at the last step too, and wait for everything when a step ends
    lowered = PlanLowering(lowering_of(), plan)
    for step in range(plan.image.num_inference_steps):
        program = step_program(plan, step)
        published = [i.exchange for i in program if i.kind is InstructionKind.PUBLISH]
        awaited = {i.exchange: i.version for i in program if i.kind is InstructionKind.AWAIT}
        decisions = lowered.decisions(step)
        for place, exchange in enumerate(plan.exchanges[:-1]):
            decision = decisions[serving_of(exchange)]
            assert decision.is_published == (place in published)
            if decision.wait is WaitKind.OWN_STEP:
                assert awaited[place] == step
            elif decision.wait is not WaitKind.NOTHING:
                assert awaited[place] == step - 1
            elif place in awaited:  # it was waited for in the step that sent it, or before
                assert awaited[place] < step


def test_far_contexts_of_a_reach_rest_between_their_steps() -> None:
    plan = plan_of(8, "partial", steps=20)
    tasks = tasks_of(plan)
    received = [
        sum(call.received_bytes[0] for call in tasks.template_of(step).calls) for step in range(5, 19)
    ]
    assert len(set(received)) == 2
    reach = next(exchange.reach for exchange in plan.exchanges if exchange.reach)
    assert received.count(max(received)) == pytest.approx(len(received) / reach.every, abs=1)


def test_a_refresh_makes_a_step_synchronous() -> None:
    plan = plan_of(4, "corrected", steps=20, warmup_steps=3, refresh=RefreshRule(max_late_steps=4))
    phases = phases_of(plan)
    assert [step for step, phase in enumerate(phases) if phase is Phase.WARMUP] == [0, 1, 2, 7, 12, 17]
    tasks = tasks_of(plan)
    assert tasks.steps[7] == tasks.steps[12] == tasks.steps[1]
    assert run_longest_path(tasks).total_ns == run_longest_path(tasks, is_periodic=False).total_ns


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_kept_from_other_plans_changes_no_answer(policy: str) -> None:
    lowering = Lowering(graph_of(), cluster_of(), SimulationOptions())
    for warmup_steps in (1, 3):
        for layers_per_bucket in (5, 40):
            plan = plan_of(4, policy, warmup_steps=warmup_steps, layers_per_bucket=layers_per_bucket)
            fresh = Lowering(graph_of(), cluster_of(), SimulationOptions())
            assert (
                lowering.latency_ns(plan) == run_longest_path(fresh.lower(plan), is_periodic=False).total_ns
            )


def test_steps_whose_patches_take_turns_cost_what_each_costs_by_itself() -> None:
    graph, lowering = graph_of(), lowering_of()

    def plan_by(axis: SplitAxis) -> Plan:
        image = ImageRequest(512, 768, 5)
        request = PlanRequest(image, 3, False, policy_table("naive_patch"), axis=axis, dtype="float16")
        return make_plan(request, graph)

    rows, cols, both = (plan_by(axis) for axis in (SplitAxis.ROWS, SplitAxis.COLS, SplitAxis.ALTERNATE))
    per_step = [run_longest_path(lowering.lower(plan)).total_ns // 5 for plan in (rows, cols)]
    assert per_step[0] != per_step[1]
    assert run_longest_path(lowering.lower(both)).total_ns == 3 * per_step[0] + 2 * per_step[1]
    held = [
        [use.activations for use in memory_of(plan, graph, lowering.cluster)] for plan in (rows, cols, both)
    ]
    assert held[2] == [max(pair) for pair in zip(held[0], held[1], strict=True)]
