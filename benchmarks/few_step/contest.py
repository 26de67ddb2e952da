"""Trains methods, samples them, measures the samples; one small file for each, so that a killed run loses little."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from pictures import PictureConfig, PictureMeasure
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.device import pick_device
from ldm_smd.evaluation.distances import frechet_distance
from ldm_smd.models.attention import set_attention_backend
from ldm_smd.models.gaussian import LatentGaussians

from .jobs import Job
from .method import Latents, Method, Training, train
from .network import Start, load_start
from .pictures import load_latents
from .report import first_frechet

SHEET_PICTURES, SHEET_STEPS = 16, (1, 2, 4, 8)
SAMPLING_BATCH = 256
Measure = Callable[[torch.Tensor], dict]
"""From pictures, uint8 (N, 3, H, W): of each feature network by name, and of the pixels."""


@dataclass
class World:
    """Data shared by all jobs of a process, loaded once."""

    start: Start
    latents: Latents
    autoencoder: FrozenAutoencoder
    labels: torch.Tensor
    measure: Measure
    seed: int
    """Seed of the noise that samples start from."""


def load_start_and_latents(config: Any) -> tuple[Start, Latents, FrozenAutoencoder]:
    """``config``: a RivalsConfig. On its device, which is set up."""
    device = pick_device(config.device)
    set_attention_backend("sdpa")  # forward derivatives need torch's own
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    autoencoder = FrozenAutoencoder.from_pretrained(config.autoencoder).to(device)
    start, latents = load_start(config.start, device), load_latents(config.shards, autoencoder, device)
    start.latents, start.labels = latents.moments[:, 0], latents.labels
    if config.gaussian:
        start.gaussians = LatentGaussians.from_pretrained(config.gaussian, use_safetensors=True).to(device)
    return start, latents, autoencoder


def load_world(config: Any) -> World:
    """A search has other labels and other noise than the contest, and measures nothing held out: the settings that it chooses
    are not chosen by what is reported."""
    start, latents, autoencoder = load_start_and_latents(config)
    searches = config.part == "search"
    pictures = PictureMeasure(
        PictureConfig(config.images, config.held_out, config.features, resampled=config.samples), str(start.device)
    )
    labels = (pictures.labels if searches else pictures.held_out_labels)(config.samples)
    known = torch.tensor([latents.null if label is None else label for label in labels], device=start.device)
    measure = partial(distances_to_training, pictures) if searches else pictures.measure
    return World(start, latents, autoencoder, known, measure, int(searches))


def distances_to_training(pictures: PictureMeasure, pixels: torch.Tensor) -> dict:
    """The quick part of ``PictureMeasure.measure``."""
    networks = pictures.networks
    found = {each.extractor.name: frechet_distance(each.extractor(pixels), each.training) for each in networks}
    return {"features": {name: {"frechet": round(value, 5)} for name, value in found.items()}}


@torch.no_grad()
def sampled(method: Method, network: torch.nn.Module, world: World, steps: int, first: float | None = None) -> torch.Tensor:
    """Pictures, uint8 (N, 3, H, W), with the same noise for every method; with ``first``, from drafts at that sigma."""
    device, labels = world.start.device, world.labels
    side = world.start.unet.config.sample_size
    noise = torch.randn(len(labels), world.start.channels, side, side, generator=torch.Generator().manual_seed(world.seed))
    generator = torch.Generator(device).manual_seed(10 * steps + world.seed)
    parts = []
    for rows, part in zip(noise.split(SAMPLING_BATCH), labels.split(SAMPLING_BATCH)):
        x = rows.to(device) if first is None else world.start.draft(rows.to(device), first, part, generator)
        x0 = method.sample(network, x, part, steps, generator, first)
        parts.append(((world.autoencoder.decode(x0) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(parts)


def run_job(job: Job, cost: float, world: World, config: Any, folder: Path) -> dict:
    """Train, sample, measure and write; a job that fails is written too, with what was wrong."""
    began = time.perf_counter()
    result = job.as_dict() | {"cost": cost, "trained_images": int(job.images / cost)}
    rows = []
    try:
        method = job.make(world.start)
        network = method.networks["model"]
        if job.images:
            network = train(method, world.latents, Training(result["trained_images"], config.batch, job.seed))
        network.eval()
        if job.method in config.keep and job.seed == 0:
            folder.mkdir(parents=True, exist_ok=True)
            halves = {
                name: value.half().contiguous() for name, value in network.state_dict().items() if value.is_floating_point()
            }
            save_file(halves, folder / f"{job.name}.safetensors")
        result["training_seconds"] = round(time.perf_counter() - began, 1)
        result["steps"] = {}
        for count in config.steps if job.images else config.start_steps:
            pixels = sampled(method, network, world, count)
            result["steps"][str(count)] = world.measure(pixels)
            if count in SHEET_STEPS:
                rows.append(pixels[:SHEET_PICTURES])
        drafts = [] if world.start.gaussians is None else config.draft_steps
        for count in drafts:
            pixels = sampled(method, network, world, count, config.draft_sigma)
            result.setdefault("steps_from_drafts", {})[str(count)] = world.measure(pixels)
    except (FloatingPointError, ValueError, torch.OutOfMemoryError) as error:
        result["failed"] = str(error)
    result["seconds"] = round(time.perf_counter() - began, 1)
    folder.mkdir(parents=True, exist_ok=True)
    if rows:
        to_pil_image(make_grid(torch.cat(rows), nrow=SHEET_PICTURES, padding=2, pad_value=204)).save(folder / f"{job.name}.png")
    unfinished = folder / f"{job.name}.partial"
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(folder / f"{job.name}.json")
    found = {count: first_frechet(cell) for count, cell in result.get("steps", {}).items()}
    print(f"{job.name} {job.settings}: {result.get('failed', found)} in {result['seconds']:.0f} s", flush=True)
    return result


def run_jobs(jobs: Sequence[Job], costs: dict[str, float], config: Any, folder: Path) -> None:
    """Run those that have no file yet, ``config.workers`` at a time."""
    left = [job for job in jobs if not (folder / f"{job.name}.json").is_file()]
    if config.workers <= 1 or len(left) <= 1:
        world = load_world(config) if left else None
        for job in left:
            run_job(job, costs.get(job.cost_key, 1.0), world, config, folder)
        return
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    count = min(config.workers, len(left))
    for each in [*((job, costs.get(job.cost_key, 1.0)) for job in left), *[None] * count]:
        queue.put(each)
    workers = [context.Process(target=work, args=(queue, config, folder)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"workers: expected all to end well, found exit codes {[w.exitcode for w in workers]}")


def work(queue: Any, config: Any, folder: Path) -> None:
    """One process: jobs from the queue until there is None."""
    torch.set_num_threads(1)
    world = load_world(config)
    while (item := queue.get()) is not None:
        run_job(*item, world, config, folder)
