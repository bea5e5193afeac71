from hypothesis import given
from hypothesis import strategies as st

from distri.core.shape import Band, Extent, Rect, full_rect, level_of

SIZES = st.integers(1, 400)
LEVELS = st.sampled_from([1, 2, 4, 8])


@given(size=SIZES, level=LEVELS, cut=st.integers(0, 100))
def test_aligned_bands_still_tile_at_every_level(size: int, level: int, cut: int) -> None:
    border = min(size, cut * 8)
    above, below = Band(0, border).at_level(level), Band(border, size).at_level(level)
    assert above.stop == below.start
    assert above.size + below.size == Band(0, size).at_level(level).size


@given(a=st.tuples(SIZES, SIZES), b=st.tuples(SIZES, SIZES))
def test_intersection_is_what_both_contain(a: tuple[int, int], b: tuple[int, int]) -> None:
    first, second = Band(min(a), max(a)), Band(min(b), max(b))
    common = first.intersect(second)
    assert set(range(*common)) == set(range(*first)) & set(range(*second))


@given(rows=SIZES, cols=SIZES, level=LEVELS, batch=st.integers(1, 4))
def test_symbols_evaluate_to_the_rectangle_at_their_level(
    rows: int, cols: int, level: int, batch: int
) -> None:
    extent = Extent(batch, 77, full_rect(rows, cols))
    shape = ("B", f"{batch}*B", "T", 5, f"H/{level}", f"W/{level}", f"HW/{level}")
    high, wide = -(-rows // level), -(-cols // level)
    assert extent.shape(shape) == (batch, batch * batch, 77, 5, high, wide, high * wide)
    assert extent.elements(("B", f"H/{level}", f"W/{level}")) == batch * extent.rect.at_level(level).area


def test_the_level_of_a_shape_is_that_of_its_spatial_dims() -> None:
    assert level_of(("2*B", "HW/4", 640)) == 4
    assert level_of(("B", "T", 2048)) is None


def test_an_empty_rectangle_has_no_area() -> None:
    assert Rect(Band(4, 4), Band(0, 9)).area == 0
