"""What a simulation answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distri.simulator.hardware import Tag
from distri.simulator.memory import MemoryUse
from distri.simulator.spans import Segment


@dataclass(frozen=True)
class RankTime:
    """Where one rank's time goes, in seconds: kernels, waiting for transfers, for other ranks, for the host."""

    compute_s: float
    exposed_communication_s: float
    waiting_s: float
    launch_s: float


@dataclass(frozen=True)
class SimulationResult:
    """The prediction for one plan on one cluster.

    latency_s is the whole run. Along its critical path it is compute_s + exposed_communication_s + launch_s +
    outside_s (encoders, VAE, scheduler). speedup is against the unmodified model on one device of the same kind.
    hidden_communication_s is the transfer time of the busiest rank that is not on the critical path. bytes_on_link is
    by link and direction, for the whole run. interval_s is present where noise was asked for (5th to 95th percentile).
    tags say how each figure is known; assumptions, what was taken for granted.
    """

    method: str
    hardware: str
    num_ranks: int
    latency_s: float
    original_s: float
    speedup: float
    efficiency: float
    compute_s: float
    exposed_communication_s: float
    launch_s: float
    outside_s: float
    hidden_communication_s: float
    ranks: tuple[RankTime, ...]
    bytes_on_link: Mapping[str, int]
    bytes_sent: tuple[int, ...]
    bytes_received: tuple[int, ...]
    memory: tuple[MemoryUse, ...]
    critical_path: tuple[Segment, ...]
    interval_s: tuple[float, float] | None
    tags: Mapping[str, Tag]
    sources: Mapping[str, str]
    assumptions: tuple[str, ...]
    steps: tuple[tuple[str, float, int], ...] = field(default=())
    """(name, seconds, how many) of the steps, in order."""

    @property
    def memory_bytes(self) -> tuple[int, ...]:
        """Bytes needed by each rank."""
        return tuple(use.total for use in self.memory)

    @property
    def fits(self) -> bool:
        """Whether every rank's device has room."""
        return all(use.fits for use in self.memory)

    @property
    def is_slower_than_one_device(self) -> bool:
        """Whether one device alone would be faster."""
        return self.num_ranks > 1 and self.speedup < 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the same plan gives the same bytes."""
        return {
            "method": self.method,
            "hardware": self.hardware,
            "num_ranks": self.num_ranks,
            "latency_s": self.latency_s,
            "interval_s": list(self.interval_s) if self.interval_s else None,
            "original_s": self.original_s,
            "speedup": self.speedup,
            "efficiency": self.efficiency,
            "compute_s": self.compute_s,
            "exposed_communication_s": self.exposed_communication_s,
            "hidden_communication_s": self.hidden_communication_s,
            "launch_s": self.launch_s,
            "outside_s": self.outside_s,
            "steps": [{"name": name, "seconds": s, "count": count} for name, s, count in self.steps],
            "ranks": [vars(rank) for rank in self.ranks],
            "bytes_on_link": dict(self.bytes_on_link),
            "bytes_sent": list(self.bytes_sent),
            "bytes_received": list(self.bytes_received),
            "memory_bytes": list(self.memory_bytes),
            "memory": [{**vars(use), "total": use.total, "fits": use.fits} for use in self.memory],
            "critical_path": [_segment(segment) for segment in self.critical_path],
            "tags": {name: tag.value for name, tag in self.tags.items()},
            "sources": dict(self.sources),
            "assumptions": list(self.assumptions),
        }


def _segment(segment: Segment) -> dict[str, Any]:
    return {
        "rank": segment.rank,
        "stream": segment.stream,
        "label": segment.label,
        "duration_s": segment.duration_ns / 1e9,
        "count": segment.count,
        "operations": list(segment.operations) if segment.operations else None,
    }
