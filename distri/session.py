"""A plan at work on a loaded model: the ranks of this process, their threads, and the hooks on the model.

A `Session` is an object with an end: whoever opens it closes it, and the model is as it was. Two can live in one
process, on two models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from distri.backends.base import Backend
from distri.core.exchanger import Exchanger
from distri.core.policy import Phase
from distri.core.refresh import PhaseControl
from distri.errors import PlanError
from distri.models.arguments import arguments_of_rank, bind, branch_of, check_latent
from distri.models.attach import Attachment, ReplacedForward, attach_layers
from distri.nn.rank_context import RankContext, RankLocal
from distri.nn.reconstruction import Reconstruction

ImageToken = Callable[[], object]


class Session:
    """Runs every forward of `model` as `backend.plan` says, until it is closed.

    image_token: returns an object that is another one for each image (a scheduler's timesteps, say); without it, call
    `begin_image` before each image.
    """

    def __init__(self, model: nn.Module, backend: Backend, image_token: ImageToken | None = None) -> None:
        self.backend = backend
        self.plan = backend.plan
        self._ranks = RankLocal()
        self._token = image_token
        self._last_token: object = None
        self._step = -1
        self._last_BCHW: Tensor | None = None
        self._control = PhaseControl(self.plan.warmup_steps, self.plan.refresh)
        self._contexts = {rank: self._open_rank(rank) for rank in backend.local_ranks}
        self._threads = ThreadPoolExecutor(len(self._contexts), "rank") if len(self._contexts) > 1 else None
        self._attachment = Attachment()
        self._forward: Callable[..., Any] = model.forward
        try:
            if self.plan.is_attached:
                attach_layers(self._attachment, model, self.plan, self._ranks)
            self._attachment.add(model, DenoiserHook(self))
        except BaseException:
            self.close()
            raise

    def _open_rank(self, rank: int) -> RankContext:
        transport = Reconstruction(self.plan, rank, self.backend.transport(rank))
        return RankContext(Exchanger(self.plan, rank, transport))

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off the model and let the backend go. May be called twice."""
        self._attachment.remove()
        if self._threads is not None:
            self._threads.shutdown(wait=True)
        self.backend.close()

    def begin_image(self) -> None:
        """Forget everything of the last image; the next forward is step 0."""
        self._step = -1
        self._last_BCHW = None
        self._control = PhaseControl(self.plan.warmup_steps, self.plan.refresh)
        for context in self._contexts.values():
            context.begin_image()

    def denoise(self, original: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One forward of the denoiser: whole arguments in, whole result out, as the unmodified model would.

        Raises:
            PlanError: the latent is not the one planned for, or there are more steps than planned.
        """
        arguments = bind(self._forward, args, kwargs)
        check_latent(arguments["sample"], self.plan)
        self._begin_image_if_new()
        arguments["sample"] = self._begin_step(arguments["sample"])
        if self._step == 0:
            self._shared = self._share(arguments)
        arguments.update(self._shared)
        results = self._run_ranks(original, arguments)
        return self._whole(results)

    def _share(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What rank 0 has of the conditioning, on every rank: seeds and encoders are not trusted to agree."""
        names = [
            name for name in ("encoder_hidden_states", "added_cond_kwargs") if arguments.get(name) is not None
        ]
        return dict(zip(names, self.backend.broadcast([arguments[name] for name in names]), strict=True))

    def _begin_image_if_new(self) -> None:
        token = self._token() if self._token is not None else None
        if token is not self._last_token:
            self._last_token = token
            self.begin_image()

    def _begin_step(self, sample_BCHW: Tensor) -> Tensor:
        """Start a step from rank 0's latent, in the phase that rank 0 decides."""
        self._step += 1
        planned = self.plan.image.num_inference_steps
        if self._step >= planned:
            raise PlanError(
                f"the plan is for {planned} forwards of the denoiser, the pipeline runs more; "
                "plan with as many steps as the scheduler evaluates (a second-order one evaluates twice a step)"
            )
        if self.plan.refresh is None:
            latent_BCHW, phase = self.backend.broadcast(sample_BCHW), None
        else:
            change = relative_change(sample_BCHW, self._last_BCHW)
            decided = self._control.decide(self._step, change)
            latent_BCHW, name = self.backend.broadcast([sample_BCHW, decided.value])
            phase, self._last_BCHW = Phase(name), latent_BCHW
        for context in self._contexts.values():
            context.exchanger.begin_step(phase)
        return latent_BCHW

    def _run_ranks(self, original: Callable[..., Any], arguments: dict[str, Any]) -> list[Any]:
        if self._threads is None:
            (context,) = self._contexts.values()
            return [self._run_rank(context, original, arguments)]
        threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

        def task(context: RankContext) -> Any:
            torch.set_num_threads(max(1, threads // len(self._contexts)))
            try:
                with torch.set_grad_enabled(grad):
                    return self._run_rank(context, original, arguments)
            except BaseException as error:
                self.backend.abort(error)
                raise

        return _results([self._threads.submit(task, context) for context in self._contexts.values()])

    def _run_rank(self, context: RankContext, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        self._ranks.context = context
        try:
            context.latent_BCHW = branch_of(arguments["sample"], self.plan, context, "sample")
            output = original(**arguments_of_rank(arguments, self.plan, context))
            own_BCHW: Tensor = output[0]
            return output, context.exchanger.gather(own_BCHW)
        finally:
            self._ranks.context = None

    def _whole(self, results: list[Any]) -> Any:
        """Put every rank's output in its place: branches along the batch, patches by their rectangles."""
        output, parts = results[0]
        mesh, latent = self.plan.mesh, self.plan.latent
        first: Tensor = parts[0]
        shape = (first.shape[0] * mesh.cfg, first.shape[1], latent.rows.size, latent.cols.size)
        whole_BCHW = first.new_empty(shape)
        for rank, part in enumerate(parts):
            patch = self.plan.partition.patches[mesh.patch_of(rank)]
            half = whole_BCHW.chunk(mesh.cfg, dim=0)[mesh.branch_of(rank)]
            half[..., patch.rows.start : patch.rows.stop, patch.cols.start : patch.cols.stop] = part
        if isinstance(output, tuple):
            return (whole_BCHW, *output[1:])
        return type(output)(sample=whole_BCHW)


class DenoiserHook(ReplacedForward):
    """The hook on the denoiser itself."""

    def __init__(self, session: Session) -> None:
        super().__init__(lambda _, __, value: value)
        self._session = session

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called by diffusers instead of the denoiser's forward."""
        return self._session.denoise(self.fn_ref.original_forward, args, kwargs)


def relative_change(now_BCHW: Tensor, before_BCHW: Tensor | None) -> float | None:
    """RMS of the change between two latents, relative to the RMS of the first; None if there is no first."""
    if before_BCHW is None:
        return None
    change = (now_BCHW.float() - before_BCHW.float()).square().mean().sqrt()
    return float(change / before_BCHW.float().square().mean().sqrt().clamp_min(1e-12))


def _results(futures: Sequence[Future[Any]]) -> list[Any]:
    """Every result, or the first rank's own error rather than that of a rank which waited for it."""
    wait(futures, return_when=FIRST_EXCEPTION)
    wait(futures)
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise next((error for error in errors if error.__cause__ is None), errors[0])
    return [future.result() for future in futures]
