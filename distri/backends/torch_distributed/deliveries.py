"""What a transport has handed to its lanes: which version lies where, and who still writes or reads there.

Nothing here touches a tensor; so what a step does to it can be taken down once and said of every later step that is
like it (`distri.backends.torch_distributed.recorder`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from distri.backends.torch_distributed.arena import Slot
from distri.backends.torch_distributed.lane import Ticket
from distri.backends.torch_distributed.routes import Route
from distri.core.buffers import DEPTH, VersionedBuffer


class DoneTicket:
    """The ticket of work that is known to be done."""

    is_done = True

    def wait(self) -> None:
        """Nothing to wait for."""


@dataclass(frozen=True)
class Delivery:
    """Where a version will be, and when."""

    ticket: Ticket
    route: Route
    slot: int


@dataclass(frozen=True)
class OpenBucket:
    """A bucket that is being filled: the keys of the routes in it so far."""

    ticket: Ticket
    version: int
    slot: int
    keys: list[str]


@dataclass
class Deliveries:
    """All of one image so far.

    held: of each layer, the versions under way or arrived. open: the buckets that did not leave yet. slot_users,
    share_users: the last messages into or from a place. slot_versions: the version that a place holds. placed: the slot
    in which a layer's own share lies already.
    """

    held: VersionedBuffer[Delivery] = field(default_factory=VersionedBuffer)
    open: dict[int, OpenBucket] = field(default_factory=dict)
    slot_users: dict[Slot, Ticket] = field(default_factory=dict)
    slot_versions: dict[Slot, int] = field(default_factory=dict)
    share_users: dict[Slot, Ticket] = field(default_factory=dict)
    placed: dict[str, int] = field(default_factory=dict)

    @property
    def under_way(self) -> list[Ticket]:
        """The tickets of all that left, or that was not put into a bucket."""
        waiting = {id(bucket.ticket) for bucket in self.open.values()}
        used = [*self.slot_users.values(), *self.share_users.values()]
        return [ticket for ticket in used if id(ticket) not in waiting]

    def later(self, steps: int, promise: Callable[[], Ticket]) -> Deliveries:
        """The same `steps` steps later, all that left having arrived; open buckets get tickets of their own.

        Slots are those of now: `steps` is a whole number of times round.
        """
        assert steps % DEPTH == 0, f"{steps} steps later, versions lie in other slots"
        done = DoneTicket()
        ticket_of: dict[int, Ticket] = {id(bucket.ticket): promise() for bucket in self.open.values()}

        def moved(ticket: Ticket) -> Ticket:
            return ticket_of.get(id(ticket), done)

        return Deliveries(
            self.held.later(steps, lambda d: dataclasses.replace(d, ticket=moved(d.ticket))),
            {
                number: OpenBucket(moved(b.ticket), b.version + steps, b.slot, list(b.keys))
                for number, b in self.open.items()
            },
            {place: moved(ticket) for place, ticket in self.slot_users.items()},
            {place: version + steps for place, version in self.slot_versions.items()},
            {place: moved(ticket) for place, ticket in self.share_users.items()},
            dict(self.placed),
        )
