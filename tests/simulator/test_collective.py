import math

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from distri.config.hardware import load_cluster
from distri.errors import HardwareError
from distri.simulator.collective import CollectiveModel, bus_factor
from distri.simulator.hardware import Collective, Tag
from distri.simulator.link import LinkNetwork

MODELS = {
    name: CollectiveModel(load_cluster(name))
    for name in ("a100-sxm", "h100-sxm", "h200", "a100-pcie", "rtx4090")
}
FOUR_HOSTS = CollectiveModel(load_cluster("a100-sxm-4x8"))

# Rows that nothing was fitted to: nccl-tests, 8-bit data, microseconds, collected by NVIDIA aiconfigurator
# (Apache-2.0; nccl_a100_sxm_comm_nccl_2.27.3, int8 rows): (collective, ranks, bytes, us).
HELD_OUT = [
    (Collective.ALL_GATHER, 2, 4096, 9.30),
    (Collective.ALL_GATHER, 2, 262144, 13.48),
    (Collective.ALL_GATHER, 2, 8388608, 60.25),
    (Collective.ALL_GATHER, 2, 134217728, 496.5),
    (Collective.ALL_GATHER, 4, 32768, 15.03),
    (Collective.ALL_GATHER, 4, 524288, 18.31),
    (Collective.ALL_GATHER, 4, 16777216, 118.3),
    (Collective.ALL_GATHER, 4, 134217728, 580.9),
    (Collective.ALL_GATHER, 8, 512, 15.51),
    (Collective.ALL_GATHER, 8, 1048576, 26.12),
    (Collective.ALL_GATHER, 8, 8388608, 73.98),
    (Collective.ALL_GATHER, 8, 67108864, 350.8),
    (Collective.ALL_REDUCE, 8, 65536, 30.89),
    (Collective.ALL_REDUCE, 8, 4194304, 75.18),
    (Collective.ALL_REDUCE, 8, 134217728, 1220.7),
    (Collective.ALL_TO_ALL, 8, 1048576, 26.03),
    (Collective.ALL_TO_ALL, 8, 67108864, 348.5),
    (Collective.REDUCE_SCATTER, 8, 16777216, 144.7),
]


def test_held_out_rows_are_predicted_within_eight_percent_on_average() -> None:
    errors = []
    for collective, num_ranks, num_bytes, measured_us in HELD_OUT:
        cost = MODELS["a100-sxm"].cost(collective, num_bytes, range(num_ranks))
        errors.append(abs(cost.alone_s * 1e6 / measured_us - 1))
    assert sum(errors) / len(errors) < 0.08
    assert max(errors) < 0.30


def test_a_group_over_hosts_comes_close_to_what_was_measured_there() -> None:
    # p5en, 4 hosts of 8 H200, all-reduce of 4 GiB on 32 ranks: 365 GB/s of bus (stas00/ml-engineering).
    model = CollectiveModel(load_cluster("h200", num_hosts=4))
    cost = model.cost(Collective.ALL_REDUCE, 2**32, range(32))
    assert cost.wire_bytes / cost.alone_s == pytest.approx(365e9, rel=0.08)
    assert cost.tag is Tag.DATA_SHEET


def test_the_tag_says_how_a_cost_is_known() -> None:
    sxm, pcie = MODELS["a100-sxm"], MODELS["a100-pcie"]
    assert sxm.cost(Collective.ALL_GATHER, 2**20, range(8)).tag is Tag.FITTED
    assert sxm.cost(Collective.ALL_GATHER, 2**20, range(6)).tag is Tag.INTERPOLATED
    assert sxm.cost(Collective.BROADCAST, 2**20, range(8)).tag is Tag.INTERPOLATED
    assert sxm.cost(Collective.POINT_TO_POINT, 2**20, (3, 4)).tag is Tag.INTERPOLATED
    assert pcie.cost(Collective.ALL_GATHER, 2**20, range(8)).tag is Tag.DATA_SHEET
    assert "NCCL" in pcie.cost(Collective.ALL_GATHER, 2**20, range(8)).source


