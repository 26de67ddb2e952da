"""What the image benchmarks share: the same labels and seeds for every model and scheduler, and the distance to training images
in the features of a network."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from omegaconf import MISSING

from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.evaluation.distances import FeatureSet, distances, frechet_distance
from ldm_smd.evaluation.features import load_extractor
from ldm_smd.pipelines import SMDPipeline
from ldm_smd.pipelines.loading import NETWORKS, weight_files
from ldm_smd.sampling.batches import SamplingOptions, sample_pixels
from ldm_smd.schema import check

RESULTS = Path(__file__).parent / "results"
BATCH_SIZE = 125
SCHEDULERS = {
    "DDPM": "DDPMScheduler",
    "DDIM": "DDIMScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "SDE-DPM-Solver++": "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++",
    "UniPC": "UniPCMultistepScheduler",
    "Euler ancestral": "EulerAncestralDiscreteScheduler",
    "Heun": "HeunDiscreteScheduler",
    "SMD": "SMDScheduler",
    "GMS": "GMSScheduler",
    "GMS, two moments": "GMSScheduler:num_moments=2",
    "GMS, a component for the picture": "GMSScheduler:choose_per_image=true",
}
"""Schedulers by their name in the tables. Multistep solvers are of second order."""


@dataclass
class YardstickConfig:
    name: str = MISSING
    """Name of the image set, used in the names of the result files."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """Training images of the models."""
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Real images that no model was trained on. Their distance is the floor, and samples get their labels."""
    samples: int = 1000
    """Samples per scheduler and number of steps, over all sampling seeds together."""
    sampling_seeds: int = 2
    features: str = "checkpoints/classifier"
    """Feature network: a FeatureNetwork folder, open_clip:ARCHITECTURE:FILE.safetensors or inception:FILE."""
    reference: int = 10_000
    """Maximum number of training images to compare with."""

    def __post_init__(self) -> None:
        check(self.sampling_seeds >= 1, "sampling_seeds", "at least 1", self.sampling_seeds)
        check(self.samples % self.sampling_seeds == 0, "samples", "a multiple of sampling_seeds", self.samples)


@dataclass
class ResultsConfig(YardstickConfig):
    """Settings of a benchmark with Results."""

    resume: bool = False
    """Keep results in the result file that belong to the same weights, images, features and numbers of samples."""

    def check_schedulers(self, *keys: str) -> None:
        for key in keys:
            unknown = set(getattr(self, key)) - set(SCHEDULERS)
            check(not unknown, key, f"some of {', '.join(SCHEDULERS)}", ", ".join(sorted(unknown)))


class Yardstick:
    """A measure of samples of a pipeline, with the labels of the held-out images in a fixed shuffled order.

    Attributes:
        held_out: the held-out images in that order, uint8 (N, 3, H, W), at most ``samples``.
        labels: labels of the samples, repeated if there are fewer images.
    """

    def __init__(self, config: YardstickConfig) -> None:
        self.samples, self.seeds = config.samples, config.sampling_seeds
        self.extractor = load_extractor(config.features)
        training, _, _ = load_pixels(config.images)
        held_out, labels, _ = load_pixels(config.held_out)
        chosen = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[: config.reference]
        self.reference = FeatureSet(self.extractor(training[chosen], description="reference"))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
        self.labels = [labels[order[index % len(order)]] for index in range(config.samples)]
        self.held_out = held_out[order[: config.samples]]
        floor = self.extractor(self.held_out, description="floor")
        self.about = {
            "distance": f"Frechet distance and KID in the features of {self.extractor.name}",
            "reference_pictures": len(self.reference),
            "floor": self._measure(floor, [floor]) | {"pictures": len(floor)},
            "samples": self.samples,
            "sampling_seeds": self.seeds,
            "threads": torch.get_num_threads(),
        }

    def sample(self, pipeline: SMDPipeline, steps: int, start: int, count: int, title: str) -> torch.Tensor:
        """Sample with labels and seeds from ``start`` on and the pipeline's scheduler; returns (count, 3, H, W) in [0, 1]."""
        chosen = self.labels[start : start + count]
        options = SamplingOptions(steps, seed=start, batch_size=BATCH_SIZE)
        return sample_pixels(pipeline, chosen, count, options, title)

    def cell(self, pipeline: SMDPipeline, steps: int, title: str) -> dict:
        """Return the distance of all samples with ``steps`` steps, their mean brightness, and evaluations per sample."""
        count = self.samples // self.seeds
        parts = [self.sample(pipeline, steps, seed * count, count, title) for seed in range(self.seeds)]
        brightness = round(float(torch.cat(parts).mean()), 4)
        return self.measure(parts) | {"brightness": brightness, "evaluations": pipeline.num_timesteps}

    def measure(self, parts: list[torch.Tensor]) -> dict:
        """Return the distance of images (N, 3, H, W) in [0, 1], given as one part for each sampling seed."""
        features = [self.extractor((part * 255).round().to(torch.uint8)) for part in parts]
        return self._measure(torch.cat(features), features)

    def nearest(self, images: torch.Tensor) -> float:
        """Return the median distance of images to the nearest training image, relative to that of held-out images.

        It is close to 0 if training images are reproduced, and 1 if the images are as new as images that were not trained on.
        ``images`` is uint8 (N, 3, H, W).
        """
        found, new = (
            torch.cdist(self.extractor(part).double(), self.reference.features).min(dim=1).values.median()
            for part in (images, self.held_out)
        )
        return round(float(found / new), 3)

    def _measure(self, features: torch.Tensor, per_seed: list[torch.Tensor]) -> dict:
        """Return all distances, and the Frechet distance of each sampling seed alone."""
        found = distances(features, self.reference, self.extractor.unit_length)
        return {name: round(value, 5) for name, value in found.items()} | {
            "frechet_per_seed": [round(frechet_distance(part, self.reference), 4) for part in per_seed],
        }


