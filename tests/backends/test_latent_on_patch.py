"""A latent that stays on its patches gives the very bits of the whole one, by gloo ranks whose seeds differ."""

from __future__ import annotations

import dataclasses
import os
from fractions import Fraction
from typing import Any

import pytest
import torch

from distri.config.plan import dump_plan
from distri.core.latent import LatentPlace
from distri.core.partition import SplitAxis
from distri.core.plan import ImageRequest
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.core.refresh import RefreshRule
from distri.errors import UserError
from distri.launch import run_ranks
from distri.models.presets import load_graph
from tests.backends.latent_target import draw_in_process

STEPS = 4


def request(ranks: int, policy: str = "corrected", cfg_split: bool = False, **more: Any) -> PlanRequest:
    image = ImageRequest(128, 96, more.pop("steps", STEPS))
    return PlanRequest(
        image, ranks, cfg_split, policy_table(policy), 1, dtype="float32", latent=LatentPlace.PATCH, **more
    )


def case(made: PlanRequest, **more: Any) -> dict[str, Any]:
    return {"plan": dump_plan(make_plan(made, load_graph("demo"))), **more}


def cases_for(ranks: int) -> list[tuple[PlanRequest, dict[str, Any]]]:
    if ranks == 4:
        return [
            (request(4, cfg_split=True), {"sampler": "dpm-solver++"}),
            (request(4, "fresh", cfg_split=True), {"decodes": True}),
        ]
    cases: list[tuple[PlanRequest, dict[str, Any]]] = [
        (request(ranks), {}),
        (request(ranks), {"sampler": "euler"}),
        (request(ranks), {"sampler": "dpm-solver++", "decodes": True}),
        (request(ranks, "fresh"), {}),
        (request(ranks, "naive_patch"), {}),
    ]
    if ranks == 2:
        cases += [
            (request(2, cfg_split=True), {}),
            (request(2, axis=SplitAxis.COLS, weights=(Fraction(2), Fraction(1))), {}),
            (request(2, "residual_int4", steps=7, refresh=RefreshRule(max_late_steps=2)), {}),
            (request(2, steps=6), {"steps": 3, "sampler": "euler"}),
        ]
    return cases


def by_one_thread(cases: list[dict[str, Any]], ranks: int) -> list[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    try:
        return draw_in_process(cases)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_ends_with_the_bits_of_the_plan_that_keeps_the_whole_latent(ranks: int) -> None:
    made = cases_for(ranks)
    on_patch = [case(wanted, **more) for wanted, more in made]
    whole = [case(dataclasses.replace(wanted, latent=LatentPlace.WHOLE), **more) for wanted, more in made]
    defined = by_one_thread(on_patch, ranks)
    assert defined == by_one_thread(whole, ranks)
    found = run_ranks(ranks, "tests.backends.latent_target:draw_cases", on_patch, timeout_s=120.0)
    assert [one["drawn"] for one in found] == defined
    assert len(set(defined)) == len(defined)


def test_a_pipeline_that_is_interrupted_ends_on_every_rank_and_the_rest_is_not_received() -> None:
    wanted = request(2, "fresh", steps=6)
    cases = [
        case(chosen, **more)
        for chosen in (wanted, dataclasses.replace(wanted, latent=LatentPlace.WHOLE))
        for more in ({"interrupt_after": 2}, {})
    ]
    stopped, drawn, stopped_whole, drawn_whole = run_ranks(
        2, "tests.backends.latent_target:draw_cases", cases, timeout_s=120.0
    )
    assert (stopped["steps"], drawn["steps"]) == (3, 6)
    plan = make_plan(wanted, load_graph("demo"))
    assert stopped["bytes"] == 3 * plan.bytes_received_per_step[0]
    latent = 4 * plan.model.latent_channels * plan.partition.patches[1].area
    assert drawn["bytes"] == 6 * plan.bytes_received_per_step[0] + latent
    assert stopped["bytes"] < stopped_whole["bytes"]
    assert drawn["bytes"] < drawn_whole["bytes"]


def test_a_scheduler_with_noise_of_its_own_is_refused_on_every_rank() -> None:
    with pytest.raises(
        UserError, match="EulerAncestralDiscreteScheduler, as it is set, needs the whole latent"
    ):
        run_ranks(
            2, "tests.backends.latent_target:draw_with_noise", case(request(2, steps=3)), timeout_s=60.0
        )
