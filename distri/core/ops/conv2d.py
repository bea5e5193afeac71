"""Convolution: the rows of its neighbours that a patch reads (its halo), and its MACs.

An output row o of a convolution reads the input rows o*stride - padding + dilation*k for k in 0..kernel-1. What of
these lies in another patch is the halo; what lies outside the image is zero padding, as in the whole picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from distri.core.shape import Band, Rect


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel, stride, padding and dilation, each as (rows, columns)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def is_pointwise(self) -> bool:
        """Whether every output position reads just the input position of the same place."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    def output_size(self, size: int, dim: int) -> int:
        """Rows (dim 0) or columns (dim 1) of the output, as torch computes them."""
        reach = self.dilation[dim] * (self.kernel[dim] - 1) + 1
        return (size + 2 * self.padding[dim] - reach) // self.stride[dim] + 1

    def reads(self, out: Band, dim: int) -> Band:
        """The input rows that output rows `out` read; may reach outside the image.

        >>> ConvGeometry((3, 3), padding=(1, 1)).reads(Band(8, 16), 0)
        Band(start=7, stop=17)
        """
        start = out.start * self.stride[dim] - self.padding[dim]
        stop = (
            (out.stop - 1) * self.stride[dim]
            - self.padding[dim]
            + self.dilation[dim] * (self.kernel[dim] - 1)
            + 1
        )
        return Band(start, max(start, stop))


@dataclass(frozen=True)
class HaloPiece:
    """A rectangle of the input, in the layer's coordinates, that `reader` takes from `owner`."""

    owner: int
    reader: int
    rect: Rect


def read_rect(geometry: ConvGeometry, out: Rect) -> Rect:
    """The rectangle of the input that an output rectangle reads, zero padding included."""
    return Rect(geometry.reads(out.rows, 0), geometry.reads(out.cols, 1))


def halo_pieces(
    geometry: ConvGeometry, inputs: tuple[Rect, ...], outputs: tuple[Rect, ...]
) -> tuple[HaloPiece, ...]:
    """All pieces that travel for one convolution, ordered by (reader, owner).

    `inputs` and `outputs` are the patches at the input's and at the output's level. Only patches that a reader's
    window touches send anything: the pieces are point to point.
    """
    pieces = []
    edges = [(*rows, *cols) for rows, cols in inputs]  # compared as numbers: most patches are far apart
    for reader, out in enumerate(outputs):
        window = read_rect(geometry, out)
        (top, bottom), (left, right) = window
        for owner, (patch_top, patch_bottom, patch_left, patch_right) in enumerate(edges):
            is_near = patch_top < bottom and top < patch_bottom and patch_left < right and left < patch_right
            if is_near and owner != reader:
                overlap = window.intersect(inputs[owner])
                if overlap.area:
                    pieces.append(HaloPiece(owner, reader, overlap))
    return tuple(pieces)


def macs(output: tuple[int, ...], in_channels_per_group: int, kernel: tuple[int, int]) -> int:
    """Multiply-accumulates for an output of shape (batch, channels, rows, columns).

    >>> macs((1, 320, 128, 128), 4, (3, 3))
    188743680
    """
    return prod(output) * in_channels_per_group * kernel[0] * kernel[1]
