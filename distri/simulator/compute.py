"""What an operation's shard costs on a device: an analytic model and a table of measured times.

Analytic, per kernel: tiles of the output are handed to multiprocessors in waves, a tile costs its products
plus a prologue (saturation with k), traffic costs bytes over achieved bandwidth, and no kernel is shorter
than its floor, and a gap lies between kernels. Small shards use a device badly and in steps, which a smooth
curve misses by tens of percent (the sawteeth are in every public table of GEMM times). Convolutions are
implicit GEMMs: m = batch * height_out * width_out, n = channels out, k = channels in * kernel area. Units:
seconds, bytes; one multiply-accumulate is two FLOP.

Free parameters live in the hardware files, fitted by `benchmarks/fit_compute.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from distri.errors import HardwareError
from distri.simulator.hardware import (
    AttentionParameters,
    DeviceModel,
    Figure,
    GemmParameters,
    StreamingParameters,
    Tag,
    Word,
)

GEMM_TILES: Final = (
    (256, 128),
    (128, 256),
    (128, 128),
    (128, 64),
    (64, 128),
    (64, 64),
    (64, 32),
    (32, 64),
    (16, 64),
)
"""Output tiles that GEMM libraries choose among; the model takes the best, as they do."""
SPLITS: Final = (2, 4, 8)
"""Ways to split k where the output has too few tiles to fill the device."""
MAX_SPLIT_WAVES: Final = 2.0


class KernelKind(Word):
    """Kinds of kernels that have a cost of their own."""

    LINEAR = "linear"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"
    NORM = "norm"
    ELEMENTWISE = "elementwise"
    RESAMPLE = "resample"
    CONCAT = "concat"


class LaunchMode(Word):
    """How kernels reach the device: one by one from the host, or replayed as a CUDA graph."""

    EAGER = "eager"
    GRAPH = "graph"


@dataclass(frozen=True, slots=True)
class OperationShape:
    """One operation on one rank's shard, as plain numbers.

    Products (`linear`, `convolution`): an (m, k) by (k, n) product, `batch` times. `attention`: m queries, k
    keys, n the head dimension, `batch` = images times heads. Other kinds: only the bytes count. `bytes_read`
    includes weights. `num_kernels` is how many launches the operation takes.
    """

    kind: KernelKind
    m: int = 1
    n: int = 1
    k: int = 1
    batch: int = 1
    bytes_read: int = 0
    bytes_written: int = 0
    dtype: str = "float16"
    num_kernels: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates; zero for the kinds that only move bytes."""
        if self.kind is KernelKind.ATTENTION:
            return 2 * self.batch * self.m * self.k * self.n
        if self.kind in (KernelKind.LINEAR, KernelKind.CONVOLUTION):
            return self.batch * self.m * self.n * self.k
        return 0


@dataclass(frozen=True, slots=True)
class ComputeCost:
    """Time on the device, time of the host that launches it, and how the two are known."""

    device_s: float
    launch_s: float
    tag: Tag
    source: str


class ComputeModel(Protocol):
    """What the simulator asks of a compute-cost model."""

    def cost(self, shape: OperationShape) -> ComputeCost:
        """The cost of one operation; the same shape gives the same answer."""
        ...


