"""GroupNorm: moments as (count, mean, M2), merged by Chan's rule.

M2 is the sum of squared deviations from the mean. Merging two sets of values gives

    delta = mean_b - mean_a
    mean  = mean_a + delta * n_b / n
    M2    = M2_a + M2_b + delta^2 * n_a * n_b / n        (Chan, Golub and LeVeque 1979, updating formulae)

Every term of M2 is non-negative, so a variance M2 / n never is negative, whatever was rounded before; E[x^2] - E[x]^2
has no such guarantee and cancels in fp16. The variance is the biased one, as in torch.

`corrected` merges this rank's moments of step t with the others' of step t - 1. It is the previous step's global
moments with this rank's share replaced: equal to the true moments where only this rank changed.

`shifted` is the correction as DistriFusion publishes it: the global mean and mean square of step t - 1, moved by this
rank's own change of each. It takes every rank to have changed as this one did, so it is not exact where only this rank
changed; and it can drive the variance below zero, where this rank's own variance stands in.
"""

from __future__ import annotations

from typing import Any

NUM_MOMENTS = 3

Moments = tuple[Any, Any, Any]
"""(count, mean, M2) as floats, numpy arrays or torch tensors: the rule is the same arithmetic for all of them."""


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets; the counts must not both be zero.

    >>> merge((2.0, 1.0, 2.0), (2.0, 5.0, 2.0))
    (4.0, 3.0, 20.0)
    """
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    count = n_a + n_b
    share = n_b / count
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * (n_a * share)


def shift(whole: Moments, own_before: Moments, own: Moments) -> Moments:
    """`whole` moved by the change from `own_before` to `own`; the variance may come out negative.

    >>> shift((4.0, 3.0, 20.0), (2.0, 1.0, 2.0), (2.0, 2.0, 2.0))
    (4.0, 4.0, 4.0)
    """
    (count, mean, m2), (n_before, mean_before, m2_before), (n_own, mean_own, m2_own) = whole, own_before, own
    moved = mean + (mean_own - mean_before)
    square_before = m2_before / n_before + mean_before * mean_before
    square_own = m2_own / n_own + mean_own * mean_own
    square = m2 / count + mean * mean + (square_own - square_before)
    return count, moved, (square - moved * moved) * count
