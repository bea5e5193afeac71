"""What a run does against faults: where it resumes, what it keeps for the next one, and that its ranks are alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distri.errors import CheckpointError
from distri.outputs import is_writer
from distri.request import RunRequest

if TYPE_CHECKING:
    from distri.checkpoint import ResumePoint, RunIdentity
    from distri.session import Session


def take_precautions(session: Session, pipe: Any, request: RunRequest) -> None:
    """Compare the ranks' weights, and set up what the request asks for against faults.

    Raises:
        CheckpointError: the checkpoint to resume from is damaged or of another run.
        RunError: the ranks differ.
    """
    from distri.checkpoint import CheckpointDirectory, CheckpointWriter
    from distri.models.weights import weights_digest
    from distri.session import Safeguards

    weights = weights_digest(pipe.unet)
    start = find_start(request, weights)
    session.agree({"weights": weights, "point to resume from": start.summary if start else "the beginning"})
    writer = None
    if request.checkpoint_every and request.checkpoint is not None:
        identity = identity_of(request).with_weights(weights)
        target = CheckpointDirectory(request.checkpoint, identity, request.plan)
        if is_writer():
            target.clear(after=start.step if start is not None else -1)
        writer = CheckpointWriter(target, request.checkpoint_every, start)
    session.guard(Safeguards(writer, start, request.check_finite))


def identity_of(request: RunRequest) -> RunIdentity:
    """What a checkpoint of this run says of it."""
    from distri.checkpoint import RunIdentity

    return RunIdentity.of(
        request.plan, request.prompt, request.negative_prompt, request.seed, request.guidance_scale
    )


def find_start(request: RunRequest, weights: str = "") -> ResumePoint | None:
    """Where the run goes on: from the checkpoint asked for, or from the run's own if it may and there is one.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another run.
    """
    from distri.checkpoint import CheckpointDirectory, directory_of

    source, last_step = request.resume, None
    if source is not None:
        source, last_step = directory_of(source)
    elif request.may_resume:
        source = request.checkpoint
    if source is None:
        return None
    found = CheckpointDirectory(source, identity_of(request).with_weights(weights), request.plan).find(
        last_step
    )
    if found is None and request.resume is not None:
        raise CheckpointError(f"{request.resume}: there is no checkpoint of a completed step")
    return found


def forget_checkpoint(request: RunRequest) -> None:
    """Remove the checkpoint of a run that is done."""
    from distri.checkpoint import CheckpointDirectory

    if request.checkpoint_every and request.checkpoint is not None:
        CheckpointDirectory(request.checkpoint, identity_of(request), request.plan).clear()
