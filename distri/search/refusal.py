"""Why nothing is possible: the constraint that binds, by how much, and the nearest request that would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distri.search.space import units_of

if TYPE_CHECKING:
    from distri.search.find import Finalist, Search


class Refusals:
    """The sentences for one search."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def nothing(self) -> str:
        """No candidate is allowed at all: one device always is, unless the quality budget says otherwise."""
        rows, cols = units_of(self._search.request.image, self._search.graph)
        return f"no split of {rows} x {cols} units is allowed with these limits; use fewer devices or a larger picture"

    def nothing_fits(self, too_large: Sequence[Finalist]) -> str:
        """Every candidate exceeds the memory of a device."""
        search = self._search

        def excess(finalist: Finalist) -> int:
            return max(use.total - search.memory.limit_of(use) for use in finalist.memory)

        nearest = min(too_large, key=lambda f: (excess(f), f.layout.num_ranks))
        worst = max(nearest.memory, key=lambda use: use.total - search.memory.limit_of(use))
        limit = search.memory.limit_of(worst)
        image, num = search.request.image, nearest.layout.num_ranks
        devices = "1 device" if num == 1 else f"{num} devices ({nearest.layout})"
        return (
            f"memory binds: {image.height}x{image.width} needs at least {worst.total / 1e9:.2f} GB on a device, "
            f"with {devices}, {excess(nearest) / 1e9:.2f} GB more than the limit of {limit / 1e9:.2f} GB; "
            f"use --memory-limit {-(-worst.total // 10**7) / 100:.2f}GB{self._other_size(nearest, limit)}"
        )

    def _other_size(self, nearest: Finalist, limit: int) -> str:
        """A smaller picture that fits, by scaling what grows with the picture."""
        worst = max(nearest.memory, key=lambda use: use.total)
        fixed = worst.weights + worst.workspace + worst.communication + worst.reserved
        growing = worst.activations + worst.stale_values
        if limit <= fixed:
            return f" or more: weights and libraries alone take {fixed / 1e9:.2f} GB"
        search = self._search
        share = ((limit - fixed) / growing) ** 0.5
        alignment, _ = search.graph.alignment
        step = alignment * search.graph.vae_factor
        image = search.request.image
        height = int(image.height * share) // step * step
        width = int(image.width * share) // step * step
        if min(height, width) < step:
            return " or more"
        return f" or more, or a picture of {height}x{width}"
