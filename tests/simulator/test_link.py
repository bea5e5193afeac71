from itertools import permutations

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from distri.simulator.hardware import Duplex, Figure, Link, LinkKind, Tag
from distri.simulator.link import Flow, LinkNetwork, alone_ns, flow_of, two_alone_ns
from distri.simulator.topology import NANOSECONDS, Channel, Route


def channel(capacity: int, latency_s: float = 0.0) -> Channel:
    figures = [Figure(float(value), Tag.ASSUMED, "a test's") for value in (capacity, latency_s)]
    return Channel("a -> b", capacity, Link("a", "b", LinkKind.VIRTUAL, *figures, Duplex.FULL))


def run(
    capacities: list[int], flows: list[tuple[int, Flow]], record: bool = False
) -> tuple[dict[tuple[int, int, int], int], LinkNetwork]:
    """When each flow ends, given (start in ns, flow), and the network afterwards."""
    env = simpy.Environment()
    network = LinkNetwork(env, [channel(capacity) for capacity in capacities], record)
    ends: dict[tuple[int, int, int], int] = {}

    def start(flow: Flow) -> None:
        network.start(flow).callbacks.append(lambda event: ends.__setitem__(event.value, int(env.now)))

    for start_ns, flow in flows:
        env.timeout(start_ns).callbacks.append(lambda _, flow=flow: start(flow))
    env.run()
    return ends, network


capacities = st.integers(10**6, 10**12)
sizes = st.integers(1, 10**9)


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, Flow]]]:
    rates = draw(st.lists(capacities, min_size=1, max_size=5))
    flows = []
    for number in range(draw(st.integers(1, 8))):
        used = draw(st.lists(st.integers(0, len(rates) - 1), min_size=1, max_size=3, unique=True))
        loads = tuple((index, draw(st.integers(1, 3))) for index in sorted(used))
        limit = draw(st.none() | st.integers(10**5, 10**12))
        flow = Flow((number, 0, 0), draw(sizes), loads, draw(st.integers(0, 50_000)), limit)
        flows.append((draw(st.integers(0, 200_000)), flow))
    return rates, flows


@settings(deadline=None)
@given(workloads())
def test_no_channel_is_ever_above_its_capacity(workload) -> None:
    rates, flows = workload
    _, network = run(rates, flows, record=True)
    assert network.load_history
    assert all(0 <= load <= rates[index] for _, index, load in network.load_history)
    assert network.loads_bytes_per_s() == (0,) * len(rates)


@settings(deadline=None)
@given(workloads())
def test_bytes_in_are_bytes_out(workload) -> None:
    rates, flows = workload
    ends, network = run(rates, flows, record=True)
    assert set(ends) == {flow.key for _, flow in flows}
    sent = [sum(flow.num_bytes * dict(flow.loads).get(c, 0) for _, flow in flows) for c in range(len(rates))]
    assert network.transmitted_bytes == sent
    carried = [0] * len(rates)
    last = [(0, 0)] * len(rates)
    for time_ns, index, load in network.load_history:
        carried[index] += last[index][1] * (time_ns - last[index][0])
        last[index] = (time_ns, load)
    for index, work in enumerate(carried):
        # A flow ends in the nanosecond in which its last byte goes: less than one of its rate is idle.
        num_flows = sum(index in dict(flow.loads) for _, flow in flows)
        assert sent[index] * NANOSECONDS <= work <= sent[index] * NANOSECONDS + num_flows * rates[index]


@settings(deadline=None)
@given(workloads())
def test_no_flow_ends_before_it_could_alone(workload) -> None:
    rates, flows = workload
    ends, _ = run(rates, flows)
    channels = [channel(rate) for rate in rates]
    assert all(ends[flow.key] >= start + alone_ns(flow, channels) for start, flow in flows)


@settings(deadline=None)
@given(workloads(), st.randoms(use_true_random=False))
def test_the_order_in_which_flows_are_started_does_not_matter(workload, random) -> None:
    rates, flows = workload
    together = [(0, Flow(f.key, f.num_bytes, f.loads, f.latency_ns, f.limit_bytes_per_s)) for _, f in flows]
    shuffled = together[:]
    random.shuffle(shuffled)
    first, second = run(rates, together)[0], run(rates, shuffled)[0]
    assert first == second


