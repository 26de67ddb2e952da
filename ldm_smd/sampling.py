"""tools/sample.py: pictures and a labelled grid from a model folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from .autoencoder import FrozenAutoencoder
from .config import ImagesConfig, SampleConfig
from .data.images import decode
from .device import pick_device
from .errors import UserError
from .files import atomic_folder, require_unused
from .models.unet import num_classes
from .pipelines import SMDPipeline, load_pipeline, seeded_generators
from .progress import progress
from .schedulers import make_scheduler


def sample(config: SampleConfig) -> Path:
    """Sample and decode; writes ``output`` with one PNG per picture (named by class and seed) and grid.png."""
    output = Path(config.output)
    require_unused(output)
    pipeline = load_pipeline(config.model).to(pick_device(config.device))
    if config.scheduler:
        pipeline.scheduler = make_scheduler(config.scheduler, pipeline.scheduler)
    labels = choose_labels(config, pipeline)
    count = config.per_class if labels is None else len(labels)
    image = None if config.image is None else starting_picture(config, pipeline)
    options = (config.guidance_scale, config.seed, config.batch_size, "sample", image, config.strength)
    pixels = sample_pixels(pipeline, labels, count, config.steps, *options)
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


def sample_pixels(
    pipeline: SMDPipeline,
    labels: list[int] | None,
    count: int,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    description: str,
    image: Image.Image | torch.Tensor | None = None,
    strength: float = 1.0,
) -> torch.Tensor:
    """``count`` pictures, float (N, 3, H, W) in [0, 1]; picture i has seed ``seed + i`` at any batch size. ``image``: where
    they start, one for all, or a tensor (N, 3, H, W) with one for each."""
    options = (steps, guidance_scale, seed, batch_size, description, image, strength)
    return torch.cat(list(sample_batches(pipeline, labels, range(count), *options)))


def sample_batches(
    pipeline: SMDPipeline,
    labels: list[int] | None,
    indices: range,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    description: str,
    image: Image.Image | torch.Tensor | None = None,
    strength: float = 1.0,
) -> Iterator[torch.Tensor]:
    """Those of ``indices``, as ``sample_pixels`` has them, a batch at a time."""
    pipeline.set_progress_bar_config(disable=True)
    bar = progress(len(indices), 0, description)
    for start in range(indices.start, indices.stop, batch_size):
        stop = min(start + batch_size, indices.stop)
        yield pipeline(
            None if labels is None else labels[start:stop],
            batch_size=stop - start,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=seeded_generators(range(seed + start, seed + stop)),
            output_type="pt",
            image=image[start:stop] if isinstance(image, torch.Tensor) else image,
            strength=strength,
        ).images.cpu()
        bar.update(stop - start)
    bar.close()


def starting_picture(config: SampleConfig, pipeline: SMDPipeline) -> Image.Image:
    """``config.image`` at the size of the pictures that the model makes."""
    side = FrozenAutoencoder(pipeline.vae).factor * pipeline.unet.config.sample_size
    try:
        pixels = decode(Path(config.image).read_bytes(), ImagesConfig(resolution=side))
    except (OSError, ValueError) as error:
        raise UserError(f"image: expected a picture, found {config.image}: {error}") from error
    return to_pil_image(pixels)


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
