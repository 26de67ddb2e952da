"""Trains methods and measures their samples. Each training writes files of its own, so that a killed run loses little. If the
result of a job is removed, it is measured again with the weights it has."""

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
from image_measure import ImageMeasure, MeasureConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.device import pick_device
from ldm_smd.evaluation.distances import frechet_distance
from ldm_smd.evaluation.reconstruction import to_uint8
from ldm_smd.models.attention import set_attention_backend
from ldm_smd.models.gaussian import LatentGaussians

from .gaussian import Gaussian
from .jobs import Job
from .latents import load_latents
from .method import Latents, Method, Training, train
from .network import Start, load_start
from .report import first_frechet

SHEET_IMAGES, SHEET_STEPS = 16, (1, 2, 4, 8)
SAMPLING_BATCH = 256
Measure = Callable[[torch.Tensor], dict]
"""Function from images, uint8 (N, 3, H, W), to measures in each feature network and in pixels."""


@dataclass
class JobContext:
    """Data shared by all jobs of a process, loaded once."""

    start: Start
    latents: Latents
    autoencoder: FrozenAutoencoder
    labels: torch.Tensor
    measure: Measure
    seed: int
    """Seed of the initial noise of samples."""


def load_start_and_latents(config: Any) -> tuple[Start, Latents, FrozenAutoencoder]:
    """Set up the device of a RivalsConfig, and load the Gaussian model, latents and autoencoder onto it."""
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


def load_context(config: Any) -> JobContext:
    """Load what jobs need.

    A search uses other labels and other noise than the contest, and no held-out images, so that settings are not chosen by the
    reported numbers.
    """
    start, latents, autoencoder = load_start_and_latents(config)
    searches = config.part == "search"
    images = load_measure(config, None if searches else autoencoder)
    labels = (images.labels if searches else images.held_out_labels)(config.samples)
    indices = torch.tensor([latents.null if label is None else label for label in labels], device=start.device)
    measure = partial(distances_to_training, images) if searches else images.measure
    return JobContext(start, latents, autoencoder, indices, measure, int(searches))


def load_measure(config: Any, autoencoder: FrozenAutoencoder | None) -> ImageMeasure:
    """Load the images of a RivalsConfig that samples are compared with."""
    about = MeasureConfig(config.images, config.held_out, config.features, resampled=config.samples)
    return ImageMeasure(about, config.device, autoencoder)


def measured_reconstructions(config: Any, path: Path) -> dict:
    """Return the measures of held-out images that were encoded and decoded, the best that any denoiser can reach with this
    autoencoder. They are kept in ``path``."""
    if not path.is_file():
        autoencoder = FrozenAutoencoder.from_pretrained(config.autoencoder).to(pick_device(config.device))
        found = load_measure(config, autoencoder).reconstructed_floor
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def distances_to_training(images: ImageMeasure, pixels: torch.Tensor) -> dict:
    """Return the Frechet distances of ``ImageMeasure.measure`` only, which are quick to compute."""
    networks = images.networks
    found = {each.extractor.name: frechet_distance(each.extractor(pixels), each.training) for each in networks}
    return {"features": {name: {"frechet": round(value, 5)} for name, value in found.items()}}


@torch.no_grad()
def sample_images(
    method: Method, network: nn.Module, context: JobContext, steps: int, first: float | None = None
) -> torch.Tensor:
    """Sample images, uint8 (N, 3, H, W), with the same noise for every method. ``first``: start from drafts at this sigma."""
    start, labels = context.start, context.labels
    side = start.unet.config.sample_size
    noise = torch.randn(len(labels), start.channels, side, side, generator=torch.Generator().manual_seed(context.seed))
    generator = torch.Generator(start.device).manual_seed(10 * steps + context.seed)
    parts = []
    for rows, part in zip(noise.split(SAMPLING_BATCH), labels.split(SAMPLING_BATCH)):
        x = rows.to(start.device) if first is None else start.draft(rows.to(start.device), first, part, generator)
        x0 = method.sample(network, x, part, steps, generator, first)
        parts.append(to_uint8(context.autoencoder.decode(x0)).cpu())
    return torch.cat(parts)


