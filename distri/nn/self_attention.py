"""Self-attention over a patch: its queries read the keys and values of the whole picture.

The key and value projections of this patch are fresh; the other patches' are of the version that the plan's policy
names. The attention itself, whatever computes it, is left alone: it just finds more keys than queries.

Shape suffixes: B batch, L tokens, D channels of keys or values, E of both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distri.core.plan import Exchange
from distri.nn.rank_context import RankLocal

Projection = Callable[[Tensor], Tensor]


class PatchContext:
    """The parallel form of one self-attention's key and value projections.

    `keys` runs both projections and makes one exchange of them; `values` returns what that exchange brought.
    """

    def __init__(self, ranks: RankLocal, exchange: Exchange) -> None:
        self._ranks = ranks
        self._exchange = exchange
        self._slot = f"values of {exchange.layer}"

    def keys(self, project_keys: Projection, project_values: Projection, x_BLD: Tensor) -> Tensor:
        """Keys (B, whole L, D), for this patch's tokens `x_BLD`."""
        context = self._ranks.current()
        exchanger, layer = context.exchanger, self._exchange.layer
        keys_BLD, values_BLD = project_keys(x_BLD), project_values(x_BLD)
        if exchanger.is_alone(layer):
            exchanger.publish(layer, [])
        else:
            own_LBE = _side_by_side(keys_BLD, values_BLD, exchanger.place(layer))
            exchanger.publish(layer, [own_LBE])
            whole = exchanger.collect(layer)
            kv_LBE = own_LBE if whole is None else whole[0]
            keys_BLD, values_BLD = (part_LBD.transpose(0, 1) for part_LBD in kv_LBE.chunk(2, dim=-1))
        context.image_memo[self._slot] = (x_BLD, (values_BLD,))
        return keys_BLD

    def values(self, x_BLD: Tensor) -> Tensor:
        """Values (B, whole L, D) that belong to the keys returned last."""
        source, (values_BLD,) = self._ranks.current().image_memo.pop(self._slot)
        assert source is x_BLD, f"{self._exchange.layer}: values were asked for other tokens than keys"
        return values_BLD


def _side_by_side(keys_BLD: Tensor, values_BLD: Tensor, place_LBE: Tensor | None) -> Tensor:
    """Keys beside values, tokens first and contiguous: in `place_LBE` if that is made for them."""
    parts_LBD = (keys_BLD.transpose(0, 1), values_BLD.transpose(0, 1))
    shape = (*parts_LBD[0].shape[:2], keys_BLD.shape[2] + values_BLD.shape[2])
    if place_LBE is None or place_LBE.shape != shape or place_LBE.dtype != keys_BLD.dtype:
        return torch.cat(parts_LBD, dim=-1)
    for place_LBD, part_LBD in zip(place_LBE.chunk(2, dim=-1), parts_LBD, strict=True):
        place_LBD.copy_(part_LBD.detach())
    return place_LBE
