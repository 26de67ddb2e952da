"""Measures analytical teleportation with a Gaussian model: distance over network evaluations, with and without it.

Each solver starts from pure noise, and at sigma_skip from drafts of each Gaussian mixture fitted to the latents
(tools/fit_gaussian.py). With UniPC it also measures different sigma_skip; controls that skip the same noise levels but know
less of the distribution of the latents; copies of training images; and how much of the learned score the fits explain at each
noise level.

examples:
  python benchmarks/teleport.py --config configs/benchmarks/teleport-emoji.yaml
  python benchmarks/teleport.py --config configs/benchmarks/teleport-emoji.yaml resume=true sigma_skip=5

Writes benchmarks/results/teleport-NAME.json, .md and .png.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import matplotlib
import torch
from omegaconf import MISSING
from yardstick import SCHEDULERS, Results, ResultsConfig, Yardstick, distance_table, plain_log_ticks

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.cli import run_tool
from ldm_smd.data.shards import Manifest
from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.models.denoiser import model_labels, num_classes, predict
from ldm_smd.models.gaussian import LatentGaussians
from ldm_smd.pipelines import SMDPipeline, load_pipeline
from ldm_smd.schedulers import TeleportScheduler, make_scheduler
from ldm_smd.schema import check
from ldm_smd.training.fit_gaussian import fitting_latents

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

CHOOSING = "UniPC"
"""Solver for everything but the comparison of solvers."""
WITHIN = 1.02
"""A distance counts as equal to that of the full run up to this factor."""
SCORE_IMAGES = 1024
PLAIN = "pure noise"
SMD, SMD_SOLVER = "SMD", "SDE-DPM-Solver++"


@dataclass
class TeleportBenchmarkConfig(ResultsConfig):
    """benchmarks/teleport.py"""

    gaussian: str = MISSING
    """Model folder of a Gaussian UNet."""
    shards: str = MISSING
    """Latent shards of the model, for the score study."""
    fits: dict[str, str] = field(default_factory=dict)
    """Model folders with a fitted Gaussian mixture (tools/fit_gaussian.py) by name. The controls are made from the first."""
    smd: Optional[str] = None
    """Model folder of a mixture UNet with a fitted Gaussian mixture, for the same with SDE-DPM-Solver++."""
    solvers: list[str] = field(default_factory=lambda: ["UniPC", "DPM-Solver++", "Heun", "DDIM"])
    """Names in yardstick.SCHEDULERS."""
    steps: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 8, 12, 16, 25])
    full_steps: int = 50
    """Steps of a longer run from pure noise."""
    sigma_skip: float = 2.5
    """Noise level that solvers and controls start from."""
    sigmas: list[float] = field(default_factory=lambda: [1.25, 2.5, 5.0, 10.0, 20.0])
    """Values of sigma_skip to compare."""
    choosing_steps: list[int] = field(default_factory=lambda: [2, 5, 12])
    """Numbers of steps for that comparison."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_schedulers("solvers")
        check(bool(self.fits), "fits", "at least one", "none")


def teleport(config: TeleportBenchmarkConfig) -> Path:
    """Run the benchmark; returns the JSON file."""
    results = Results("teleport", config)
    pipeline = load_pipeline(config.gaussian)
    own = pipeline.scheduler
    results.add_model(PLAIN, config.gaussian, pipeline)
    for solver in config.solvers:
        pipeline.scheduler = make_scheduler(SCHEDULERS[solver], own)
        for steps in (*config.steps, config.full_steps):
            count_evaluations(results.cell(PLAIN, solver, pipeline, steps), pipeline, steps)

    fits = {}
    for fit, folder in config.fits.items():
        from_drafts = load_pipeline(folder)
        fits[fit] = from_drafts.gaussian
        results.add_model(fit, folder, from_drafts)
        for solver in config.solvers:
            for steps in config.steps:
                measure_from_drafts(results, fit, solver, from_drafts, own, config.sigma_skip, steps)
        for sigma in config.sigmas:
            for steps in config.choosing_steps:
                measure_from_drafts(results, fit, CHOOSING, from_drafts, own, sigma, steps)

    results.content["nearest"] = nearest(config, results.yardstick, pipeline, own)
    first = next(iter(config.fits))
    for name, gaussian in controls(fits[first]).items():
        from_drafts = load_pipeline(config.fits[first])
        from_drafts.register_modules(gaussian=gaussian)
        results.add_model(name, config.fits[first], from_drafts)
        for steps in config.choosing_steps:
            measure_from_drafts(results, name, CHOOSING, from_drafts, own, config.sigma_skip, steps)

    if config.smd is not None:
        mixture = load_pipeline(config.smd)
        results.add_model(SMD, config.smd, mixture)
        for steps in config.choosing_steps:
            mixture.scheduler = make_scheduler(SCHEDULERS[SMD_SOLVER], own)
            count_evaluations(results.cell(SMD, SMD_SOLVER, mixture, steps), mixture, steps)
            for sigma in config.sigmas:
                measure_from_drafts(results, SMD, SMD_SOLVER, mixture, own, sigma, steps)

    results.content["score"] = score_study(config, pipeline, own, fits)
    results.content["savings"] = [
        entry for fit in fits for solver in config.solvers for entry in savings(results.content["models"], fit, solver, config)
    ]
    draw(config, results.content, results.path.with_suffix(".png"))
    return results.finish(table(config, results.content))


