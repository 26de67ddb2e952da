"""Trains a small OpenCLIP model on emoji and their Unicode names, for benchmarks/image_prompts.py.

It runs the same code as a pretrained model, which may not be available offline. Model and loss are OpenCLIP's own. The keys of
the images are code points (data/emoji). Writes a folder in the format of OpenCLIP's hub: open_clip_config.json and
open_clip_model.safetensors.

examples:
  python benchmarks/train_clip.py output=outputs/clip
  python benchmarks/train_clip.py output=outputs/clip images_total=20000
"""

from __future__ import annotations

import json
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from omegaconf import MISSING
from safetensors.torch import save_file

from ldm_smd.cli import run_tool
from ldm_smd.data.images import ImageBatch, read_images
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.data.sources import list_images
from ldm_smd.device import pick_device
from ldm_smd.files import atomic_folder
from ldm_smd.progress import progress
from ldm_smd.schema import check

SKIN_TONES = {
    0x1F3FB: "light skin tone",
    0x1F3FC: "medium light skin tone",
    0x1F3FD: "medium skin tone",
    0x1F3FE: "medium dark skin tone",
    0x1F3FF: "dark skin tone",
}
REGIONAL_A = 0x1F1E6
UNNAMED = (0x200D, 0xFE0F, 0x20E3)
"""Code points left out of names: joiner, emoji variation selector, keycap."""
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 192, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 6, "layers": 3},
}
"""Model config in the format of OpenCLIP."""


@dataclass
class TrainClipConfig:
    """benchmarks/train_clip.py"""

    output: str = MISSING
    images: ImagesConfig = field(default_factory=lambda: ImagesConfig(source="data/emoji/train.zip", resolution=64))
    images_total: int = 100_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check(self.images_total >= self.batch_size, "images_total", f"at least {self.batch_size}", self.images_total)
        side = MODEL["vision_cfg"]["image_size"]
        check(self.images.resolution == side, "images.resolution", str(side), self.images.resolution)


def name_of(key: str) -> str:
    """Return the Unicode names of the code points in a key like People & Body/1f468-200d-1f692, or "" if Python knows none."""
    words, flag = [], ""
    for code in (int(part, 16) for part in key.rpartition("/")[2].split("-")):
        if 0 <= code - REGIONAL_A < 26:
            flag += chr(ord("a") + code - REGIONAL_A)
        elif code in SKIN_TONES:
            words.append(SKIN_TONES[code])
        elif code not in UNNAMED:
            words.append(unicodedata.name(chr(code), "").lower())
    return " ".join(words + ([f"flag of {flag}"] if flag else [])).strip()


def named_images(images: ImagesConfig) -> ImageBatch:
    """Load the images that have a name."""
    entries = [entry for entry in list_images(images) if name_of(entry.key)]
    [loaded] = read_images(entries, images, [range(len(entries))])
    return loaded


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Zoom in on each image by up to 25 % and shift it by up to a tenth of half its side; uint8 -> [0, 1]."""
    count = len(pixels)
    theta = torch.zeros(count, 2, 3, device=pixels.device)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.empty(count, device=pixels.device).uniform_(0.8, 1.0)
    theta[:, :, 2] = torch.empty(count, 2, device=pixels.device).uniform_(-0.1, 0.1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float() / 255.0, grid, padding_mode="border", align_corners=False)


def train_clip(config: TrainClipConfig) -> Path:
    """Train the model; returns its folder."""
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    images = named_images(config.images)
    pixels, names = images.pixels, list(map(name_of, images.keys))
    with atomic_folder(Path(config.output)) as folder:
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": {}}, indent=2))
        architecture = f"local-dir:{folder}"
        model = open_clip.create_model(architecture, load_weights=False, device=device)
        tokens = open_clip.get_tokenizer(architecture)(names).to(device)
        mean, std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (model.visual.image_mean, model.visual.image_std)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
        updates = config.images_total // config.batch_size
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=updates, pct_start=0.1)
        loss_of = open_clip.ClipLoss()
        bar = progress(updates * config.batch_size, 0, "clip")
        for _ in range(updates):
            chosen = torch.randperm(len(names))[: config.batch_size]
            inputs = (augment(pixels[chosen].to(device)) - mean) / std
            image, text, scale = model(inputs, tokens[chosen])
            loss = loss_of(image, text, scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=4.6)
            bar.update(config.batch_size)
            bar.set_postfix(loss=f"{loss.detach():.3f}", refresh=False)
        bar.close()
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    print(f"wrote {config.output}")
    return Path(config.output)


if __name__ == "__main__":
    sys.exit(run_tool(TrainClipConfig, train_clip, __doc__))
