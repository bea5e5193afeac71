"""A plan's picture beside the single device's, from the same noise: how far apart they are, and how long each took."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distri.executor import (
    Drawing,
    Progress,
    draw,
    draw_on_ranks,
    starts_ranks,
)
from distri.outputs import check_output, is_writer, save
from distri.request import RunRequest

if TYPE_CHECKING:
    from PIL.Image import Image


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


def compare(request: RunRequest, progress: Progress | None = None) -> CompareResult:
    """Draw by the plan and on one device, from the same noise, and say how far apart the two are.

    The picture that is written shows the plan's on the left, the single device's on the right.

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
        result = draw_on_ranks(dataclasses.replace(request, output=picture), progress, latent)
        with Image.open(picture) as image:
            image.load()
        return Drawing(load_file(latent)["latent"], image, result["seconds"], result["seconds_per_step"])


def _compared(request: RunRequest, planned: Drawing, alone: Drawing) -> CompareResult:
    import numpy as np

    from distri.quality import psnr_db, ssim

    assert planned.image is not None
    assert alone.image is not None
    ours, reference = (np.asarray(image.convert("RGB")) for image in (planned.image, alone.image))
    difference = (planned.latent_BCHW.float() - alone.latent_BCHW.float()).abs()
    save(side_by_side(planned.image, alone.image), request.output, is_writer())
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