def test_group_sizes_between_measured_ones_cost_something_between() -> None:
    model = MODELS["a100-sxm"]
    for num_bytes in (512, 2**20, 2**27):
        two, three, four, six, eight = (
            model.cost(Collective.ALL_GATHER, num_bytes, range(n)).alone_s for n in (2, 3, 4, 6, 8)
        )
        assert two < three < four < six < eight


def test_a_blocking_call_costs_extra() -> None:
    free, waited = (
        MODELS["a100-sxm"].cost(Collective.ALL_REDUCE, 4096, range(8), is_blocking=blocking)
        for blocking in (False, True)
    )
    assert waited.fixed_s - free.fixed_s == pytest.approx(45e-6)
    assert waited.wire_bytes == free.wire_bytes


def test_without_nvlink_or_peer_to_peer_gathers_are_slower() -> None:
    times = [
        MODELS[name].cost(Collective.ALL_GATHER, 2**25, range(8)).alone_s
        for name in ("h100-sxm", "a100-sxm", "a100-pcie", "rtx4090")
    ]
    assert times == sorted(times)
    assert times[2] > 5 * times[1]


@settings(deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(list(Collective)),
    st.integers(2, 8),
    st.integers(1, 2**30),
    st.integers(1, 2**30),
)
def test_more_bytes_never_cost_less(
    name: str, collective: Collective, num_ranks: int, first: int, more: int
) -> None:
    ranks = range(2 if collective is Collective.POINT_TO_POINT else num_ranks)
    small, large = (MODELS[name].cost(collective, size, ranks) for size in (first, first + more))
    assert small.alone_s <= large.alone_s * (1 + 1e-12)
    assert small.wire_bytes == math.ceil(bus_factor(collective, len(ranks)) * first)


@settings(deadline=None)
@given(st.sampled_from(list(Collective)), st.integers(1, 2**28), st.sampled_from([8, 16, 32]))
def test_a_collective_alone_on_the_links_takes_its_closed_form(
    collective: Collective, num_bytes: int, num_ranks: int
) -> None:
    ranks = (0, num_ranks - 1) if collective is Collective.POINT_TO_POINT else range(num_ranks)
    cost = FOUR_HOSTS.cost(collective, num_bytes, ranks)
    env = simpy.Environment()
    network = LinkNetwork(env, FOUR_HOSTS.topology.channels)
    env.run(network.start(cost.flow((0, 0, 0))))
    assert env.now == pytest.approx(cost.alone_s * 1e9, rel=1e-6, abs=3)
    assert all(network.transmitted_bytes[index] > 0 for index, _ in cost.loads)


def test_two_gathers_of_four_do_not_disturb_each_other_behind_a_switch_but_do_on_a_shared_bus() -> None:
    def together_over_alone(name: str) -> float:
        model = MODELS[name]
        costs = [model.cost(Collective.ALL_GATHER, 2**26, ranks) for ranks in ((0, 2, 4, 6), (1, 3, 5, 7))]
        env = simpy.Environment()
        network = LinkNetwork(env, model.topology.channels)
        env.run(env.all_of([network.start(cost.flow((rank, 0, 0))) for rank, cost in enumerate(costs)]))
        return env.now / (costs[0].alone_s * 1e9)

    assert together_over_alone("a100-sxm") == pytest.approx(1, abs=1e-3)
    assert together_over_alone("a100-pcie") == pytest.approx(2, rel=0.05)


def test_groups_of_one_and_empty_messages_cost_nothing() -> None:
    assert MODELS["h200"].cost(Collective.ALL_REDUCE, 2**20, [3]).alone_s == 0
    assert MODELS["h200"].cost(Collective.ALL_REDUCE, 0, range(4)).alone_s == 0


def test_groups_that_cannot_be_are_refused() -> None:
    with pytest.raises(HardwareError, match=r"different ranks of the cluster; got \[0, 8\]"):
        MODELS["h200"].cost(Collective.ALL_GATHER, 10, [0, 8])
    with pytest.raises(HardwareError, match="a source and a target"):
        MODELS["h200"].cost(Collective.POINT_TO_POINT, 10, [0, 1, 2])
