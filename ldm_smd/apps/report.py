"""report.html and report.json: a comparison of models in numbers and images. The page is self-contained."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
import matplotlib
import torch
from torchvision.transforms.functional import to_pil_image

from ..files import atomic_file
from .showcase import Row

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt


def write_report(
    folder: Path,
    report: dict,
    grids: dict[str, dict[int, torch.Tensor]],
    curves: dict[str, list[tuple[int, float]]],
    rows: Sequence[Row] = (),
) -> Path:
    """Write report.json, report.html, comparison.png (all grids) and large.jpg (``rows``, if any) to ``folder``.

    Returns the path of report.html.

    Args:
        report: the content of report.json: targets, seconds, distance, spread, parameters.
        grids: {model: {steps: image grid, float (3, H, W) in [0, 1]}}.
        curves: {model: [(images seen, training loss)]}.
    """
    with atomic_file(folder / "report.json") as path:
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    environment = jinja2.Environment(loader=jinja2.PackageLoader("ldm_smd.apps", "."), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        report=report,
        steps=sorted({n for by_steps in grids.values() for n in by_steps}),
        grids={name: {n: grid_uri(grid) for n, grid in by_steps.items()} for name, by_steps in grids.items()},
        rows=[(row.caption, grid_uri(row.images, "jpeg")) for row in rows],
        curve=data_uri(figure_png(curve_figure(curves))),
        spread=data_uri(figure_png(spread_figure(report["spread"]))),
    )
    with atomic_file(folder / "comparison.png") as path:
        path.write_bytes(figure_png(comparison_figure(grids)))
    if rows:
        with atomic_file(folder / "large.jpg") as path:
            to_pil_image(torch.cat([row.images for row in rows], dim=1).clamp(0, 1)).save(path, format="jpeg", quality=90)
    with atomic_file(folder / "report.html") as path:
        path.write_text(page, encoding="utf-8")
    return folder / "report.html"


def curve_figure(curves: dict[str, list[tuple[int, float]]]) -> plt.Figure:
    figure, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3), squeeze=False)
    for axis, (name, points) in zip(axes[0], curves.items()):
        axis.plot([images for images, _ in points], [loss for _, loss in points], linewidth=1)
        # Energy scores and squared errors are not comparable, so each loss has its own axis.
        axis.set(title=name, xlabel="images seen", ylabel="training loss")
        axis.locator_params(axis="x", nbins=5)
    return figure


def spread_figure(spread: dict[str, dict[int, float]]) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(5, 3))
    for name, by_timestep in spread.items():
        axis.plot(list(by_timestep), list(by_timestep.values()), marker="o", label=name)
    axis.set(xlabel="timestep", ylabel="spread of $x_0$ over eta", ylim=(0, None))
    axis.legend()
    return figure


def comparison_figure(grids: dict[str, dict[int, torch.Tensor]]) -> plt.Figure:
    """Draw a row for each number of steps and a column for each model."""
    steps = sorted({n for by_steps in grids.values() for n in by_steps})
    figure, axes = plt.subplots(len(steps), len(grids), figsize=(4 * len(grids), 4.2 * len(steps)), squeeze=False)
    for column, (name, by_steps) in zip(axes.T, grids.items()):
        for axis, n in zip(column, steps):
            axis.imshow(by_steps[n].clamp(0, 1).permute(1, 2, 0), interpolation="lanczos")
            axis.set(title=f"{name}, {n} steps")
            axis.axis("off")
    return figure


def figure_png(figure: plt.Figure) -> bytes:
    """Encode the figure as PNG, and close it."""
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def grid_uri(grid: torch.Tensor, kind: str = "png") -> str:
    buffer = io.BytesIO()
    to_pil_image(grid.clamp(0, 1)).save(buffer, format=kind, quality=90)
    return data_uri(buffer.getvalue(), kind)


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")
