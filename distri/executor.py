"""Run a plan from a request to a picture: load the model, place the ranks, draw, write.

`run` starts the ranks itself, or takes its place among those that torchrun started.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distri.core.latent import KEEPS_CHECKPOINTS
from distri.errors import PlanError, RunError, UserError
from distri.outputs import (
    check_directory,
    check_output,
    is_writer,
    remove_unfinished,
    save,
    save_latent,
    write_whole,
)
from distri.precautions import find_start, forget_checkpoint, take_precautions
from distri.request import RunRequest, request_from_json, request_to_json

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from distri.session import Session

Progress = Callable[[int, int], None]
RANK_BODY = "distri.executor:run_as_rank"


@dataclass(frozen=True)
class RunResult:
    """One picture. `seconds` covers the denoising steps and the decoding, not loading."""

    image: Path | None
    seconds: float
    seconds_per_step: float
    ranks: int
    backend: str


@dataclass(frozen=True)
class Drawing:
    """What a drawing rank has in the end: the final latent (1, C, H, W), the picture if it decoded, and the time."""

    latent_BCHW: Tensor
    image: Image | None
    seconds: float
    seconds_per_step: float


def run(request: RunRequest, progress: Progress | None = None) -> RunResult:
    """Draw one picture and write it to `request.output`.

    Raises:
        UserError: the model, plan or output is unusable.
        RunError: a rank failed.
    """
    check_output(request.output)
    check_trace(request)
    if request.plan.keeps_latent_on_patch and (request.checkpoint_every or request.resume is not None):
        raise PlanError(KEEPS_CHECKPOINTS)
    find_start(request)
    if starts_ranks(request):
        try:
            result = draw_on_ranks(request, progress)
        finally:
            remove_unfinished(request.output)
    else:
        drawing = draw(request, progress, decodes=is_writer())
        save(drawing.image, request.output, is_writer())
        result = {"seconds": drawing.seconds, "seconds_per_step": drawing.seconds_per_step}
    if is_writer():
        forget_checkpoint(request)
    return RunResult(
        request.output, result["seconds"], result["seconds_per_step"], request.plan.mesh.size, request.backend
    )


def check_trace(request: RunRequest) -> None:
    """Hold that there will be something to trace, and a place for it.

    Raises:
        UserError: the ranks are not processes of their own.
        OutputError: the place is not writable.
    """
    if request.trace is None:
        return
    check_directory(request.trace)
    if request.backend != "torch" or request.plan.mesh.size == 1:
        raise UserError(
            "--trace shows ranks that are processes of their own: --backend torch, two ranks or more; "
            "a prediction's is written by distri simulate --trace"
        )


def starts_ranks(request: RunRequest) -> bool:
    """Whether this process must start the ranks, rather than be one of them or run all of them."""
    return request.backend == "torch" and request.plan.mesh.size > 1 and "RANK" not in os.environ


def draw(request: RunRequest, progress: Progress | None = None, decodes: bool = True) -> Drawing:
    """Draw in this process, as all ranks or as one of them; without decoding, the picture is None."""
    from distri.models.compiling import compile_regions
    from distri.models.load import load_pipeline
    from distri.pipeline import open_backend, parallelize

    use_threads(request.plan.mesh.size)
    pipe = place(load_pipeline(request.model, request.plan.dtype))
    if request.compiler is not None:
        compile_regions(pipe.unet, request.plan, request.compiler)
    name = request.backend if request.plan.mesh.size > 1 else "in_process"
    backend = open_backend(name, request.plan, pipe.unet.device, request.timeout_s)
    splits = decodes_in_patches(request, pipe)
    if request.tiles_decoder:
        pipe.vae.enable_tiling()
    with (
        one_sentence_for_lack_of_memory(),
        parallelize(
            pipe, request.plan, backend, splits_decoder=splits, cuda_graphs=request.cuda_graphs
        ) as session,
    ):
        take_precautions(session, pipe, request)
        text = encode_text(session, pipe, request)
        has_part = splits and request.backend == "torch"  # every process decodes its patch
        with traced(session, pipe, request, progress) as following:
            return call_pipeline(pipe, request, text, following, decodes or has_part)


@contextmanager
def traced(
    session: Session, pipe: Any, request: RunRequest, progress: Progress | None
) -> Iterator[Progress | None]:
    """Trace the run inside, if it is asked for: what comes out is to be told of its progress.

    Raises:
        OutputError: the trace cannot be written.
    """
    if request.trace is None:
        yield progress
        return
    from distri.tracing import RunTracer

    path = request.trace
    with RunTracer(pipe.unet, session.backend) as tracer:
        yield tracer.following(progress)
    text = tracer.together(f"{request.plan.model.name}, {request.plan.policy.name}, as it ran")
    if text is not None:
        write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def decodes_in_patches(request: RunRequest, pipe: Any) -> bool:
    """Whether every rank decodes a patch of the picture, rather than rank 0 the whole: what can be split is."""
    from distri.models.vae import is_autoencoder

    return (
        request.backend in ("torch", "in_process") and not request.tiles_decoder and is_autoencoder(pipe.vae)
    )


def place(pipe: Any) -> Any:
    """The pipeline on this rank's GPU, convolutions channels-last; on the CPU where there is none.

    Raises:
        UserError: there are fewer GPUs on this host than ranks.
    """
    import torch

    if not torch.cuda.is_available():
        return pipe
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"local rank {local} needs GPU {local}, but this host has {count}; start fewer ranks, "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    torch.cuda.set_device(local)
    pipe.to(torch.device("cuda", local))
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    return pipe


@contextmanager
def one_sentence_for_lack_of_memory() -> Iterator[None]:
    """Turn what torch says at length when memory runs out into a `RunError`."""
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        said = str(error).strip().splitlines()
        raise RunError(f"{type(error).__name__}: {said[0]}" if said else type(error).__name__) from error


def use_threads(num_ranks: int) -> None:
    """Share the cores among the ranks: kernels give the same bits only with the same number of threads."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))


