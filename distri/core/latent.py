"""Where the latent lies between two steps: on every rank as a whole, or on each rank its own patch of it.

Guidance and most schedulers work element by element, so a rank can do their arithmetic on its patch alone. Then no
output is gathered and no latent is told; only the convolutions that read the latent itself need their neighbours' rows
of it. These are new at every step, so their halo is fresh in both phases: what is computed is what the whole latent
gives, bit for bit. A plan of one patch is the same either way.

Nothing but the policy table says where the latent lies: the output is `local` there (`Plan.keeps_latent_on_patch`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from enum import Enum

from distri.core.plan import Exchange, Plan
from distri.core.policy import ExchangeKind, Phase, Policy, PolicyRule, PolicyTable

PATCHES_MOVE = (
    "split 'alternate' moves every patch at every step, so no rank can keep its own; use --latent whole"
)
MEASURES_CHANGE = (
    "a refresh that measures the latent's change needs the whole latent at every step; "
    "use --refresh-every or --latent whole"
)
GATHERS_ALL = (
    "the published implementation gathers the output at every step; --pattern gather_all needs --latent whole"
)
KEEPS_CHECKPOINTS = (
    "a checkpoint holds every step's whole output, which no rank has where the latent stays on its patch; "
    "plan with --latent whole, or run without checkpoints"
)


class LatentPlace(str, Enum):
    """What of the latent a rank has between steps: all of it, or its own patch."""

    WHOLE = "whole"
    PATCH = "patch"


def table_on_patch(table: PolicyTable, latent_layers: Iterable[str]) -> PolicyTable:
    """`table` for a latent that stays on its patch: no output is gathered, what `latent_layers` read is fresh."""
    rules = [PolicyRule(ExchangeKind.OUTPUT, phase, Policy.LOCAL) for phase in Phase]
    for layer in latent_layers:
        rules += [PolicyRule(ExchangeKind.HALO, phase, Policy.FRESH, layer) for phase in Phase]
    return PolicyTable(f"{table.name}, latent on patch", (*rules, *table.rules))


def obstacles(plan: Plan) -> Iterator[str]:
    """Why the latent cannot stay on its patch in this plan, in one sentence each; nothing if it does not or can."""
    if not plan.keeps_latent_on_patch:
        return
    if plan.mesh.patch == 1:
        yield "a plan of one patch has the whole latent on every rank; use --latent whole"
    if plan.latent_layers:
        yield "a policy table alone does not keep the latent on its patch; ask for it with --latent patch"
    if plan.partition.turned:
        yield PATCHES_MOVE
    if plan.refresh is not None and plan.refresh.max_change is not None:
        yield MEASURES_CHANGE
    if plan.pattern == "gather_all":
        yield GATHERS_ALL


def latent_exchange(plan: Plan) -> Exchange:
    """The gather of the latent at the end of an image whose latent stayed on its patches: by all ranks, once.

    It is no exchange of a step and in no plan; it comes behind the last one's.
    """
    output = plan.exchanges[-1]
    shape = (plan.image.num_images, *output.shape[1:])
    return dataclasses.replace(
        output, index=output.index + 1, layer="latent", warmup=Policy.FRESH, steady=Policy.FRESH, shape=shape
    )
