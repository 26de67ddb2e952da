"""The result of a training run: a model folder with a model card."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from diffusers import ModelMixin

from ..config import config_as_dict
from ..errors import UserError
from ..files import atomic_folder, require_folder
from ..models.backbone import Backbone
from ..models.denoiser import embedding_dimensions
from ..pipelines import SMDPipeline
from .coarse_labels import class_names
from .run import Run

CARD_CLASSES = 20
CARD = "README.md"


def require_replaceable(path: Path, parts: Collection[str]) -> None:
    """Raise UserError if ``path`` is a file, or has anything but ``parts``, the files of a model, and hidden files."""
    require_folder(path)
    names = {each.name for each in path.iterdir()} if path.exists() else set()
    foreign = sorted(name for name in names - {*parts, CARD} if not name.startswith("."))
    if foreign:
        raise UserError(
            f"output: expected a new folder or one with a model alone, which is replaced, found {foreign[0]!r} in {path}"
        )


def write_model_folder(path: Path, model: ModelMixin | SMDPipeline, card: str, *parts: str) -> None:
    """Write ``model`` and its card. The card also goes into ``parts``, components that can be used by themselves."""
    with atomic_folder(path) as folder:
        model.save_pretrained(folder)
        for part in ("", *parts):
            (folder / part / CARD).write_text(card, encoding="utf-8")


def model_card(title: str, text: str, config: object) -> str:
    """Format README.md: front matter for the hub, title, text, and the settings of the run. It names no licence, which is for
    the owner of the model to choose."""
    return f"""---
library_name: diffusers
tags: [ldm_smd, latent-diffusion]
---
# {title}

{text}

```json
{json.dumps(config_as_dict(config), indent=2)}
```
"""


def build_pipeline(run: Run, unet: Backbone) -> SMDPipeline:
    """Make the pipeline for the denoiser of a run."""
    manifest = run.manifest
    names = class_names(run.config, manifest.classes)
    labels = {str(number): name for number, name in enumerate(names)} if unet.config.num_classes else None
    embedding = manifest.embedding if embedding_dimensions(unet) else None
    shift = run.config.sampling_shift or run.config.timestep_shift
    return SMDPipeline(unet, run.autoencoder.model, run.scheduler, labels, embedding=embedding, timestep_shift=shift)


def save_model_folder(run: Run, unet: Backbone, images_seen: int) -> None:
    """Write OUTPUT/model: the pipeline with the EMA weights, and its card."""
    config, manifest, known = run.config, run.manifest, class_names(run.config, run.manifest.classes)
    method = "soft mixture denoising" if unet.is_mixture else "Gaussian model"
    start = f", starting from `{config.init_from}`" if config.init_from else ""
    names = ", ".join(f"{number} {name}" for number, name in enumerate(known[:CARD_CLASSES]))
    more = ", ..." if len(known) > CARD_CLASSES else ""
    conditions = [f"Classes: {names}{more}."] if unet.config.num_classes else []
    if embedding_dimensions(unet) and manifest.embedding is not None:
        network, sha256 = manifest.embedding["network"], manifest.embedding["sha256"]
        conditions.append(f"`image_embeds` are from {network}, SHA-256 `{sha256}`.")
    given = "[0, 1]" if unet.config.num_classes else "batch_size=2"
    text = f"""\
{unet.num_parameters() / 1e6:.2f} million parameters, EMA weights after {images_seen:,} images{start}. Trained on \
{manifest.count:,} images of {len(manifest.classes)} classes at {manifest.metadata["resolution"]} pixels, latents of shape \
{"x".join(map(str, manifest.latent_shape))}. {" ".join(conditions)}

```python
from ldm_smd import SMDPipeline

images = SMDPipeline.from_pretrained("this folder")({given}, num_inference_steps=8).images
```

Evaluate it with `tools/evaluate.py`. {run.record.history()}Trained by `tools/train.py` with these settings:"""
    card = model_card(f"{type(unet).__name__}, {method}", text, config)
    write_model_folder(run.output / "model", build_pipeline(run, unet), card, "unet")
