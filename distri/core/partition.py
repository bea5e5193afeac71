"""Which rectangle of the latent each patch is, and the refusal of splits that the model cannot take.

Invariant: the patches tile the latent exactly once. Every inner border is a multiple of the model's *alignment*, the
deepest level's downsampling factor, so that each level's borders fall between whole rows; only the last band may end
on a remainder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

from distri.core.shape import Band, Rect, ceil_div
from distri.errors import PartitionError


class SplitAxis(str, Enum):
    """How the latent is cut."""

    ROWS = "rows"
    COLS = "cols"
    GRID = "grid"
    ALTERNATE = "alternate"


FIXED_AXES = (SplitAxis.ROWS, SplitAxis.COLS, SplitAxis.GRID)
"""Those whose patches stay where they are from step to step, so that a value of the last step is still of use."""


@dataclass(frozen=True)
class Partition:
    """The patches of a latent, by place in the split.

    turned: the patches of every second step (1, 3, ...), where they are others than `patches`; else empty.
    """

    axis: SplitAxis
    patches: tuple[Rect, ...]
    turned: tuple[Rect, ...] = ()

    def __len__(self) -> int:
        return len(self.patches)

    @property
    def turns(self) -> tuple[tuple[Rect, ...], ...]:
        """The patches of step 0 and, where those of step 1 are others, of step 1; from there on in turn."""
        return (self.patches, self.turned) if self.turned else (self.patches,)

    def at_step(self, step: int) -> tuple[Rect, ...]:
        """The patches of one step."""
        return self.turns[step % len(self.turns)]

    def at_level(self, level: int) -> tuple[Rect, ...]:
        """The rectangles of all patches as a layer at `level` sees them."""
        return tuple(patch.at_level(level) for patch in self.patches)


@dataclass(frozen=True)
class Grain:
    """What forces the alignment: how many latent rows and columns must stay together, and the layer that says so."""

    alignment: int
    layer: str
    pixels_per_latent: int = 8

    @property
    def pixels(self) -> int:
        """The alignment in pixels."""
        return self.alignment * self.pixels_per_latent


def split_band(size: int, weights: Sequence[Fraction], grain: Grain, dim: str) -> tuple[Band, ...]:
    """Cut `size` latent rows (or columns) into `len(weights)` aligned bands, as proportional to `weights` as can be.

    Each band gets at least one unit of `grain.alignment`; units left over go to the largest remainders, and among
    equals to the lowest rank.

    Raises:
        PartitionError: there are fewer units than bands; the sentence names sizes and rank counts that work.

    >>> split_band(64, even_weights(3), Grain(4, "mid_block"), "rows")
    (Band(start=0, stop=24), Band(start=24, stop=44), Band(start=44, stop=64))
    """
    parts = len(weights)
    units = ceil_div(size, grain.alignment)
    check_units(size, parts, grain, dim)
    total = sum(weights)
    shares = [weight * units / total for weight in weights]
    counts = [max(1, int(share)) for share in shares]
    _settle(counts, units, shares)
    bands, start = [], 0
    for count in counts:
        stop = min(size, start + count * grain.alignment)
        bands.append(Band(start, stop))
        start = stop
    return tuple(bands)


def _settle(counts: list[int], units: int, shares: Sequence[Fraction]) -> None:
    """Adjust `counts` in place until they add up to `units`, one unit at a time where it is missed or hurts least."""
    parts = range(len(counts))
    while sum(counts) < units:
        counts[max(parts, key=lambda part: (shares[part] - counts[part], -part))] += 1
    while sum(counts) > units:
        movable = [part for part in parts if counts[part] > 1]
        counts[max(movable, key=lambda part: (counts[part] - shares[part], part))] -= 1


def check_units(size: int, parts: int, grain: Grain, dim: str) -> None:
    """Hold that there is a unit of `grain.alignment` for each of `parts` bands.

    Raises:
        PartitionError: there are fewer; the sentence names sizes and rank counts that work.
    """
    units = ceil_div(size, grain.alignment)
    if units >= parts:
        return
    pixels = size * grain.pixels_per_latent
    side = "height" if dim == "rows" else "width"
    raise PartitionError(
        f"{pixels} pixel {dim} do not split into {parts} patches: {grain.layer} needs {dim} in multiples of "
        f"{grain.pixels} pixels, which leaves {units} of them; use at most {units} patches, "
        f"or a {side} of at least {parts * grain.pixels}"
    )


def even_weights(parts: int) -> tuple[Fraction, ...]:
    """Equal weights for `parts` bands."""
    return (Fraction(1),) * parts


def check_image_size(height: int, width: int, grain: Grain) -> tuple[int, int]:
    """Latent rows and columns of an image, or the reason why the VAE cannot make it.

    Raises:
        PartitionError: a side is not positive or not a multiple of the VAE's factor.
    """
    factor = grain.pixels_per_latent
    for side, pixels in (("height", height), ("width", width)):
        if pixels <= 0 or pixels % factor:
            below = max(factor, pixels // factor * factor)
            raise PartitionError(
                f"a {side} of {pixels} pixels is not a positive multiple of the VAE's factor {factor}; "
                f"use {below} or {below + factor}"
            )
    return height // factor, width // factor


def grid_of(parts: int) -> tuple[int, int]:
    """The most nearly square (rows, cols) factorisation of `parts`, with at least as many rows as columns.

    >>> grid_of(8)
    (4, 2)
    """
    cols = max(divisor for divisor in range(1, int(parts**0.5) + 1) if parts % divisor == 0)
    return parts // cols, cols


def make_partition(
    rows: int,
    cols: int,
    parts: int,
    axis: SplitAxis,
    grain: Grain,
    weights: Sequence[Fraction] | None = None,
    grid: tuple[int, int] | None = None,
) -> Partition:
    """Split a latent of `rows` x `cols` into `parts` patches.

    `weights` makes bands uneven (rows or columns only); `grid` is (row bands, column bands) for `SplitAxis.GRID`;
    `SplitAxis.ALTERNATE` is rows at the even steps and columns at the odd ones.

    Raises:
        PartitionError: the split is impossible, or weights do not fit it.
    """
    if weights is not None:
        if axis not in (SplitAxis.ROWS, SplitAxis.COLS):
            other = "a grid" if axis is SplitAxis.GRID else "one that alternates"
            raise PartitionError(f"band weights go with a split by rows or by columns, not with {other}")
        if len(weights) != parts:
            raise PartitionError(
                f"{len(weights)} band weights were given for {parts} patches; give one for each"
            )
        if any(weight <= 0 for weight in weights):
            raise PartitionError("band weights must be positive")
    if axis is SplitAxis.ALTERNATE:
        by_rows, by_cols = (
            make_partition(rows, cols, parts, of, grain) for of in (SplitAxis.ROWS, SplitAxis.COLS)
        )
        return Partition(axis, by_rows.patches, by_cols.patches if parts > 1 else ())
    down, across = grid or grid_of(parts)
    if axis is not SplitAxis.GRID:
        down, across = (parts, 1) if axis is SplitAxis.ROWS else (1, parts)
    if down * across != parts:
        raise PartitionError(f"a grid of {down} x {across} has {down * across} patches, not {parts}")
    check_units(rows, down, grain, "rows")
    check_units(cols, across, grain, "columns")
    row_weights = weights if weights is not None and axis is SplitAxis.ROWS else even_weights(down)
    col_weights = weights if weights is not None and axis is SplitAxis.COLS else even_weights(across)
    row_bands = split_band(rows, row_weights, grain, "rows")
    col_bands = split_band(cols, col_weights, grain, "columns")
    return Partition(axis, tuple(Rect(row, col) for row in row_bands for col in col_bands))
