"""Can this plan be trusted? Each rule is a function that says, in one sentence, what is wrong.

The rules together prove what a run needs: the patches tile the latent exactly once; every value that a layer reads was
published at exactly the step the staleness contract names, so nobody waits for ever; and every derived figure follows
from the geometry, so a plan that was edited by hand is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from distri.core.graph import LayerGraph
from distri.core.latent import obstacles
from distri.core.partition import check_image_size
from distri.core.plan import DTYPE_BYTES, SCHEMA_VERSION, Exchange, Plan
from distri.core.planner import (
    PATCHES_MOVE,
    latent_layers,
    list_exchanges,
    macs_per_device,
    moves_what_is_kept,
    plan_hash,
    received_per_step,
    reception,
    reference_of,
)
from distri.core.policy import READS_LATE, ExchangeKind, Phase, Policy
from distri.core.program import InstructionKind, is_published, step_program, travels_in_bucket
from distri.core.shape import Rect
from distri.errors import PartitionError, PlanError

Rule = Callable[[Plan], Iterator[str]]


def verify(plan: Plan, graph: LayerGraph | None = None) -> None:
    """Hold every rule, and that the plan is for `graph` if that is given.

    Raises:
        PlanError: with the first sentence of what is wrong.
    """
    for rule in RULES:
        for finding in rule(plan):
            raise PlanError(finding)
    if graph is not None:
        verify_against(plan, graph)


def verify_against(plan: Plan, graph: LayerGraph) -> None:
    """Hold that the plan was made for this graph and lists exactly its exchanges.

    Raises:
        PlanError: it was made for another model, or its figures do not follow from the graph.
    """
    if plan.model != reference_of(graph):
        raise PlanError(
            f"the plan is for model {plan.model.name!r} ({plan.model.fingerprint}), "
            f"not for {graph.name!r} ({graph.fingerprint})"
        )
    if [_demand(e) for e in plan.exchanges] != [_demand(e) for e in list_exchanges(plan, graph)]:
        raise PlanError("the plan's exchanges are not those of its model")
    for finding in _latent_is_read_fresh(plan, graph):
        raise PlanError(finding)
    if plan.macs_per_device != macs_per_device(plan, graph):
        raise PlanError("the plan's MACs per device do not follow from its model")


def _latent_is_read_fresh(plan: Plan, graph: LayerGraph) -> Iterator[str]:
    """What reads the latent itself has this step's: cut from the whole, or the neighbours' rows by a fresh halo."""
    layers = latent_layers(graph)
    if plan.latent_layers != (() if plan.keeps_latent_on_patch else layers):
        yield "the plan's layers that read the whole latent are not those of its model"
    if not plan.keeps_latent_on_patch or not plan.is_attached:
        return
    for exchange in (plan.by_layer[layer] for layer in layers):
        if (exchange.warmup, exchange.steady) != (Policy.FRESH, Policy.FRESH):
            yield f"{exchange.layer} reads the latent, of which only this step's version is right; it must be fresh"


def _demand(exchange: Exchange) -> tuple[object, ...]:
    """What the model decides about an exchange, whatever the policy."""
    return exchange.index, exchange.layer, exchange.kind, exchange.shape, exchange.level, exchange.geometry


def schema_is_known(plan: Plan) -> Iterator[str]:
    """The plan is of the schema that this distri writes."""
    if plan.schema_version != SCHEMA_VERSION:
        yield f"this distri reads plans of schema {SCHEMA_VERSION}; this one is of schema {plan.schema_version}"


def hash_matches(plan: Plan) -> Iterator[str]:
    """Nobody changed the plan after it was made."""
    if plan.hash != plan_hash(plan):
        yield "the plan's hash does not match its contents: it was edited; make it again with 'distri plan'"


def request_is_possible(plan: Plan) -> Iterator[str]:
    """The image, its steps and its guidance are such as this mesh can run."""
    model, image = plan.model, plan.image
    if min(model.vae_factor, model.alignment, model.latent_channels) < 1:
        yield "the model's factors and channels must be positive"
        return
    try:
        check_image_size(image.height, image.width, model.grain)
    except PartitionError as error:
        yield str(error)
    if image.num_images < 1 or not 0 <= plan.warmup_steps <= image.num_inference_steps:
        yield (
            f"{plan.warmup_steps} warm-up steps of {image.num_inference_steps} for {image.num_images} images "
            "make no run"
        )
    if image.num_inference_steps < 1:
        yield f"at least 1 denoising step is needed, not {image.num_inference_steps}"
    if plan.mesh.cfg == 2 and not image.guidance:
        yield "the mesh splits the guidance branches, but guidance is off"


def patches_tile(plan: Plan) -> Iterator[str]:
    """At every step the patches cover the latent exactly once and their borders are aligned; if they move, alone."""
    for patches in plan.partition.turns:
        yield from _tile(plan, patches)
    if moves_what_is_kept(plan):
        yield PATCHES_MOVE


def _tile(plan: Plan, patches: tuple[Rect, ...]) -> Iterator[str]:
    if len(patches) != plan.mesh.patch:
        yield f"{len(patches)} patches for a mesh of {plan.mesh.patch}"
    if any(patch.area == 0 or patch.intersect(plan.latent) != patch for patch in patches):
        yield "a patch is empty or reaches outside the latent"
    overlap = any(a.intersect(b).area for i, a in enumerate(patches) for b in patches[:i])
    if overlap or sum(patch.area for patch in patches) != plan.latent.area:
        yield "the patches do not tile the latent exactly once"
    unit = plan.model.alignment
    for patch in patches:
        for band, whole in ((patch.rows, plan.latent.rows), (patch.cols, plan.latent.cols)):
            if band.start % unit or (band.stop % unit and band.stop != whole.stop):
                yield f"a patch border at {band} is not a multiple of {unit}, which {plan.model.alignment_layer} needs"


def exchanges_are_ordered(plan: Plan) -> Iterator[str]:
    """Exchanges are in execution order, one a layer, and end with the gather of the output."""
    places = [exchange.index for exchange in plan.exchanges]
    if places != sorted(set(places)):
        yield "the exchanges are not in execution order"
    if len({exchange.layer for exchange in plan.exchanges}) != len(plan.exchanges):
        yield "a layer has more than one exchange"
    if not plan.exchanges or plan.exchanges[-1].kind is not ExchangeKind.OUTPUT:
        yield "the plan does not end with the gather of the output"


def policies_follow_table(plan: Plan) -> Iterator[str]:
    """Every exchange is served as the plan's own policy table says."""
    for e in plan.exchanges:
        warmup, steady = (plan.policy.rule(e.kind, phase, e.layer) for phase in (Phase.WARMUP, Phase.STEADY))
        if (warmup.policy, steady.policy, steady.codec, steady.reach) != (
            e.warmup,
            e.steady,
            e.codec,
            e.reach,
        ):
            yield f"{e.layer}: its policies differ from the plan's table"


