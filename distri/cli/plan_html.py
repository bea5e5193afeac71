"""The preview as a page of its own, with no script and nothing from elsewhere; and the curve as SVG or PNG."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from distri.cli.output import write_text
from distri.cli.preview import afterthoughts, headline, verdict
from distri.errors import OutputError
from distri.search.pareto import svg

COLOURS = ("#0a6", "#48c", "#c74", "#a5c", "#7a3", "#c46", "#4aa", "#886")
SIDE = 320
STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { border: 1px solid #8886; padding: .25rem .6rem; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.bar { display: inline-block; width: 8rem; height: .8rem; border: 1px solid #8886; vertical-align: middle }
.bar > i { display: block; height: 100%; background: #0a6 }
"""


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    plan, search = found["plan"], found["search"]
    title = headline(plan, search)[0]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *_paragraphs(headline(plan, search)[1:]),
        _map(plan),
        "<h2>Prediction</h2>",
        *_paragraphs(verdict(plan, search)),
        _time_bar(search["prediction"]),
        "<h2>Memory</h2>",
        _memory(search),
        "<h2>What lost, and why</h2>",
        _table(
            ("plan", "devices", "policy", "latency", "waiting", "memory", "why it lost"),
            [
                (r["layout"], r["devices"], r["policy"], f"{r['latency_s']:.3f} s", f"{r['exposed_s']:.3f} s",
                 f"{r['memory_bytes'] / 1e9:.2f} GB", r["why"])
                for r in search["runners_up"]
            ],
        ),
        "<h2>What would change the answer</h2>",
        *_paragraphs(afterthoughts(search) or ["nothing that was tried"]),
    ]  # fmt: skip
    if search["pareto"]:
        parts += [
            "<h2>Latency against device-seconds</h2>",
            svg(search["pareto"], "Best plans by number of devices"),
        ]
    return "\n".join([*parts, "</body></html>\n"])


def _paragraphs(lines: Iterable[str]) -> list[str]:
    return [f"<p>{escape(line)}</p>" for line in lines]


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"


def _map(plan: Mapping[str, Any]) -> str:
    rows = max(band["rows"][1] for band in plan["bands"])
    cols = max(band["cols"][1] for band in plan["bands"])
    scale = SIDE / max(rows, cols)
    parts = [
        f"<svg width='{cols * scale:.0f}' height='{rows * scale:.0f}' role='img'><title>the patches</title>"
    ]
    for place, band in enumerate(plan["bands"]):
        (top, bottom), (left, right) = band["rows"], band["cols"]
        parts.append(
            f"<rect x='{left * scale:.1f}' y='{top * scale:.1f}' width='{(right - left) * scale:.1f}' "
            f"height='{(bottom - top) * scale:.1f}' fill='{COLOURS[place % len(COLOURS)]}' stroke='white'/>"
            f"<text x='{(left + right) / 2 * scale:.1f}' y='{(top + bottom) / 2 * scale + 5:.1f}' "
            f"text-anchor='middle' fill='white'>{place}: {bottom - top}x{right - left}</text>"
        )
    return "".join([*parts, "</svg>"])


def _time_bar(prediction: Mapping[str, Any]) -> str:
    parts, left = [], 0.0
    for name, key, colour in (
        ("kernels", "compute_s", "#0a6"),
        ("waiting for transfers", "exposed_s", "#c46"),
        ("launches", "launch_s", "#886"),
    ):
        width = 600 * prediction[key] / prediction["latency_s"]
        parts.append(
            f"<rect x='{left:.1f}' width='{width:.1f}' height='24' fill='{colour}'>"
            f"<title>{name}: {prediction[key]:.3f} s</title></rect>"
        )
        left += width
    return f"<svg width='600' height='24' role='img'><title>where the time goes</title>{''.join(parts)}</svg>"


def _memory(search: Mapping[str, Any]) -> str:
    rows = []
    for rank, use in enumerate(search["memory"]):
        share = min(100.0, 100 * use["total"] / use["limit"])
        rows.append(
            f"<tr><td>rank {rank}, device {search['devices'][rank]}</td>"
            f"<td><span class='bar'><i style='width:{share:.1f}%'></i></span></td>"
            f"<td class='number'>{use['total'] / 1e9:.2f} of {use['limit'] / 1e9:.2f} GB</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def write_picture(path: Path, search: Mapping[str, Any]) -> None:
    """The curve of latency against device-seconds.

    Raises:
        OutputError: it cannot be written.
    """
    title = f"Best plans by number of devices, {search['hardware']}"
    if path.suffix == ".svg":
        write_text(path, svg(search["pareto"], title))
    else:
        _write_png(path, search["pareto"], title)


def _write_png(path: Path, points: Sequence[Mapping[str, Any]], title: str) -> None:
    from PIL import Image, ImageDraw

    width, height, margin = 960, 600, 70
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    most_x = 1.1 * max(point["device_seconds"] for point in points)
    most_y = 1.1 * max(point["latency_s"] for point in points)
    draw.line(
        (margin, margin, margin, height - margin, width - margin, height - margin), fill="#444", width=2
    )
    draw.text((margin, 20), title, fill="black")
    draw.text((margin, height - 40), f"device-seconds per picture, up to {most_x:.3g}", fill="black")
    draw.text((8, margin - 25), f"latency in seconds, up to {most_y:.3g}", fill="black")
    places = []
    for point in points:
        x = margin + (width - 2 * margin) * point["device_seconds"] / most_x
        y = height - margin - (height - 2 * margin) * point["latency_s"] / most_y
        places.append((x, y, point))
    curve = sorted((x, y) for x, y, point in places if point["is_best"])
    if len(curve) > 1:
        draw.line(curve, fill="#00aa66", width=3)
    for x, y, point in places:
        draw.ellipse(
            (x - 6, y - 6, x + 6, y + 6), fill="#00aa66" if point["is_best"] else "white", outline="#00aa66"
        )
        draw.text((x + 9, y - 16), str(point["devices"]), fill="black")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    try:
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
