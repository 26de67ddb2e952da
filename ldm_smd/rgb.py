"""Conversion of images to RGB, the same for training images and for those given to a pipeline."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageColor, ImageOps


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert any PIL image to 8-bit RGB.

    Takes the first frame, applies the EXIF orientation, composites transparency on ``background``, scales 16-bit grey (without
    clipping), and converts CMYK and palettes.
    """
    image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # PIL's own conversion of 16-bit grey to 8 bits clips at 255.
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257.0).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, ImageColor.getrgb(background)), rgba)
    return image.convert("RGB")
