"""Measures every supported scheduler of diffusers on images, with the settings that make_scheduler gives it.

Samples a Gaussian model and a mixture with each scheduler at one number of steps. Measures the distance to the training images
in the features of checkpoints/classifier, the mean brightness, and the number of network evaluations.

examples:
  python benchmarks/schedulers.py --config configs/benchmarks/schedulers-emoji.yaml
  python benchmarks/schedulers.py --config configs/benchmarks/schedulers-emoji.yaml schedulers=[HeunDiscreteScheduler]

Writes benchmarks/results/schedulers-NAME.json, .md and .jpg.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import AutoencoderKL
from omegaconf import MISSING
from PIL import Image
from targets import target, target_table
from torchvision.transforms.functional import to_pil_image
from yardstick import Results, ResultsConfig

from ldm_smd.cli import run_tool
from ldm_smd.diffusion.settings import DiffusionConfig
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.pipelines import SMDPipeline
from ldm_smd.sampling.grid import labelled_grid
from ldm_smd.schedulers import make_scheduler
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.schedulers.support import SUPPORTED

REFERENCE = "DDIMScheduler"
SHOWN = 12
WORST_RATIO, BRIGHTNESS = 1.5, 0.05


@dataclass
class SchedulersConfig(ResultsConfig):
    """benchmarks/schedulers.py"""

    gaussian: str = MISSING
    smd: str = MISSING
    """Folders of networks, such as outputs/emoji-energy/model/unet."""
    autoencoder: str = MISSING
    """Folder of the AutoencoderKL of both models."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Process that both models were trained with."""
    schedulers: list[str] = field(default_factory=lambda: sorted(SUPPORTED))
    """Schedulers as in make_scheduler. DDIMScheduler, the reference, is added first."""
    controls: list[str] = field(
        default_factory=lambda: [
            f"{name}:use_karras_sigmas=false" for name, needed in sorted(SUPPORTED.items()) if "use_karras_sigmas" in needed
        ]
    )
    """Schedulers without these settings, to show their effect. They are not part of the targets."""
    steps: int = 20


def schedulers(config: SchedulersConfig) -> Path:
    """Run the benchmark; returns the JSON file."""
    results = Results("schedulers", config)
    own = build_scheduler(config.diffusion)
    autoencoder = AutoencoderKL.from_pretrained(config.autoencoder, use_safetensors=True)
    names = list(dict.fromkeys([REFERENCE, *config.schedulers, *config.controls]))
    results.content |= {"steps": config.steps, "settings": {name: settings_of(name) for name in names}}
    rows: list[list[Image.Image]] = []
    for model, folder in (("gaussian", config.gaussian), ("smd", config.smd)):
        pipeline = SMDPipeline(SMDUNet2DModel.from_pretrained(folder, use_safetensors=True), autoencoder, own)
        results.add_model(model, folder, pipeline)
        for name in names:
            pipeline.scheduler = make_scheduler(name, own)
            results.cell(model, name, pipeline, config.steps)
            rows.append(list(map(to_pil_image, results.yardstick.sample(pipeline, config.steps, 0, SHOWN, f"{name}, grid"))))
    results.content["targets"] = targets(results.content["models"], config)
    labelled_grid(rows, [f"{model}, {row_name(name)}" for model in ("gaussian", "smd") for name in names]).save(
        results.path.with_suffix(".jpg"), quality=88
    )
    return results.finish(table(config, results.content))


def settings_of(name: str) -> str:
    """Return the settings of a scheduler: those in its name, or those that make_scheduler adds."""
    if ":" in name:
        return name.partition(":")[2]
    return ",".join(f"{key}={str(value).lower()}" for key, value in SUPPORTED.get(name, {}).items())


def short_name(name: str) -> str:
    return name.partition(":")[0].replace("Scheduler", "")


def row_name(name: str) -> str:
    return name.replace("Scheduler", "").replace(":", ", ")


def targets(models: dict, config: SchedulersConfig) -> list[dict]:
    """Compare each scheduler with DDIM at the same number of steps."""
    found, steps = [], config.steps
    for model, entry in models.items():
        cells = {name: by_steps[steps] for name, by_steps in entry["distance"].items() if name not in config.controls}
        reference = cells[REFERENCE]
        ratios = {name: cell["frechet"] / reference["frechet"] for name, cell in cells.items()}
        changes = {name: abs(cell["brightness"] - reference["brightness"]) for name, cell in cells.items()}
        for measure, values, limit in (
            ("distance / DDIM's", ratios, WORST_RATIO),
            ("difference of mean brightness from DDIM's", changes, BRIGHTNESS),
        ):
            worst = max(values, key=values.get)
            title = f"{model}, {steps} steps: largest {measure}, {short_name(worst)}"
            found.append(target(title, f"<= {limit}", round(values[worst], 3)))
    return found


def table(config: SchedulersConfig, result: dict) -> list[str]:
    models = result["models"]
    lines = [
        f"{result['distance']}, {config.name}: {config.steps} steps, {result['samples']} samples without guidance compared "
        f"with {result['reference_pictures']} training images (`{result['command']}`). The distance of "
        f"{result['floor']['pictures']} held-out images is {result['floor']['frechet']:.2f}. Distances are given with their "
        "95 % interval (bootstrap).",
        "",
        "| scheduler | settings | evaluations | " + " | ".join(f"{each} | / DDIM's | brightness" for each in models) + " |",
        "|---" * (3 + 3 * len(models)) + "|",
    ]
    for name, settings in result["settings"].items():
        found = [{each: entry["distance"][each][config.steps] for each in (name, REFERENCE)} for entry in models.values()]
        row = [short_name(name), f"`{settings}`" if settings else "", str(found[0][name]["evaluations"])]
        for cells in found:
            cell = cells[name]
            row.append(f"{cell['frechet']:.2f} ± {1.96 * cell['frechet_sd']:.2f}")
            row += [f"{cell['frechet'] / cells[REFERENCE]['frechet']:.2f}", f"{cell['brightness']:.3f}"]
        lines.append("| " + " | ".join(row) + " |")
    return lines + target_table(result["targets"])


if __name__ == "__main__":
    sys.exit(run_tool(SchedulersConfig, schedulers, __doc__))
