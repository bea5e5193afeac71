"""Cross-attention over a patch: the text's keys and values, computed once per image.

Every patch reads the same text, so nothing is exchanged; and the text does not change between steps, so its
projections are kept until the next image or another text comes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distri.nn.rank_context import RankLocal


class TextProjection:
    """A key or value projection of the text that remembers its result for as long as the text is the same tensor."""

    def __init__(self, ranks: RankLocal, layer: str) -> None:
        self._ranks = ranks
        self._layer = layer

    def __call__(self, project: Callable[[Tensor], Tensor], text_BLD: Tensor) -> Tensor:
        """The projection of `text_BLD`, computed once."""
        memo = self._ranks.current().image_memo
        if self._layer in memo:
            source, (projected,) = memo[self._layer]
            if source is text_BLD:
                return projected
        projected = project(text_BLD)
        memo[self._layer] = (text_BLD, (projected,))
        return projected