def title(solver: str, sigma: float) -> str:
    return f"{solver} from {sigma:g}"


def measure_from_drafts(
    results: Results, fit: str, solver: str, pipeline: SMDPipeline, own: object, sigma: float, steps: int
) -> None:
    """Measure a solver that takes ``steps`` steps from drafts at noise level ``sigma``."""
    pipeline.scheduler = TeleportScheduler.from_config(own.config, scheduler=SCHEDULERS[solver], sigma_skip=sigma)
    count_evaluations(results.cell(fit, title(solver, sigma), pipeline, steps), pipeline, steps)


def count_evaluations(cell: dict, pipeline: SMDPipeline, steps: int) -> None:
    """Store the number of evaluations in the cell. Second-order schedulers evaluate the network twice per step."""
    pipeline.scheduler.set_timesteps(steps)
    cell["evaluations"] = len(pipeline.scheduler.timesteps)


def controls(gaussian: LatentGaussians) -> dict[str, LatentGaussians]:
    """Return Gaussians that know less of the latents: nothing, their mean, or their mean and total variance."""
    config = dict(gaussian.config)
    settings = {key: config[key] for key in ("channels", "height", "width", "count", "num_classes")}
    found = {}
    for name in ("control: plain noise", "control: mean alone", "control: mean and total variance"):
        part = LatentGaussians(rank=1, **settings)
        part.log_weights.copy_(gaussian.log_weights)
        part.variances.zero_()
        part.tails.zero_()
        if name != "control: plain noise":
            part.means.copy_(gaussian.means)
        if name == "control: mean and total variance":
            dimensions, rank = gaussian.means.shape[1], gaussian.variances.shape[1]
            total = (gaussian.variances.sum(dim=1) + (dimensions - rank) * gaussian.tails) / dimensions
            part.tails.copy_(total)
            part.variances.copy_(total[:, None])
        found[name] = part
    return found


