import dataclasses
import json

import networkx as nx
import pytest

from distri.core.graph import LayerGraph, OperationKind
from distri.core.graph_text import describe, to_dot, totals
from distri.core.policy import ExchangeKind
from distri.core.shape import Extent, full_rect
from distri.errors import ModelError

NATIVE = Extent(1, 77, full_rect(128, 128))


def test_json_and_back_is_the_same_graph(sdxl: LayerGraph) -> None:
    text = json.dumps(sdxl.to_dict())
    again = LayerGraph.from_dict(json.loads(text))
    assert again == sdxl
    assert again.fingerprint == sdxl.fingerprint


def test_the_network_is_a_dag_in_execution_order(sdxl: LayerGraph) -> None:
    network = sdxl.network
    assert nx.is_directed_acyclic_graph(network)
    assert all(parent < child for parent, child in network.edges)
    assert [network.nodes[index]["operation"] for index in network] == list(sdxl)


def test_sdxl_has_the_layers_and_parameters_that_it_is_known_for(sdxl: LayerGraph) -> None:
    count = {kind: sum(op.kind is kind for op in sdxl) for kind in OperationKind}
    assert sdxl.weight_elements == 2_567_463_684
    assert count[OperationKind.SELF_ATTENTION] == count[OperationKind.CROSS_ATTENTION] == 70
    assert count[OperationKind.RESAMPLE] == 2
    assert sdxl.alignment == (4, "down_blocks.1.downsamplers.0.conv")


def test_exchanges_follow_from_what_an_operation_is(sdxl: LayerGraph) -> None:
    for operation in sdxl:
        if operation.kind is OperationKind.GROUP_NORM:
            assert operation.exchange is ExchangeKind.MOMENTS
        elif operation.kind is OperationKind.SELF_ATTENTION:
            assert operation.exchange is ExchangeKind.CONTEXT
        elif operation.kind is not OperationKind.CONVOLUTION:
            assert operation.exchange is None
    assert next(op for op in sdxl if op.path == "conv_in").exchange is None
    assert all(op.exchange is ExchangeKind.HALO for op in sdxl if op.path.endswith(".conv1"))


def test_totals_are_sums_over_kinds_and_over_operations(sdxl: LayerGraph) -> None:
    body = describe(sdxl, NATIVE, 2)
    for column in ("macs", "weight_bytes", "activation_bytes"):
        assert body["totals"][column] == sum(item[column] for item in body["operations"])
        assert body["totals"][column] == sum(row[column] for row in body["totals"]["kinds"].values())
    assert body["totals"]["macs"] == sdxl.macs(NATIVE)
    assert body["totals"]["weight_bytes"] == 2 * sdxl.weight_elements


def test_a_described_graph_reads_back_as_the_graph(demo: LayerGraph) -> None:
    assert LayerGraph.from_dict(json.loads(json.dumps(describe(demo, NATIVE, 4)))) == demo


def test_macs_of_a_convolution_grow_with_the_area(demo: LayerGraph) -> None:
    def convolutions(rows: int) -> int:
        return totals(demo, Extent(1, 77, full_rect(rows, 64)), 2)["kinds"]["convolution"]["macs"]

    assert convolutions(128) == 2 * convolutions(64)


def test_dot_has_a_node_an_operation_and_an_edge_a_tensor(demo: LayerGraph) -> None:
    lines = to_dot(demo, NATIVE).splitlines()
    assert lines[0] == 'digraph "demo" {'
    assert lines[-1] == "}"
    assert sum(" -> " in line for line in lines) == demo.network.number_of_edges()
    assert sum("[label=" in line for line in lines) == len(demo)


def test_another_schema_is_refused(demo: LayerGraph) -> None:
    with pytest.raises(ModelError, match="a layer graph of schema 1 is required, not 2"):
        LayerGraph.from_dict({**demo.to_dict(), "schema": 2})


def test_a_malformed_graph_is_refused(demo: LayerGraph) -> None:
    body = demo.to_dict()
    body["operations"][0]["kind"] = "magic"
    with pytest.raises(ModelError, match="malformed layer graph"):
        LayerGraph.from_dict(body)


def test_the_fingerprint_changes_with_any_operation(demo: LayerGraph) -> None:
    first = dataclasses.replace(demo.operations[0], weight_elements=1)
    changed = dataclasses.replace(demo, operations=(first, *demo.operations[1:]))
    assert changed.fingerprint != demo.fingerprint
