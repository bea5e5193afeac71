"""Laws that distri keeps: functions that raise if it does not. `test_mutations.py` holds them against seeded faults."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import nn

from distri.backends.in_process import InProcessBackend
from distri.core.codec import Codec
from distri.core.latent import LatentPlace
from distri.core.partition import SplitAxis
from distri.core.verify import verify
from distri.nn import codec as codec_module
from distri.nn import group_norm
from distri.nn.codec import channels_last
from distri.nn.group_norm import merge_moments, normalise
from distri.session import Session
from tests.core.test_exchanger_machine import ExchangerMachine
from tests.nn.test_reconstruction import Ranks, largest_error, plan_of, sums_of, toy_plan_in, walk
from tests.test_oracle import expected
from tests.test_sampling import draw_on_ranks, plan_on_patch
from tests.test_sampling import expected as on_one_device
from tests.toys import ToyShape, inputs_of, run_single, toy, toy_plan

MODEL, GRAPH = toy(ToyShape(kernel=(5, 3), stride=2))
UNEVEN = (Fraction(2), Fraction(1), Fraction(3))
TIMEOUT_S = 4.0
TOLERANCE = 1e-4


@torch.no_grad()
def run(plan, images=(0,)):
    """Every step's output of several images in one session; an image is the seed of its inputs."""
    outputs = []
    with Session(MODEL, InProcessBackend(plan, timeout_s=TIMEOUT_S)) as session:
        for image in images:
            session.begin_image()
            steps = range(plan.image.num_inference_steps)
            outputs.append([MODEL(**inputs_of(plan, step, image))[0].clone() for step in steps])
    return outputs


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(one, float) - np.asarray(other, float)).max() < TOLERANCE


def plan_for(policy, **more):
    more = {"rows": 24, "cols": 12, "steps": 5, "warmup_steps": 2, "weights": UNEVEN} | more
    return toy_plan(GRAPH, more.pop("ranks", 3), policy=policy, **more)


# Laws.


def plans_can_be_trusted():
    for policy in ("corrected", "extrapolated", "no_sync", "local"):
        verify(plan_for(policy), GRAPH)


def exchanges_keep_the_contract():
    for policy in ("corrected", "no_sync", "sync_gn"):
        machine = ExchangerMachine()
        machine.open(plan_for(policy, layers_per_bucket=2))
        for _ in range(2):
            machine.teardown()
            machine.begin_a_new_image(0)
        machine.teardown()


def moments_are_those_of_the_picture():
    x = 1000 + torch.randn(2, 4, 9, 3, generator=torch.Generator().manual_seed(0))
    parts = [group_norm.centred(band, 2)[0] for band in x.split([1, 3, 5], dim=2)]
    merged = merge_moments(merge_moments(parts[0], parts[1]), parts[2])
    values = x.double().reshape(2, 2, -1)
    assert torch.allclose(merged[..., 1].double(), values.mean(-1), atol=1e-3)
    assert torch.allclose((merged[..., 2] / merged[..., 0]).double(), values.var(-1, correction=0), rtol=1e-3)


def half_precision_has_no_negative_variance():
    x = (100 + 0.01 * torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))).half()
    module = nn.GroupNorm(2, 4)
    moments = group_norm.centred(x, 2)[0]
    assert (moments[..., 2] >= 0).all()
    assert torch.allclose(normalise(x, moments, module).float(), module(x.float()), atol=0.05)


def fresh_is_the_single_device():
    for axis in (SplitAxis.ROWS, SplitAxis.GRID):
        weights = UNEVEN if axis is SplitAxis.ROWS else None
        plan = plan_for("fresh", axis=axis, weights=weights, steps=2, ranks=3 if weights else 4, cols=16)
        assert_close(run(plan)[0], run_single(MODEL, plan))


def steps_are_what_the_oracle_says():
    for policy in ("corrected", "extrapolated", "no_sync"):
        plan = plan_for(policy)
        assert_close(run(plan)[0], expected(MODEL, plan))


