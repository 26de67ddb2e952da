"""Compares turning a Gaussian model into a mixture with training a mixture from scratch, by the number of training images.

Trains the same configuration twice, with and without ``init_from``. The EMA weights are measured before training and at every
checkpoint: Frechet distance in classifier features after a few steps of DDPM. Images that the Gaussian model was trained on do
not count.

examples:
  python benchmarks/conversion.py --config configs/benchmarks/conversion-emoji.yaml
  python benchmarks/conversion.py --config configs/benchmarks/conversion-emoji.yaml images_total=16000 every_images=4000

Writes benchmarks/results/conversion-NAME.json and .md. An interrupted run resumes from its checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import MISSING
from yardstick import RESULTS, Yardstick, YardstickConfig

from ldm_smd.cli import run_tool
from ldm_smd.config import load_config
from ldm_smd.device import pick_precision
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.schema import check
from ldm_smd.training.build import build_model, fit_noise
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.loop import train
from ldm_smd.training.model_folder import build_pipeline
from ldm_smd.training.run import Run
from ldm_smd.training.settings import TrainConfig


@dataclass
class ConversionConfig(YardstickConfig):
    """benchmarks/conversion.py"""

    train: str = MISSING
    """Training config of the mixture, with ``init_from``; ``images`` are the images of its shards."""
    output: str = "outputs/conversion"
    """Folder for the two runs."""
    images_total: int = 32_000
    every_images: int = 8_000
    """Images between two measurements."""
    steps: list[int] = field(default_factory=lambda: [2, 4, 8])
    samples: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.every_images >= 1, "every_images", "at least 1", self.every_images)
        check(self.images_total >= self.every_images, "images_total", "at least every_images", self.images_total)


def conversion(config: ConversionConfig) -> Path:
    """Train and measure both runs; returns the JSON file."""
    yardstick = Yardstick(config)
    converted = load_config(TrainConfig, config.train)
    check(converted.init_from is not None, "train", "a config with init_from", config.train)

    curves: dict[str, list[dict]] = {}
    for name, start in (("from the Gaussian model", converted.init_from), ("from scratch", None)):
        run = dataclasses.replace(
            converted,
            init_from=start,
            output=str(Path(config.output) / name.replace(" ", "-")),
            images_total=config.images_total,
            cooldown_images=0,  # a checkpoint then equals the end of a run of that length
            checkpoint_every_images=config.every_images,
            keep_checkpoints=config.images_total // config.every_images + 1,
        )
        opened = Run.open(run, Accelerator(mixed_precision=pick_precision(run.precision)))
        torch.manual_seed(run.seed)
        untrained = build_model(run, opened.manifest)
        fit_noise(untrained.mixture, opened)
        models = {0: untrained.eval()}
        train(run)
        for checkpoint in checkpoints(Path(run.output) / "checkpoints"):
            images = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["images_seen"]
            models[images] = SMDUNet2DModel.from_pretrained(checkpoint / "ema")
        curves[name] = []
        for images, model in models.items():
            pipeline = build_pipeline(opened, model.to(opened.accelerator.device))
            point = {"images": images}
            for steps in config.steps:
                point[f"frechet_{steps}_steps"] = yardstick.cell(pipeline, steps, f"{name}, {steps} steps")["frechet"]
            curves[name].append(point)
            print(name, point, flush=True)

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"conversion-{config.name}.json"
    result = {
        "command": " ".join(["python", "benchmarks/conversion.py", *sys.argv[1:]]),
        **yardstick.about,
        "gaussian_model": converted.init_from,
        "curves": curves,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(config, result), encoding="utf-8")
    return path


def table(config: ConversionConfig, result: dict) -> str:
    """Format the distances as Markdown, with a row for each number of images."""
    names = list(result["curves"])
    head = [f"{name}, {steps} steps" for steps in config.steps for name in names]
    lines = [f"{result['distance']}, `{result['command']}`", "", "| images | " + " | ".join(head) + " |"]
    lines.append("|---" * (len(head) + 1) + "|")
    for points in zip(*result["curves"].values()):
        values = [f"{point[f'frechet_{steps}_steps']:.2f}" for steps in config.steps for point in points]
        lines.append(f"| {points[0]['images']:,} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_tool(ConversionConfig, conversion, __doc__))
