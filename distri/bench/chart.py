"""The picture of a comparison: a bar for each way, computing in one colour and waiting in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from distri.bench.report import Row

WIDTH, BAR, GAP, LEFT, RIGHT, TOP = 860, 26, 12, 150, 190, 44
COMPUTES, WAITS, INK = "#3c78b4", "#d28c32", "#222222"


def bar_chart(rows: Sequence[Row], title: str) -> Image.Image:
    """Seconds of a steady step."""
    height = TOP + len(rows) * (BAR + GAP) + GAP
    sheet = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, fill=INK, font_size=15)
    longest = max(row.step_s for row in rows)
    for place, row in enumerate(rows):
        top = TOP + place * (BAR + GAP)
        length = round((WIDTH - LEFT - RIGHT) * row.step_s / longest)
        waits = round(length * row.exposed)
        pen.text((GAP, top + 6), row.name, fill=INK, font_size=13)
        pen.rectangle((LEFT, top, LEFT + length - waits, top + BAR), fill=COMPUTES)
        if waits:
            pen.rectangle((LEFT + length - waits, top, LEFT + length, top + BAR), fill=WAITS)
        caption = f"{row.step_s * 1e3:.1f} ms   {row.speedup:.2f}x   waits {row.exposed:.1%}"
        pen.text((LEFT + length + 8, top + 6), caption, fill=INK, font_size=13)
    return sheet