def a_second_image_knows_nothing_of_the_first():
    for policy in ("corrected", "extrapolated_residual_int8"):
        plan = plan_for(policy, steps=4)
        after_another = run(plan, images=(0, 1))[1]
        assert all(torch.equal(a, b) for a, b in zip(after_another, run(plan, images=(1,))[0], strict=True))


def parts_arrive_as_they_were_sent():
    for policy in ("stale", "extrapolated"):
        plan = plan_for(policy)
        driven, values = Ranks(plan), walk(1, stride=0.0)
        driven.begin_image()
        for step in range(plan.image.num_inference_steps):
            for exchange, rank, found in driven.step(lambda e, v=values: v(e, 0)):
                truth = driven.truth(exchange, values(exchange, 0), rank)
                assert largest_error(found, truth) == 0.0, (step, exchange.layer)


def integers_are_off_by_half_a_scale():
    values = torch.randn(4, 13, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [[0.1], [1], [9], [0]]
    )
    for codec in (Codec.INT8, Codec.RESIDUAL_INT4, Codec.RESIDUAL_INT2):
        decoded = codec_module.decode(codec, codec_module.encode(codec, values), 4, 13)
        levels = 2 ** (codec.bits - 1) - 1
        bound = 0.505 * values.abs().amax(1, keepdim=True) / levels
        assert ((decoded - values).abs() <= bound).all()


def packing_is_lossless():
    for bits in (2, 4, 8):
        integers = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int16).view(1, -1)
        assert torch.equal(codec_module._unpack(codec_module._pack(integers, bits), bits), integers)


def residual_errors_do_not_add_up():
    for codec in (Codec.RESIDUAL_INT8, Codec.RESIDUAL_INT4):
        plan, values = plan_of("stale", steps=16, codec=codec), walk(3)
        driven, levels = Ranks(plan), 2 ** (codec.bits - 1) - 1
        driven.begin_image()
        for step in range(plan.image.num_inference_steps):
            for exchange, rank, found in driven.step(lambda e, s=step, v=values: v(e, s)):
                seen = values(exchange, step - 1 if step >= plan.warmup_steps else step)
                truth = driven.truth(exchange, seen, rank, values(exchange, step))
                assert largest_error(found, truth) <= 1.02 / (2 * levels - 1)


def both_ends_keep_the_same_sums():
    plan = toy_plan_in(plan_of("stale", ranks=2, steps=8, codec=Codec.RESIDUAL_INT4), "float16")
    driven, values, before = Ranks(plan), walk(7, dtype=torch.float16), {}
    driven.begin_image()
    for step in range(plan.image.num_inference_steps):
        for _ in driven.step(lambda e, s=step: values(e, s)):
            pass
        for exchange in driven.exchanges if step > plan.warmup_steps else ():
            rebuilt = driven.ends[1]._rebuilt[exchange.layer][step - 1]
            assert torch.equal(channels_last(rebuilt[0]).float(), before[exchange.layer][0])
        before = {e.layer: sums_of(driven.ends[0], e) for e in driven.exchanges}


def a_latent_on_its_patch_changes_nothing():
    for policy in ("corrected", "fresh"):
        whole, patch = (run(plan_for(policy, latent=place))[0] for place in LatentPlace)
        assert all(torch.equal(a, b) for a, b in zip(patch, whole, strict=True))


def every_rank_ends_with_the_whole_latent():
    plan = plan_on_patch(2)
    (wanted,) = on_one_device(DDIMScheduler(), plan)
    assert all(torch.equal(arrived, wanted) for (arrived,) in draw_on_ranks(DDIMScheduler(), plan))


LAWS: tuple[Callable[[], None], ...] = (
    plans_can_be_trusted,
    exchanges_keep_the_contract,
    moments_are_those_of_the_picture,
    half_precision_has_no_negative_variance,
    packing_is_lossless,
    integers_are_off_by_half_a_scale,
    parts_arrive_as_they_were_sent,
    both_ends_keep_the_same_sums,
    residual_errors_do_not_add_up,
    fresh_is_the_single_device,
    steps_are_what_the_oracle_says,
    a_second_image_knows_nothing_of_the_first,
    a_latent_on_its_patch_changes_nothing,
    every_rank_ends_with_the_whole_latent,
)
"""The quick ones first."""


# Faults.
