"""Laws of late values: residual errors do not add up, both ends keep the same sums, straight lines are continued."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distri.backends.in_process import InProcessBackend
from distri.core.codec import Codec, payload_bytes
from distri.core.exchanger import Exchanger
from distri.core.partition import FIXED_AXES, SplitAxis
from distri.core.policy import ExchangeKind, Phase, Policy, PolicyRule, policy_table, uniform_table
from distri.core.refresh import RefreshRule
from distri.core.traffic import messages_of, part_shapes
from distri.errors import PlanError
from distri.nn.codec import channels_last
from distri.nn.extrapolation import carry_forward, carry_moments_forward
from distri.nn.reconstruction import Reconstruction
from tests.toys import ToyShape, toy, toy_plan

RESIDUAL = [codec for codec in Codec if codec.is_residual]
CODED = [codec for codec in Codec if codec is not Codec.NONE]
SETTINGS = settings(max_examples=12)
_, GRAPH = toy(ToyShape(stride=2))
KINDS = (ExchangeKind.HALO, ExchangeKind.CONTEXT)


class Ranks:
    """All ranks' ends of a plan, driven one after the other without any model."""

    def __init__(self, plan):
        self.plan = plan
        self.backend = InProcessBackend(plan, timeout_s=1.0)
        size = range(plan.mesh.size)
        self.ends = [Reconstruction(plan, rank, self.backend.transport(rank)) for rank in size]
        self.exchangers = [Exchanger(plan, rank, end) for rank, end in enumerate(self.ends)]
        self.exchanges = [e for e in plan.exchanges if e.kind in KINDS]

    def begin_image(self):
        for exchanger in self.exchangers:
            exchanger.begin_image()

    def step(self, values):
        """One step with the whole picture's value of each layer; yields (exchange, rank, what it reads, the truth)."""
        for exchanger in self.exchangers:
            exchanger.begin_step()
        for exchange in self.plan.exchanges[:-1]:
            if exchange.kind not in KINDS:
                for exchanger in self.exchangers:
                    exchanger.publish(exchange.layer, [torch.ones(1)])
                continue
            whole = values(exchange)
            for rank, exchanger in enumerate(self.exchangers):
                exchanger.publish(exchange.layer, self.parts(exchange, whole, rank))
            for rank, exchanger in enumerate(self.exchangers):
                yield exchange, rank, exchanger.collect(exchange.layer)

    def pieces(self, exchange, whole, chosen):
        found = messages_of(exchange, self.plan.partition.patches)
        return [whole[..., slice(*m.rect.rows), slice(*m.rect.cols)].contiguous() for m in found if chosen(m)]

    def parts(self, exchange, whole, rank):
        if exchange.kind is ExchangeKind.HALO:
            return self.pieces(exchange, whole, lambda message: message.source == rank)
        shapes = part_shapes(exchange, self.plan.partition.patches, rank)
        return [whole.split([shape[0] for shape in shapes])[rank].contiguous()]

    def truth(self, exchange, whole, rank, own=None):
        """What a rank would read of this version; its own share of a context is of `own`."""
        if exchange.kind is ExchangeKind.HALO:
            return self.pieces(exchange, whole, lambda message: message.reader == rank)
        lengths = [shape[0] for shape in part_shapes(exchange, self.plan.partition.patches, rank)]
        shares = list(whole.split(lengths))
        shares[rank] = (whole if own is None else own).split(lengths)[rank]
        return [torch.cat(shares)]


def plan_of(policy, ranks=3, steps=8, warmup_steps=2, axis=SplitAxis.ROWS, codec=Codec.NONE, **more):
    table = policy_table(policy) if isinstance(policy, str) else policy
    if codec is not Codec.NONE:
        table = uniform_table("coded", Policy.FRESH, Policy.STALE, Policy.STALE, Policy.STALE, codec)
    return toy_plan(GRAPH, ranks, steps=steps, policy=table, warmup_steps=warmup_steps, axis=axis, **more)


def walk(seed, stride=1.0, dtype=torch.float32):
    """Random values for each layer and step that change by at most `stride` from step to step."""

    walks = {}

    def values(exchange, step):
        if exchange.layer not in walks:
            generator = torch.Generator().manual_seed(seed + exchange.index)
            walks[exchange.layer] = generator, [3 * torch.randn(exchange.shape, generator=generator)]
        generator, path = walks[exchange.layer]
        while len(path) <= step:
            path.append(path[-1] + stride * (2 * torch.rand(exchange.shape, generator=generator) - 1))
        return path[step].to(dtype)

    return values


