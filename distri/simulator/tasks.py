"""The one list of timed tasks that all three tiers read: what every rank does in a step, in program order.

A step template is a sequence of three kinds of action, the same sequence on every rank with times of its own:

    Compute   so many nanoseconds of kernels on the compute stream
    Post      a call is handed to a communication stream; its transfer starts when every party has come to it
    Wait      the compute stream waits for a call of this step (lag 0) or of an earlier one

Semantics, in integer nanoseconds. A communication stream runs its calls in the order of their posts. A group (an
all-gather, say) starts when all of its ranks are there; a message starts when its source and its reader are there and
the message it passes on has arrived. A rank's part of a call ends with the last transfer it takes part in, plus
`tail_ns` (copies out of a staging buffer). While a rank's late transfers are under way, its kernels progress by
1000 parts where they otherwise progress by 1000 + `slowdown` parts. With a host lane, kernels start no earlier than
the host has issued them; the host begins a step when the step before it is over on its rank.

Double buffers: version t may overwrite version t - 2 at its reader, who read that at step t - 1. It is received only
when its reader has come to step t itself, so the order holds by itself and costs no task; most steps end with the
gather of the output besides, so that all ranks have finished step t - 1 before any publishes version t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from distri.simulator.hardware import Word

PARTS = 1000
"""Progress per nanosecond of a kernel beside a transfer; alone it is `PARTS` + slowdown."""


COMPUTE_STREAM, LATE_STREAM, FRESH_STREAM, HOST_LANE = 0, 1, 2, 3
STREAM_NAMES = ("compute", "communication", "synchronous communication", "host")


class CallKind(Word):
    """What a call is."""

    GROUP = "group"
    MESSAGES = "messages"


class Transfer(NamedTuple):
    """Bytes over channels: `latency_ns` first, then `num_bytes` at no more than the limit; `alone_ns` in all."""

    num_bytes: int
    loads: tuple[tuple[int, int], ...]
    latency_ns: int
    limit_bytes_per_s: int | None
    alone_ns: int


class Group(NamedTuple):
    """One collective among some ranks, or all of them sending to all at once, as one flow."""

    ranks: tuple[int, ...]
    transfer: Transfer
    tail_ns: int


class Hop(NamedTuple):
    """One message; `after` is the place in the call of the message that it passes on, -1 for none."""

    source: int
    reader: int
    after: int
    transfer: Transfer


@dataclass(frozen=True, eq=False)
class Call:
    """One communication operation of a step, for all ranks: groups, or messages in an order in which they can go.

    sent_bytes and received_bytes: payload by rank. is_late: nobody waits for it at once, so it runs beside kernels.
    """

    slot: int
    label: str
    stream: int
    is_late: bool
    groups: tuple[Group, ...]
    hops: tuple[Hop, ...]
    sent_bytes: tuple[int, ...]
    received_bytes: tuple[int, ...]
    ranks: tuple[int, ...]


class Compute(NamedTuple):
    """Kernels of the operations [first, last): device time, and host time by rank (`host_ends_ns`: the earliest end
    counted from the host lane's start, if the host is the slower one). Both host entries are empty without a lane.
    """

    device_ns: tuple[int, ...]
    host_ns: tuple[int, ...]
    host_ends_ns: tuple[int, ...]
    first: int
    last: int


class Post(NamedTuple):
    """Hand a call to its stream; `host_ns` is what issuing it costs the host."""

    call: Call
    host_ns: int


class Wait(NamedTuple):
    """Wait for the call of `slot` of `lag` steps ago."""

    slot: int
    lag: int
    label: str


Action: TypeAlias = Compute | Post | Wait


@dataclass(frozen=True, eq=False)
class StepTemplate:
    """One kind of step. is_closed: nothing is under way when it ends, and all ranks end it together."""

    name: str
    actions: tuple[Action, ...]
    is_closed: bool

    @property
    def calls(self) -> tuple[Call, ...]:
        """Its calls in order."""
        return tuple(action.call for action in self.actions if isinstance(action, Post))


@dataclass(frozen=True, eq=False)
class TaskList:
    """A run: a template for each step, by place in `templates`."""

    num_ranks: int
    templates: tuple[StepTemplate, ...]
    steps: tuple[int, ...]
    slowdown: int
    num_streams: int = 3
    slot_labels: tuple[str, ...] = ()

    def template_of(self, step: int) -> StepTemplate:
        """The template of a step."""
        return self.templates[self.steps[step]]
