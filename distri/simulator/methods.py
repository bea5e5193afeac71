"""The methods that people compare, as plans: a policy table and a mesh each; one alone needs its own lowering.

    original           one device, the unmodified model
    displaced          stale activations of the other patches (any table; `corrected` by default)
    full_sync          every exchange fresh at every step
    naive_patch        every patch for itself, no interaction at all
    no_communication   displaced computation with what the warm-up brought, nothing sent afterwards: an upper bound
    tensor_parallel    channels split in place of the picture, two all-reduces a block

All of them go with the guidance branches split over two halves of the ranks.
"""

from __future__ import annotations

import dataclasses

from distri.core.graph import LayerGraph
from distri.core.plan import Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.errors import PlanError
from distri.simulator.hardware import Word
from distri.simulator.lowering import Lowering
from distri.simulator.tasks import TaskList
from distri.simulator.tensor_parallel import TensorParallelLowering


class Method(Word):
    """How a picture is spread over devices."""

    ORIGINAL = "original"
    DISPLACED = "displaced"
    FULL_SYNC = "full_sync"
    NAIVE_PATCH = "naive_patch"
    NO_COMMUNICATION = "no_communication"
    TENSOR_PARALLEL = "tensor_parallel"


_TABLES = {
    Method.ORIGINAL: "local",
    Method.FULL_SYNC: "full_sync",
    Method.NAIVE_PATCH: "naive_patch",
    Method.NO_COMMUNICATION: "no_sync",
    Method.TENSOR_PARALLEL: "local",
}


def method_of(name: str) -> Method:
    """A method by its name.

    Raises:
        PlanError: there is none of that name.
    """
    try:
        return Method(name)
    except ValueError:
        raise PlanError(f"unknown method {name!r}; known: {', '.join(Method)}") from None


def plan_of(method: Method, request: PlanRequest, graph: LayerGraph) -> Plan:
    """The plan of a method for a request; `displaced` keeps the request's policy table.

    Raises:
        PlanError: `original` is for one device.
        PartitionError: the image does not split this way.
    """
    if method is Method.ORIGINAL and request.num_ranks != 1:
        raise PlanError(
            f"method 'original' is for 1 device, not {request.num_ranks}; use --gpus 1 or another method"
        )
    if method in _TABLES:
        request = dataclasses.replace(request, policy=policy_table(_TABLES[method]))
    return make_plan(request, graph)


def lower_method(lowering: Lowering, plan: Plan, method: Method) -> TaskList:
    """The tasks of a method's plan."""
    if method is Method.TENSOR_PARALLEL and plan.mesh.patch > 1:
        return TensorParallelLowering(lowering, plan).lower()
    return lowering.lower(plan)
