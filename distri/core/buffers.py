"""Double buffers whose every slot knows the version of what it holds.

Invariant: of one key, at most the two newest versions are held, and a read names the version it needs; any other is an
error, never an approximation. Values are opaque: tensors in a backend, anything in a test.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from distri.errors import StaleReadError

V = TypeVar("V")

DEPTH = 2


class VersionedBuffer(Generic[V]):
    """The newest `DEPTH` versions of each key, plus versions that were pinned.

    >>> buffer = VersionedBuffer[str]()
    >>> buffer.put("conv_in", 3, "a"); buffer.put("conv_in", 4, "b"); buffer.put("conv_in", 5, "c")
    >>> buffer.get("conv_in", 4)
    'b'
    >>> buffer.holds("conv_in", 3)
    False
    """

    def __init__(self) -> None:
        self._slots: dict[Hashable, dict[int, V]] = {}

    def put(self, key: Hashable, version: int, value: V) -> None:
        """Store a value; the oldest of three versions goes.

        Raises:
            StaleReadError: the version is held already (a torn write), or older than what is held.
        """
        slots = self._slots.setdefault(key, {})
        if version in slots:
            raise StaleReadError(f"{key}: version {version} was written twice")
        if slots and version < max(slots):
            raise StaleReadError(f"{key}: version {version} arrived after version {max(slots)}")
        slots[version] = value
        for old in sorted(slots)[:-DEPTH]:
            del slots[old]

    def holds(self, key: Hashable, version: int) -> bool:
        """Whether exactly this version is at hand."""
        return version in self._slots.get(key, {})

    def get(self, key: Hashable, version: int) -> V:
        """The value of exactly this version.

        Raises:
            StaleReadError: it is not at hand.
        """
        slots = self._slots.get(key, {})
        if version not in slots:
            held = ", ".join(map(str, sorted(slots))) or "none"
            raise StaleReadError(f"{key}: version {version} is required; held: {held}")
        return slots[version]

    def later(self, steps: int, change: Callable[[V], V]) -> VersionedBuffer[V]:
        """What is held here, changed, as versions that are `steps` newer."""
        moved = VersionedBuffer[V]()
        moved._slots = {
            key: {version + steps: change(value) for version, value in slots.items()}
            for key, slots in self._slots.items()
        }
        return moved

    def clear(self) -> None:
        """Forget everything: a new image starts."""
        self._slots.clear()
