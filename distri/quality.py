"""How far a picture is from the one that a single device draws from the same noise.

Pictures are uint8 arrays (H, W, 3); PSNR and SSIM are scikit-image's, over the 8-bit range.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distri.core.shape import Rect

Picture = NDArray[np.uint8]

IDENTICAL_DB = 100.0
"""What identical pictures count as, so that averages stay finite."""


def psnr_db(picture: Picture, reference: Picture) -> float:
    """Peak signal-to-noise ratio in dB, at most `IDENTICAL_DB`."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(picture, reference):
        return IDENTICAL_DB
    return min(IDENTICAL_DB, float(peak_signal_noise_ratio(reference, picture, data_range=255)))


def ssim(picture: Picture, reference: Picture) -> float:
    """Structural similarity over the colour channels, at most 1."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(reference, picture, channel_axis=2, data_range=255))


def seam_visibility(picture: Picture, patches: Sequence[Rect], pixels_per_latent: int) -> float:
    """Mean gradient across the patches' inner borders, relative to the mean gradient elsewhere in that direction.

    1 means that borders look like any other place. Patches are rectangles of the latent.
    """
    grey = picture.astype(np.float64).mean(axis=2)
    height, width = grey.shape
    rows = sorted({p.rows.start * pixels_per_latent for p in patches} - {0})
    cols = sorted({p.cols.start * pixels_per_latent for p in patches} - {0})
    down, across = np.abs(np.diff(grey, axis=0)), np.abs(np.diff(grey, axis=1))
    at = np.concatenate(
        [
            down[[r - 1 for r in rows if r < height]].ravel(),
            across[:, [c - 1 for c in cols if c < width]].ravel(),
        ]
    )
    if at.size == 0:
        return 1.0
    total = (down.sum() if rows else 0.0) + (across.sum() if cols else 0.0)
    count = (down.size if rows else 0) + (across.size if cols else 0)
    elsewhere = (total - at.sum()) / max(1, count - at.size)
    return float(at.mean() / max(elsewhere, 1e-9))
