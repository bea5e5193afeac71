"""The staleness contract, held by a machine of random rules over the exchanger and a hostile but lossless network.

Every rank runs a random plan at its own pace. The network splits messages into packets, holds them back, swaps them,
delivers them in bursts and across the start of a new image; it never loses one. Values are tags that say who made them,
when, for which image; so whatever a layer reads shows its version, and a mixture shows too. Pure Python.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from distri.core.buffers import VersionedBuffer
from distri.core.exchanger import Exchanger
from distri.core.graph import LayerGraph, Operation, OperationKind
from distri.core.ops.conv2d import ConvGeometry
from distri.core.partition import FIXED_AXES, SplitAxis
from distri.core.plan import Exchange, ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import (
    READS_LATE,
    ExchangeKind,
    Phase,
    Policy,
    PolicyRule,
    builtin_tables,
)
from distri.core.program import is_published, travels_in_bucket
from distri.core.traffic import Message, messages_of
from distri.core.verify import verify
from distri.errors import RunError

# Random plans: any order of layers, on any mesh, cut any way, under any rules.

CHANNELS = 8


def graph_of(kinds: Sequence[str]) -> LayerGraph:
    """A chain of layers: convolutions of several reaches, one that halves the level, norms and attentions."""
    geometries = {
        "conv": ConvGeometry((3, 3), padding=(1, 1)),
        "wide": ConvGeometry((5, 3), padding=(4, 1), dilation=(2, 1)),
        "down": ConvGeometry((3, 3), (2, 2), (1, 1)),
    }
    level, operations = 1, []
    for index, kind in enumerate(["conv", *kinds]):
        image = ("B", CHANNELS, f"H/{level}", f"W/{level}")
        parents = (index - 1,) if index else ()
        path = f"{index}.{kind}"
        if kind == "norm":
            made = Operation(index, path, OperationKind.GROUP_NORM, (image,), image, parents, groups=2)
        elif kind == "attention":
            tokens = ("B", f"HW/{level}", CHANNELS)
            made = Operation(index, path, OperationKind.SELF_ATTENTION, (tokens,) * 3, tokens, parents)
        else:
            shape = geometries["conv" if kind == "down" and level == 4 else kind]
            level *= shape.stride[0]
            output = ("B", CHANNELS, f"H/{level}", f"W/{level}")
            kind_of = OperationKind.CONVOLUTION
            made = Operation(index, path, kind_of, (image,), output, parents, geometry=shape)
        operations.append(made)
    return LayerGraph("chain", tuple(operations), CHANNELS, 1)


ALLOWED = {
    ExchangeKind.HALO: (Policy.FRESH, Policy.STALE, Policy.EXTRAPOLATED, Policy.FROZEN, Policy.LOCAL),
    ExchangeKind.MOMENTS: (
        Policy.FRESH,
        Policy.STALE,
        Policy.CORRECTED,
        Policy.EXTRAPOLATED,
        Policy.FROZEN,
        Policy.LOCAL,
    ),
    ExchangeKind.CONTEXT: (Policy.FRESH, Policy.STALE, Policy.EXTRAPOLATED, Policy.FROZEN, Policy.LOCAL),
}


@st.composite
def rules(draw: st.DrawFn) -> PolicyRule:
    kind = draw(st.sampled_from(list(ALLOWED)))
    pattern = draw(st.sampled_from(["*", "1.*", "2.*", "[3-9].*", "*.conv", "*.wide"]))
    if draw(st.booleans()):
        warmup = draw(st.sampled_from([Policy.FRESH, Policy.LOCAL]))
        return PolicyRule(kind, Phase.WARMUP, warmup, pattern)
    return PolicyRule(kind, Phase.STEADY, draw(st.sampled_from(ALLOWED[kind])), pattern)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    kinds = draw(
        st.lists(st.sampled_from(["conv", "wide", "down", "norm", "attention"]), min_size=1, max_size=7)
    )
    table = builtin_tables()[draw(st.sampled_from(list(builtin_tables())))]
    table = table.with_rules(tuple(draw(st.lists(rules(), max_size=4))))
    num_patches = draw(st.integers(2, 5))
    cfg_split = draw(st.booleans())
    axis = draw(st.sampled_from(FIXED_AXES))
    weights = None
    if axis is not SplitAxis.GRID and draw(st.booleans()):
        parts = st.lists(st.integers(1, 4), min_size=num_patches, max_size=num_patches)
        weights = tuple(map(Fraction, draw(parts)))
    rows, cols = draw(st.integers(20, 28)), draw(st.integers(20, 28))
    request = PlanRequest(
        ImageRequest(8 * rows, 8 * cols, draw(st.integers(1, 6))),
        num_patches * (2 if cfg_split else 1),
        cfg_split,
        table,
        draw(st.integers(1, 3)),
        axis,
        weights,
        layers_per_bucket=draw(st.integers(1, 4)),
    )
    return make_plan(request, graph_of(kinds))


# The contract, written again without looking.


def expected_version(exchange: Exchange, step: int, warmup_steps: int) -> int | None:
    policy = exchange.warmup if step < warmup_steps else exchange.steady
    if policy is Policy.LOCAL:
        return None
    if policy is Policy.FRESH:
        return step
    return warmup_steps - 1 if policy is Policy.FROZEN else step - 1


class Tag(NamedTuple):
    """What a value says of itself."""

    image: int
    branch: int
    layer: str
    patch: int
    version: int
    piece: int = 0


Value = tuple[Tag, ...]
Channel = tuple[str, int]
"""(layer, sending patch)."""


class NotYet(Exception):
    """What is asked for has not arrived: ask again."""


# The network.


@dataclass(frozen=True)
class Packet:
    """Half of a message, for one endpoint of one session."""

    endpoint: Endpoint
    image: int
    number: int
    half: int
    contents: tuple[tuple[Channel, int, int, Value], ...]
    """(channel, place in its order, version, value)."""


class Network:
    def __init__(self) -> None:
        self.in_flight: list[Packet] = []
        self.number = 0

    def post(self, endpoint: Endpoint, image: int, contents: list[tuple[Channel, int, int, Value]]) -> None:
        self.number += 1
        for half in (0, 1):
            self.in_flight.append(Packet(endpoint, image, self.number, half, tuple(contents)))

    def deliver(self, packets: Sequence[Packet]) -> None:
        for packet in packets:
            self.in_flight.remove(packet)
            packet.endpoint.take(packet)


class Endpoint:
    """One rank's transport: assembles packets, keeps each channel in its order, relays moments along the line."""

    def __init__(self, plan: Plan, rank: int, network: Network, peers: dict[int, Endpoint]) -> None:
        self.plan, self.rank, self.network, self.peers = plan, rank, network, peers
        self.patch, self.branch = plan.mesh.patch_of(rank), plan.mesh.branch_of(rank)
        self.image = -1
        self.failure: Exception | None = None
        self.early: list[Packet] = []
        self.forget()

    def forget(self) -> None:
        self.arrived: VersionedBuffer[Value] = VersionedBuffer()
        self.halves: set[int] = set()
        self.next_place: dict[Channel, int] = {}
        self.held_back: dict[tuple[Channel, int], tuple[int, Value]] = {}
        self.places: dict[tuple[str, int], int] = {}
        self.waiting: dict[tuple[int, int], list[tuple[str, int, Value]]] = {}
        self.num_in_bucket: dict[int, int] = {}
        self.own_moments: dict[tuple[str, int], Value] = {}
        self.relayed: set[tuple[str, int, int]] = set()
        self.sent: dict[str, set[int]] = {}
        self.output_sent = -1

    # What the exchanger calls.

    def begin_image(self) -> None:
        self.image += 1
        self.failure = None
        self.forget()
        early, self.early = self.early, []
        for packet in early:
            self.take(packet)

    def send(self, exchange: Exchange, version: int, parts: Sequence[Value], bucket: int | None) -> None:
        assert version not in self.sent.setdefault(exchange.layer, set()), "a version was published twice"
        self.sent[exchange.layer].add(version)
        if exchange.kind is ExchangeKind.MOMENTS:
            self.own_moments[exchange.layer, version] = parts[0]
            leaving = self.relays(exchange, version)
        else:
            leaving = [(message.reader, parts[place]) for place, message in self.leaving(exchange)]
        for reader, value in leaving:
            self.waiting.setdefault((reader, -1 if bucket is None else bucket), []).append(
                (exchange.layer, version, value)
            )
        if bucket is None:
            self.flush(-1)
            return
        self.num_in_bucket[bucket] = self.num_in_bucket.get(bucket, 0) + 1
        if self.num_in_bucket[bucket] == len(self.sharers(bucket, version)):
            del self.num_in_bucket[bucket]
            self.flush(bucket)

    def receive(self, exchange: Exchange, version: int, own: Sequence[Value]) -> Sequence[Value]:
        def value(source: int) -> Value:
            key = (exchange.layer, source)
            if self.failure is not None:
                raise RunError("another rank failed") from self.failure
            if not self.arrived.holds(key, version):
                raise NotYet
            return self.arrived.get(key, version)

        patches = range(self.plan.mesh.patch)
        if exchange.kind is ExchangeKind.MOMENTS:
            sides = (self.patch - 1, self.patch + 1)
            return [value(side) for side in sides if side in patches]
        if exchange.kind is ExchangeKind.CONTEXT:
            return [tuple(tag for p in patches for tag in (own[0] if p == self.patch else value(p)))]
        found = messages_of(exchange, self.plan.partition.patches)
        return [value(message.source) for message in found if message.reader == self.patch]

    def gather(self, exchange: Exchange, version: int, own: Value) -> Sequence[Value]:
        if self.output_sent < version:
            self.output_sent = version
            for rank in range(self.plan.mesh.size):
                self.put(rank, [(f"output of {self.rank}", version, own)])
        found = []
        for rank in range(self.plan.mesh.size):
            key = (f"output of {rank}", self.plan.mesh.patch_of(rank))
            if self.failure is not None:
                raise RunError("another rank failed") from self.failure
            if not self.arrived.holds(key, version):
                raise NotYet
            found.append(self.arrived.get(key, version))
        return found

    # Sending.

    def leaving(self, exchange: Exchange) -> Iterator[tuple[int, Message]]:
        found = messages_of(exchange, self.plan.partition.patches)
        own = [message for message in found if message.source == self.patch]
        whole = exchange.kind is ExchangeKind.CONTEXT
        return ((0 if whole else place, message) for place, message in enumerate(own))

    def sharers(self, bucket: int, version: int) -> list[str]:
        return [
            e.layer
            for e in self.plan.exchanges
            if travels_in_bucket(self.plan, e, version) == bucket and is_published(self.plan, e, version)
        ]

    def flush(self, bucket: int) -> None:
        for reader in range(self.plan.mesh.patch):
            contents = self.waiting.pop((reader, bucket), [])
            if contents:
                self.put(self.plan.mesh.patch * self.branch + reader, contents)

    def put(self, rank: int, contents: list[tuple[str, int, Value]]) -> None:
        numbered = []
        for layer, version, value in contents:
            place = self.places.get((layer, rank), 0)
            self.places[layer, rank] = place + 1
            numbered.append(((layer, self.patch), place, version, value))
        self.network.post(self.peers[rank], self.image, numbered)

    def relays(self, exchange: Exchange, version: int) -> list[tuple[int, Value]]:
        """Moments that can go on along the line: own, with what came from the other side merged in."""
        own = self.own_moments.get((exchange.layer, version))
        ready = []
        for towards in (self.patch + 1, self.patch - 1):
            behind = 2 * self.patch - towards
            key = (exchange.layer, behind)
            is_end = behind not in range(self.plan.mesh.patch)
            once = (exchange.layer, version, towards)
            if towards not in range(self.plan.mesh.patch) or own is None or once in self.relayed:
                continue
            if is_end or self.arrived.holds(key, version):
                self.relayed.add(once)
                ready.append((towards, own if is_end else self.arrived.get(key, version) + own))
        return ready

    # Receiving.

    def take(self, packet: Packet) -> None:
        if packet.image > self.image:
            self.early.append(packet)
        if packet.image != self.image:
            return
        if packet.number not in self.halves:
            self.halves.add(packet.number)
            return
        for channel, place, version, value in packet.contents:
            self.held_back[channel, place] = (version, value)
        for channel in {channel for channel, *_ in packet.contents}:
            self.release(channel)

    def release(self, channel: Channel) -> None:
        while (channel, self.next_place.get(channel, 0)) in self.held_back:
            place = self.next_place.get(channel, 0)
            version, value = self.held_back.pop((channel, place))
            self.next_place[channel] = place + 1
            self.arrived.put(channel, version, value)
            exchange = self.plan.by_layer.get(channel[0])
            if exchange is not None and exchange.kind is ExchangeKind.MOMENTS:
                for reader, relayed in self.relays(exchange, version):
                    self.put(
                        self.plan.mesh.patch * self.branch + reader, [(exchange.layer, version, relayed)]
                    )


