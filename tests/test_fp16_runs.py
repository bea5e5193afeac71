"""Half precision draws no black picture: random runs of a small UNet of SDXL's kind, on four and on eight patches.

The weights are made nasty on purpose: activations with a large mean and little spread come before GroupNorms, which is
where E[x^2] - E[x]^2 in half precision goes negative. `benchmarks/fp16_no_black.py` is the long form on the demo model.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from distri.backends.in_process import InProcessBackend
from distri.core.partition import SplitAxis
from distri.core.plan import ImageRequest
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.models.load import graph_of
from distri.session import Session

MODES = ("corrected_async_gn", "stale_gn", "shifted_gn", "separate_gn", "extrapolated", "residual_int4")
STEPS = 3


def small_unet(offset: float) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
    ).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("conv_in.bias", "conv1.bias", "conv2.bias")):
                parameter += offset
    return unet.half()


@pytest.fixture(scope="module", params=[0.0, 300.0], ids=["as initialised", "large means"])
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    return small_unet(request.param)


def latents_of(unet, seed):
    """The latent after a short DDIM run from seeded noise, by whatever serves the model."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, 4, 32, 24, generator=generator).half()
    text = torch.randn(1, 5, 8, generator=generator).half()
    for timestep in scheduler.timesteps:
        guess = unet(latent, timestep, text).sample
        latent = scheduler.step(guess, timestep, latent).prev_sample
    return latent


@torch.inference_mode()
def drawn(unet, mode, ranks, axis, seed):
    image = ImageRequest(32 * 8, 24 * 8, STEPS, guidance=False)
    request = PlanRequest(image, ranks, False, policy_table(mode), 1, axis, dtype="float16")
    plan = make_plan(request, graph_of(unet, "small"))
    with Session(unet, InProcessBackend(plan, timeout_s=300.0)) as session:
        session.begin_image()
        return latents_of(unet, seed)


@cache
@torch.inference_mode()
def alone(unet, seed):
    return latents_of(unet, seed).float()


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_no_run_in_half_precision_is_black(unet, mode, ranks):
    axis = SplitAxis.GRID if mode == "extrapolated" else SplitAxis.ROWS
    single = alone(unet, ranks)
    ours = drawn(unet, mode, ranks, axis, seed=ranks).float()
    assert torch.isfinite(ours).all()
    assert 0.5 < float(ours.std() / single.std()) < 2, "a picture of one colour, or of noise"
