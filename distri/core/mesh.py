"""The rank mesh: guidance branches times patches, in row-major order.

Rank `r` works on branch `r // patch` and patch `r % patch`, so that the ranks of one branch, which exchange
activations at every layer, are neighbours in rank order (and so, usually, on one host).
"""

from __future__ import annotations

from dataclasses import dataclass

from distri.errors import PartitionError


@dataclass(frozen=True)
class Mesh:
    """`cfg x patch`: `cfg` is 2 if the two guidance branches go to different ranks, otherwise 1.

    >>> Mesh(cfg=2, patch=4).peers(5)
    (4, 5, 6, 7)
    """

    cfg: int = 1
    patch: int = 1

    def __post_init__(self) -> None:
        if self.cfg not in (1, 2):
            raise PartitionError(f"a mesh has 1 or 2 guidance branches, not {self.cfg}")
        if self.patch < 1:
            raise PartitionError(f"a mesh has at least 1 patch, not {self.patch}")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.cfg * self.patch

    def branch_of(self, rank: int) -> int:
        """Guidance branch of a rank: 0 is the unconditional half of the batch, as diffusers orders it."""
        return rank // self.patch

    def patch_of(self, rank: int) -> int:
        """Place of a rank in the split."""
        return rank % self.patch

    def rank_of(self, branch: int, patch: int) -> int:
        """The rank at a place of the mesh."""
        return branch * self.patch + patch

    def peers(self, rank: int) -> tuple[int, ...]:
        """All ranks of this rank's branch, itself included, in patch order."""
        first = self.branch_of(rank) * self.patch
        return tuple(range(first, first + self.patch))
