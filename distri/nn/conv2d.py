"""Convolution over a patch: the patch grown by its halo, convolved without padding where it has neighbours.

Shape suffixes: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor, nn

from distri.core.ops.conv2d import ConvGeometry, read_rect
from distri.core.plan import Exchange
from distri.core.policy import ExchangeKind
from distri.core.shape import Band, Rect
from distri.core.traffic import messages, output_rects
from distri.nn.rank_context import RankLocal

FEWEST_INNER = 8
"""A patch with fewer output rows for each one at a border is convolved as one window: three calls cost more then."""


@dataclass(frozen=True)
class Border:
    """An output row that reads a neighbour: the rows of the halo that it reads, and the kernel's rows for them."""

    row: int
    halo: Band
    taps: slice


@dataclass(frozen=True)
class Window:
    """Where everything lies, for one convolution and one patch; rectangles are in the layer's coordinates.

    own: this patch's input. window: what its output reads; equal to `own` along a dimension that is not split, where
    the convolution's own padding applies. padding: what remains for the convolution to pad. sent, received: the pieces
    that leave and reach this patch, in message order. borders: the output rows that read a neighbour, where the
    others come out right from the patch alone under the convolution's own padding; None where they do not.
    """

    own: Rect
    window: Rect
    out: Rect
    padding: tuple[int, int]
    sent: tuple[Rect, ...]
    received: tuple[Rect, ...]
    borders: tuple[Border, ...] | None


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
    borders = _borders(geometry, own.rows, out.rows, shape[2]) if cols_whole and not rows_whole else None
    return Window(own, window, out, padding, sent, received, borders)


def _borders(geometry: ConvGeometry, own: Band, out: Band, whole: int) -> tuple[Border, ...] | None:
    if own.start != out.start * geometry.stride[0] or geometry.output_size(own.size, 0) != out.size:
        return None
    height, apart = geometry.kernel[0], geometry.dilation[0]
    borders = []
    for row in range(out.start, out.stop):
        first = geometry.reads(Band(row, row + 1), 0).start
        reads = range(first, first + height * apart, apart)
        above = sum(read < own.start for read in reads) if own.start > 0 else 0
        below = sum(read >= own.stop for read in reads) if own.stop < whole else 0
        borders += [
            Border(row, Band(reads[taps.start], reads[taps.stop - 1] + 1), taps)
            for taps in (slice(0, above), slice(height - below, height))
            if taps.start < taps.stop
        ]
    return tuple(borders) if len(borders) <= out.size // FEWEST_INNER else None


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
    grown = x_BCHW.new_empty((*x_BCHW.shape[:2], window.rows.size, window.cols.size))
    kept = own.intersect(window)  # a stride can skip the last rows of a patch
    rows, cols = _within(kept.rows, window.rows), _within(kept.cols, window.cols)
    for margin in (
        grown[..., : rows.start, :],
        grown[..., rows.stop :, :],
        grown[..., rows.start : rows.stop, : cols.start],
        grown[..., rows.start : rows.stop, cols.stop :],
    ):
        if margin.numel():
            margin.zero_()
    cut(grown, kept, window).copy_(cut(x_BCHW, kept, own))
    return _lay_into(grown, window, rects, pieces)


def _lay_into(target: Tensor, rect: Rect, rects: Sequence[Rect], pieces: Sequence[Tensor]) -> Tensor:
    """Copy what pieces hold of `rect` to its place in `target`; returns that."""
    for held, piece in zip(rects, pieces, strict=True):
        inside = held.intersect(rect)
        if inside.area:
            cut(target, inside, rect).copy_(cut(piece, inside, held))
    return target


def join(rect: Rect, rects: Sequence[Rect], pieces: Sequence[Tensor]) -> Tensor:
    """The rectangle `rect` of what pieces hold; what no piece covers is zero, as padding is."""
    if rect in rects:
        return pieces[rects.index(rect)]
    zeros = pieces[0].new_zeros((*pieces[0].shape[:2], rect.rows.size, rect.cols.size))
    return _lay_into(zeros, rect, rects, pieces)


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
        is_on_cpu = x_BCHW.device.type == "cpu"  # elsewhere launches count for more than copies
        if is_on_cpu and isinstance(module, nn.Conv2d) and window.borders is not None:
            return self._by_borders(module, x_BCHW, window, rects, pieces or ())
        grown = fill_window(x_BCHW, window.own, window.window, rects, pieces or ())
        return convolve(module, forward, grown, self._geometry, window)

    def _by_borders(
        self,
        module: nn.Conv2d,
        x_BCHW: Tensor,
        window: Window,
        rects: Sequence[Rect],
        pieces: Sequence[Tensor],
    ) -> Tensor:
        """The patch as if it were a whole picture, then what its border rows miss of the halo: nothing is copied."""
        y_BCHW = _convolve(module, x_BCHW, self._geometry.padding)
        assert window.borders is not None
        for border in window.borders if rects else ():
            strip = Rect(border.halo, window.own.cols)
            missed = F.conv2d(
                join(strip, rects, pieces).to(x_BCHW.dtype),
                module.weight[:, :, border.taps],
                stride=module.stride,
                padding=(0, self._geometry.padding[1]),
                dilation=module.dilation,
                groups=module.groups,
            )
            y_BCHW[..., border.row - window.out.rows.start, :] += missed[..., 0, :]
        return y_BCHW


class LatentConv2d:
    """The convolution that reads the latent itself: every rank has all of it, so its halo is cut, not exchanged."""

    def __init__(self, ranks: RankLocal, geometry: ConvGeometry) -> None:
        self._ranks = ranks
        self._geometry = geometry

    def __call__(self, module: nn.Module, forward: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
        """This patch of the output; `x_BCHW` is this patch of the latent."""
        context = self._ranks.current()
        latent_BCHW = context.latent_BCHW
        assert latent_BCHW is not None
        shape = tuple(latent_BCHW.shape)
        window = make_window(self._geometry, shape, 1, context.patches, context.patch)
        whole = Rect(Band(0, shape[2]), Band(0, shape[3]))
        halo = window.window.intersect(whole)
        grown = fill_window(x_BCHW, window.own, window.window, (halo,), (cut(latent_BCHW, halo, whole),))
        return convolve(module, forward, grown, self._geometry, window)


def _convolve(module: nn.Conv2d, x_BCHW: Tensor, padding: tuple[int, int]) -> Tensor:
    return F.conv2d(
        x_BCHW, module.weight, module.bias, module.stride, padding, module.dilation, module.groups
    )


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
        return _convolve(module, grown_BCHW, window.padding)
    skipped = [0, 0]
    lead = [0, 0]
    for dim in (0, 1):
        if window.padding[dim] != geometry.padding[dim]:
            lead[dim] = -geometry.padding[dim] % geometry.stride[dim]
            skipped[dim] = (geometry.padding[dim] + lead[dim]) // geometry.stride[dim]
    y_BCHW = forward(F.pad(grown_BCHW, (lead[1], 0, lead[0], 0)))
    rows, cols = window.out.rows.size, window.out.cols.size
    return y_BCHW[..., skipped[0] : skipped[0] + rows, skipped[1] : skipped[1] + cols]
