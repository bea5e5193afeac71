"""Convolution over a patch: the patch grown by its halo, convolved without padding where it has neighbours.

Shape suffixes: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distri.core.ops.conv2d import ConvGeometry, read_rect
from distri.core.plan import Exchange
from distri.core.policy import ExchangeKind
from distri.core.shape import Band, Rect
from distri.core.traffic import messages, output_rects
from distri.nn.rank_context import RankLocal


@dataclass(frozen=True)
class Window:
    """Where everything lies, for one convolution and one patch; rectangles are in the layer's coordinates.

    own: this patch's input. window: what its output reads; equal to `own` along a dimension that is not split, where
    the convolution's own padding applies. padding: what remains for the convolution to pad. sent, received: the pieces
    that leave and reach this patch, in message order.
    """

    own: Rect
    window: Rect
    out: Rect
    padding: tuple[int, int]
    sent: tuple[Rect, ...]
    received: tuple[Rect, ...]


@lru_cache(maxsize=4096)
def make_window(
    geometry: ConvGeometry, shape: tuple[int, ...], level: int, patches: tuple[Rect, ...], patch: int
) -> Window:
    """Geometry of one convolution for one patch; `shape` is the whole input's (B, C, H, W)."""
    own = patches[patch].at_level(level)
    out = output_rects(geometry, shape, level, patches)[patch]
    reads = read_rect(geometry, out)
    rows_whole = own.rows.size == shape[2]
    cols_whole = own.cols.size == shape[3]
    window = Rect(own.rows if rows_whole else reads.rows, own.cols if cols_whole else reads.cols)
    padding = (geometry.padding[0] if rows_whole else 0, geometry.padding[1] if cols_whole else 0)
    found = messages(ExchangeKind.HALO, shape, level, geometry, patches)
    sent = tuple(m.rect for m in found if m.source == patch and m.rect is not None)
    received = tuple(m.rect for m in found if m.reader == patch and m.rect is not None)
    return Window(own, window, out, padding, sent, received)


def cut(x_BCHW: Tensor, rect: Rect, origin: Rect) -> Tensor:
    """The rectangle `rect` of a tensor whose first element lies at the start of `origin`; a view."""
    rows = _within(rect.rows, origin.rows)
    cols = _within(rect.cols, origin.cols)
    return x_BCHW[..., rows.start : rows.stop, cols.start : cols.stop]


def _within(band: Band, origin: Band) -> Band:
    return Band(band.start - origin.start, band.stop - origin.start)


def fill_window(
    x_BCHW: Tensor, own: Rect, window: Rect, rects: Sequence[Rect], pieces: Sequence[Tensor]
) -> Tensor:
    """`x_BCHW` (the rectangle `own`) grown to `window`; what no piece covers is zero, as padding is."""
    if window == own:
        return x_BCHW
    kept = own.intersect(window)  # a stride can skip the last rows of a patch
    held = [(kept, cut(x_BCHW, kept, own))]
    for rect, piece in zip(rects, pieces, strict=True):
        inside = rect.intersect(window)
        if inside.area:
            held.append((inside, cut(piece, inside, rect).to(x_BCHW.dtype)))
    if all(rect.cols == window.cols for rect, _ in held):
        return _stacked(held, window)
    grown = x_BCHW.new_zeros((*x_BCHW.shape[:2], window.rows.size, window.cols.size))
    for rect, values in held:
        cut(grown, rect, window).copy_(values)
    return grown


def _stacked(held: Sequence[tuple[Rect, Tensor]], window: Rect) -> Tensor:
    """Rows of the whole width, one above the other: one copy, and a fast one (docs/decisions/0011)."""
    parts: list[Tensor] = []
    end = window.rows.start

    def zeros_up_to(start: int, like_BCHW: Tensor) -> None:
        if start > end:
            parts.append(like_BCHW.new_zeros(*like_BCHW.shape[:2], start - end, like_BCHW.shape[3]))

    for rect, values_BCHW in sorted(held, key=lambda part: part[0].rows.start):
        zeros_up_to(rect.rows.start, values_BCHW)
        parts.append(values_BCHW)
        end = rect.rows.stop
    zeros_up_to(window.rows.stop, parts[-1])
    return torch.cat(parts, dim=2)


class PatchConv2d:
    """The parallel form of one convolution.

    Fresh: this patch. Its halo is of the version that the plan's policy names; under `local` it is zero.
    """

    def __init__(self, ranks: RankLocal, exchange: Exchange) -> None:
        assert exchange.geometry is not None
        self._ranks = ranks
        self._exchange = exchange
        self._geometry = exchange.geometry

    def __call__(self, module: nn.Module, forward: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
        """This patch of the output, for this patch `x_BCHW` of the input."""
        context = self._ranks.current()
        exchange = self._exchange
        window = make_window(self._geometry, exchange.shape, exchange.level, context.patches, context.patch)
        context.exchanger.publish(
            exchange.layer, [cut(x_BCHW, rect, window.own).contiguous() for rect in window.sent]
        )
        pieces = context.exchanger.collect(exchange.layer)
        rects = window.received if pieces is not None else ()
        grown = fill_window(x_BCHW, window.own, window.window, rects, pieces or ())
        return convolve(module, forward, grown, self._geometry, window)


class LatentConv2d:
    """The convolution that reads the latent itself: every rank has all of it, so its halo is cut, not exchanged.

    The latent lies at level 1 for a denoiser, deeper for a decoder, whose level 1 is the picture.
    """

    def __init__(self, ranks: RankLocal, geometry: ConvGeometry) -> None:
        self._ranks = ranks
        self._geometry = geometry

    def __call__(self, module: nn.Module, forward: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
        """This patch of the output; `x_BCHW` is this patch of the latent."""
        context = self._ranks.current()
        latent_BCHW = context.latent_BCHW
        assert latent_BCHW is not None
        shape = tuple(latent_BCHW.shape)
        level = context.exchanger.plan.latent.rows.size // shape[2]
        window = make_window(self._geometry, shape, level, context.patches, context.patch)
        whole = Rect(Band(0, shape[2]), Band(0, shape[3]))
        known = window.window.intersect(whole)
        grown = fill_window(cut(latent_BCHW, known, whole), known, window.window, (), ())
        return convolve(module, forward, grown, self._geometry, window)


def convolve(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    grown_BCHW: Tensor,
    geometry: ConvGeometry,
    window: Window,
) -> Tensor:
    """Convolve a window that already holds its halo.

    A plain `nn.Conv2d` is told not to pad. Anything that wraps one (a LoRA layer) runs as it is, its own padding
    included, on a window grown to whole strides, and its surplus rows and columns are cut off.
    """
    if isinstance(module, nn.Conv2d):
        return F.conv2d(
            grown_BCHW,
            module.weight,
            module.bias,
            module.stride,
            window.padding,
            module.dilation,
            module.groups,
        )
    skipped = [0, 0]
    lead = [0, 0]
    for dim in (0, 1):
        if window.padding[dim] != geometry.padding[dim]:
            lead[dim] = -geometry.padding[dim] % geometry.stride[dim]
            skipped[dim] = (geometry.padding[dim] + lead[dim]) // geometry.stride[dim]
    y_BCHW = forward(F.pad(grown_BCHW, (lead[1], 0, lead[0], 0)))
    rows, cols = window.out.rows.size, window.out.cols.size
    return y_BCHW[..., skipped[0] : skipped[0] + rows, skipped[1] : skipped[1] + cols]