def largest_error(found, truth):
    return max((float((a - b).abs().max()) for a, b in zip(found, truth, strict=True)), default=0.0)


@pytest.mark.parametrize("codec", RESIDUAL)
@SETTINGS
@given(seed=st.integers(0, 999), ranks=st.integers(2, 4), axis=st.sampled_from(FIXED_AXES))
def test_the_error_of_residuals_stays_within_one_steps_quantisation(codec, seed, ranks, axis):
    """E' <= (change + E) / 2L, so E <= change / (2L - 1) at every step: it does not grow with their number."""
    plan = plan_of("stale", ranks, steps=14, codec=codec, axis=axis, rows=20, cols=20)
    values, levels = walk(seed), 2 ** (codec.bits - 1) - 1
    driven = Ranks(plan)
    driven.begin_image()
    for step in range(plan.image.num_inference_steps):
        is_late = step >= plan.warmup_steps
        for exchange, rank, found in driven.step(lambda e, s=step: values(e, s)):
            seen, own = values(exchange, step - 1 if is_late else step), values(exchange, step)
            error = largest_error(found, driven.truth(exchange, seen, rank, own))
            assert error <= (1.02 / (2 * levels - 1) if step > plan.warmup_steps else 0.0)


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.FP8])
@SETTINGS
@given(seed=st.integers(0, 999), ranks=st.integers(2, 4))
def test_codecs_of_values_are_off_by_their_own_step_only(codec, seed, ranks):
    plan = plan_of("stale", ranks, codec=codec)
    values = walk(seed)
    driven = Ranks(plan)
    driven.begin_image()
    for step in range(plan.image.num_inference_steps):
        is_late = step > plan.warmup_steps
        for exchange, rank, found in driven.step(lambda e, s=step: values(e, s)):
            seen = values(exchange, step - 1 if step >= plan.warmup_steps else step)
            bound = float(seen.abs().max()) * (0.51 / 127 if codec is Codec.INT8 else 1 / 15)
            truth = driven.truth(exchange, seen, rank, values(exchange, step))
            assert largest_error(found, truth) <= (bound if is_late else 0.0)


@pytest.mark.parametrize(
    "policy", [*(c.value for c in RESIDUAL), *(f"extrapolated_{c.value}" for c in RESIDUAL)]
)
def test_values_that_stand_still_are_exact_from_the_second_step(policy):
    plan = plan_of(policy, warmup_steps=1)
    values = walk(5)
    driven = Ranks(plan)
    driven.begin_image()
    for _ in range(plan.image.num_inference_steps):
        for exchange, rank, found in driven.step(lambda e: values(e, 0)):
            assert largest_error(found, driven.truth(exchange, values(exchange, 0), rank)) == 0.0


@pytest.mark.parametrize("codec", RESIDUAL)
def test_values_that_come_to_rest_are_approached_geometrically(codec):
    plan = plan_of("stale", steps=12, codec=codec)
    values = walk(6)
    driven = Ranks(plan)
    driven.begin_image()
    errors = []
    for step in range(plan.image.num_inference_steps):
        worst = 0.0
        for exchange, rank, found in driven.step(lambda e, s=step: values(e, min(s, 3))):
            worst = max(worst, largest_error(found, driven.truth(exchange, values(exchange, 3), rank)))
        errors.append(worst)
    assert errors[-1] <= 1.02 * errors[4] / 2 ** (len(errors) - 5) + 1e-6


@pytest.mark.parametrize("codec", RESIDUAL)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sender_and_reader_have_the_same_sums_bit_for_bit(codec, dtype):
    plan = plan_of("stale", ranks=3, steps=10, codec=codec)
    plan = toy_plan_in(plan, dtype)
    values = walk(7, dtype=getattr(torch, dtype))
    driven = Ranks(plan)
    driven.begin_image()
    sums_before = {}
    for step in range(plan.image.num_inference_steps):
        for _ in driven.step(lambda e, s=step: values(e, s)):
            pass
        if step > plan.warmup_steps:
            for exchange in driven.exchanges:
                assert_same_sums(driven, exchange, version=step - 1, sums=sums_before[exchange.layer])
        sums_before = {e.layer: [sums_of(end, e) for end in driven.ends] for e in driven.exchanges}


