"""Grids of images with labelled rows."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from ..pipelines import SMDPipeline

FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
"""Has Latin, Greek, Cyrillic and Arabic letters; Pillow's own has ASCII only."""


def class_name(pipeline: SMDPipeline, number: int) -> str:
    return pipeline.id2label.get(number, str(number))


def labelled_grid(rows: list[list[Image.Image]], names: list[str]) -> Image.Image:
    """Draw rows of images, each with a name on its left."""
    font = ImageFont.truetype(FONT, size=13)
    width, height = rows[0][0].size
    margin, gap = max((int(font.getlength(name)) + 12 for name in names if name), default=0), 2
    grid = Image.new("RGB", (margin + max(map(len, rows)) * (width + gap), len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for row, (images, name) in enumerate(zip(rows, names)):
        top = row * (height + gap)
        draw.text((6, top + height // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            grid.paste(image, (margin + column * (width + gap), top))
    return grid