# The ranks.


@dataclass
class Runner:
    """One rank: its layers, one after the other, step after step; it checks all that it reads."""

    plan: Plan
    rank: int
    endpoint: Endpoint
    exchanger: Exchanger[Value] = field(init=False)
    actions: Iterator[bool] = field(init=False)
    is_done: bool = True

    def __post_init__(self) -> None:
        self.exchanger = Exchanger(self.plan, self.rank, self.endpoint)
        self.actions = iter(())

    @property
    def image(self) -> int:
        return self.endpoint.image

    def begin_image(self) -> None:
        self.exchanger.begin_image()
        self.is_done = False
        self.actions = self.run()

    def advance(self) -> bool:
        """One action; False if the rank waits, or has nothing to do."""
        return next(self.actions, False)

    def run(self) -> Iterator[bool]:
        for step in range(self.plan.image.num_inference_steps):
            assert self.exchanger.begin_step() == step
            for exchange in self.plan.exchanges[:-1]:
                self.exchanger.publish(exchange.layer, self.parts(exchange, step))
                yield True
                while True:
                    try:
                        found = self.exchanger.collect(exchange.layer)
                    except NotYet:
                        yield False
                        continue
                    break
                self.check(exchange, step, found)
                yield True
            while True:
                try:
                    outputs = self.exchanger.gather((self.tag("output", self.exchanger.patch, step),))
                except NotYet:
                    yield False
                    continue
                break
            self.check_outputs(outputs, step)
            yield True
        self.check_what_was_sent()
        self.is_done = True

    def tag(self, layer: str, patch: int, version: int, piece: int = 0) -> Tag:
        return Tag(self.image, self.exchanger.branch, layer, patch, version, piece)

    def parts(self, exchange: Exchange, step: int) -> list[Value]:
        own = self.exchanger.patch
        count = 1
        if exchange.kind is ExchangeKind.HALO:
            found = messages_of(exchange, self.plan.partition.patches)
            count = sum(message.source == own for message in found)
        return [(self.tag(exchange.layer, own, step, piece),) for piece in range(count)]

    def check(self, exchange: Exchange, step: int, found: Sequence[Value] | None) -> None:
        version = expected_version(exchange, step, self.plan.warmup_steps)
        if version is None:
            assert found is None
            return
        own, layer, patches = self.exchanger.patch, exchange.layer, range(self.plan.mesh.patch)
        expected: list[Value] = []
        if exchange.kind is ExchangeKind.MOMENTS:
            before = tuple(self.tag(layer, patch, version) for patch in patches[:own])
            after = tuple(self.tag(layer, patch, version) for patch in patches[:own:-1])
            expected = [side for side in (before, after) if side]
        elif exchange.kind is ExchangeKind.CONTEXT:
            expected = [tuple(self.tag(layer, p, step if p == own else version) for p in patches)]
        else:
            pieces: dict[int, int] = {}
            for message in messages_of(exchange, self.plan.partition.patches):
                piece = pieces.get(message.source, 0)
                pieces[message.source] = piece + 1
                if message.reader == own:
                    expected.append((self.tag(layer, message.source, version, piece),))
        assert list(found or ()) == expected, f"rank {self.rank}, step {step}, {layer}"

    def check_outputs(self, outputs: Sequence[Value], step: int) -> None:
        mesh = self.plan.mesh
        assert [(tag.branch, tag.patch) for (tag,) in outputs] == [
            (mesh.branch_of(rank), mesh.patch_of(rank)) for rank in range(mesh.size)
        ]
        assert {(tag.image, tag.version) for (tag,) in outputs} == {(self.image, step)}

    def check_what_was_sent(self) -> None:
        """Neither more nor less than what somebody reads."""
        for exchange in self.plan.exchanges[:-1]:
            steps = range(self.plan.image.num_inference_steps)
            read = {expected_version(exchange, step, self.plan.warmup_steps) for step in steps} - {None}
            assert self.endpoint.sent.get(exchange.layer, set()) == read, exchange.layer


