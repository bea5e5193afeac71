"""Replayed steps are the steps: a tape stands in for a CUDA graph, and every bit and byte is that of the plain run."""

from __future__ import annotations

import pytest

from distri.backends.in_process import InProcessBackend
from distri.config.plan import dump_plan
from distri.core.latent import LatentPlace
from distri.core.plan import ImageRequest
from distri.core.planner import PlanRequest, make_plan
from distri.core.refresh import RefreshRule
from distri.launch import run_ranks
from distri.models.presets import load_graph
from distri.recorded import is_recordable
from distri.session import Session
from tests.toys import toy, toy_plan

WARMUP, STEPS = 5, 13
POLICIES = ("corrected", "fresh", "local", "separate_gn", "sync_gn", "no_sync")


def plans_for(num_ranks: int):
    _, graph = toy()
    shared = {"warmup_steps": WARMUP, "steps": STEPS}
    if num_ranks == 4:
        return [toy_plan(graph, num_ranks, cfg_split=True, latent=place, **shared) for place in LatentPlace]
    made = [toy_plan(graph, num_ranks, policy=name, **shared) for name in POLICIES]
    made += [
        toy_plan(graph, num_ranks, policy=name, latent=LatentPlace.PATCH, **shared)
        for name in ("corrected", "fresh", "no_sync")
    ]
    return [*made, toy_plan(graph, num_ranks, layers_per_bucket=2, **shared)]


def run(num_ranks: int, plans, how: str):
    arguments = {"plans": [dump_plan(plan) for plan in plans], "how": how}
    return run_ranks(num_ranks, "tests.backends.recording_target:run", arguments, timeout_s=60.0)


def assert_same_run(plans, expected, arrived):
    for plan, one, other in zip(plans, expected, arrived, strict=True):
        for what in ("digests", "bytes", "parcels"):
            assert other[what] == one[what], f"{plan.policy.name}: {what}"


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_replayed_steps_have_the_bits_and_send_the_bytes_of_plain_ones(num_ranks):
    plans = plans_for(num_ranks)
    plain, recorded = (run(num_ranks, plans, how) for how in ("plain", "recorded"))
    assert_same_run(plans, plain, recorded)
    assert {one["recordings"] for one in plain} == {0}
    assert min(one["replays"] for one in recorded) > 0


def test_where_one_rank_s_device_cannot_record_none_does_and_the_run_is_the_plain_one():
    plans = plans_for(2)[:1]
    plain, refused = (run(2, plans, how) for how in ("plain", "refused"))
    assert_same_run(plans, plain, refused)
    assert refused[0]["warned"] == [
        [f"a step cannot be recorded: {why}; steps run one operation at a time"]
        for why in ("this device records nothing", "another rank's device refused")
    ]
    assert refused[0]["replays"] == 0


def test_two_steps_of_warmup_and_two_steady_ones_are_recorded_and_all_later_ones_replayed():
    _, graph = toy()
    plan = toy_plan(graph, 2, warmup_steps=WARMUP, steps=STEPS)
    (arrived,) = run(2, [plan], "recorded")
    # Plain: 0, then 1, 2, 6 and 7 as rehearsals, 5, which is the first steady one, and 12, which sends nothing.
    # Recorded: 3, 4, 8, 9, and of the second image 5 and 12. Replayed: 10, 11, and 1 to 4 and 6 to 11.
    assert arrived["recordings"] == 4 + 2
    assert arrived["replays"] == 2 + 10


def test_a_pipeline_of_diffusers_draws_the_same_pictures_from_recorded_steps():
    request = PlanRequest(ImageRequest(128, 128, 9), 2, False, warmup_steps=3, dtype="float32")
    arguments = {"plan": dump_plan(make_plan(request, load_graph("demo")))}
    target = "tests.backends.recording_target:draw"
    plain, recorded = (
        run_ranks(2, target, {**arguments, "how": how}, timeout_s=60.0) for how in ("plain", "recorded")
    )
    assert recorded["digests"] == plain["digests"]
    assert recorded["replays"] > 0


def test_without_a_gpu_a_session_says_that_nothing_is_recorded():
    model, graph = toy()
    plan = toy_plan(graph, 2)
    with (
        pytest.warns(RuntimeWarning, match="no CUDA graphs: backend 'in_process' has no GPU of its own"),
        Session(model, InProcessBackend(plan), records=True),
    ):
        pass


@pytest.mark.parametrize(
    ("policy", "can"),
    [
        ("corrected", True),
        ("fresh", True),
        ("shifted_gn", False),
        ("extrapolated", False),
        ("int8", False),
        ("partial", False),
    ],
)
def test_plans_that_keep_values_on_the_host_are_not_recorded(policy, can):
    _, graph = toy()
    assert is_recordable(toy_plan(graph, 2, policy=policy)) is can


def test_plans_that_decide_refreshes_are_not_recorded():
    _, graph = toy()
    assert not is_recordable(toy_plan(graph, 2, refresh=RefreshRule(max_late_steps=2)))
