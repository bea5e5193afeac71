"""Layer times that were measured on a device: exact where they were taken, interpolated near them.

A profile (`distri profile`) holds two things. *Operations*: seconds of one operation on one shard, through the
calls that the layers make, halo and moments included. *Steps*: seconds of a whole forward pass of one rank whose
messages are answered at once. What a step takes beyond its parts (the interpreter, hooks, cold caches) is spread over
its operations.

Near measured points an operation costs what they cost, in proportion to its products or elements: the geometric mean
of the nearest points of its family, weighted by inverse distance. Further away the fallback model answers, under its
own tag.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from distri.core.graph import Operation, OperationKind
from distri.errors import HardwareError
from distri.simulator.compute import ComputeCost, ComputeModel, OperationShape
from distri.simulator.hardware import Tag
from distri.simulator.kernels import Layers, Service, Shard

MAX_DISTANCE: Final = math.log(4.0)
NUM_NEAREST: Final = 4
Shape = tuple[int, ...]


@dataclass(frozen=True)
class OperationKey:
    """What the time of an operation depends on.

    inputs, output: shapes on this shard. keys: what an attention reads. geometry: kernel, stride, padding, dilation
    of a convolution, eight numbers. is_split: run by distri's own layer for its kind.
    """

    kind: OperationKind
    function: str
    inputs: tuple[Shape, ...]
    output: Shape
    keys: int = 0
    geometry: Shape | None = None
    groups: int = 1
    is_split: bool = False

    @property
    def family(self) -> tuple[object, ...]:
        """Keys of one family differ in sizes only."""
        return (self.kind, self.function, len(self.output), self.geometry, self.is_split)

    @property
    def logarithms(self) -> tuple[float, ...]:
        """Where it lies among its family: positions, channels out and in, keys."""
        channel = 1 if len(self.output) == 4 else -1
        sizes = (
            prod(self.output) // self.output[channel], self.output[channel],
            self.inputs[0][channel] if self.inputs else 1, max(1, self.keys),
        )  # fmt: skip
        return tuple(math.log(max(1, size)) for size in sizes)


@dataclass(frozen=True)
class StepKey:
    """One rank's forward pass: the sizes of its shard."""

    layers: Layers
    batch: int
    rows: int
    cols: int
    num_patches: int


@dataclass(frozen=True)
class MeasuredOperation:
    """Seconds of one operation: on the device, and of the host that launches it (0 where the two are one)."""

    key: OperationKey
    device_s: float
    launch_s: float = 0.0


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds of a whole forward pass and, at the time of measuring, the sum of its operations' seconds."""

    key: StepKey
    seconds: float
    parts_s: float
    num_operations: int

    @property
    def overhead_s(self) -> float:
        """What an operation costs beyond its own time."""
        return (self.seconds - self.parts_s) / self.num_operations


@dataclass(frozen=True)
class Measurements:
    """A profile's contents, as the simulator needs them."""

    device: str
    dtype: str
    operations: tuple[MeasuredOperation, ...]
    steps: tuple[MeasuredStep, ...]
    source: str


def key_of(operation: Operation, shard: Shard, layers: Layers, service: Service) -> OperationKey:
    """The key of one operation on one rank's shard."""
    is_split = layers is Layers.ATTACHED and service is not Service.NONE and operation.exchange is not None
    keys = 0
    if operation.kind in (OperationKind.SELF_ATTENTION, OperationKind.CROSS_ATTENTION):
        read = shard.whole if is_split else shard.own
        keys = read.dim(operation.inputs[1][1])
    geometry = operation.geometry
    return OperationKey(
        operation.kind,
        operation.function,
        tuple(shard.own.shape(shape) for shape in operation.inputs),
        shard.own.shape(operation.output),
        keys,
        (*geometry.kernel, *geometry.stride, *geometry.padding, *geometry.dilation) if geometry else None,
        operation.groups,
        is_split,
    )


def step_key_of(shard: Shard, layers: Layers) -> StepKey:
    """The key of a rank's forward pass."""
    rows, cols = shard.own.rect
    return StepKey(layers, shard.own.batch, rows.size, cols.size, shard.num_patches)


