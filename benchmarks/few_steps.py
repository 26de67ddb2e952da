"""SMD against the Gaussian model of equal parameters and equal images seen, at few steps, on real pictures.

Samples both with every scheduler and number of steps, and measures the distance to the training pictures in the features of
checkpoints/classifier (or OpenCLIP's, or Inception's, where a weights file is given).

examples:
  python benchmarks/few_steps.py --config configs/benchmarks/few-steps-emoji.yaml
  python benchmarks/few_steps.py --config configs/benchmarks/few-steps-cifar10.yaml samples=2000
  python benchmarks/few_steps.py --config configs/benchmarks/few-steps-emoji.yaml features=inception:weights/inception.pth

Writes benchmarks/results/few_steps-NAME.json, .md and .jpg.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import MISSING
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ldm_smd.cli import run_tool
from ldm_smd.config import ImagesConfig, at_least, check
from ldm_smd.data.images import load_pixels
from ldm_smd.evaluation.features import load_extractor
from ldm_smd.evaluation.metrics import bootstrap_deviation, frechet_distance, kernel_distance
from ldm_smd.pipelines import load_pipeline
from ldm_smd.sampling import make_scheduler, sample_pixels

RESULTS = Path(__file__).parent / "results"
GRID_PICTURES, GRID_STEPS = 16, (1, 2, 4, 8, 32)
SCHEDULERS = {
    "DDPM": "DDPMScheduler",
    "DDIM": "DDIMScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "SDE-DPM-Solver++": "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++",
    "UniPC": "UniPCMultistepScheduler",
    "Euler ancestral": "EulerAncestralDiscreteScheduler",
}
"""The names in the tables; of the multistep solvers, second order."""


@dataclass
class FewStepsConfig:
    """benchmarks/few_steps.py"""

    name: str = MISSING
    """Of the picture set; names the result files."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """The pictures both models were trained on."""
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Real pictures neither has seen: their distance is the floor, and their labels are the labels sampled."""
    smd: str = MISSING
    gaussian: str = MISSING
    """Model folders (RUN/model)."""
    smd_schedulers: list[str] = field(default_factory=lambda: ["DDPM", "DDIM", "SDE-DPM-Solver++"])
    gaussian_schedulers: list[str] = field(default_factory=lambda: list(SCHEDULERS))
    """Of SCHEDULERS."""
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 100])
    samples: int = 1000
    """Per scheduler and number of steps, over all sampling seeds together."""
    sampling_seeds: int = 2
    features: str = "checkpoints/classifier"
    """Feature network: a FeatureNetwork folder, open_clip:ARCHITECTURE:FILE.safetensors or inception:FILE."""
    reference: int = 10_000
    """Training pictures compared with, at most."""
    resume: bool = False
    """Keep what the result file has of the same weights, pictures, features and numbers of samples."""

    def __post_init__(self) -> None:
        at_least("sampling_seeds", self.sampling_seeds, 1)
        check(self.samples % self.sampling_seeds == 0, "samples", "a multiple of sampling_seeds", self.samples)
        at_least("samples", self.samples, 2 * GRID_PICTURES)
        for key in ("smd_schedulers", "gaussian_schedulers"):
            unknown = set(getattr(self, key)) - set(SCHEDULERS)
            check(not unknown, key, f"some of {', '.join(SCHEDULERS)}", ", ".join(sorted(unknown)))


def few_steps(config: FewStepsConfig) -> Path:
    """Run all cells; returns the JSON file."""
    started = time.perf_counter()
    extractor = load_extractor(config.features)
    training, _, _ = load_pixels(config.images)
    held_out, labels, _ = load_pixels(config.held_out)
    chosen = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[: config.reference]
    reference = extractor(training[chosen], description="reference")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    sampled_labels = [labels[order[index % len(order)]] for index in range(config.samples)]

    floor_features = extractor(held_out[order[: config.samples]], description="floor")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"few_steps-{config.name}.json"
    result = {
        "command": " ".join(["python", "benchmarks/few_steps.py", *sys.argv[1:]]),
        "distance": f"Frechet distance and KID in the features of {extractor.name}",
        "reference_pictures": len(reference),
        "floor": measure(floor_features, [floor_features], reference) | {"pictures": len(floor_features)},
        "samples": config.samples,
        "sampling_seeds": config.sampling_seeds,
        "threads": torch.get_num_threads(),
        "models": {},
    }
    before = json.loads(path.read_text(encoding="utf-8")) if config.resume and path.is_file() else {}
    rows: list[torch.Tensor] = []
    for model, folder, schedulers in (
        ("smd", config.smd, config.smd_schedulers),
        ("gaussian", config.gaussian, config.gaussian_schedulers),
    ):
        pipeline = load_pipeline(folder)
        own = pipeline.scheduler

        def sampled(name: str, steps: int, start: int, count: int, pipeline=pipeline, own=own, model=model) -> torch.Tensor:
            """Pictures of the seeds from ``start`` on."""
            pipeline.scheduler = make_scheduler(SCHEDULERS[name], own)
            chosen, title = sampled_labels[start : start + count], f"{model}, {name}, {steps} steps"
            return sample_pixels(pipeline, chosen, count, steps, 1.0, start, 125, title)

        rows.extend(sampled("DDPM", steps, 0, GRID_PICTURES) for steps in GRID_STEPS)
        entry = {"parameters": pipeline.unet.num_parameters(), "weights_sha256": weights_sha256(folder), "distance": {}}
        result["models"][model] = entry
        for name in schedulers:
            cells = entry["distance"][name] = {}
            for steps in config.steps:
                cells[steps] = known_cell(before, result, model, name, steps)
                if cells[steps] is None:
                    per_seed = config.samples // config.sampling_seeds
                    parts = [sampled(name, steps, seed * per_seed, per_seed) for seed in range(config.sampling_seeds)]
                    features = [extractor((part * 255).round().to(torch.uint8)) for part in parts]
                    cells[steps] = measure(torch.cat(features), features, reference)
                print(f"{model} {name} {steps}: {cells[steps]['frechet']:.3f}", flush=True)
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")  # for resume
    result["targets"] = targets(result["models"])
    result["seconds"] = round(time.perf_counter() - started)

    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(config, result), encoding="utf-8")
    grid = make_grid(torch.cat(rows), nrow=GRID_PICTURES, padding=2, pad_value=0.8)
    to_pil_image(grid).save(path.with_suffix(".jpg"), quality=88)
    print(table(config, result))
    return path


