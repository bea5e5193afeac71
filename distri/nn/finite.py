"""Finds the layer whose value stopped being a number, before every rank's picture is black.

Each value is looked at where it is made, once in `every` steps; so the rank and the layer that are named are those at
which it began. On a GPU a look waits for the device: that is what the interval is for.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from torch import Tensor

from distri.core.exchanger import Transport
from distri.core.plan import Exchange
from distri.errors import RunError


class FiniteCheck:
    """A transport that refuses this rank's values if they hold NaN or infinity."""

    def __init__(self, rank: int, every: int, inner: Transport[Tensor]) -> None:
        self._rank = rank
        self._every = every
        self._inner = inner

    def begin_image(self) -> None:
        """Nothing is remembered."""
        self._inner.begin_image()

    def place(self, exchange: Exchange, version: int, bucket: int | None) -> Tensor | None:
        """The transport's."""
        return self._inner.place(exchange, version, bucket)

    def send(self, exchange: Exchange, version: int, parts: Sequence[Tensor], bucket: int | None) -> None:
        """Send, then look: so the backend knows where this rank stands.

        Raises:
            RunError: a value is not finite; names rank, step, layer and exchange.
        """
        self._inner.send(exchange, version, parts, bucket)
        self._look(exchange, version, parts)

    def receive(self, exchange: Exchange, version: int, own: Sequence[Tensor]) -> Sequence[Tensor]:
        """What arrives was looked at where it was made."""
        return self._inner.receive(exchange, version, own)

    def gather(self, exchange: Exchange, version: int, own: Tensor) -> Sequence[Tensor]:
        """As `send`, but look first: the gather ends the step."""
        self._look(exchange, version, [own])
        return self._inner.gather(exchange, version, own)

    def _look(self, exchange: Exchange, version: int, parts: Sequence[Tensor]) -> None:
        if version % self._every:
            return
        for part in parts:
            if part.is_floating_point() and not bool(part.isfinite().all()):
                bad, total = int((~part.isfinite()).sum()), part.numel()
                raise RunError(
                    f"rank {self._rank} ({socket.gethostname()}, pid {os.getpid()}): step {version}, "
                    f"{exchange.layer} ({exchange.kind.value}): {bad} of {total} values are NaN or infinite"
                )
