"""The torch calls of one operation, as the native model or distri's own layers make them, ready to be timed.

Shape suffixes: B batch, L tokens, C channels, E keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distri.core.exchanger import Exchanger
from distri.core.graph import Operation, OperationKind
from distri.core.plan import Exchange
from distri.core.shape import Extent
from distri.errors import ModelError
from distri.nn.conv2d import PatchConv2d
from distri.nn.group_norm import PatchGroupNorm
from distri.nn.rank_context import RankContext, RankLocal
from distri.nn.self_attention import PatchContext
from distri.profiler.instant import InstantTransport
from distri.profiler.subjects import TEXT_TOKENS, Subject

Call = Callable[[], object]


class CallMaker:
    """Makes calls on one device. `heads` is the number of heads by path of an attention."""

    def __init__(self, device: torch.device, dtype: torch.dtype, heads: dict[str, int]) -> None:
        self.device = device
        self.dtype = dtype
        self._heads = heads

    def make(self, subject: Subject) -> Call:
        """A call that runs the operation once, on data of its own."""
        own = subject.plan.extent(subject.patch, TEXT_TOKENS)
        operation = subject.operation
        if subject.exchange is not None and subject.key.is_split:
            return self._split(subject, subject.exchange, own)
        inputs = [self.tensor(own.shape(shape)) for shape in operation.inputs]
        match operation.kind:
            case OperationKind.CONVOLUTION:
                module = self._convolution(operation, own)
                return lambda: module(inputs[0])
            case OperationKind.LINEAR:
                linear = self._placed(nn.Linear(inputs[0].shape[-1], own.shape(operation.output)[-1]))
                return lambda: linear(inputs[0])
            case OperationKind.GROUP_NORM:
                norm = self._placed(nn.GroupNorm(operation.groups, inputs[0].shape[1]))
                return lambda: norm(inputs[0])
            case OperationKind.LAYER_NORM:
                layer = self._placed(nn.LayerNorm(inputs[0].shape[-1]))
                return lambda: layer(inputs[0])
            case OperationKind.SELF_ATTENTION | OperationKind.CROSS_ATTENTION:
                heads = self._heads[operation.path]
                return lambda: attend(inputs[0], inputs[1], inputs[2], heads)
            case OperationKind.CONCAT:
                dim = _dim_that_differs(inputs, own.shape(operation.output))
                return lambda: torch.cat(inputs, dim=dim)
            case OperationKind.RESAMPLE:
                size = own.shape(operation.output)[2:]
                return lambda: F.interpolate(inputs[0], size=size, mode="nearest")
            case _:
                return _elementwise(operation, inputs)

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """Random data."""
        return torch.randn(shape, dtype=torch.float32, device=self.device).to(self.dtype)

    def _placed(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype).requires_grad_(False).eval()

    def _convolution(self, operation: Operation, own: Extent) -> nn.Module:
        geometry = operation.geometry
        assert geometry is not None
        channels = own.dim(operation.inputs[0][1])
        return self._placed(
            nn.Conv2d(
                channels, own.dim(operation.output[1]), geometry.kernel, geometry.stride, geometry.padding,
                geometry.dilation, operation.groups,
            )
        )  # fmt: skip

    def _split(self, subject: Subject, exchange: Exchange, own: Extent) -> Call:
        """The operation run by distri's own layer, its messages answered at once."""
        operation, ranks = subject.operation, RankLocal()
        rank = subject.plan.mesh.rank_of(0, subject.patch)
        transport = InstantTransport(subject.plan, rank, self.device, self.dtype)
        ranks.context = RankContext(cast("Exchanger[Tensor]", _OneLayer(subject, exchange, transport)))
        inputs = [self.tensor(own.shape(shape)) for shape in operation.inputs]
        if operation.kind is OperationKind.CONVOLUTION:
            convolution, module = PatchConv2d(ranks, exchange), self._convolution(operation, own)
            return lambda: convolution(module, module.forward, inputs[0])
        if operation.kind is OperationKind.GROUP_NORM:
            norm = nn.GroupNorm(operation.groups, inputs[0].shape[1])
            group_norm, placed = PatchGroupNorm(ranks, exchange), self._placed(norm)
            return lambda: group_norm(cast("nn.GroupNorm", placed), inputs[0])
        context, heads = PatchContext(ranks, exchange), self._heads[operation.path]
        query, keys, values = inputs

        def attend_to_context() -> Tensor:
            whole_keys = context.keys(lambda _: keys, lambda _: values, query)
            return attend(query, whole_keys, context.values(query), heads)

        return attend_to_context


class _OneLayer:
    """What one layer sees of its exchanger, at step 0."""

    step = 0

    def __init__(self, subject: Subject, exchange: Exchange, transport: InstantTransport) -> None:
        self.plan = subject.plan
        self.patch = subject.patch
        self._exchange = exchange
        self._transport = transport

    def is_alone(self, layer: str) -> bool:
        return False

    def place(self, layer: str) -> Tensor | None:
        return self._transport.place(self._exchange, 0, None)

    def publish(self, layer: str, parts: list[Tensor]) -> None:
        self._transport.send(self._exchange, 0, parts, None)

    def collect(self, layer: str) -> Any:
        return self._transport.receive(self._exchange, 0, ())


def attend(query_BLC: Tensor, key_BLC: Tensor, value_BLC: Tensor, heads: int) -> Tensor:
    """Attention as diffusers' processor for torch 2 calls it, heads split off and joined again."""
    batch, tokens, channels = query_BLC.shape
    size = channels // heads
    query, key, value = (
        x.view(batch, -1, heads, size).transpose(1, 2) for x in (query_BLC, key_BLC, value_BLC)
    )
    out = F.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).reshape(batch, tokens, channels)


def _dim_that_differs(inputs: list[Tensor], output: tuple[int, ...]) -> int:
    return next(dim for dim, size in enumerate(output) if inputs[0].shape[dim] != size)


def _elementwise(operation: Operation, inputs: list[Tensor]) -> Call:
    """An element-wise function by the name that the capture saw; numbers stand for what was no tensor.

    Raises:
        ModelError: torch has no function of that name.
    """
    name = operation.function
    function = getattr(F, name, None) or getattr(torch, name, None) or getattr(Tensor, name, None)
    if function is None:
        raise ModelError(f"{operation.path}: torch has no function {name!r} to time")
    binary = name.strip("_") in (
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "pow",
        "radd",
        "rmul",
        "iadd",
        "imul",
        "itruediv",
        "rsub",
    )
    arguments: list[Any] = [*inputs, 1.5] if binary and len(inputs) == 1 else inputs
    return lambda: function(*arguments)
