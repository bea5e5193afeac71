"""Adaptive warm-up and refresh: when to spend a synchronous step, decided from how much the latent changes.

Displaced patches are good because neighbouring steps are alike; where they are not, a step is better synchronous. A
step is synchronous if it belongs to warm-up, if the latent changed by more than `max_change` since the step before
(relative RMS), or if `max_late_steps` displaced steps have passed since the last synchronous one. A synchronous step
is `fresh` for every exchange that warm-up serves fresh, and what it sends is also what the next step reads.

One rank decides and tells the others, so all ranks take the same steps, whatever their arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from distri.core.policy import Phase
from distri.errors import PlanError


@dataclass(frozen=True)
class RefreshRule:
    """When to leave the steady phase for a step. None turns a condition off."""

    max_change: float | None = None
    max_late_steps: int | None = None

    def __post_init__(self) -> None:
        if self.max_change is not None and not self.max_change >= 0:
            raise PlanError(
                f"the latent's largest change before a refresh cannot be negative: {self.max_change}"
            )
        if self.max_late_steps is not None and self.max_late_steps < 1:
            raise PlanError(f"at least 1 displaced step lies between refreshes, not {self.max_late_steps}")


class PhaseControl:
    """The phases of one image, step by step.

    >>> control = PhaseControl(1, RefreshRule(max_change=0.5))
    >>> [control.decide(step, change).value for step, change in enumerate([None, 0.9, 0.3, 0.6])]
    ['warmup', 'warmup', 'steady', 'warmup']
    """

    def __init__(self, warmup_steps: int, rule: RefreshRule | None) -> None:
        self._warmup_steps = warmup_steps
        self._rule = rule or RefreshRule()
        self._late_steps = 0

    def decide(self, step: int, change: float | None) -> Phase:
        """The phase of `step`; `change` is the latent's relative change since the step before, None at the first."""
        phase = Phase.WARMUP if step < self._warmup_steps or self._is_due(change) else Phase.STEADY
        self._late_steps = 0 if phase is Phase.WARMUP else self._late_steps + 1
        return phase

    def _is_due(self, change: float | None) -> bool:
        limit, longest = self._rule.max_change, self._rule.max_late_steps
        changed = limit is not None and (change is None or not change <= limit)
        return changed or (longest is not None and self._late_steps >= longest)
