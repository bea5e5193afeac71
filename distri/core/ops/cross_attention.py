"""Cross-attention: every patch reads the same text, so nothing is exchanged.

The text's keys and values are the same at every step of an image: the attached layers compute them once per image.
"""

from __future__ import annotations

from distri.core.ops import self_attention


def macs(batch: int, queries: int, text_tokens: int, channels: int) -> int:
    """Multiply-accumulates of scores and weighted sum; the projections are linear operations of their own."""
    return self_attention.macs(batch, queries, text_tokens, channels)
