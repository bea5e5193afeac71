"""Samplers by the names that people use, made from a pipeline's own scheduler configuration."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from distri.errors import ModelError

SAMPLERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
}


def use_sampler(pipe: Any, name: str) -> None:
    """Give `pipe` this sampler.

    Raises:
        ModelError: there is none of that name.
    """
    if name not in SAMPLERS:
        raise ModelError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    pipe.scheduler = SAMPLERS[name].from_config(pipe.scheduler.config)
