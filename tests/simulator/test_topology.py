from itertools import permutations

import pytest

from distri.config.hardware import load_cluster
from distri.simulator.hardware import LinkKind, NodeKind
from distri.simulator.topology import Topology


def kinds(topology: Topology, source: int, target: int) -> set[LinkKind]:
    return {topology.channels[index].link.kind for index, _ in topology.route(source, target).loads}


def test_devices_of_a_host_talk_over_nvlink_and_hosts_over_infiniband() -> None:
    topology = Topology(load_cluster("a100-sxm-2x8"))
    assert kinds(topology, 0, 7) == {LinkKind.NVLINK}
    assert kinds(topology, 0, 8) == {LinkKind.PCIE, LinkKind.INFINIBAND}
    assert topology.route(0, 7).bandwidth_bytes_per_s == 300 * 10**9
    assert topology.route(0, 8).bandwidth_bytes_per_s == 25 * 10**9


def test_every_device_of_a_host_has_a_network_card_of_its_own() -> None:
    topology = Topology(load_cluster("a100-sxm-2x8"))
    used = [
        {
            topology.channels[c].name
            for c, _ in topology.route(rank, rank + 8).loads
            if "fabric" in topology.channels[c].name
        }
        for rank in range(8)
    ]
    assert len(set.union(*used)) == 16
    assert all(len(names) == 2 for names in used)


def test_without_peer_to_peer_a_message_crosses_host_memory() -> None:
    topology = Topology(load_cluster("rtx4090"))
    assert LinkKind.MEMORY in kinds(topology, 0, 1)
    assert LinkKind.MEMORY not in kinds(Topology(load_cluster("a100-pcie")), 0, 1)


@pytest.mark.parametrize("name", ["a100-sxm", "a100-pcie", "rtx4090", "cpu-gloo", "a100-sxm-2x8"])
def test_no_route_passes_through_a_third_device(name: str) -> None:
    cluster = load_cluster(name)
    topology = Topology(cluster)
    devices = {node.name for node in cluster.nodes if node.kind is NodeKind.DEVICE}
    for source, target in permutations(range(0, cluster.num_ranks, 3), 2):
        ends = {cluster.devices[source].node, cluster.devices[target].node}
        for index, _ in topology.route(source, target).loads:
            link = topology.channels[index].link
            assert {link.source, link.target} & devices <= ends


@pytest.mark.parametrize("name", ["a100-sxm", "a100-pcie", "a100-sxm-2x8"])
def test_the_two_directions_of_a_route_share_no_channel(name: str) -> None:
    topology = Topology(load_cluster(name))
    last = topology.cluster.num_ranks - 1
    there, back = topology.route(0, last), topology.route(last, 0)
    assert not {index for index, _ in there.loads} & {index for index, _ in back.loads}
    assert (there.latency_ns, there.bandwidth_bytes_per_s) == (back.latency_ns, back.bandwidth_bytes_per_s)


def test_routes_are_the_same_every_time() -> None:
    routes = [
        [Topology(load_cluster("a100-sxm-2x8")).route(0, rank) for rank in range(1, 16)] for _ in range(2)
    ]
    assert routes[0] == routes[1]
