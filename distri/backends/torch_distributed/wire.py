"""How a parcel travels: batches of point-to-point messages over one process group, and the line of moments.

The line: `before` of patch i is ((own 0 + own 1) + own 2) + ... + own i-1, and `after` is ((own n-1 + own n-2) + ...) +
own i+1, where + is Chan's rule with the accumulated moments on its left. The order is part of the contract: a backend
that folds in the same order gets the same bits. Both directions take n - 1 rounds and travel at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from distri.backends.torch_distributed.alarm import first_line
from distri.errors import RunError
from distri.nn.group_norm import merge_moments

Addressed = tuple[Tensor, int]
"""A contiguous tensor, and the place in the group that it goes to or comes from."""


class LinkError(RunError):
    """A message could not be sent or received; names the peer."""


@dataclass(frozen=True)
class Line:
    """Moments of one or several layers, (rows, 3) each: own, received, and what is passed on.

    The first patch has no `before` and sends its own on; the last has no `after`.
    """

    own: Tensor
    before: Tensor | None
    after: Tensor | None
    forward: Tensor | None
    backward: Tensor | None


@dataclass(frozen=True)
class Parcel:
    """Everything that one patch sends and receives at once. Messages between two patches match in order."""

    sends: tuple[Addressed, ...]
    receives: tuple[Addressed, ...]
    lines: tuple[Line, ...] = ()
    num_bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        lines = [t for line in self.lines for t in (line.before, line.after) if t is not None]
        total = sum(t.nbytes for t in [*(t for t, _ in self.receives), *lines])
        object.__setattr__(self, "num_bytes", total)


class Wire:
    """Point-to-point messages over one process group. Blocks its lane, not the computation.

    is_batched: group all messages of a call into one launch (NCCL); otherwise post each and wait for all (gloo).
    """

    def __init__(
        self, group: dist.ProcessGroup, ranks: tuple[int, ...], timeout_s: float, is_batched: bool
    ) -> None:
        self._group = group
        self._ranks = ranks
        self._timeout = timedelta(seconds=timeout_s)
        self._is_batched = is_batched

    def exchange(self, sends: list[Addressed], receives: list[Addressed]) -> None:
        """Perform all of these messages; returns when all arrived and all left.

        Raises:
            LinkError: a peer is gone or silent.
        """
        if self._is_batched:
            self._exchange_batched(sends, receives)
            return
        posted: list[tuple[dist.Work, int]] = []
        peer = -1
        try:
            for tensor, peer in receives:
                posted.append((self._group.recv([tensor], peer, 0), peer))
            for tensor, peer in sends:
                posted.append((self._group.send([tensor], peer, 0), peer))
            for work, other in posted:
                peer = other
                work.wait(self._timeout)
        except RuntimeError as error:
            reason = plainly(error, self._timeout.total_seconds())
            raise LinkError(f"lost rank {self._ranks[peer]}: {reason}") from error

    def _exchange_batched(self, sends: list[Addressed], receives: list[Addressed]) -> None:
        operations = [dist.P2POp(dist.isend, t, self._ranks[peer], self._group) for t, peer in sends]
        operations += [dist.P2POp(dist.irecv, t, self._ranks[peer], self._group) for t, peer in receives]
        if not operations:
            return
        try:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        except RuntimeError as error:
            raise LinkError(f"a message was not delivered: {first_line(error)}") from error

    def deliver(self, parcel: Parcel, patch: int, parts: int) -> None:
        """Perform a parcel: its messages together with the first round of its lines, then the other rounds.

        Raises:
            LinkError: as `exchange`.
        """
        rounds = parts - 1 if parcel.lines else 1
        for number in range(rounds):
            sends = list(parcel.sends) if number == 0 else []
            receives = list(parcel.receives) if number == 0 else []
            for line in parcel.lines:
                _add_round(line, number, patch, parts, sends, receives)
            if sends or receives:
                self.exchange(sends, receives)
            for line in parcel.lines:
                _pass_on(line, number, patch, parts)


def plainly(error: RuntimeError, timeout_s: float) -> str:
    """What became of a peer, from what gloo says of it at length."""
    text = first_line(error)
    if "Timed out" in text:
        return f"nothing came from it within {timeout_s:g} s"
    return "it closed the connection" if "closed by peer" in text or "reset by peer" in text else text


def _add_round(
    line: Line, number: int, patch: int, parts: int, sends: list[Addressed], receives: list[Addressed]
) -> None:
    """The messages of round `number`: patch `number` sends forward, patch `parts - 1 - number` backward."""
    if patch == number and line.forward is not None:
        sends.append((line.forward, patch + 1))
    if patch == parts - 1 - number and line.backward is not None:
        sends.append((line.backward, patch - 1))
    if patch == number + 1 and line.before is not None:
        receives.append((line.before, patch - 1))
    if patch == parts - 2 - number and line.after is not None:
        receives.append((line.after, patch + 1))


def _pass_on(line: Line, number: int, patch: int, parts: int) -> None:
    """Merge this patch's own moments into what it has just received and must pass on."""
    if patch == number + 1 and line.before is not None and line.forward is not None:
        line.forward.copy_(merge_moments(line.before, line.own))
    if patch == parts - 2 - number and line.after is not None and line.backward is not None:
        line.backward.copy_(merge_moments(line.after, line.own))
