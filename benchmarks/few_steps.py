"""Compares SMD with a Gaussian model of as many parameters and training images, at few sampling steps.

Samples both with every scheduler and number of steps, and measures the distance to the training images in the features of
checkpoints/classifier (or those of OpenCLIP or Inception, if a weights file is given).

examples:
  python benchmarks/few_steps.py --config configs/benchmarks/few-steps-emoji.yaml
  python benchmarks/few_steps.py --config configs/benchmarks/few-steps-cifar10.yaml samples=2000
  python benchmarks/few_steps.py --config configs/benchmarks/few-steps-emoji.yaml features=inception:weights/inception.pth

Writes benchmarks/results/few_steps-NAME.json, .md and .jpg.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import MISSING
from targets import target, target_table
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from yardstick import SCHEDULERS, Results, ResultsConfig, distance_table

from ldm_smd.cli import run_tool
from ldm_smd.pipelines import load_pipeline
from ldm_smd.schedulers import make_scheduler
from ldm_smd.schema import check

GRID_IMAGES, GRID_STEPS = 16, (1, 2, 4, 8, 32)


@dataclass
class FewStepsConfig(ResultsConfig):
    """benchmarks/few_steps.py"""

    smd: str = MISSING
    gaussian: str = MISSING
    """Model folders (RUN/model)."""
    smd_schedulers: list[str] = field(default_factory=lambda: ["DDPM", "DDIM", "SDE-DPM-Solver++"])
    gaussian_schedulers: list[str] = field(
        default_factory=lambda: ["DDPM", "DDIM", "DPM-Solver++", "SDE-DPM-Solver++", "UniPC", "Euler ancestral"]
    )
    """Names in yardstick.SCHEDULERS."""
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 100])

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.samples >= 2 * GRID_IMAGES, "samples", f"at least {2 * GRID_IMAGES}", self.samples)
        self.check_schedulers("smd_schedulers", "gaussian_schedulers")


def few_steps(config: FewStepsConfig) -> Path:
    """Run the benchmark; returns the JSON file."""
    results = Results("few_steps", config)
    rows: list[torch.Tensor] = []
    for model, folder, schedulers in (
        ("smd", config.smd, config.smd_schedulers),
        ("gaussian", config.gaussian, config.gaussian_schedulers),
    ):
        pipeline = load_pipeline(folder)
        own = pipeline.scheduler
        pipeline.scheduler = make_scheduler(SCHEDULERS["DDPM"], own)
        rows.extend(results.yardstick.sample(pipeline, steps, 0, GRID_IMAGES, f"{model}, grid") for steps in GRID_STEPS)
        results.add_model(model, folder, pipeline)
        for name in schedulers:
            pipeline.scheduler = make_scheduler(SCHEDULERS[name], own)
            for steps in config.steps:
                results.cell(model, name, pipeline, steps)
    results.content["targets"] = targets(results.content["models"])

    grid = make_grid(torch.cat(rows), nrow=GRID_IMAGES, padding=2, pad_value=0.8)
    to_pil_image(grid).save(results.path.with_suffix(".jpg"), quality=88)
    lines = distance_table(results.content, config.name, config.steps)
    return results.finish(lines + target_table(results.content["targets"]))


def targets(models: dict) -> list[dict]:
    """Compare the models, each with its best scheduler."""

    def best(model: str, steps: int | None = None) -> float:
        schedulers = models[model]["distance"].values()
        return min(cell["frechet"] for cells in schedulers for n, cell in cells.items() if steps in (None, n))

    steps = {n for cells in models["smd"]["distance"].values() for n in cells}
    found = []
    if 4 in steps:
        ratio = best("smd", 4) / best("gaussian", 4)
        found.append(target("4 steps: SMD / best Gaussian scheduler at 4 steps", "<= 0.5", ratio))
    if 8 in steps:
        ratio = best("smd", 8) / best("gaussian")
        found.append(target("8 steps: SMD / best Gaussian at any steps", "<= 1", ratio))
    return found


if __name__ == "__main__":
    sys.exit(run_tool(FewStepsConfig, few_steps, __doc__))
