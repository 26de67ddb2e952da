"""Measures Gaussian mixture solvers (GMS) on images, at equal numbers of network evaluations.

They are compared with schedulers that need no moments and with the Gaussian kernel of two moments. Images are also made from
strokes: the distance to the stroke against the distance to real images. All schedulers sample the same Gaussian UNet.
tools/train_moments.py makes a model folder with its moments.

examples:
  python benchmarks/gms.py --config configs/benchmarks/gms-emoji.yaml
  python benchmarks/gms.py --config configs/benchmarks/gms-cifar10.yaml resume=true samples=2000

Writes benchmarks/results/gms-NAME.json, .md and .png.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from omegaconf import MISSING
from torchvision.utils import make_grid
from yardstick import BATCH_SIZE, SCHEDULERS, Results, ResultsConfig, distance_table, plain_log_ticks

from ldm_smd.cli import run_tool
from ldm_smd.pipelines import load_pipeline
from ldm_smd.sampling.batches import SamplingOptions, sample_pixels
from ldm_smd.schedulers import make_scheduler
from ldm_smd.schema import check

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODEL = "gaussian"
SHOWN = 10


@dataclass
class GMSConfig(ResultsConfig):
    """benchmarks/gms.py"""

    model: str = MISSING
    """Model folder with moments (tools/train_moments.py)."""
    schedulers: list[str] = field(
        default_factory=lambda: [
            "DDPM",
            "GMS, two moments",
            "GMS",
            "GMS, a component for the picture",
            "DDIM",
            "DPM-Solver++",
            "SDE-DPM-Solver++",
        ]
    )
    """Names in yardstick.SCHEDULERS."""
    steps: list[int] = field(default_factory=lambda: [5, 10, 15, 25, 50, 100])
    stroke_schedulers: list[str] = field(default_factory=lambda: ["DDPM", "GMS, two moments", "GMS", "DDIM"])
    stroke_steps: int = 20
    """Steps of a full run. A run with a strength takes the last ones."""
    strengths: list[float] = field(default_factory=lambda: [0.3, 0.5, 0.7, 0.9])
    stroke_side: int = 4
    """Patches per side that a held-out image is averaged over to make a stroke."""
    stroke_colours: int = 6
    """Values per colour channel of a stroke."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.stroke_side >= 1, "stroke_side", "at least 1", self.stroke_side)
        check(self.stroke_colours >= 2, "stroke_colours", "at least 2", self.stroke_colours)
        self.check_schedulers("schedulers", "stroke_schedulers")


def gms(config: GMSConfig) -> Path:
    """Run the benchmark; returns the JSON file."""
    results = Results("gms", config)
    pipeline = load_pipeline(config.model)
    own = pipeline.scheduler
    results.add_model(MODEL, config.model, pipeline)
    for name in config.schedulers:
        pipeline.scheduler = make_scheduler(SCHEDULERS[name], own)
        for steps in config.steps:
            results.cell(MODEL, name, pipeline, steps)

    yardstick = results.yardstick
    strokes = strokes_of(yardstick.held_out, config.stroke_side, config.stroke_colours)
    labels = yardstick.labels[: len(strokes)]
    shown = [strokes[:SHOWN]]
    results.content["strokes"] = {}
    for name in config.stroke_schedulers:
        pipeline.scheduler = make_scheduler(SCHEDULERS[name], own)
        points = results.content["strokes"][name] = []
        for strength in config.strengths:
            options = SamplingOptions(config.stroke_steps, batch_size=BATCH_SIZE, image=strokes, strength=strength)
            made = sample_pixels(pipeline, labels, len(labels), options, f"strokes, {name}")
            to_stroke = (made - strokes).square().mean(dim=(1, 2, 3)).sqrt().mean()
            distance = yardstick.measure([made])["frechet"]
            points.append({"strength": strength, "rms_to_stroke": round(float(to_stroke), 4), "frechet": distance})
            print(f"strokes, {name}: {points[-1]}", flush=True)
            results.write()
            shown.append(made[:SHOWN])
    draw(config, results.content, shown, results.path.with_suffix(".png"))
    return results.finish(table(config, results.content))


def strokes_of(images: torch.Tensor, side: int, colours: int) -> torch.Tensor:
    """Reduce images to patches of few colours, like rough sketches: uint8 (N, 3, H, W) -> floats in [0, 1]."""
    patches = F.adaptive_avg_pool2d(images.float() / 255, side)
    patches = (patches * (colours - 1)).round() / (colours - 1)
    return F.interpolate(patches, size=images.shape[2:], mode="nearest")


def draw(config: GMSConfig, result: dict, shown: list[torch.Tensor], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(17, 5.5), width_ratios=(1, 1, 1.1))
    for name, cells in result["models"][MODEL]["distance"].items():
        axes[0].plot(list(cells), [cell["frechet"] for cell in cells.values()], label=name, marker=".")
    axes[0].set(xscale="log", yscale="log", xlabel="steps", ylabel="Frechet distance")
    axes[0].legend(fontsize=7)
    plain_log_ticks(axes[0].xaxis, axes[0].yaxis)
    for name, points in result["strokes"].items():
        axes[1].plot([p["rms_to_stroke"] for p in points], [p["frechet"] for p in points], label=name, marker=".")
    axes[1].set(xlabel="rms distance to the stroke", ylabel="Frechet distance", title="from strokes, by strength")
    axes[1].legend(fontsize=7)
    axes[2].imshow(make_grid(torch.cat(shown), nrow=SHOWN, pad_value=0.8).permute(1, 2, 0))
    axes[2].axis("off")
    axes[2].set_title("strokes, then samples by scheduler and strength", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def table(config: GMSConfig, result: dict) -> list[str]:
    lines = [*distance_table(result, config.name, config.steps), ""]
    lines += [f"From strokes, {config.stroke_steps} steps in all, Frechet distance / rms distance to the stroke:", ""]
    lines.append("| strength | " + " | ".join(map(str, config.strengths)) + " |")
    lines.append("|---" * (len(config.strengths) + 1) + "|")
    for name, points in result["strokes"].items():
        lines.append(f"| {name} | " + " | ".join(f"{p['frechet']:.2f} / {p['rms_to_stroke']:.3f}" for p in points) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(run_tool(GMSConfig, gms, __doc__))
