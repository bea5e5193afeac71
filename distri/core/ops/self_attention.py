"""Self-attention: every query of a patch reads the keys and values of the whole picture (its context)."""

from __future__ import annotations


def macs(batch: int, queries: int, keys: int, channels: int) -> int:
    """Multiply-accumulates of scores and weighted sum over all heads; `channels` = heads x head size.

    >>> macs(batch=1, queries=1024, keys=4096, channels=640)
    5368709120
    """
    return 2 * batch * queries * keys * channels


def context_elements(batch: int, tokens: int, channels: int) -> int:
    """Elements that a patch of `tokens` contributes: its keys and its values."""
    return 2 * batch * tokens * channels