class AnalyticCompute:
    """The analytic model of one kind of device. Answers are kept by shape."""

    def __init__(self, device: DeviceModel, launch: LaunchMode = LaunchMode.GRAPH) -> None:
        self._device = device
        parameters = device.compute
        self._gemm = _values(parameters.gemm)
        self._attention = _values(parameters.attention)
        self._streaming = _values(parameters.streaming)
        self._convolution_efficiency = parameters.convolution_efficiency.value
        self._gap_s = parameters.kernel_gap_s.value
        self._multiprocessors = round(device.num_multiprocessors.value)
        self._bandwidth = device.memory_bandwidth_bytes_per_s.value
        launches = {LaunchMode.EAGER: device.launch_eager_s, LaunchMode.GRAPH: device.launch_graph_s}
        self._launch_s = launches[launch].value
        self._known: dict[OperationShape, ComputeCost] = {}
        self._provenance = {kind: _provenance(device, kind) for kind in KernelKind}

    def cost(self, shape: OperationShape) -> ComputeCost:
        """Device and launch time of one operation; `HardwareError` for a dtype that has no peak rate."""
        known = self._known.get(shape)
        if known is None:
            tag, source = self._provenance[shape.kind]
            device_s = self._device_s(shape) + self._gap_s * shape.num_kernels
            known = ComputeCost(device_s, self._launch_s * shape.num_kernels, tag, source)
            self._known[shape] = known
        return known

    def _device_s(self, shape: OperationShape) -> float:
        match shape.kind:
            case KernelKind.LINEAR:
                return self._product_s(shape, 1.0)
            case KernelKind.CONVOLUTION:
                return self._product_s(shape, self._convolution_efficiency)
            case KernelKind.ATTENTION:
                return self._attention_s(shape)
        moved = (shape.bytes_read + shape.bytes_written) / (
            self._bandwidth * self._streaming["memory_efficiency"]
        )
        return self._streaming["floor_s"] * shape.num_kernels + moved

    def _product_s(self, shape: OperationShape, relative_efficiency: float) -> float:
        gemm = self._gemm
        rate = self._peak(shape.dtype) * gemm["efficiency"] * relative_efficiency / self._multiprocessors
        k_half, side_half, bandwidth = (
            gemm["k_half"],
            gemm["tile_side"],
            self._bandwidth * gemm["memory_efficiency"],
        )
        best = math.inf
        for rows, columns in GEMM_TILES:
            side = math.sqrt(rows * columns)
            tile_macs_per_k = rows * columns * (1 + side_half / side)
            tiles = -(-shape.m // rows) * -(-shape.n // columns) * shape.batch
            waves = -(-tiles // self._multiprocessors)
            best = min(best, 2 * waves * tile_macs_per_k * (shape.k + k_half) / rate)
            for split in SPLITS:
                if tiles * split > MAX_SPLIT_WAVES * self._multiprocessors or shape.k < 128 * split:
                    break
                waves = -(-tiles * split // self._multiprocessors)
                partial_bytes = 8 * split * shape.batch * shape.m * shape.n
                products = 2 * waves * tile_macs_per_k * (math.ceil(shape.k / split) + k_half) / rate
                best = min(best, products + partial_bytes / bandwidth + gemm["split_s"])
        moved = (shape.bytes_read + shape.bytes_written) / bandwidth
        return gemm["floor_s"] * shape.num_kernels + _either(best, moved)

    def _attention_s(self, shape: OperationShape) -> float:
        attention = self._attention
        rate = self._peak(shape.dtype) * attention["efficiency"] / self._multiprocessors
        rate *= shape.n / (shape.n + attention["head_dim_half"])
        rows = round(attention["tile_rows"])
        waves = -(-(-(-shape.m // rows) * shape.batch) // self._multiprocessors)
        products = waves * rows * 4 * shape.n * (shape.k + attention["kv_half"]) / rate
        moved = (shape.bytes_read + shape.bytes_written) / (self._bandwidth * attention["memory_efficiency"])
        return attention["floor_s"] * shape.num_kernels + _either(products, moved)

    def _peak(self, dtype: str) -> float:
        rates = self._device.peak_flops_per_s
        if dtype not in rates:
            raise HardwareError(f"no peak rate for {dtype} on this device; it has {', '.join(sorted(rates))}")
        return rates[dtype].value


class MeasuredTable:
    """Measured device times: exact at their points, interpolated near them, another model's elsewhere.

    Between points of the same kind, dtype and class, the time is the fallback's times a correction: the
    geometric mean of measured / fallback over the nearest points, weighted by inverse distance of the
    logarithms of (m, n, k, batch, bytes). So the sawteeth of the fallback remain and its level is the
    measured one. Beyond `MAX_DISTANCE` (a factor of four in one number) the fallback answers, under its own
    tag.
    """

    MAX_DISTANCE: Final = math.log(4.0)
    NUM_NEAREST: Final = 4

    def __init__(
        self,
        points: Mapping[OperationShape, float],
        source: str,
        fallback: ComputeModel,
        launch_s: float = 0.0,
    ) -> None:
        self._points = dict(points)
        self._source = source
        self._fallback = fallback
        self._launch_s = launch_s
        self._known: dict[OperationShape, ComputeCost] = {}
        self._near: dict[tuple[KernelKind, str], list[tuple[tuple[float, ...], float]]] = {}
        for shape, seconds in self._points.items():
            if not (seconds > 0 and math.isfinite(seconds)):
                raise HardwareError(f"a measured time must be above 0 s; got {seconds!r} for {shape}")
            correction = math.log(seconds / fallback.cost(shape).device_s)
            self._near.setdefault((shape.kind, shape.dtype), []).append((_logarithms(shape), correction))

    def cost(self, shape: OperationShape) -> ComputeCost:
        """The measured time, an interpolated one, or the fallback's; the tag says which."""
        if shape not in self._known:
            self._known[shape] = self._find(shape)
        return self._known[shape]

    def _find(self, shape: OperationShape) -> ComputeCost:
        if shape in self._points:
            return ComputeCost(self._points[shape], self._launch(shape), Tag.MEASURED, self._source)
        guess = self._fallback.cost(shape)
        place = _logarithms(shape)
        distances = sorted(
            (math.dist(place, other), c) for other, c in self._near.get((shape.kind, shape.dtype), ())
        )
        nearest = [(d, c) for d, c in distances[: self.NUM_NEAREST] if d <= self.MAX_DISTANCE]
        if not nearest:
            return guess
        weights = [1 / (distance + 1e-9) for distance, _ in nearest]
        correction = sum(w * c for w, (_, c) in zip(weights, nearest, strict=True)) / sum(weights)
        return ComputeCost(
            guess.device_s * math.exp(correction), self._launch(shape), Tag.INTERPOLATED, self._source
        )

    def _launch(self, shape: OperationShape) -> float:
        return self._launch_s * shape.num_kernels


def total_cost(model: ComputeModel, shapes: Iterable[OperationShape]) -> tuple[float, float]:
    """Sums of device and launch seconds over operations that run one after the other."""
    costs = [model.cost(shape) for shape in shapes]
    return math.fsum(cost.device_s for cost in costs), math.fsum(cost.launch_s for cost in costs)


def _values(parameters: GemmParameters | AttentionParameters | StreamingParameters) -> dict[str, float]:
    figures: dict[str, Figure] = vars(parameters)
    return {name: figure.value for name, figure in figures.items()}


def _either(products_s: float, moved_s: float) -> float:
    """Products and traffic overlap: the longer one, rounded off where they are alike (4-norm)."""
    return float((products_s**4 + moved_s**4) ** 0.25)


def _logarithms(shape: OperationShape) -> tuple[float, ...]:
    numbers = (shape.m, shape.n, shape.k, shape.batch, shape.bytes_read + shape.bytes_written)
    return tuple(math.log(max(1, number)) for number in numbers)


def _provenance(device: DeviceModel, kind: KernelKind) -> tuple[Tag, str]:
    """The weakest tag among the parameters that a kind's cost is made of, and that parameter's source."""
    compute = device.compute
    match kind:
        case KernelKind.LINEAR:
            figures = list(vars(compute.gemm).values())
        case KernelKind.CONVOLUTION:
            figures = [*vars(compute.gemm).values(), compute.convolution_efficiency]
        case KernelKind.ATTENTION:
            figures = list(vars(compute.attention).values())
        case _:
            figures = list(vars(compute.streaming).values())
    weakest = max([*figures, compute.kernel_gap_s], key=lambda figure: list(Tag).index(figure.tag))
    return weakest.tag, weakest.source