def weights_sha256(folder: str) -> str:
    """Of the UNet of a model folder."""
    return hashlib.sha256((Path(folder) / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def known_cell(before: dict, result: dict, model: str, name: str, steps: int) -> dict | None:
    """What an earlier result has of this cell, if it was made of the same."""
    same = ("distance", "reference_pictures", "floor", "samples", "sampling_seeds")
    if any(before.get(key) != result[key] for key in same):
        return None
    entry = before["models"].get(model, {})
    if entry.get("weights_sha256") != result["models"][model]["weights_sha256"]:
        return None
    return entry["distance"].get(name, {}).get(str(steps))


def measure(features: torch.Tensor, per_seed: list[torch.Tensor], reference: torch.Tensor) -> dict:
    """Both distances of all samples, their bootstrap deviations, and the Frechet distance of each sampling seed alone."""
    return {
        "frechet": round(frechet_distance(features, reference), 4),
        "frechet_sd": round(bootstrap_deviation(frechet_distance, features, reference, rounds=20), 4),
        "kid": round(kernel_distance(features, reference), 5),
        "kid_sd": round(bootstrap_deviation(kernel_distance, features, reference, rounds=5), 5),
        "frechet_per_seed": [round(frechet_distance(part, reference), 4) for part in per_seed],
    }


def targets(models: dict) -> list[dict]:
    """Each model with the best of its own schedulers."""

    def best(model: str, steps: int | None = None) -> float:
        schedulers = models[model]["distance"].values()
        return min(cell["frechet"] for cells in schedulers for n, cell in cells.items() if steps in (None, n))

    steps = {n for cells in models["smd"]["distance"].values() for n in cells}
    found = []
    if 4 in steps:
        ratio = best("smd", 4) / best("gaussian", 4)
        found.append(target("4 steps: SMD / best Gaussian scheduler at 4 steps", "<= 0.5", ratio, ratio <= 0.5))
    if 8 in steps:
        ratio = best("smd", 8) / best("gaussian")
        found.append(target("8 steps: SMD / best Gaussian at any steps", "<= 1", ratio, ratio <= 1))
    return found


def target(name: str, wanted: str, measured: float, holds: bool) -> dict:
    return {"name": name, "target": wanted, "measured": round(measured, 3), "holds": holds}


def table(config: FewStepsConfig, result: dict) -> str:
    """The Frechet distances as Markdown, with the bootstrap's 95 % interval."""
    lines = [
        f"{result['distance']}, {config.name}: {result['samples']} samples against {result['reference_pictures']} training "
        f"pictures; {result['floor']['pictures']} held-out pictures are at {result['floor']['frechet']:.2f} "
        f"(`{result['command']}`)",
        "",
        "| | " + " | ".join(f"{n} steps" for n in config.steps) + " |",
        "|---" * (len(config.steps) + 1) + "|",
    ]
    for model, entry in result["models"].items():
        for scheduler, cells in entry["distance"].items():
            values = [f"{cells[n]['frechet']:.2f} ± {1.96 * cells[n]['frechet_sd']:.2f}" for n in config.steps]
            lines.append(f"| {model}, {scheduler} | " + " | ".join(values) + " |")
    lines += ["", "| target | wanted | measured |", "|---|---|---|"]
    lines += [f"| {entry['name']} | {entry['target']} | {entry['measured']} |" for entry in result["targets"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_tool(FewStepsConfig, few_steps, __doc__))
