"""One machine for people and as JSON: its devices, links and collectives, each figure with its tag and source."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from typing import Any

from distri.cli.render import console, scaled, table
from distri.simulator.hardware import Cluster, Figure, Link

UNITS = {"_bytes_per_s": "B/s", "_flops_per_s": "FLOP/s", "_bytes": "B", "_s": "s"}


def describe_cluster(cluster: Cluster) -> dict[str, Any]:
    """The whole cluster as plain JSON values."""
    body = _plain(cluster)
    assert isinstance(body, dict)
    return body


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return {str(key): _plain(item) for key, item in value.items()} if hasattr(value, "items") else value


def show_cluster(cluster: Cluster) -> None:
    """Print it."""
    out = console()
    out.print(f"{cluster.name}: {cluster.title}", markup=False)
    sources = _Sources()
    for name, model in cluster.models.items():
        count = sum(device.model == name for device in cluster.devices)
        made = table(f"{name} ({model.kind.value}), {count} of them", "figure", "value", "known", "source")
        for path, figure in figures_of(model):
            made.add_row(path, in_units(path, figure.value), figure.tag.value, sources.number(figure.source))
        out.print(made)
    out.print(_links(cluster, sources))
    out.print(_collectives(cluster, sources))
    for number, source in sources.lines():
        out.print(f"{number} {source}", markup=False)


class _Sources:
    """Numbers sources in the order in which they are met."""

    def __init__(self) -> None:
        self._numbers: dict[str, str] = {}

    def number(self, source: str) -> str:
        return self._numbers.setdefault(source, f"({len(self._numbers) + 1})")

    def lines(self) -> Iterator[tuple[str, str]]:
        for source, number in self._numbers.items():
            yield number, source


def figures_of(value: Any, path: str = "") -> Iterator[tuple[str, Figure]]:
    """Every figure in nested dataclasses and mappings, with its dotted name."""
    if isinstance(value, Figure):
        yield path, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from figures_of(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    elif hasattr(value, "items"):
        for key, item in value.items():
            yield from figures_of(item, f"{path}.{key}".lstrip("."))


def in_units(name: str, value: float) -> str:
    """A value in the unit that its field's name ends with, a time with a prefix below 1.

    >>> in_units("latency_s", 2.5e-6), in_units("memory_bytes", 8e10), in_units("efficiency", 0.7)
    ('2.5 us', '80.00 GB', '0.7')
    """
    unit = next(
        (unit for part in reversed(name.split(".")) for end, unit in UNITS.items() if part.endswith(end)), ""
    )
    if unit == "s":
        return seconds(value)
    return scaled(value, unit) if unit else f"{value:.4g}"


def seconds(value: float) -> str:
    """A time with three or four digits.

    >>> seconds(0), seconds(0.0123), seconds(4.5)
    ('0 s', '12.3 ms', '4.5 s')
    """
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value * 1e9:.4g} ns" if value else "0 s"


def _links(cluster: Cluster, sources: _Sources) -> Any:
    made = table(
        f"Links of {cluster.num_hosts} host(s)",
        "kind",
        "between",
        "number",
        "bandwidth",
        "latency",
        "known",
        "source",
    )
    alike = Counter(_alike(link) for link in cluster.links)
    for (kind, ends, duplex, bandwidth, latency), count in alike.items():
        made.add_row(
            kind,
            ends,
            str(count),
            f"{scaled(bandwidth.value, 'B/s')} {'each way' if duplex == 'full' else 'in all'}",
            seconds(latency.value),
            bandwidth.tag.value,
            sources.number(bandwidth.source),
        )
    return made


def _alike(link: Link) -> tuple[str, str, str, Figure, Figure]:
    ends = " - ".join(end.split("/")[-1].rstrip("0123456789") for end in (link.source, link.target))
    return link.kind.value, ends, link.duplex.value, link.bandwidth_bytes_per_s, link.latency_s


def _collectives(cluster: Cluster, sources: _Sources) -> Any:
    known = cluster.collectives
    made = table(f"Communication ({known.library})", "figure", "value", "known", "source")
    for path, figure in figures_of(known):
        made.add_row(path, in_units(path, figure.value), figure.tag.value, sources.number(figure.source))
    for fit in known.fits:
        made.add_row(
            f"{fit.collective.value} of {fit.num_ranks}",
            f"{seconds(fit.fixed_s)} + {fit.seconds_per_root_byte * 1e9:.3g} ns/sqrt(B) "
            f"+ bytes at {scaled(fit.bandwidth_bytes_per_s, 'B/s')}",
            known.fits_tag.value,
            sources.number(known.fits_source),
        )
    return made
