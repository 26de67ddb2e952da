"""A diagram of the network and the sampling loop."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from drawing.style import EXACT, GAUSSIAN, INK, MIXTURE, save, styled

Point = tuple[float, float]


class Diagram:
    """Boxes and arrows in a coordinate system of ``width`` x ``height`` units."""

    def __init__(self, width: float, height: float, scale: float = 0.62) -> None:
        self.figure, self.axis = plt.subplots(figsize=(width * scale, height * scale))
        self.axis.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axis.axis("off")
        self.figure.subplots_adjust(0, 0, 1, 1)

    def box(self, x: float, y: float, width: float, height: float, text: str, colour: str = INK) -> None:
        """Draw a box with its lower left corner at (x, y)."""
        rounded = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", lw=1.5, ec=colour, fc="none")
        self.axis.add_patch(rounded)
        filled = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", lw=0, fc=colour, alpha=0.12)
        self.axis.add_patch(filled)
        self.text(x + width / 2, y + height / 2, text, colour)

    def text(self, x: float, y: float, text: str, colour: str = INK, size: float = 10.5) -> None:
        self.axis.text(x, y, text, ha="center", va="center", color=colour, fontsize=size, linespacing=1.25)

    def arrow(self, start: Point, end: Point, colour: str = INK, dashed: bool = False) -> None:
        style = {"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 0, "shrinkB": 0, "ls": "--" if dashed else "-"}
        self.axis.annotate("", xy=end, xytext=start, arrowprops=style)

    def line(self, *points: Point, colour: str = INK, dashed: bool = False) -> None:
        """Draw a line through the points that ends in an arrow."""
        self.axis.plot(*zip(*points[:-1]), color=colour, lw=1.4, ls="--" if dashed else "-", solid_capstyle="butt")
        self.arrow(points[-2], points[-1], colour, dashed)

    def sum(self, x: float, y: float, colour: str = INK) -> None:
        self.axis.add_patch(Circle((x, y), 0.22, fill=False, ec=colour, lw=1.4))
        self.text(x, y, "+", colour, 12)

    def frame(self, x: float, y: float, width: float, height: float, text: str) -> None:
        self.axis.add_patch(Rectangle((x, y), width, height, fill=False, ec=INK, lw=1, ls=(0, (4, 3)), alpha=0.7))
        self.axis.text(x + 0.15, y + height - 0.15, text, ha="left", va="top", color=INK, fontsize=10)


def architecture(path: Path) -> Path:
    """Draw the diagram: encoding at the top, one sampling step in the middle, and the loop around it."""
    with styled():
        d = Diagram(16.8, 9.3)
        # Encoding, once.
        d.box(0.2, 8.0, 2.2, 1.1, "images")
        d.box(3.4, 8.0, 3.2, 1.1, "autoencoder,\nencoder (frozen)", EXACT)
        d.box(7.6, 8.0, 3.4, 1.1, "latent shards\n(webdataset tars)")
        d.box(12.0, 8.0, 4.6, 1.1, "training: energy score,\nthen distillation")
        for start, end in ((2.4, 3.4), (6.6, 7.6), (11.0, 12.0)):
            d.arrow((start, 8.55), (end, 8.55))
        # The network.
        d.frame(0.2, 1.95, 16.4, 5.5, "one step: M draws of the clean latents for one noisy x")
        d.box(0.5, 5.3, 1.9, 1.3, "noisy x,\nt, class")
        d.box(3.4, 5.3, 3.2, 1.3, "UNet encoder\nand middle\n(once per image)", GAUSSIAN)
        d.box(8.8, 5.3, 3.2, 1.3, "UNet decoder\n(once per draw)", MIXTURE)
        d.box(13.9, 5.3, 2.4, 1.3, "draws of\nclean x", MIXTURE)
        d.arrow((2.4, 5.95), (3.4, 5.95))
        d.arrow((6.6, 5.95), (8.8, 5.95))
        d.text(7.7, 6.25, "features, skips", size=9.5)
        d.arrow((12.0, 5.95), (12.78, 5.95), MIXTURE)
        d.sum(13.0, 5.95, MIXTURE)
        d.arrow((13.22, 5.95), (13.9, 5.95), MIXTURE)
        d.box(0.5, 2.6, 1.9, 1.3, "random η,\nM times", MIXTURE)
        d.box(3.4, 2.45, 3.2, 1.6, "Gaussian mixture\nfitted to latents:\nfitted noise e", MIXTURE)
        d.box(8.8, 2.45, 3.2, 1.6, "z from e and features;\nhypernetwork:\nlayers made from z", MIXTURE)
        d.arrow((2.4, 3.25), (3.4, 3.25), MIXTURE)
        d.arrow((6.6, 3.25), (8.8, 3.25), MIXTURE)
        d.text(7.7, 3.5, "e", MIXTURE)
        d.arrow((10.4, 4.05), (10.4, 5.3), MIXTURE)
        d.line((6.6, 2.75), (7.2, 2.75), (7.2, 2.2), (13.0, 2.2), (13.0, 5.73), colour=MIXTURE)
        d.text(13.75, 4.2, "e, gated", MIXTURE, 9.5)
        d.arrow((1.45, 5.3), (3.4, 4.0))
        d.line((6.2, 5.3), (6.2, 4.65), (9.3, 4.65), (9.3, 4.05), dashed=True)
        # The loop.
        d.box(3.4, 0.2, 4.6, 1.1, "step of the scheduler\nwith one draw: less noise")
        d.box(9.4, 0.2, 3.2, 1.1, "autoencoder,\ndecoder (frozen)", EXACT)
        d.box(13.9, 0.2, 2.4, 1.1, "images")
        d.line((15.1, 5.3), (15.1, 1.6), (5.7, 1.6), (5.7, 1.3))
        d.line((3.4, 0.75), (0.05, 0.75), (0.05, 5.95), (0.5, 5.95))
        d.text(1.75, 1.05, "next step", size=9.5)
        d.arrow((8.0, 0.75), (9.4, 0.75))
        d.text(8.7, 1.0, "last step", size=9.5)
        d.arrow((12.6, 0.75), (13.9, 0.75))
        return save(d.figure, path)