def toy_plan_in(plan, dtype):
    exchanges = tuple(dataclasses.replace(e, dtype=dtype) if e.kind in KINDS else e for e in plan.exchanges)
    return dataclasses.replace(plan, dtype=dtype, exchanges=exchanges)


def sums_of(end, exchange):
    return [known.clone() for known in end._sent[exchange.layer]]


def assert_same_sums(driven, exchange, version, sums):
    found = messages_of(exchange, driven.plan.partition.patches)
    for reader, end in enumerate(driven.ends):
        rebuilt = end._rebuilt[exchange.layer][version]
        if exchange.kind is ExchangeKind.CONTEXT:
            pairs = [(rebuilt[p], sums[p][0]) for p in range(len(sums)) if p != reader]
        else:
            sent = {rank: [m for m in found if m.source == rank] for rank in range(len(sums))}
            mine = [m for m in found if m.reader == reader]
            pairs = [
                (part, sums[m.source][sent[m.source].index(m)]) for part, m in zip(rebuilt, mine, strict=True)
            ]
        for part, known in pairs:
            assert torch.equal(channels_last(part).float(), known)


def straight(exchange, step):
    """Small whole numbers, so that fp32 continues them without rounding."""
    generator = torch.Generator().manual_seed(exchange.index)
    start, slope = torch.randint(-9, 9, (2, *exchange.shape), generator=generator).float()
    return start + slope * step


@pytest.mark.parametrize("warmup_steps", [1, 2, 4])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_activations_that_are_linear_in_the_step_are_extrapolated_exactly(warmup_steps, ranks):
    """From the first steady step if warm-up left three versions, else as soon as there are; before that, the last."""
    plan = plan_of("extrapolated", ranks, warmup_steps=warmup_steps)
    driven = Ranks(plan)
    driven.begin_image()
    for step in range(plan.image.num_inference_steps):
        has_too_few = warmup_steps <= step < 3
        for exchange, rank, found in driven.step(lambda e, s=step: straight(e, s)):
            others = straight(exchange, step - 1 if has_too_few else step)
            truth = driven.truth(exchange, others, rank, straight(exchange, step))
            assert largest_error(found, truth) == 0.0


@given(slope=st.floats(-5, 5, width=32), start=st.floats(-5, 5, width=32))
def test_extrapolation_of_real_numbers_is_linear_to_rounding(slope, start):
    plan = plan_of("extrapolated", 2, steps=5)
    driven = Ranks(plan)
    driven.begin_image()

    def values(exchange, step):
        return torch.full(exchange.shape, start + slope * step)

    for step in range(plan.image.num_inference_steps):
        for exchange, rank, found in driven.step(lambda e, s=step: values(e, s)):
            seen = values(exchange, 1 if step == plan.warmup_steps else step)
            assert largest_error(found, driven.truth(exchange, seen, rank, values(exchange, step))) <= 1e-5


numbers = st.floats(-1e3, 1e3, width=32)


@given(versions=st.tuples(numbers, numbers, numbers))
def test_what_is_carried_forward_is_the_smaller_of_the_last_two_changes(versions):
    first, before, last = (torch.tensor(value) for value in versions)
    change, latest, earlier = (
        float(carry_forward(last, before, first) - last),
        *map(float, (last - before, before - first)),
    )
    rounding = 1e-3
    if latest * earlier <= 0:
        assert change == 0.0
    else:
        assert change * latest >= 0
        assert abs(change) == pytest.approx(min(abs(latest), abs(earlier)), abs=rounding)


moments = st.tuples(numbers, st.floats(0, 2.0**99, width=32)).map(
    lambda values: torch.tensor([64.0, *values])
)


@given(versions=st.tuples(moments, moments, moments))
def test_moments_that_are_carried_forward_are_those_of_a_set_of_values(versions):
    """However odd the versions are: the count stays, and M2 is finite, not negative and at most doubled or halved."""
    first, before, last = (value[None, None] for value in versions)
    count, _, m2 = carry_moments_forward(last, before, first)[0, 0]
    assert count == 64
    assert last[0, 0, 2] / 2 <= m2 <= last[0, 0, 2] * 2


