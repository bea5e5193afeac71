"""Laws of adaptive warm-up and refresh."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distri.core.policy import Phase
from distri.core.refresh import PhaseControl, RefreshRule
from distri.errors import PlanError

changes = st.lists(st.floats(0, 2), min_size=1, max_size=40)


@given(changes=changes, warmup=st.integers(1, 5), limit=st.floats(0, 2))
def test_a_step_is_synchronous_exactly_in_warm_up_or_where_the_latent_changed_too_much(
    changes, warmup, limit
):
    control = PhaseControl(warmup, RefreshRule(max_change=limit))
    for step, change in enumerate(changes):
        expected = step < warmup or change > limit
        assert (control.decide(step, change) is Phase.WARMUP) == expected


@given(steps=st.integers(1, 60), warmup=st.integers(1, 5), longest=st.integers(1, 7))
def test_no_more_displaced_steps_in_a_row_than_allowed(steps, warmup, longest):
    control = PhaseControl(warmup, RefreshRule(max_late_steps=longest))
    phases = [control.decide(step, 0.0) for step in range(steps)]
    runs = "".join(phase.value[0] for phase in phases).split("w")
    assert max(len(run) for run in runs) <= longest
    assert all(phase is Phase.WARMUP for phase in phases[:warmup])


def test_a_change_that_is_not_a_number_is_not_taken_for_a_small_one():
    assert PhaseControl(1, RefreshRule(max_change=1.0)).decide(5, float("nan")) is Phase.WARMUP


@pytest.mark.parametrize("rule", [{"max_change": -1.0}, {"max_change": float("nan")}, {"max_late_steps": 0}])
def test_impossible_rules_are_refused(rule):
    with pytest.raises(PlanError, match=r"cannot be negative|at least 1"):
        RefreshRule(**rule)
