"""Comparisons: what they say of readings, the reference's pattern, and one rank alone."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from distri.backends.torch_distributed import TorchBackend
from distri.bench.chart import bar_chart
from distri.bench.gather_all import GatherAllTransport
from distri.bench.one_rank import OneRankRequest, measure_one_rank
from distri.bench.report import rows_of
from distri.bench.variants import DEFAULT_MODES, BenchRequest, variants_of
from distri.core.exchanger import Exchanger
from distri.errors import PolicyError, UserError
from distri.launch import run_ranks
from distri.models.presets import load_graph
from tests.backends.rank_targets import Oracle, toy_plan


@pytest.fixture(scope="module")
def variants():
    return variants_of(BenchRequest("demo", 128, 128, 2), load_graph("demo"))


def test_everything_is_compared_with_the_single_device(variants):
    assert [variant.name for variant in variants] == ["single", "single, all cores", *DEFAULT_MODES]
    plans = {variant.name: variant.plan for variant in variants if variant.plan is not None}
    assert plans["cfg_split"].mesh.cfg == 2
    assert plans["gather_all"].pattern == "gather_all"
    assert all(plan.mesh.cfg == 1 for name, plan in plans.items() if name != "cfg_split")


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="needs 2 ranks or more, not 1"):
        BenchRequest("demo", 128, 128, 1)
    with pytest.raises(PolicyError, match="unknown policy 'fastest'"):
        variants_of(BenchRequest("demo", 128, 128, 2, modes=("fastest",)), load_graph("demo"))


def test_ratios_are_those_of_neighbours_in_time(variants):
    slow, fast = [4.0, 8.0, 6.0], [2.0, 4.0, 2.0]
    waited = [{"halo": 0.1, "output": 0.0}, {"halo": 0.3, "output": 0.1}, {"halo": 0.2, "output": 0.2}]
    readings = {"step_s": fast, "waited_s": waited, "bytes_per_step": 12.0, "buffer_bytes": 3}
    alone = {"step_s": slow, "waited_s": [{}, {}, {}], "bytes_per_step": 0.0, "buffer_bytes": 0}
    result = {
        "variants": {v.name: alone if v.plan is None else readings for v in variants},
        "device": "a machine",
    }
    rows = {row.name: row for row in rows_of(result, variants)}
    corrected = rows["corrected"]
    assert (corrected.step_s, corrected.speedup) == (2.0, 2.0)
    assert corrected.waited_s == {"halo": 0.2, "output": 0.1}
    assert corrected.exposed == pytest.approx(0.1)
    assert (
        corrected.planned_bytes
        == next(v.plan for v in variants if v.name == "corrected").bytes_received_per_step[0]
    )
    sheet = bar_chart(list(rows.values()), "title")
    assert sheet.height > 26 * len(rows)


def gather_as_reference(case, report):
    """The reference's pattern against the oracle of the contract."""
    plan = toy_plan(case)
    backend = TorchBackend(plan, timeout_s=60)
    transport = GatherAllTransport(plan, backend.rank, backend.transport(backend.rank), torch.device("cpu"))
    exchanger = Exchanger(plan, backend.rank, transport)
    oracle = Oracle(plan, 0)
    exchanger.begin_image()
    for step in range(plan.image.num_inference_steps):
        exchanger.begin_step()
        for exchange in plan.exchanges[:-1]:
            exchanger.publish(exchange.layer, oracle.sent(exchange, backend.rank, step))
            seen = exchanger.collect(exchange.layer)
            expected = oracle.seen(exchange, backend.rank, step, exchanger.phase)
            assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True)), (step, exchange.layer)
        exchanger.gather(oracle.made(plan.exchanges[-1], backend.rank, step))
    transport.begin_image()  # what the last step sent is under way
    backend.close()
    return transport.bytes_received


@pytest.mark.slow
def test_the_references_pattern_brings_the_same_values_in_more_bytes():
    case = {"ranks": 3, "policy": "stale", "weights": [2, 1, 1]}
    received = run_ranks(3, "tests.bench.test_bench:gather_as_reference", case)
    planned = toy_plan(case).bytes_received_per_step[0]
    assert received > (toy_plan(case).image.num_inference_steps - 1) * planned


@pytest.mark.slow
def test_a_comparison_measures_every_way():
    request = BenchRequest("demo", 96, 64, 2, modes=("corrected", "gather_all"), rounds=2, steps=1)
    result = run_ranks(
        2, "distri.bench.ranks:measure_as_rank", {**dataclasses.asdict(request), "split": "rows"}
    )
    json.dumps(result)
    rows = {row.name: row for row in rows_of(result, variants_of(request, load_graph("demo")))}
    assert rows["single"].speedup == 1.0
    assert rows["corrected"].bytes_per_step == pytest.approx(rows["corrected"].planned_bytes, rel=0.1)
    assert rows["gather_all"].bytes_per_step > rows["corrected"].bytes_per_step
    assert set(rows["corrected"].waited_s) <= {"halo", "moments", "context", "output", "broadcast", "buffers"}
    assert all(row.step_s > 0 for row in rows.values())


@pytest.mark.slow
def test_one_rank_alone_is_measured_beside_the_unmodified_model():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where the machine is busy
    try:
        result = measure_one_rank(OneRankRequest("demo", 256, 256, 2, rounds=5, device="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert 0 < result.patch_s < result.whole_s
    assert result.launches is None
