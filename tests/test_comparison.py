"""`compare`: the plan's picture on the left, the single device's on the right, and the distance between the two."""

from pathlib import Path

import numpy as np
from PIL import Image

from distri import executor
from distri.comparison import compare, single_device
from distri.core.plan import ImageRequest
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.models.presets import load_graph
from distri.request import RunRequest


def test_the_plan_s_picture_is_on_the_left_of_the_single_device_s(tmp_path: Path) -> None:
    image = ImageRequest(128, 96, 2)
    plan = make_plan(PlanRequest(image, 2, False, policy_table("local"), dtype="float32"), load_graph("demo"))
    request = RunRequest(
        "demo", plan, "a red circle", guidance_scale=3.0, backend="in_process", output=tmp_path / "both.png"
    )
    result = compare(request)
    planned, alone = (np.asarray(executor.draw(r).image) for r in (request, single_device(request)))
    both = np.asarray(Image.open(tmp_path / "both.png"))
    assert np.array_equal(both[:, :96], planned)
    assert np.array_equal(both[:, -96:], alone)
    assert not np.array_equal(planned, alone)
    assert 0 < result.mean_latent_difference < result.max_latent_difference
    assert 5 < result.psnr_db < 60
