"""Communication lanes: where a rank's messages travel while its computation goes on.

A lane performs what it is given one after the other, in the order in which it was given. Since the ranks of a branch
run one program, their lanes perform the same exchanges in the same order, and no message waits for ever.

Each rank has two. The *late* lane carries what is read one step later. The *urgent* lane carries what this step waits
for: fresh values and the gather of the output, which must not queue behind a step's worth of late messages. They use
different process groups, so they never share a connection. No deadlock follows: whatever a rank awaits was handed to
its lane earlier in the one program that all ranks run.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch

from distri.backends.torch_distributed.alarm import Alarm, LostPeerError

POLL_S = 0.2
Work = Callable[[], None]


class Ticket(Protocol):
    """The promise that some work of a lane will have been done."""

    @property
    def is_done(self) -> bool:
        """Whether waiting would return at once."""

    def wait(self) -> None:
        """Let the caller's computation go on only after the work; raises what the work raised."""


class Lane(Protocol):
    """Performs work in order, beside the computation."""

    def promise(self) -> Ticket:
        """A ticket for work that will be submitted later."""

    def submit(self, work: Work, ticket: Ticket | None = None) -> Ticket:
        """Hand over work; it sees everything that the caller computed before."""

    def join(self) -> None:
        """Let the caller's computation go on only after all work so far."""

    def close(self) -> None:
        """End the lane without waiting for work that hangs. May be called twice."""


class ThreadTicket:
    """A ticket of a `ThreadLane`."""

    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm
        self._done = threading.Event()
        self._error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """Whether the work was done well."""
        return self._done.is_set() and self._error is None

    def finish(self, error: BaseException | None = None) -> None:
        """Called by the lane."""
        self._error = error
        self._done.set()

    def wait(self) -> None:
        """Block until the work is done, failed, or an alarm makes waiting pointless.

        Raises:
            LostPeerError: another rank failed.
        """
        while not self._done.wait(POLL_S):
            sentence = self._alarm.sentence
            if sentence is not None and not self._done.is_set():
                raise LostPeerError(sentence)
        if self._error is not None:
            raise self._error


class ThreadLane:
    """A lane on the CPU: one thread that blocks in gloo while the main thread computes."""

    def __init__(self, name: str, alarm: Alarm) -> None:
        self._alarm = alarm
        self._queue: queue.SimpleQueue[tuple[Work, ThreadTicket] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def promise(self) -> ThreadTicket:
        """A ticket for work that will be submitted later."""
        return ThreadTicket(self._alarm)

    def submit(self, work: Work, ticket: Ticket | None = None) -> ThreadTicket:
        """Hand over work."""
        promised = ticket if ticket is not None else self.promise()
        assert isinstance(promised, ThreadTicket)
        self._queue.put((work, promised))
        return promised

    def join(self) -> None:
        """Block until all work so far is done.

        Raises:
            LostPeerError: another rank failed.
        """
        self.submit(nothing).wait()

    def close(self) -> None:
        """End the thread after the work it has; a thread that hangs in a broken link is left to die."""
        self._queue.put(None)
        self._thread.join(timeout=5 * POLL_S if self._alarm.sentence is None else 0)

    def _run(self) -> None:
        failure: BaseException | None = None
        while (item := self._queue.get()) is not None:
            work, ticket = item
            if failure is None:
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for the ticket
                    failure = error
            ticket.finish(failure)


def nothing() -> None:
    """Work that is done at once."""


class StreamTicket:
    """A ticket of a `StreamLane`: an event that other streams can wait for."""

    def __init__(self) -> None:
        self.event: torch.cuda.Event | None = None

    @property
    def is_done(self) -> bool:
        """Whether the device has finished the work; nothing has while work is only recorded."""
        if self.event is None or torch.cuda.is_current_stream_capturing():
            return False
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Make the current stream wait; the host goes on."""
        assert self.event is not None, "a message is awaited whose bucket was never completed"
        torch.cuda.current_stream().wait_event(self.event)

    def wait_on_host(self, alarm: Alarm, limit_s: float) -> None:
        """Block the host until the device is done.

        Raises:
            LostPeerError: another rank failed, or nothing arrived in time.
        """
        deadline = time.monotonic() + limit_s
        while not self.is_done:
            if alarm.sentence is not None:
                raise LostPeerError(alarm.sentence)
            if time.monotonic() > deadline:
                raise LostPeerError(f"nothing arrived within {limit_s:g} s")
            time.sleep(0.0002)


class StreamLane:
    """A lane on a GPU: a stream of its own, ordered against the computing stream by events."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._is_ahead = False

    def promise(self) -> StreamTicket:
        """A ticket for work that will be submitted later."""
        return StreamTicket()

    def submit(self, work: Work, ticket: Ticket | None = None) -> StreamTicket:
        """Enqueue work behind everything that the current stream was given."""
        promised = ticket if ticket is not None else self.promise()
        assert isinstance(promised, StreamTicket)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._is_ahead = True
        with torch.cuda.stream(self._stream):
            work()
            promised.event = self._stream.record_event()
        return promised

    def join(self) -> None:
        """Make the current stream wait for this one, if it was given anything since it last did."""
        if self._is_ahead:  # a recording may not wait for what it does not contain
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._is_ahead = False

    def close(self) -> None:
        """Nothing to end: the stream goes with the object."""


def open_lane(name: str, device: torch.device, alarm: Alarm) -> Lane:
    """A lane for values on `device`."""
    return StreamLane(device) if device.type == "cuda" else ThreadLane(name, alarm)
