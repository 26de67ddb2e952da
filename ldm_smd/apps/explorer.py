"""The models of the page of tools/explore.py: their samples, sampling steps, and draws of eta."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..autoencoder import encoder_sha256, spatial_factor
from ..device import pick_device
from ..errors import UserError, shortened
from ..models.denoiser import is_mixture, num_classes
from ..pipelines import SMDPipeline, load_pipeline, seeded_generators
from ..sampling.grid import class_name, labelled_grid
from ..sampling.inputs import load_clip, prompt_embedding, training_side
from ..schedulers import make_scheduler
from .settings import ExploreConfig

FILMSTRIP_FRAMES = 10
"""Maximum number of frames of a filmstrip."""
DRAWS = 8
"""Number of draws of eta to show."""
OTHER_SEEDS = 2**32
"""Added to the seeds for draws at one step. Otherwise the first draw would have the numbers that sampling started from."""
THUMBNAIL = 96
"""Longer side of the images in a filmstrip, in pixels."""
DECODED = 256
"""Maximum longer side at which they are decoded, in pixels."""
OWN = "model default"
"""The scheduler of each model."""


@dataclass
class Request:
    """Settings of one request. They determine the images of a model.

    Attributes:
        label: class number, or None for no class.
        seed: seed of the first image; image i has ``seed + i``.
        scheduler: as in tools/sample.py, or OWN.
        interval: range of noise levels sigma with guidance.
        timestep_shift: see ``SMDPipeline``; None for that of each model.
        embedding: OpenCLIP embedding of an image or text prompt, (1, D), or None.
    """

    label: int | None = None
    count: int = 8
    steps: int = 8
    scheduler: str = OWN
    seed: int = 0
    guidance_scale: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)
    timestep_shift: float | None = None
    embedding: torch.Tensor | None = None

    def options(self, count: int, more: int = 0) -> dict:
        """Return the arguments of ``SMDPipeline`` for ``count`` images, shared by sampling and single predictions, which add
        ``more`` to the seeds."""
        first = self.seed + more
        return {
            "class_labels": None if self.label is None else [self.label] * count,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": self.interval,
            "generator": seeded_generators(range(first, first + count)),
            "image_embeds": None if self.embedding is None else self.embedding.expand(count, -1),
        }


@dataclass
class Frame:
    """Step ``number`` of the first image: input x_t of the network and predicted x_0, each (1, C, h, w)."""

    number: int
    timestep: torch.Tensor
    sample: torch.Tensor
    prediction: torch.Tensor


@dataclass
class ModelSamples:
    """Samples of one model: images, up to FILMSTRIP_FRAMES frames of the first one, the time taken, and the number of
    steps, of which the last frame says how many were done."""

    images: list[Image.Image]
    frames: list[Frame]
    seconds: float
    steps: int

    @property
    def summary(self) -> str:
        done = self.frames[-1].number
        stopped = f", stopped after step {done} of {self.steps}" if done < self.steps else ""
        return f"{self.seconds:.1f} s{stopped}"


class Explorer:
    """The models of a page. Raises UserError if their classes or latents differ."""

    def __init__(self, config: ExploreConfig) -> None:
        device = pick_device(config.device)
        self.pipelines = {name: load_pipeline(folder).to(device) for name, folder in config.models.items()}
        for pipeline in self.pipelines.values():
            pipeline.set_progress_bar_config(disable=True)
        shared = {"classes": class_names, "autoencoder": lambda pipe: encoder_sha256(pipe.vae), "pixels": training_side}
        for what, value_of in shared.items():
            wanted = value_of(self.first)
            for name, pipeline in self.pipelines.items():
                if (found := value_of(pipeline)) != wanted:
                    expected = f"{what} {shortened(str(wanted))}, as for the first model"
                    raise UserError(f"models.{name}: expected {expected}, found {shortened(str(found))}")
        self.own = {name: pipeline.scheduler for name, pipeline in self.pipelines.items()}
        self.stopped: set[str] = set()
        by_folder = dict(zip(config.models.values(), self.pipelines.values()))
        self.clip = None if config.clip is None else load_clip(config.clip, by_folder)

    @property
    def first(self) -> SMDPipeline:
        return next(iter(self.pipelines.values()))

    def embedding(self, image_prompt: str | None, prompt: str) -> torch.Tensor | None:
        """Embed the text ``prompt``, or else the image file ``image_prompt``, as (1, D); None for neither."""
        if self.clip is None or not (image_prompt or prompt):
            return None
        return prompt_embedding(self.clip, self.first, image_prompt, prompt)

    def sample(self, request: Request, report: Callable[[float], None], session: str = "") -> dict[str, ModelSamples]:
        """Sample from every model. ``report`` is called with the fraction done. ``session`` may be stopped."""

        def of_all(done: int, fraction: float) -> None:
            report((done + fraction) / len(self.pipelines))

        return {name: self._sample(name, request, partial(of_all, done), session) for done, name in enumerate(self.pipelines)}

    def _sample(self, name: str, request: Request, report: Callable[[float], None], session: str) -> ModelSamples:
        started, frames, pipeline = time.perf_counter(), [], self.pipelines[name]

        def keep(pipe: SMDPipeline, index: int, timestep: torch.Tensor, tensors: dict) -> dict:
            # Copied, because a view of the first image would keep the whole batch in memory.
            x_t, x_0 = (tensors[what][:1].clone() for what in ("sample", "pred_original_sample"))
            frames.append(Frame(index + 1, timestep, x_t, x_0))
            report((index + 1) / pipe.num_timesteps)
            pipe._interrupt = session in self.stopped
            return {}

        with self.scheduled(name, request, name):
            images = pipeline(
                num_inference_steps=request.steps,
                timestep_shift=request.timestep_shift,
                batch_size=request.count,
                callback_on_step_end=keep,
                callback_on_step_end_tensor_inputs=("sample", "pred_original_sample"),
                **request.options(request.count),
            ).images
            steps = pipeline.num_timesteps
        return ModelSamples(images, spaced(frames, FILMSTRIP_FRAMES), time.perf_counter() - started, steps)

    @contextmanager
    def scheduled(self, name: str, request: Request, scheduler_of: str) -> Iterator[None]:
        """Within the context, give a model the scheduler of the request, as made for the model ``scheduler_of``."""
        own, pipeline = self.own[scheduler_of], self.pipelines[name]
        pipeline.scheduler = own if request.scheduler == OWN else make_scheduler(request.scheduler, own)
        try:
            yield
        finally:
            pipeline.scheduler = self.own[name]

    def begin(self, session: str = "") -> None:
        """Forget an earlier ``stop`` of this browser session."""
        self.stopped.discard(session)

    def stop(self, session: str = "") -> None:
        """Stop the sampling of this session after the current step. Models that have not started take one step."""
        self.stopped.add(session)

    def filmstrip(self, name: str, frames: list[Frame]) -> Image.Image:
        """Draw the frames of a model in two rows: x_t and predicted x_0."""
        rows = ([frame.sample for frame in frames], [frame.prediction for frame in frames])
        return labelled_grid([thumbnails(self.pipelines[name], torch.cat(row)) for row in rows], ["x_t", "x_0"])

    def draws(self, frame: Frame, request: Request) -> Image.Image:
        """Draw a row for each model: DRAWS predictions of x_0 for one x_t, or the single prediction of a Gaussian model."""
        rows, first = [], next(iter(self.pipelines))
        for name, pipeline in self.pipelines.items():
            count = DRAWS if is_mixture(pipeline.unet) else 1
            sample = frame.sample.expand(count, -1, -1, -1)
            with self.scheduled(name, request, first):  # x_t and t are those of the first model's scheduler
                part = getattr(pipeline.scheduler, "step_part", None)
                if part is not None and getattr(pipeline, part) is None:  # another scheduler of the same process
                    pipeline.scheduler = make_scheduler("DDPMScheduler", pipeline.scheduler)
                drawn = pipeline.pred_original_sample(sample, frame.timestep, **request.options(count, OTHER_SEEDS))
            rows.append(thumbnails(pipeline, drawn))
        return labelled_grid(rows, list(self.pipelines))


def thumbnails(pipeline: SMDPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Decode normalised latents (B, C, h, w) to small images. Large latents are subsampled first, which is rough but fast: a
    filmstrip at 1024 pixels would take 15 minutes on a CPU."""
    scale = DECODED / (spatial_factor(pipeline.vae) * max(latents.shape[2:]))
    if scale < 1:
        latents = F.interpolate(latents, scale_factor=scale, mode="nearest-exact")
    images = VaeImageProcessor().postprocess(pipeline.decode_latents(latents), output_type="pil")
    for image in images:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    return images


def class_names(pipeline: SMDPipeline) -> list[str]:
    """List the names of the classes by number; [] for an unconditional model."""
    return [class_name(pipeline, number) for number in range(num_classes(pipeline.unet) or 0)]


def spaced(frames: list[Frame], most: int) -> list[Frame]:
    """Choose up to ``most`` frames, evenly spaced from the first to the last."""
    if len(frames) <= most:
        return frames
    return [frames[round(index * (len(frames) - 1) / (most - 1))] for index in range(most)]
