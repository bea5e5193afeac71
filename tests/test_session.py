"""Sessions on a UNet of SDXL's kind: what callers add to a forward, adapters, odd sizes, and refusals."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from distri.backends.in_process import InProcessBackend
from distri.checkpoint import ResumePoint
from distri.core.latent import LatentPlace
from distri.core.plan import ImageRequest
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.errors import ModelError, PlanError, ScheduleMismatchError
from distri.models.load import graph_of
from distri.session import Safeguards, Session

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        norm_num_groups=4,
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    ).eval()


def plan_for(unet, num_ranks, rows=32, cols=16, policy="fresh", cfg_split=False, steps=2, **more):
    image = ImageRequest(rows * 8, cols * 8, steps)
    request = PlanRequest(image, num_ranks, cfg_split, policy_table(policy), 1, dtype="float32", **more)
    return make_plan(request, graph_of(unet, "tiny"))


def arguments(plan, step=0):
    generator = torch.Generator().manual_seed(step)
    rows, cols = plan.latent.rows.size, plan.latent.cols.size
    return {
        "sample": torch.randn(2, 4, rows, cols, generator=generator),
        "timestep": torch.tensor(900.0 - step),
        "encoder_hidden_states": torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(99)),
        "added_cond_kwargs": {"text_embeds": torch.ones(2, 16), "time_ids": torch.ones(2, 6)},
    }


@torch.no_grad()
def both(unet, plan, **more):
    """(through a session, unmodified) for every step."""
    steps = range(plan.image.num_inference_steps)
    with Session(unet, InProcessBackend(plan)) as session:
        session.begin_image()
        ours = [unet(**arguments(plan, step), **more).sample for step in steps]
    return zip(ours, [unet(**arguments(plan, step), **more).sample for step in steps], strict=True)


@pytest.mark.parametrize(("rows", "cols"), [(32, 16), (31, 16), (30, 17), (29, 15)])
def test_sizes_that_are_no_multiple_of_the_upsampling_factor_are_decided_from_the_global_shape(
    unet, rows, cols
):
    for ours, theirs in both(unet, plan_for(unet, 3, rows, cols)):
        assert torch.allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("cfg_split", [False, True])
def test_controlnet_residuals_arrive_whole_and_are_cut(unet, cfg_split):
    plan = plan_for(unet, 4, cfg_split=cfg_split)
    sizes = [(16, 1), (16, 1), (16, 2), (32, 2), (32, 4), (32, 4)]
    generator = torch.Generator().manual_seed(5)
    residuals = tuple(
        torch.randn(2, channels, 32 // level, 16 // level, generator=generator) for channels, level in sizes
    )
    middle = torch.randn(2, 32, 8, 4, generator=generator)
    more = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle}
    for ours, theirs in both(unet, plan, **more):
        assert torch.allclose(ours, theirs, atol=TOLERANCE)


def test_a_residual_of_no_level_is_refused(unet):
    plan = plan_for(unet, 2)
    with pytest.raises(PlanError, match="belongs to no level"):
        list(both(unet, plan, mid_block_additional_residual=torch.zeros(2, 32, 5, 3)))


def test_a_latent_on_its_patch_gives_the_same_bits_and_no_controlnet(unet):
    whole, patch = (plan_for(unet, 3, policy="corrected", steps=4, latent=place) for place in LatentPlace)
    for (ours, _), (theirs, _) in zip(both(unet, patch), both(unet, whole), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(
        PlanError, match="a ControlNet reads the whole latent at every step; use --latent whole"
    ):
        list(both(unet, patch, mid_block_additional_residual=torch.zeros(2, 32, 8, 4)))


def test_a_latent_on_its_patch_leaves_no_output_to_keep(unet):
    plan = plan_for(unet, 2, latent=LatentPlace.PATCH)
    start = ResumePoint(1, (), None)
    with (
        Session(unet, InProcessBackend(plan)) as session,
        pytest.raises(PlanError, match="plan with --latent whole, or run without checkpoints"),
    ):
        session.guard(Safeguards(start=start))


def test_lora_layers_stay_and_take_part(unet):
    from peft import LoraConfig

    before = list(unet.state_dict())
    targets = ["to_q", "to_k", "to_v", "conv1", "conv", "conv_in", "conv_out"]
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name="look")
    keys = list(unet.state_dict())
    plain = unet.config
    assert plain is unet.config
    for ours, theirs in both(unet, plan_for(unet, 3, policy="fresh")):
        assert torch.allclose(ours, theirs, atol=TOLERANCE)
    assert list(unet.state_dict()) == keys
    unet.delete_adapters(["look"])
    unet.unload_lora()
    assert list(unet.state_dict()) == before


def test_return_dict_false_gives_a_tuple(unet):
    plan = plan_for(unet, 2)
    with torch.no_grad(), Session(unet, InProcessBackend(plan)) as session:
        session.begin_image()
        (output,) = unet(**arguments(plan), return_dict=False)
    assert output.shape == (2, 4, 32, 16)


def test_another_size_than_planned_is_refused(unet):
    plan, other = plan_for(unet, 2), plan_for(unet, 2, rows=24)
    with pytest.raises(PlanError, match="the plan is for 256x128 pixels, the pipeline draws 192x128"):
        list(both_with(unet, plan, arguments(other)))


def test_another_batch_than_planned_is_refused(unet):
    plan = plan_for(unet, 2)
    given = arguments(plan)
    single = {**given, "sample": given["sample"][:1]}
    with pytest.raises(PlanError, match=r"batch of 2 latents \(guidance on\), the pipeline has 1"):
        list(both_with(unet, plan, single))


def test_more_steps_than_planned_are_refused(unet):
    plan = plan_for(unet, 2, steps=1)
    with torch.no_grad(), Session(unet, InProcessBackend(plan)) as session:
        session.begin_image()
        unet(**arguments(plan))
        with pytest.raises(PlanError, match="the plan is for 1 forwards of the denoiser"):
            unet(**arguments(plan))


def test_a_second_session_on_one_model_is_refused(unet):
    plan = plan_for(unet, 2)
    with (
        Session(unet, InProcessBackend(plan)),
        pytest.raises(ModelError, match="attached to a distri session already"),
    ):
        Session(unet, InProcessBackend(plan))
    assert not any(hasattr(module, "_diffusers_hook") for module in unet.modules())


def test_layers_that_run_in_another_order_than_planned_are_refused(unet):
    plan = plan_for(unet, 2)
    with torch.no_grad(), Session(unet, InProcessBackend(plan, timeout_s=10)) as session:
        session.begin_image()
        unet.mid_block.resnets[0], unet.mid_block.resnets[1] = (
            unet.mid_block.resnets[1],
            unet.mid_block.resnets[0],
        )
        try:
            with pytest.raises(
                ScheduleMismatchError, match=r"ran where the plan has mid_block\.resnets\.0\.norm1"
            ):
                unet(**arguments(plan))
        finally:
            unet.mid_block.resnets[0], unet.mid_block.resnets[1] = (
                unet.mid_block.resnets[1],
                unet.mid_block.resnets[0],
            )


def both_with(unet, plan, given):
    """One step with these arguments, for refusals."""
    with torch.no_grad(), Session(unet, InProcessBackend(plan)) as session:
        session.begin_image()
        yield unet(**given)


def test_a_new_image_is_noticed_by_its_token(unet):
    plan = plan_for(unet, 2, policy="corrected", steps=2)
    tokens = [object(), object()]
    current = tokens[0]
    with torch.no_grad(), Session(unet, InProcessBackend(plan), image_token=lambda: current):
        first = [unet(**arguments(plan, step)).sample for step in range(2)]
        current = tokens[1]
        again = [unet(**arguments(plan, step)).sample for step in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
