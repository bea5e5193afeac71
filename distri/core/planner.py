"""From a request to a plan: partition, policies, exchanges, buckets. The search over requests builds on this."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from typing import Any

from distri.core import traffic
from distri.core.graph import LayerGraph, Operation
from distri.core.latent import LatentPlace, obstacles, table_on_patch
from distri.core.mesh import Mesh
from distri.core.ops.conv2d import ConvGeometry
from distri.core.ops.group_norm import NUM_MOMENTS
from distri.core.partition import SplitAxis, check_image_size, make_partition
from distri.core.plan import (
    DTYPE_BYTES,
    SCHEMA_VERSION,
    Exchange,
    ImageRequest,
    ModelReference,
    Plan,
)
from distri.core.policy import READS_LATE, ExchangeKind, Phase, Policy, PolicyTable, policy_table
from distri.core.refresh import RefreshRule
from distri.core.shape import Extent, ceil_div
from distri.core.staleness import phase_of
from distri.errors import PlanError

TEXT_TOKENS = 77
LAYERS_PER_BUCKET = 60
"""Of late exchanges in one message, unless the search finds another number better: the reference's."""
PATCHES_MOVE = (
    "split 'alternate' moves every patch at every step, so no layer can use what another rank sent: "
    "use it with --policy naive_patch"
)
SENDS_NOTHING = (Policy.LOCAL, Policy.FROZEN)


@dataclass(frozen=True)
class PlanRequest:
    """What a user asks for. `cfg_split` None means: split the guidance branches if there are ranks for it.

    latent: where it lies between steps; with one patch there is no difference.
    """

    image: ImageRequest
    num_ranks: int
    cfg_split: bool | None = None
    policy: PolicyTable = field(default_factory=lambda: policy_table("corrected"))
    warmup_steps: int = 5
    axis: SplitAxis = SplitAxis.ROWS
    weights: tuple[Fraction, ...] | None = None
    grid: tuple[int, int] | None = None
    dtype: str = "float16"
    layers_per_bucket: int = LAYERS_PER_BUCKET
    pattern: str = "neighbours"
    refresh: RefreshRule | None = None
    latent: LatentPlace = LatentPlace.WHOLE


def reference_of(graph: LayerGraph) -> ModelReference:
    """The reference that binds a plan to a graph."""
    alignment, layer = graph.alignment
    return ModelReference(
        graph.name, graph.fingerprint, graph.latent_channels, graph.vae_factor, alignment, layer
    )


def make_plan(request: PlanRequest, graph: LayerGraph) -> Plan:
    """The plan for exactly this request.

    Raises:
        PartitionError: the image does not split this way.
        PlanError: steps, ranks or warm-up do not make sense.
    """
    model = reference_of(graph)
    mesh = choose_mesh(request)
    rows, cols = check_image_size(request.image.height, request.image.width, model.grain)
    partition = make_partition(
        rows, cols, mesh.patch, request.axis, model.grain, request.weights, request.grid
    )
    warmup = check_warmup(request, mesh)
    draft = Plan(
        SCHEMA_VERSION, model, request.image, request.dtype, mesh, partition, warmup, request.refresh,
        request.policy, request.pattern, latent_layers(graph), (), (), (), (),
    )  # fmt: skip
    if request.latent is LatentPlace.PATCH and mesh.patch > 1:
        draft = _with_latent_on_patch(draft, graph)
    exchanges = _bucketed(list_exchanges(draft, graph), request.layers_per_bucket)
    full = dataclasses.replace(draft, exchanges=exchanges)
    for obstacle in obstacles(full):
        raise PlanError(obstacle)
    if moves_what_is_kept(full):
        raise PlanError(PATCHES_MOVE)
    return sealed(full, graph)


def _with_latent_on_patch(draft: Plan, graph: LayerGraph) -> Plan:
    """`draft` for a latent that stays on its patch; where no layer is attached, none reads beyond its patch."""
    is_attached = dataclasses.replace(draft, exchanges=list_exchanges(draft, graph)).is_attached
    table = table_on_patch(draft.policy, latent_layers(graph) if is_attached else ())
    return dataclasses.replace(draft, policy=table, latent_layers=())


def moves_what_is_kept(plan: Plan) -> bool:
    """Whether patches move from step to step although their layers exchange values, which then lie elsewhere."""
    return bool(plan.partition.turned) and plan.is_attached


def sealed(plan: Plan, graph: LayerGraph) -> Plan:
    """`plan` with its derived figures and its hash filled in."""
    elements, sizes = received_per_step(plan)
    filled = dataclasses.replace(
        plan,
        macs_per_device=macs_per_device(plan, graph),
        elements_received_per_step=elements,
        bytes_received_per_step=sizes,
    )
    return dataclasses.replace(filled, hash=plan_hash(filled))


