"""`torch.compile` for the parts of a denoiser between exchanges.

A layer that exchanges hands values to other ranks in the middle of its forward, which no compiler may trace. What is
compiled are the largest modules of the repeated kinds that hold no such layer: the feed-forward part of every
transformer block, most of what lies between two attentions; the whole denoiser if nothing is attached.
"""

from __future__ import annotations

import torch
from torch import nn

from distri.core.plan import Plan
from distri.errors import ModelError


def compile_regions(model: nn.Module, plan: Plan, backend: str = "inductor") -> int:
    """Compile in place, at the first call of each region; returns how many regions there are.

    Raises:
        ModelError: there is no such compiler here, or the model has no region to compile.
    """
    check_compiler(backend)
    regions = [model] if not plan.is_attached else regions_of(model)
    if not regions:
        raise ModelError(
            "this denoiser has no feed-forward part between exchanges to compile; leave --compile out"
        )
    for region in regions:
        region.compile(backend=backend, dynamic=False)
    return len(regions)


def check_compiler(backend: str) -> None:
    """Hold that a compiler of this name is installed.

    Raises:
        ModelError: it is not.
    """
    known = sorted({*torch.compiler.list_backends(), "eager"})
    if backend not in known:
        hint = {"tensorrt": "torch-tensorrt", "torch_tensorrt": "torch-tensorrt", "tvm": "apache-tvm"}.get(
            backend
        )
        advice = f"install {hint}, or choose one of" if hint else "known here:"
        raise ModelError(f"there is no compiler {backend!r} here; {advice} {', '.join(known)}")


def regions_of(model: nn.Module) -> list[nn.Module]:
    """The feed-forward parts of its transformer blocks."""
    from diffusers.models.attention import FeedForward

    return [module for module in model.modules() if isinstance(module, FeedForward)]
