"""What a figure can be: bounds wide enough for any real machine, narrow enough to catch a slip of units.

The commonest slip is GB for Gb: a "400 Gb/s" port written as "400 GB/s" is eight times what exists. The
bounds of each kind of link leave no room for that; quoting NVLink, PCIe or memory in bits is refused by the
unit itself.
"""

from __future__ import annotations

from typing import Final

from distri.simulator.hardware import LinkKind

NETWORK_KINDS: Final = frozenset({LinkKind.INFINIBAND, LinkKind.ETHERNET, LinkKind.VIRTUAL})
"""Kinds of link that are quoted in bits per second."""

LINK_BOUNDS_BYTES_PER_S: Final[dict[LinkKind, tuple[float, float]]] = {
    LinkKind.NVLINK: (20e9, 1e12),
    LinkKind.PCIE: (0.2e9, 130e9),
    LinkKind.SOCKET: (2e9, 500e9),
    LinkKind.MEMORY: (2e9, 2e12),
    LinkKind.INFINIBAND: (1e9, 110e9),
    LinkKind.ETHERNET: (1e5, 60e9),
    LinkKind.VIRTUAL: (1e4, 200e9),
}

FIELD_BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "peak_flops_per_s": (1e8, 1e17),
    "memory_bytes": (64e6, 1e14),
    "memory_bandwidth_bytes_per_s": (1e8, 5e13),
    "num_multiprocessors": (1, 4096),
    "latency_s": (0, 0.5),
    "launch_eager_s": (0, 0.01),
    "launch_graph_s": (0, 0.01),
    "floor_s": (0, 0.01),
    "split_s": (0, 0.01),
    "kernel_gap_s": (0, 0.01),
    "efficiency": (1e-4, 2),
    "memory_efficiency": (1e-4, 2),
    "convolution_efficiency": (1e-4, 5),
    "tile_rows": (1, 4096),
    "compute_slowdown": (0, 2),
    "blocking_extra_s": (0, 0.01),
    "per_message_s": (0, 0.01),
}


def implausible_link(kind: LinkKind, bandwidth_bytes_per_s: float) -> str | None:
    """Why a link cannot have this bandwidth, with the slip that would explain it; None where it can.

    >>> implausible_link(LinkKind.INFINIBAND, 400e9)
    '400 GB/s is outside what infiniband links have (1 to 110 GB/s); was 400 Gb/s meant (50 GB/s)?'
    """
    low, high = LINK_BOUNDS_BYTES_PER_S[kind]
    value = bandwidth_bytes_per_s
    if low <= value <= high:
        return None
    sentence = f"{_gigabytes(value)} is outside what {kind} links have ({low / 1e9:g} to {high / 1e9:g} GB/s)"
    if low <= value / 8 <= high:
        return f"{sentence}; was {value / 1e9:g} Gb/s meant ({value / 8e9:g} GB/s)?"
    if low <= value * 8 <= high:
        return f"{sentence}; was {_gigabytes(value * 8)} meant?"
    if low <= value * 1e9 <= high:
        return f"{sentence}; write the unit, such as '{value:g} GB/s'"
    return sentence


def implausible_field(name: str, value: float) -> str | None:
    """Why a field cannot have this value, or None where it can; every figure is at least not negative.

    >>> implausible_field("latency_s", 5.0)
    '5 is outside the plausible range 0 to 0.5 of latency_s'
    """
    if value < 0:
        return f"{value:g} is negative"
    low, high = FIELD_BOUNDS.get(name, (0, float("inf")))
    return (
        None
        if low <= value <= high
        else f"{value:g} is outside the plausible range {low:g} to {high:g} of {name}"
    )


def _gigabytes(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:g} GB/s" if abs(bytes_per_s) >= 1e6 else f"{bytes_per_s:g} B/s"
