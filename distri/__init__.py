"""distri: one high-resolution diffusion image on many devices, and what that will cost.

Implements displaced patch parallelism (DistriFusion, Li et al., CVPR 2024, arXiv 2402.19481). Importing this package
imports neither torch nor diffusers; `distri.parallelize` brings them in when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distri.pipeline import parallelize

__all__ = ["__version__", "parallelize"]


def __getattr__(name: str) -> Any:
    """Resolve `distri.parallelize` lazily, so that `distri plan` never pays for importing torch."""
    if name == "parallelize":
        return import_module("distri.pipeline").parallelize
    raise AttributeError(f"module 'distri' has no attribute {name!r}")