def test_means_on_a_line_and_spreads_in_a_fixed_ratio_are_carried_forward_exactly():
    versions = [torch.tensor([[[64.0, 3.0 + 2 * step, 8.0 * 1.5**step]]]) for step in range(4)]
    assert torch.equal(carry_moments_forward(*versions[2::-1]), versions[3])


@pytest.mark.parametrize(
    "policy", ["extrapolated", "extrapolated_int8", "residual_int4", "extrapolated_residual_int2"]
)
def test_a_second_image_knows_nothing_of_the_first(policy):
    plan = plan_of(policy)
    driven = Ranks(plan)
    images = []
    for image in (0, 1, 0):
        driven.begin_image()
        values = walk(image)
        read = []
        for step in range(plan.image.num_inference_steps):
            for _, _, found in driven.step(lambda e, s=step, v=values: v(e, s)):
                read += [part.clone() for part in found]
        images.append(read)
    assert all(torch.equal(a, b) for a, b in zip(images[0], images[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(images[0], images[1], strict=True))


@pytest.mark.parametrize("policy", [*(c.value for c in CODED), *(f"extrapolated_{c.value}" for c in CODED)])
def test_a_warm_up_without_exchanges_leaves_nothing_to_start_from_and_still_works(policy):
    """Then the first change is the whole value."""
    local = tuple(PolicyRule(kind, Phase.WARMUP, Policy.LOCAL) for kind in KINDS)
    plan = plan_of(policy_table(policy).with_rules(local), steps=6)
    driven = Ranks(plan)
    driven.begin_image()
    values = walk(3, stride=0.0)
    for step in range(plan.image.num_inference_steps):
        for exchange, rank, found in driven.step(lambda e: values(e, 0)):
            if step < plan.warmup_steps:
                assert found is None
                continue
            truth = driven.truth(exchange, values(exchange, 0), rank)
            assert largest_error(found, truth) <= 1.6 * float(values(exchange, 0).abs().max())


def test_a_refresh_that_would_lose_changes_is_refused():
    local = tuple(PolicyRule(kind, Phase.WARMUP, Policy.LOCAL) for kind in KINDS)
    table = policy_table("residual_int8").with_rules(local)
    with pytest.raises(PlanError, match="at a refresh a change would be lost; use a codec that sends values"):
        toy_plan(GRAPH, 3, policy=table, refresh=RefreshRule(max_late_steps=2))
    toy_plan(GRAPH, 3, policy=policy_table("int8").with_rules(local), refresh=RefreshRule(max_late_steps=2))


class Scales:
    """A transport that weighs what it is given."""

    def __init__(self, inner):
        self.inner = inner
        self.weighed = []

    def send(self, exchange, version, parts, bucket):
        self.weighed.append((exchange, version, [part.numel() * part.element_size() for part in parts]))
        self.inner.send(exchange, version, parts, bucket)

    def __getattr__(self, name):
        return getattr(self.inner, name)


@pytest.mark.parametrize("codec", CODED)
def test_what_is_sent_late_weighs_what_the_plan_says(codec):
    plan = plan_of("stale", steps=5, codec=codec)
    driven = Ranks(plan)
    for end in driven.ends:
        end._inner = Scales(end._inner)
    driven.begin_image()
    for step in range(plan.image.num_inference_steps):
        for _ in driven.step(lambda e, s=step: walk(0)(e, s)):
            pass
    received = {e.layer: [0] * plan.mesh.patch for e in driven.exchanges}
    for sender, end in enumerate(driven.ends):
        for exchange, version, sizes in end._inner.weighed:
            if exchange.kind not in KINDS or version != plan.warmup_steps:
                continue
            mine = [m for m in messages_of(exchange, plan.partition.patches) if m.source == sender]
            for message, size in zip(
                mine, sizes * (len(mine) if exchange.kind is KINDS[1] else 1), strict=True
            ):
                received[exchange.layer][message.reader] += size
    for exchange in driven.exchanges:
        assert tuple(received[exchange.layer]) == exchange.bytes_received


def test_the_bytes_of_a_payload_in_numbers():
    assert payload_bytes(Codec.RESIDUAL_INT2, 10 * 9, 10, 2) == 10 * (3 + 2)
    assert payload_bytes(Codec.INT8, 10 * 9, 10, 2) == 10 * (9 + 2)
    assert payload_bytes(Codec.NONE, 10 * 9, 10, 2) == 180
    assert payload_bytes(Codec.INT8, 0, 10, 2) == 0
