import re
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distri.core.partition import Grain, SplitAxis, check_image_size, grid_of, make_partition, split_band
from distri.core.shape import ceil_div
from distri.errors import PartitionError

SIZES = st.integers(1, 90)
PARTS = st.integers(1, 12)
ALIGNMENTS = st.sampled_from([1, 2, 4, 8])
WEIGHTS = st.fractions(Fraction(1, 50), 50)


@given(rows=SIZES, cols=SIZES, parts=PARTS, axis=st.sampled_from(SplitAxis), alignment=ALIGNMENTS)
def test_patches_cover_every_position_exactly_once_and_are_aligned(
    rows: int, cols: int, parts: int, axis: SplitAxis, alignment: int
) -> None:
    try:
        partition = make_partition(rows, cols, parts, axis, Grain(alignment, "deep"))
    except PartitionError:
        assume(False)
    for patches in partition.turns:
        assert len(patches) == parts
        owners = [[0] * cols for _ in range(rows)]
        for patch in patches:
            assert patch.area > 0
            for row in range(*patch.rows):
                for col in range(*patch.cols):
                    owners[row][col] += 1
            for band, size in ((patch.rows, rows), (patch.cols, cols)):
                assert band.start % alignment == 0
                assert band.stop % alignment == 0 or band.stop == size
        assert all(count == 1 for line in owners for count in line)


@given(size=SIZES, weights=st.lists(WEIGHTS, min_size=1, max_size=8), alignment=ALIGNMENTS)
def test_weighted_bands_tile_and_differ_from_their_share_by_little(
    size: int, weights: list[Fraction], alignment: int
) -> None:
    units = ceil_div(size, alignment)
    assume(units >= len(weights))
    bands = split_band(size, weights, Grain(alignment, "deep"), "rows")
    assert bands[0].start == 0
    assert bands[-1].stop == size
    assert all(a.stop == b.start for a, b in pairwise(bands))
    for band, weight in zip(bands, weights, strict=True):
        share = weight * units / sum(weights)
        count = ceil_div(band.size, alignment)
        assert count >= 1
        assert count < share + 1


@given(size=SIZES, parts=PARTS)
def test_even_bands_differ_by_at_most_one_unit_and_the_first_are_larger(size: int, parts: int) -> None:
    assume(size >= parts)
    sizes = [band.size for band in split_band(size, [Fraction(1)] * parts, Grain(1, "deep"), "rows")]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_twelve_units_on_eight_ranks_go_to_the_first_four() -> None:
    bands = split_band(48, [Fraction(1)] * 8, Grain(4, "deep"), "rows")
    assert [band.size // 4 for band in bands] == [2, 2, 2, 2, 1, 1, 1, 1]


@given(parts=st.integers(1, 500))
def test_a_grid_has_all_patches_and_no_more_columns_than_rows(parts: int) -> None:
    down, across = grid_of(parts)
    assert down * across == parts
    assert down >= across


def test_too_many_patches_are_refused_naming_layer_dimension_sizes_and_ranks() -> None:
    sentence = re.escape(
        "768 pixel rows do not split into 13 patches: mid_block needs rows in multiples of 64 pixels, "
        "which leaves 12 of them; use at most 12 patches, or a height of at least 832"
    )
    with pytest.raises(PartitionError, match=sentence):
        make_partition(96, 96, 13, SplitAxis.ROWS, Grain(8, "mid_block"))


@pytest.mark.parametrize("axis", SplitAxis)
def test_absurd_numbers_of_patches_are_refused_at_once(axis: SplitAxis) -> None:
    with pytest.raises(PartitionError, match="do not split into"):
        make_partition(96, 96, 10**11, axis, Grain(8, "mid_block"))


def test_band_weights_must_be_as_many_as_patches() -> None:
    with pytest.raises(PartitionError, match="2 band weights were given for 3 patches; give one for each"):
        make_partition(64, 64, 3, SplitAxis.ROWS, Grain(4, "deep"), (Fraction(1), Fraction(2)))


def test_band_weights_must_be_positive() -> None:
    with pytest.raises(PartitionError, match="band weights must be positive"):
        make_partition(64, 64, 2, SplitAxis.ROWS, Grain(4, "deep"), (Fraction(1), Fraction(0)))


def test_band_weights_do_not_go_with_a_grid() -> None:
    with pytest.raises(PartitionError, match="not with a grid"):
        make_partition(64, 64, 2, SplitAxis.GRID, Grain(4, "deep"), (Fraction(1), Fraction(1)))


def test_a_grid_must_have_as_many_patches_as_asked_for() -> None:
    with pytest.raises(PartitionError, match="a grid of 2 x 2 has 4 patches, not 6"):
        make_partition(64, 64, 6, SplitAxis.GRID, Grain(4, "deep"), grid=(2, 2))


@pytest.mark.parametrize(
    ("height", "near"), [(1000 + 4, "use 1000 or 1008"), (0, "use 8 or 16"), (-8, "use 8 or 16")]
)
def test_an_image_that_the_vae_cannot_make_is_refused_with_the_nearest_sizes(height: int, near: str) -> None:
    with pytest.raises(PartitionError, match=near):
        check_image_size(height, 512, Grain(4, "deep"))
