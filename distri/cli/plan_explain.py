"""`distri plan --explain LAYER`: one exchange's life, from its making to its reading."""

from __future__ import annotations

import difflib
from typing import Any

from distri.cli.output import print_json
from distri.cli.render import console, scaled
from distri.core.graph import LayerGraph
from distri.core.plan import Exchange, Plan
from distri.core.policy import READS_LATE, Policy
from distri.errors import PlanError
from distri.simulator.hardware import Cluster


def show_life(plan: Plan, graph: LayerGraph, cluster: Cluster, layer: str, as_json: bool) -> None:
    """Print the life of a layer's exchange.

    Raises:
        PlanError: the plan has no exchange of that layer.
    """
    exchange = find(plan, layer)
    known = life(plan, graph, cluster, exchange)
    if as_json:
        print_json(known)
        return
    for line in sentences(plan, exchange, known):
        console().print(line, markup=False, soft_wrap=True)


def find(plan: Plan, layer: str) -> Exchange:
    """The exchange of a layer.

    Raises:
        PlanError: there is none; the sentence names the most similar layers.
    """
    found = plan.by_layer.get(layer)
    if found is not None:
        return found
    alike = difflib.get_close_matches(layer, list(plan.by_layer), n=3, cutoff=0.3)
    hint = f"; most alike: {', '.join(alike)}" if alike else ""
    if plan.mesh.patch == 1:
        raise PlanError(f"no layer exchanges anything in this plan: it has one patch{hint}")
    raise PlanError(f"{layer!r} exchanges nothing in this plan{hint}")


def life(plan: Plan, graph: LayerGraph, cluster: Cluster, exchange: Exchange) -> dict[str, Any]:
    """When a value is made, leaves, arrives and is read, on rank 0 of a steady step, and what it carries."""
    from distri.search.times import exchange_times

    members = [e for e in plan.exchanges if e.bucket is not None and e.bucket == exchange.bucket]
    return {
        "layer": exchange.layer,
        "kind": exchange.kind.value,
        "operation": exchange.index,
        "warmup": exchange.warmup.value,
        "steady": exchange.steady.value,
        "codec": exchange.codec.value,
        "shape": list(exchange.shape),
        "dtype": exchange.dtype,
        "level": exchange.level,
        "peers": [list(peers) for peers in exchange.peers],
        "bytes_received": list(exchange.bytes_received),
        "bucket": exchange.bucket,
        "leaves_with": members[-1].layer if members else exchange.layer,
        **exchange_times(plan, graph, cluster, exchange),
    }


def sentences(plan: Plan, exchange: Exchange, known: dict[str, Any]) -> list[str]:
    """The same for people."""
    most = max(exchange.bytes_received, default=0)
    place = exchange.bytes_received.index(most)
    shape = "x".join(str(size) for size in exchange.shape)
    source = (
        "its partner in the other branch"
        if exchange.stays_on_patch and most
        else _names(exchange.peers[place])
    )
    lines = [
        f"{exchange.layer}: {exchange.kind.value} ({shape} {exchange.dtype}, level {exchange.level})",
        f"  patch {place} receives {scaled(most, 'B')} from {source}",
        f"  warm-up, steps 0 to {plan.warmup_steps - 1}: {exchange.warmup.value}"
        + ("; every rank waits for this step's values" if exchange.warmup is Policy.FRESH else ""),
    ]
    made, needed = known["made_s"], known["needed_s"]
    when = f"made {made * 1e3:.2f} ms into a step of {known['step_s'] * 1e3:.2f} ms"
    if exchange.steady in READS_LATE:
        codec = "" if exchange.codec.value == "none" else f", coded as {exchange.codec.value}"
        lines += [
            f"  afterwards: {exchange.steady.value}; {when}{codec}",
            (
                f"  leaves in bucket {exchange.bucket} with {known['leaves_with']}, "
                f"{known['leaves_s'] * 1e3:.2f} ms in; its bucket takes {known['transfer_s'] * 1e3:.2f} ms"
            ),
            (
                f"  read {needed * 1e3:.2f} ms into the next step: "
                f"{known['slack_s'] * 1e3:.2f} ms {'to spare' if known['slack_s'] >= 0 else 'late'}"
            ),
        ]
    elif exchange.steady is Policy.FRESH:
        lines.append(
            f"  afterwards: fresh; {when}; every rank waits {known['transfer_s'] * 1e3:.3f} ms for it, every step"
        )
    elif exchange.stays_on_patch:
        lines.append(
            "  afterwards: local; the latent stays on its patch, and is gathered after the last step"
        )
    else:
        lines.append(f"  afterwards: {exchange.steady.value}; nothing is sent")
    return lines


def _names(peers: tuple[int, ...]) -> str:
    return (
        "no other"
        if not peers
        else f"{'patch' if len(peers) == 1 else 'patches'} " + ", ".join(map(str, peers))
    )
