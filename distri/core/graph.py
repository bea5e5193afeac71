"""The layer graph: the denoiser's operations in execution order, with shapes, MACs, bytes and the exchange each needs.

A graph is captured once per model and serves every image size, because its shapes are symbolic (`distri.core.shape`).
Edges are tensors: from the operation that made one to the operation that reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distri.core.ops import conv2d, cross_attention, pointwise, self_attention
from distri.core.ops.conv2d import ConvGeometry
from distri.core.policy import ExchangeKind
from distri.core.shape import Dim, Extent, SymbolicShape, level_of
from distri.errors import ModelError

if TYPE_CHECKING:
    import networkx as nx

GRAPH_SCHEMA = 1


class OperationKind(str, Enum):
    """What an operation is, by its arithmetic."""

    CONVOLUTION = "convolution"
    LINEAR = "linear"
    GROUP_NORM = "group_norm"
    LAYER_NORM = "layer_norm"
    SELF_ATTENTION = "self_attention"
    CROSS_ATTENTION = "cross_attention"
    ELEMENTWISE = "elementwise"
    RESAMPLE = "resample"
    CONCAT = "concat"


@dataclass(frozen=True)
class Operation:
    """One operation. `inputs` are its activations (for attention: query, key, value), not its weights.

    `path` is the module that runs it, as in `named_modules()`; several operations may share one.
    """

    index: int
    path: str
    kind: OperationKind
    inputs: tuple[SymbolicShape, ...]
    output: SymbolicShape
    parents: tuple[int, ...] = ()
    weight_elements: int = 0
    geometry: ConvGeometry | None = None
    groups: int = 1
    function: str = ""

    @property
    def level(self) -> int | None:
        """Level of the first input; None if it does not depend on the image."""
        return level_of(self.inputs[0]) if self.inputs else level_of(self.output)

    @property
    def output_level(self) -> int | None:
        """Level of the output; None if it does not depend on the image."""
        return level_of(self.output)

    @property
    def depends_on_text_only(self) -> bool:
        """Whether it maps text tokens only, so that its result is the same at every step of an image."""
        return "T" in self.output and level_of(self.output) is None

    @property
    def exchange(self) -> ExchangeKind | None:
        """The exchange it needs when the image is split."""
        if self.kind is OperationKind.GROUP_NORM and self.level is not None:
            return ExchangeKind.MOMENTS
        if self.kind is OperationKind.SELF_ATTENTION:
            return ExchangeKind.CONTEXT
        if self.reads_neighbours and self.parents:
            return ExchangeKind.HALO
        return None

    @property
    def reads_neighbours(self) -> bool:
        """Whether it is a convolution that reads other positions than its own.

        One without parents reads the latent itself: it needs no exchange where every rank has the whole latent.
        """
        return self.geometry is not None and not self.geometry.is_pointwise

    def macs(self, own: Extent, context: Extent | None = None) -> int:
        """Multiply-accumulates for the patch `own`; self-attention reads the keys of `context` (default: its own)."""
        shape = own.shape(self.output)
        if self.kind is OperationKind.CONVOLUTION:
            assert self.geometry is not None
            return conv2d.macs(shape, own.dim(self.inputs[0][1]) // self.groups, self.geometry.kernel)
        if self.kind is OperationKind.LINEAR:
            return pointwise.linear_macs(shape, own.dim(self.inputs[0][-1]))
        if self.kind in (OperationKind.SELF_ATTENTION, OperationKind.CROSS_ATTENTION):
            batch, queries, channels = own.shape(self.inputs[0])
            keys = (context or own).dim(self.inputs[1][1])
            if self.kind is OperationKind.SELF_ATTENTION:
                return self_attention.macs(batch, queries, keys, channels)
            return cross_attention.macs(batch, queries, keys, channels)
        return 0

    def activation_bytes(self, extent: Extent, element_bytes: int) -> int:
        """Bytes of the output."""
        return extent.elements(self.output) * element_bytes

    def weight_bytes(self, element_bytes: int) -> int:
        """Bytes of the parameters that it reads."""
        return self.weight_elements * element_bytes


@dataclass(frozen=True)
class LayerGraph:
    """All operations of one forward pass of a denoiser, in execution order."""

    name: str
    operations: tuple[Operation, ...]
    latent_channels: int
    text_width: int
    vae_factor: int = 8

    def __iter__(self) -> Iterator[Operation]:
        return iter(self.operations)

    def __len__(self) -> int:
        return len(self.operations)

    @cached_property
    def network(self) -> nx.DiGraph[int]:
        """The networkx DAG; node `i` carries `operation`, the i-th in execution order."""
        import networkx as nx  # here, because a plan is made without it and it takes long to import

        dag: nx.DiGraph[int] = nx.DiGraph(name=self.name)
        for operation in self.operations:
            dag.add_node(operation.index, operation=operation)
            dag.add_edges_from((parent, operation.index) for parent in operation.parents)
        return dag

    @cached_property
    def exchanging(self) -> tuple[Operation, ...]:
        """The operations that need an exchange, in execution order."""
        return tuple(operation for operation in self.operations if operation.exchange)

    @cached_property
    def alignment(self) -> tuple[int, str]:
        """The deepest level and the first layer at it: what borders of patches must be multiples of."""
        deepest, layer = 1, "the latent"
        for operation in self.operations:
            level = operation.output_level
            if level is not None and level > deepest:
                deepest, layer = level, operation.path
        return deepest, layer

    def macs(self, own: Extent, context: Extent | None = None) -> int:
        """Multiply-accumulates of one forward pass over the patch `own`."""
        return sum(operation.macs(own, context) for operation in self.operations)

    @cached_property
    def weight_elements(self) -> int:
        """Parameters of the denoiser."""
        return sum(operation.weight_elements for operation in self.operations)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that a plan depends on: 16 hexadecimal digits."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` is its inverse."""
        return {
            "schema": GRAPH_SCHEMA,
            "name": self.name,
            "latent_channels": self.latent_channels,
            "text_width": self.text_width,
            "vae_factor": self.vae_factor,
            "operations": [_operation_to_dict(operation) for operation in self.operations],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> LayerGraph:
        """Rebuild a graph.

        Raises:
            ModelError: the data is not a layer graph of this schema.
        """
        if data.get("schema") != GRAPH_SCHEMA:
            raise ModelError(
                f"a layer graph of schema {GRAPH_SCHEMA} is required, not {data.get('schema')!r}"
            )
        try:
            operations = tuple(
                _operation_from_dict(index, item) for index, item in enumerate(data["operations"])
            )
            return LayerGraph(
                data["name"], operations, data["latent_channels"], data["text_width"], data["vae_factor"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"malformed layer graph: {error!r}") from error


def _operation_to_dict(operation: Operation) -> dict[str, Any]:
    item: dict[str, Any] = {
        "path": operation.path,
        "kind": operation.kind.value,
        "in": [list(shape) for shape in operation.inputs],
        "out": list(operation.output),
        "parents": list(operation.parents),
    }
    if operation.weight_elements:
        item["weights"] = operation.weight_elements
    if operation.function:
        item["function"] = operation.function
    if operation.geometry:
        geometry = operation.geometry
        item["conv"] = [*geometry.kernel, *geometry.stride, *geometry.padding, *geometry.dilation]
    if operation.groups != 1:
        item["groups"] = operation.groups
    return item


def _operation_from_dict(index: int, item: Mapping[str, Any]) -> Operation:
    conv = item.get("conv")
    return Operation(
        index=index,
        path=item["path"],
        kind=OperationKind(item["kind"]),
        inputs=tuple(_shape(shape) for shape in item["in"]),
        output=_shape(item["out"]),
        parents=tuple(item["parents"]),
        weight_elements=item.get("weights", 0),
        geometry=ConvGeometry(*(tuple(conv[i : i + 2]) for i in range(0, 8, 2))) if conv else None,
        groups=item.get("groups", 1),
        function=item.get("function", ""),
    )


def _shape(dims: list[Dim]) -> SymbolicShape:
    return tuple(dims)