@settings(deadline=None)
@given(capacities, sizes, st.integers(0, 10**6))
def test_one_message_alone_matches_the_closed_form(capacity: int, num_bytes: int, latency_ns: int) -> None:
    route = Route(0, 1, ((0, 1),), latency_ns, capacity)
    flow = flow_of((0, 0, 0), num_bytes, route)
    ends, _ = run([capacity], [(0, flow)])
    assert ends[0, 0, 0] == route.alone_ns(num_bytes) == alone_ns(flow, [channel(capacity)])


@settings(deadline=None)
@given(capacities, sizes, sizes, st.integers(0, 10**7))
def test_two_messages_alone_match_the_closed_form(
    capacity: int, first: int, second: int, gap_ns: int
) -> None:
    flows = [(0, Flow((0, 0, 0), first, ((0, 1),))), (gap_ns, Flow((1, 0, 0), second, ((0, 1),)))]
    ends, _ = run([capacity], flows)
    assert (ends[0, 0, 0], ends[1, 0, 0]) == two_alone_ns(first, second, gap_ns, capacity)


@settings(deadline=None)
@given(capacities, st.integers(0, 10**9), sizes, st.integers(0, 10**5), st.integers(0, 10**5))
def test_a_single_flow_is_never_slower_on_a_better_link(
    capacity: int, more: int, num_bytes: int, latency_ns: int, longer_ns: int
) -> None:
    def alone(rate: int, wait: int) -> int:
        return run([rate], [(0, Flow((0, 0, 0), num_bytes, ((0, 1),), wait))])[0][0, 0, 0]

    assert alone(capacity + more, latency_ns) <= alone(capacity, latency_ns)
    assert alone(capacity, latency_ns) <= alone(capacity, latency_ns + longer_ns)


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(10**6, 10**9))
def test_equal_flows_share_equally_and_end_together(num_flows: int, num_bytes: int) -> None:
    flows = [(0, Flow((rank, 0, 0), num_bytes, ((0, 1),))) for rank in range(num_flows)]
    ends, _ = run([10**9 * num_flows], flows)
    assert set(ends.values()) == {-(-num_bytes * NANOSECONDS // 10**9)}


@settings(max_examples=30, deadline=None)
@given(st.integers(10**6, 10**8))
def test_a_flow_held_back_elsewhere_leaves_its_share_to_others(num_bytes: int) -> None:
    slow = Flow((0, 0, 0), num_bytes, ((0, 1), (1, 1)))
    fast = Flow((1, 0, 0), 9 * num_bytes, ((1, 1),))
    ends, _ = run([10**9, 10**10], [(0, slow), (0, fast)])
    assert ends[0, 0, 0] == ends[1, 0, 0] == num_bytes


def test_latency_loads_nothing() -> None:
    waiting = Flow((0, 0, 0), 1000, ((0, 1),), latency_ns=5000)
    moving = Flow((1, 0, 0), 4000, ((0, 1),))
    ends, _ = run([10**9], [(0, waiting), (0, moving)])
    assert ends == {(1, 0, 0): 4000, (0, 0, 0): 6000}


def test_a_weight_is_a_multiple_of_the_rate() -> None:
    ends, network = run([10**9], [(0, Flow((0, 0, 0), 1000, ((0, 4),)))])
    assert ends[0, 0, 0] == 4000
    assert network.transmitted_bytes == [4000]
    assert network.busy_ns == [4000]


def test_ends_at_the_same_nanosecond_are_reported_in_order_of_rank_stream_operation() -> None:
    keys = [(0, 0, 1), (0, 1, 0), (1, 0, 0)]
    for order in permutations(keys):
        ends, _ = run([3 * 10**9], [(0, Flow(key, 1000, ((0, 1),))) for key in order])
        assert list(ends) == keys


def test_empty_messages_end_after_their_latency() -> None:
    assert run([10**9], [(0, Flow((0, 0, 0), 0, ((0, 1),), 700))])[0] == {(0, 0, 0): 700}


def test_two_flows_under_way_cannot_have_one_key() -> None:
    with pytest.raises(AssertionError, match="two flows under way"):
        run([10**9], [(0, Flow((0, 0, 0), 10, ((0, 1),))), (1, Flow((0, 0, 0), 10, ((0, 1),)))])