def nearest(config: TeleportBenchmarkConfig, yardstick: Yardstick, pipeline: SMDPipeline, own: object) -> dict[str, float]:
    """Measure distances to training images (Yardstick.nearest) for the longest run, and for a short one with each fit."""
    steps, found = config.choosing_steps[len(config.choosing_steps) // 2], {}
    for name, folder in {PLAIN: config.gaussian, **config.fits}.items():
        chosen = pipeline if name == PLAIN else load_pipeline(folder)
        chosen.scheduler = make_scheduler(SCHEDULERS[CHOOSING], own)
        if name != PLAIN:
            options = {"scheduler": SCHEDULERS[CHOOSING], "sigma_skip": config.sigma_skip}
            chosen.scheduler = TeleportScheduler.from_config(own.config, **options)
        taken = config.full_steps if name == PLAIN else steps
        made = yardstick.sample(chosen, taken, 0, config.samples // config.sampling_seeds, f"{name}, nearest")
        found[f"{name}, {taken} steps"] = yardstick.nearest((made * 255).round().to(torch.uint8))
    return found


@torch.no_grad()
def score_study(config: TeleportBenchmarkConfig, pipeline: SMDPipeline, own: object, fits: dict[str, LatentGaussians]) -> dict:
    """Return the fraction of the variance of the learned score, and of the learned E[x_0 | x_t], that each fit explains:

        1 - E |score - score_fit|^2 / E |score - mean score|^2,    score = (a E[x_0 | x_t] - x_t) / s^2.

    At high noise the score is close to -x_t / s for any fit, but E[x_0 | x_t] has no such trivial part.
    """
    manifest = Manifest.load(config.shards)
    latents, labels = fitting_latents(manifest, FrozenAutoencoder(pipeline.vae), seed=0, mirror=False)
    x0, labels = latents[:SCORE_IMAGES], model_labels(labels[:SCORE_IMAGES], num_classes(pipeline.unet))
    process = DiffusionProcess(own.alphas_cumprod)
    generator = torch.Generator().manual_seed(0)
    rows = {"sigma": [], "score": {fit: [] for fit in fits}, "x0": {fit: [] for fit in fits}}
    for timestep in range(own.config.num_train_timesteps - 1, 0, -own.config.num_train_timesteps // 25):
        t = torch.full((len(x0),), timestep)
        a, s = (float(value.flatten()[0]) for value in process.signal_and_noise(t[:1], x0))
        x_t = process.noise(x0, torch.randn(x0.shape, generator=generator), t)
        parts = zip(x_t.split(128), t.split(128), [None] * len(x0) if labels is None else labels.split(128))
        prediction = torch.cat([predict(pipeline.unet, *part) for part in parts])
        learned = process.to_x0(prediction, x_t, t, own.config.prediction_type)
        rows["sigma"].append(s / a)
        for fit, gaussian in fits.items():
            expected = gaussian.expected_x0(x_t, (a, s), labels)
            rows["x0"][fit].append(explained(learned, expected))
            rows["score"][fit].append(explained((a * learned - x_t) / s**2, (a * expected - x_t) / s**2))
    return rows


def explained(learned: torch.Tensor, fitted: torch.Tensor) -> float:
    rest = (learned - fitted).square().mean() / (learned - learned.mean(dim=0)).square().mean()
    return round(1.0 - float(rest), 5)


def savings(models: dict, fit: str, solver: str, config: TeleportBenchmarkConfig) -> list[dict]:
    """Find, for each run from pure noise, the fewest evaluations from drafts that reach its distance up to a factor WITHIN."""
    after = models[fit]["distance"][title(solver, config.sigma_skip)].values()
    found = []
    for full in models[PLAIN]["distance"][solver].values():
        enough = [cell["evaluations"] for cell in after if cell["frechet"] <= WITHIN * full["frechet"]]
        fewest = min(enough, default=None)
        saved = None if fewest is None else round(1.0 - fewest / full["evaluations"], 3)
        found.append({"fit": fit, "solver": solver, "full": full["evaluations"], "with": fewest, "saved": saved})
    return found


def draw(config: TeleportBenchmarkConfig, result: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4))
    for index, solver in enumerate(config.solvers):
        for style, model in zip((":", "--", "-"), (PLAIN, *config.fits)):
            name = solver if model == PLAIN else title(solver, config.sigma_skip)
            cells = result["models"][model]["distance"][name].values()
            points = sorted((cell["evaluations"], cell["frechet"]) for cell in cells)
            axes[0].plot(*zip(*points), style, color=f"C{index}", marker=".")
    axes[0].set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="Frechet distance")
    colours = [Line2D([], [], color=f"C{index}", label=solver) for index, solver in enumerate(config.solvers)]
    styles = [Line2D([], [], color="grey", linestyle=s, label=m) for s, m in zip((":", "--", "-"), (PLAIN, *config.fits))]
    axes[0].legend(handles=[*colours, *styles], fontsize=7)
    for style, fit in zip(("--", "-"), config.fits):
        cells = result["models"][fit]["distance"]
        for index, steps in enumerate(config.choosing_steps):
            values = [cells[title(CHOOSING, sigma)][steps]["frechet"] for sigma in config.sigmas]
            axes[1].plot(config.sigmas, values, style, color=f"C{index}", label=f"{steps} steps, {fit}", marker=".")
    axes[1].set(xscale="log", yscale="log", xlabel=f"sigma_skip, {CHOOSING}", ylabel="Frechet distance")
    axes[1].legend(fontsize=7)
    plain_log_ticks(axes[0].xaxis, axes[0].yaxis, axes[1].xaxis, axes[1].yaxis)
    score = result["score"]
    for style, what in (("-", "score"), ("--", "x0")):
        for index, fit in enumerate(config.fits):
            axes[2].plot(score["sigma"], score[what][fit], style, color=f"C{index}", label=f"{what}, {fit}")
    axes[2].set(xscale="log", xlim=(0.02, 100), ylim=(-0.1, 1.02), xlabel="sigma", ylabel="explained variance")
    axes[2].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def table(config: TeleportBenchmarkConfig, result: dict) -> list[str]:
    full_runs = [*config.steps, config.full_steps]
    steps = sorted({*full_runs, *config.choosing_steps})
    lines = [*distance_table(result, config.name, steps), ""]
    lines += [
        "The fewest evaluations from drafts that reach the distance of a run from pure noise within 2 %, and the saving:",
        "",
        "| | " + " | ".join(f"{n} steps" for n in full_runs) + " |",
        "|---" * (len(full_runs) + 1) + "|",
    ]
    for fit in config.fits:
        for solver in config.solvers:
            entries = [entry for entry in result["savings"] if (entry["fit"], entry["solver"]) == (fit, solver)]
            cells = [
                f"{e['full']}: none" if e["with"] is None else f"{e['full']}: {e['with']} ({e['saved']:.0%})" for e in entries
            ]
            lines.append(f"| {solver}, {fit} from {config.sigma_skip:g} | " + " | ".join(cells) + " |")
    lines += ["", "Median distance to the nearest training image, relative to that of held-out images: "]
    lines[-1] += "; ".join(f"{name} {value:.2f}" for name, value in result["nearest"].items())
    score = result["score"]
    chosen = range(0, len(score["sigma"]), 3)
    lines += [
        "",
        "Explained fraction of the variance of the learned score and of the learned E[x_0 | x_t], by noise level:",
        "",
    ]
    lines.append("| sigma | " + " | ".join(f"{score['sigma'][i]:.2g}" for i in chosen) + " |")
    lines.append("|---" * (len(chosen) + 1) + "|")
    for what in ("score", "x0"):
        for fit in config.fits:
            lines.append(f"| {what}, {fit} | " + " | ".join(f"{score[what][fit][i]:.3f}" for i in chosen) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(run_tool(TeleportBenchmarkConfig, teleport, __doc__))
