"""Ranks in network namespaces of their own, joined by links whose rate the kernel enforces (Linux, as root).

    rank 0 --veth-- \
    rank 1 --veth--  bridge, in a namespace of its own
    rank 2 --veth-- /

Each direction of each link is shaped by a token bucket (`tc tbf`) where the bytes enter it, with a queue of 20 ms in
front of it: as long as a switch's. In a longer one, small messages wait behind all that was ever handed over.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from types import TracebackType

from distri.launch import KEPT_MEMORY

SUBNET = "10.77.31"
MTU_BURSTS = 4
QUEUE = "20ms"
BUCKET_S = 0.002


class Unavailable(Exception):
    """Namespaces cannot be made here; says why."""


def is_available() -> bool:
    """Whether ranks can have networks of their own; prints why not, for benchmarks that then have nothing to do."""
    try:
        check_available()
    except Unavailable as reason:
        print(f"skipped: {reason}")
        return False
    return True


def check_available() -> None:
    """Raise `Unavailable` where ranks cannot have networks of their own."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise Unavailable(f"the command {tool!r} is not installed (package iproute2)")
    _remove_abandoned()
    try:
        with Network(1, 10_000_000):
            pass
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        raise Unavailable(
            f"this kernel refuses {' '.join(error.cmd)}: {said[-1] if said else error}"
        ) from error


@dataclass
class Network:
    """`num_ranks` namespaces; `rate_bits_per_s` of each direction of each link, None for no limit."""

    num_ranks: int
    rate_bits_per_s: int | None
    _names: list[str] = field(default_factory=list)

    def __enter__(self) -> Network:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def command(self, rank: int) -> list[str]:
        """What to put before a command so that it runs as this rank's."""
        return ["ip", "netns", "exec", self._name(rank)]

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """What torchrun would set."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_WORLD_SIZE": str(self.num_ranks),
            "MASTER_ADDR": f"{SUBNET}.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "wire",
            "OMP_NUM_THREADS": "1",
            **KEPT_MEMORY,
        }

    def _name(self, rank: int | str) -> str:
        return f"distri-{os.getpid()}-{rank}"

    def _build(self) -> None:
        hub = self._name("hub")
        self._add(hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for rank in range(self.num_ranks):
            name, port = self._name(rank), f"port{rank}"
            self._add(name)
            _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", "wire", "netns", name)
            _ip("-n", hub, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{SUBNET}.{rank + 1}/24", "dev", "wire")
            for device in ("lo", "wire"):
                _ip("-n", name, "link", "set", device, "up")
            for namespace, device in ((hub, port), (name, "wire")):
                self._shape(namespace, device)

    def _add(self, name: str) -> None:
        _ip("netns", "add", name)
        self._names.append(name)

    def _shape(self, namespace: str, device: str) -> None:
        if self.rate_bits_per_s is None:
            return
        burst = max(16_384, round(self.rate_bits_per_s / 8 * BUCKET_S))
        # Segments of up to 64 KiB must fit the bucket, or they are dropped: turn offloading down to frames.
        _ip("-n", namespace, "link", "set", device, "gso_max_size", str(MTU_BURSTS * 1500))
        _run(
            "tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", "rate",
            f"{self.rate_bits_per_s}bit", "burst", str(burst), "latency", QUEUE,
        )  # fmt: skip

    def _remove(self) -> None:
        for name in reversed(self._names):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        self._names.clear()


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _remove_abandoned() -> None:
    """Namespaces of a process that was killed."""
    listed = subprocess.run(["ip", "netns", "list"], check=False, capture_output=True, text=True).stdout
    for name in re.findall(r"^(distri-\d+-\w+)", listed, re.MULTILINE):
        if not os.path.exists(f"/proc/{name.split('-')[1]}"):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