class Results:
    """The distances of several models, in a JSON file that is written after every cell, so that a stopped run can be resumed.

    Args:
        benchmark: first part of the file names, before the config's ``name``.

    Attributes:
        content: content of the file. ``models`` maps names to parameters, weights_sha256 and distance; distance maps scheduler
            and number of steps to a cell.
    """

    SAME = ("distance", "reference_pictures", "samples", "sampling_seeds")
    """Entries of an earlier file that must agree for its cells to be kept, beside the Frechet distance of the floor."""

    def __init__(self, benchmark: str, config: ResultsConfig) -> None:
        self.started = time.perf_counter()
        self.path, self.yardstick = RESULTS / f"{benchmark}-{config.name}.json", Yardstick(config)
        command = " ".join(["python", f"benchmarks/{benchmark}.py", *sys.argv[1:]])
        self.content = {"command": command, **self.yardstick.about, "models": {}}
        before = json.loads(self.path.read_text(encoding="utf-8")) if config.resume and self.path.is_file() else {}
        same = all(before.get(key) == self.content[key] for key in self.SAME)
        if same:
            same = abs(before["floor"]["frechet"] - self.content["floor"]["frechet"]) < 1e-3
        self.before = before.get("models", {}) if same else {}

    def add_model(self, model: str, folder: str, pipeline: SMDPipeline) -> None:
        entry = {"parameters": pipeline.unet.num_parameters(), "weights_sha256": weights_sha256(folder), "distance": {}}
        self.content["models"][model] = entry

    def cell(self, model: str, scheduler: str, pipeline: SMDPipeline, steps: int) -> dict:
        """Measure with the scheduler of the pipeline, or keep the cell of the file, if it belongs to the same weights."""
        entry, earlier = self.content["models"][model], self.before.get(model, {})
        cell = None
        if earlier.get("weights_sha256") == entry["weights_sha256"]:
            cell = earlier["distance"].get(scheduler, {}).get(str(steps))
        if cell is None:
            cell = self.yardstick.cell(pipeline, steps, f"{model}, {scheduler}, {steps} steps")
        entry["distance"].setdefault(scheduler, {})[steps] = cell
        print(f"{model}, {scheduler}, {steps} steps: {cell['frechet']:.3f}", flush=True)
        self.write()
        return cell

    def write(self, finished: bool = False) -> None:
        """Write the file. Cells of the earlier file are kept until the run is finished, because it may be stopped again."""
        content = self.content
        if not finished:
            content = content | {"models": self.before | content["models"]}
            for model, entry in content["models"].items():
                earlier = self.before.get(model, {})
                if earlier.get("weights_sha256") == entry["weights_sha256"]:
                    content["models"][model] = entry | {"distance": joined(earlier["distance"], entry["distance"])}
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def finish(self, lines: list[str]) -> Path:
        """Write the JSON with the run time, and a Markdown file next to it; returns the path of the JSON."""
        self.content["seconds"] = round(time.perf_counter() - self.started)
        self.write(finished=True)
        text = "\n".join(lines) + "\n"
        self.path.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)
        return self.path


def plain_log_ticks(*axes: Axis) -> None:
    """Put ticks at 1, 2, 5, 10, 20, ... on logarithmic axes."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def joined(earlier: dict, now: dict) -> dict:
    """Merge two maps of scheduler -> steps -> cell. Steps are strings in JSON."""
    new = {scheduler: {str(steps): cell for steps, cell in cells.items()} for scheduler, cells in now.items()}
    return {scheduler: earlier.get(scheduler, {}) | new.get(scheduler, {}) for scheduler in earlier | new}


def weights_sha256(folder: str) -> str:
    """Hash the networks of a model folder except the autoencoder, or the network in a folder of its own."""
    digest = hashlib.sha256()
    model = Path(folder)
    for path in weight_files(model, NETWORKS) or weight_files(model.parent, [model.name]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def distance_table(result: dict, title: str, steps: list[int]) -> list[str]:
    """Format the Frechet distances as Markdown, with their 95 % interval: a row for each model and scheduler."""
    lines = [
        f"{result['distance']}, {title}: {result['samples']} samples compared with {result['reference_pictures']} training "
        f"images (`{result['command']}`). The distance of {result['floor']['pictures']} held-out images is "
        f"{result['floor']['frechet']:.2f}. Intervals are 95 % (bootstrap).",
        "",
        "| | " + " | ".join(f"{n} steps" for n in steps) + " |",
        "|---" * (len(steps) + 1) + "|",
    ]
    for model, entry in result["models"].items():
        for scheduler, cells in entry["distance"].items():
            values = [f"{cells[n]['frechet']:.2f} ± {1.96 * cells[n]['frechet_sd']:.2f}" if n in cells else "" for n in steps]
            lines.append(f"| {model}, {scheduler} | " + " | ".join(values) + " |")
    return lines
