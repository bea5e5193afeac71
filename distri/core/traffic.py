"""Who sends what to whom: the messages of one exchange, from geometry alone.

halo     point to point: each piece that a patch's convolutions read goes straight from its owner to its reader.
moments  along the line of patches: patch i receives from i-1 the merged moments of all patches before it, from i+1
         those of all patches after it, and passes both on with its own merged in. Two messages, however many ranks;
         the ends of the line receive one.
context  every patch's keys and values go to every other patch: the only traffic that grows with the number of ranks.
output   every rank's result goes to every rank, of both guidance branches; a `local` one goes from a branch to the
         other, to the rank of the same patch, and nowhere where the branches are not split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from distri.core.codec import Codec, payload_bytes
from distri.core.mesh import Mesh
from distri.core.ops.conv2d import ConvGeometry, halo_pieces
from distri.core.plan import DTYPE_BYTES, Exchange
from distri.core.policy import ExchangeKind
from distri.core.shape import Rect


@dataclass(frozen=True)
class Message:
    """Elements that travel from one patch to another for one exchange.

    after: the patch whose message the sender must have received before it can send this one (moments only).
    rect: the piece of a halo, in the layer's coordinates.
    """

    source: int
    reader: int
    elements: int
    after: int | None = None
    rect: Rect | None = None


def messages_of(exchange: Exchange, patches: tuple[Rect, ...]) -> tuple[Message, ...]:
    """The messages of one of a plan's exchanges."""
    return messages(exchange.kind, exchange.shape, exchange.level, exchange.geometry, patches)


def output_ranks(mesh: Mesh, output: Exchange, rank: int) -> tuple[int, ...]:
    """The ranks whose output reaches `rank`, its own included, in rank order."""
    if not output.stays_on_patch:
        return tuple(range(mesh.size))
    return tuple(mesh.rank_of(branch, mesh.patch_of(rank)) for branch in range(mesh.cfg))


def message_bytes(exchange: Exchange, message: Message, coded: bool = True) -> int:
    """Bytes of one message; `coded` False for warm-up, where values travel as they are."""
    codec = exchange.codec if coded else Codec.NONE
    return payload_bytes(codec, message.elements, num_channels(exchange), DTYPE_BYTES[exchange.dtype])


def steps_between(exchange: Exchange, message: Message) -> int:
    """How many steady steps lie between two messages of this kind: more than 1 for far context that rests."""
    reach = exchange.reach
    return reach.every if reach is not None and abs(message.source - message.reader) > reach.near else 1


def num_channels(exchange: Exchange) -> int:
    """Channels that a codec scales one by one: those of every latent of the batch."""
    shape = exchange.shape
    return shape[1] * shape[2] if exchange.kind is ExchangeKind.CONTEXT else shape[0] * shape[1]


def part_shapes(exchange: Exchange, patches: tuple[Rect, ...], reader: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of what reaches a patch: of each halo piece in message order, or of every patch's share of a context."""
    if exchange.kind is ExchangeKind.CONTEXT:
        _, batch, channels = exchange.shape
        return tuple((patch.at_level(exchange.level).area, batch, channels) for patch in patches)
    if exchange.kind is ExchangeKind.MOMENTS:
        return (exchange.shape,) * (len([m for m in messages_of(exchange, patches) if m.reader == reader]))
    rects = [m.rect for m in messages_of(exchange, patches) if m.reader == reader]
    return tuple((*exchange.shape[:2], rect.rows.size, rect.cols.size) for rect in rects if rect is not None)


def messages(
    kind: ExchangeKind,
    shape: tuple[int, ...],
    level: int,
    geometry: ConvGeometry | None,
    patches: tuple[Rect, ...],
) -> tuple[Message, ...]:
    """The messages of one exchange among the patches of one guidance branch, ordered by (reader, source).

    `patches` are rectangles of the latent; `shape` is as in `distri.core.plan.Exchange`.
    """
    if kind is ExchangeKind.HALO:
        assert geometry is not None
        return _halo(shape, level, geometry, patches)
    if kind is ExchangeKind.MOMENTS:
        return _moments(shape, len(patches))
    shares = _shares(kind, shape, level, patches)
    return tuple(
        Message(source, reader, shares[source])
        for reader in range(len(patches))
        for source in range(len(patches))
        if source != reader
    )


def _shares(kind: ExchangeKind, shape: tuple[int, ...], level: int, patches: tuple[Rect, ...]) -> list[int]:
    areas = [patch.at_level(level).area for patch in patches]
    if kind is ExchangeKind.CONTEXT:
        return [area * shape[1] * shape[2] for area in areas]
    return [area * shape[0] * shape[1] for area in areas]


def _moments(shape: tuple[int, ...], parts: int) -> tuple[Message, ...]:
    elements = prod(shape)
    found = []
    for reader in range(parts):
        if reader > 0:
            found.append(Message(reader - 1, reader, elements, after=reader - 2 if reader > 1 else None))
        if reader < parts - 1:
            found.append(
                Message(reader + 1, reader, elements, after=reader + 2 if reader < parts - 2 else None)
            )
    return tuple(found)


def output_rects(
    geometry: ConvGeometry, shape: tuple[int, ...], level: int, patches: tuple[Rect, ...]
) -> list[Rect]:
    """The patches at a convolution's output, in its own coordinates."""
    stride_rows, stride_cols = geometry.stride
    whole_rows = geometry.output_size(shape[2], 0)
    whole_cols = geometry.output_size(shape[3], 1)
    rects = []
    for patch in patches:
        rows = patch.rows.at_level(level * stride_rows)
        cols = patch.cols.at_level(level * stride_cols)
        rects.append(
            Rect(
                type(rows)(rows.start, min(rows.stop, whole_rows)),
                type(cols)(cols.start, min(cols.stop, whole_cols)),
            )
        )
    return rects


@lru_cache(maxsize=4096)
def _halo(
    shape: tuple[int, ...], level: int, geometry: ConvGeometry, patches: tuple[Rect, ...]
) -> tuple[Message, ...]:
    inputs = tuple(patch.at_level(level) for patch in patches)
    outputs = tuple(output_rects(geometry, shape, level, patches))
    depth = shape[0] * shape[1]
    return tuple(
        Message(piece.owner, piece.reader, depth * piece.rect.area, rect=piece.rect)
        for piece in halo_pieces(geometry, inputs, outputs)
    )
