"""GroupNorm: moments as (count, mean, M2), merged by Chan's rule.

M2 is the sum of squared deviations from the mean. Merging two sets of values gives

    delta = mean_b - mean_a
    mean  = mean_a + delta * n_b / n
    M2    = M2_a + M2_b + delta^2 * n_a * n_b / n        (Chan, Golub and LeVeque 1979, updating formulae)

Every term of M2 is non-negative, so a variance M2 / n never is negative, whatever was rounded before; E[x^2] - E[x]^2
has no such guarantee and cancels in fp16. The variance is the biased one, as in torch.

`corrected` merges this rank's moments of step t with the others' of step t - 1. It is the previous step's global
moments with this rank's share replaced: equal to the true moments where only this rank changed.
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
