"""Measures models such as the 256-pixel ones: distances to training and held-out images, copies, and sheets of samples.

Images are compared at ``images.resolution``; samples are resized to it in the same way as real images. Every cell of the table
(model, number of steps, guidance scale, shift) is saved when it is measured, and not measured again.

examples:
  python benchmarks/pictures_256.py --config configs/benchmarks/pictures-256.yaml
  python benchmarks/pictures_256.py --config configs/benchmarks/pictures-256.yaml samples=2000 sheet_pictures=0

Writes benchmarks/results/pictures-256.json and .md, and pictures-256-NAME.jpg for each of the ``sheets``.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from image_measure import ImageMeasure, MeasureConfig
from omegaconf import MISSING
from PIL import Image
from targets import target, target_table
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from yardstick import RESULTS

from ldm_smd.cli import run_tool
from ldm_smd.device import pick_device
from ldm_smd.files import atomic_file, sha256
from ldm_smd.models.guide import load_guide
from ldm_smd.pipelines import SMDPipeline, load_pipeline
from ldm_smd.pipelines.loading import NETWORKS, weight_files
from ldm_smd.sampling.batches import SamplingOptions, sample_batches
from ldm_smd.schedulers import make_scheduler

SHEET_SIDE, SEPARATOR = 64, " \\| "
COLUMNS = ("frechet", "frechet_held_out", "precision", "recall", "coverage", "nearest")


@dataclass
class Cells:
    """One model, measured with every number of steps, guidance scale and shift of the timesteps."""

    model: str = MISSING
    """Model folder (RUN/model)."""
    steps: list[int] = field(default_factory=list)
    guidance: list[float] = field(default_factory=lambda: [1.0])
    guide: Optional[str] = None
    """Folder of a weaker model to guide away from. null: classifier-free guidance."""
    scheduler: str = "DDPMScheduler"
    shifts: list[float] = field(default_factory=lambda: [1.0])


@dataclass
class Pictures256Config(MeasureConfig):
    """benchmarks/pictures_256.py"""

    name: str = "256"
    models: dict[str, Cells] = field(default_factory=dict)
    """The targets compare "mixture" with all whose names start with "gaussian"."""
    samples: int = 2000
    sheet_pictures: int = 48
    """Samples per class on the sheets. 0: no sheets."""
    sheets: dict[str, Cells] = field(default_factory=dict)
    """Models by name of the sheet. The first number of steps, guidance scale and shift are used."""


def pictures_256(config: Pictures256Config) -> Path:
    """Measure the missing cells; returns the JSON file."""
    path = RESULTS / f"pictures-{config.name}.json"
    measure = ImageMeasure(config)
    content = json.loads(path.read_text()) if path.is_file() else {"cells": {}}
    content |= {"floor": measure.floor, "training": measure.training, "command": " ".join(["python", *sys.argv])}
    labels = [label for label in measure.labels(config.samples) if label is not None]
    for name, cells in config.models.items():
        pipeline = pipeline_of(cells)
        digest = [sha256(file) for file in weight_files(Path(cells.model), (*NETWORKS, "vae"))]
        digest += [] if cells.guide is None else [sha256(file) for file in Path(cells.guide).glob("*.safetensors")]
        for steps, guidance, shift in itertools.product(cells.steps, cells.guidance, cells.shifts):
            shifted = f", shift {shift:g}" if shift != 1 else ""
            key = f"{name}, {cells.scheduler}, {steps} steps, guidance {guidance:g}{shifted}"
            origin = {"samples": config.samples, "weights": digest}
            if {name: content["cells"].get(key, {}).get(name) for name in origin} == origin:
                continue
            options = SamplingOptions(steps, guidance, seed=0, batch_size=16, timestep_shift=shift)
            pixels = resized_samples(pipeline, labels, options, config.images.resolution, key)
            settings = {"model": name, "steps": steps, "guidance": guidance, "timestep_shift": shift}
            content["cells"][key] = settings | origin | measure.measure(pixels)
            write(path, content, config)
    for name, cells in config.sheets.items() if config.sheet_pictures else ():
        sheet(name, cells, config)
    write(path, content, config)
    return path


def pipeline_of(cells: Cells) -> SMDPipeline:
    """Load a model with the scheduler to measure it with."""
    pipeline = load_pipeline(cells.model)
    pipeline.scheduler = make_scheduler(cells.scheduler, pipeline.scheduler)
    if cells.guide is not None:
        pipeline.register_modules(guide=load_guide(cells.guide, "guide", pipeline.unet))
    return pipeline.to(pick_device("auto"))


def resized_samples(pipeline: SMDPipeline, labels: list[int], options: SamplingOptions, side: int, title: str) -> torch.Tensor:
    """Sample, and resize to the resolution of the comparison; uint8 (N, 3, side, side)."""
    batches = sample_batches(pipeline, labels, range(len(labels)), options, title)
    return torch.cat([resized(pixels, side) for pixels in batches])


def resized(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Resize like real images (ldm_smd/data/images.py): float (N, 3, H, W) in [0, 1] -> uint8 (N, 3, side, side)."""
    small = [to_pil_image(image).resize((side, side), Image.Resampling.LANCZOS) for image in pixels]
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in small])


