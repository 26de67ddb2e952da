"""The pipeline that the settings of tools/sample.py and tools/evaluate.py describe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import torch

from ..device import pick_device, pick_precision
from ..errors import UserError
from ..models.guide import load_guide
from ..models.hub import SCHEDULER, network_folder
from ..pipelines import SMDPipeline, load_pipeline
from ..schedulers import make_scheduler
from ..schedulers.conversion import process_of, read_process


class SamplerSettings(Protocol):
    """Settings of both tools."""

    scheduler: str | None
    guide: str | None
    guidance_interval: list[float] | None
    precision: str
    device: str


def configured_pipeline(model: str | Path, config: SamplerSettings) -> SMDPipeline:
    """Load ``model`` on the configured device, with the configured scheduler and guide."""
    device = pick_device(config.device)
    dtype = torch.bfloat16 if pick_precision(config.precision, device) == "bf16" else torch.float32
    pipeline = load_pipeline(model, dtype).to(device)
    if config.scheduler:
        pipeline.scheduler = make_scheduler(config.scheduler, pipeline.scheduler)
    if config.guide is not None:
        folder = network_folder(config.guide, "guide")
        guide, found = load_guide(folder, "guide", pipeline.unet), read_process(folder.parent / SCHEDULER)
        if found is not None and found[1] != process_of(pipeline.training_scheduler):
            raise UserError(
                f"guide: expected a model with the noise schedule and prediction type of {model}, found others in "
                f"{folder.parent / SCHEDULER}"
            )
        pipeline.register_modules(guide=guide.to(dtype))
    return pipeline


def guided_levels(config: SamplerSettings) -> tuple[float, float]:
    """Return the lowest and highest noise level sigma to guide at."""
    low, high = config.guidance_interval or (0.0, math.inf)
    return low, high
