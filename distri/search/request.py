"""What is asked of the search: the picture, the devices that may be used, what is to be least, and what may not be.

Invariant: a request is a value. Two equal requests of one graph and cluster give the same answer, so an answer can be
kept under the request's own text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from distri.core.partition import FIXED_AXES, SplitAxis
from distri.core.plan import ImageRequest
from distri.errors import PlanError

ALL: Final = 2**20
"""A bucket that no model fills: everything that may wait travels in one message."""


class Objective(str, Enum):
    """What the chosen plan has least of. Throughput counts seconds per picture with replicas side by side."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"
    DEVICE_SECONDS = "device-seconds"
    PRICE = "price"

    __str__ = str.__str__


class Risk(str, Enum):
    """What a plan does to the picture, from nothing to seams: fresh < corrected < coded < stale < local."""

    FRESH = "fresh"
    CORRECTED = "corrected"
    CODED = "coded"
    STALE = "stale"
    LOCAL = "local"

    __str__ = str.__str__

    @property
    def order(self) -> int:
        """0 for no change of the picture."""
        return list(Risk).index(self)


@dataclass(frozen=True)
class Limits:
    """How far the search looks. The defaults are what `distri plan` uses; tests look at smaller spaces."""

    axes: tuple[SplitAxis, ...] = FIXED_AXES
    warmup_steps: tuple[int, ...] = (5, 6, 8, 10, 15)
    layers_per_bucket: tuple[int, ...] = (8, 20, 60, ALL)
    has_deep_rules: bool = True
    has_uneven_bands: bool = True
    tolerance: float = 0.005
    """Plans closer together than about this share count as equal: the plainer one is taken."""
    slack: float = 0.003
    """How much better a plan that was not looked at may be."""
    max_settled: int = 64


@dataclass(frozen=True)
class SearchRequest:
    """One question to the planner.

    num_devices: how many may be used, or must be if is_exact. down: ranks of the cluster that may not. speeds: (rank,
    share of its speed).
    num_images: pictures wanted; with more than one, replicas work side by side. price_per_hour: of one device.
    """

    image: ImageRequest
    num_devices: int
    dtype: str
    objective: Objective = Objective.LATENCY
    num_images: int = 1
    memory_limit_bytes: int | None = None
    min_psnr_db: float | None = None
    max_risk: Risk = Risk.CORRECTED
    price_per_hour: float | None = None
    down: tuple[int, ...] = ()
    speeds: tuple[tuple[int, float], ...] = ()
    is_exact: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise PlanError(f"at least 1 device is needed, not {self.num_devices}")
        if self.num_images < 1:
            raise PlanError(f"at least 1 picture must be asked for, not {self.num_images}")
        if self.image.num_inference_steps < 1:
            raise PlanError(f"at least 1 denoising step is needed, not {self.image.num_inference_steps}")
        if self.objective is Objective.PRICE and not self.price_per_hour:
            raise PlanError("the objective 'price' needs --price-per-hour, the price of one device")
        if any(not 0 < speed <= 100 for _, speed in self.speeds):
            raise PlanError("a device's speed is a share of its full speed, above 0, such as 3=0.5")
