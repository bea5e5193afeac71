"""Run a plan from a request to a picture: load the model, place the ranks, draw, write.

`run` starts the ranks itself (or takes its place among those that torchrun started), `compare` draws the same picture
once more on one device from the same noise.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distri.core.plan import Plan
from distri.errors import OutputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RunRequest:
    """What to draw, by which plan, on which backend."""

    model: str
    plan: Plan
    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    guidance_scale: float = 5.0
    backend: str = "torch"
    output: Path | None = None
    timeout_s: float = 60.0


@dataclass(frozen=True)
class RunResult:
    """One picture. `seconds` covers the denoising steps and the decoding, not loading."""

    image: Path | None
    seconds: float
    seconds_per_step: float
    ranks: int
    backend: str


@dataclass(frozen=True)
class CompareResult:
    """A plan's picture beside the single device's, from the same noise. Differences are of the final latent."""

    image: Path | None
    psnr_db: float
    ssim: float
    max_latent_difference: float
    mean_latent_difference: float
    seconds: float
    single_seconds: float


@dataclass(frozen=True)
class Drawing:
    """What a drawing rank has in the end: the final latent (1, C, H, W), the picture, and the time."""

    latent_BCHW: Tensor
    image: Image
    seconds: float
    seconds_per_step: float


def run(request: RunRequest, progress: Progress | None = None) -> RunResult:
    """Draw one picture and write it to `request.output`.

    Raises:
        UserError: the model, plan or output is unusable.
        RunError: a rank failed.
    """
    check_output(request.output)
    if starts_ranks(request):
        result = _on_ranks(request, progress)
    else:
        drawing = draw(request, progress)
        save(drawing.image, request.output, is_writer())
        result = {"seconds": drawing.seconds, "seconds_per_step": drawing.seconds_per_step}
    return RunResult(
        request.output, result["seconds"], result["seconds_per_step"], request.plan.mesh.size, request.backend
    )


def starts_ranks(request: RunRequest) -> bool:
    """Whether this process must start the ranks, rather than be one of them or run all of them."""
    return request.backend == "torch" and request.plan.mesh.size > 1 and "RANK" not in os.environ


def is_writer() -> bool:
    """Whether this process is the one that writes results: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def draw(request: RunRequest, progress: Progress | None = None) -> Drawing:
    """Draw in this process, as all ranks or as one of them."""
    from distri.models.load import load_pipeline
    from distri.pipeline import open_backend, parallelize

    use_threads(request.plan.mesh.size)
    pipe = load_pipeline(request.model, request.plan.dtype)
    name = request.backend if request.plan.mesh.size > 1 else "in_process"
    backend = open_backend(name, request.plan, pipe.unet.device, request.timeout_s)
    with parallelize(pipe, request.plan, backend):
        return call_pipeline(pipe, request, progress)


def use_threads(num_ranks: int) -> None:
    """Share the cores among the ranks: kernels give the same bits only with the same number of threads."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))


def call_pipeline(pipe: Any, request: RunRequest, progress: Progress | None = None) -> Drawing:
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
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or None,
            height=image.height,
            width=image.width,
            num_inference_steps=steps,
            guidance_scale=request.guidance_scale if image.guidance else 1.0,
            num_images_per_prompt=image.num_images,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            callback_on_step_end=on_step_end,
        )
    seconds = time.perf_counter() - start
    return Drawing(kept["latent"], result.images[0], seconds, _seconds_per_step(start, times))


def _seconds_per_step(start: float, times: list[float]) -> float:
    """Median time from one step's end to the next's; the first step's includes the text encoders."""
    import statistics

    edges = [start, *times]
    gaps = [after - before for before, after in pairwise(edges)]
    return statistics.median(gaps[1:] or gaps)


def compare(request: RunRequest, progress: Progress | None = None) -> CompareResult:
    """Draw by the plan and on one device, from the same noise, and say how far apart the two are.

    The picture that is written shows the single device's on the left, the plan's on the right.

    Raises:
        UserError: the model, plan or output is unusable.
        RunError: a rank failed.
    """
    check_output(request.output)
    single = single_device(request)
    planned = draw_anywhere(request, progress)
    alone = draw(single, progress)
    return _compared(request, planned, alone)


