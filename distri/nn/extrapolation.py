"""Late values carried forward to this step: along a straight line, but never farther than the last two changes agree.

A plain straight line, 2 x[t-1] - x[t-2], feeds its own error back with the opposite sign: what a patch gets wrong at
one step changes its neighbours at the next, and from four patches on the pictures fall apart. So the change that is
carried forward is the smaller of the last two, and none where they point in opposite directions (the minmod limiter of
Roe 1986): an oscillation has no change to feed on, and activations that are linear in the step are still exact.

Shape suffixes: B batch, G groups, 3 the moments (count, mean, M2).
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_GROWTH = 2.0
"""By how much a spread may be taken to grow or shrink in a step."""


def carry_forward(last: Tensor, before: Tensor, first: Tensor) -> Tensor:
    """The value to expect after `first`, `before` and `last`, of any shape.

    >>> versions = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [4.0, 3.0, 1.0]])
    >>> carry_forward(versions[2], versions[1], versions[0])
    tensor([6., 4., 1.])
    """
    earlier = before - first
    return last + torch.clamp(last - before, earlier.clamp(max=0), earlier.clamp(min=0))


def carry_moments_forward(last_BG3: Tensor, before_BG3: Tensor, first_BG3: Tensor) -> Tensor:
    """Moments to expect: means by differences, M2 by ratios, so that it cannot become negative; counts stay.

    Where a spread was zero there is no ratio, and the last M2 stands.
    """
    count_BG, mean_BG, m2_BG = last_BG3.unbind(-1)
    carried_BG = carry_forward(mean_BG, before_BG3[..., 1], first_BG3[..., 1])
    earlier_BG = _growth(before_BG3[..., 2], first_BG3[..., 2])
    growth_BG = torch.clamp(
        _growth(m2_BG, before_BG3[..., 2]), earlier_BG.clamp(max=1), earlier_BG.clamp(min=1)
    )
    return torch.stack((count_BG, carried_BG, m2_BG * growth_BG), dim=-1)


def _growth(now_BG: Tensor, then_BG: Tensor) -> Tensor:
    ratio_BG = torch.where(then_BG > 0, now_BG / then_BG, torch.ones_like(now_BG))
    return ratio_BG.clamp(1 / MOST_GROWTH, MOST_GROWTH)
