"""Every rule catches the edit that it is there for, also when the hash was computed again."""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest

from distri.core.graph import LayerGraph
from distri.core.mesh import Mesh
from distri.core.ops.conv2d import ConvGeometry
from distri.core.partition import Partition, SplitAxis
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan, plan_hash, sealed
from distri.core.policy import ExchangeKind, Policy
from distri.core.shape import Band, Rect
from distri.core.verify import RULES, verify
from distri.errors import PlanError


@pytest.fixture
def plan(demo: LayerGraph) -> Plan:
    return make_plan(PlanRequest(ImageRequest(512, 512, 25), 4, cfg_split=False), demo)


def resealed(plan: Plan, **changes: Any) -> Plan:
    changed = dataclasses.replace(plan, **changes)
    return dataclasses.replace(changed, hash=plan_hash(changed))


def edited(plan: Plan, chosen: ExchangeKind, **changes: Any) -> Plan:
    place = next(place for place, exchange in enumerate(plan.exchanges) if exchange.kind is chosen)
    exchange = dataclasses.replace(plan.exchanges[place], **changes)
    return resealed(plan, exchanges=(*plan.exchanges[:place], exchange, *plan.exchanges[place + 1 :]))


def bands(*borders: int) -> Partition:
    cols = Band(0, 64)
    rows = pairwise(borders)
    return Partition(SplitAxis.ROWS, tuple(Rect(Band(*band), cols) for band in rows))


def test_a_plan_as_made_is_trusted(plan: Plan, demo: LayerGraph) -> None:
    verify(plan, demo)
    assert len(set(RULES)) == len(RULES)


@pytest.mark.parametrize("field", ["warmup_steps", "macs_per_device", "dtype", "pattern"])
def test_an_edit_without_a_new_hash_is_found_by_the_hash(plan: Plan, field: str) -> None:
    other: dict[str, Any] = {
        "warmup_steps": 4,
        "macs_per_device": (1, 1, 1, 1),
        "dtype": "float32",
        "pattern": "x",
    }
    with pytest.raises(PlanError, match="it was edited; make it again with 'distri plan'"):
        verify(dataclasses.replace(plan, **{field: other[field]}))


