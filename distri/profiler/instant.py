"""A transport that answers at once: what a rank does between its messages, and nothing of the messages themselves.

Values are packed as the torch backend packs them (one copy, keys and values where attention reads them), and what would
have arrived is memory that lies ready.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distri.backends.base import OneProcess
from distri.core.plan import Exchange, Plan
from distri.core.policy import ExchangeKind
from distri.core.traffic import messages, part_shapes


class InstantTransport:
    """Implements `distri.core.exchanger.Transport` for one patch."""

    def __init__(self, plan: Plan, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        self._plan = plan
        self._patch = plan.mesh.patch_of(rank)
        self._device = device
        self._dtype = dtype
        self._packed: dict[str, list[Tensor]] = {}
        self._arrived: dict[str, list[Tensor]] = {}
        self._outputs: list[Tensor] = []

    def begin_image(self) -> None:
        """Nothing is remembered."""

    def place(self, exchange: Exchange, version: int, bucket: int | None) -> Tensor | None:
        """This patch's share of what attention reads."""
        (whole,) = self.receive(exchange, version, ())
        shapes = part_shapes(exchange, self._plan.partition.patches, self._patch)
        return torch.split(whole, [shape[0] for shape in shapes])[self._patch]

    def send(self, exchange: Exchange, version: int, parts: Sequence[Tensor], bucket: int | None) -> None:
        """Copy the value to where it would be sent from, unless it lies there."""
        if exchange.kind is ExchangeKind.CONTEXT and exchange.layer in self._arrived:
            return
        if exchange.layer not in self._packed:
            self._packed[exchange.layer] = [torch.empty_like(part) for part in parts]
        for place, part in zip(self._packed[exchange.layer], parts, strict=True):
            place.copy_(part)

    def receive(self, exchange: Exchange, version: int, own: Sequence[Tensor]) -> Sequence[Tensor]:
        """Values of the right shapes."""
        if exchange.layer not in self._arrived:
            self._arrived[exchange.layer] = self._answer(exchange)
        return self._arrived[exchange.layer]

    def gather(self, exchange: Exchange, version: int, own: Tensor) -> Sequence[Tensor]:
        """This rank's output, and others' of the right shapes."""
        if not self._outputs:
            mesh, patches = self._plan.mesh, self._plan.partition.patches
            for rank in range(mesh.size):
                rect = patches[mesh.patch_of(rank)]
                self._outputs.append(self._make(*own.shape[:2], rect.rows.size, rect.cols.size))
        return self._outputs

    def _answer(self, exchange: Exchange) -> list[Tensor]:
        shape = exchange.shape
        if exchange.kind is ExchangeKind.CONTEXT:
            return [self._make(*shape)]
        patches = self._plan.partition.patches
        if exchange.kind is ExchangeKind.MOMENTS:
            sides = (self._patch > 0) + (self._patch < len(patches) - 1)
            moments = torch.ones(shape, dtype=torch.float32, device=self._device)
            return [moments.clone() for _ in range(sides)]
        found = messages(exchange.kind, shape, exchange.level, exchange.geometry, patches)
        rects = [message.rect for message in found if message.reader == self._patch]
        return [self._make(*shape[:2], rect.rows.size, rect.cols.size) for rect in rects if rect is not None]

    def _make(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, device=self._device).to(self._dtype)


class InstantBackend(OneProcess):
    """One rank of a plan whose peers answer at once: implements `distri.backends.base.Backend`."""

    name = "instant"

    def __init__(self, plan: Plan, patch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.plan = plan
        self._device, self._dtype = device, dtype
        self.local_ranks: tuple[int, ...] = (plan.mesh.rank_of(0, patch),)
        self._transport = InstantTransport(plan, self.local_ranks[0], device, dtype)

    def transport(self, rank: int) -> InstantTransport:
        """The transport of the one rank."""
        assert rank == self.local_ranks[0]
        return self._transport

    def for_plan(self, plan: Plan) -> InstantBackend:
        """The same rank of another plan."""
        return InstantBackend(plan, plan.mesh.patch_of(self.local_ranks[0]), self._device, self._dtype)

    def abort(self, reason: BaseException) -> None:
        """Nobody else waits."""

    def close(self) -> None:
        """Nothing is held."""
