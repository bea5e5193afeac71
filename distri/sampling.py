"""The scheduler's arithmetic on a rank's own patch, for plans that keep the latent there between steps.

Each step of the scheduler is given the patch of the denoiser's output and of the latent, and what it makes is put back
where it came from; its own history, of a multistep solver say, is of that patch alone. The first latent of an image is
rank 0's, and after the last step every rank has the whole latent again.

That this changes nothing is tried out, not assumed: before an image's first step, copies of the scheduler do all its
steps on a small random latent and on a part of it, and the part must come out the same to the last bit.

Shape suffixes: B batch, C channels, H rows, W columns of the whole latent, h, w those of a patch.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from distri.backends.base import Backend
from distri.core.latent import latent_exchange
from distri.core.plan import Plan
from distri.core.shape import Band, Rect
from distri.errors import PlanError
from distri.nn.conv2d import cut
from distri.ranks import put_together

TRIED_LATENT = Rect(Band(0, 16), Band(0, 13))
TRIED_PATCH = Rect(Band(5, 12), Band(0, 13))


class PatchSampler:
    """Serves `pipe.scheduler.step` until it is closed. The pipeline must call it once for each forward, as all do.

    An image that ends early, with fewer steps than the scheduler was set to, leaves each process its own patches.
    """

    def __init__(self, pipe: Any, backend: Backend) -> None:
        self._pipe, self._backend, self._plan = pipe, backend, backend.plan
        self._scheduler = pipe.scheduler
        self._step: Callable[..., Any] = self._scheduler.step
        self._signature = inspect.signature(self._step)
        self._own = own_patch(self._plan, backend.local_ranks)
        self._timesteps: object = None
        self._steps_left = 0
        self._tried: object = None
        self._scheduler.step = self._hook()

    def image_token(self) -> object:
        """What is another object for each image.

        Raises:
            PlanError: the pipeline has another scheduler by now.
        """
        if self._pipe.scheduler is not self._scheduler:
            raise PlanError(
                "the scheduler was replaced while the latent stays on its patch; replace it before distri.parallelize"
            )
        return self._scheduler.timesteps

    def close(self) -> None:
        """Give the scheduler its own step back. May be called twice."""
        vars(self._scheduler).pop("step", None)

    def _hook(self) -> Callable[..., Any]:
        """A function, not a method: whoever copies the scheduler copies no session."""

        @wraps(self._step)
        def step(*args: Any, **kwargs: Any) -> Any:
            return self.step(self._signature.bind(*args, **kwargs))

        return step

    def step(self, call: inspect.BoundArguments) -> Any:
        """One step of the scheduler: whole tensors in, whole tensors out, of which this process's patches are right.

        Raises:
            PlanError: the scheduler, or the pipeline's guidance, needs the whole latent at every step.
        """
        arguments = call.arguments
        if self._scheduler.timesteps is not self._timesteps:
            self._timesteps = self._scheduler.timesteps
            self._begin_image(arguments)
        if self._own is None:
            return self._step(*call.args, **call.kwargs)
        sample_BCHW: Tensor = arguments["sample"]
        arguments.update({name: self._patch_of(value) for name, value in arguments.items()})
        made = self._step(*call.args, **call.kwargs)
        self._steps_left -= 1
        return self._put_back(made, sample_BCHW)

    def _begin_image(self, arguments: dict[str, Any]) -> None:
        if self._plan.image.guidance and getattr(self._pipe, "guidance_rescale", 0.0) > 0.0:
            raise PlanError(
                f"guidance_rescale {self._pipe.guidance_rescale:g} needs the whole output at every step; "
                "use --latent whole"
            )
        timesteps = timesteps_from(self._scheduler.timesteps, arguments["timestep"])
        self._steps_left = min(len(timesteps), self._plan.image.num_inference_steps)
        extras = {
            name: value
            for name, value in arguments.items()
            if name not in ("timestep", "return_dict") and not isinstance(value, Tensor)
        }
        case = timesteps.tolist(), repr({**extras, "generator": None})
        if case != self._tried:
            check_elementwise(self._scheduler, timesteps, arguments, extras)
            self._tried = case
        if self._own is not None:
            arguments["sample"] = self._backend.broadcast(arguments["sample"])

    def _patch_of(self, value: Any) -> Any:
        """The own patch of a latent; anything else as it is."""
        whole = self._plan.latent
        if not isinstance(value, Tensor) or value.shape[2:] != (whole.rows.size, whole.cols.size):
            return value
        assert self._own is not None
        return cut(value, self._own, whole).contiguous()

    def _put_back(self, made: Any, sample_BCHW: Tensor) -> Any:
        """The scheduler's result with whole latents: the next one, and whatever else it says of this one."""
        if isinstance(made, tuple):
            return (self._next(made[0], sample_BCHW), *(self._among_zeros(value) for value in made[1:]))
        values = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        others = {name: self._among_zeros(value) for name, value in values.items()}
        return type(made)(**{**others, "prev_sample": self._next(made.prev_sample, sample_BCHW)})

    def _next(self, own_BChw: Tensor, sample_BCHW: Tensor) -> Tensor:
        """The next latent: this rank's patch among what was there, or, after the last step, every rank's."""
        if self._steps_left == 0:
            return self._gathered(own_BChw)
        assert self._own is not None
        next_BCHW = sample_BCHW.to(own_BChw.dtype, copy=True)
        cut(next_BCHW, self._own, self._plan.latent).copy_(own_BChw)
        return next_BCHW

    def _gathered(self, own_BChw: Tensor) -> Tensor:
        plan = self._plan
        (rank,) = self._backend.local_ranks
        last = plan.image.num_inference_steps - 1
        parts = self._backend.transport(rank).gather(latent_exchange(plan), last, own_BChw)
        branches_BCHW = put_together(dict(enumerate(parts)), plan, plan.partition.patches)
        first_BCHW, *_ = branches_BCHW.chunk(plan.mesh.cfg, dim=0)  # all branches have the same one
        return first_BCHW.contiguous()

    def _among_zeros(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() != 4:
            return value
        assert self._own is not None
        whole = self._plan.latent
        whole_BCHW = value.new_zeros((*value.shape[:2], whole.rows.size, whole.cols.size))
        cut(whole_BCHW, self._own, whole).copy_(value)
        return whole_BCHW


def own_patch(plan: Plan, local_ranks: tuple[int, ...]) -> Rect | None:
    """The patch that a process keeps the latent of; None for a process of all ranks, which has it whole."""
    if len(local_ranks) == plan.mesh.size:
        return None
    assert len(local_ranks) == 1, "a process has one rank or all of them"
    return plan.partition.patches[plan.mesh.patch_of(local_ranks[0])]


def timesteps_from(timesteps: Tensor, first: Any) -> Tensor:
    """The scheduler's timesteps from `first` on: a picture may start from another one, with fewer steps."""
    places = (timesteps == first).nonzero()
    return timesteps[int(places[0]) :] if len(places) else timesteps


def check_elementwise(
    scheduler: Any, timesteps: Tensor, like: Mapping[str, Any], extras: Mapping[str, Any]
) -> None:
    """Hold that every step on a part of a latent gives that part of what it gives on the whole, to the last bit.

    `like` has a step's `sample` and `model_output`, whose dtype, device and channels are used; `extras` are its other
    arguments.

    Raises:
        PlanError: it does not, because of thresholding or noise of its own, say.
    """
    randomly = torch.Generator().manual_seed(0)

    def random_like(value_BCHW: Tensor) -> Tensor:
        shape = (1, value_BCHW.shape[1], TRIED_LATENT.rows.size, TRIED_LATENT.cols.size)
        return torch.randn(shape, generator=randomly).to(value_BCHW)

    whole_BCHW = random_like(like["sample"]) * scheduler.init_noise_sigma
    part_BChw = _part_of(whole_BCHW)
    on_whole, on_part = _fresh_copy(scheduler), _fresh_copy(scheduler)
    for timestep in timesteps:
        output_BCHW = random_like(like["model_output"])
        whole_BCHW = _step_once(on_whole, output_BCHW, timestep, whole_BCHW, extras)
        part_BChw = _step_once(on_part, _part_of(output_BCHW), timestep, part_BChw, extras)
        if not torch.equal(_part_of(whole_BCHW), part_BChw):
            raise PlanError(
                f"{type(scheduler).__name__}, as it is set, needs the whole latent at every step; use --latent whole"
            )


def _part_of(value_BCHW: Tensor) -> Tensor:
    return cut(value_BCHW, TRIED_PATCH, TRIED_LATENT).contiguous()


def _fresh_copy(scheduler: Any) -> Any:
    """A copy with its own step, in the state that the scheduler is in."""
    bare = copy.copy(scheduler)
    vars(bare).pop("step", None)
    return copy.deepcopy(bare)


def _step_once(
    scheduler: Any, output_BCHW: Tensor, timestep: Any, sample_BCHW: Tensor, extras: Mapping[str, Any]
) -> Tensor:
    """The next latent by a copy; where noise is drawn it comes from a generator of the copy's own."""
    own = dict(extras)
    if own.get("generator") is not None:
        own["generator"] = torch.Generator(sample_BCHW.device).manual_seed(0)
    scheduler.scale_model_input(sample_BCHW, timestep)
    next_BCHW: Tensor = scheduler.step(output_BCHW, timestep, sample_BCHW, **own, return_dict=False)[0]
    return next_BCHW
