"""Plans that keep the latent on its patches: what they exchange, that they can be trusted, and what is refused."""

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distri.core.graph import LayerGraph
from distri.core.latent import LatentPlace, latent_exchange
from distri.core.partition import FIXED_AXES, SplitAxis
from distri.core.plan import Exchange, ImageRequest, Plan
from distri.core.planner import PlanRequest, latent_layers, make_plan, plan_hash
from distri.core.policy import ExchangeKind, Phase, Policy, PolicyRule, builtin_tables, policy_table
from distri.core.program import InstructionKind, awaited_version, step_program
from distri.core.refresh import RefreshRule
from distri.core.traffic import output_ranks
from distri.core.verify import verify
from distri.errors import PartitionError, PlanError

IMAGE = ImageRequest(512, 384, 12)
TABLES = builtin_tables()
requests = st.builds(
    PlanRequest,
    st.just(IMAGE),
    st.integers(2, 8),
    st.sampled_from([False, None]),
    st.sampled_from(list(TABLES.values())),
    st.integers(1, 4),
    st.sampled_from(FIXED_AXES),
    refresh=st.one_of(st.none(), st.builds(RefreshRule, max_late_steps=st.integers(1, 5))),
    latent=st.just(LatentPlace.PATCH),
)


def both(request: PlanRequest, graph: LayerGraph) -> tuple[Plan, Plan]:
    """The plan that keeps the whole latent, and the one that keeps it on its patches."""
    return make_plan(dataclasses.replace(request, latent=LatentPlace.WHOLE), graph), make_plan(request, graph)


def on_patch(graph: LayerGraph, ranks: int = 4, **more: Any) -> Plan:
    wanted = {"cfg_split": False, "latent": LatentPlace.PATCH} | more
    return make_plan(PlanRequest(wanted.pop("image", IMAGE), ranks, **wanted), graph)


def policies_of(exchange: Exchange) -> tuple[Policy, Policy]:
    return exchange.warmup, exchange.steady


@given(request=requests)
@settings(max_examples=60, deadline=None)
def test_only_the_output_and_what_reads_the_latent_are_served_otherwise(
    demo: LayerGraph, request: PlanRequest
) -> None:
    try:
        whole, patch = both(request, demo)
    except (PartitionError, PlanError):
        assume(False)
    verify(patch, demo)
    if patch.mesh.patch == 1:
        assert patch == whole
        return
    readers = latent_layers(demo)
    assert readers
    assert whole.latent_layers == readers
    assert not whole.keeps_latent_on_patch
    assert patch.keeps_latent_on_patch
    assert patch.latent_layers == ()
    others = [e for e in patch.exchanges if e.layer not in readers and e.kind is not ExchangeKind.OUTPUT]
    assert tuple(others) == whole.exchanges[:-1]
    assert policies_of(patch.exchanges[-1]) == (Policy.LOCAL, Policy.LOCAL)
    wanted = Policy.FRESH if whole.is_attached else Policy.LOCAL
    for exchange in (patch.by_layer[layer] for layer in readers):
        assert exchange.kind is ExchangeKind.HALO
        assert policies_of(exchange) == (wanted, wanted)
        assert exchange.bucket is None
    assert patch.is_attached == whole.is_attached
    assert patch.macs_per_device == whole.macs_per_device


@given(
    request=requests, step=st.integers(0, IMAGE.num_inference_steps - 1), phase=st.sampled_from(list(Phase))
)
@settings(max_examples=30, deadline=None)
def test_what_reads_the_latent_reads_this_steps_whatever_a_refresh_decides(
    demo: LayerGraph, request: PlanRequest, step: int, phase: Phase
) -> None:
    try:
        whole, plan = both(request, demo)
    except (PartitionError, PlanError):
        assume(False)
    assume(plan.mesh.patch > 1 and whole.is_attached)
    for layer in latent_layers(demo):
        assert awaited_version(plan, plan.by_layer[layer], step, phase) == step
    first = step_program(plan, step)
    published = [i for i in first if i.kind is InstructionKind.PUBLISH]
    assert plan.exchanges[published[0].exchange].layer in latent_layers(demo)


@pytest.mark.parametrize(("ranks", "cfg_split"), [(3, False), (4, True), (8, True)])
def test_a_rank_receives_its_partners_patch_and_the_neighbours_rows_and_no_other_output(
    demo: LayerGraph, ranks: int, cfg_split: bool
) -> None:
    whole, patch = both(PlanRequest(IMAGE, ranks, cfg_split, latent=LatentPlace.PATCH, dtype="float16"), demo)
    depth = patch.batch_per_rank * patch.model.latent_channels
    columns = patch.latent.cols.size
    for rank in range(ranks):
        place = patch.mesh.patch_of(rank)
        own = patch.partition.patches[place].area
        neighbours = (place > 0) + (place < patch.mesh.patch - 1)
        saved = depth * (patch.mesh.cfg * patch.latent.area - own)
        added = depth * (own * (patch.mesh.cfg - 1) + neighbours * columns)
        change = patch.elements_received_per_step[rank] - whole.elements_received_per_step[rank]
        assert change == added - saved
        assert patch.bytes_received_per_step[rank] - whole.bytes_received_per_step[rank] == 2 * change


