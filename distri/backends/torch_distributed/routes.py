"""What one patch sends and receives for each exchange of a plan: geometry, computed once, with no tensor in it.

An exchange has one route, or two if its late values are coded: the values themselves travel on the first, alone and
during warm-up, their payloads on the second, in the exchange's bucket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from distri.core.codec import Codec
from distri.core.plan import Exchange, Plan
from distri.core.policy import READS_LATE, ExchangeKind, Phase, Policy
from distri.core.traffic import Message, message_bytes, messages_of, num_channels


@dataclass(frozen=True)
class Route:
    """One exchange as one patch sees it.

    key: names the route among the patch's. depth: how many versions have a place at once. outgoing, incoming: messages
    of a halo, in the order of `distri.core.traffic.messages`. shares: of a context, the half-open range that each
    patch contributes, in patch order: of tokens, or of bytes if it is coded.
    """

    key: str
    exchange: Exchange
    is_coded: bool
    depth: int
    outgoing: tuple[Message, ...] = ()
    incoming: tuple[Message, ...] = ()
    shares: tuple[tuple[int, int], ...] = ()

    @property
    def layer(self) -> str:
        """The layer's path."""
        return self.exchange.layer

    @property
    def bucket(self) -> int | None:
        """The bucket it travels in; None if it travels alone."""
        return self.exchange.bucket if self.is_coded or self.exchange.codec is Codec.NONE else None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of a context: the shape of what all patches contribute."""
        return (self.shares[-1][1],) if self.is_coded else self.exchange.shape

    def piece_shape(self, message: Message) -> tuple[int, ...]:
        """Of a halo: the shape of one piece."""
        if self.is_coded:
            return (message_bytes(self.exchange, message),)
        assert message.rect is not None
        return (*self.exchange.shape[:2], message.rect.rows.size, message.rect.cols.size)


class Routes:
    """All routes of one patch, in the plan's order, for the exchanges that are served at all.

    groups: keys of routes that share buffers, those of one bucket or one that travels alone; all of one depth.
    """

    def __init__(self, plan: Plan, patch: int) -> None:
        self.plan = plan
        self.patch = patch
        self.parts = plan.mesh.patch
        routes = [route for e in plan.exchanges if _is_served(plan, e) for route in _routes(plan, patch, e)]
        self.groups = _grouped(routes)
        depth_of = {route.key: max(r.depth for r in group) for group in self.groups for route in group}
        self.by_key = {r.key: dataclasses.replace(r, depth=depth_of[r.key]) for r in routes}
        self.groups = [[self.by_key[route.key] for route in group] for group in self.groups]

    def of(self, exchange: Exchange, is_late: bool) -> Route:
        """The route of a value."""
        return self.by_key[_key(exchange, is_late and exchange.codec is not Codec.NONE)]

    @cached_property
    def last_of_bucket(self) -> dict[int, str]:
        """The key of each bucket's last route: when its value was handed over, the message leaves."""
        return {route.bucket: key for key, route in self.by_key.items() if route.bucket is not None}


def _is_served(plan: Plan, exchange: Exchange) -> bool:
    if plan.mesh.patch == 1 or exchange.kind is ExchangeKind.OUTPUT:
        return False
    return any(exchange.policy(phase) is not Policy.LOCAL for phase in Phase)


def _key(exchange: Exchange, is_coded: bool) -> str:
    return f"{exchange.layer} in {exchange.codec.value}" if is_coded else exchange.layer


def _grouped(routes: Sequence[Route]) -> list[list[Route]]:
    found: dict[str | int, list[Route]] = {}
    for route in routes:
        found.setdefault(route.key if route.bucket is None else route.bucket, []).append(route)
    return list(found.values())


def _routes(plan: Plan, patch: int, exchange: Exchange) -> list[Route]:
    depth = 2 if exchange.steady in READS_LATE else 1  # one version is read while the next arrives
    if exchange.codec is not Codec.NONE:
        plain = _route(plan, patch, exchange, is_coded=False, depth=1)
        return [plain, _route(plan, patch, exchange, is_coded=True, depth=depth)]
    return [_route(plan, patch, exchange, is_coded=False, depth=depth)]


def _route(plan: Plan, patch: int, exchange: Exchange, is_coded: bool, depth: int) -> Route:
    route = Route(_key(exchange, is_coded), exchange, is_coded, depth)
    if exchange.kind is ExchangeKind.MOMENTS:
        return route
    patches = plan.partition.patches
    found = messages_of(exchange, patches)
    if exchange.kind is ExchangeKind.CONTEXT:
        return dataclasses.replace(
            route, shares=_ranges(_share(plan, exchange, part, is_coded) for part in range(len(patches)))
        )
    return dataclasses.replace(
        route,
        outgoing=tuple(message for message in found if message.source == patch),
        incoming=tuple(message for message in found if message.reader == patch),
    )


def _share(plan: Plan, exchange: Exchange, patch: int, is_coded: bool) -> int:
    """Tokens that a patch contributes to a context, or bytes if they are coded."""
    tokens = plan.partition.patches[patch].at_level(exchange.level).area
    if not is_coded:
        return tokens
    return message_bytes(exchange, Message(patch, -1, tokens * num_channels(exchange)))


def _ranges(sizes: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of these sizes, one after the other."""
    ranges: list[tuple[int, int]] = []
    for size in sizes:
        start = ranges[-1][1] if ranges else 0
        ranges.append((start, start + size))
    return tuple(ranges)