def sheet(name: str, cells: Cells, config: Pictures256Config) -> None:
    """Write a sheet with a row for every class, with consecutive seeds from 0 (no selection)."""
    pipeline = pipeline_of(cells)
    classes = range(len(pipeline.config.id2label))
    labels = [label for label in classes for _ in range(config.sheet_pictures)]
    steps, guidance, shift = cells.steps[0], cells.guidance[0], cells.shifts[0]
    options = SamplingOptions(steps, guidance, seed=0, batch_size=16, timestep_shift=shift)
    pixels = resized_samples(pipeline, labels, options, SHEET_SIDE, f"sheet {name}")
    grid = make_grid(pixels, nrow=config.sheet_pictures, padding=1)
    to_pil_image(grid).save(RESULTS / f"pictures-{config.name}-{name}.jpg", quality=85)


def write(path: Path, content: dict, config: Pictures256Config) -> None:
    content["targets"] = targets(content["cells"])
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text("\n".join(table(content, config)) + "\n", encoding="utf-8")


def targets(cells: dict) -> list[dict]:
    """Compare four steps of the mixture with the best result of the Gaussian model, at any number of steps and any guidance, in
    each network."""
    mixture = [cell for cell in cells.values() if cell["model"] == "mixture" and cell["steps"] == 4]
    gaussian = [cell for cell in cells.values() if cell["model"].startswith("gaussian")]
    found = []
    for network in mixture[0]["features"] if mixture and gaussian else ():
        ours, theirs = (best(some, network) for some in (mixture, gaussian))
        margin = 1.96 * float(np.hypot(ours["frechet_sd"], theirs["frechet_sd"]))
        difference = (ours["frechet"] - theirs["frechet"]) / margin
        found.append(target(f"{network}: (4 steps - best Gaussian) / half of its 95 % interval", "<= 1", difference))
        found.append(target(f"{network}: 4 steps / best Gaussian", "<= 1", ours["frechet"] / theirs["frechet"]))
    return found


def best(cells: list[dict], network: str) -> dict:
    """Return the measures with the lowest Frechet distance in a network."""
    return min((cell["features"][network] for cell in cells), key=lambda found: found["frechet"])


def table(content: dict, config: Pictures256Config) -> list[str]:
    """Format a row for every cell, with a value for each network."""
    networks = list(content["floor"]["features"])
    compared, both = f"{config.samples} samples, compared at {config.images.resolution} pixels", SEPARATOR.join(networks)
    lines = [
        f"{compared}, in the features of {both} (`{content['command']}`).",
        "",
        "| | Frechet, training | Frechet, held out | precision | recall | coverage | nearest | copies |",
        "|---" * 8 + "|",
    ]
    real = {"held-out images": content["floor"], "training images": content["training"]}
    for name, cell in (content["cells"] | real).items():
        measured = [cell["features"][network] for network in networks]
        texts = [SEPARATOR.join(f"{each.get(column, float('nan')):.2f}" for each in measured) for column in COLUMNS]
        for position, column in enumerate(COLUMNS):
            if all(f"{column}_sd" in each for each in measured):
                texts[position] += " ± " + SEPARATOR.join(f"{1.96 * each[f'{column}_sd']:.2f}" for each in measured)
        lines.append(f"| {name} | {' | '.join(texts)} | {cell['copies']:.2f} |")
    return lines + target_table(content["targets"])


if __name__ == "__main__":
    sys.exit(run_tool(Pictures256Config, pictures_256, __doc__))