def test_outputs_reach_the_partner_of_the_same_patch_only(demo: LayerGraph) -> None:
    plan = on_patch(demo, 8, cfg_split=True)
    assert output_ranks(plan.mesh, plan.exchanges[-1], 6) == (2, 6)
    assert output_ranks(plan.mesh, latent_exchange(plan), 6) == tuple(range(8))
    alone = on_patch(demo, 3)
    assert [output_ranks(alone.mesh, alone.exchanges[-1], rank) for rank in range(3)] == [(0,), (1,), (2,)]


def test_the_last_gather_is_of_one_latent_for_each_picture(demo: LayerGraph) -> None:
    plan = on_patch(demo, 4, image=ImageRequest(512, 384, 12, num_images=3))
    gathered = latent_exchange(plan)
    assert gathered.shape == (3, 4, 64, 48)
    assert policies_of(gathered) == (Policy.FRESH, Policy.FRESH)
    assert gathered.index > plan.exchanges[-1].index


def test_without_any_exchange_no_rank_receives_anything(demo: LayerGraph) -> None:
    plan = on_patch(demo, policy=policy_table("naive_patch"))
    assert plan.bytes_received_per_step == (0, 0, 0, 0)
    assert not plan.is_attached


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            {"policy": policy_table("naive_patch"), "axis": SplitAxis.ALTERNATE},
            "moves every patch at every step, so no rank can keep its own; use --latent whole",
        ),
        (
            {"refresh": RefreshRule(max_change=0.1)},
            "measures the latent's change needs the whole latent at every step; use --refresh-every or",
        ),
        ({"pattern": "gather_all"}, "--pattern gather_all needs --latent whole"),
        (
            {
                "policy": policy_table("corrected").with_rules(
                    tuple(PolicyRule(ExchangeKind.OUTPUT, phase, Policy.LOCAL) for phase in Phase)
                ),
                "latent": LatentPlace.WHOLE,
            },
            "a policy table alone does not keep the latent on its patch",
        ),
    ],
)
def test_what_needs_the_whole_latent_is_refused(
    demo: LayerGraph, more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PlanError, match=sentence) as caught:
        on_patch(demo, **more)
    assert "\n" not in str(caught.value)


def resealed(plan: Plan, **changes: Any) -> Plan:
    changed = dataclasses.replace(plan, **changes)
    return dataclasses.replace(changed, hash=plan_hash(changed))


def test_edits_of_where_the_latent_lies_are_found(demo: LayerGraph) -> None:
    plan = on_patch(demo)
    with pytest.raises(PlanError, match="a policy table alone does not keep"):
        verify(resealed(plan, latent_layers=latent_layers(demo)))
    with pytest.raises(PlanError, match="measures the latent's change"):
        verify(resealed(plan, refresh=RefreshRule(max_change=0.1)))
    whole = on_patch(demo, latent=LatentPlace.WHOLE)
    with pytest.raises(PlanError, match="that read the whole latent are not those of its model"):
        verify(resealed(whole, latent_layers=()), demo)
    alone = on_patch(demo, 1)
    output = dataclasses.replace(alone.exchanges[-1], warmup=Policy.LOCAL, steady=Policy.LOCAL)
    edited = resealed(alone, policy=plan.policy, latent_layers=(), exchanges=(output,))
    with pytest.raises(PlanError, match="a plan of one patch has the whole latent on every rank"):
        verify(edited)


def test_an_output_that_is_local_in_one_phase_only_is_found(demo: LayerGraph) -> None:
    whole = on_patch(demo, latent=LatentPlace.WHOLE)
    output = dataclasses.replace(whole.exchanges[-1], warmup=Policy.LOCAL)
    table = whole.policy.with_rules((PolicyRule(ExchangeKind.OUTPUT, Phase.WARMUP, Policy.LOCAL),))
    with pytest.raises(PlanError, match="the output is local in one phase and gathered in the other"):
        verify(resealed(whole, exchanges=(*whole.exchanges[:-1], output), policy=table))


@pytest.mark.parametrize("policy", [Policy.STALE, Policy.FROZEN, Policy.LOCAL])
def test_a_latent_that_is_not_read_fresh_is_found(demo: LayerGraph, policy: Policy) -> None:
    plan = on_patch(demo, policy=policy_table("fresh"))
    (layer,) = latent_layers(demo)
    place = next(place for place, e in enumerate(plan.exchanges) if e.layer == layer)
    bucket = 0 if policy is Policy.STALE else None
    late = dataclasses.replace(plan.exchanges[place], steady=policy, bucket=bucket)
    rule = PolicyRule(ExchangeKind.HALO, Phase.STEADY, policy, layer)
    exchanges = (*plan.exchanges[:place], late, *plan.exchanges[place + 1 :])
    sums = {}
    if policy is not Policy.STALE:
        sums = {
            f"{what}_received_per_step": tuple(
                total - part
                for total, part in zip(
                    getattr(plan, f"{what}_received_per_step"), getattr(late, f"{what}_received"), strict=True
                )
            )
            for what in ("elements", "bytes")
        }
    edited = resealed(plan, exchanges=exchanges, policy=plan.policy.with_rules((rule,)), **sums)
    with pytest.raises(PlanError, match="reads the latent, of which only this step's version is right"):
        verify(edited, demo)
