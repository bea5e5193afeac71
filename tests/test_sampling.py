"""The scheduler on one rank's patch, held against the scheduler on the whole latent; and what it refuses.

The ranks here are threads that have one patch each, with the in-process backend's mailboxes between them, and the
denoiser is a function of each element alone.
"""

from __future__ import annotations

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distri.backends.in_process import InProcessBackend, InProcessTransport, Mailboxes
from distri.core.latent import LatentPlace
from distri.core.partition import FIXED_AXES, SplitAxis
from distri.core.plan import Plan
from distri.errors import PlanError, UserError
from distri.models.samplers import SAMPLERS
from distri.sampling import PatchSampler, timesteps_from
from tests.toys import toy, toy_plan

STEPS = 5
NEEDS_WHOLE = "as it is set, needs the whole latent at every step; use --latent whole"
_, GRAPH = toy()


class OneRank:
    """A backend whose process has one rank, as torch.distributed's; the ranks share the mail of each image."""

    name = "one rank"

    def __init__(self, plan: Plan, rank: int, mails: list[Mailboxes]) -> None:
        self.plan, self.local_ranks = plan, (rank,)
        self._mails, self._image = mails, -1

    def transport(self, rank: int) -> InProcessTransport:
        return InProcessTransport(self.plan, rank, self._mails[self._image])

    def broadcast(self, value: Any) -> Any:
        self._image += 1
        mail, key = self._mails[self._image], (0, "told", 0)
        if self.local_ranks == (0,):
            mail.put(key, 0, [value])
        return mail.get(key, 0)[0]


def plan_on_patch(num_ranks: int = 3, **more: Any) -> Plan:
    return toy_plan(GRAPH, num_ranks, **({"steps": STEPS, "latent": LatentPlace.PATCH} | more))


def first_latent(plan: Plan, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, plan.latent.rows.size, plan.latent.cols.size, generator=generator)


def denoised(sample: Tensor, step: int) -> Tensor:
    """What stands for the denoiser."""
    return torch.sin(3 * sample) + 0.1 * step


def draw(
    pipe: Any, sample: Tensor, told: Tensor | None = None, num_steps: int = STEPS, **extras: Any
) -> Tensor:
    """The loop of a pipeline; `told` is rank 0's first latent, which a session gives to the denoiser."""
    pipe.scheduler.set_timesteps(num_steps)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        seen = told if told is not None and step == 0 else sample
        scaled = pipe.scheduler.scale_model_input(seen, timestep)
        sample = pipe.scheduler.step(denoised(scaled, step), timestep, sample, **extras, return_dict=False)[0]
    return sample


def pipe_of(scheduler: Any, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(scheduler=copy.deepcopy(scheduler), **more)


def draw_on_ranks(scheduler: Any, plan: Plan, images: int = 1, **more: Any) -> list[list[Tensor]]:
    """Each rank's last latents, from noise of its own."""
    mails = [Mailboxes(timeout_s=20.0) for _ in range(images)]

    def as_rank(rank: int) -> list[Tensor]:
        pipe = pipe_of(scheduler)
        sampler = PatchSampler(pipe, OneRank(plan, rank, mails))
        try:
            return [
                draw(pipe, first_latent(plan, 10 * rank + image), first_latent(plan, image), **more)
                for image in range(images)
            ]
        finally:
            sampler.close()

    with ThreadPoolExecutor(plan.mesh.size) as threads:
        return list(threads.map(as_rank, range(plan.mesh.size)))


def expected(scheduler: Any, plan: Plan, images: int = 1, **more: Any) -> list[Tensor]:
    """The same on one device, from rank 0's noise."""
    pipe = pipe_of(scheduler)
    return [draw(pipe, first_latent(plan, image), **more) for image in range(images)]


def made(name: str) -> Any:
    return SAMPLERS[name]()


@given(
    name=st.sampled_from(list(SAMPLERS)),
    ranks=st.integers(2, 4),
    axis=st.sampled_from(FIXED_AXES),
    rows=st.integers(4, 19),
    cols=st.integers(4, 19),
)
@settings(max_examples=25, deadline=None)
def test_every_rank_ends_with_rank_0s_latent_as_the_scheduler_makes_it_on_the_whole(
    name: str, ranks: int, axis: SplitAxis, rows: int, cols: int
) -> None:
    plan = plan_on_patch(ranks, axis=axis, rows=rows, cols=cols)
    (wanted,) = expected(made(name), plan)
    for (arrived,) in draw_on_ranks(made(name), plan):
        assert torch.equal(arrived, wanted)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler(), PNDMScheduler()])
