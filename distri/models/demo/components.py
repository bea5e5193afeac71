"""Connected parts of a mask, four neighbours each, by joining runs of successive rows. numpy and a union-find."""

import numpy as np
from numpy.typing import NDArray


def _runs(row_W: NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], row_W.astype(np.int8), [0]))))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def connected_components(mask_HW: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Labels (H, W), 0 outside the mask and 1..count inside, and the count."""
    parents: list[int] = []

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    placed: list[tuple[int, int, int, int]] = []
    above: list[tuple[int, int, int]] = []
    for y, row_W in enumerate(mask_HW):
        here: list[tuple[int, int, int]] = []
        for start, stop in _runs(row_W):
            index = len(parents)
            parents.append(index)
            for other_start, other_stop, other in above:
                if other_start < stop and start < other_stop:
                    parents[root(index)] = root(other)
            here.append((start, stop, index))
            placed.append((y, start, stop, index))
        above = here
    names: dict[int, int] = {}
    labels_HW = np.zeros(mask_HW.shape, dtype=np.int64)
    for y, start, stop, index in placed:
        labels_HW[y, start:stop] = names.setdefault(root(index), len(names) + 1)
    return labels_HW, len(names)