def run_job(job: Job, cost: float, context: JobContext, config: Any, folder: Path) -> dict:
    """Train, sample, measure, and write the result. That of a failed job is its error message."""
    began = time.perf_counter()
    result = job.as_dict() | {"cost": cost, "trained_images": int(job.images / cost)}
    rows = []
    try:
        torch.manual_seed(job.seed)  # of new weights
        method = job.make(context.start)
        network = method.networks["model"]
        if job.images:
            training = Training(result["trained_images"], config.batch, job.seed)
            network, result["training_seconds"] = trained(method, context.latents, training, folder / f"{job.name}.safetensors")
        network.eval()
        result["steps"] = {}
        counts = config.start_steps if isinstance(method, Gaussian) else config.steps
        for count in (count for count in counts if count >= method.evaluations):
            pixels = sample_images(method, network, context, count)
            result["steps"][str(count)] = context.measure(pixels)
            if count in SHEET_STEPS:
                rows.append(pixels[:SHEET_IMAGES])
        drafts = [] if context.start.gaussians is None else config.draft_steps
        for count in (count for count in drafts if count >= method.evaluations):
            pixels = sample_images(method, network, context, count, config.draft_sigma)
            result.setdefault("steps_from_drafts", {})[str(count)] = context.measure(pixels)
    except (FloatingPointError, ValueError, torch.OutOfMemoryError) as error:
        result["failed"] = str(error)
    result["seconds"] = round(time.perf_counter() - began, 1)
    folder.mkdir(parents=True, exist_ok=True)
    if rows:
        to_pil_image(make_grid(torch.cat(rows), nrow=SHEET_IMAGES, padding=2, pad_value=204)).save(folder / f"{job.name}.png")
    unfinished = folder / f"{job.name}.partial"
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(folder / f"{job.name}.json")
    found = {count: first_frechet(cell) for count, cell in result.get("steps", {}).items()}
    print(f"{job.name} {job.settings}: {result.get('failed', found)} in {result['seconds']:.0f} s", flush=True)
    return result


def trained(method: Method, latents: Latents, training: Training, path: Path) -> tuple[nn.Module, float]:
    """Train and save the network, or load it if ``path`` exists, so that a job can be measured again without its training.
    Returns the network and the seconds that its training took."""
    if path.is_file():
        network = method.networks["model"]
        network.load_state_dict(load_file(path))
        with safe_open(path, framework="pt") as file:
            return network, float(file.metadata()["training_seconds"])
    began = time.perf_counter()
    network = train(method, latents, training)
    seconds = round(time.perf_counter() - began, 1)
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial-weights")
    save_file(tensors, unfinished, {"training_seconds": str(seconds)})
    unfinished.rename(path)
    return network, seconds


def run_jobs(jobs: Sequence[Job], costs: dict[str, float], config: Any, folder: Path) -> None:
    """Run the jobs without a file, with ``config.workers`` processes."""
    left = [job for job in jobs if not (folder / f"{job.name}.json").is_file()]
    if config.workers <= 1 or len(left) <= 1:
        context = load_context(config) if left else None
        for job in left:
            run_job(job, costs.get(job.cost_key, 1.0), context, config, folder)
        return
    spawn = torch.multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    count = min(config.workers, len(left))
    for each in [*((job, costs.get(job.cost_key, 1.0)) for job in left), *[None] * count]:
        queue.put(each)
    workers = [spawn.Process(target=work, args=(queue, config, folder)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"workers: expected exit code 0 of all, found {[worker.exitcode for worker in workers]}")


def work(queue: Any, config: Any, folder: Path) -> None:
    """Run jobs from the queue until it yields None, in a process of its own."""
    torch.set_num_threads(1)
    context = load_context(config)
    while (item := queue.get()) is not None:
        run_job(*item, context, config, folder)
