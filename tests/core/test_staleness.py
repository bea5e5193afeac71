import pytest
from hypothesis import given
from hypothesis import strategies as st

from distri.core.policy import Phase, Policy
from distri.core.staleness import check_version, phase_of, readers_of, required_version
from distri.errors import PolicyError, StaleReadError

STEPS = st.integers(1, 30)
WARMUPS = st.integers(1, 30)
STEADY = st.sampled_from([Policy.FRESH, Policy.STALE, Policy.CORRECTED, Policy.FROZEN, Policy.LOCAL])


@given(step=STEPS, warmup=WARMUPS)
def test_stale_and_corrected_read_exactly_the_previous_step(step: int, warmup: int) -> None:
    assert required_version(Policy.STALE, step, warmup) == step - 1
    assert required_version(Policy.CORRECTED, step, warmup) == step - 1


@given(step=st.integers(0, 30), warmup=WARMUPS)
def test_fresh_reads_this_step_and_local_reads_nothing(step: int, warmup: int) -> None:
    assert required_version(Policy.FRESH, step, warmup) == step
    assert required_version(Policy.LOCAL, step, warmup) is None


@given(step=STEPS, warmup=WARMUPS)
def test_frozen_reads_the_last_warmup_step(step: int, warmup: int) -> None:
    assert required_version(Policy.FROZEN, step, warmup) == warmup - 1


@pytest.mark.parametrize("policy", [Policy.STALE, Policy.CORRECTED])
def test_the_first_step_has_no_previous_one(policy: Policy) -> None:
    with pytest.raises(PolicyError, match="at step 0 asks for a version before the first step"):
        required_version(policy, 0, 0)


@given(num_steps=st.integers(1, 12), warmup=st.integers(1, 12), steady=STEADY)
def test_readers_of_a_version_are_the_steps_that_require_it(
    num_steps: int, warmup: int, steady: Policy
) -> None:
    policies = (Policy.FRESH, steady)
    read: dict[int, list[int]] = {version: [] for version in range(num_steps)}
    for step in range(num_steps):
        policy = Policy.FRESH if phase_of(step, warmup) is Phase.WARMUP else steady
        version = required_version(policy, step, warmup)
        if version is not None:
            read[version].append(step)
    for version, steps in read.items():
        assert readers_of(version, policies, warmup, num_steps) == tuple(steps)


def test_another_version_than_the_required_one_is_an_error() -> None:
    check_version("conv_in", 3, 3)
    with pytest.raises(StaleReadError, match="conv_in: version 4 is required, version 3 is at hand"):
        check_version("conv_in", 4, 3)
