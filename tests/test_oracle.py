"""Random plans, executed in process, are what the oracle says: the second, independent writing of every policy."""

from __future__ import annotations

import ast
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tests.oracle
from distri.core.partition import FIXED_AXES, SplitAxis
from distri.core.policy import (
    READS_LATE,
    ExchangeKind,
    Phase,
    Policy,
    PolicyRule,
    Reach,
    builtin_tables,
    policy_table,
    uniform_table,
)
from distri.core.refresh import RefreshRule
from distri.errors import PartitionError, PlanError
from tests.oracle import Oracle
from tests.toys import ToyShape, inputs_of, run_in_process, run_single, toy, toy_plan

TOLERANCE = 1e-4

PLAIN_TABLES = [name for name in builtin_tables() if not any(c in name for c in ("int", "fp8"))]
PLAIN_TABLES.append("partial")
FOR_ALL = (Policy.FRESH, Policy.STALE, Policy.FROZEN, Policy.LOCAL)
STEADY = {
    ExchangeKind.HALO: (*FOR_ALL, Policy.EXTRAPOLATED),
    ExchangeKind.MOMENTS: (*FOR_ALL, Policy.CORRECTED, Policy.SHIFTED, Policy.EXTRAPOLATED),
    ExchangeKind.CONTEXT: (*FOR_ALL, Policy.EXTRAPOLATED),
}


@st.composite
def tables(draw):
    """A table by name, or any policy for each kind; and sometimes rules for single layers."""
    if draw(st.booleans()):
        table = policy_table(draw(st.sampled_from(PLAIN_TABLES)))
    else:
        table = uniform_table(
            "any", Policy.FRESH, *(draw(st.sampled_from(policies)) for policies in STEADY.values())
        )
    rules = []
    for _ in range(draw(st.integers(0, 2))):
        kind, layers = draw(st.sampled_from(list(STEADY))), draw(st.sampled_from(["mid", "conv_*", "*"]))
        if draw(st.booleans()):
            rules.append(PolicyRule(kind, Phase.STEADY, draw(st.sampled_from(STEADY[kind])), layers))
        else:
            warmup = draw(st.sampled_from([Policy.FRESH, Policy.LOCAL]))
            rules.append(PolicyRule(kind, Phase.WARMUP, warmup, layers))
    if draw(st.integers(0, 3)) == 0:
        reach = Reach(draw(st.integers(0, 2)), draw(st.integers(1, 3)))
        rules.insert(0, PolicyRule(ExchangeKind.CONTEXT, Phase.STEADY, Policy.STALE, reach=reach))
    return table.with_rules(tuple(rules))


shapes = st.builds(
    ToyShape,
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    attention=st.booleans(),
)


def oracle_of(model, plan):
    shape = model.shape
    return Oracle(
        {name: value.double().numpy() for name, value in model.state_dict().items()},
        shape.stride,
        shape.dilation,
        shape.groups,
        shape.attention,
        tuple((tuple(patch.rows), tuple(patch.cols)) for patch in plan.partition.patches),
        {e.layer: (e.warmup.value, e.steady.value) for e in plan.exchanges[:-1]},
        plan.warmup_steps,
        {e.layer: (e.reach.near, e.reach.every) for e in plan.exchanges if e.reach is not None},
        plan.refresh.max_late_steps if plan.refresh is not None else None,
    )


def expected(model, plan, inputs=inputs_of):
    oracle = oracle_of(model, plan)
    given_inputs = [inputs(plan, step) for step in range(plan.image.num_inference_steps)]
    return [
        oracle.step(at["sample"].double().numpy(), at["encoder_hidden_states"].double().numpy(), step)
        for step, at in enumerate(given_inputs)
    ]


def assert_plan_means_what_the_oracle_says(model, plan):
    for step, (ours, theirs) in enumerate(
        zip(run_in_process(model, plan), expected(model, plan), strict=True)
    ):
        assert np.abs(ours.double().numpy() - theirs).max() < TOLERANCE, f"step {step}"


@settings(max_examples=60)
@given(
    shape=shapes,
    table=tables(),
    ranks=st.integers(1, 5),
    steps=st.integers(1, 6),
    warmup_steps=st.integers(1, 3),
    axis=st.sampled_from(FIXED_AXES),
    weights=st.none() | st.lists(st.integers(1, 5), min_size=5, max_size=5),
    units=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    cfg_split=st.booleans(),
    refresh_every=st.none() | st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_random_plans_mean_what_the_oracle_says(
    shape, table, ranks, steps, warmup_steps, axis, weights, units, cfg_split, refresh_every, seed
):
    model, graph = toy(shape, seed)
    uneven = None
    if weights is not None and axis is not SplitAxis.GRID:
        uneven = tuple(map(Fraction, weights[:ranks]))
    cfg_split = cfg_split and ranks < 4
    refresh = RefreshRule(max_late_steps=refresh_every) if refresh_every is not None else None
    try:
        plan = toy_plan(
            graph,
            ranks * (2 if cfg_split else 1),
            rows=units[0] * shape.stride,
            cols=units[1] * shape.stride,
            steps=steps,
            policy=table,
            axis=axis,
            weights=uneven,
            cfg_split=cfg_split,
            warmup_steps=warmup_steps,
            refresh=refresh,
        )
    except (PartitionError, PlanError):
        assume(False)  # too few rows for the ranks, or a frozen policy that is to be refreshed
    assert_plan_means_what_the_oracle_says(model, plan)


@pytest.mark.parametrize("policy", PLAIN_TABLES)
@pytest.mark.parametrize("axis", FIXED_AXES)
def test_every_table_means_what_the_oracle_says(policy, axis):
    model, graph = toy(ToyShape(kernel=(5, 3), stride=2, dilation=2))
    plan = toy_plan(graph, 4, rows=20, cols=24, steps=5, policy=policy, axis=axis, warmup_steps=2)
    assert_plan_means_what_the_oracle_says(model, plan)


@pytest.mark.parametrize("late", READS_LATE)
def test_the_oracle_itself_sees_a_difference_between_policies(late):
    """It is worth nothing if every policy gave the same numbers."""
    model, graph = toy()
    moments = late if late in (Policy.CORRECTED, Policy.SHIFTED, Policy.EXTRAPOLATED) else Policy.STALE
    rest = late if late is Policy.EXTRAPOLATED else Policy.STALE
    table = uniform_table("late", Policy.FRESH, rest, moments, rest)
    last = [expected(model, toy_plan(graph, 3, policy=p))[-1] for p in (table, "fresh", "no_sync", "local")]
    for place, one in enumerate(last):
        assert all(np.abs(one - other).max() > 100 * TOLERANCE for other in last[:place])


def test_the_oracle_is_the_single_device_where_everything_is_fresh():
    model, graph = toy(ToyShape(kernel=(3, 5), stride=2))
    plan = toy_plan(graph, 3, policy="fresh", rows=20)
    for theirs, single in zip(expected(model, plan), run_single(model, plan), strict=True):
        assert np.abs(theirs - single.double().numpy()).max() < TOLERANCE


def test_the_oracle_has_nothing_of_what_it_judges():
    tree = ast.parse(Path(tests.oracle.__file__).read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    ]
    assert not any((name or "").split(".")[0] in ("distri", "torch", "diffusers") for name in imported)
