"""What a backend is: it places ranks, moves their values, and agrees on what all ranks start from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from distri.core.exchanger import Transport
from distri.core.plan import Plan
from distri.errors import RunError

R = TypeVar("R")
Span = Callable[[str], AbstractContextManager[object]]
"""Makes a context that is named, and timed by whoever made this."""


class RecordingError(RunError):
    """A step could not be recorded; it can still be done."""


class Recording(Protocol):
    """One recorded step of one rank."""

    def replay(self, step: int) -> None:
        """Do it again, as `step`: same instructions, same places, other values there."""


class Recorder(Protocol):
    """Records steps of one rank, exchanges included, for a device that can do them without the host."""

    def record(self, step: int, work: Callable[[], R]) -> tuple[Recording, R]:
        """Record `work`, the rank's part of `step`, and do it; replays change the values of what it returned.

        Raises:
            RecordingError: the device cannot; nothing was done.
        """


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

    def broadcast_like(self, tensor: Any) -> Any:
        """Rank 0's tensor, where every rank has one of its shape and dtype: no rank needs to be told what comes."""

    def recorder(self) -> Recorder | None:
        """Of the one rank of this process, if its device can do a step without the host."""

    def traced(self, span: Span) -> AbstractContextManager[object]:
        """While it lasts, waits and messages of this process happen in spans named `waits for ...`, `late ...` and
        `fresh ...`.
        """

    def collect(self, text: str) -> list[str] | None:
        """Every process's text, in rank order, on that of rank 0; None on the others. All processes call it."""

    def for_plan(self, plan: Plan) -> Backend:
        """Another backend of this kind, for another plan of the same ranks; to be closed before this one."""

    def abort(self, reason: BaseException) -> None:
        """Release every local rank that waits, because one of them failed."""

    def close(self) -> None:
        """Give everything back. May be called twice."""


class OneProcess:
    """What is the same for every backend whose ranks are all of one process: there is nobody to tell or to ask.

    No step is recorded: several ranks share one host, and `distri.bench.one_rank` captures a lone one by itself.
    """

    def broadcast(self, value: Any) -> Any:
        """All ranks already have it."""
        return value

    def broadcast_like(self, tensor: Any) -> Any:
        """All ranks already have it."""
        return tensor

    def recorder(self) -> None:
        """There is none."""

    def traced(self, span: Span) -> AbstractContextManager[object]:
        """Nothing travels."""
        return nullcontext()

    def collect(self, text: str) -> list[str]:
        """The one process's."""
        return [text]
