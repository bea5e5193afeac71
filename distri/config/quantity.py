"""Quantities in outside text, such as "300 GB/s" or "25 us", in the SI unit that a field's name ends with.

Bits (`b`) and bytes (`B`) are different units, and a memory or an NVLink is never quoted in bits: a slip of
the two is a factor of eight, so the unit must be one that the field admits.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

_QUANTITY: Final = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-z/]*)\s*")
_PREFIXES: Final = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY: Final = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


class Dimension(str, Enum):
    """What a field measures; the value is the suffix of its name."""

    BYTES_PER_S = "_bytes_per_s"
    FLOPS_PER_S = "_flops_per_s"
    BYTES = "_bytes"
    SECONDS = "_s"


def dimension_of(name: str) -> Dimension | None:
    """The dimension that a field's name ends with, or None for a bare number.

    >>> [dimension_of(name) for name in ("bandwidth_bytes_per_s", "efficiency")]
    [<Dimension.BYTES_PER_S: '_bytes_per_s'>, None]
    """
    return next((dimension for dimension in Dimension if name.endswith(dimension.value)), None)


def _units(dimension: Dimension) -> dict[str, float]:
    decimal_and_binary = _PREFIXES | _BINARY
    match dimension:
        case Dimension.BYTES:
            return {f"{prefix}B": scale for prefix, scale in decimal_and_binary.items()}
        case Dimension.BYTES_PER_S:
            in_bytes = {f"{prefix}B/s": scale for prefix, scale in decimal_and_binary.items()}
            return in_bytes | {
                f"{prefix}{bit}/s": s / 8 for bit in ("b", "bit") for prefix, s in _PREFIXES.items()
            }
        case Dimension.FLOPS_PER_S:
            return {f"{prefix}{name}": s for name in ("FLOP/s", "FLOPS") for prefix, s in _PREFIXES.items()}
        case Dimension.SECONDS:
            return {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def parse_quantity(text: str, dimension: Dimension | None) -> float:
    """The number in SI units (bytes, bytes/s, FLOP/s, s); a bare number is taken to be in them already.

    Raises ValueError with a sentence that names what was expected and what arrived.

    >>> parse_quantity("400 Gb/s", Dimension.BYTES_PER_S), parse_quantity("2.039e12", Dimension.BYTES_PER_S)
    (50000000000.0, 2039000000000.0)
    >>> parse_quantity("80 Gb", Dimension.BYTES)
    Traceback (most recent call last):
      ...
    ValueError: '80 Gb' has the unit 'Gb', but this field is in bytes; use one of MB, GB, TB, MiB, GiB, TiB
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a number with a unit, such as {_example(dimension)!r}")
    number, unit = float(match.group(1)), match.group(2)
    if not unit:
        return number
    if dimension is None:
        raise ValueError(f"{text!r} has the unit {unit!r}, but this field is a bare number")
    scale = _units(dimension).get(unit)
    if scale is None:
        raise ValueError(f"{text!r} has the unit {unit!r}, but {_expected(dimension)}")
    return number * scale


def is_in_bits(text: str) -> bool:
    """Whether a bandwidth is written in bits per second, which only networks are."""
    return re.search(r"(?:b|bit)/s\s*$", text) is not None


def _example(dimension: Dimension | None) -> str:
    examples = {
        Dimension.BYTES: "80 GB",
        Dimension.BYTES_PER_S: "300 GB/s",
        Dimension.FLOPS_PER_S: "312 TFLOP/s",
        Dimension.SECONDS: "25 us",
    }
    return examples[dimension] if dimension is not None else "0.8"


def _expected(dimension: Dimension) -> str:
    allowed = {
        Dimension.BYTES: "this field is in bytes; use one of MB, GB, TB, MiB, GiB, TiB",
        Dimension.BYTES_PER_S: "this field is a bandwidth; use one of MB/s, GB/s, TB/s or Mb/s, Gb/s (bits)",
        Dimension.FLOPS_PER_S: "this field is a compute rate; use one of GFLOP/s, TFLOP/s, PFLOP/s",
        Dimension.SECONDS: "this field is a time; use one of s, ms, us, ns",
    }
    return allowed[dimension]
