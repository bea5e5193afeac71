from hypothesis import assume, given
from hypothesis import strategies as st

from distri.core.ops.conv2d import ConvGeometry, halo_pieces, read_rect
from distri.core.partition import FIXED_AXES, Grain, SplitAxis, make_partition
from distri.core.shape import Rect
from distri.core.traffic import output_rects
from distri.errors import PartitionError

GEOMETRIES = st.builds(
    ConvGeometry,
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2])),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)


def positions(rect: Rect) -> set[tuple[int, int]]:
    return {(row, col) for row in range(*rect.rows) for col in range(*rect.cols)}


@given(
    geometry=GEOMETRIES,
    size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    parts=st.integers(1, 5),
    axis=st.sampled_from(FIXED_AXES),
)
def test_own_patch_and_pieces_are_exactly_what_the_outputs_read(
    geometry: ConvGeometry, size: tuple[int, int], parts: int, axis: SplitAxis
) -> None:
    try:
        patches = make_partition(*size, parts, axis, Grain(4, "deep")).patches
    except PartitionError:
        assume(False)
    assume(all(geometry.output_size(size[dim], dim) >= 1 for dim in (0, 1)))
    outputs = tuple(output_rects(geometry, (1, 1, *size), 1, patches))
    pieces = halo_pieces(geometry, patches, outputs)
    whole = {(row, col) for row in range(size[0]) for col in range(size[1])}
    for reader, out in enumerate(outputs):
        read = {(r, c) for r, c in whole if r in range(*read_rect(geometry, out).rows)}
        read &= {(r, c) for r, c in whole if c in range(*read_rect(geometry, out).cols)}
        own = positions(patches[reader])
        came = [position for piece in pieces if piece.reader == reader for position in positions(piece.rect)]
        assert len(came) == len(set(came))
        assert set(came) == read - own


@given(parts=st.integers(2, 8))
def test_a_small_kernel_reads_from_neighbours_only(parts: int) -> None:
    patches = make_partition(64, 16, parts, SplitAxis.ROWS, Grain(4, "deep")).patches
    pieces = halo_pieces(ConvGeometry((3, 3), padding=(1, 1)), patches, patches)
    assert all(abs(piece.owner - piece.reader) == 1 for piece in pieces)
    assert len(pieces) == 2 * (parts - 1)


def test_a_pointwise_convolution_reads_nobody() -> None:
    patches = make_partition(64, 16, 4, SplitAxis.ROWS, Grain(4, "deep")).patches
    assert ConvGeometry((1, 1)).is_pointwise
    assert halo_pieces(ConvGeometry((1, 1)), patches, patches) == ()