def single_device(request: RunRequest) -> RunRequest:
    """The same picture on one device, with the unmodified model."""
    from distri.core.planner import PlanRequest, make_plan
    from distri.models.presets import load_graph

    plan = request.plan
    alone = make_plan(
        PlanRequest(plan.image, 1, cfg_split=False, dtype=plan.dtype, warmup_steps=1),
        load_graph(request.model),
    )
    return dataclasses.replace(request, plan=alone, backend="in_process", output=None)


def draw_anywhere(request: RunRequest, progress: Progress | None = None) -> Drawing:
    """Draw in this process or on ranks that it starts; the drawing comes back either way."""
    import tempfile

    from PIL import Image
    from safetensors.torch import load_file

    if not starts_ranks(request):
        return draw(request, progress)
    with tempfile.TemporaryDirectory() as folder:
        picture, latent = Path(folder) / "picture.png", Path(folder) / "latent.safetensors"
        result = _on_ranks(dataclasses.replace(request, output=picture), progress, latent)
        with Image.open(picture) as image:
            image.load()
        return Drawing(load_file(latent)["latent"], image, result["seconds"], result["seconds_per_step"])


def _compared(request: RunRequest, planned: Drawing, alone: Drawing) -> CompareResult:
    import numpy as np

    from distri.quality import psnr_db, ssim

    ours, reference = (np.asarray(drawing.image.convert("RGB")) for drawing in (planned, alone))
    difference = (planned.latent_BCHW.float() - alone.latent_BCHW.float()).abs()
    save(side_by_side(alone.image, planned.image), request.output, is_writer())
    return CompareResult(
        request.output,
        psnr_db(ours, reference),
        ssim(ours, reference),
        float(difference.max()),
        float(difference.mean()),
        planned.seconds,
        alone.seconds,
    )


def side_by_side(left: Image, right: Image, gap: int = 8) -> Image:
    """Two pictures of one size beside each other."""
    import PIL.Image

    sheet = PIL.Image.new("RGB", (left.width + gap + right.width, left.height), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + gap, 0))
    return sheet


def _on_ranks(request: RunRequest, progress: Progress | None, latent: Path | None = None) -> dict[str, Any]:
    from distri.launch import run_ranks

    result: dict[str, Any] = run_ranks(
        request.plan.mesh.size,
        "distri.executor:run_as_rank",
        {**request_to_json(request), "latent": str(latent) if latent is not None else None},
        timeout_s=request.timeout_s,
        on_progress=progress,
    )
    return result


def run_as_rank(arguments: dict[str, Any], progress: Progress | None = None) -> dict[str, Any]:
    """The body of one started rank."""
    request = request_from_json(arguments)
    drawing = draw(request, progress)
    save(drawing.image, request.output, is_writer())
    if arguments.get("latent") and is_writer():
        _save_latent(drawing.latent_BCHW, Path(arguments["latent"]))
    return {"seconds": drawing.seconds, "seconds_per_step": drawing.seconds_per_step}


def request_to_json(request: RunRequest) -> dict[str, Any]:
    """A request as plain JSON values; `request_from_json` is its inverse."""
    from distri.config.plan import dump_plan

    body = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    body["plan"] = dump_plan(request.plan)
    body["output"] = str(request.output) if request.output is not None else None
    return body


def request_from_json(body: dict[str, Any]) -> RunRequest:
    """A request, its plan verified again."""
    import json

    from distri.config.plan import parse_plan

    names = {field.name for field in dataclasses.fields(RunRequest)}
    values = {name: value for name, value in body.items() if name in names}
    values["plan"] = parse_plan(json.dumps(body["plan"]))
    values["output"] = Path(body["output"]) if body["output"] is not None else None
    return RunRequest(**values)


def check_output(path: Path | None) -> None:
    """Hold that a result can be written, before anything is loaded.

    Raises:
        OutputError: the directory does not exist or is not writable, or the path is a directory.
    """
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; name a file")
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise OutputError(f"{path}: pictures are written as .png, .jpg or .webp")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the directory {path.parent} is not writable")


def save(image: Image, path: Path | None, writer: bool = True) -> None:
    """Write a picture whole or not at all.

    Raises:
        OutputError: the file system refuses.
    """
    if path is None or not writer:
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        image.save(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _save_latent(latent_BCHW: Tensor, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"latent": latent_BCHW.float().contiguous()}, path)
