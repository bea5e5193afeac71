"""Latency against device-seconds: the best plan on each number of devices, and which of them nothing else beats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from distri.search.find import Search
from distri.search.runners import Runner, Runners

WIDTH, HEIGHT, MARGIN = 640, 400, 60


@dataclass(frozen=True)
class Point:
    """One plan; `is_best` if no other has both less latency and fewer device-seconds."""

    devices: int
    layout: str
    policy: str
    latency_s: float
    device_seconds: float
    is_best: bool


def pareto(search: Search, runners: Runners) -> tuple[Point, ...]:
    """The best plan by the longest path on every number of devices, fewest first."""
    found: list[Runner] = []
    for count in range(1, len(search.ranks) + 1):
        runner = runners.best_on(count)
        if runner is not None:
            found.append(runner)
    points = [(r.breakdown.latency_s, r.breakdown.latency_s * r.layout.num_ranks) for r in found]

    def is_best(place: int) -> bool:
        mine = points[place]
        return not any(other[0] <= mine[0] and other[1] <= mine[1] and other != mine for other in points)

    return tuple(
        Point(r.layout.num_ranks, str(r.layout), r.policy, *points[place], is_best(place))
        for place, r in enumerate(found)
    )


def svg(points: list[dict[str, Any]], title: str) -> str:
    """The points as a picture; those that nothing beats are filled and joined."""
    most_x = 1.1 * max(point["device_seconds"] for point in points)
    most_y = 1.1 * max(point["latency_s"] for point in points)

    def at(point: dict[str, Any]) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * point["device_seconds"] / most_x
        return x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * point["latency_s"] / most_y

    best = sorted(at(point) for point in points if point["is_best"])
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            f'font-size="12" role="img"><title>{escape(title)}</title>'
        ),
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}" fill="none" stroke="#444"/>',
        (
            f'<text x="{WIDTH / 2}" y="{HEIGHT - 15}" text-anchor="middle">device-seconds per picture, '
            f"up to {most_x:.3g}</text>"
        ),
        (
            f'<text x="18" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 18 {HEIGHT / 2})">'
            f"latency in seconds, up to {most_y:.3g}</text>"
        ),
        f'<text x="{WIDTH / 2}" y="24" text-anchor="middle" font-size="14">{escape(title)}</text>',
        f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in best)}" fill="none" stroke="#0a6"/>',
    ]
    for point in points:
        x, y = at(point)
        fill = "#0a6" if point["is_best"] else "white"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="#0a6"/>')
        parts.append(f'<text x="{x + 8:.1f}" y="{y - 6:.1f}">{point["devices"]}</text>')
    return "\n".join([*parts, "</svg>\n"])
