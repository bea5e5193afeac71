"""When one exchange's value is made, leaves and is read, on rank 0 of a steady step with nothing in its way."""

from __future__ import annotations

from distri.core.graph import LayerGraph
from distri.core.plan import Exchange, Plan
from distri.search.costs import SearchLowering, least_ns
from distri.simulator.hardware import Cluster
from distri.simulator.options import SimulationOptions
from distri.simulator.tasks import Compute, Post

_NS = 1e9


def exchange_times(plan: Plan, graph: LayerGraph, cluster: Cluster, exchange: Exchange) -> dict[str, float]:
    """Seconds: step_s, made_s (the layer is reached), leaves_s, transfer_s (its call alone), needed_s, slack_s.

    slack_s: between the arrival and the reading one step later, if nothing else is on the link. Calls that the compute
    stream waits for take their time, as kernels do.
    """
    tasks = SearchLowering(graph, cluster, SimulationOptions()).lower(plan)
    middle = min(len(tasks.steps) - 1, (plan.warmup_steps + len(tasks.steps)) // 2)
    template = tasks.template_of(middle)
    slot = 2 * exchange.index if exchange.bucket is None else 2 * exchange.bucket + 1
    now = transfer = 0
    made = leaves = None
    fresh: dict[int, int] = {}
    for action in template.actions:
        if isinstance(action, Compute):
            if made is None and action.last >= exchange.index:
                inside = action.device_ns[0] if action.last > action.first else 0
                share = (exchange.index - action.first) / max(1, action.last - action.first)
                made = now + round(inside * share)
            now += action.device_ns[0]
        elif isinstance(action, Post):
            alone = least_ns(action.call, tasks.num_ranks)[0]
            fresh[action.call.slot] = alone
            if action.call.slot == slot:
                leaves, transfer = now, alone
        elif action.lag == 0:
            now += fresh.get(action.slot, 0)
    made = now if made is None else made
    leaves = made if leaves is None else leaves
    slack = (now - leaves - transfer) + made
    return {
        "step_s": now / _NS,
        "made_s": made / _NS,
        "leaves_s": leaves / _NS,
        "transfer_s": transfer / _NS,
        "needed_s": made / _NS,
        "slack_s": slack / _NS,
    }
