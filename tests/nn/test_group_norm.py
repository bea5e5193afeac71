"""Laws of the moments: what `docs/group-norm.md` proves, for random sets, bands and ranks, and for what broke fp16."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distri.nn.group_norm import centred, merge_moments, normalise

EPS32 = float(np.finfo(np.float32).eps)

seeds = st.integers(0, 2**31 - 1)
heights = st.lists(st.integers(1, 5), min_size=2, max_size=16)
"""Rows of each rank's band: single rows too, two to sixteen ranks."""


def drawn(seed, rows, cols=3, channels=4, mean=0.0, spread=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (mean + spread * torch.randn(2, channels, rows, cols, generator=generator)).to(dtype)


def moments_of(x, groups):
    return centred(x, groups)[0]


def bands_of(x, rows):
    return list(x.split(rows, dim=2))


def folded(moments):
    total = moments[0]
    for other in moments[1:]:
        total = merge_moments(total, other)
    return total


def true_moments(x, groups=2):
    """(count, mean, biased variance) in float64, by their definition."""
    values = x.double().reshape(x.shape[0], groups, -1)
    return values.shape[-1], values.mean(-1), ((values - values.mean(-1, keepdim=True)) ** 2).mean(-1)


def variance_of(moments):
    return moments[..., 2] / moments[..., 0]


def assert_close_to_truth(moments, x, groups=2):
    """To fp32 rounding: of the variance itself, and of the square of what the mean is rounded by."""
    count, mean, variance = true_moments(x, groups)
    largest = x.double().abs().max()
    assert torch.all(moments[..., 0] == count)
    assert torch.all((moments[..., 1].double() - mean).abs() <= 16 * EPS32 * largest)
    allowed = 64 * EPS32 * variance + (16 * EPS32 * largest) ** 2
    deviation = 16 * EPS32 * largest * variance.sqrt()
    assert torch.all((variance_of(moments).double() - variance).abs() <= allowed + deviation)


@given(seed=seeds, rows=heights, mean=st.floats(-100, 100), spread=st.floats(1e-3, 100))
def test_merged_moments_are_the_moments_of_the_union(seed, rows, mean, spread):
    x = drawn(seed, sum(rows), mean=mean, spread=spread)
    assert_close_to_truth(folded([moments_of(band, 2) for band in bands_of(x, rows)]), x)


@given(
    seed=seeds,
    rows=heights,
    mean=st.floats(1e3, 6e4).flatmap(lambda size: st.sampled_from([size, -size])),
    spread=st.sampled_from([0.0, 1e-3, 0.3, 3.0, 30.0]),
)
def test_half_precision_with_huge_means_gives_no_negative_variance_and_no_nan(seed, rows, mean, spread):
    x = drawn(seed, sum(rows), mean=mean, spread=spread, dtype=torch.float16)
    merged = folded([moments_of(band, 2) for band in bands_of(x, rows)])
    assert torch.all(merged[..., 2] >= 0)
    assert_close_to_truth(merged, x)
    for band in bands_of(x, rows):
        assert torch.isfinite(normalise(band, merged, nn.GroupNorm(2, 4).half())).all()


finite = st.floats(-6e4, 6e4, width=16)
part = st.tuples(st.integers(1, 10**6), finite, st.floats(0, 2.0**40, width=32))


@given(parts=st.lists(part, min_size=2, max_size=16))
def test_no_merge_of_any_moments_has_a_negative_variance(parts):
    """The rule itself, on moments that no tensor made: every term of M2 is non-negative after rounding too."""
    merged = folded([torch.tensor(numbers, dtype=torch.float32) for numbers in parts])
    assert torch.isfinite(merged).all()
    assert merged[2] >= max(m2 for _, _, m2 in parts)


@given(rows=heights, value=finite)
def test_a_constant_picture_has_exactly_no_variance_and_its_own_mean(rows, value):
    x = torch.full((1, 4, sum(rows), 2), value, dtype=torch.float16)
    merged = folded([moments_of(band, 2) for band in bands_of(x, rows)])
    assert torch.all(merged[..., 1] == float(x[0, 0, 0, 0]))
    assert torch.all(merged[..., 2] == 0)


@given(seed=seeds, rows=st.lists(st.integers(1, 3), min_size=3, max_size=4), mean=st.floats(-100, 100))
def test_the_order_of_merging_changes_rounding_only(seed, rows, mean):
    x = drawn(seed, sum(rows), mean=mean)
    parts = [moments_of(band, 2) for band in bands_of(x, rows)]
    for order in permutations(parts):
        assert_close_to_truth(folded(order), x)


@given(seed=seeds, rows=heights)
def test_each_rank_of_the_line_finds_the_same_moments_to_rounding(seed, rows):
    """Own, then what is merged before, then what is merged after: the order in which a layer has them."""
    parts = [moments_of(band, 2) for band in bands_of(drawn(seed, sum(rows), mean=3.0), rows)]
    everywhere = []
    for place, own in enumerate(parts):
        sides = [side for side in (parts[:place], parts[:place:-1]) if side]
        everywhere.append(folded([own, *(folded(side) for side in sides)]))
    for found in everywhere[1:]:
        assert torch.allclose(found, everywhere[0], rtol=1e-5, atol=1e-5)


@given(seed=seeds, rows=heights, groups=st.sampled_from([1, 2, 4]), affine=st.booleans())
def test_normalising_each_band_is_torchs_group_norm_of_the_picture(seed, rows, groups, affine):
    """So the variance is biased: with 1 / (n - 1), or with one band's count, small pictures would differ."""
    x = drawn(seed, sum(rows), mean=0.5)
    torch.manual_seed(seed)
    module = nn.GroupNorm(groups, 4, affine=affine)
    if affine:
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    bands = bands_of(x, rows)
    merged = folded([moments_of(band, groups) for band in bands])
    ours = torch.cat([normalise(band, merged, module) for band in bands], dim=2)
    assert torch.allclose(ours, module(x), atol=2e-4)
    own, deviations = zip(*(centred(band, groups) for band in bands), strict=True)
    from_deviations = [
        normalise(deviation, merged, module, about=moments[..., 1])
        for deviation, moments in zip(deviations, own, strict=True)
    ]
    assert torch.allclose(torch.cat(from_deviations, dim=2), module(x), atol=2e-4)


@given(seed=seeds, rows=heights, chosen=st.integers(0, 15))
def test_stale_moments_of_the_others_with_fresh_own_are_true_where_only_this_rank_changed(seed, rows, chosen):
    changed = chosen % len(rows)
    before = bands_of(drawn(seed, sum(rows)), rows)
    now = list(before)
    now[changed] = drawn(seed + 1, rows[changed], mean=2.0, spread=3.0)
    others = [moments_of(band, 2) for place, band in enumerate(before) if place != changed]
    assert_close_to_truth(folded([moments_of(now[changed], 2), *others]), torch.cat(now, dim=2))


# What the page says of the two ways to apply a rank's own change, in float64, on mean and mean square.


def mean_and_square(bands):
    values = np.concatenate(bands)
    return np.array([values.mean(), (values**2).mean()])


def corrected(before, now, own, weight):
    """The previous step's global figures plus this rank's own change, times `weight`."""
    return mean_and_square(before) + weight * (mean_and_square([now[own]]) - mean_and_square([before[own]]))


sizes = st.lists(st.integers(1, 40), min_size=2, max_size=8)


def values_of(seed, counts):
    rng = np.random.default_rng(seed)
    return [rng.normal(rng.normal(), 1.0, count) for count in counts]


@given(seed=seeds, counts=sizes, chosen=st.integers(0, 7))
def test_weighting_a_ranks_change_by_its_share_is_replacing_its_share(seed, counts, chosen):
    """Theorem 2: so `corrected` and `stale` are one thing for moments that are merged with their counts."""
    before, now = values_of(seed, counts), values_of(seed + 1, counts)
    own = chosen % len(counts)
    replaced = [now[place] if place == own else band for place, band in enumerate(before)]
    weighted = corrected(before, now, own, counts[own] / sum(counts))
    assert np.allclose(weighted, mean_and_square(replaced), atol=1e-12)


@given(seed=seeds, parts=st.integers(2, 8), count=st.integers(1, 40), change=st.floats(-3, 3))
def test_the_unweighted_form_is_exact_where_all_ranks_changed_alike(seed, parts, count, change):
    before = values_of(seed, [count] * parts)
    now = [band + change for band in before]
    mean_now = mean_and_square(now)[0]
    assert math.isclose(corrected(before, now, 0, 1.0)[0], mean_now, abs_tol=1e-12)


@given(seed=seeds, parts=st.integers(2, 8), count=st.integers(1, 40), change=st.floats(0.5, 3))
def test_the_unweighted_form_is_wrong_where_one_rank_changed_and_by_how_much(seed, parts, count, change):
    """Theorem 3: it counts the other ranks' shares as changed too, which is (1 - own share) of the change."""
    before = values_of(seed, [count] * parts)
    now = [before[0] + change, *before[1:]]
    truth = mean_and_square(now)[0]
    assert math.isclose(corrected(before, now, 0, 1 / parts)[0], truth, abs_tol=1e-12)
    assert math.isclose(corrected(before, now, 0, 1.0)[0] - truth, (1 - 1 / parts) * change, abs_tol=1e-12)


def test_the_unweighted_form_can_make_a_negative_variance():
    before = [np.array([1.0, 1.0]), np.array([-1.0, -1.0])]
    now = [np.array([0.0, 0.0]), before[1]]
    mean, square = corrected(before, now, 0, 1.0)
    assert square - mean**2 == -1.0
    mean, square = corrected(before, now, 0, 0.5)
    assert square - mean**2 == 0.25


@pytest.mark.parametrize("mean", [50.0, 200.0])
def test_mean_square_less_squared_mean_goes_negative_or_overflows_in_fp16_where_ours_does_not(mean):
    """What the reference computes: the picture that went black."""
    x = drawn(1, 8, cols=8, mean=mean, spread=0.05, dtype=torch.float16)
    values = x.reshape(2, 2, -1)
    difference = (values * values).mean(-1) - values.mean(-1) ** 2
    assert not torch.all(torch.isfinite(difference) & (difference > 0))
    ours = moments_of(x, 2)
    assert torch.isfinite(ours).all()
    assert torch.all(ours[..., 2] >= 0)