def test_another_schema_is_refused(plan: Plan) -> None:
    newer = plan.schema_version + 1
    with pytest.raises(
        PlanError, match=f"reads plans of schema {plan.schema_version}; this one is of schema {newer}"
    ):
        verify(resealed(plan, schema_version=newer))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image": ImageRequest(516, 512, 25)}, "a height of 516 pixels is not a positive multiple"),
        ({"image": ImageRequest(512, 512, 0)}, "5 warm-up steps of 0"),
        ({"image": ImageRequest(512, 512, 25, num_images=0)}, "for 0 images make no run"),
        ({"warmup_steps": 26}, "26 warm-up steps of 25"),
        ({"warmup_steps": -1}, "-1 warm-up steps of 25"),
        ({"image": ImageRequest(512, 512, 25, False), "mesh": Mesh(2, 2)}, "guidance is off"),
        ({"mesh": Mesh(1, 3)}, "4 patches for a mesh of 3"),
        ({"partition": bands(0, 16, 32, 48, 60)}, "do not tile the latent exactly once"),
        ({"partition": bands(0, 18, 32, 48, 64)}, r"Band\(start=0, stop=18\) is not a multiple of 4"),
        ({"partition": bands(0, 16, 16, 48, 64)}, "a patch is empty or reaches outside the latent"),
        ({"partition": bands(0, 16, 32, 48, 68)}, "a patch is empty or reaches outside the latent"),
        ({"macs_per_device": (1,)}, "MACs for 1 devices on a mesh of 4"),
        ({"bytes_received_per_step": (0, 0, 0, 0)}, "the sums per step do not follow"),
        ({"elements_received_per_step": (0, 0, 0, 0)}, "the sums per step do not follow"),
    ],
)
def test_a_resealed_edit_of_the_plan_is_found(plan: Plan, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        verify(resealed(plan, **changes))


def test_overlapping_patches_are_found_even_if_their_areas_add_up(plan: Plan) -> None:
    cols = Band(0, 64)
    rows = (Band(0, 16), Band(0, 16), Band(16, 32), Band(32, 48))
    partition = Partition(SplitAxis.ROWS, tuple(Rect(band, cols) for band in rows))
    with pytest.raises(PlanError, match="do not tile the latent exactly once"):
        verify(resealed(plan, partition=partition))


def test_patches_of_odd_steps_are_verified_as_those_of_even_ones(plan: Plan, demo: LayerGraph) -> None:
    short = dataclasses.replace(plan.partition, turned=bands(0, 16, 32, 48, 60).patches)
    with pytest.raises(PlanError, match="do not tile the latent exactly once"):
        verify(resealed(plan, partition=short))
    moved = dataclasses.replace(plan.partition, turned=bands(0, 20, 32, 48, 64).patches)
    with pytest.raises(PlanError, match="moves every patch at every step"):
        verify(resealed(plan, partition=moved))


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        (ExchangeKind.CONTEXT, {"elements_received": (1, 1, 1, 1)}, "bytes do not follow from geometry"),
        (ExchangeKind.HALO, {"peers": ((), (), (), ())}, "bytes do not follow from geometry"),
        (ExchangeKind.MOMENTS, {"bytes_received": (0, 0, 0, 0)}, "bytes do not follow from geometry"),
        (ExchangeKind.CONTEXT, {"dtype": "float128"}, "unknown dtype 'float128'"),
        (ExchangeKind.CONTEXT, {"level": 0}, "at a positive level"),
        (ExchangeKind.CONTEXT, {"geometry": ConvGeometry((3, 3))}, "only a halo has one"),
        (ExchangeKind.HALO, {"geometry": None}, "a halo has a convolution's geometry"),
        (ExchangeKind.CONTEXT, {"steady": Policy.FRESH}, "its policies differ from the plan's table"),
        (ExchangeKind.CONTEXT, {"index": 0}, "not in execution order"),
        (ExchangeKind.CONTEXT, {"layer": "output"}, "a layer has more than one exchange"),
        (ExchangeKind.CONTEXT, {"bucket": None}, "bucket"),
        (ExchangeKind.CONTEXT, {"bucket": 7}, "the buckets are not numbered in execution order"),
        (ExchangeKind.OUTPUT, {"kind": ExchangeKind.CONTEXT}, "does not end with the gather of the output"),
    ],
)
def test_a_resealed_edit_of_an_exchange_is_found(
    plan: Plan, kind: ExchangeKind, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PlanError, match=sentence):
        verify(edited(plan, kind, **changes))


def test_a_read_that_nobody_publishes_is_found(plan: Plan) -> None:
    """Without warm-up the first step of a stale exchange would wait for ever."""
    with pytest.raises(ValueError, match="before the first step"):
        verify(resealed(plan, warmup_steps=0))


def test_a_plan_for_another_model_is_refused(plan: Plan, sdxl: LayerGraph) -> None:
    with pytest.raises(
        PlanError, match=r"the plan is for model 'demo' \(\w{16}\), not for 'sdxl' \(\w{16}\)"
    ):
        verify(plan, sdxl)


def test_a_layer_left_out_is_found_against_the_model(plan: Plan, demo: LayerGraph) -> None:
    thinner = dataclasses.replace(plan, exchanges=plan.exchanges[1:])
    with pytest.raises(PlanError, match="exchanges are not those of its model"):
        verify(sealed(thinner, demo), demo)


def test_other_macs_are_found_against_the_model(plan: Plan, demo: LayerGraph) -> None:
    with pytest.raises(PlanError, match="MACs per device do not follow from its model"):
        verify(resealed(plan, macs_per_device=(1, 1, 1, 1)), demo)
