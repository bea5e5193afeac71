from collections.abc import Iterator

import pytest

from distri.core.graph import LayerGraph
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import Policy, builtin_tables, policy_table
from distri.core.program import InstructionKind, held_buckets, step_program, travels_in_bucket

STEPS, WARMUP = 6, 2


def plans(graph: LayerGraph) -> Iterator[Plan]:
    for name in builtin_tables():
        request = PlanRequest(
            ImageRequest(512, 512, STEPS), 3, policy=policy_table(name), warmup_steps=WARMUP
        )
        yield make_plan(request, graph)


def test_every_operation_is_computed_once_and_in_order(demo: LayerGraph) -> None:
    for plan in plans(demo):
        for step in range(STEPS):
            ranges = [
                (i.first, i.last) for i in step_program(plan, step) if i.kind is InstructionKind.COMPUTE
            ]
            assert [op for first, last in ranges for op in range(first, last)] == list(range(len(demo)))


def test_what_is_awaited_was_published_and_what_is_published_is_awaited(demo: LayerGraph) -> None:
    for plan in plans(demo):
        published, awaited = set(), set()
        for step in range(STEPS):
            for item in step_program(plan, step):
                if item.kind is InstructionKind.PUBLISH:
                    assert item.version == step
                    published.add((item.exchange, item.version))
                if item.kind is InstructionKind.AWAIT:
                    assert (item.exchange, item.version) in published
                    awaited.add((item.exchange, item.version))
        assert published == awaited


def test_each_step_ends_with_the_gather_of_its_output(demo: LayerGraph) -> None:
    for plan in plans(demo):
        for step in range(STEPS):
            last = step_program(plan, step)[-1]
            assert (last.kind, last.version) == (InstructionKind.GATHER, step)


@pytest.mark.parametrize("step", range(STEPS))
def test_steady_phase_reads_previous_step_only(demo: LayerGraph, step: int) -> None:
    plan = make_plan(PlanRequest(ImageRequest(512, 512, STEPS), 3, warmup_steps=WARMUP), demo)
    versions = {i.version for i in step_program(plan, step) if i.kind is InstructionKind.AWAIT}
    assert versions == {step if step < WARMUP else step - 1}


def test_what_is_read_in_its_own_step_never_waits_in_a_bucket(demo: LayerGraph) -> None:
    for plan in plans(demo):
        for exchange in plan.exchanges:
            assert travels_in_bucket(plan, exchange, 0) is None
            if exchange.steady is Policy.STALE:
                assert travels_in_bucket(plan, exchange, WARMUP) == exchange.bucket


@pytest.mark.parametrize("layers_per_bucket", [1, 8, 20, 60])
def test_what_leaves_with_the_next_step_is_read_in_its_second_half(
    demo: LayerGraph, layers_per_bucket: int
) -> None:
    request = PlanRequest(ImageRequest(512, 512, STEPS), 3, layers_per_bucket=layers_per_bucket)
    plan = make_plan(request, demo)
    late = [e for e in plan.exchanges if e.bucket is not None]
    held = held_buckets(plan)
    assert all(e.index >= len(demo) / 2 for e in late if e.bucket in held)
    first_of_others = [min(e.index for e in late if e.bucket == b) for b in {e.bucket for e in late} - held]
    assert all(index < len(demo) / 2 for index in first_of_others)
