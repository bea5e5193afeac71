"""What a run needs in each device's memory, and which layer is at the peak.

Activations by liveness: an operation's output lives until its last reader has run. On top of it, at each operation,
what its kernels take for a moment (copies of other layouts, a padded patch, moments in fp32). Stale values are held
twice (the version that is read and the one that arrives); the published implementation holds one. Communication
buffers and what driver and libraries keep are figures of the hardware file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from distri.core.buffers import DEPTH
from distri.core.codec import Codec
from distri.core.graph import LayerGraph, OperationKind
from distri.core.plan import DTYPE_BYTES, Plan
from distri.core.policy import ExchangeKind, Phase, Policy
from distri.core.shape import Extent
from distri.core.staleness import EXTRAPOLATED_VERSIONS
from distri.simulator.hardware import Cluster
from distri.simulator.kernels import Layers
from distri.simulator.lowering import GATHER_ALL, TEXT_TOKENS, layers_of
from distri.simulator.tensor_parallel import Split, TensorSplit

WORKSPACE_BYTES: Final = 64 * 2**20
"""What GEMM and convolution libraries take for themselves (assumed: twice cuBLAS's 32 MiB)."""
_FP32_BYTES: Final = 4


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one rank's device. `peak_layer` is where activations are largest; `limit` the device's memory."""

    weights: int
    activations: int
    stale_values: int
    workspace: int
    communication: int
    reserved: int
    limit: int
    peak_layer: str

    @classmethod
    def on(
        cls,
        cluster: Cluster,
        rank: int,
        weights: int,
        activations: int,
        stale_values: int,
        communication: int,
        peak_layer: str,
    ) -> MemoryUse:
        """With what the libraries, the driver and the device of a rank add."""
        device = cluster.model_of(rank)
        reserved, limit = int(device.reserved_bytes.value), int(device.memory_bytes.value)
        return cls(
            weights, activations, stale_values, WORKSPACE_BYTES, communication, reserved, limit, peak_layer
        )

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.weights
            + self.activations
            + self.stale_values
            + self.workspace
            + self.communication
            + self.reserved
        )

    @property
    def fits(self) -> bool:
        """Whether the device has room for it."""
        return self.total <= self.limit

    def __str__(self) -> str:
        verdict = "fits" if self.fits else f"exceeds the device by {(self.total - self.limit) / 1e9:.2f} GB"
        return (
            f"{self.total / 1e9:.2f} of {self.limit / 1e9:.2f} GB: {verdict}; "
            f"activations peak at {self.peak_layer} ({self.activations / 1e9:.2f} GB)"
        )


def memory_of(
    plan: Plan, graph: LayerGraph, cluster: Cluster, is_tensor_parallel: bool = False
) -> tuple[MemoryUse, ...]:
    """The memory of each rank."""
    size = DTYPE_BYTES[plan.dtype]
    split = TensorSplit(graph, plan.mesh.patch) if is_tensor_parallel else None
    weights = _weights(graph, split) * size
    communication = buffer_bytes(cluster, plan.mesh.size)
    known: dict[int, tuple[int, str, int]] = {}
    uses = []
    for rank in range(plan.mesh.size):
        patch = plan.mesh.patch_of(rank)
        if patch not in known:
            whole = Extent(plan.batch_per_rank, TEXT_TOKENS, plan.latent)
            seen = [whole] if split else [turn.extent(patch) for turn in plan.turns]
            activations, layer = max(peak_activations(plan, graph, own, split) for own in seen)
            known[patch] = (activations, layer, 0 if split else stale_bytes(plan, graph, patch))
        activations, layer, stale = known[patch]
        uses.append(MemoryUse.on(cluster, rank, weights, activations, stale, communication, layer))
    return tuple(uses)


def _weights(graph: LayerGraph, split: TensorSplit | None) -> int:
    if split is None:
        return graph.weight_elements
    whole = (Split.WHOLE,)
    return sum(
        op.weight_elements if split.of[op.index] in whole else -(-op.weight_elements // split.parts)
        for op in graph
    )


def peak_activations(
    plan: Plan, graph: LayerGraph, own: Extent, split: TensorSplit | None = None
) -> tuple[int, str]:
    """The largest number of bytes of activations that live at one operation, and that operation's layer."""
    held = activations_at(plan, graph, own, split)
    peak = max(range(len(held)), key=lambda index: (held[index], -index))
    return held[peak], graph.operations[peak].path


def activations_at(
    plan: Plan, graph: LayerGraph, own: Extent, split: TensorSplit | None = None
) -> tuple[int, ...]:
    """Bytes of activations that live while each operation runs."""
    size = DTYPE_BYTES[plan.dtype]
    outputs = [own.elements(operation.output) * size for operation in graph]
    if split is not None:
        for operation in graph:
            if split.of[operation.index] in (Split.COLUMNS, Split.CHANNELS):
                outputs[operation.index] //= split.parts
    last_reader = list(range(len(graph)))
    for operation in graph:
        for parent in operation.parents:
            last_reader[parent] = operation.index
    freed: list[list[int]] = [[] for _ in range(len(graph))]
    for index, reader in enumerate(last_reader):
        freed[reader].append(index)
    layers = Layers.NATIVE if split else layers_of(plan)
    living = 0
    held = []
    for operation in graph:
        living += outputs[operation.index]
        held.append(living + _passing(graph, operation.index, own, layers, size, plan))
        living -= sum(outputs[index] for index in freed[operation.index])
    return tuple(held)


def held_at(plan: Plan, graph: LayerGraph, cluster: Cluster) -> dict[int, tuple[int, ...]]:
    """By rank: all bytes that are held while each operation runs."""
    found = {}
    by_patch: dict[int, tuple[int, ...]] = {}
    for rank, use in enumerate(memory_of(plan, graph, cluster)):
        patch = plan.mesh.patch_of(rank)
        if patch not in by_patch:
            turns = [activations_at(plan, graph, turn.extent(patch)) for turn in plan.turns]
            by_patch[patch] = tuple(max(living) for living in zip(*turns, strict=True))
        found[rank] = tuple(use.total - use.activations + living for living in by_patch[patch])
    return found


def _passing(graph: LayerGraph, index: int, own: Extent, layers: Layers, size: int, plan: Plan) -> int:
    """Bytes that an operation's kernels take while they run, beside inputs and output."""
    operation = graph.operations[index]
    read = own.elements(operation.inputs[0]) * size if operation.inputs else 0
    match operation.kind:
        case OperationKind.CONVOLUTION:
            written = own.elements(operation.output) * size
            return read + written + (read if layers is not Layers.NATIVE else 0)
        case OperationKind.GROUP_NORM if layers is Layers.ATTACHED:
            return 2 * read * _FP32_BYTES // size
        case OperationKind.GROUP_NORM if layers is Layers.REFERENCE:
            return 2 * read
        case OperationKind.SELF_ATTENTION if layers is not Layers.NATIVE:
            whole = Extent(own.batch, own.text, plan.latent)
            return 2 * whole.elements(operation.inputs[1]) * size
    return 0


def stale_bytes(plan: Plan, graph: LayerGraph, patch: int) -> int:
    """Bytes of other ranks' values that a rank keeps from step to step, and of the text's projections."""
    is_reference = plan.pattern == GATHER_ALL
    total = 0
    for exchange in plan.exchanges:
        policy = exchange.policy(Phase.STEADY)
        if exchange.kind is ExchangeKind.OUTPUT or policy in (Policy.LOCAL, Policy.FRESH):
            continue
        received = exchange.bytes_received[patch]
        if is_reference and exchange.kind is not ExchangeKind.CONTEXT:
            received = max(exchange.bytes_received) * plan.mesh.patch
        elif exchange.kind is ExchangeKind.CONTEXT:
            share = plan.partition.patches[patch].at_level(exchange.level).area / exchange.shape[0]
            received = round(received / max(1e-9, 1 - share)) if share < 1 else 0
        copied = EXTRAPOLATED_VERSIONS if policy is Policy.EXTRAPOLATED else 0
        versions = 1 if policy is Policy.FROZEN else DEPTH + (copied if exchange.codec is Codec.NONE else 0)
        total += received * (1 if is_reference else versions)
        if (
            exchange.codec is not Codec.NONE
        ):  # what was rebuilt of the last versions, and the sender's own sums
            plain = exchange.elements_received[patch] * DTYPE_BYTES[exchange.dtype]
            total += max(DEPTH, copied) * plain + _FP32_BYTES * exchange.elements_received[patch] // max(
                1, plan.mesh.patch - 1
            )
    if plan.mesh.patch > 1 and plan.is_attached:
        own = plan.extent(patch)
        total += (
            sum(own.elements(op.output) for op in graph if op.depends_on_text_only) * DTYPE_BYTES[plan.dtype]
        )
    return total


def buffer_bytes(cluster: Cluster, num_ranks: int) -> int:
    """Communication buffers of the nearest group size that the hardware file has; none for a single rank."""
    table = cluster.collectives.buffer_bytes
    if num_ranks < 2 or not table:
        return 0
    nearest = min(table, key=lambda size: (abs(size - num_ranks), size))
    return int(table[nearest].value)
