"""A plan at work on a loaded model: the ranks of this process, their threads, and the hooks on the model.

A `Session` is an object with an end: whoever opens it closes it, and the model is as it was. Two can live in one
process, on two models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from distri.backends.base import Backend
from distri.checkpoint import CheckpointWriter, ResumePoint
from distri.core.exchanger import Exchanger, Transport
from distri.core.latent import KEEPS_CHECKPOINTS
from distri.core.policy import Phase, Policy
from distri.core.refresh import PhaseControl
from distri.core.traffic import output_ranks
from distri.errors import PlanError, RunError
from distri.models.arguments import arguments_of_rank, bind, branch_of, check_latent, check_residuals
from distri.models.attach import Attachment, ReplacedForward, attach_layers
from distri.models.weights import denoiser_output
from distri.nn.finite import FiniteCheck
from distri.nn.rank_context import RankContext
from distri.nn.reconstruction import Reconstruction
from distri.nn.resumable import Resumable
from distri.ranks import LocalRanks, put_together
from distri.recorded import RecordedSteps, is_recordable

ImageToken = Callable[[], object]


@dataclass(frozen=True)
class Safeguards:
    """What a session does against faults, for its first image.

    writer: records each step. start: where the image goes on. check_finite: look for NaN once in so many steps, or
    never if 0.
    """

    writer: CheckpointWriter | None = None
    start: ResumePoint | None = None
    check_finite: int = 0

    @property
    def first_step(self) -> int:
        """The first step that really runs."""
        return self.start.step if self.start is not None else 0


class Session:
    """Runs every forward of `model` as `backend.plan` says, until it is closed.

    image_token: returns an object that is another one for each image (a scheduler's timesteps, say); without it, call
    `begin_image` before each image. records: steps that repeat are recorded and replayed, as CUDA graphs, where backend
    and plan can; where they cannot, a warning says why. num_synchronous_steps: of the present image, so far, those of
    warm-up and those spent on refreshes.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        image_token: ImageToken | None = None,
        records: bool = False,
    ) -> None:
        self.backend = backend
        self.plan = backend.plan
        self._token = image_token
        self._last_token: object = None
        self._step = -1
        self._last_BCHW: Tensor | None = None
        self._latent_dtype = torch.float32
        self._control = PhaseControl(self.plan.warmup_steps, self.plan.refresh)
        self._guards = Safeguards()
        self._num_images = 0
        self.num_synchronous_steps = 0
        self._resumables: dict[int, Resumable] = {}
        self._recorded = self._open_recorder() if records else None
        self._ranks = LocalRanks(backend, self._open_ranks())
        self._attachment = Attachment()
        self._callbacks = ExitStack()
        self._forward: Callable[..., Any] = model.forward
        try:
            if self.plan.is_attached:
                attach_layers(self._attachment, model, self.plan, self._ranks.local)
            self._attachment.add(model, DenoiserHook(self))
        except BaseException:
            self.close()
            raise

    def _open_ranks(self) -> dict[int, RankContext]:
        return {rank: self._open_rank(rank) for rank in self.backend.local_ranks}

    def _open_rank(self, rank: int) -> RankContext:
        inner = self.backend.transport(rank)
        guards = self._guards
        transport: Transport[Tensor]
        if guards.writer is None and guards.start is None:
            transport = Reconstruction(self.plan, rank, inner)
        else:
            transport = self._resumables[rank] = Resumable(self.plan, rank, inner)
        if guards.check_finite:
            transport = FiniteCheck(rank, guards.check_finite, transport)
        return RankContext(Exchanger(self.plan, rank, transport))

    def _open_recorder(self) -> RecordedSteps | None:
        recorder = self.backend.recorder()
        if recorder is not None and is_recordable(self.plan):
            return RecordedSteps(self.plan, recorder)
        why = (
            f"policy {self.plan.policy.name!r} keeps values on the host, or refreshes"
            if recorder is not None
            else f"backend {self.backend.name!r} has no GPU of its own for a rank here"
        )
        warnings.warn(
            f"no CUDA graphs: {why}; steps run one operation at a time", RuntimeWarning, stacklevel=3
        )
        return None

    def guard(self, guards: Safeguards) -> None:
        """Take these precautions; called before the first forward.

        Raises:
            PlanError: the plan's policy cannot go on from there, or no rank has the whole output to keep.
        """
        assert self._num_images == 0, "precautions are taken before the first image"
        if self.plan.keeps_latent_on_patch and (guards.writer is not None or guards.start is not None):
            raise PlanError(KEEPS_CHECKPOINTS)
        start = guards.start
        is_among_others = start is not None and start.held is None and start.step >= self.plan.warmup_steps
        reads_long_past = any(e.steady is Policy.FROZEN or e.reach is not None for e in self.plan.exchanges)
        if is_among_others and reads_long_past and guards.first_step < self._planned:
            raise PlanError(
                f"policy {self.plan.policy.name!r} reads values of steps long past, which other ranks do not have; "
                "resume on the same ranks, or draw from the beginning"
            )
        self._guards = guards
        self._ranks.contexts = self._open_ranks()
        if self._recorded is not None and (guards.writer or guards.start or guards.check_finite):
            self._recorded = None
            what = "checkpoints and looks for NaN need the host at every step"
            warnings.warn(f"no CUDA graphs: {what}", RuntimeWarning, stacklevel=2)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Hold that these facts are the same on every rank.

        Raises:
            RunError: this rank differs from rank 0.
        """
        theirs: dict[str, str] = self.backend.broadcast(dict(facts))
        for name, ours in facts.items():
            if theirs.get(name) != ours:
                raise RunError(
                    f"the ranks do not agree on the {name}: rank 0 has {theirs.get(name)}, "
                    f"rank {self.backend.local_ranks[0]} has {ours}; start all ranks with the same"
                )

    @property
    def _planned(self) -> int:
        return self.plan.image.num_inference_steps

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.backend.abort(error)
        self.close()

    def close(self) -> None:
        """Take the hooks off the model and let the backend go. May be called twice."""
        self._attachment.remove()
        self._callbacks.close()
        self._ranks.close()
        self.backend.close()

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call this when the session is closed, before its backend is."""
        self._callbacks.callback(callback)

    def begin_image(self) -> None:
        """Forget everything of the last image; the next forward is step 0."""
        self._step = -1
        self._last_BCHW = None
        self._num_images += 1
        self.num_synchronous_steps = 0
        self._control = PhaseControl(self.plan.warmup_steps, self.plan.refresh)
        for context in self._ranks.contexts.values():
            context.begin_image()
        if self._recorded is not None:
            self._recorded.begin_image()

    def denoise(self, original: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One forward of the denoiser: whole arguments in, whole result out, as the unmodified model would.

        Where the plan keeps the latent on its patch, only this process's patches are right, in both.

        Raises:
            PlanError: the latent is not the one planned for, or there are more steps than planned.
        """
        arguments = bind(self._forward, args, kwargs)
        check_latent(arguments["sample"], self.plan)
        check_residuals(arguments, self.plan)
        self._begin_image_if_new()
        arguments["sample"] = self._begin_step(arguments["sample"])
        if self._step == 0:
            self._shared = self._share(arguments)
        arguments.update(self._shared)
        if self._is_guarded and self._step < self._guards.first_step:
            return self._replay(arguments)
        if self._recorded is not None:
            arguments = self._recorded.hold(arguments)
        whole = self._whole(self._ranks.run(lambda context: self._run_rank(context, original, arguments)))
        if self._is_guarded and self._guards.writer is not None:
            self._record(self._guards.writer, whole)
        return whole

    @property
    def _is_guarded(self) -> bool:
        return self._num_images == 1

    def _replay(self, arguments: Mapping[str, Any]) -> Any:
        """The output of a step that was completed before the fault."""
        assert self._guards.start is not None
        sample_BCHW: Tensor = arguments["sample"]
        output_BCHW = self._guards.start.outputs[self._step].to(sample_BCHW.device)
        return denoiser_output(output_BCHW, arguments.get("return_dict", True))

    def _record(self, writer: CheckpointWriter, whole: Any) -> None:
        held = {rank: partial(kept.held, self._step + 1) for rank, kept in self._resumables.items()}
        writer.step_done(self._step, whole[0], held)

    def _first_phase(self, phase: Phase | None) -> Phase | None:
        """The phase of the first step after a fault; without the versions that the ranks held it is a fresh one."""
        start = self._guards.start
        if not self._is_guarded or start is None or self._step != start.step or self._step == 0:
            return phase
        return Phase.WARMUP if start.held is None else phase

    def _restore(self, device: torch.device) -> None:
        start = self._guards.start
        if self._is_guarded and start is not None and start.held is not None and self._step == start.step:
            for rank, kept in self._resumables.items():
                kept.restore(start.step, start.held(rank), device)

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
        """Start a step from rank 0's latent, in the phase that rank 0 decides.

        Where the latent stays on its patch that holds for the first step: later ones go on from what the ranks have, in
        phases that follow from the plan alone.
        """
        self._step += 1
        if self._step >= self._planned:
            raise PlanError(
                f"the plan is for {self._planned} forwards of the denoiser, the pipeline runs more; "
                "plan with as many steps as the scheduler evaluates (a second-order one evaluates twice a step)"
            )
        latent_BCHW: Tensor
        phase: Phase | None = None
        if self._step and self.plan.keeps_latent_on_patch:
            latent_BCHW = sample_BCHW
            phase = self._control.decide(self._step, None)
        elif self.plan.refresh is None and self._step > 0:
            latent_BCHW = self.backend.broadcast_like(sample_BCHW.to(self._latent_dtype))
        elif self.plan.refresh is None:
            latent_BCHW = self.backend.broadcast(sample_BCHW)
            self._latent_dtype = latent_BCHW.dtype
        else:
            change = relative_change(sample_BCHW, self._last_BCHW)
            decided = self._control.decide(self._step, change)
            latent_BCHW, name = self.backend.broadcast([sample_BCHW, decided.value])
            phase, self._last_BCHW = Phase(name), latent_BCHW
        for context in self._ranks.contexts.values():
            context.exchanger.begin_step(self._first_phase(phase))
        phases = {context.exchanger.phase for context in self._ranks.contexts.values()}
        self.num_synchronous_steps += Phase.WARMUP in phases
        self._restore(latent_BCHW.device)
        return latent_BCHW

    def _run_rank(self, context: RankContext, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        work = partial(self._forward_rank, context, original, arguments)
        output = work() if self._recorded is None else self._recorded.run(context, work)
        own_BCHW: Tensor = output[0]
        return output, context.exchanger.gather(own_BCHW)

    def _forward_rank(
        self, context: RankContext, original: Callable[..., Any], arguments: dict[str, Any]
    ) -> Any:
        context.latent_BCHW = branch_of(arguments["sample"], self.plan, context, "sample")
        return original(**arguments_of_rank(arguments, self.plan, context))

    def _whole(self, results: list[Any]) -> Any:
        """Every output that reached a rank of this process in its place, in the form that the model gave it."""
        output, _ = results[0]
        parts: dict[int, Tensor] = {}
        for rank, (_, arrived) in zip(self.backend.local_ranks, results, strict=True):
            sources = output_ranks(self.plan.mesh, self.plan.exchanges[-1], rank)
            parts.update(zip(sources, arrived, strict=True))
        whole_BCHW = put_together(parts, self.plan, self.plan.partition.at_step(self._step))
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
