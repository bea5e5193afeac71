"""What one operation of the layer graph launches on a device: its own kernels, and what being split adds to them.

Three ways to run a layer. `NATIVE` is the unmodified model. `ATTACHED` is distri's own layers: a convolution pads its
patch and copies its halo in, a GroupNorm takes moments in fp32 and merges them, a self-attention joins keys and values
and puts its own into the picture's. `REFERENCE` is the published implementation (DistriFusion, section 4 and its
public code): a convolution concatenates halo and patch, GroupNorm is written out in elementary operations, the
context is concatenated at every step, keys and values are projected together.

Element-wise operations, bias-free residuals and layout changes are kernels of their own, as in eager PyTorch; the
text's keys and values are projected once per image where layers are attached. Activations are channels-first, so a
convolution on tensor cores is surrounded by two layout changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Final

from distri.core.graph import LayerGraph, Operation, OperationKind
from distri.core.plan import DTYPE_BYTES
from distri.core.policy import ExchangeKind, Policy
from distri.core.shape import Extent
from distri.simulator.compute import KernelKind, OperationShape
from distri.simulator.hardware import Word

HEAD_SIZE: Final = 64
"""Channels of one attention head, where the graph does not say: that of every published SD-XL, SD 2 and Flux model."""
_REFERENCE_NORM_PASSES: Final = 7
_ATTACHED_NORM_SMALL: Final = 34
"""Kernels on moments alone, in distri's GroupNorm: stacking, two mergers, scale and shift."""
_CARRIED_NORM_SMALL: Final = 44
"""What carrying forward the moments of both sides adds to them."""


class Layers(Word):
    """Whose layers run."""

    NATIVE = "native"
    ATTACHED = "attached"
    REFERENCE = "reference"


class Service(Word):
    """How an exchange is served, as far as the kernels around it differ.

    `SUMMED` is fresh by an all-reduce: the reference's GroupNorm, where it never reads stale moments. `KEPT` is a
    value of the warm-up: there the reference runs the plain GroupNorm. `CODED` values are quantised and rebuilt,
    those `AHEAD` are carried forward from the last three versions.
    """

    NONE = "none"
    FRESH = "fresh"
    SUMMED = "summed"
    LATE = "late"
    CODED = "coded"
    AHEAD = "ahead"
    CODED_AHEAD = "coded ahead"
    KEPT = "kept"


_SERVICES: Final = {
    Policy.FRESH: Service.FRESH,
    Policy.STALE: Service.LATE,
    Policy.CORRECTED: Service.LATE,
    Policy.SHIFTED: Service.LATE,
    Policy.EXTRAPOLATED: Service.AHEAD,
    Policy.FROZEN: Service.KEPT,
    Policy.LOCAL: Service.NONE,
}
_CODED: Final = {Service.LATE: Service.CODED, Service.AHEAD: Service.CODED_AHEAD}


def service_of(policy: Policy, is_coded: bool) -> Service:
    """How an exchange of this policy is served, with or without a codec."""
    service = _SERVICES[policy]
    return _CODED.get(service, service) if is_coded else service


@dataclass(frozen=True)
class Shard:
    """One rank's share: its extent, the whole picture's, and its place in the line of patches."""

    own: Extent
    whole: Extent
    num_patches: int = 1
    is_edge: bool = False


def head_size(channels: int) -> int:
    """The size of a head of an attention with so many channels."""
    return HEAD_SIZE if channels % HEAD_SIZE == 0 else channels


