"""Operations that treat each position alone: linear maps, activations, sums, concatenation, nearest resampling.

They need no exchange. Only linear maps have MACs; the counting convention of the paper (and of the profilers it
used) leaves element-wise work out.
"""

from __future__ import annotations

from math import prod


def linear_macs(output: tuple[int, ...], in_features: int) -> int:
    """Multiply-accumulates of a linear map.

    >>> linear_macs((2, 4096, 640), 640)
    3355443200
    """
    return prod(output) * in_features