def received_per_step(plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements and bytes that each rank receives at one step of the steady phase."""
    moving = [e for e in plan.exchanges if is_sent(e)]
    places = [plan.mesh.patch_of(rank) for rank in range(plan.mesh.size)]
    elements = tuple(sum(e.elements_received[place] for e in moving) for place in places)
    sizes = tuple(sum(e.bytes_received[place] for e in moving) for place in places)
    return elements, sizes


def is_sent(exchange: Exchange) -> bool:
    """Whether it sends anything in the steady phase; what a local output sends is in its figures."""
    return exchange.kind is ExchangeKind.OUTPUT or exchange.steady not in SENDS_NOTHING


def plan_hash(plan: Plan) -> str:
    """SHA-256 of the plan's canonical JSON without the hash itself: 64 hexadecimal digits."""
    body = to_jsonable(dataclasses.replace(plan, hash=""))
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def to_jsonable(value: Any) -> Any:
    """Plain JSON values of nested frozen dataclasses, tuples, enums and fractions."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_jsonable(item) for item in value]
    return value


def choose_mesh(request: PlanRequest) -> Mesh:
    """Guidance branches first, if allowed and possible; patches take the rest.

    Raises:
        PlanError: the number of ranks is not positive, or cannot be split as asked.
    """
    ranks = request.num_ranks
    if ranks < 1:
        raise PlanError(f"at least 1 device is needed, not {ranks}")
    possible = request.image.guidance and ranks % 2 == 0
    if request.cfg_split and not possible:
        why = "guidance is off" if not request.image.guidance else f"{ranks} devices are not an even number"
        raise PlanError(
            f"the guidance branches cannot be split over {ranks} devices: {why}; use --cfg-split off"
        )
    if request.cfg_split or (request.cfg_split is None and possible):
        return Mesh(cfg=2, patch=ranks // 2)
    return Mesh(cfg=1, patch=ranks)


def check_warmup(request: PlanRequest, mesh: Mesh) -> int:
    """The number of warm-up steps, at most the number of steps.

    Raises:
        PlanError: steps or warm-up are out of range, or a displaced policy has no step to start from.
    """
    steps = request.image.num_inference_steps
    if steps < 1:
        raise PlanError(f"at least 1 denoising step is needed, not {steps}")
    if request.warmup_steps < 0:
        raise PlanError(f"the number of warm-up steps cannot be negative: {request.warmup_steps}")
    late = any(rule.policy in (*READS_LATE, Policy.FROZEN) for rule in request.policy.rules)
    if late and mesh.patch > 1 and request.warmup_steps < 1:
        raise PlanError(
            f"policy {request.policy.name!r} reads the previous step, which step 0 does not have; "
            "use --warmup-steps 1 or more"
        )
    if request.refresh is not None and any(rule.reach is not None for rule in request.policy.rules):
        raise PlanError("a refresh rule and a policy whose far context rests cannot be combined; choose one")
    if request.refresh is not None and any(rule.policy is Policy.FROZEN for rule in request.policy.rules):
        raise PlanError(
            f"policy {request.policy.name!r} sends nothing after warm-up, so it cannot be refreshed"
        )
    if request.refresh is not None and _loses_changes(request.policy):
        raise PlanError(
            f"policy {request.policy.name!r} sends changes, and warm-up reads nothing of some layers: at a refresh a "
            "change would be lost; use a codec that sends values, or a warm-up that is fresh"
        )
    return min(request.warmup_steps, steps)


def _loses_changes(table: PolicyTable) -> bool:
    coded = {rule.kind for rule in table.rules if rule.codec.is_residual}
    return any(
        rule.phase is Phase.WARMUP and rule.policy is Policy.LOCAL and rule.kind in coded
        for rule in table.rules
    )


def latent_layers(graph: LayerGraph) -> tuple[str, ...]:
    """The convolutions that read the latent itself."""
    return tuple(op.path for op in graph if op.reads_neighbours and not op.parents)


def list_exchanges(plan: Plan, graph: LayerGraph) -> tuple[Exchange, ...]:
    """Every exchange of one forward pass, in execution order, the gather of the output last."""
    found = []
    if plan.mesh.patch > 1:
        found = [_exchange(plan, operation) for operation in _exchanging(plan, graph)]
    rows, cols = plan.latent.rows.size, plan.latent.cols.size
    shape = (plan.batch_per_rank, plan.model.latent_channels, rows, cols)
    found.append(_make_exchange(plan, len(graph), "output", ExchangeKind.OUTPUT, shape, 1, None, plan.dtype))
    return tuple(found)


def _exchanging(plan: Plan, graph: LayerGraph) -> tuple[Operation, ...]:
    """The operations that need an exchange; those that read the latent do where no rank has the whole of it."""
    if not plan.keeps_latent_on_patch:
        return graph.exchanging
    return tuple(operation for operation in graph if operation.exchange or operation.reads_neighbours)


def _exchange(plan: Plan, operation: Operation) -> Exchange:
    kind = operation.exchange or ExchangeKind.HALO
    whole = Extent(plan.batch_per_rank, TEXT_TOKENS, plan.latent)
    level = operation.level or 1
    shape = whole.shape(operation.inputs[0])
    if kind is ExchangeKind.MOMENTS:
        return _make_exchange(
            plan,
            operation.index,
            operation.path,
            kind,
            (shape[0], operation.groups, NUM_MOMENTS),
            level,
            None,
            "float32",
        )
    if kind is ExchangeKind.CONTEXT:
        batch, tokens, channels = whole.shape(operation.inputs[1])
        shape = (tokens, batch, 2 * channels)
        level = _token_level(operation)
    return _make_exchange(
        plan, operation.index, operation.path, kind, shape, level, operation.geometry, plan.dtype
    )


def _token_level(operation: Operation) -> int:
    assert operation.level is not None, f"{operation.path} attends to tokens that are not the image's"
    return operation.level


def _make_exchange(
    plan: Plan,
    index: int,
    layer: str,
    kind: ExchangeKind,
    shape: tuple[int, ...],
    level: int,
    geometry: ConvGeometry | None,
    dtype: str,
) -> Exchange:
    """One exchange with the figures that follow from its geometry."""
    warmup, steady = (plan.policy.rule(kind, phase, layer) for phase in (Phase.WARMUP, Phase.STEADY))
    empty = Exchange(
        index,
        layer,
        kind,
        warmup.policy,
        steady.policy,
        steady.codec,
        steady.reach,
        dtype,
        shape,
        level,
        geometry,
        (),
        (),
        (),
        None,
    )
    peers, elements, sizes = reception(plan, empty)
    return dataclasses.replace(empty, peers=peers, elements_received=elements, bytes_received=sizes)


def reception(
    plan: Plan, exchange: Exchange
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...], tuple[int, ...]]:
    """What each patch receives for one exchange in a steady step: from which patches, how many elements and bytes.

    Messages that do not travel every step count with their share of a step, rounded up.
    """
    if exchange.stays_on_patch:
        return _reception_of_partner(plan, exchange)
    parts = plan.mesh.patch
    sources: list[list[int]] = [[] for _ in range(parts)]
    elements, sizes = [0] * parts, [0] * parts
    turns = plan.partition.turns
    for message in (message for patches in turns for message in traffic.messages_of(exchange, patches)):
        sources[message.reader].append(message.source)
        period = traffic.steps_between(exchange, message) * len(turns)
        elements[message.reader] += ceil_div(message.elements, period)
        sizes[message.reader] += ceil_div(traffic.message_bytes(exchange, message), period)
    if exchange.kind is ExchangeKind.OUTPUT and plan.mesh.cfg == 2:
        whole = exchange.shape[0] * exchange.shape[1] * plan.latent.area
        elements = [count + whole for count in elements]
        sizes = [size + whole * DTYPE_BYTES[exchange.dtype] for size in sizes]
    return tuple(tuple(dict.fromkeys(found)) for found in sources), tuple(elements), tuple(sizes)


def _reception_of_partner(
    plan: Plan, output: Exchange
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...], tuple[int, ...]]:
    """What each patch receives of a local output: the same patch of the other guidance branch, if there is one."""
    depth = output.shape[0] * output.shape[1] * (plan.mesh.cfg - 1)
    elements = tuple(depth * patch.area for patch in plan.partition.patches)
    size = DTYPE_BYTES[output.dtype]
    return ((),) * plan.mesh.patch, elements, tuple(count * size for count in elements)


def _bucketed(exchanges: tuple[Exchange, ...], layers_per_bucket: int) -> tuple[Exchange, ...]:
    """Put the exchanges that are read one step later into buckets of `layers_per_bucket`, in execution order."""
    placed, late = [], 0
    for exchange in exchanges:
        if exchange.steady in READS_LATE:
            exchange = dataclasses.replace(exchange, bucket=late // layers_per_bucket)
            late += 1
        placed.append(exchange)
    return tuple(placed)


def macs_per_device(plan: Plan, graph: LayerGraph) -> tuple[int, ...]:
    """Multiply-accumulates of the whole run, one entry a rank, as the attached layers execute them.

    Where layers are attached, self-attention reads the whole picture's keys and the text's keys and values are
    projected once per image. Where none are attached (one patch, or all `local`), the unmodified model runs.
    """
    steps = plan.image.num_inference_steps
    once = sum(op.macs(plan.extent(0)) for op in graph if op.depends_on_text_only) if plan.is_attached else 0
    whole = Extent(plan.batch_per_rank, TEXT_TOKENS, plan.latent)
    per_patch = []
    for patch in range(plan.mesh.patch):
        kinds = Counter(
            (plan.extent(patch, step=step), phase_of(step, plan.warmup_steps)) for step in range(steps)
        )
        total = sum(
            count * _step_macs(plan, graph, own, whole, phase) for (own, phase), count in kinds.items()
        )
        per_patch.append(total - (steps - 1) * once)
    return tuple(per_patch[plan.mesh.patch_of(rank)] for rank in range(plan.mesh.size))


def _step_macs(plan: Plan, graph: LayerGraph, own: Extent, whole: Extent, phase: Phase) -> int:
    if plan.mesh.patch == 1:
        return graph.macs(own)
    policies = {e.layer: e.policy(phase) for e in plan.exchanges if e.kind is ExchangeKind.CONTEXT}
    return sum(
        operation.macs(own, own if policies.get(operation.path) is Policy.LOCAL else whole)
        if operation.exchange is ExchangeKind.CONTEXT
        else operation.macs(own)
        for operation in graph
    )
