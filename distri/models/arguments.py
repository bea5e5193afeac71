"""Cut the arguments of a denoiser's forward to one rank's branch and patch.

Callers hand over whole tensors, as for one device: the latent, the text, and what ControlNet or T2I adapters add to
the activations. Shape suffixes: B batch (of all branches), C channels, H rows, W columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from distri.core.plan import Plan
from distri.core.shape import Rect, ceil_div
from distri.errors import PlanError
from distri.nn.conv2d import cut
from distri.nn.rank_context import RankContext

SPATIAL_ARGUMENTS = (
    "sample",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


def bind(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    return dict(inspect.signature(forward).bind(*args, **kwargs).arguments)


def check_latent(sample_BCHW: Tensor, plan: Plan) -> None:
    """Hold that the latent is the one that the plan was made for.

    Raises:
        PlanError: it has another size or batch.
    """
    rows, cols = plan.latent.rows.size, plan.latent.cols.size
    batch, _, height, width = sample_BCHW.shape
    if (height, width) != (rows, cols):
        factor = plan.model.vae_factor
        raise PlanError(
            f"the plan is for {plan.image.height}x{plan.image.width} pixels, "
            f"the pipeline draws {height * factor}x{width * factor}; make a plan for this size"
        )
    if batch != plan.image.batch:
        raise PlanError(
            f"the plan is for a batch of {plan.image.batch} latents (guidance "
            f"{'on' if plan.image.guidance else 'off'}), the pipeline has {batch}; "
            "make a plan with the guidance that the pipeline uses"
        )


def check_residuals(arguments: Mapping[str, Any], plan: Plan) -> None:
    """Hold that nothing beside the denoiser reads the latent at every step, if no rank has the whole of it.

    Raises:
        PlanError: a ControlNet takes part, which does.
    """
    if plan.keeps_latent_on_patch and arguments.get("mid_block_additional_residual") is not None:
        raise PlanError("a ControlNet reads the whole latent at every step; use --latent whole")


def branch_of(value: Any, plan: Plan, context: RankContext, name: str) -> Any:
    """The part of `value` that belongs to this rank's guidance branch.

    Every tensor whose first dimension is the batch is halved. The result for one tensor stays the same tensor during
    an image, so that what is computed from it once can be recognised.
    """
    if plan.mesh.cfg == 1:
        return value
    if isinstance(value, Mapping):
        return {key: branch_of(item, plan, context, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(branch_of(item, plan, context, f"{name}.{i}") for i, item in enumerate(value))
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != plan.image.batch:
        return value
    memo = context.image_memo
    if name in memo and memo[name][0] is value:
        return memo[name][1][0]
    half = value.chunk(2, dim=0)[context.exchanger.branch]
    memo[name] = (value, (half,))
    return half


def patch_of(value: Any, plan: Plan, patch: Rect) -> Any:
    """The part of whole-picture activations, at whatever level they are, that belongs to a patch."""
    if isinstance(value, (list, tuple)):
        return type(value)(patch_of(item, plan, patch) for item in value)
    if not isinstance(value, Tensor) or value.dim() != 4:
        return value
    level = level_of_activation(value, plan)
    whole = plan.latent.at_level(level)
    return cut(value, patch.at_level(level), whole).contiguous()


def level_of_activation(value_BCHW: Tensor, plan: Plan) -> int:
    """How far a whole-picture activation is downsampled.

    Raises:
        PlanError: its size belongs to no level.
    """
    rows, cols = value_BCHW.shape[-2:]
    level = 1
    while level <= plan.model.alignment:
        if (ceil_div(plan.latent.rows.size, level), ceil_div(plan.latent.cols.size, level)) == (rows, cols):
            return level
        level *= 2
    raise PlanError(
        f"an additional residual of {rows}x{cols} belongs to no level of a "
        f"{plan.latent.rows.size}x{plan.latent.cols.size} latent; hand it over whole"
    )


def arguments_of_rank(arguments: Mapping[str, Any], plan: Plan, context: RankContext) -> dict[str, Any]:
    """The arguments with which one rank calls the unmodified forward."""
    patch = context.patches[context.patch]
    own: dict[str, Any] = {}
    for name, value in arguments.items():
        half = branch_of(value, plan, context, name)
        own[name] = patch_of(half, plan, patch) if name in SPATIAL_ARGUMENTS and plan.mesh.patch > 1 else half
    return own