class KernelList:
    """The kernels of a graph's operations in one dtype."""

    def __init__(self, graph: LayerGraph, dtype: str) -> None:
        self._graph = graph
        self._dtype = dtype
        self._size = DTYPE_BYTES[dtype]
        self._joined: dict[int, int] = {}
        """Projections that the reference joins: 2 for the keys of a pair, 0 for its values."""
        for operation in graph:
            if operation.kind is OperationKind.SELF_ATTENTION and len(operation.parents) == 3:
                self._joined.update({operation.parents[1]: 2, operation.parents[2]: 0})

    def of(
        self, operation: Operation, shard: Shard, layers: Layers, service: Service
    ) -> tuple[OperationShape, ...]:
        """The kernels of one operation, in order."""
        is_split = layers is not Layers.NATIVE and service is not Service.NONE
        return (
            *self._layout(operation, shard.own),
            *(self._around(operation, shard, layers, service) if is_split else ()),
            *self._own(operation, shard, layers, is_split, service),
        )

    def _layout(self, operation: Operation, own: Extent) -> Iterator[OperationShape]:
        """Between (B, C, H, W) and (B, HW, C): a copy."""
        wanted = operation.inputs[0] if operation.kind is OperationKind.LINEAR else operation.output
        if operation.kind not in (OperationKind.LINEAR, OperationKind.ELEMENTWISE) or operation.level is None:
            return
        for parent in operation.parents:
            made = self._graph.operations[parent]
            if made.output_level is not None and {len(made.output), len(wanted)} == {3, 4}:
                moved = own.elements(made.output)
                yield self._copy(moved)
                return

    def _own(
        self, operation: Operation, shard: Shard, layers: Layers, is_split: bool, service: Service
    ) -> Iterator[OperationShape]:
        own = shard.own
        out = own.shape(operation.output)
        read = sum(own.elements(shape) for shape in operation.inputs)
        match operation.kind:
            case OperationKind.LINEAR:
                yield from self._linear(operation, out, own.dim(operation.inputs[0][-1]), layers)
            case OperationKind.CONVOLUTION:
                yield from self._convolution(operation, own, out)
            case OperationKind.GROUP_NORM:
                if not is_split or (layers is Layers.REFERENCE and service is Service.KEPT):
                    yield self._stream(KernelKind.NORM, 2 * read, prod(out), 3)
            case OperationKind.LAYER_NORM:
                yield self._stream(KernelKind.NORM, read, prod(out))
            case OperationKind.SELF_ATTENTION | OperationKind.CROSS_ATTENTION:
                keys_of = shard.whole if is_split else own
                yield self.attention(own.shape(operation.inputs[0]), keys_of.dim(operation.inputs[1][1]))
            case OperationKind.CONCAT:
                yield self._stream(KernelKind.CONCAT, read, prod(out))
            case OperationKind.RESAMPLE:
                yield self._stream(KernelKind.RESAMPLE, read, prod(out))
            case _:
                yield self._stream(KernelKind.ELEMENTWISE, read, prod(out))

    def _linear(
        self, operation: Operation, out: tuple[int, ...], k: int, layers: Layers
    ) -> Iterator[OperationShape]:
        width = self._joined.get(operation.index, 1) if layers is Layers.REFERENCE else 1
        if width:
            yield self.product(KernelKind.LINEAR, prod(out[:-1]), out[-1] * width, k)

    def _convolution(
        self, operation: Operation, own: Extent, out: tuple[int, ...]
    ) -> Iterator[OperationShape]:
        assert operation.geometry is not None
        yield self._copy(own.elements(operation.inputs[0]))
        yield self._copy(prod(out))
        k = own.dim(operation.inputs[0][1]) // operation.groups * prod(operation.geometry.kernel)
        yield self.product(
            KernelKind.CONVOLUTION, out[0] * out[2] * out[3], out[1], k, own.elements(operation.inputs[0])
        )

    def _around(
        self, operation: Operation, shard: Shard, layers: Layers, service: Service
    ) -> Iterator[OperationShape]:
        """What an exchange adds on the device: packing, assembling, merging."""
        elements = shard.own.elements(operation.inputs[0])
        match operation.exchange:
            case ExchangeKind.HALO:
                yield from self._halo(operation, shard, layers, service, elements)
            case ExchangeKind.MOMENTS:
                if layers is Layers.REFERENCE and service is not Service.KEPT:
                    yield self._stream(
                        KernelKind.ELEMENTWISE, 7 * elements, 5 * elements, _REFERENCE_NORM_PASSES
                    )
                    yield self._tiny(_reference_norm_small(service, shard.num_patches))
                elif layers is Layers.ATTACHED:
                    yield self._stream(KernelKind.ELEMENTWISE, 8 * elements, 7 * elements, 5)
                    carried = _CARRIED_NORM_SMALL if service is Service.AHEAD else 0
                    yield self._tiny(_ATTACHED_NORM_SMALL + carried)
            case ExchangeKind.CONTEXT:
                own_context = 2 * shard.own.elements(operation.inputs[1])
                context = 2 * shard.whole.elements(operation.inputs[1])
                if layers is Layers.REFERENCE:
                    yield self._copy(context)
                    if service is not Service.FRESH:
                        yield self._copy(own_context)
                else:
                    yield self._stream(KernelKind.ELEMENTWISE, 3 * own_context, 3 * own_context, 3)
                    yield from self._rebuilt(service, own_context, context, shard.num_patches)

    def _rebuilt(
        self, service: Service, sent: int, received: int, num_parts: int
    ) -> Iterator[OperationShape]:
        """Quantising what is sent; decoding, adding up and joining what was received; carrying it forward."""
        if service in (Service.CODED, Service.CODED_AHEAD):
            yield self._stream(KernelKind.ELEMENTWISE, 8 * sent, 6 * sent, 8)
            yield self._stream(KernelKind.ELEMENTWISE, 5 * received, 5 * received, 5 * num_parts)
        if service in (Service.AHEAD, Service.CODED_AHEAD):
            yield self._stream(KernelKind.ELEMENTWISE, 11 * received, 6 * received, 6 * num_parts)
        if service in (Service.CODED, Service.AHEAD, Service.CODED_AHEAD):
            yield self._copy(received)

    def _halo(
        self, operation: Operation, shard: Shard, layers: Layers, service: Service, elements: int
    ) -> Iterator[OperationShape]:
        yield self._copy(elements)
        if layers is Layers.ATTACHED:
            yield self._tiny(4)
            edges = 2 * elements // max(1, shard.own.rect.rows.size)
            yield from self._rebuilt(service, edges, edges, 2)
            return
        yield self._tiny(1 if service is Service.FRESH else 2)
        if shard.is_edge:
            yield self._stream(KernelKind.ELEMENTWISE, elements, elements, 2)

    def product(self, kind: KernelKind, m: int, n: int, k: int, read: int | None = None) -> OperationShape:
        """A matrix product; `read` are the activations' elements if they are not m times k."""
        activations = m * k if read is None else read
        return OperationShape(
            kind, m, n, k, 1, (activations + n * k) * self._size, m * n * self._size, self._dtype
        )

    def attention(self, queries: tuple[int, ...], keys: int) -> OperationShape:
        """Fused attention of queries of shape (batch, tokens, channels)."""
        batch, tokens, channels = queries
        size = head_size(channels)
        read = batch * channels * (tokens + 2 * keys) * self._size
        written = batch * channels * tokens * self._size
        return OperationShape(
            KernelKind.ATTENTION, tokens, size, keys, batch * channels // size, read, written, self._dtype
        )

    def _copy(self, elements: int) -> OperationShape:
        return self._stream(KernelKind.ELEMENTWISE, elements, elements)

    def _tiny(self, count: int) -> OperationShape:
        return self._stream(KernelKind.ELEMENTWISE, 0, 0, count)

    def _stream(self, kind: KernelKind, read: int, written: int, count: int = 1) -> OperationShape:
        return OperationShape(kind, 1, 1, 1, 1, read * self._size, written * self._size, self._dtype, count)


def _reference_norm_small(service: Service, num_patches: int) -> int:
    """Kernels on moments alone in the reference's GroupNorm: it adds the patches' moments up one by one."""
    return {Service.SUMMED: 7, Service.FRESH: 11 + num_patches}.get(service, 14 + num_patches)
