"""Nanoseconds of every operation on every kind of shard, computed once and then looked up.

Plans of one model differ in where they cut and in what they wait for, rarely in the shapes of their shards: what a
shard costs is kept, so that the next plan only adds it up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from distri.core.graph import LayerGraph, Operation
from distri.core.shape import Rect
from distri.simulator.compute import AnalyticCompute, ComputeModel, LaunchMode
from distri.simulator.hardware import Cluster, DeviceModel, Tag
from distri.simulator.kernels import KernelList, Layers, Service, Shard
from distri.simulator.measured import MeasuredOperations

Nanoseconds: TypeAlias = NDArray[np.int64]
ComputeFactory: TypeAlias = Callable[[DeviceModel, LaunchMode], ComputeModel]


@dataclass(frozen=True)
class OperationTimes:
    """Device and host nanoseconds, one entry an operation."""

    device_ns: Nanoseconds
    host_ns: Nanoseconds


def to_ns(seconds: float) -> int:
    """Whole nanoseconds."""
    return round(seconds * 1e9)


class CostTable:
    """The times of one graph's operations on the devices of one cluster."""

    def __init__(
        self,
        graph: LayerGraph,
        cluster: Cluster,
        dtype: str,
        launch: LaunchMode,
        compute: ComputeFactory = AnalyticCompute,
    ) -> None:
        self.graph = graph
        self.kernels = KernelList(graph, dtype)
        self.models: dict[str, ComputeModel] = {
            name: compute(device, launch) for name, device in cluster.models.items()
        }
        self.tags: dict[str, tuple[Tag, str]] = {}
        """By kind of kernel: the weakest tag met, and the source of that figure."""
        self.exchanging = np.array([operation.index for operation in graph.exchanging], dtype=np.int64)
        self.text_only = np.array([op.index for op in graph if op.depends_on_text_only], dtype=np.int64)
        self._known: dict[object, OperationTimes] = {}

    def times(self, device: str, shard: Shard, layers: Layers, service: Service) -> OperationTimes:
        """Times where every exchange is served the same way."""
        key = (device, _signature(shard), layers, service)
        if key not in self._known:
            if service is Service.NONE:
                self._known[key] = self._measure(self.graph.operations, device, shard, layers, service)
            else:
                base = self.times(device, shard, layers, Service.NONE)
                exchanging = tuple(self.graph.operations[index] for index in self.exchanging)
                changed = self._measure(exchanging, device, shard, layers, service)
                device_ns, host_ns = base.device_ns.copy(), base.host_ns.copy()
                device_ns[self.exchanging] = changed.device_ns
                host_ns[self.exchanging] = changed.host_ns
                self._known[key] = OperationTimes(device_ns, host_ns)
        return self._known[key]

    def _measure(
        self, operations: tuple[Operation, ...], device: str, shard: Shard, layers: Layers, service: Service
    ) -> OperationTimes:
        model = self.models[device]
        device_ns, host_ns = [], []
        order = list(Tag)
        is_replaced = layers is not Layers.NATIVE and service is Service.NONE
        for operation in operations:
            on_device = on_host = 0.0
            kernels = self.kernels.of(operation, shard, layers, service)
            if isinstance(model, MeasuredOperations):
                whole = model.operation_cost(operation, shard, layers, service, kernels)
                costs = [(operation.kind.value, whole)]
            else:
                costs = [(kernel.kind.value, model.cost(kernel)) for kernel in kernels]
            for kind, cost in costs:
                on_device += cost.device_s
                on_host += cost.launch_s
                if is_replaced and operation.exchange is not None:
                    continue  # this only fills a place that another service's time takes
                known = self.tags.get(kind)
                if known is None or order.index(cost.tag) > order.index(known[0]):
                    self.tags[kind] = (cost.tag, cost.source)
            device_ns.append(to_ns(on_device))
            host_ns.append(to_ns(on_host))
        return OperationTimes(np.array(device_ns, dtype=np.int64), np.array(host_ns, dtype=np.int64))


def _signature(shard: Shard) -> tuple[object, ...]:
    """What the shapes of a shard depend on: sizes at every level, which are those of the border modulo the deepest."""
    rect = shard.own.rect
    return (
        shard.own.batch, shard.own.text, _relative(rect), shard.whole.rect, shard.num_patches, shard.is_edge,
    )  # fmt: skip


def _relative(rect: Rect) -> tuple[int, int, int, int]:
    """Bands of the same size have the same sizes at all levels if they start at multiples of a power of two."""
    rows, cols = rect
    return (rows.size, rows.start % 64, cols.size, cols.start % 64)
