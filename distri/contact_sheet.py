"""All pictures of an evaluation on one sheet: a row for each prompt and seed, the single device's first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from distri.evaluation import Evaluation
    from distri.quality import Picture

CAPTION_PIXELS = 28
GAP = 4


def contact_sheet(evaluation: Evaluation, side: int = 128) -> Image.Image:
    """The sheet; each picture at `side` pixels, under its mode, ranks and PSNR."""
    rows: dict[tuple[str, int, str, int], list[tuple[str, Picture]]] = {
        key: [("one device", picture)] for key, picture in evaluation.references.items()
    }
    for o in evaluation.observations:
        key = (o.prompt, o.seed, o.setting.sampler, o.setting.steps)
        rows[key].append((f"{o.setting.mode}\n{o.setting.ranks} ranks  {o.psnr_db:.1f} dB", o.picture))
    width = max(len(row) for row in rows.values()) * (side + GAP) + GAP
    height = len(rows) * (side + CAPTION_PIXELS + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows.values()):
        top = GAP + place * (side + CAPTION_PIXELS + GAP)
        for column, (caption, picture) in enumerate(row):
            left = GAP + column * (side + GAP)
            pen.multiline_text((left, top), caption, fill="black", font_size=10, spacing=1)
            sheet.paste(Image.fromarray(picture).resize((side, side)), (left, top + CAPTION_PIXELS))
    return sheet
