"""The machine at hand, as far as a plan needs it: kind and number of devices, and whether they reach each other.

A machine without a GPU is known without loading torch. What was found is kept in the user's cache directory, under what
could change it; a probe of GPUs copies 64 MB between the first two once.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

PROBE_SCHEMA: Final = 1
COPY_BYTES: Final = 64 * 2**20
CPU: Final = "cpu-gloo"
_KNOWN: Final = (
    ("A100-SXM", "a100-sxm"),
    ("A100", "a100-pcie"),
    ("H200", "h200"),
    ("H100", "h100-sxm"),
    ("L40S", "l40s"),
    ("RTX 4090", "rtx4090"),
)


@dataclass(frozen=True)
class Machine:
    """What was found. hardware: the shipped file that describes it, None if there is none for such devices.

    link_bytes_per_s: measured between the first two devices, 0 where there are not two.
    """

    devices: tuple[str, ...]
    hardware: str | None
    has_peer_access: bool = True
    link_bytes_per_s: float = 0.0

    @property
    def is_cpu(self) -> bool:
        """Whether ranks are processes on cores."""
        return self.hardware == CPU

    def __str__(self) -> str:
        if self.is_cpu:
            return f"{len(self.devices)} CPU cores"
        peers = "" if len(self.devices) < 2 or self.has_peer_access else ", without peer-to-peer access"
        return f"{len(self.devices)} x {self.devices[0]}{peers}"


def probe() -> Machine:
    """The machine at hand, remembered or looked at now."""
    path = _cache_path()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Machine(**{**data, "devices": tuple(data["devices"])})
    except (OSError, ValueError, TypeError, KeyError):
        pass
    found = _probe_gpus() if has_gpus() else _probe_cpu()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found)), encoding="utf-8")
    except OSError:
        pass  # it is looked at again next time
    return found


def has_gpus() -> bool:
    """Whether the driver of a GPU is there, and not hidden from this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1") and any(
        Path(name).exists() for name in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd")
    )


def _cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    depends = [
        PROBE_SCHEMA, platform.node(), os.cpu_count(), has_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"),
        sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*")),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]
    return Path(base) / "distri" / f"machine-{key}.json"


def _probe_cpu() -> Machine:
    return Machine(("cpu core",) * (os.cpu_count() or 1), CPU)


def _probe_gpus() -> Machine:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return _probe_cpu()
    names = tuple(torch.cuda.get_device_name(device) for device in range(count))
    hardware = next((file for part, file in _KNOWN if part in names[0]), None)
    if count < 2:
        return Machine(names, hardware)
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    peers = all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    return Machine(names, hardware if len(set(names)) == 1 else None, peers, _link_rate())


def _link_rate() -> float:
    """Bytes a second of a copy from the first device to the second: the best of three."""
    import time

    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda:0")
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda:1")
    best = 0.0
    for _ in range(4):
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(1)
        best = max(best, COPY_BYTES / (time.perf_counter() - start))
    return best