class MeasuredOperations:
    """A compute model that knows whole operations; kernels alone are the fallback's."""

    def __init__(self, measurements: Measurements, fallback: ComputeModel) -> None:
        self._source = measurements.source
        self._fallback = fallback
        self._points = {point.key: point for point in measurements.operations}
        self._steps = {step.key: step for step in measurements.steps}
        self._families: dict[tuple[object, ...], list[MeasuredOperation]] = {}
        for point in self._points.values():
            if not (point.device_s > 0 and math.isfinite(point.device_s)):
                raise HardwareError(
                    f"a measured time must be above 0 s; got {point.device_s!r} for {point.key}"
                )
            self._families.setdefault(point.key.family, []).append(point)

    def cost(self, shape: OperationShape) -> ComputeCost:
        """The fallback's answer for one kernel."""
        return self._fallback.cost(shape)

    def operation_cost(
        self,
        operation: Operation,
        shard: Shard,
        layers: Layers,
        service: Service,
        kernels: Sequence[OperationShape],
    ) -> ComputeCost:
        """The cost of one operation; `kernels` are what the fallback would run for it."""
        key = key_of(operation, shard, layers, service)
        found = self._points.get(key)
        if found is not None:
            known = ComputeCost(found.device_s, found.launch_s, Tag.MEASURED, self._source)
        else:
            known = self._interpolated(key, kernels)
        device_s = self._within_step_s(known.device_s, step_key_of(shard, layers))
        return ComputeCost(device_s, known.launch_s, known.tag, known.source)

    def _interpolated(self, key: OperationKey, kernels: Sequence[OperationShape]) -> ComputeCost:
        guess = _total(self._fallback, kernels)
        place = key.logarithms
        near = sorted(
            ((math.dist(place, point.key.logarithms), point) for point in self._families.get(key.family, ())),
            key=lambda item: item[0],
        )[:NUM_NEAREST]
        near = [(distance, point) for distance, point in near if distance <= MAX_DISTANCE]
        if not near:
            return guess
        weights = [1 / (distance + 1e-6) for distance, _ in near]
        size = _size(key)
        device_s = math.exp(
            sum(
                w * math.log(p.device_s * size / _size(p.key))
                for w, (_, p) in zip(weights, near, strict=True)
            )
            / sum(weights)
        )
        launch_s = max(point.launch_s for _, point in near)
        return ComputeCost(device_s, launch_s, Tag.INTERPOLATED, self._source)

    def _within_step_s(self, device_s: float, key: StepKey) -> float:
        """An operation's time in a pass: of the same shard; else of those with the same layers; else as it is alone.

        What a pass takes beyond its parts is each operation's in equal shares; what it takes less, in proportion.
        """
        alike = [step for step in self._steps.values() if step.key.layers is key.layers]
        steps = [self._steps[key]] if key in self._steps else alike
        if not steps:
            return device_s
        share = math.fsum(step.seconds for step in steps) / math.fsum(step.parts_s for step in steps)
        if share < 1:
            return device_s * share
        return device_s + math.fsum(step.overhead_s for step in steps) / len(steps)


def _total(model: ComputeModel, kernels: Iterable[OperationShape]) -> ComputeCost:
    costs = [model.cost(kernel) for kernel in kernels]
    order = list(Tag)
    weakest = max(costs, key=lambda cost: order.index(cost.tag), default=None)
    return ComputeCost(
        math.fsum(cost.device_s for cost in costs),
        math.fsum(cost.launch_s for cost in costs),
        weakest.tag if weakest else Tag.MEASURED,
        weakest.source if weakest else "",
    )


def _size(key: OperationKey) -> float:
    """What the time of a family grows with: products where there are any, else elements."""
    out = prod(key.output)
    match key.kind:
        case OperationKind.LINEAR:
            return float(out * key.inputs[0][-1])
        case OperationKind.CONVOLUTION:
            return float(out * key.inputs[0][1])
        case OperationKind.SELF_ATTENTION | OperationKind.CROSS_ATTENTION:
            return float(out * key.keys)
        case _:
            return float(out + sum(prod(shape) for shape in key.inputs))
