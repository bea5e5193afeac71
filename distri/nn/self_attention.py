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
        exchanger = context.exchanger
        projected = (project_keys(x_BLD).transpose(0, 1), project_values(x_BLD).transpose(0, 1))
        own_LBE = torch.cat(projected, dim=-1)  # contiguous, whatever its parts are
        exchanger.publish(self._exchange.layer, [own_LBE])
        whole = exchanger.collect(self._exchange.layer)
        kv_LBE = own_LBE if whole is None else whole[0]
        keys_LBD, values_LBD = kv_LBE.chunk(2, dim=-1)
        context.image_memo[self._slot] = (x_BLD, (values_LBD.transpose(0, 1),))
        return keys_LBD.transpose(0, 1)

    def values(self, x_BLD: Tensor) -> Tensor:
        """Values (B, whole L, D) that belong to the keys returned last."""
        source, (values_BLD,) = self._ranks.current().image_memo.pop(self._slot)
        assert source is x_BLD, f"{self._exchange.layer}: values were asked for other tokens than keys"
        return values_BLD
