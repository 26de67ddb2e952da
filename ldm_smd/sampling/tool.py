"""tools/sample.py: sample images and a labelled grid from a model folder."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from ..errors import UserError
from ..files import atomic_file, atomic_folder, makes_folder
from ..models.denoiser import num_classes
from ..pipelines import SMDPipeline
from .batches import SamplingOptions, sample_batches
from .configured import configured_pipeline, guided_levels
from .grid import class_name, labelled_grid
from .inputs import load_clip, prompt_embedding, read_image, training_side
from .settings import SampleConfig

GRID_COLUMNS, GRID_ROWS = 16, 100


@makes_folder()
def sample(config: SampleConfig) -> Path:
    """Sample images and write them to ``config.output``: a PNG per image, named by class and seed.

    A grid of them, at most 16 of each of 100 classes, is written beside the folder, where tools/evaluate.py does not take it
    for a sample.
    """
    output = Path(config.output)
    pipeline = configured_pipeline(config.model, config)
    labels = choose_labels(config, pipeline)
    count = config.per_class if labels is None else len(labels)
    image = None
    if config.image is not None:
        image = to_pil_image(read_image("image", config.image, training_side(pipeline)))
    embedding = None
    if config.clip is not None:
        clip = load_clip(config.clip, {config.model: pipeline})
        embedding = prompt_embedding(clip, pipeline, config.image_prompt, config.prompt)
    options = SamplingOptions(
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        guidance_interval=guided_levels(config),
        seed=config.seed,
        batch_size=config.batch_size,
        height=config.height,
        width=config.width,
        image=image,
        strength=config.strength,
        image_embeds=embedding,
        timestep_shift=config.timestep_shift,
    )
    shown: list[Image.Image] = []
    with atomic_folder(output) as folder:
        batches = sample_batches(pipeline, labels, range(count), options, "sample")
        for index, pixels in enumerate(pixels for batch in batches for pixels in batch):
            sampled = to_pil_image((pixels * 255).round().to(torch.uint8))
            name = "picture" if labels is None else f"class{labels[index]:04d}"
            sampled.save(folder / f"{name}-seed{config.seed + index:08d}.png")
            if index % config.per_class < GRID_COLUMNS and index // config.per_class < GRID_ROWS:
                shown.append(sampled)
    columns = min(config.per_class, GRID_COLUMNS)
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    names = [""] if labels is None else [class_name(pipeline, number) for number in labels[:: config.per_class]]
    grid = output.with_name(f"{output.name}-grid.png")
    with atomic_file(grid) as temporary:
        labelled_grid(rows, names).save(temporary, format="PNG")
    print(f"wrote {count} images to {output}, and {'all' if len(shown) == count else len(shown)} of them as a grid to {grid}")
    return output


def choose_labels(config: SampleConfig, pipeline: SMDPipeline) -> list[int] | None:
    """Return a class number for each image; None for unconditional sampling."""
    classes = num_classes(pipeline.unet)
    if classes is None:
        if config.classes:
            raise UserError(f"classes: expected none, since {config.model} is unconditional, found {config.classes}")
        return None
    if config.classes == []:
        return None
    chosen = list(range(classes)) if config.classes is None else [pipeline.label_of(name) for name in config.classes]
    return [number for number in chosen for _ in range(config.per_class)]
