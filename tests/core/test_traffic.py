from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distri.core.graph import LayerGraph
from distri.core.ops.conv2d import ConvGeometry
from distri.core.partition import FIXED_AXES, Grain, SplitAxis, make_partition
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import ExchangeKind
from distri.core.shape import Rect
from distri.core.traffic import messages

PARTS = st.integers(2, 9)


def bands(parts: int, rows: int = 96) -> tuple[Rect, ...]:
    return make_partition(rows, 64, parts, SplitAxis.ROWS, Grain(4, "deep")).patches


@given(parts=PARTS, tokens_channels=st.integers(1, 64))
def test_every_patch_sends_its_context_to_every_other_once(parts: int, tokens_channels: int) -> None:
    patches = bands(parts)
    sent = messages(ExchangeKind.CONTEXT, (96 * 64, 2, tokens_channels), 1, None, patches)
    pairs = Counter((message.source, message.reader) for message in sent)
    assert pairs == Counter((s, r) for s in range(parts) for r in range(parts) if s != r)
    for message in sent:
        assert message.elements == patches[message.source].area * 2 * tokens_channels
    whole = 96 * 64 * 2 * tokens_channels
    for reader, patch in enumerate(patches):
        came = sum(message.elements for message in sent if message.reader == reader)
        assert came + patch.area * 2 * tokens_channels == whole


@given(parts=PARTS)
def test_moments_pass_along_the_line_and_each_waits_for_the_one_behind(parts: int) -> None:
    sent = messages(ExchangeKind.MOMENTS, (2, 32, 3), 1, None, bands(parts))
    assert all(abs(message.source - message.reader) == 1 for message in sent)
    assert {message.elements for message in sent} == {2 * 32 * 3}
    assert max(Counter(message.reader for message in sent).values()) <= 2
    arrivals = {(message.source, message.reader) for message in sent}
    for message in sent:
        if message.after is None:
            assert message.source in (0, parts - 1)
        else:
            assert (message.after, message.source) in arrivals
            assert message.after - message.source == message.source - message.reader


@given(parts=PARTS, level=st.sampled_from([1, 2, 4]))
def test_halo_messages_carry_the_rectangles_that_they_name(parts: int, level: int) -> None:
    geometry = ConvGeometry((3, 3), padding=(1, 1))
    shape = (2, 16, 96 // level, 64 // level)
    sent = messages(ExchangeKind.HALO, shape, level, geometry, bands(parts))
    for message in sent:
        assert message.rect is not None
        assert message.elements == 2 * 16 * message.rect.area
        assert message.rect.rows.size == 1
    assert [(m.reader, m.source) for m in sent] == sorted((m.reader, m.source) for m in sent)


def plan_of(graph: LayerGraph, ranks: int, height: int, axis: SplitAxis = SplitAxis.ROWS) -> Plan:
    image = ImageRequest(height, height, 50)
    return make_plan(PlanRequest(image, ranks, cfg_split=False, axis=axis), graph)


def received(plan: Plan, kind: ExchangeKind, patch: int) -> int:
    return sum(e.elements_received[patch] for e in plan.exchanges if e.kind is kind)


@pytest.mark.parametrize("axis", [SplitAxis.ROWS, SplitAxis.COLS])
def test_halo_and_moment_traffic_of_a_rank_does_not_grow_with_the_ranks(
    sdxl: LayerGraph, axis: SplitAxis
) -> None:
    inner = {ranks: plan_of(sdxl, ranks, 2048, axis) for ranks in (4, 8, 16)}
    for kind in (ExchangeKind.HALO, ExchangeKind.MOMENTS):
        traffic = {received(plan, kind, ranks // 2) for ranks, plan in inner.items()}
        assert len(traffic) == 1
        assert traffic.pop() > 0
    contexts = [received(plan, ExchangeKind.CONTEXT, ranks // 2) for ranks, plan in inner.items()]
    assert contexts == sorted(set(contexts))


@pytest.mark.parametrize("axis", FIXED_AXES)
@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_what_is_received_is_what_the_messages_carry(demo: LayerGraph, ranks: int, axis: SplitAxis) -> None:
    plan = plan_of(demo, ranks, 512, axis)
    for exchange in plan.exchanges:
        sent = messages(
            exchange.kind, exchange.shape, exchange.level, exchange.geometry, plan.partition.patches
        )
        assert sum(message.elements for message in sent) == sum(exchange.elements_received)
        for patch in range(ranks):
            sources = {message.source for message in sent if message.reader == patch}
            assert sources == set(exchange.peers[patch])
            assert patch not in sources
