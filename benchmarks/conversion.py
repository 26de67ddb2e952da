"""How many images a Gaussian model takes to become a mixture, against a mixture trained from scratch.

Trains the same configuration twice, with and without ``init_from``, and measures the EMA weights of every checkpoint at a few
steps: Frechet distance in classifier features, and the spread over eta. The images the Gaussian model has seen before are
stated, not counted: who has a trained model has paid for them.

examples:
  python benchmarks/conversion.py --config configs/benchmarks/conversion-emoji.yaml
  python benchmarks/conversion.py --config configs/benchmarks/conversion-emoji.yaml images_total=16000 every_images=4000

Writes benchmarks/results/conversion-NAME.json and .md; an interrupted run goes on from its checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import MISSING

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.cli import run_tool
from ldm_smd.config import ImagesConfig, TrainConfig, at_least, check, load_config
from ldm_smd.data.images import load_pixels
from ldm_smd.data.shards import Manifest
from ldm_smd.evaluation.features import load_extractor
from ldm_smd.evaluation.metrics import frechet_distance
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.sampling import sample_pixels
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.loop import build_pipeline, build_scheduler, train

RESULTS = Path(__file__).parent / "results"


@dataclass
class ConversionConfig:
    """benchmarks/conversion.py"""

    name: str = MISSING
    train: str = MISSING
    """Training config of the mixture, with ``init_from``."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """The pictures of its shards."""
    output: str = "outputs/conversion"
    """Folder for the two runs."""
    images_total: int = 64_000
    every_images: int = 8_000
    """Between two measurements."""
    steps: list[int] = field(default_factory=lambda: [2, 4, 8])
    samples: int = 500
    features: str = "checkpoints/classifier"

    def __post_init__(self) -> None:
        at_least("every_images", self.every_images, 1)
        check(self.images_total >= self.every_images, "images_total", "at least every_images", self.images_total)


def conversion(config: ConversionConfig) -> Path:
    """Both runs, measured at every checkpoint; returns the JSON file."""
    extractor = load_extractor(config.features)
    pixels, labels, _ = load_pixels(config.images)
    reference = extractor(pixels, description="reference")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    sampled_labels = [labels[order[index % len(order)]] for index in range(config.samples)]
    converted = load_config(TrainConfig, config.train)
    check(converted.init_from is not None, "train", "a config with init_from", config.train)

    curves: dict[str, list[dict]] = {}
    for name, start in (("from the Gaussian model", converted.init_from), ("from scratch", None)):
        run = dataclasses.replace(
            converted,
            init_from=start,
            output=str(Path(config.output) / name.replace(" ", "-")),
            images_total=config.images_total,
            cooldown_images=0,  # so that every checkpoint is the end of a run as long
            checkpoint_every_images=config.every_images,
            keep_checkpoints=config.images_total // config.every_images + 1,
        )
        train(run)
        manifest, scheduler = Manifest.load(run.shards), build_scheduler(run.diffusion)
        autoencoder = FrozenAutoencoder.from_pretrained(run.autoencoder)
        curves[name] = []
        for checkpoint in checkpoints(Path(run.output) / "checkpoints"):
            pipeline = build_pipeline(SMDUNet2DModel.from_pretrained(checkpoint / "ema"), autoencoder, scheduler, manifest)
            point = {"images": json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["images_seen"]}
            for steps in config.steps:
                samples = sample_pixels(pipeline, sampled_labels, config.samples, steps, 1.0, 0, 125, f"{name}, {steps} steps")
                eight_bit = (samples * 255).round().to(torch.uint8)
                point[f"frechet_{steps}_steps"] = round(frechet_distance(extractor(eight_bit), reference), 4)
            curves[name].append(point)
            print(name, point, flush=True)

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"conversion-{config.name}.json"
    result = {
        "command": " ".join(["python", "benchmarks/conversion.py", *sys.argv[1:]]),
        "distance": f"Frechet distance in the features of {extractor.name}",
        "gaussian_model": converted.init_from,
        "samples": config.samples,
        "curves": curves,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(config, result), encoding="utf-8")
    return path


def table(config: ConversionConfig, result: dict) -> str:
    """The distances as Markdown: a row for each number of images."""
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
