"""Which devices a plan uses, and in what order: all alike, of different speed, slowed down, or down.

A plan's rank r runs on the r-th device of an order. Where all devices and links are alike the order is the cluster's
own; otherwise the fastest come first into account, and the two branches of the guidance get devices of like speed at
the same place, because both have the same bands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from distri.errors import HardwareError
from distri.simulator.hardware import Cluster, Device, DeviceModel, Figure, LinkKind

NETWORK = (LinkKind.INFINIBAND, LinkKind.ETHERNET, LinkKind.VIRTUAL)


def degraded(cluster: Cluster, speeds: Mapping[int, float]) -> Cluster:
    """The cluster with some ranks' devices at a share of their speed.

    Raises:
        HardwareError: there is no such rank.
    """
    models = dict(cluster.models)
    devices = list(cluster.devices)
    for rank, speed in sorted(speeds.items()):
        check_rank(cluster, rank)
        name = f"{devices[rank].model} at {speed:g}x"
        models[name] = slowed(cluster.models[devices[rank].model], speed)
        devices[rank] = dataclasses.replace(devices[rank], model=name)
    return dataclasses.replace(cluster, models=models, devices=tuple(devices)) if speeds else cluster


def check_rank(cluster: Cluster, rank: int) -> None:
    """Hold that the cluster has a rank.

    Raises:
        HardwareError: it has not.
    """
    if not 0 <= rank < cluster.num_ranks:
        raise HardwareError(
            f"{cluster.name} has devices 0 to {cluster.num_ranks - 1}; there is no device {rank}"
        )


def slowed(model: DeviceModel, speed: float) -> DeviceModel:
    """A device all of whose kernels take 1 / `speed` of their time."""

    def faster(figure: Figure) -> Figure:
        return Figure(figure.value * speed, figure.tag, f"{figure.source}, at {speed:g} of its speed")

    def shorter(figure: Figure) -> Figure:
        return Figure(figure.value / speed, figure.tag, f"{figure.source}, at {speed:g} of its speed")

    compute = model.compute
    return dataclasses.replace(
        model,
        peak_flops_per_s={dtype: faster(figure) for dtype, figure in model.peak_flops_per_s.items()},
        memory_bandwidth_bytes_per_s=faster(model.memory_bandwidth_bytes_per_s),
        compute=dataclasses.replace(
            compute,
            gemm=dataclasses.replace(
                compute.gemm, floor_s=shorter(compute.gemm.floor_s), split_s=shorter(compute.gemm.split_s)
            ),
            attention=dataclasses.replace(compute.attention, floor_s=shorter(compute.attention.floor_s)),
            streaming=dataclasses.replace(compute.streaming, floor_s=shorter(compute.streaming.floor_s)),
            kernel_gap_s=shorter(compute.kernel_gap_s),
        ),
    )


def arranged(cluster: Cluster, order: Sequence[int]) -> Cluster:
    """The cluster whose rank r is the device that was rank `order[r]`; the others stay behind them, unused."""
    if tuple(order) == tuple(range(len(order))):
        return cluster
    rest = [rank for rank in range(cluster.num_ranks) if rank not in set(order)]
    devices = tuple(
        Device(place, cluster.devices[rank].node, cluster.devices[rank].host, cluster.devices[rank].model)
        for place, rank in enumerate([*order, *rest])
    )
    return dataclasses.replace(cluster, devices=devices)


def usable(cluster: Cluster, num_devices: int, down: Sequence[int]) -> tuple[int, ...]:
    """The ranks that may be used: the first `num_devices` that are not down.

    Raises:
        HardwareError: a rank that is down does not exist, or too few are left.
    """
    for rank in down:
        check_rank(cluster, rank)
    if num_devices > cluster.num_ranks:
        raise HardwareError(
            f"{num_devices} devices were asked for, {cluster.name} has {cluster.num_ranks}; "
            f"use --gpus {cluster.num_ranks}, or --hosts for more hosts"
        )
    up = [rank for rank in range(num_devices) if rank not in set(down)]
    if not up:
        raise HardwareError(
            f"all {num_devices} devices of {cluster.name} are down; nothing is left to run on"
        )
    return tuple(up)


def orders(
    cluster: Cluster, ranks: Sequence[int], count: int, cfg: int, speed: Callable[[str], float]
) -> tuple[tuple[int, ...], ...]:
    """The orders of `count` of the usable `ranks` that are worth a look, the cluster's own first.

    `speed` says how fast a device model is; larger is faster.
    """
    found = [tuple(ranks[:count])]
    if len({cluster.devices[rank].model for rank in ranks}) > 1:
        fastest = sorted(ranks, key=lambda rank: (-speed(cluster.devices[rank].model), rank))[:count]
        found.append(tuple(sorted(fastest)))
        found.append(tuple(place for branch in range(cfg) for place in fastest[branch::cfg]))
    if has_unequal_network(cluster):
        for host in sorted({cluster.devices[rank].host for rank in ranks}):
            kept = [rank for rank in ranks if cluster.devices[rank].host != host]
            if len(kept) >= count:
                found.append(tuple(kept[:count]))
    return tuple(dict.fromkeys(found))


def has_unequal_network(cluster: Cluster) -> bool:
    """Whether some link between hosts is slower than another."""
    rates = {link.bandwidth_bytes_per_s.value for link in cluster.links if link.kind in NETWORK}
    return cluster.num_hosts > 1 and len(rates) > 1


def num_replicas(cluster: Cluster, ranks: Sequence[int], layout_devices: Sequence[int]) -> int:
    """How many groups like `layout_devices` the usable ranks hold, model by model."""
    have: dict[str, int] = {}
    need: dict[str, int] = {}
    for rank in ranks:
        have[cluster.devices[rank].model] = have.get(cluster.devices[rank].model, 0) + 1
    for rank in layout_devices:
        need[cluster.devices[rank].model] = need.get(cluster.devices[rank].model, 0) + 1
    return max(1, min(have[model] // count for model, count in need.items()))
