"""One plan means the same on every backend: gloo ranks give the very bits that the in-process definition gives."""

from __future__ import annotations

import os
from fractions import Fraction

import pytest
import torch

from distri.config.plan import dump_plan
from distri.core.partition import SplitAxis
from distri.core.refresh import RefreshRule
from distri.launch import run_ranks
from tests.backends.conformance_target import digests
from tests.toys import run_in_process, toy, toy_plan

POLICIES = (
    "corrected",
    "stale",
    "fresh",
    "local",
    "no_sync",
    "separate_gn",
    "extrapolated",
    "extrapolated_gn",
    "int8",
    "residual_int4",
    "partial",
)


def plans_for(num_ranks: int):
    _, graph = toy()
    plans = [toy_plan(graph, num_ranks, policy=policy, warmup_steps=2, steps=6) for policy in POLICIES]
    plans.append(toy_plan(graph, num_ranks, axis=SplitAxis.COLS, steps=5))
    plans.append(toy_plan(graph, num_ranks, policy="naive_patch", axis=SplitAxis.ALTERNATE, steps=5))
    weights = tuple(Fraction(part + 1) for part in range(num_ranks))
    plans.append(toy_plan(graph, num_ranks, weights=weights, steps=5))
    plans.append(toy_plan(graph, num_ranks, steps=5, layers_per_bucket=2))
    rule = RefreshRule(max_late_steps=2)
    refreshed = ("corrected", "residual_int4")
    plans.extend(toy_plan(graph, num_ranks, policy=policy, steps=7, refresh=rule) for policy in refreshed)
    if num_ranks % 2 == 0:
        plans.append(toy_plan(graph, num_ranks, cfg_split=True, steps=5))
    return plans


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("delay_s", [0.0, 0.02])
def test_gloo_gives_the_bits_of_the_in_process_definition(num_ranks, delay_s):
    if num_ranks == 4 and delay_s:
        pytest.skip("the delayed case is covered by 2 and 3 ranks")
    plans = plans_for(num_ranks)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    try:
        model, _ = toy()
        expected = [digests(run_in_process(model, plan)) for plan in plans]
    finally:
        torch.set_num_threads(threads)
    arguments = {"plans": [dump_plan(plan) for plan in plans], "delay_s": delay_s, "delay_seed": num_ranks}
    arrived = run_ranks(num_ranks, "tests.backends.conformance_target:run", arguments, timeout_s=60.0)
    assert arrived == expected
