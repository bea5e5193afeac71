"""GroupNorm over a patch, with the moments of the whole picture.

Moments are (count, mean, M2) in fp32, merged by Chan's rule (`distri.core.ops.group_norm`), so the variance is never
negative and fp16 activations never cancel. Shape suffixes: B batch, G groups, C channels, c channels of
a group, 3 the moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distri.core.ops.group_norm import merge, shift
from distri.core.plan import Exchange
from distri.core.policy import Phase, Policy
from distri.nn.rank_context import RankLocal


def centred(x_BCx: Tensor, num_groups: int) -> tuple[Tensor, Tensor | None]:
    """Moments (B, G, 3) of each group of channels in fp32; on CPUs also `x_BCx` less its groups' means, in fp32.

    `x_BCx` has any number of trailing dimensions.
    """
    values_BGN = x_BCx.reshape(x_BCx.shape[0], num_groups, -1).float()
    count = values_BGN.shape[-1]
    deviations_BGN = None
    if values_BGN.device.type == "cpu":  # where var_mean takes sixteen times as long
        mean_BG = values_BGN.mean(-1)
        deviations_BGN = values_BGN - mean_BG[..., None]
        m2_BG = torch.linalg.vector_norm(deviations_BGN, dim=-1).square_()
    else:
        variance_BG, mean_BG = torch.var_mean(values_BGN, dim=-1, correction=0)
        m2_BG = variance_BG * count
    moments_BG3 = torch.stack((torch.full_like(mean_BG, count), mean_BG, m2_BG), dim=-1)
    return moments_BG3, None if deviations_BGN is None else deviations_BGN.reshape(x_BCx.shape)


def merge_moments(a_BG3: Tensor, b_BG3: Tensor) -> Tensor:
    """Moments of the union of two disjoint sets of positions."""
    return torch.stack(merge(tuple(a_BG3.unbind(-1)), tuple(b_BG3.unbind(-1))), dim=-1)  # type: ignore[arg-type]


def shift_moments(whole_BG3: Tensor, own_before_BG3: Tensor, own_BG3: Tensor) -> Tensor:
    """The published correction; where it makes a variance negative, this rank's own variance stands in."""
    sets = (whole_BG3.unbind(-1), own_before_BG3.unbind(-1), own_BG3.unbind(-1))
    count_BG, mean_BG, m2_BG = shift(*(tuple(moments) for moments in sets))  # type: ignore[arg-type]
    own_m2_BG = own_BG3[..., 2] / own_BG3[..., 0] * count_BG
    return torch.stack((count_BG, mean_BG, torch.where(m2_BG < 0, own_m2_BG, m2_BG)), dim=-1)


def normalise(
    x_BCx: Tensor, moments_BG3: Tensor, module: nn.GroupNorm, about: Tensor | None = None
) -> Tensor:
    """`module` applied to `x_BCx` with the given moments; the variance is biased, as torch's is.

    about: what was taken off each group of `x_BCx` before (B, G); `x_BCx` is then in fp32, and overwritten.
    """
    channels = module.num_channels // module.num_groups
    count_BG, mean_BG, m2_BG = moments_BG3.unbind(-1)
    scale_BGc = torch.rsqrt(m2_BG / count_BG + module.eps)[..., None].expand(-1, -1, channels)
    shift_BGc = (-mean_BG if about is None else about - mean_BG)[..., None] * scale_BGc
    if module.affine:
        weight_Gc, bias_Gc = (
            p.float().view(module.num_groups, channels) for p in (module.weight, module.bias)
        )
        scale_BGc, shift_BGc = scale_BGc * weight_Gc, torch.addcmul(bias_Gc, shift_BGc, weight_Gc)
    trailing = (1,) * (x_BCx.dim() - 2)
    scale = scale_BGc.reshape(*x_BCx.shape[:2], *trailing)
    shift = shift_BGc.reshape(*x_BCx.shape[:2], *trailing)
    # On a CPU a product and a sum take a third of addcmul's time; the product of a half and a float is a float.
    product = x_BCx * scale if about is None else x_BCx.mul_(scale)
    return product.add_(shift)


class PatchGroupNorm:
    """The parallel form of one GroupNorm.

    This patch's moments are fresh. The others', merged along the line of patches, are of the version that the plan's
    policy names; under `local` there are none. With the previous step's this is the corrected asynchronous GroupNorm.
    """

    def __init__(self, ranks: RankLocal, exchange: Exchange) -> None:
        self._ranks = ranks
        self._exchange = exchange

    def __call__(self, module: nn.GroupNorm, x_BCHW: Tensor) -> Tensor:
        """This patch of the output, for this patch `x_BCHW` of the input."""
        context = self._ranks.current()
        exchanger, layer = context.exchanger, self._exchange.layer
        own_BG3, deviations_BCHW = centred(x_BCHW, module.num_groups)
        exchanger.publish(layer, [own_BG3])
        others = exchanger.collect(layer) or ()
        whole_BG3 = _merged(own_BG3, others)
        if self._exchange.steady is Policy.SHIFTED:
            if exchanger.phase is Phase.STEADY:
                before_BG3, _ = context.image_memo[layer]
                whole_BG3 = shift_moments(_merged(before_BG3, others), before_BG3, own_BG3)
            context.image_memo[layer] = (own_BG3, ())
        if deviations_BCHW is None:
            return normalise(x_BCHW, whole_BG3, module).to(x_BCHW.dtype)
        return normalise(deviations_BCHW, whole_BG3, module, own_BG3[..., 1]).to(x_BCHW.dtype)


def _merged(own_BG3: Tensor, others: Sequence[Tensor]) -> Tensor:
    for other_BG3 in others:
        own_BG3 = merge_moments(own_BG3, other_BG3)
    return own_BG3
