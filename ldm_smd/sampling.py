"""tools/sample.py: pictures and a labelled grid from a model folder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from .autoencoder import spatial_factor
from .config import ImagesConfig, SampleConfig
from .data.images import decode
from .device import pick_device
from .errors import UserError
from .files import atomic_folder, makes_folder
from .models.clip import ClipEncoder
from .models.denoiser import num_classes
from .models.extended import ExtendedUNet2DModel, class_of
from .models.unet import SMDUNet2DModel
from .pipelines import SMDPipeline, load_pipeline, seeded_generators
from .progress import progress
from .schedulers import make_scheduler


@makes_folder
def sample(config: SampleConfig) -> Path:
    """Sample and decode; writes ``output`` with one PNG per picture (named by class and seed) and grid.png."""
    output = Path(config.output)
    pipeline = load_pipeline(config.model).to(pick_device(config.device))
    if config.scheduler:
        pipeline.scheduler = make_scheduler(config.scheduler, pipeline.scheduler)
    labels = choose_labels(config, pipeline)
    count = config.per_class if labels is None else len(labels)
    image = None if config.image is None else starting_picture(config.image, pipeline)
    if config.guide is not None:
        pipeline.register_modules(guide=load_guide(config.guide, pipeline).to(pipeline.device))
    embedding = None
    if config.clip is not None:
        embedding = embedding_of(load_clip(config.clip, {config.model: pipeline}), pipeline, config.like, config.text)
    low, high = config.guidance_interval or (0.0, math.inf)
    options = SamplingOptions(
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        guidance_interval=(low, high),
        seed=config.seed,
        batch_size=config.batch_size,
        height=config.height,
        width=config.width,
        image=image,
        strength=config.strength,
        image_embeds=embedding,
    )
    pixels = sample_pixels(pipeline, labels, count, options, "sample")
    pictures = VaeImageProcessor.numpy_to_pil(pixels.permute(0, 2, 3, 1).numpy())
    with atomic_folder(output) as folder:
        for index, picture in enumerate(pictures):
            name = "picture" if labels is None else f"class{labels[index]:04d}"
            picture.save(folder / f"{name}-seed{config.seed + index:08d}.png")
        rows = [pictures[start : start + config.per_class] for start in range(0, count, config.per_class)]
        names = [""] if labels is None else [class_name(pipeline, number) for number in labels[:: config.per_class]]
        labelled_grid(rows, names).save(folder / "grid.png")
    print(f"{count} pictures; wrote {output}")
    return output


@dataclass(frozen=True)
class SamplingOptions:
    """What ``SMDPipeline`` is asked for.

    Attributes:
        seed: of the first picture; picture i has seed ``seed + i`` at any batch size.
        image: where pictures start, one for all, or a tensor (N, 3, H, W) with one for each.
        image_embeds: of the picture that all are to be like, (1, D), or for each its own, (N, D).
        steps, guidance_scale, guidance_interval, height, width, strength: as of the pipeline.
    """

    steps: int
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, math.inf)
    seed: int = 0
    batch_size: int = 64
    height: int | None = None
    width: int | None = None
    image: Image.Image | torch.Tensor | None = None
    strength: float = 1.0
    image_embeds: torch.Tensor | None = None


def sample_pixels(
    pipeline: SMDPipeline, labels: list[int] | None, count: int, options: SamplingOptions, description: str
) -> torch.Tensor:
    """``count`` pictures, float (N, 3, H, W) in [0, 1]."""
    return torch.cat(list(sample_batches(pipeline, labels, range(count), options, description)))


def sample_batches(
    pipeline: SMDPipeline, labels: list[int] | None, indices: range, options: SamplingOptions, description: str
) -> Iterator[torch.Tensor]:
    """Those of ``indices``, as ``sample_pixels`` has them, a batch at a time."""
    pipeline.set_progress_bar_config(disable=True)
    with progress(len(indices), 0, description) as bar:
        for start in range(indices.start, indices.stop, options.batch_size):
            stop = min(start + options.batch_size, indices.stop)
            image, embeds = options.image, options.image_embeds
            if embeds is not None:
                embeds = embeds.expand(stop - start, -1) if len(embeds) == 1 else embeds[start:stop]
            try:
                pictures = pipeline(
                    None if labels is None else labels[start:stop],
                    batch_size=stop - start,
                    num_inference_steps=options.steps,
                    guidance_scale=options.guidance_scale,
                    guidance_interval=options.guidance_interval,
                    height=options.height,
                    width=options.width,
                    generator=seeded_generators(range(options.seed + start, options.seed + stop)),
                    output_type="pt",
                    image=image[start:stop] if isinstance(image, torch.Tensor) else image,
                    strength=options.strength,
                    image_embeds=embeds,
                )[0]
            except ValueError as error:  # an argument that this model or scheduler cannot do
                raise UserError(str(error)) from error
            yield pictures.cpu()
            bar.update(stop - start)


def load_guide(folder: str, pipeline: SMDPipeline) -> ModelMixin:
    """The UNet at a folder, for the same latents and classes."""
    kinds = {kind.__name__: kind for kind in (SMDUNet2DModel, ExtendedUNet2DModel, UNet2DModel)}
    name = class_of(folder)
    if name not in kinds:
        raise UserError(f"guide: expected the folder of a UNet (RUN/checkpoints/images-N/ema), found none at {folder}")
    guide = kinds[name].from_pretrained(folder, use_safetensors=True)
    for what, found, wanted in (
        ("channels", guide.config.in_channels, pipeline.unet.config.in_channels),
        ("classes", num_classes(guide), num_classes(pipeline.unet)),
    ):
        if found != wanted:
            raise UserError(f"guide: expected {wanted} {what}, as the model has, found {found} in {folder}")
    return guide


def load_clip(spec: str, pipelines: dict[str, SMDPipeline]) -> ClipEncoder:
    """The OpenCLIP network of the embeddings that all these models, by folder, were trained with."""
    for folder, pipeline in pipelines.items():
        if pipeline.config.embedding is None:
            raise UserError(f"clip: expected null, {folder} is not conditioned on embeddings, found {spec}")
    clip = ClipEncoder.of(spec, next(iter(pipelines.values())).device, "clip")
    for pipeline in pipelines.values():
        known = pipeline.config.embedding
        if clip.sha256 != known["sha256"]:
            raise UserError(
                f"clip: expected the network of the training, {known['network']} with SHA-256 {known['sha256'][:16]}..., found "
                f"{clip.name} with {clip.sha256[:16]}..."
            )
    return clip


def embedding_of(clip: ClipEncoder, pipeline: SMDPipeline, like: str | None, text: str | None) -> torch.Tensor:
    """Return the embedding of the words, or else of the image at ``like``, (1, D)."""
    if text:
        return clip.texts([text])
    if like is None:
        raise ValueError("like: expected a picture where there are no words, found none")
    # Brought to the size of the training pictures first, as those were.
    return clip.images(read_picture("like", like, training_side(pipeline))[None])


def training_side(pipeline: SMDPipeline) -> int:
    """Return the side of the training images, in pixels."""
    return spatial_factor(pipeline.vae) * pipeline.unet.config.sample_size


def read_picture(key: str, path: str, side: int) -> torch.Tensor:
    """uint8 (3, side, side)"""
    try:
        return decode(Path(path).read_bytes(), ImagesConfig(resolution=side))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: expected a picture, found {path}: {error}") from error


def starting_picture(path: str, pipeline: SMDPipeline) -> Image.Image:
    """The picture at ``path``, at the size of the pictures that the model makes."""
    return to_pil_image(read_picture("image", path, training_side(pipeline)))


def choose_labels(config: SampleConfig, pipeline: SMDPipeline) -> list[int] | None:
    """One class number per picture; None for unconditional sampling."""
    classes = num_classes(pipeline.unet)
    if classes is None:
        if config.classes:
            raise UserError(f"classes: expected none, {config.model} is unconditional, found {config.classes}")
        return None
    if config.classes == []:
        return None
    chosen = list(range(classes)) if config.classes is None else [pipeline.label_of(name) for name in config.classes]
    return [number for number in chosen for _ in range(config.per_class)]


def class_name(pipeline: SMDPipeline, number: int) -> str:
    return pipeline.id2label.get(number, str(number))


def labelled_grid(rows: list[list[Image.Image]], names: list[str]) -> Image.Image:
    """Rows of pictures with a name at the left of each."""
    font = ImageFont.load_default(size=13)
    width, height = rows[0][0].size
    margin = max((int(font.getlength(name)) + 12 for name in names if name), default=0)
    gap = 2
    columns = max(map(len, rows))
    grid = Image.new("RGB", (margin + columns * (width + gap), len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for row, (pictures, name) in enumerate(zip(rows, names)):
        top = row * (height + gap)
        draw.text((6, top + height // 2), name, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            grid.paste(picture, (margin + column * (width + gap), top))
    return grid
