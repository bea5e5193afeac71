"""Codecs: how an exchange's values are written on the wire, and how many bytes that takes.

int8, fp8          each channel scaled to the range of the format
residual_int8/_int4  the change since what the reader has already reconstructed, quantised; the reader adds it up. The
                   sender adds up the same numbers, so the error of one step is part of the next step's change: it
                   does not accumulate (error feedback, as in 1-bit SGD, Seide et al. 2014)

A payload is a flat run of bytes: the values, then one bfloat16 scale for each channel. Only values that are read one
step later are coded; warm-up sends them as they are, which is where residuals start from.
"""

from __future__ import annotations

from enum import Enum

from distri.core.shape import ceil_div

SCALE_BYTES = 2


class Codec(str, Enum):
    """A wire format."""

    NONE = "none"
    INT8 = "int8"
    FP8 = "fp8"
    RESIDUAL_INT8 = "residual_int8"
    RESIDUAL_INT4 = "residual_int4"
    RESIDUAL_INT2 = "residual_int2"

    @property
    def bits(self) -> int:
        """Bits of one value; 0 means that values travel in their own dtype."""
        return {"none": 0, "int8": 8, "fp8": 8, "residual_int8": 8, "residual_int4": 4, "residual_int2": 2}[
            self.value
        ]

    @property
    def is_residual(self) -> bool:
        """Whether it sends changes rather than values."""
        return self.value.startswith("residual")


def payload_bytes(codec: Codec, elements: int, channels: int, element_bytes: int) -> int:
    """Bytes on the wire for one message of `elements` values in `channels` channels.

    >>> payload_bytes(Codec.NONE, 1000, 10, 2), payload_bytes(Codec.RESIDUAL_INT4, 1000, 10, 2)
    (2000, 520)
    """
    if codec is Codec.NONE:
        return elements * element_bytes
    return channels * (ceil_div(elements // channels * codec.bits, 8) + SCALE_BYTES) if elements else 0
