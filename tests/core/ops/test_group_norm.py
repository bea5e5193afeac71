from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distri.core.ops.group_norm import Moments, merge

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20)


def moments(values: list[float]) -> Moments:
    array = np.asarray(values)
    return float(array.size), float(array.mean()), float(((array - array.mean()) ** 2).sum())


@given(parts=st.lists(VALUES, min_size=1, max_size=6))
def test_merged_moments_are_those_of_all_values(parts: list[list[float]]) -> None:
    count, mean, m2 = reduce(merge, map(moments, parts))
    everything = np.concatenate(parts)
    assert count == everything.size
    assert mean == pytest.approx(everything.mean(), abs=1e-9)
    assert m2 / count == pytest.approx(everything.var(), rel=1e-9, abs=1e-9)


@given(a=VALUES, b=VALUES, c=VALUES)
def test_prefix_and_suffix_merge_like_any_other_order(a: list[float], b: list[float], c: list[float]) -> None:
    left = merge(merge(moments(a), moments(b)), moments(c))
    right = merge(moments(a), merge(moments(b), moments(c)))
    assert left == pytest.approx(right, rel=1e-9, abs=1e-6)


@given(
    stale=st.tuples(st.integers(1, 10**6), st.floats(-1e6, 1e6), st.floats(0, 1e12)),
    own=st.tuples(st.integers(1, 10**6), st.floats(-1e6, 1e6), st.floats(0, 1e12)),
)
def test_the_variance_is_never_negative_whatever_is_stale(stale: Moments, own: Moments) -> None:
    count, _, m2 = merge(stale, own)
    assert m2 / count >= 0


@given(others=VALUES, before=VALUES, after=VALUES)
def test_corrected_is_exact_when_only_this_rank_changed(
    others: list[float], before: list[float], after: list[float]
) -> None:
    stale_others = moments(others)
    merge(stale_others, moments(before))
    corrected = merge(stale_others, moments(after))
    assert corrected == pytest.approx(moments([*others, *after]), rel=1e-9, abs=1e-6)


def test_a_large_mean_does_not_cancel_in_half_precision() -> None:
    a = tuple(np.float32(x) for x in moments([1000.0, 1001.0]))
    b = tuple(np.float32(x) for x in moments([1000.5, 1001.5]))
    count, _, m2 = merge(a, b)
    assert m2 / count == pytest.approx(np.var([1000.0, 1001.0, 1000.5, 1001.5]), rel=1e-6)
