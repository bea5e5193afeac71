"""A patch in rows, with its halo, gives the rows of the whole picture's convolution."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distri.core.ops.conv2d import ConvGeometry
from distri.core.shape import Band, Rect
from distri.nn import conv2d

ROWS, COLS = 96, 12
BANDS = (Band(0, 32), Band(32, 64), Band(64, 96))
PATCHES = tuple(Rect(band, Band(0, COLS)) for band in BANDS)
WHOLE = Rect(Band(0, ROWS), Band(0, COLS))


def convolved(
    module: nn.Conv2d,
    whole: torch.Tensor,
    patch: int,
    has_halo: bool = True,
    wire: torch.dtype = torch.float32,
) -> torch.Tensor:
    geometry = ConvGeometry(module.kernel_size, module.stride, module.padding, module.dilation)
    window = conv2d.make_window(geometry, tuple(whole.shape), 1, PATCHES, patch)
    pieces = [conv2d.cut(whole, rect, WHOLE).to(wire) for rect in window.received]
    exchanger = SimpleNamespace(
        publish=lambda layer, parts: None, collect=lambda layer: pieces if has_halo else None
    )
    context = SimpleNamespace(patches=PATCHES, patch=patch, exchanger=exchanger)
    exchange = SimpleNamespace(geometry=geometry, shape=tuple(whole.shape), level=1, layer="conv")
    layer = conv2d.PatchConv2d(SimpleNamespace(current=lambda: context), exchange)
    return layer(module, module.forward, conv2d.cut(whole, PATCHES[patch], WHOLE))


@pytest.mark.parametrize("patch", range(3))
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (5, 1, 2, 1), (3, 1, 2, 2), (3, 2, 1, 1)]
)
@torch.no_grad()
def test_borders_are_those_of_the_whole_picture(
    patch: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    torch.manual_seed(kernel * 100 + padding)
    module = nn.Conv2d(4, 6, kernel, stride, padding, dilation)
    whole = torch.randn(2, 4, ROWS, COLS)
    start, stop = (BANDS[patch].start // stride, BANDS[patch].stop // stride)
    torch.testing.assert_close(
        convolved(module, whole, patch), module(whole)[:, :, start:stop], rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_without_a_halo_there_are_zeros_beside_the_patch() -> None:
    module, whole = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, ROWS, COLS)
    alone = module(whole[:, :, 32:64])
    torch.testing.assert_close(convolved(module, whole, 1, has_halo=False), alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_halo_that_travels_in_another_dtype_is_read_in_the_patch_s_own() -> None:
    module, whole = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, ROWS, COLS)
    found = convolved(module, whole, 1, wire=torch.float16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, module(whole)[:, :, 32:64], rtol=0, atol=1e-2)


@torch.no_grad()
def test_a_halo_in_two_pieces_is_joined() -> None:
    """A patch lower than the halo gives its neighbour's neighbour a part of it; what nobody holds is zero."""
    whole, cols = torch.randn(1, 2, 8, 3), Band(0, 3)
    own, window = Rect(Band(2, 5), cols), Rect(Band(-1, 8), cols)
    rects = [Rect(Band(6, 7), cols), Rect(Band(1, 2), cols), Rect(Band(5, 6), cols)]
    pieces = [whole[..., rect.rows.start : rect.rows.stop, :] for rect in rects]
    joined = conv2d.fill_window(whole[..., 2:5, :], own, window, rects, pieces)
    assert torch.equal(joined[..., 2:8, :], whole[..., 1:7, :])
    assert not joined[..., :2, :].any()
    assert not joined[..., 8, :].any()
