"""The style of all figures: transparent, in colours of medium brightness that are legible on white and on black."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

INK = "#80868f"
"""Colour of text and lines. Its contrast is 3.7 with white and 5.7 with black."""
GAUSSIAN, MIXTURE, EXACT = "#d9822b", "#3b8eea", "#2f9e6e"
OTHERS = ("#b565c9", "#c0943a", "#d1556a", "#4fa3a5", "#8d7bd6", "#7a9a3d", "#a5826b")
STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "font.family": "sans-serif",
    "font.size": 11,
    "svg.fonttype": "none",  # text stays text: small, sharp, searchable
    "svg.hashsalt": "ldm_smd",  # the same figure is the same file
}


@contextmanager
def styled() -> Iterator[None]:
    with plt.rc_context(STYLE):
        yield


def save(figure: Figure, path: Path) -> Path:
    """Write an SVG without its date, and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
    plt.close(figure)
    # Viewers without matplotlib's own font then use the reader's.
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("'DejaVu Sans', ", "").rstrip() + "\n", encoding="utf-8")
    return path
