"""Attach the parallel layers to a loaded denoiser by what its modules are, through diffusers' hooks; take them off.

Nothing of the model is replaced: weights, `state_dict` keys, LoRA layers and attention processors stay as they are.
A hook stands before the forward of a convolution, a GroupNorm, or an attention's key and value projections, and hands
over to `distri.nn`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from distri.core.ops.conv2d import ConvGeometry
from distri.core.plan import Exchange, Plan
from distri.core.policy import ExchangeKind
from distri.errors import ModelError
from distri.nn.conv2d import LatentConv2d, PatchConv2d
from distri.nn.cross_attention import TextProjection
from distri.nn.group_norm import PatchGroupNorm
from distri.nn.rank_context import RankLocal
from distri.nn.self_attention import PatchContext

HOOK_NAME = "distri"
Replacement = Callable[[nn.Module, Callable[..., Any], Tensor], Tensor]


class ReplacedForward(ModelHook):
    """A hook that runs `replacement(module, original forward, input)` in place of a module's forward."""

    def __init__(self, replacement: Replacement) -> None:
        super().__init__()
        self._replacement = replacement

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called by diffusers instead of the module's forward."""
        (value,) = args or tuple(kwargs.values())[:1]
        return self._replacement(module, self.fn_ref.original_forward, value)


class Attachment:
    """The hooks of one session on one model."""

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []

    def add(self, module: nn.Module, hook: ModelHook) -> None:
        """Register a hook.

        Raises:
            ModelError: another session is attached to this model.
        """
        registry = HookRegistry.check_if_exists_or_initialize(module)
        if registry.get_hook(HOOK_NAME) is not None:
            raise ModelError("this model is attached to a distri session already; leave that one first")
        registry.register_hook(hook, HOOK_NAME)
        self._modules.append(module)

    def remove(self) -> None:
        """Take every hook off again; the model is as it was."""
        for module in reversed(self._modules):
            registry: HookRegistry = module._diffusers_hook
            registry.remove_hook(HOOK_NAME, recurse=False)
            if not registry.hooks:
                del module._diffusers_hook
        self._modules.clear()


def attach_layers(attachment: Attachment, model: nn.Module, plan: Plan, ranks: RankLocal) -> None:
    """Attach every exchange of `plan` to the module that it names.

    Raises:
        ModelError: the model lacks a layer of the plan, or a layer is of a form that cannot be split.
    """
    modules = dict(model.named_modules())
    for exchange in plan.exchanges:
        if exchange.kind is ExchangeKind.OUTPUT:
            continue
        if exchange.layer not in modules:
            raise ModelError(f"the plan names a layer {exchange.layer!r}, which this model does not have")
        ATTACH[exchange.kind](attachment, modules[exchange.layer], exchange, ranks)
    for path, module in modules.items():
        if isinstance(module, Attention) and path not in plan.by_layer:
            _attach_text(attachment, module, path, ranks)
    _attach_latent(attachment, modules, plan, ranks)


def _attach_halo(attachment: Attachment, module: nn.Module, exchange: Exchange, ranks: RankLocal) -> None:
    if _wrapped_conv(module, exchange.layer).padding_mode != "zeros":
        raise ModelError(f"{exchange.layer}: only zero padding can be split")
    attachment.add(module, ReplacedForward(PatchConv2d(ranks, exchange)))


def _wrapped_conv(module: nn.Module, layer: str) -> nn.Conv2d:
    """The convolution itself, behind an adapter if there is one."""
    inner = getattr(module, "base_layer", module)
    if not isinstance(inner, nn.Conv2d):
        raise ModelError(f"{layer}: the plan has a convolution here, the model has {type(module).__name__}")
    return inner


def _attach_moments(attachment: Attachment, module: nn.Module, exchange: Exchange, ranks: RankLocal) -> None:
    if not isinstance(module, nn.GroupNorm):
        raise ModelError(
            f"{exchange.layer}: the plan has a GroupNorm here, the model has {type(module).__name__}"
        )
    norm = PatchGroupNorm(ranks, exchange)
    attachment.add(module, ReplacedForward(lambda owner, _, value: norm(owner, value)))  # type: ignore[arg-type]


def _attach_context(attachment: Attachment, module: nn.Module, exchange: Exchange, ranks: RankLocal) -> None:
    if not isinstance(module, Attention) or getattr(module, "fused_projections", False):
        raise ModelError(
            f"{exchange.layer}: an Attention with separate key and value projections is required; "
            "unfuse the model's projections first"
        )
    context = PatchContext(ranks, exchange)
    values_hook = ReplacedForward(lambda _, __, value: context.values(value))
    attachment.add(module.to_v, values_hook)
    attachment.add(
        module.to_k,
        ReplacedForward(
            lambda _, project_keys, value: context.keys(
                project_keys, values_hook.fn_ref.original_forward, value
            )
        ),
    )


def _attach_text(attachment: Attachment, module: Attention, path: str, ranks: RankLocal) -> None:
    for name in ("to_k", "to_v"):
        projection = TextProjection(ranks, f"{path}.{name}")
        attachment.add(
            getattr(module, name),
            ReplacedForward(lambda _, forward, value, text=projection: text(forward, value)),  # type: ignore[misc]
        )


def _attach_latent(
    attachment: Attachment, modules: dict[str, nn.Module], plan: Plan, ranks: RankLocal
) -> None:
    for path in plan.latent_layers:
        module = modules.get(path)
        if module is None:
            raise ModelError(f"the plan names a layer {path!r}, which this model does not have")
        conv = _wrapped_conv(module, path)
        geometry = ConvGeometry(conv.kernel_size, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]
        attachment.add(module, ReplacedForward(LatentConv2d(ranks, geometry)))


ATTACH: dict[ExchangeKind, Callable[[Attachment, nn.Module, Exchange, RankLocal], None]] = {
    ExchangeKind.HALO: _attach_halo,
    ExchangeKind.MOMENTS: _attach_moments,
    ExchangeKind.CONTEXT: _attach_context,
}
