"""Where a rank's exchanged values lie: every buffer of a run, allocated once, and the parcels cut from them.

Slots: a value of version v lies in slot v % depth of its route. The buffers of one group of layers (a bucket) that go
to the same peer lie one after the other, so a whole bucket is one message, and one layer of it is one message too.

    halo     one flat buffer of bytes per group, peer, direction and slot
    moments  five (rows, 3) buffers per group and slot, a row for each sample and group of channels of each layer
    context  one tensor (L, B, 2C) per layer and slot, in which attention reads: each patch's share is contiguous

A late context is read together with this patch's *newer* own share. So the own share of version v is written into the
slot of version v - 1, beside the others' shares that are read with it, and is sent from there; it lies nowhere twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from distri.backends.torch_distributed.routes import Route, Routes
from distri.backends.torch_distributed.wire import Addressed, Line, Parcel
from distri.core.policy import ExchangeKind
from distri.core.shape import ceil_div
from distri.core.traffic import Message

ALIGNMENT_BYTES = 16
Slot = tuple[str, int]
"""The key of a route and the place of a version among those it holds."""


@dataclass(frozen=True)
class Block:
    """Several layers' values one after the other along the first dimension of `flat`."""

    flat: Tensor
    spans: dict[str, tuple[int, int]]

    def runs(self, keys: Sequence[str]) -> list[Tensor]:
        """The fewest slices that cover these routes, which are in the block's order."""
        spans = [self.spans[key] for key in keys if key in self.spans]
        return [self.flat[start:stop] for start, stop in merged(spans)]


def merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Adjacent ranges joined.

    >>> merged([(0, 4), (4, 6), (8, 9)])
    [(0, 6), (8, 9)]
    """
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


class Arena:
    """All buffers of one rank. `num_bytes` and `num_allocations` say what was allocated so far."""

    def __init__(self, routes: Routes, device: torch.device) -> None:
        self.num_bytes = 0
        self.num_allocations = 0
        self.outgoing: dict[Slot, list[Tensor]] = {}
        self.incoming: dict[Slot, list[Tensor]] = {}
        self.whole: dict[Slot, Tensor] = {}
        self.lines: dict[Slot, Line] = {}
        self._routes = routes
        self._device = device
        self._dtype: torch.dtype | None = None
        self._blocks: dict[tuple[int, int, bool], dict[int, Block]] = {}
        self._stacks: dict[tuple[int, int], tuple[Line, dict[str, tuple[int, int]]]] = {}
        self._group_of = {route.key: place for place, group in enumerate(routes.groups) for route in group}
        self._parcels: dict[tuple[tuple[str, ...], int, bool, frozenset[str]], Parcel] = {}
        self._shares: dict[tuple[str, int, int], Tensor] = {}
        with torch.inference_mode(False):  # what is made in inference mode could not be written outside of it
            for place, group in enumerate(routes.groups):
                for slot in range(group[0].depth):
                    norms = [route for route in group if route.exchange.kind is ExchangeKind.MOMENTS]
                    self._stack_lines(place, slot, norms)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the activations, once it is known."""
        return self._dtype

    def fix_dtype(self, dtype: torch.dtype) -> None:
        """Allocate the buffers of halos and contexts."""
        assert self._dtype is None
        self._dtype = dtype
        with torch.inference_mode(False):
            for place, group in enumerate(self._routes.groups):
                for slot in range(group[0].depth):
                    halos = [route for route in group if route.exchange.kind is ExchangeKind.HALO]
                    self._lay_out(place, slot, halos, is_outgoing=True)
                    self._lay_out(place, slot, halos, is_outgoing=False)
                    for route in group:
                        self._lay_out_shares(route, slot)

    def own_slot(self, key: str, slot: int, is_late: bool) -> int:
        """Where this patch's share of a context lies and is sent from, if the others' of its version are in `slot`."""
        return (slot - 1) % self._routes.by_key[key].depth if is_late else slot

    def share(self, key: str, slot: int, patch: int) -> Tensor:
        """One patch's share of a context."""
        return self._shares[key, slot, patch]

    def parcel(
        self, keys: tuple[str, ...], slot: int, is_late: bool, resting: frozenset[str] = frozenset()
    ) -> Parcel:
        """What carries the versions of `slot` of these routes, all of one group and in the plan's order.

        resting: the contexts of which only near shares travel this time.
        """
        name = (keys, slot, is_late, resting)
        if name not in self._parcels:
            with torch.inference_mode(False):
                self._parcels[name] = self._cut(keys, slot, is_late, resting)
        return self._parcels[name]

    def _new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.num_allocations += 1
        tensor = torch.zeros(tuple(shape), dtype=dtype, device=self._device)
        self.num_bytes += tensor.nbytes
        return tensor

    def _lay_out_shares(self, route: Route, slot: int) -> None:
        """One context, and the view of each patch's share."""
        if route.shares:
            whole = self.whole[route.key, slot] = self._new(route.whole_shape, self._dtype_of(route))
            for patch, (start, stop) in enumerate(route.shares):
                self._shares[route.key, slot, patch] = whole[start:stop]

    def _lay_out(self, place: int, slot: int, halos: Sequence[Route], is_outgoing: bool) -> None:
        """Flat buffers for one direction of a group's halos, and the views of their pieces."""
        views = self.outgoing if is_outgoing else self.incoming
        pieces: dict[int, list[tuple[Route, int, Message]]] = {}
        for route in halos:
            found = route.outgoing if is_outgoing else route.incoming
            views[route.key, slot] = [torch.empty(0)] * len(found)
            for number, message in enumerate(found):
                peer = message.reader if is_outgoing else message.source
                pieces.setdefault(peer, []).append((route, number, message))
        blocks = self._blocks[place, slot, is_outgoing] = {}
        for peer, items in sorted(pieces.items()):
            spans: dict[str, tuple[int, int]] = {}
            starts, end = [], 0
            for route, _, message in items:
                starts.append(end)
                end += ceil_div(self._piece_bytes(route, message), ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                spans[route.key] = (spans.get(route.key, (starts[-1], 0))[0], end)
            block = blocks[peer] = Block(self._new((end,), torch.uint8), spans)
            for start, (route, number, message) in zip(starts, items, strict=True):
                views[route.key, slot][number] = self._piece(block.flat, start, route, message)

    def _dtype_of(self, route: Route) -> torch.dtype:
        assert self._dtype is not None
        return torch.uint8 if route.is_coded else self._dtype

    def _piece_bytes(self, route: Route, message: Message) -> int:
        return prod(route.piece_shape(message)) * self._dtype_of(route).itemsize

    def _piece(self, flat: Tensor, start: int, route: Route, message: Message) -> Tensor:
        raw = flat[start : start + self._piece_bytes(route, message)]
        return raw.view(self._dtype_of(route)).view(route.piece_shape(message))

    def _stack_lines(self, place: int, slot: int, routes: Sequence[Route]) -> None:
        """Buffers for the moments of one group, its layers stacked."""
        if not routes:
            return
        first, last = self._routes.patch == 0, self._routes.patch == self._routes.parts - 1
        spans: dict[str, tuple[int, int]] = {}
        end = 0
        for route in routes:
            rows = prod(route.exchange.shape[:2])
            spans[route.key] = (end, end + rows)
            end += rows

        def new(is_needed: bool) -> Tensor | None:
            return self._new((end, 3), torch.float32) if is_needed else None

        own = self._new((end, 3), torch.float32)
        line = Line(
            own=own,
            before=new(not first),
            after=new(not last),
            forward=own if first else new(not last),
            backward=own if last else new(not first),
        )
        self._stacks[place, slot] = (line, spans)
        for route in routes:
            shape = route.exchange.shape
            self.lines[route.key, slot] = _each(line, spans[route.key], shape)

    def _cut(self, keys: tuple[str, ...], slot: int, is_late: bool, resting: frozenset[str]) -> Parcel:
        place = self._group_of[keys[0]]
        sends = self._halo_runs(place, slot, keys, True)
        receives = self._halo_runs(place, slot, keys, False)
        patch = self._routes.patch
        for key in keys:
            if self._routes.by_key[key].shares:
                from_slot = self.own_slot(key, slot, is_late)
                reach = self._routes.by_key[key].exchange.reach if key in resting else None
                for peer in range(self._routes.parts):
                    if peer != patch and (reach is None or abs(peer - patch) <= reach.near):
                        sends.append((self.share(key, from_slot, patch), peer))
                        receives.append((self.share(key, slot, peer), peer))
        return Parcel(tuple(sends), tuple(receives), self._line_runs(place, slot, keys))

    def _halo_runs(self, place: int, slot: int, keys: tuple[str, ...], is_outgoing: bool) -> list[Addressed]:
        blocks = self._blocks.get((place, slot, is_outgoing), {})
        return [(run, peer) for peer, block in blocks.items() for run in block.runs(keys)]

    def _line_runs(self, place: int, slot: int, keys: tuple[str, ...]) -> tuple[Line, ...]:
        if (place, slot) not in self._stacks:
            return ()
        line, spans = self._stacks[place, slot]
        rows = merged([spans[key] for key in keys if key in spans])
        return tuple(_each(line, span, (-1, 3)) for span in rows)


def _each(line: Line, rows: tuple[int, int], shape: tuple[int, ...]) -> Line:
    """A line of these rows of another, in another shape."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[rows[0] : rows[1]].view(shape)

    others = (line.before, line.after, line.forward, line.backward)
    return Line(cut(line.own), *(None if tensor is None else cut(tensor) for tensor in others))