TEXT_ARGUMENTS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


def encode_text(session: Session, pipe: Any, request: RunRequest) -> dict[str, Any]:
    """The text as the pipeline takes it: encoded by rank 0, once, for pipelines of SDXL's kind; else the words."""
    import torch

    if getattr(pipe, "text_encoder_2", None) is None:
        return {"prompt": request.prompt, "negative_prompt": request.negative_prompt or None}
    encoded = None
    if 0 in session.backend.local_ranks:
        with torch.inference_mode():
            encoded = list(
                pipe.encode_prompt(
                    prompt=request.prompt,
                    negative_prompt=request.negative_prompt or None,
                    device=pipe.unet.device,
                    num_images_per_prompt=1,  # the pipeline repeats them itself
                    do_classifier_free_guidance=request.plan.image.guidance,
                )
            )
    return dict(zip(TEXT_ARGUMENTS, session.backend.broadcast(encoded), strict=True))


def call_pipeline(
    pipe: Any,
    request: RunRequest,
    text: dict[str, Any],
    progress: Progress | None = None,
    decodes: bool = True,
) -> Drawing:
    """The pipeline's own `__call__`, from seeded noise on the CPU; the latent is kept before it is decoded."""
    import torch

    image = request.plan.image
    steps = image.num_inference_steps
    kept: dict[str, Tensor] = {}
    times: list[float] = []

    def on_step_end(_: Any, step: int, __: Any, state: dict[str, Any]) -> dict[str, Any]:
        times.append(time.perf_counter())
        kept["latent"] = state["latents"]
        if progress is not None:
            progress(step + 1, steps)
        return state

    start = time.perf_counter()
    with torch.inference_mode():
        result = pipe(
            **text,
            height=image.height,
            width=image.width,
            num_inference_steps=steps,
            guidance_scale=request.guidance_scale if image.guidance else 1.0,
            num_images_per_prompt=image.num_images,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            callback_on_step_end=on_step_end,
            output_type="pil" if decodes else "latent",
        )
    seconds = time.perf_counter() - start
    return Drawing(
        kept["latent"], result.images[0] if decodes else None, seconds, _seconds_per_step(start, times)
    )


def _seconds_per_step(start: float, times: list[float]) -> float:
    """Median time from one step's end to the next's; the first step's includes the text encoders."""
    import statistics

    edges = [start, *times]
    gaps = [after - before for before, after in pairwise(edges)]
    return statistics.median(gaps[1:] or gaps)


def draw_on_ranks(
    request: RunRequest, progress: Progress | None, latent: Path | None = None
) -> dict[str, Any]:
    """Start the ranks and have them draw; the final latent goes to `latent`, as safetensors. What rank 0 says of it.

    Raises:
        UserError, RunError: as `distri.launch.run_ranks`.
    """
    from distri.launch import run_ranks

    result: dict[str, Any] = run_ranks(
        request.plan.mesh.size,
        RANK_BODY,
        {**request_to_json(request), "latent": str(latent) if latent is not None else None},
        timeout_s=request.timeout_s,
        on_progress=progress,
    )
    return result


def run_as_rank(arguments: dict[str, Any], progress: Progress | None = None) -> dict[str, Any]:
    """The body of one started rank."""
    request = request_from_json(arguments)
    drawing = draw(request, progress, decodes=is_writer())
    save(drawing.image, request.output, is_writer())
    if arguments.get("latent") and is_writer():
        save_latent(drawing.latent_BCHW, Path(arguments["latent"]))
    return {"seconds": drawing.seconds, "seconds_per_step": drawing.seconds_per_step}
