"""Rectangles of the latent and shapes that are known up to its size.

A layer of the denoiser sees the latent at a *level*: level 1 is the latent itself, level 2 has half of its rows and
columns, and so on. A patch is a rectangle of the latent; `Rect.at_level` says which rectangle of a level belongs to it.

Shapes in the layer graph are symbolic, because one graph serves every image size. A dimension is an integer or one of

    B      batch                k*B    k times the batch       T      text tokens
    H/s    rows at level s      W/s    columns at level s      HW/s   rows times columns at level s
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

Dim = int | str
SymbolicShape = tuple[Dim, ...]


def ceil_div(value: int, divisor: int) -> int:
    """Smallest integer that is at least `value / divisor`.

    >>> ceil_div(45, 2)
    23
    """
    return -(-value // divisor)


class Band(NamedTuple):
    """Half-open interval [start, stop) of rows or of columns."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of rows (or columns)."""
        return max(0, self.stop - self.start)

    def at_level(self, level: int) -> Band:
        """The part of this band at a level: downsampling rounds up, so a remainder stays with the last band.

        >>> Band(32, 45).at_level(2)
        Band(start=16, stop=23)
        """
        return Band(ceil_div(self.start, level), ceil_div(self.stop, level))

    def intersect(self, other: Band) -> Band:
        """The common part, empty if there is none."""
        start = max(self.start, other.start)
        return Band(start, max(start, min(self.stop, other.stop)))


class Rect(NamedTuple):
    """A rectangle: a band of rows times a band of columns."""

    rows: Band
    cols: Band

    @property
    def area(self) -> int:
        """Number of positions."""
        return self.rows.size * self.cols.size

    def at_level(self, level: int) -> Rect:
        """This rectangle as a layer at `level` sees it."""
        return Rect(self.rows.at_level(level), self.cols.at_level(level))

    def intersect(self, other: Rect) -> Rect:
        """The common part, of area 0 if there is none."""
        return Rect(self.rows.intersect(other.rows), self.cols.intersect(other.cols))


def full_rect(rows: int, cols: int) -> Rect:
    """The rectangle of a whole latent of `rows` x `cols`."""
    return Rect(Band(0, rows), Band(0, cols))


@dataclass(frozen=True)
class Extent:
    """What turns a symbolic shape into numbers: a batch size, a number of text tokens and a rectangle of the latent."""

    batch: int
    text: int
    rect: Rect

    def dim(self, dim: Dim) -> int:
        """Evaluate one dimension.

        >>> Extent(2, 77, full_rect(128, 96)).dim("HW/4")
        768
        """
        if isinstance(dim, int):
            return dim
        known = self._known
        if dim not in known:
            known[dim] = self._evaluate(dim)
        return known[dim]

    @cached_property
    def _known(self) -> dict[str, int]:
        """Dimensions evaluated so far: a graph has thousands of them and few that differ."""
        return {}

    def _evaluate(self, dim: str) -> int:
        if dim == "B":
            return self.batch
        if dim == "T":
            return self.text
        if dim.endswith("*B"):
            return int(dim[:-2]) * self.batch
        axis, _, level_text = dim.partition("/")
        level = int(level_text)
        if axis == "H":
            return self.rect.rows.at_level(level).size
        if axis == "W":
            return self.rect.cols.at_level(level).size
        assert axis == "HW", f"unknown dimension {dim!r}"
        return self.rect.at_level(level).area

    def shape(self, shape: Sequence[Dim]) -> tuple[int, ...]:
        """Evaluate a shape."""
        return tuple(self.dim(dim) for dim in shape)

    def elements(self, shape: Sequence[Dim]) -> int:
        """Number of elements of a shape."""
        return prod(self.dim(dim) for dim in shape)


def level_of(shape: Sequence[Dim]) -> int | None:
    """The level of a symbolic shape, or None if it does not depend on the image.

    >>> level_of(("B", 320, "H/2", "W/2"))
    2
    """
    for dim in shape:
        if isinstance(dim, str) and dim.startswith(("H", "W")):
            return int(dim.partition("/")[2])
    return None
