"""Tensor parallelism as a baseline: every rank has the whole picture and a slice of the channels (Megatron-LM).

Products come in pairs, columns then rows, with one all-reduce behind each pair: query, key, value and output of an
attention (by whole heads: the rank with most heads sets the pace), the two linears of a feed-forward block, the two
convolutions of a residual block with the GroupNorm between them. Other convolutions are split by rows alone. Which
operations pair up is read from the graph: a product whose result reaches one other product of its kind, and nothing
else, through operations that treat channels (or groups of them) alone.

Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3; DistriFusion compares with it in section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from distri.core.graph import LayerGraph, Operation, OperationKind
from distri.core.plan import DTYPE_BYTES, Plan
from distri.core.shape import Extent
from distri.errors import PlanError
from distri.simulator.compute import KernelKind, OperationShape
from distri.simulator.costs import to_ns
from distri.simulator.hardware import Collective, Word
from distri.simulator.kernels import KernelList, Layers, Service, Shard, head_size
from distri.simulator.lowering import TEXT_TOKENS, Lowering
from distri.simulator.tasks import (
    FRESH_STREAM,
    Action,
    Call,
    Compute,
    Group,
    Post,
    StepTemplate,
    TaskList,
    Wait,
)

_BETWEEN = (OperationKind.ELEMENTWISE, OperationKind.GROUP_NORM)


class Split(Word):
    """How an operation is cut."""

    WHOLE = "whole"
    COLUMNS = "columns"
    CHANNELS = "channels"
    ROWS = "rows"


@dataclass(frozen=True)
class TensorSplit:
    """How each operation of a graph is cut over `parts` ranks."""

    graph: LayerGraph
    parts: int

    @cached_property
    def of(self) -> tuple[Split, ...]:
        """The cut of each operation, by index."""
        found = [Split.WHOLE] * len(self.graph)
        children = self._children
        for operation in self.graph:
            if operation.kind in (OperationKind.SELF_ATTENTION, OperationKind.CROSS_ATTENTION):
                self._cut_attention(operation, children, found)
        for operation in self.graph:
            if (
                operation.kind in (OperationKind.LINEAR, OperationKind.CONVOLUTION)
                and operation.level is not None
            ):
                self._cut_pair(operation, children, found)
        for operation in self.graph:
            if operation.reads_neighbours and operation.parents and found[operation.index] is Split.WHOLE:
                found[operation.index] = Split.ROWS
        return tuple(found)

    @cached_property
    def _children(self) -> list[list[int]]:
        children: list[list[int]] = [[] for _ in range(len(self.graph))]
        for operation in self.graph:
            for parent in operation.parents:
                children[parent].append(operation.index)
        return children

    def _cut_attention(self, operation: Operation, children: list[list[int]], found: list[Split]) -> None:
        for parent in operation.parents:
            if self.graph.operations[parent].kind is OperationKind.LINEAR:
                found[parent] = Split.COLUMNS
        found[operation.index] = Split.CHANNELS
        for child in children[operation.index]:
            if self.graph.operations[child].kind is OperationKind.LINEAR:
                found[child] = Split.ROWS

    def _cut_pair(self, first: Operation, children: list[list[int]], found: list[Split]) -> None:
        if found[first.index] is not Split.WHOLE:
            return
        between: list[int] = []
        reached, front = set(), [first.index]
        while front:
            for child in children[front.pop()]:
                if child in between:
                    continue
                if self.graph.operations[child].kind in _BETWEEN:
                    between.append(child)
                    front.append(child)
                else:
                    reached.add(child)
                if len(between) > 6 or len(reached) > 1:
                    return
        if len(reached) != 1 or self.graph.operations[next(iter(reached))].kind is not first.kind:
            return
        last = self.graph.operations[next(iter(reached))]
        if not between or (first.kind is OperationKind.CONVOLUTION and not last.reads_neighbours):
            return
        found[first.index], found[last.index] = Split.COLUMNS, Split.ROWS
        for index in between:
            found[index] = Split.CHANNELS
            for parent in self.graph.operations[index].parents:
                beside = self.graph.operations[parent]
                if (
                    beside.kind is OperationKind.LINEAR
                    and found[parent] is Split.WHOLE
                    and beside.level is None
                ):
                    found[parent] = Split.COLUMNS


class TensorParallelLowering:
    """Lowers tensor parallelism on the mesh of a plan: its patch ranks hold channels in place of patches."""

    def __init__(self, lowering: Lowering, plan: Plan) -> None:
        self._lowering = lowering
        self._plan = plan
        self._graph = lowering.graph
        self._parts = plan.mesh.patch
        self._own = Extent(plan.batch_per_rank, TEXT_TOKENS, plan.latent)
        self._kernels = KernelList(self._graph, plan.dtype)
        self._split = TensorSplit(self._graph, self._parts)
        self._size = DTYPE_BYTES[plan.dtype]
        self._check()

    def _check(self) -> None:
        for operation in self._graph:
            is_split = self._split.of[operation.index] is Split.CHANNELS
            if is_split and operation.kind is OperationKind.GROUP_NORM and operation.groups % self._parts:
                raise PlanError(
                    f"tensor parallelism gives each rank whole groups of {operation.path}: "
                    f"{operation.groups} groups do not split over {self._parts} ranks; "
                    f"use a divisor of {operation.groups}"
                )

    @property
    def elements_communicated(self) -> int:
        """Elements that one rank sends in the all-reduces of a step."""
        whole = sum(
            self._own.elements(operation.output)
            for operation in self._graph
            if self._split.of[operation.index] is Split.ROWS
        )
        return whole * 2 * (self._parts - 1) // self._parts

    def lower(self) -> TaskList:
        """One closed step, repeated."""
        template = StepTemplate("step", tuple(self._actions()), is_closed=True)
        steps = (0,) * self._plan.image.num_inference_steps
        labels = tuple(action.call.label for action in template.actions if isinstance(action, Post))
        return TaskList(self._plan.mesh.size, (template,), steps, 0, slot_labels=labels)

    def _actions(self) -> list[Action]:
        actions: list[Action] = []
        done = 0
        spent: list[tuple[int, ...]] = []
        slot = 0
        for operation in self._graph:
            spent.append(self._times(operation))
            is_summed = self._split.of[operation.index] is Split.ROWS and self._parts > 1
            if is_summed or operation.index == len(self._graph) - 1:
                total = tuple(sum(column) for column in zip(*spent, strict=True))
                actions.append(Compute(total, (), (), done, operation.index + 1))
                done, spent = operation.index + 1, []
            if is_summed:
                call = self._sum(slot, operation)
                actions += [Post(call, 0), Wait(slot, 0, call.label)]
                slot += 1
        if self._plan.mesh.cfg > 1:
            call = self._gather(slot)
            actions += [Post(call, 0), Wait(slot, 0, call.label)]
        return actions

    def _times(self, operation: Operation) -> tuple[int, ...]:
        models = self._lowering.table(self._plan.dtype).models
        kernels = self._kernels_of(operation)
        by_model = {
            name: to_ns(sum(model.cost(kernel).device_s for kernel in kernels))
            for name, model in models.items()
        }
        devices = self._lowering.cluster.devices
        return tuple(by_model[devices[rank].model] for rank in range(self._plan.mesh.size))

    def _kernels_of(self, operation: Operation) -> tuple[OperationShape, ...]:
        """The kernels of the rank that has most to do."""
        shard = Shard(self._own, self._own)
        whole = self._kernels.of(operation, shard, Layers.NATIVE, Service.NONE)
        split = self._split.of[operation.index]
        if split is Split.WHOLE or self._parts == 1:
            return whole
        cut = tuple(self._cut(kernel, operation, split) for kernel in whole)
        if split is not Split.ROWS:
            return cut
        elements = self._own.elements(operation.output) * self._size
        bias = OperationShape(
            KernelKind.ELEMENTWISE, bytes_read=elements, bytes_written=elements, dtype=self._plan.dtype
        )
        return (*cut, bias)

    def _cut(self, kernel: OperationShape, operation: Operation, split: Split) -> OperationShape:
        match kernel.kind:
            case KernelKind.ATTENTION:
                heads = self._heads(self._own.dim(operation.inputs[0][-1]))
                batch = self._own.dim(operation.inputs[0][0]) * heads
                share = batch / kernel.batch
                return OperationShape(
                    kernel.kind, kernel.m, kernel.n, kernel.k, batch,
                    int(kernel.bytes_read * share), int(kernel.bytes_written * share), kernel.dtype,
                )  # fmt: skip
            case KernelKind.LINEAR | KernelKind.CONVOLUTION:
                return self._cut_product(kernel, operation, split)
        return OperationShape(
            kernel.kind, 1, 1, 1, 1, kernel.bytes_read // self._parts, kernel.bytes_written // self._parts,
            kernel.dtype, kernel.num_kernels,
        )  # fmt: skip

    def _cut_product(self, kernel: OperationShape, operation: Operation, split: Split) -> OperationShape:
        n, k = kernel.n, kernel.k
        activations = kernel.bytes_read // self._size - n * k
        if split is Split.COLUMNS:
            return self._kernels.product(kernel.kind, kernel.m, self._part(n, operation), k, activations)
        part = self._part(k, operation)
        return self._kernels.product(kernel.kind, kernel.m, n, part, activations * part // k)

    def _part(self, channels: int, operation: Operation) -> int:
        """A rank's share of channels: whole heads around an attention."""
        if self._is_at_attention(operation):
            return self._heads(channels) * head_size(channels)
        return -(-channels // self._parts)

    def _heads(self, channels: int) -> int:
        return -(-(channels // head_size(channels)) // self._parts)

    def _is_at_attention(self, operation: Operation) -> bool:
        attention = (OperationKind.SELF_ATTENTION, OperationKind.CROSS_ATTENTION)
        around = [*operation.parents, *self._split._children[operation.index]]
        return operation.kind is OperationKind.LINEAR and any(
            self._graph.operations[index].kind in attention for index in around
        )

    def _sum(self, slot: int, operation: Operation) -> Call:
        factory = self._lowering.factory(self._plan)
        size = self._own.elements(operation.output) * self._size
        groups = tuple(
            Group(ranks, factory.transfer(Collective.ALL_REDUCE, size, ranks, is_blocking=True), 0)
            for ranks in factory.branches
        )
        return factory.call(slot, operation.path, FRESH_STREAM, False, groups)

    def _gather(self, slot: int) -> Call:
        factory = self._lowering.factory(self._plan)
        size = 2 * prod(self._own.shape(self._graph.operations[-1].output)) * self._size
        pairs = tuple(zip(*factory.branches, strict=True))
        groups = tuple(
            Group(pair, factory.transfer(Collective.ALL_GATHER, size, pair, is_blocking=True), 0)
            for pair in pairs
        )
        return factory.call(slot, "output", FRESH_STREAM, False, groups)