def test_schedulers_that_evaluate_twice_or_remember_do_so_on_the_patch(scheduler: Any) -> None:
    scheduler.set_timesteps(STEPS)
    plan = plan_on_patch(2, steps=len(scheduler.timesteps))
    wanted = expected(scheduler, plan, images=2)
    for arrived in draw_on_ranks(scheduler, plan, images=2):
        assert all(torch.equal(a, b) for a, b in zip(arrived, wanted, strict=True))


def test_guidance_branches_uneven_bands_and_a_second_image_with_fewer_steps() -> None:
    plan = plan_on_patch(4, cfg_split=True, weights=(Fraction(3), Fraction(1)))
    for num_steps in (STEPS, STEPS - 2):
        (wanted, again) = expected(made("euler"), plan, images=2, num_steps=num_steps)
        for arrived in draw_on_ranks(made("euler"), plan, images=2, num_steps=num_steps):
            assert torch.equal(arrived[0], wanted)
            assert torch.equal(arrived[1], again)


def steps_of_rank_1(scheduler: Any, plan: Plan) -> list[Any]:
    """Whole results of each step of rank 1 of 2, beside a rank 0 that is as far."""
    mails = [Mailboxes(timeout_s=20.0)]

    def as_rank(rank: int) -> list[Any]:
        pipe = pipe_of(scheduler)
        sampler = PatchSampler(pipe, OneRank(plan, rank, mails))
        pipe.scheduler.set_timesteps(STEPS)
        sample, found = first_latent(plan, 0), []
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            found.append(pipe.scheduler.step(denoised(sample, step), timestep, sample))
            sample = found[-1].prev_sample
        sampler.close()
        return found

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(as_rank, range(2)))[1]


def test_before_the_last_step_only_the_own_patch_changes() -> None:
    plan = plan_on_patch(2)
    own = plan.partition.patches[1].rows
    results = steps_of_rank_1(made("ddim"), plan)
    noise = first_latent(plan, 0)
    for result in results[:-1]:
        assert type(result).__name__ == "DDIMSchedulerOutput"
        assert torch.equal(result.prev_sample[..., : own.start, :], noise[..., : own.start, :])
        assert not torch.equal(result.prev_sample[..., own.start :, :], noise[..., own.start :, :])
        assert result.pred_original_sample.shape == noise.shape
        assert not result.pred_original_sample[..., : own.start, :].any()
        assert result.pred_original_sample[..., own.start :, :].all()
    assert not torch.equal(results[-1].prev_sample[..., : own.start, :], noise[..., : own.start, :])


def test_a_process_of_all_ranks_steps_on_the_whole_latent() -> None:
    plan = plan_on_patch()
    pipe = pipe_of(made("dpm-solver++"))
    PatchSampler(pipe, InProcessBackend(plan))
    assert torch.equal(draw(pipe, first_latent(plan, 0)), expected(made("dpm-solver++"), plan)[0])


def test_the_scheduler_looks_as_before_and_is_as_before() -> None:
    plan = plan_on_patch()
    pipe = pipe_of(made("ddim"))
    before = dict(vars(pipe.scheduler))
    sampler = PatchSampler(pipe, InProcessBackend(plan))
    assert "eta" in inspect.signature(pipe.scheduler.step).parameters  # pipelines look for it there
    copied = copy.deepcopy(pipe.scheduler)
    assert copied.step is pipe.scheduler.step
    sampler.close()
    sampler.close()
    assert vars(pipe.scheduler) == before