def latent_has_a_place(plan: Plan) -> Iterator[str]:
    """The latent is whole on every rank, or stays on its patch in both phases and can."""
    output = plan.exchanges[-1]
    if output.warmup is not output.steady:
        yield "the output is local in one phase and gathered in the other; the latent lies in one place"
    yield from obstacles(plan)


def reads_are_published(plan: Plan) -> Iterator[str]:
    """Every awaited version was published: earlier, or just before by all ranks. So no rank waits for ever."""
    if plan.mesh.patch == 1:
        return
    steps = _telling_steps(plan)
    for step in steps:
        for instruction in step_program(plan, step):
            if instruction.kind is not InstructionKind.AWAIT:
                continue
            exchange, version = plan.exchanges[instruction.exchange], instruction.version
            if version < 0 or not is_published(plan, exchange, version):
                yield f"{exchange.layer}: step {step} reads version {version}, which is never published"
            if version == step and travels_in_bucket(plan, exchange, step) is not None:
                yield f"{exchange.layer}: step {step} waits for a message that a later layer completes"


def _telling_steps(plan: Plan) -> list[int]:
    """Steps that between them meet every rule: the ends of both phases and one step inside."""
    last = plan.image.num_inference_steps - 1
    around = (0, 1, plan.warmup_steps - 1, plan.warmup_steps, plan.warmup_steps + 1, last)
    return sorted({step for step in around if 0 <= step <= last})


def buckets_are_whole(plan: Plan) -> Iterator[str]:
    """Buckets hold late exchanges only and follow execution order."""
    numbers = [e.bucket for e in plan.exchanges if e.bucket is not None]
    if numbers != sorted(numbers) or set(numbers) != set(range(plan.num_buckets)):
        yield "the buckets are not numbered in execution order"
    for exchange in plan.exchanges:
        if (exchange.bucket is not None) != (exchange.steady in READS_LATE):
            yield f"{exchange.layer}: a bucket goes with a policy that reads one step late, and only with that"


def figures_follow(plan: Plan) -> Iterator[str]:
    """Peers, elements, bytes and per-step sums follow from the geometry of the exchanges."""
    for exchange in plan.exchanges:
        if exchange.level < 1 or (exchange.geometry is None) != (exchange.kind is not ExchangeKind.HALO):
            yield f"{exchange.layer}: a halo has a convolution's geometry at a positive level, and only a halo has one"
            return
        if exchange.dtype not in DTYPE_BYTES:
            yield f"{exchange.layer}: unknown dtype {exchange.dtype!r}"
            return
        if reception(plan, exchange) != (exchange.peers, exchange.elements_received, exchange.bytes_received):
            yield f"{exchange.layer}: peers, elements or bytes do not follow from geometry, dtype and codec"
    if received_per_step(plan) != (plan.elements_received_per_step, plan.bytes_received_per_step):
        yield "the sums per step do not follow from the exchanges"
    if len(plan.macs_per_device) != plan.mesh.size:
        yield f"MACs for {len(plan.macs_per_device)} devices on a mesh of {plan.mesh.size}"


RULES: tuple[Rule, ...] = (
    schema_is_known,
    hash_matches,
    request_is_possible,
    patches_tile,
    exchanges_are_ordered,
    policies_follow_table,
    latent_has_a_place,
    reads_are_published,
    buckets_are_whole,
    figures_follow,
)
