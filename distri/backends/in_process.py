"""All ranks in one process, in lock-step: the definition of what a plan means.

Values are handed over through mailboxes that know versions; a rank that needs a version waits until its owner has put
it there. Nothing is copied and nothing is timed, so this is the reference that the other backends are held against.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distri.backends.base import OneProcess
from distri.core.buffers import VersionedBuffer
from distri.core.plan import Exchange, Plan
from distri.core.policy import ExchangeKind
from distri.core.traffic import messages, output_ranks
from distri.errors import RunError
from distri.nn.group_norm import merge_moments

Key = tuple[int, str, int]


class Mailboxes:
    """Every published value by (branch, layer, patch); reading waits for the version."""

    def __init__(self, timeout_s: float) -> None:
        self._buffer: VersionedBuffer[Sequence[Tensor]] = VersionedBuffer()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._timeout_s = timeout_s

    def put(self, key: Key, version: int, parts: Sequence[Tensor]) -> None:
        """Publish a value."""
        with self._changed:
            self._buffer.put(key, version, parts)
            self._changed.notify_all()

    def get(self, key: Key, version: int) -> Sequence[Tensor]:
        """Wait for a value of exactly this version.

        Raises:
            RunError: another rank failed, or the value did not come in time.
        """
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: self._failure is not None or self._buffer.holds(key, version), self._timeout_s
            )
            if self._failure is not None:
                raise RunError("another rank failed") from self._failure
            if not arrived:
                raise RunError(
                    f"waited {self._timeout_s} s for version {version} of {key[1]} from patch {key[2]}"
                )
            return self._buffer.get(key, version)

    def fail(self, reason: BaseException) -> None:
        """Wake every waiting rank with an error."""
        with self._changed:
            self._failure = reason
            self._changed.notify_all()

    def clear(self) -> None:
        """Forget every value and failure."""
        with self._changed:
            self._buffer.clear()
            self._failure = None


class InProcessTransport:
    """One rank's end of the mailboxes."""

    def __init__(self, plan: Plan, rank: int, mailboxes: Mailboxes) -> None:
        self._plan = plan
        self._branch, self._patch = plan.mesh.branch_of(rank), plan.mesh.patch_of(rank)
        self._rank = rank
        self._mailboxes = mailboxes

    def begin_image(self) -> None:
        """Forget every value; a session calls this for all ranks before any of them starts."""
        self._mailboxes.clear()

    def place(self, exchange: Exchange, version: int, bucket: int | None) -> None:
        """None: a value stays where its layer made it."""

    def send(self, exchange: Exchange, version: int, parts: Sequence[Tensor], bucket: int | None) -> None:
        """Publish at once: buckets save messages, and there are none here."""
        self._mailboxes.put((self._branch, exchange.layer, self._patch), version, parts)

    def receive(self, exchange: Exchange, version: int, own: Sequence[Tensor]) -> Sequence[Tensor]:
        """Wait for exactly this version of the others' values."""

        def value(patch: int) -> Sequence[Tensor]:
            return self._mailboxes.get((self._branch, exchange.layer, patch), version)

        receivers: dict[ExchangeKind, Callable[..., list[Tensor]]] = {
            ExchangeKind.HALO: self._receive_halo,
            ExchangeKind.MOMENTS: self._receive_moments,
            ExchangeKind.CONTEXT: self._receive_context,
        }
        return receivers[exchange.kind](exchange, value, own)

    def _receive_halo(
        self, exchange: Exchange, value: Callable[[int], Sequence[Tensor]], own: Sequence[Tensor]
    ) -> list[Tensor]:
        found = messages(
            exchange.kind, exchange.shape, exchange.level, exchange.geometry, self._plan.partition.patches
        )
        sent_by: dict[int, list[int]] = {}
        for message in found:
            sent_by.setdefault(message.source, []).append(message.reader)
        return [value(m.source)[sent_by[m.source].index(m.reader)] for m in found if m.reader == self._patch]

    def _receive_moments(
        self, exchange: Exchange, value: Callable[[int], Sequence[Tensor]], own: Sequence[Tensor]
    ) -> list[Tensor]:
        before = range(self._patch)
        after = range(self._plan.mesh.patch - 1, self._patch, -1)
        return [_folded([value(patch)[0] for patch in side]) for side in (before, after) if len(side)]

    def _receive_context(
        self, exchange: Exchange, value: Callable[[int], Sequence[Tensor]], own: Sequence[Tensor]
    ) -> list[Tensor]:
        patches = range(self._plan.mesh.patch)
        return [torch.cat([own[0] if patch == self._patch else value(patch)[0] for patch in patches])]

    def gather(self, exchange: Exchange, version: int, own: Tensor) -> Sequence[Tensor]:
        """The outputs of this version that this rank has in the end, in rank order."""
        mesh = self._plan.mesh
        self._mailboxes.put((self._branch, exchange.layer, self._patch), version, [own])
        ranks = output_ranks(mesh, exchange, self._rank)
        places = [(mesh.branch_of(rank), mesh.patch_of(rank)) for rank in ranks]
        return [self._mailboxes.get((branch, exchange.layer, patch), version)[0] for branch, patch in places]


def _folded(moments: Sequence[Tensor]) -> Tensor:
    """Merge along the line: each patch merges its own into what reached it."""
    total = moments[0]
    for own in moments[1:]:
        total = merge_moments(total, own)
    return total


class InProcessBackend(OneProcess):
    """All ranks of a plan in this process."""

    name = "in_process"

    def __init__(self, plan: Plan, *, timeout_s: float = 60.0) -> None:
        self.plan = plan
        self.local_ranks = tuple(range(plan.mesh.size))
        self._timeout_s = timeout_s
        self._mailboxes = Mailboxes(timeout_s)

    def transport(self, rank: int) -> InProcessTransport:
        """The transport of a rank."""
        return InProcessTransport(self.plan, rank, self._mailboxes)

    def for_plan(self, plan: Plan) -> InProcessBackend:
        """All ranks of another plan."""
        return InProcessBackend(plan, timeout_s=self._timeout_s)

    def abort(self, reason: BaseException) -> None:
        """Wake the ranks that wait."""
        self._mailboxes.fail(reason)

    def close(self) -> None:
        """Let go of every value."""
        self._mailboxes.clear()
