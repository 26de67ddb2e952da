"""Measures whether samples follow an image or text prompt, by retrieval on held-out emoji, unseen by OpenCLIP and the UNet.

Samples a model trained with image_conditional=true from the embedding of each held-out image, and from the embedding of its
Unicode name; no text was used in training. In the features of another network, the held-out images are ranked by their
distance to each sample. The benchmark reports the rank of the image that was asked for, also for samples by class and for
chance.

examples:
  python benchmarks/image_prompts.py --config configs/benchmarks/image-prompts-emoji.yaml
  python benchmarks/image_prompts.py --config configs/benchmarks/image-prompts-emoji.yaml guidance_scales=[1] per_picture=1

Writes benchmarks/results/image-prompts-NAME.json, .md and .jpg.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import MISSING
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from train_clip import name_of, named_images
from yardstick import BATCH_SIZE, RESULTS, weights_sha256

from ldm_smd.cli import run_tool
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.evaluation.distances import frechet_distance
from ldm_smd.evaluation.features import load_extractor
from ldm_smd.models.denoiser import num_classes
from ldm_smd.pipelines import SMDPipeline, load_pipeline
from ldm_smd.sampling.batches import SamplingOptions, sample_pixels
from ldm_smd.sampling.inputs import load_clip
from ldm_smd.schema import check

NEAR = 10
"""A sample is near its prompt if the prompt's image is among this many nearest ones."""
SHOWN, SHOWN_EACH = 12, 3
BY_IMAGE, BY_TEXT = "a picture", "words"
PROMPTS = {BY_IMAGE: "image", BY_TEXT: "text"}
"""Name of a prompt in the table, by its name in the result file."""


@dataclass
class ImagePromptsConfig:
    """benchmarks/image_prompts.py"""

    name: str = MISSING
    """Name of the image set, used in the names of the result files."""
    model: str = MISSING
    """Model folder."""
    clip: str = MISSING
    """OpenCLIP network of the model."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """The images the model was trained on."""
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Keys are code points, as in data/emoji."""
    features: str = "checkpoints/classifier"
    per_picture: int = 4
    """Samples per held-out image."""
    steps: int = 8
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.0])
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.per_picture >= 1, "per_picture", "at least 1", self.per_picture)


def image_prompts(config: ImagePromptsConfig) -> Path:
    """Run the benchmark and return the path of its JSON file."""
    pipeline = load_pipeline(config.model)
    clip = load_clip(config.clip, {config.model: pipeline})
    extractor = load_extractor(config.features)
    asked = named_images(config.held_out)
    names = [name_of(key) for key in asked.keys]
    own = extractor(asked.pixels)
    reference = extractor(load_pixels(config.images)[0], description="reference")
    embeddings = {
        BY_IMAGE: torch.cat([clip.images(batch) for batch in asked.pixels.split(BATCH_SIZE)]),
        BY_TEXT: torch.cat([clip.texts(names[start : start + BATCH_SIZE]) for start in range(0, len(names), BATCH_SIZE)]),
    }
    rows, samples = [], {}
    conditions = [(by, scale, embeds, None) for by, embeds in embeddings.items() for scale in config.guidance_scales]
    if num_classes(pipeline.unet) is not None:
        conditions.append(("class", 1.0, None, asked.labels))
    for by, scale, embeds, labels in conditions:
        pixels = sampled(config, pipeline, embeds, labels, scale, f"{by}, {scale:g}")
        samples[by, scale] = pixels
        features = extractor(pixels)
        rows.append(
            {"by": by, "guidance_scale": scale}
            | ranks(features, own)
            | {"frechet": round(frechet_distance(features, reference), 3)}
        )
        print(rows[-1], flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/image_prompts.py", *sys.argv[1:]]),
        "model_sha256": weights_sha256(config.model),
        "clip": clip.identity(),
        "features": extractor.name,
        "held_out_pictures": len(asked.keys),
        "samples": len(asked.keys) * config.per_picture,
        "steps": config.steps,
        "floor_frechet": round(frechet_distance(own, reference), 3),
        "rows": rows,
    }
    path = RESULTS / f"image-prompts-{config.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(table(result)) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    to_pil_image(shown(config, asked.pixels, samples)).save(path.with_suffix(".jpg"), quality=90)
    return path


def sampled(
    config: ImagePromptsConfig,
    pipeline: SMDPipeline,
    embeds: torch.Tensor | None,
    labels: list[int] | None,
    scale: float,
    title: str,
) -> torch.Tensor:
    """Sample uint8 (N * per_picture, 3, H, W) from labels or embeddings (N, D); the samples for an image are consecutive."""
    if embeds is not None:
        embeds = embeds.repeat_interleave(config.per_picture, dim=0)
    if labels is not None:
        labels = [label for label in labels for _ in range(config.per_picture)]
    options = SamplingOptions(config.steps, scale, seed=config.seed, batch_size=BATCH_SIZE, image_embeds=embeds)
    pixels = sample_pixels(pipeline, labels, len(embeds if labels is None else labels), options, title)
    return (pixels * 255).round().to(torch.uint8)


def ranks(features: torch.Tensor, own: torch.Tensor) -> dict:
    """Rank the prompts' images, ``own`` (N, D), by distance to the samples (N * per_picture, D).

    Returns how often a prompt's image is the nearest to its sample, how often it is among the NEAR nearest, and its median
    rank, from 1 to N.
    """
    distances = torch.cdist(features, own)
    wanted = torch.arange(len(own)).repeat_interleave(len(features) // len(own))
    rank = 1 + (distances < distances.gather(1, wanted[:, None])).sum(dim=1)
    return {
        "nearest": round(float((rank == 1).double().mean()), 4),
        "near": round(float((rank <= NEAR).double().mean()), 4),
        "median_rank": float(rank.double().median()),
    }


def table(result: dict) -> list[str]:
    count = result["held_out_pictures"]
    lines = [
        f"{count} held-out images, {result['samples']} samples of {result['steps']} steps. Rank of the prompt's image by "
        f"distance to the sample in the features of {result['features']}:",
        "",
        f"| prompt | guidance | nearest | among the {NEAR} nearest | median rank of {count} | Frechet distance |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        prompt, guidance = PROMPTS.get(row["by"], row["by"]), f"{row['guidance_scale']:g}"
        fractions = f"{100 * row['nearest']:.1f} % | {100 * row['near']:.1f} %"
        lines.append(f"| {prompt} | {guidance} | {fractions} | {row['median_rank']:.0f} | {row['frechet']:.2f} |")
    lines.append(f"| (chance) | | {100 / count:.1f} % | {100 * NEAR / count:.1f} % | {(count + 1) / 2:.0f} | |")
    lines.append(f"| (the held-out images) | | | | | {result['floor_frechet']:.2f} |")
    return lines


def shown(config: ImagePromptsConfig, asked: torch.Tensor, samples: dict[tuple[str, float], torch.Tensor]) -> torch.Tensor:
    """Make a grid with a column for each of SHOWN images: the image, samples from its embedding, samples from its name."""
    chosen = torch.linspace(0, len(asked) - 1, SHOWN).round().long()
    scale = config.guidance_scales[min(1, len(config.guidance_scales) - 1)]
    rows = [asked[chosen]]
    for by in (BY_IMAGE, BY_TEXT):
        count = min(SHOWN_EACH, config.per_picture)
        rows += [samples[by, scale][chosen * config.per_picture + index] for index in range(count)]
    return make_grid(torch.cat(rows), nrow=SHOWN, padding=2, pad_value=205)


if __name__ == "__main__":
    sys.exit(run_tool(ImagePromptsConfig, image_prompts, __doc__))
