"""Capture a denoiser into a `LayerGraph` by watching one forward pass on the meta device.

A `TorchFunctionMode` sees every torch function that the model calls, in order, with the tensors themselves; forward
hooks tell which module is running. Nothing is copied from the model's source: what runs is what is recorded. (Why this
and not `torch.fx` or `torch.export`: docs/decisions/0002-capture-by-function-mode.md.)

The pass runs at a latent size, batch and text length whose numbers occur nowhere else in a network, so that each
dimension of each tensor can be read back as a symbol: B, T, H/s, W/s or HW/s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from distri.core.graph import LayerGraph, Operation, OperationKind
from distri.core.ops.conv2d import ConvGeometry
from distri.core.shape import Dim, SymbolicShape, ceil_div
from distri.errors import ModelError


@dataclass(frozen=True)
class Probe:
    """The numbers of a capture pass; primes that no layer uses, times the largest downsampling factor."""

    batch: int = 11
    text: int = 83
    row_prime: int = 37
    col_prime: int = 41
    factor: int = 8

    @property
    def rows(self) -> int:
        """Latent rows."""
        return self.row_prime * self.factor

    @property
    def cols(self) -> int:
        """Latent columns."""
        return self.col_prime * self.factor

    def symbols(self) -> dict[int, Dim]:
        """From number to symbol."""
        table: dict[int, Dim] = {self.batch: "B", self.text: "T"}
        level = 1
        while level <= self.factor:
            rows, cols = ceil_div(self.rows, level), ceil_div(self.cols, level)
            table.update({rows: f"H/{level}", cols: f"W/{level}", rows * cols: f"HW/{level}"})
            level *= 2
        return table


def capture(
    name: str,
    model: nn.Module,
    arguments: Callable[[Probe], Mapping[str, Any]],
    *,
    latent_channels: int,
    text_width: int,
    vae_factor: int = 8,
    probe: Probe | None = None,
) -> LayerGraph:
    """Run `model(**arguments(probe))` on the meta device and record its operations.

    `model` must live on the meta device, so that no weights are in memory.

    Raises:
        ModelError: an operation is of a kind that distri does not know how to split.
    """
    chosen = probe or Probe()
    recorder = _Recorder(chosen)
    training = model.training
    model.eval()
    with torch.no_grad(), torch.device("meta"), recorder.watching(model), recorder:
        model(**arguments(chosen))
    model.train(training)
    return LayerGraph(name, tuple(recorder.operations), latent_channels, text_width, vae_factor)


VIEWS = frozenset(
    "view reshape transpose permute __getitem__ chunk split expand contiguous to flatten unflatten squeeze unsqueeze "
    "detach type float half dropout unbind narrow expand_as clone".split()
)
IGNORED = frozenset(
    "__get__ size dim numel is_floating_point zeros ones empty arange full tensor __len__ is_contiguous stride "
    "is_cuda __set__ is_complex get_device".split()
)
SPLITTABLE_ELEMENTWISE = frozenset(
    "add sub mul div __add__ __radd__ __iadd__ __sub__ __rsub__ __mul__ __rmul__ __imul__ __truediv__ __itruediv__ "
    "silu gelu relu sigmoid tanh mish exp log sin cos pow sqrt rsqrt neg add_ mul_ div_ sub_ clamp where".split()
)


class _Recorder(TorchFunctionMode):
    """Records operations; views pass the identity of their producer on."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._symbols = probe.symbols()
        self._batch = probe.batch
        self._producers: Any = WeakIdKeyDictionary()
        self._kept: list[torch.Tensor] = []
        self._modules: list[tuple[str, nn.Module]] = []
        self._charged: set[int] = set()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Track which module is running."""
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(path, module)))
            handles.append(module.register_forward_hook(self._leaving))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, path: str, module: nn.Module) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self._modules.append((path, module))

        return hook

    def _leaving(self, *_: object) -> None:
        self._modules.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        function = getattr(func, "__name__", str(func))
        if function in IGNORED or not self._modules:
            return result
        tensors = list(_tensors((args, kwargs or {})))
        outputs = list(_tensors(result))
        if function in VIEWS:
            self._alias(tensors[:1], outputs)
        elif outputs:
            self._record(function, args, kwargs or {}, tensors, outputs)
        return result

    def _alias(self, sources: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        producers = tuple(p for source in sources for p in self._producers.get(source, ()))
        for output in outputs:
            self._remember(output, producers)

    def _remember(self, tensor: torch.Tensor, producers: tuple[int, ...]) -> None:
        self._producers[tensor] = producers
        self._kept.append(tensor)

    def _record(
        self,
        function: str,
        args: Any,
        kwargs: Mapping[str, Any],
        tensors: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> None:
        path, _ = self._modules[-1]
        activations = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
        weights = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
        kind, geometry, groups = _classify(function, args, kwargs, tensors, path)
        inputs = [self._symbolic(tensor) for tensor in activations]
        output = self._symbolic(outputs[0])
        if kind in (OperationKind.SELF_ATTENTION, OperationKind.CROSS_ATTENTION):
            inputs, output = [_merge_heads(shape) for shape in inputs[:3]], _merge_heads(output)
            is_self = inputs[0][1] == inputs[1][1]
            kind = OperationKind.SELF_ATTENTION if is_self else OperationKind.CROSS_ATTENTION
            path = _owner_of(self._modules, path)
        parents = sorted({p for tensor in activations for p in self._producers.get(tensor, ())})
        index = len(self.operations)
        self.operations.append(
            Operation(
                index,
                path,
                kind,
                tuple(inputs),
                output,
                tuple(parents),
                self._weight_elements(weights),
                geometry,
                groups,
                function if kind is OperationKind.ELEMENTWISE else "",
            )
        )
        for tensor in outputs:
            self._remember(tensor, (index,))

    def _weight_elements(self, weights: Sequence[torch.Tensor]) -> int:
        fresh = [weight for weight in weights if id(weight) not in self._charged]
        self._charged.update(id(weight) for weight in fresh)
        return sum(weight.numel() for weight in fresh)

    def _symbolic(self, tensor: torch.Tensor) -> SymbolicShape:
        shape: list[Dim] = [self._symbols.get(size, size) for size in tensor.shape]
        first = shape[0] if len(shape) > 1 else None
        if isinstance(first, int) and first and first % self._batch == 0:
            shape[0] = f"{first // self._batch}*B"
        return tuple(shape)


def _owner_of(modules: list[tuple[str, nn.Module]], path: str) -> str:
    """The module that owns an attention call: the innermost that has an attention processor."""
    for candidate, module in reversed(modules):
        if hasattr(module, "processor") or hasattr(module, "get_processor"):
            return candidate
    return path


def _merge_heads(shape: SymbolicShape) -> SymbolicShape:
    """(batch, heads, tokens, head size) -> (batch, tokens, channels)."""
    batch, heads, tokens, head_size = shape
    assert isinstance(heads, int)
    assert isinstance(head_size, int)
    return (batch, tokens, heads * head_size)


def _classify(
    function: str, args: Any, kwargs: Mapping[str, Any], tensors: list[torch.Tensor], path: str
) -> tuple[OperationKind, ConvGeometry | None, int]:
    simple = {
        "linear": OperationKind.LINEAR,
        "layer_norm": OperationKind.LAYER_NORM,
        "rms_norm": OperationKind.LAYER_NORM,
        "scaled_dot_product_attention": OperationKind.SELF_ATTENTION,
        "interpolate": OperationKind.RESAMPLE,
        "cat": OperationKind.CONCAT,
        "concat": OperationKind.CONCAT,
    }
    if function in simple:
        return simple[function], None, 1
    if function == "conv2d":
        return OperationKind.CONVOLUTION, *_conv_geometry(args, kwargs, tensors[1])
    if function == "group_norm":
        return OperationKind.GROUP_NORM, None, int(kwargs.get("num_groups", args[1] if len(args) > 1 else 1))
    if function in SPLITTABLE_ELEMENTWISE:
        return OperationKind.ELEMENTWISE, None, 1
    raise ModelError(
        f"{path or 'the model'} calls torch's {function}, which distri does not know how to split"
    )


def _conv_geometry(args: Any, kwargs: Mapping[str, Any], weight: torch.Tensor) -> tuple[ConvGeometry, int]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    stride, padding, dilation = given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1)
    kernel = (weight.shape[2], weight.shape[3])
    return ConvGeometry(kernel, _pair(stride), _pair(padding), _pair(dilation)), int(given.get("groups", 1))


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
