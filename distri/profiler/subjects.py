"""What is to be timed: every distinct (operation, shard, way of running it) that some plans meet, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distri.core.graph import LayerGraph, Operation
from distri.core.plan import Exchange, Plan
from distri.core.policy import ExchangeKind
from distri.core.shape import Extent
from distri.simulator.kernels import Layers, Service, Shard
from distri.simulator.measured import OperationKey, StepKey, key_of, step_key_of

TEXT_TOKENS = 77


@dataclass(frozen=True)
class Subject:
    """One operation to time: for `patch` of `plan`, with its exchange if it is run by distri's own layer."""

    key: OperationKey
    operation: Operation
    plan: Plan
    patch: int
    exchange: Exchange | None


@dataclass(frozen=True)
class StepSubject:
    """One forward pass to time: the rank of `plan` that works on `patch`."""

    key: StepKey
    plan: Plan
    patch: int


def shard_of(plan: Plan, patch: int) -> Shard:
    """The shard of a patch, as the simulator describes it."""
    whole = Extent(plan.batch_per_rank, TEXT_TOKENS, plan.latent)
    return Shard(plan.extent(patch, TEXT_TOKENS), whole, plan.mesh.patch)


def layers_of(plan: Plan) -> Layers:
    """Whose layers a plan runs on real ranks."""
    return Layers.ATTACHED if plan.is_attached and plan.mesh.patch > 1 else Layers.NATIVE


def service_of(exchange: Exchange | None) -> Service:
    """Any service but none: what an exchange costs its layer does not depend on when its values were sent."""
    return Service.NONE if exchange is None else Service.FRESH


def operations_of(plan: Plan, patch: int, graph: LayerGraph) -> list[Subject]:
    """Every operation of one rank's forward pass."""
    shard, layers = shard_of(plan, patch), layers_of(plan)
    exchanges = {e.index: e for e in plan.exchanges if e.kind is not ExchangeKind.OUTPUT}
    found = []
    for operation in graph:
        exchange = exchanges.get(operation.index) if layers is Layers.ATTACHED else None
        key = key_of(operation, shard, layers, service_of(exchange))
        found.append(Subject(key, operation, plan, patch, exchange))
    return found


def distinct_operations(plans: Iterable[Plan], graph: LayerGraph) -> dict[OperationKey, Subject]:
    """The subjects of all ranks of some plans, one for each key; a patch with two neighbours before one with one."""
    found: dict[OperationKey, Subject] = {}
    for plan in plans:
        for patch in _inner_first(plan):
            for subject in operations_of(plan, patch, graph):
                found.setdefault(subject.key, subject)
    return found


def distinct_steps(plans: Iterable[Plan]) -> dict[StepKey, StepSubject]:
    """The forward passes of all ranks of some plans, one for each key."""
    found: dict[StepKey, StepSubject] = {}
    for plan in plans:
        for patch in _inner_first(plan):
            key = step_key_of(shard_of(plan, patch), layers_of(plan))
            found.setdefault(key, StepSubject(key, plan, patch))
    return found


def _inner_first(plan: Plan) -> list[int]:
    last = plan.mesh.patch - 1
    return sorted(range(plan.mesh.patch), key=lambda patch: patch in (0, last))
