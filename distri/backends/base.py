"""What a backend is: it places ranks, moves their values, and agrees on what all ranks start from."""

from __future__ import annotations

from typing import Any, Protocol

from distri.core.exchanger import Transport
from distri.core.plan import Plan


class Backend(Protocol):
    """A backend that was opened for one plan; closed with `close`, also after an error.

    local_ranks: the ranks that live in this process (all of them in process, one under torch.distributed).
    """

    name: str
    plan: Plan
    local_ranks: tuple[int, ...]

    def transport(self, rank: int) -> Transport[Any]:
        """The transport of a local rank."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's nested tensors (in tuples, lists, dicts; other leaves as rank 0 has them), on every rank."""

    def for_plan(self, plan: Plan) -> Backend:
        """Another backend of this kind, for another plan of the same ranks; to be closed before this one."""

    def abort(self, reason: BaseException) -> None:
        """Release every local rank that waits, because one of them failed."""

    def close(self) -> None:
        """Give everything back. May be called twice."""
