"""The reference implementation's communication pattern, to be measured beside ours: every rank gathers every value.

DistriFusion (section 4; its `PatchParallelismCommManager`) flattens what the layers of a bucket publish, both edges
of a convolution's patch whoever needs them, and all-gathers that to every rank, displaced by one step; a layer takes
what it needs from the gathered buffers, and attention concatenates them. The values that layers see are those of our
own transport; what differs is how many bytes travel, and what is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distri.core.exchanger import Transport
from distri.core.plan import Exchange, Plan
from distri.core.policy import ExchangeKind
from distri.core.program import is_published, travels_in_bucket
from distri.core.traffic import messages_of
from distri.nn.group_norm import merge_moments

Spans = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class _Gathering:
    """One all-gather under way: where each layer's values lie in every rank's share, and how to wait for it."""

    shares: list[Tensor]
    spans: Spans
    wait: Callable[[], object]


class GatherAllTransport:
    """Implements `distri.core.exchanger.Transport`; `output` serves the gather of the result, as in our own backend."""

    def __init__(self, plan: Plan, rank: int, output: Transport[Tensor], device: torch.device) -> None:
        self._plan = plan
        self._patch = plan.mesh.patch_of(rank)
        self._output = output
        self._device = device
        self._groups = [
            dist.new_group(list(plan.mesh.peers(plan.mesh.rank_of(b, 0)))) for b in range(plan.mesh.cfg)
        ]
        self._group = self._groups[plan.mesh.branch_of(rank)]
        self._sizes = {
            e.layer: self._share_size(e) for e in plan.exchanges if e.kind is not ExchangeKind.OUTPUT
        }
        self._open: dict[int, dict[str, Tensor]] = {}
        self._under_way: dict[tuple[str, int], _Gathering] = {}
        self._dtype: torch.dtype | None = None  # of the activations seen, which a plan need not know
        self.waited_s: dict[str, float] = {}
        self.bytes_received = 0

    def begin_image(self) -> None:
        """Forget all versions."""
        for gathering in self._under_way.values():
            gathering.wait()
        self._under_way.clear()
        self._open.clear()
        self._output.begin_image()

    def place(self, exchange: Exchange, version: int, bucket: int | None) -> None:
        """None: values are flattened into one message."""

    def send(self, exchange: Exchange, version: int, parts: Sequence[Tensor], bucket: int | None) -> None:
        """Put a value beside the others of its bucket; the last one starts the all-gather."""
        if parts and exchange.kind is not ExchangeKind.MOMENTS:
            self._dtype = parts[0].dtype
        dtype = self._dtype or getattr(torch, exchange.dtype)
        nothing = torch.empty(0, dtype=dtype, device=self._device)  # a patch may send none
        flat = torch.cat([part.reshape(-1) for part in parts] or [nothing])
        if bucket is None:
            self._start(version, {exchange.layer: flat})
            return
        values = self._open.setdefault(bucket, {})
        values[exchange.layer] = flat
        if len(values) == self._members(version, bucket):
            self._start(version, self._open.pop(bucket))

    def receive(self, exchange: Exchange, version: int, own: Sequence[Tensor]) -> Sequence[Tensor]:
        """Wait for the gathered values of this version, and take what this patch needs."""
        gathering = self._under_way[exchange.layer, version]
        started = time.perf_counter()
        gathering.wait()
        kind = exchange.kind.value
        self.waited_s[kind] = self.waited_s.get(kind, 0.0) + time.perf_counter() - started
        start, stop = gathering.spans[exchange.layer]
        shares = [share[start:stop] for share in gathering.shares]
        if exchange.kind is ExchangeKind.MOMENTS:
            return self._moments([share.view(exchange.shape) for share in shares])
        if exchange.kind is ExchangeKind.HALO:
            return self._pieces(exchange, shares)
        areas = [patch.area for patch in self._plan.partition.at_level(exchange.level)]
        wide = [
            share[: area * exchange.shape[1] * exchange.shape[2]].view(area, *exchange.shape[1:])
            for share, area in zip(shares, areas, strict=True)
        ]
        return [torch.cat([own[0] if patch == self._patch else share for patch, share in enumerate(wide)])]

    def gather(self, exchange: Exchange, version: int, own: Tensor) -> Sequence[Tensor]:
        """The result, as in our own backend."""
        stale = [key for key in self._under_way if key[1] < version]
        for key in stale:
            del self._under_way[key]
        return self._output.gather(exchange, version, own)

    def _members(self, version: int, bucket: int) -> int:
        return sum(
            travels_in_bucket(self._plan, e, version) == bucket and is_published(self._plan, e, version)
            for e in self._plan.exchanges
            if e.kind is not ExchangeKind.OUTPUT
        )

    def _start(self, version: int, values: dict[str, Tensor]) -> None:
        for dtype in dict.fromkeys(flat.dtype for flat in values.values()):
            alike = {layer: flat for layer, flat in values.items() if flat.dtype is dtype}
            spans: Spans = {}
            end = 0
            for layer in alike:
                spans[layer] = (end, end + self._sizes[layer])
                end += self._sizes[layer]
            own = torch.zeros(end, dtype=dtype, device=self._device)
            for layer, flat in alike.items():
                own[spans[layer][0] : spans[layer][0] + flat.numel()] = flat
            shares = [torch.empty_like(own) for _ in range(self._plan.mesh.patch)]
            work = dist.all_gather(shares, own, group=self._group, async_op=True)
            assert work is not None
            self.bytes_received += own.nbytes * (len(shares) - 1)
            for layer in alike:
                self._under_way[layer, version] = _Gathering(shares, spans, work.wait)

    def _share_size(self, exchange: Exchange) -> int:
        """Elements that each rank contributes, so that all contribute alike: the most that any patch publishes."""
        sent = [0] * self._plan.mesh.patch
        if exchange.kind is ExchangeKind.MOMENTS:
            return exchange.shape[0] * exchange.shape[1] * exchange.shape[2]
        if exchange.kind is ExchangeKind.CONTEXT:
            areas = [patch.area for patch in self._plan.partition.at_level(exchange.level)]
            return max(areas) * exchange.shape[1] * exchange.shape[2]
        for message in messages_of(exchange, self._plan.partition.patches):
            sent[message.source] += message.elements
        edges = 2 if self._plan.mesh.patch == 2 else 1  # the reference sends both edges, needed or not
        return edges * max(sent)

    def _moments(self, shares: list[Tensor]) -> list[Tensor]:
        sides = [shares[: self._patch], shares[: self._patch : -1]]
        return [_folded(side) for side in sides if side]

    def _pieces(self, exchange: Exchange, shares: list[Tensor]) -> list[Tensor]:
        """The pieces that reach this patch; each lies in its owner's share after those of earlier messages."""
        offsets = [0] * self._plan.mesh.patch
        pieces = []
        for message in messages_of(exchange, self._plan.partition.patches):
            start = offsets[message.source]
            offsets[message.source] += message.elements
            if message.reader == self._patch:
                assert message.rect is not None
                shape = (*exchange.shape[:2], message.rect.rows.size, message.rect.cols.size)
                pieces.append(shares[message.source][start : start + message.elements].view(shape))
        return pieces


def _folded(moments: list[Tensor]) -> Tensor:
    total = moments[0]
    for own in moments[1:]:
        total = merge_moments(total, own)
    return total
