"""`torch.compile` for the parts of a denoiser between exchanges.

A layer that exchanges hands values to other ranks in the middle of its forward, which no compiler may trace. What is
compiled are the largest modules of the repeated kinds that hold no such layer: the feed-forward part of every
transformer block, most of what lies between two attentions; the whole denoiser if nothing is attached.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from distri.core.plan import Plan
from distri.errors import ModelError

NEEDS = {
    "tvm": ("tvm", "apache-tvm"),
    "tensorrt": ("torch_tensorrt", "torch-tensorrt"),
    "torch_tensorrt": ("torch_tensorrt", "torch-tensorrt"),
}
"""Compilers that torch lists whether or not they are installed: the module that each needs, and its package."""


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
    missing = {name: package for name, (module, package) in NEEDS.items() if find_spec(module) is None}
    known = sorted({*torch.compiler.list_backends(), "eager"} - missing.keys())
    if backend not in known:
        advice = f"install {missing[backend]}, or choose one of" if backend in missing else "known here:"
        raise ModelError(f"there is no compiler {backend!r} here; {advice} {', '.join(known)}")


def regions_of(model: nn.Module) -> list[nn.Module]:
    """The feed-forward parts of its transformer blocks."""
    from diffusers.models.attention import FeedForward

    return [module for module in model.modules() if isinstance(module, FeedForward)]
