"""What a simulation may vary that neither the plan nor the hardware file says."""

from __future__ import annotations

from dataclasses import dataclass

from distri.errors import UserError
from distri.simulator.compute import LaunchMode
from distri.simulator.hardware import Word


class CtaPolicy(Word):
    """Who moves the bytes: as many thread blocks as the library takes, a limited number, or copy engines."""

    DEFAULT = "default"
    LIMITED = "limited"
    COPY_ENGINE = "copy_engine"


@dataclass(frozen=True)
class SimulationOptions:
    """How to simulate.

    launch: CUDA graphs, or eager with a host lane that issues every kernel. has_contention: whether concurrent
    transfers share links (tier 3); without it a transfer takes the time it takes alone (as in tier 2). num_ctas: thread
    blocks of communication under `limited`. noise: standard deviation of each rank's speed as a share of it; with it
    the result carries an interval over `noise_samples` draws from `noise_seed`. is_periodic: whether repeating steps
    are extrapolated (exactly) or simulated one by one. before_s, after_s, per_step_s: what else is on the timeline:
    text encoders, VAE, scheduler.
    """

    launch: LaunchMode = LaunchMode.GRAPH
    has_contention: bool = True
    cta_policy: CtaPolicy = CtaPolicy.DEFAULT
    num_ctas: int = 8
    noise: float = 0.0
    noise_seed: int = 0
    noise_samples: int = 20
    is_periodic: bool = True
    before_s: float = 0.0
    after_s: float = 0.0
    per_step_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise UserError(f"noise is a share of a rank's speed, at least 0 and below 1, not {self.noise}")
        if self.noise and self.noise_samples < 2:
            raise UserError(f"an interval needs at least 2 samples of noise, not {self.noise_samples}")
        if self.num_ctas < 1:
            raise UserError(f"communication needs at least 1 thread block, not {self.num_ctas}")
        if min(self.before_s, self.after_s, self.per_step_s) < 0:
            raise UserError("the time of encoders, VAE and scheduler cannot be negative")
