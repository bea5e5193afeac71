"""A layer graph at one image size, as JSON values and as DOT: each operation with its numbers, and the totals."""

from __future__ import annotations

from typing import Any

from distri.core.graph import LayerGraph, Operation, OperationKind
from distri.core.policy import ExchangeKind
from distri.core.shape import Extent


def describe(graph: LayerGraph, extent: Extent, element_bytes: int) -> dict[str, Any]:
    """The graph's own JSON, each operation with what it comes to at this size, and totals.

    `LayerGraph.from_dict` reads the result back as the same graph.
    """
    body = graph.to_dict()
    for item, operation in zip(body["operations"], graph, strict=True):
        item.update(_numbers(operation, extent, element_bytes))
    return {**body, "totals": totals(graph, extent, element_bytes)}


def _numbers(operation: Operation, extent: Extent, element_bytes: int) -> dict[str, Any]:
    return {
        "input_shapes": [list(extent.shape(shape)) for shape in operation.inputs],
        "output_shape": list(extent.shape(operation.output)),
        "macs": operation.macs(extent),
        "weight_bytes": operation.weight_bytes(element_bytes),
        "activation_bytes": operation.activation_bytes(extent, element_bytes),
        "exchange": operation.exchange.value if operation.exchange else "none",
    }


def totals(graph: LayerGraph, extent: Extent, element_bytes: int) -> dict[str, Any]:
    """Sums over one forward pass: all of it, by kind of operation, and the exchanges that a split would need."""
    kinds = {}
    for kind in OperationKind:
        chosen = [operation for operation in graph if operation.kind is kind]
        if chosen:
            kinds[kind.value] = {
                "operations": len(chosen),
                "macs": sum(operation.macs(extent) for operation in chosen),
                "weight_bytes": sum(operation.weight_bytes(element_bytes) for operation in chosen),
                "activation_bytes": sum(op.activation_bytes(extent, element_bytes) for op in chosen),
            }
    columns = ("operations", "macs", "weight_bytes", "activation_bytes")
    exchanges = {
        kind.value: sum(operation.exchange is kind for operation in graph)
        for kind in ExchangeKind
        if kind is not ExchangeKind.OUTPUT
    }
    return {
        **{column: sum(row[column] for row in kinds.values()) for column in columns},
        "parameters": graph.weight_elements,
        "exchanges": exchanges,
        "kinds": kinds,
    }


def to_dot(graph: LayerGraph, extent: Extent) -> str:
    """Graphviz text: a node an operation, filled where it needs an exchange; an edge a tensor."""
    lines = [f"digraph {_quoted(graph.name)} {{", '  node [shape=box, fontname="monospace"];']
    for operation in graph:
        shape = "x".join(map(str, extent.shape(operation.output)))
        label = f"{operation.path or graph.name}\n{operation.function or operation.kind.value}\n{shape}"
        style = f", style=filled, fillcolor={_FILL[operation.exchange]}" if operation.exchange else ""
        lines.append(f"  {operation.index} [label={_quoted(label)}{style}];")
    lines += [f"  {parent} -> {op.index};" for op in graph for parent in op.parents]
    return "\n".join([*lines, "}"])


_FILL = {
    ExchangeKind.HALO: "lightblue",
    ExchangeKind.MOMENTS: "lightyellow",
    ExchangeKind.CONTEXT: "lightpink",
}


def _quoted(text: str) -> str:
    r"""A DOT string.

    >>> print(_quoted('a "b"'))
    "a \"b\""
    """
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