class ExchangerMachine(RuleBasedStateMachine):
    """Random schedules of ranks and deliveries."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()
        self.runners: list[Runner] = []
        self.is_aborted = False

    @initialize(plan=plans())
    def open(self, plan: Plan) -> None:
        verify(plan)
        self.peers: dict[int, Endpoint] = {}
        for rank in range(plan.mesh.size):
            self.peers[rank] = Endpoint(plan, rank, self.network, self.peers)
        self.runners = [Runner(plan, rank, endpoint) for rank, endpoint in self.peers.items()]
        self.is_aborted = False
        for runner in self.runners:
            runner.begin_image()

    @precondition(lambda self: not self.is_aborted)
    @rule(place=st.integers(0, 9), actions=st.integers(1, 40))
    def run_one_rank(self, place: int, actions: int) -> None:
        runner = self.runners[place % len(self.runners)]
        for _ in range(actions):
            if not runner.advance():
                break

    @precondition(lambda self: not self.is_aborted)
    @rule(seed=st.integers(0, 2**16), actions=st.integers(1, 60))
    def run_all_ranks_at_their_own_pace(self, seed: int, actions: int) -> None:
        chance = random.Random(seed)
        for _ in range(actions):
            chance.choice(self.runners).advance()

    @rule(place=st.integers(0, 10**6))
    def deliver_one_packet(self, place: int) -> None:
        flying = self.network.in_flight
        self.network.deliver(flying[place % len(flying) :][:1] if flying else [])

    @rule(seed=st.integers(0, 2**16), share=st.floats(0, 1))
    def deliver_a_burst_in_any_order(self, seed: int, share: float) -> None:
        flying = list(self.network.in_flight)
        random.Random(seed).shuffle(flying)
        self.network.deliver(flying[: round(share * len(flying))])

    @rule(count=st.integers(1, 30))
    def deliver_the_newest_first(self, count: int) -> None:
        self.network.deliver(self.network.in_flight[: -count - 1 : -1])

    @precondition(lambda self: not self.is_aborted)
    @rule(place=st.integers(0, 9))
    def a_rank_that_has_finished_begins_the_next_image_before_the_others(self, place: int) -> None:
        runner = self.runners[place % len(self.runners)]
        if runner.is_done and all(other.is_done or other.image == runner.image for other in self.runners):
            runner.begin_image()

    @precondition(lambda self: not self.is_aborted and any(r.exchanger.step > 0 for r in self.runners))
    @rule(place=st.integers(0, 9))
    def abort_in_the_middle(self, place: int) -> None:
        """One rank fails: each of the others goes on while it needs nothing, and is then told, at its next read."""
        failed = place % len(self.runners)
        for endpoint in self.peers.values():
            endpoint.failure = ValueError("a layer raised")
        for rank, runner in enumerate(self.runners):
            if rank != failed and not runner.is_done:
                self.run_until_told(runner)
        self.is_aborted = True

    def run_until_told(self, runner: Runner) -> None:
        try:
            while runner.advance():
                pass
        except RunError:
            return
        raise AssertionError("a rank of an aborted run waits for ever")

    @precondition(lambda self: self.is_aborted or any(r.exchanger.step > 0 for r in self.runners))
    @rule(seed=st.integers(0, 2**16))
    def begin_a_new_image(self, seed: int) -> None:
        """On all ranks, in any order, whatever is still in flight."""
        latest = max(runner.image for runner in self.runners)
        order = list(self.runners)
        random.Random(seed).shuffle(order)
        for runner in order:
            runner.endpoint.image = latest
            runner.begin_image()
        self.is_aborted = False

    @precondition(lambda self: self.is_aborted or any(r.exchanger.step > 1 for r in self.runners))
    @rule(plan=plans())
    def change_the_resolution(self, plan: Plan) -> None:
        """Another plan: other ranks, bands and layers, while packets of the last one still fly."""
        self.open(plan)

    def teardown(self) -> None:
        """With everything delivered in the end, every rank finishes: nobody waits for what nobody sends."""
        if not self.runners or self.is_aborted:
            return
        newest = max(runner.image for runner in self.runners)
        for _ in range(100_000):
            self.network.deliver(list(self.network.in_flight))
            for runner in self.runners:
                if runner.is_done and runner.image < newest:
                    runner.begin_image()
            moved = [runner.advance() for runner in self.runners]
            if not any(moved) and not self.network.in_flight:
                break
        assert all(runner.is_done for runner in self.runners), "a rank waits for ever"


TestExchangerMachine = ExchangerMachine.TestCase
TestExchangerMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_random_plans_meet_every_kind_and_policy() -> None:
    """The machine is worth nothing if its plans are all alike."""
    from hypothesis import find

    for kind, allowed in ALLOWED.items():
        for policy in allowed:
            find(plans(), lambda p, k=kind, s=policy: any((e.kind, e.steady) == (k, s) for e in p.exchanges))
    find(plans(), lambda p: p.num_buckets > 1 and p.mesh.cfg == 2)
    find(plans(), lambda p: any(e.warmup is Policy.LOCAL and e.steady in READS_LATE for e in p.exchanges))
