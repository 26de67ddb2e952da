"""tools/demo.py: encode images, distil a mixture from a shipped Gaussian model, compare it with shipped models, report."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torchvision.utils import make_grid

from ..autoencoder import FrozenAutoencoder, sample_latents
from ..config import dump_config, load_config
from ..data.classes import renumbered
from ..data.encode import encode
from ..data.images import load_pixels
from ..data.settings import EncodeConfig
from ..data.shards import Manifest
from ..data.stream import LatentStream
from ..errors import UserError
from ..evaluation.diagnostics import diagnostic_timesteps, spread_over_eta
from ..evaluation.distances import frechet_distance
from ..evaluation.features import load_extractor
from ..evaluation.reconstruction import reconstruction_psnr
from ..files import atomic_file, claimed
from ..models.denoiser import model_labels, num_classes
from ..pipelines import SMDPipeline, load_pipeline
from ..sampling.batches import SamplingOptions, sample_pixels
from ..schedulers import make_scheduler
from ..schedulers.conversion import process_of
from ..training.coarse_labels import class_names
from ..training.loop import train
from ..training.metrics_log import read_metrics
from ..training.settings import TrainConfig
from .report import write_report
from .settings import DemoConfig, DemoRunConfig
from .showcase import Showcase, load_unet, write_shipped

GRID_COLUMNS, GRID_ROWS = 6, 6
FEW_STEPS = 4
"""The report compares the models side by side at the number in ``steps`` closest to this."""
SPREAD_IMAGES = 64
LATENTS, SETTINGS, REPORT = "latents", "demo.yaml", "report.json"
LONGEST_NAME = 100


def demo(config: DemoConfig) -> Path:
    """Run all stages from the start and write them under ``config.output``; returns the path of report.html."""
    check_inputs(config)
    output = Path(config.output)
    with claimed(output, inside=True):
        require_own(output)
        seconds: dict[str, float] = {}
        # All inputs are read first, so that a missing one is reported before earlier results are removed.
        with timed(seconds, "read"):
            encode_config = load_config(EncodeConfig, config.encode, [f"output={output / LATENTS}"])
            held_out, held_out_labels, held_out_classes = load_pixels(config.held_out)
            training_pixels, _, classes = load_pixels(encode_config.images)
            labels = renumbered(held_out_labels, held_out_classes, classes, "held_out.source")
            unknown = [label for label in labels if classes and (label is None or label >= len(classes))]
            if unknown:
                raise UserError(f"held_out.source: expected labels of the {len(classes)} training classes, found {unknown[0]}")
            autoencoder = FrozenAutoencoder.from_pretrained(encode_config.autoencoder)
            extractor = load_extractor(config.features)
            configs = {run.name: run_config(config, run, encode_config.autoencoder) for run in config.runs}
            shipped = {
                run.name: load_unet("runs[].checkpoint", run.checkpoint) for run in config.runs if run.learning_rate_factor == 0
            }
            showcase = Showcase(config.showcase)
            for run in config.runs:
                for scheduler in run.schedulers:
                    make_scheduler(scheduler, DDPMScheduler())
        remove_earlier(config, output)

        with timed(seconds, "encode"):
            manifest = encode(encode_config)
            while_encoding = peak_memory_gb(with_workers=True)
        if manifest is None:
            raise UserError(f"worker: expected null in {config.encode} for the demo, found {encode_config.worker}")
        with timed(seconds, "measure the autoencoder"):
            psnr = reconstruction_psnr(autoencoder, held_out)["psnr"]

        pipelines: dict[str, SMDPipeline] = {}
        for run in config.runs:
            if run.name in shipped:
                trained, folder = configs[run.name], output / run.name / "model"
                classes_known = class_names(trained, manifest.classes)
                write_shipped(folder, run.checkpoint, shipped[run.name], autoencoder, classes_known, trained)
            else:
                with timed(seconds, f"train {run.name}"):
                    folder = train(configs[run.name])
            pipelines[run.name] = load_pipeline(folder)

        reference = extractor(training_pixels, description="reference")
        distance: dict = {"floor": frechet_distance(extractor(held_out, description="floor"), reference)}
        grids: dict[str, dict[int, torch.Tensor]] = {}
        # Labels of the held-out images, shuffled so that the grid shows all classes. The same for every model.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(config.seed))
        sampled_labels = [labels[index] for index in order]
        with timed(seconds, "sample"):
            for run in config.runs:
                pipeline = pipelines[run.name]
                own = pipeline.scheduler
                for scheduler in run.schedulers:
                    title = sample_title(run, scheduler)
                    pipeline.scheduler = make_scheduler(scheduler, own)
                    distance[title], grids[title] = {}, {}
                    for steps in config.steps:
                        options = SamplingOptions(steps, config.guidance_scale, seed=config.seed)
                        count, what = len(sampled_labels), f"{title}, {steps} steps"
                        known = None if num_classes(pipeline.unet) is None else sampled_labels
                        pixels = sample_pixels(pipeline, known, count, options, what)
                        eight_bit = (pixels * 255).round().to(torch.uint8)
                        distance[title][steps] = frechet_distance(extractor(eight_bit), reference)
                        shown = pixels[: GRID_COLUMNS * GRID_ROWS]
                        grids[title][steps] = make_grid(shown, nrow=GRID_COLUMNS, padding=2, pad_value=0.8)

        with timed(seconds, "sample large images"):
            rows = showcase.rows(output, config.seed)
        with timed(seconds, "spread over eta"):
            spread = {name: measure_spread(config, pipeline, manifest) for name, pipeline in pipelines.items()}

        parameters = {name: pipeline.unet.num_parameters() for name, pipeline in pipelines.items()}
        total = sum(seconds.values())
        memory = max(while_encoding, peak_memory_gb())
        weights = sum(path.stat().st_size for path in Path(encode_config.autoencoder).glob("*.safetensors")) / 2**20
        latent_elements = int(torch.tensor(manifest.latent_shape).prod())
        difference = max(parameters.values()) / min(parameters.values()) - 1
        limit, allowed = config.seconds_target, config.memory_target_gb
        report = {
            "targets": [
                target("autoencoder, held-out PSNR", ">= 30 dB", psnr, psnr >= 30),
                target("autoencoder, weights", "<= 16 MB", weights, weights <= 16),
                target("latent elements per image", "512 to 1024", latent_elements, 512 <= latent_elements <= 1024),
                target("difference in parameter count", "<= 2 %", 100 * difference, difference <= 0.02),
                target("demo, run time without installation", f"<= {limit:g} s", total, total <= limit),
                target("demo, peak memory", f"<= {allowed:g} GB", memory, memory <= allowed),
            ],
            "seconds": {**seconds, "total": total},
            "distance_name": f"Frechet distance in features of {extractor.name}",
            "distance": distance,
            "spread": spread,
            "parameters": parameters,
            "few_steps": few_steps(config, pipelines, configs, seconds, distance),
            "samples": len(sampled_labels),
            "guidance_scale": config.guidance_scale,
            "threads": torch.get_num_threads(),
        }
        curves = {run.name: training_curve(output, run) for run in config.runs}
        path = write_report(output, report, grids, curves, rows)
        print(json.dumps(report["targets"], indent=1))
        print(f"finished in {total:.0f} seconds; open {path}")
        return path


def check_inputs(config: DemoConfig) -> None:
    """Raise UserError if a run has no valid name, or a file of the repository is missing."""
    if len(config.runs) == 0:
        raise UserError("runs: expected at least one model, found none")
    names = [*(run.name for run in config.runs), *(model.name for model in config.showcase.models)]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"runs, showcase.models: expected different names, found {repeated[0]!r} {names.count(repeated[0])} times"
        )
    parts = {"encode": config.encode} | ({} if ":" in config.features else {"features": config.features})
    for index, run in enumerate(config.runs):
        check_name("runs", run.name)
        parts |= {f"runs[{index}].config": run.config}
        parts |= {f"runs[{index}].checkpoint": str(Path(run.checkpoint) / SAFETENSORS_WEIGHTS_NAME)}
    for index, model in enumerate(config.showcase.models):
        check_name("showcase.models", model.name)
        parts |= {f"showcase.models[{index}].config": model.config}
        for name, folder in {"checkpoint": model.checkpoint, "guide": model.guide}.items():
            if folder is not None:
                parts |= {f"showcase.models[{index}].{name}": str(Path(folder) / SAFETENSORS_WEIGHTS_NAME)}
    for key, part in parts.items():
        if not Path(part).exists():
            raise UserError(f"{key}: expected an existing path (run the demo from the root of the repository), found no {part}")


def check_name(key: str, name: str) -> None:
    """Raise UserError unless ``name`` is a valid name of a model and its folder."""
    if name in (LATENTS, "..") or Path(name).name != name or len(name) > LONGEST_NAME:
        raise UserError(f"{key}: expected a folder name, other than {LATENTS}, found {name!r}")


def target(name: str, wanted: str, measured: float, holds: bool) -> dict:
    return {"name": name, "target": wanted, "measured": round(measured, 3), "holds": bool(holds)}


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    print(f"== {stage}", flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def run_config(config: DemoConfig, run: DemoRunConfig, autoencoder: str) -> TrainConfig:
    """Return the training config of a run, with the number of images of the demo, starting from the shipped weights."""
    output = Path(config.output)
    base = load_config(TrainConfig, run.config)
    base = dataclasses.replace(
        base,
        shards=str(output / LATENTS),
        autoencoder=autoencoder,
        output=str(output / run.name),
        init_from=run.checkpoint,
    )
    if run.learning_rate_factor == 0:
        return base
    return dataclasses.replace(
        base,
        images_total=config.images,
        learning_rate=base.learning_rate * run.learning_rate_factor,
        warmup_images=config.images // 10,
        cooldown_images=config.images // 2,
        # Eight half-lives, so that the average forgets its start, which may be another kind of model.
        ema_halflife_images=min(base.ema_halflife_images, config.images // 8),
        log_every_images=max(config.images // 20, base.batch_size),
        sample_every_images=config.images,
        checkpoint_every_images=config.images,
    )


def few_steps(
    config: DemoConfig,
    pipelines: dict[str, SMDPipeline],
    configs: dict[str, TrainConfig],
    seconds: dict[str, float],
    distance: dict,
) -> dict:
    """Return the content of the report's first comparison.

    ``steps``; ``models``, each with the title of its grid, a caption and its distance; ``gains``, a sentence for every new
    training on how its distance compares with that of the weights it started from.
    """
    steps = min(config.steps, key=lambda n: abs(n - FEW_STEPS))
    models, at = [], {}
    for run in config.runs:
        title = sample_title(run, run.schedulers[0])
        kind = "mixture" if pipelines[run.name].unet.is_mixture else "Gaussian model"
        method = "distillation" if configs[run.name].objective.name == "distillation" else "training"
        state = f"after {config.images:,} images of {method}" if run.learning_rate_factor else "as shipped"
        at[run.name] = distance[title][steps]
        models.append({"title": title, "caption": f"{kind}, {state}", "distance": at[run.name]})
    gains = []
    for run in config.runs:
        starts = [other for other in config.runs if other.checkpoint == run.checkpoint and other.learning_rate_factor == 0]
        if run.learning_rate_factor == 1 and starts:
            before, after = at[starts[0].name], at[run.name]
            change = "lowered" if after < before else "did not lower"
            spent = f"{config.images:,} images in {seconds[f'train {run.name}']:.0f} seconds"
            gains.append(f"Training {run.name} on {spent} {change} its distance: {before:.2f} before, {after:.2f} after.")
    return {"steps": steps, "models": models, "gains": " ".join(gains)}


def sample_title(run: DemoRunConfig, scheduler: str) -> str:
    return f"{run.name}, {scheduler.removesuffix('Scheduler')}"


def measure_spread(config: DemoConfig, pipeline: SMDPipeline, manifest: Manifest) -> dict[int, float]:
    """Measure spread_over_eta on training latents."""
    batch = LatentStream(manifest, SPREAD_IMAGES, SPREAD_IMAGES, seed=config.seed).batch_at(0)
    generator = torch.Generator().manual_seed(config.seed)
    latents = FrozenAutoencoder(pipeline.vae).normalise(sample_latents(batch.moments, generator))
    process = process_of(pipeline.training_scheduler)
    labels = model_labels(batch.labels, pipeline.unet.config.num_classes)
    timesteps = diagnostic_timesteps(process.path)
    spread = spread_over_eta(pipeline.unet, process.path, process.prediction_type, latents, labels, timesteps, seed=config.seed)
    return {t: at.over_eta for t, at in spread.items()}


def training_curve(output: Path, run: DemoRunConfig) -> list[tuple[int, float]]:
    """Return (images seen, loss) of the shipped training followed by the demo's. For a new training, which may have another
    objective, return the demo's alone."""
    shipped, continued = (
        [(line["images_seen"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
        for folder in (Path(run.checkpoint), output / run.name)
    )
    if run.learning_rate_factor == 1:
        return continued
    start = shipped[-1][0] if shipped else 0
    return shipped + [(start + images, loss) for images, loss in continued]


def require_own(output: Path) -> None:
    """Raise UserError if ``output`` has files, but no settings or report of a demo. Its folder ``latents`` may be anything."""
    names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    if names and names.isdisjoint({SETTINGS, REPORT}):
        raise UserError(
            f"output: expected a new folder or that of an earlier demo, with {SETTINGS}, found {min(names)} in {output}"
        )


def remove_earlier(config: DemoConfig, output: Path) -> None:
    """Remove the models and latents of an earlier demo, and write the settings of this one."""
    for name in (LATENTS, *(run.name for run in config.runs), *(model.name for model in config.showcase.models)):
        shutil.rmtree(output / name, ignore_errors=True)
    with atomic_file(output / SETTINGS) as path:
        path.write_text(dump_config(config), encoding="utf-8")


def peak_memory_gb(with_workers: bool = False) -> float:
    """Return the peak resident memory of this process so far, or the sum of it and that of the largest finished worker.

    Only encoding has workers. Later children are small programs that libraries start, and Linux counts the memory of this
    process as theirs.
    """
    counted = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN) if with_workers else (resource.RUSAGE_SELF,)
    return sum(resource.getrusage(who).ru_maxrss for who in counted) / 2**20
