"""What one patch sends and receives for each exchange of a plan: geometry, computed once, with no tensor in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from distri.core.plan import Exchange, Plan
from distri.core.policy import READS_LATE, ExchangeKind, Phase, Policy
from distri.core.program import is_published, travels_in_bucket
from distri.core.traffic import Message, messages


@dataclass(frozen=True)
class Route:
    """One exchange as one patch sees it.

    depth: how many versions are held at once: two where a version is read one step later, while the next arrives.
    outgoing, incoming: messages of a halo, in the order of `distri.core.traffic.messages`.
    shares: of a context, the half-open range of tokens that each patch contributes, in patch order.
    """

    exchange: Exchange
    depth: int
    outgoing: tuple[Message, ...] = ()
    incoming: tuple[Message, ...] = ()
    shares: tuple[tuple[int, int], ...] = ()

    @property
    def layer(self) -> str:
        """The layer's path."""
        return self.exchange.layer


class Routes:
    """All routes of one patch, in the plan's order, for the exchanges that are served at all."""

    def __init__(self, plan: Plan, patch: int) -> None:
        self.plan = plan
        self.patch = patch
        self.parts = plan.mesh.patch
        self.by_layer = {e.layer: _route(plan, patch, e) for e in plan.exchanges if _is_served(plan, e)}
        self._late: dict[int, dict[int, tuple[str, ...]]] = {}

    @cached_property
    def groups(self) -> tuple[tuple[Route, ...], ...]:
        """Routes that share buffers: those of one bucket, or one that travels alone."""
        found: dict[tuple[bool, int], list[Route]] = {}
        for place, route in enumerate(self.by_layer.values()):
            bucket = route.exchange.bucket
            found.setdefault((bucket is None, place if bucket is None else bucket), []).append(route)
        return tuple(tuple(group) for group in found.values())

    def late_members(self, version: int, bucket: int) -> tuple[str, ...]:
        """The layers whose values of `version` travel in `bucket`, in the plan's order: the same on every rank."""
        phase_key = min(version, self.plan.warmup_steps)  # all steady steps that publish are alike
        if phase_key not in self._late:
            self._late[phase_key] = self._members(version)
        return self._late[phase_key][bucket]

    def _members(self, version: int) -> dict[int, tuple[str, ...]]:
        members: dict[int, tuple[str, ...]] = {}
        for layer, route in self.by_layer.items():
            if is_published(self.plan, route.exchange, version):
                bucket = travels_in_bucket(self.plan, route.exchange, version)
                if bucket is not None:
                    members[bucket] = (*members.get(bucket, ()), layer)
        return members


def _is_served(plan: Plan, exchange: Exchange) -> bool:
    if plan.mesh.patch == 1 or exchange.kind is ExchangeKind.OUTPUT:
        return False
    return any(exchange.policy(phase) is not Policy.LOCAL for phase in Phase)


def _route(plan: Plan, patch: int, exchange: Exchange) -> Route:
    depth = 2 if exchange.steady in READS_LATE else 1
    if exchange.kind is ExchangeKind.MOMENTS:
        return Route(exchange, depth)
    if exchange.kind is ExchangeKind.CONTEXT:
        return Route(exchange, depth, shares=_shares(plan, exchange.level))
    found = messages(exchange.kind, exchange.shape, exchange.level, exchange.geometry, plan.partition.patches)
    return Route(
        exchange,
        depth,
        outgoing=tuple(message for message in found if message.source == patch),
        incoming=tuple(message for message in found if message.reader == patch),
    )


def _shares(plan: Plan, level: int) -> tuple[tuple[int, int], ...]:
    shares, start = [], 0
    for patch in plan.partition.at_level(level):
        shares.append((start, start + patch.area))
        start += patch.area
    return tuple(shares)
