"""What to set, or to know, where GPUs cannot reach each other the fast way: advice, once, never an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch


def advice_on_links(
    environment: Mapping[str, str] = os.environ,
    num_gpus: int | None = None,
    can_access: Callable[[int, int], bool] | None = None,
) -> list[str]:
    """Sentences about this host's GPUs and NCCL's settings; empty if there is nothing to say."""
    gpus = torch.cuda.device_count() if num_gpus is None else num_gpus
    reaches = can_access or torch.cuda.can_device_access_peer
    local = min(int(environment.get("LOCAL_WORLD_SIZE", "1")), gpus)
    said = []
    if environment.get("NCCL_P2P_DISABLE") == "1" and local > 1:
        said.append(
            "NCCL_P2P_DISABLE=1: GPUs of this host exchange through its memory; "
            "unset it where they may reach each other"
        )
    else:
        apart = [(a, b) for a in range(local) for b in range(a + 1, local) if not reaches(a, b)]
        if apart:
            first, second = apart[0]
            said.append(
                f"GPU {first} and GPU {second} cannot reach each other directly ({len(apart)} pairs cannot): exchanges "
                "go through the host's memory; under virtualisation check that ACS is off, and put the guidance "
                "branches on different ranks (--cfg-split on), which exchange least"
            )
    world = int(environment.get("WORLD_SIZE", "1"))
    if world > local and gpus and "NCCL_SOCKET_IFNAME" not in environment:
        said.append(
            "several hosts: set NCCL_SOCKET_IFNAME to the interface between them, or NCCL may choose another"
        )
    if world > local and gpus and environment.get("NCCL_IB_DISABLE") == "1":
        said.append("NCCL_IB_DISABLE=1: hosts exchange over TCP; unset it where there is InfiniBand or RoCE")
    return said
