"""Plan to JSON to plan is the identity, for random requests: every field that a plan can have takes part."""

from __future__ import annotations

import json
from fractions import Fraction
from functools import cache

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distri.config.plan import dump_plan, parse_plan
from distri.core.codec import Codec
from distri.core.graph import LayerGraph
from distri.core.latent import LatentPlace
from distri.core.partition import SplitAxis
from distri.core.plan import DTYPE_BYTES, ImageRequest
from distri.core.planner import PlanRequest, make_plan, plan_hash
from distri.core.policy import ExchangeKind, Phase, Policy, PolicyRule, Reach, builtin_tables
from distri.core.refresh import RefreshRule
from distri.core.verify import verify
from distri.errors import PlanError, UserError
from tests.core.test_exchanger_machine import graph_of

layers = st.sampled_from(["*", "1.*", "*.conv", "nothing here", "[0-9].?onv"])
rules = st.one_of(
    st.builds(
        PolicyRule,
        st.sampled_from([ExchangeKind.HALO, ExchangeKind.CONTEXT]),
        st.just(Phase.STEADY),
        st.sampled_from([Policy.STALE, Policy.EXTRAPOLATED]),
        layers,
        st.sampled_from(list(Codec)),
    ),
    st.builds(
        PolicyRule,
        st.just(ExchangeKind.CONTEXT),
        st.just(Phase.STEADY),
        st.just(Policy.STALE),
        layers,
        reach=st.builds(Reach, st.integers(0, 3), st.integers(1, 9)),
    ),
    st.builds(
        PolicyRule,
        st.sampled_from([ExchangeKind.HALO, ExchangeKind.MOMENTS, ExchangeKind.CONTEXT]),
        st.just(Phase.WARMUP),
        st.sampled_from([Policy.FRESH, Policy.LOCAL]),
        layers,
    ),
)
requests = st.builds(
    PlanRequest,
    image=st.builds(
        ImageRequest,
        st.integers(20, 40).map(lambda rows: 8 * rows),
        st.integers(20, 40).map(lambda cols: 8 * cols),
        st.integers(1, 50),
        st.booleans(),
        st.integers(1, 3),
    ),
    num_ranks=st.integers(1, 6),
    cfg_split=st.sampled_from([None, False, True]),
    policy=st.builds(
        lambda table, more: table.with_rules(tuple(more)),
        st.sampled_from(list(builtin_tables().values())),
        st.lists(rules, max_size=3),
    ),
    warmup_steps=st.integers(0, 9),
    refresh=st.none() | st.builds(RefreshRule, st.none() | st.floats(0, 9), st.none() | st.integers(1, 9)),
    axis=st.sampled_from(list(SplitAxis)),
    weights=st.none() | st.lists(st.fractions(Fraction(1, 9), 9), min_size=1, max_size=6).map(tuple),
    dtype=st.sampled_from(list(DTYPE_BYTES)),
    layers_per_bucket=st.integers(1, 5),
    latent=st.sampled_from(list(LatentPlace)),
)


@cache
def graph() -> LayerGraph:
    return graph_of(["norm", "wide", "attention", "down", "norm", "conv"])


@settings(max_examples=150)
@given(request=requests)
def test_any_plan_comes_back_from_its_json(request: PlanRequest) -> None:
    try:
        plan = make_plan(request, graph())
    except UserError:
        assume(False)
    text = json.dumps(dump_plan(plan))
    again = parse_plan(text)
    assert again == plan
    assert again.hash == plan_hash(plan)
    assert json.dumps(dump_plan(again)) == text
    verify(again, graph())


@settings(max_examples=40)
@given(request=requests, data=st.data())
def test_no_number_of_a_plan_can_be_changed_alone(request: PlanRequest, data: st.DataObject) -> None:
    """The hash covers every field, and `bands` is held against the partition."""
    try:
        body = dump_plan(make_plan(request, graph()))
    except UserError:
        assume(False)
    container, key = data.draw(st.sampled_from(list(numbers_in(body))))
    container[key] += 1
    try:
        parse_plan(json.dumps(body))
    except PlanError:
        return
    raise AssertionError(f"nobody noticed another {key}")


def numbers_in(value):
    """Every place of a whole number, as its container and its key there."""
    places = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(places):
        if isinstance(inner, int) and not isinstance(inner, bool):
            yield value, key
        elif isinstance(inner, dict | list):
            yield from numbers_in(inner)
