"""A hardware file from a link probe: the machine at hand as a star of links, every figure with its provenance."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass

from distri.config.hardware import list_hardware
from distri.config.marked_yaml import read_marked
from distri.profiler.links import LinkProbe, LinkReading

LONGEST_LANE_S = 0.009
"""Beyond this a hardware file is refused; only a machine that was busy with something else shows more."""

_TEMPLATE = """\
# {title}
version: 1
name: {name}
title: {title_text}
extends: cpu-gloo

sources:
  probe: {source}
  machine: "what the operating system says"

device_models:
  cpu-core:
{model}
num_hosts: 1
host:
  devices:
    - {{name: "cpu[0-{last}]", model: cpu-core}}
  nodes:
    - {{name: exchange, kind: network_switch}}
  links:
{links}
collectives:
  library: {library}
  blocking_extra_s: {{value: 0 s, tag: measured, source: probe}}
  per_message_s: {{value: {lane_s:.9f}, tag: measured, source: probe}}
  default_ctas: {{value: 1, tag: assumed, source: probe}}
  compute_slowdown: {{value: {slowdown:.4f}, tag: measured, source: probe}}
  buffer_bytes:
    {num_ranks}: {{value: 32 MB, tag: assumed, source: machine}}
"""

_LINK = """\
    - between: [cpu{rank}, exchange]
      kind: virtual
      bandwidth_bytes_per_s: {{value: {bytes_per_s:.0f}, tag: measured, source: probe}}
      latency_s: {{value: {latency_s:.9f}, tag: measured, source: probe}}
      duplex: {duplex}
"""


@dataclass(frozen=True)
class Provenance:
    """Who measured: shown with every figure."""

    device: str
    created: str
    command: str


def hardware_text(probe: LinkProbe, provenance: Provenance, name: str = "this-machine") -> str:
    """The YAML text of a hardware file for the ranks that were probed.

    Ranks are joined by a star: each message crosses two links, so each gets half of the latency; the link of rank 0 is
    as fast as the fastest that was met.
    """
    by_rank = {reading.second: reading for reading in probe.readings}
    fastest = max(probe.readings, key=lambda reading: reading.bytes_per_s)
    readings = [fastest, *(by_rank[rank] for rank in range(1, probe.num_ranks))]
    errors = max(reading.mean_error for reading in probe.readings)
    origin = f"{provenance.command}, on {provenance.device}, {provenance.created}"
    source = f"{origin}; alpha-beta fit, mean error {errors:.1%}"
    return _TEMPLATE.format(
        title=f"written by distri profile --links on {provenance.created}",
        name=name,
        title_text=json.dumps(f"{probe.num_ranks} ranks on {provenance.device}, {probe.library}"),
        source=json.dumps(source),
        model=_model_text(probe.num_ranks),
        last=probe.num_ranks - 1,
        links="".join(_link(rank, reading) for rank, reading in enumerate(readings)),
        library=probe.library,
        lane_s=min(statistics.median(map(_handing_over_s, probe.readings)), LONGEST_LANE_S),
        slowdown=statistics.median(reading.slowdown for reading in probe.readings),
        num_ranks=probe.num_ranks,
    )


def _handing_over_s(reading: LinkReading) -> float:
    """What an awaited message costs beyond half a round trip (which may be the longer one: it wakes the peer)."""
    return max(0.0, reading.awaited_s - reading.alpha_s)


def _link(rank: int, reading: LinkReading) -> str:
    return _LINK.format(
        rank=rank,
        bytes_per_s=reading.bytes_per_s,
        latency_s=min(reading.alpha_s, reading.awaited_s) / 2,
        duplex="half" if reading.is_half_duplex else "full",
    )


def _model_text(num_ranks: int) -> str:
    """The shipped model of a core, with this machine's memory; its rates are assumed until a profile answers."""
    (base,) = (entry.path for entry in list_hardware() if entry.name == "cpu-gloo")
    model = read_marked(base).value["device_models"]["cpu-core"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_ranks
    model["memory_bytes"] = {"value": memory, "tag": "measured", "source": "machine"}
    return "".join(f"    {key}: {json.dumps(value)}\n" for key, value in model.items())