def test_a_scheduler_that_was_replaced_is_noticed() -> None:
    pipe = pipe_of(made("ddim"))
    sampler = PatchSampler(pipe, InProcessBackend(plan_on_patch()))
    assert sampler.image_token() is pipe.scheduler.timesteps
    pipe.scheduler = made("euler")
    with pytest.raises(PlanError, match="the scheduler was replaced while the latent stays on its patch"):
        sampler.image_token()


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_our_samplers_work_element_by_element(name: str, dtype: torch.dtype) -> None:
    plan = plan_on_patch()
    pipe = pipe_of(made(name))
    PatchSampler(pipe, InProcessBackend(plan))
    assert draw(pipe, first_latent(plan, 0).to(dtype), num_steps=50).isfinite().all()


THRESHOLD = {"thresholding": True, "sample_max_value": 10.0}
NOT_ELEMENTWISE = [
    (EulerAncestralDiscreteScheduler(), {}),
    (DDPMScheduler(), {}),
    (LCMScheduler(), {}),
    (DPMSolverMultistepScheduler(**THRESHOLD), {}),
    (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}),
    (DDIMScheduler(clip_sample=False, **THRESHOLD), {}),
    (DDIMScheduler(), {"eta": 1.0}),
    (EulerDiscreteScheduler(), {"s_churn": 5.0}),
]


@pytest.mark.parametrize(("scheduler", "extras"), NOT_ELEMENTWISE)
@pytest.mark.parametrize("is_seeded", [False, True])
def test_thresholding_and_noise_of_its_own_are_refused(
    scheduler: Any, extras: dict[str, Any], is_seeded: bool
) -> None:
    if is_seeded:
        extras = {**extras, "generator": torch.Generator().manual_seed(0)}
    if "generator" not in inspect.signature(scheduler.step).parameters:
        extras.pop("generator", None)
    plan = plan_on_patch()
    pipe = pipe_of(scheduler)
    PatchSampler(pipe, InProcessBackend(plan))
    with pytest.raises(PlanError, match=f"{type(scheduler).__name__}, {NEEDS_WHOLE}") as caught:
        draw(pipe, first_latent(plan, 0), **extras)
    assert isinstance(caught.value, UserError)


def test_what_a_second_image_asks_for_is_tried_again() -> None:
    plan = plan_on_patch()
    pipe = pipe_of(made("ddim"))
    PatchSampler(pipe, InProcessBackend(plan))
    draw(pipe, first_latent(plan, 0))
    with pytest.raises(PlanError, match=NEEDS_WHOLE):
        draw(pipe, first_latent(plan, 0), eta=0.5)


def test_thresholds_that_are_the_same_for_every_latent_pass() -> None:
    """With its own largest value, 1, diffusers' threshold clips each element alone."""
    plan = plan_on_patch(2)
    scheduler = DPMSolverMultistepScheduler(thresholding=True)
    (wanted,) = expected(scheduler, plan)
    assert all(torch.equal(arrived, wanted) for (arrived,) in draw_on_ranks(scheduler, plan))


def test_rescaled_guidance_is_refused_where_there_is_guidance() -> None:
    plan = plan_on_patch()
    pipe = pipe_of(made("ddim"), guidance_rescale=0.7)
    PatchSampler(pipe, InProcessBackend(plan))
    with pytest.raises(PlanError, match=r"guidance_rescale 0\.7 needs the whole output at every step; use"):
        draw(pipe, first_latent(plan, 0))


def test_a_picture_that_starts_from_another_takes_the_rest_of_the_timesteps() -> None:
    timesteps = torch.tensor([900, 700, 500, 300])
    assert timesteps_from(timesteps, timesteps[2]).tolist() == [500, 300]
    assert timesteps_from(timesteps, 900).tolist() == timesteps.tolist()
