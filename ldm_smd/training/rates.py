"""Learning rate schedules."""

from __future__ import annotations

import logging
import math

from .settings import TrainAutoencoderConfig, TrainConfig

logger = logging.getLogger(__name__)


def warmup_cooldown(config: TrainConfig, images_seen: int) -> float:
    """Linear warm-up over ``warmup_images``, constant, linear cool-down to zero over the last ``cooldown_images``."""
    warm = (images_seen + config.batch_size) / max(config.warmup_images, config.batch_size)
    cool = (config.images_total - images_seen) / max(config.cooldown_images, config.batch_size)
    return config.learning_rate * min(1.0, warm, cool)


def warn_of_long_ramps(config: TrainConfig) -> None:
    """Warn if warm-up and cool-down leave less than half of the learning rate, as after shortening ``images_total`` alone."""
    ramps = config.warmup_images + config.cooldown_images
    if ramps > 2 * config.images_total:
        logger.warning(
            "images_total: %d is short for warmup_images + cooldown_images = %d: the learning rate stays below %.2g of %g",
            config.images_total,
            ramps,
            config.images_total / ramps,
            config.learning_rate,
        )


def warmup_times_cosine(config: TrainAutoencoderConfig, images_seen: int) -> float:
    """Linear warm-up over ``warmup_images``, times a half cosine to zero over the whole training."""
    warm = min(1.0, (images_seen + config.batch_size) / max(config.warmup_images, 1))
    return config.learning_rate * warm * half_cosine(images_seen / config.images_total)


def warmup_then_cosine(peak: float, fraction: float, warmup: float) -> float:
    """Linear up to ``peak`` over the first ``warmup`` of the training, then a half cosine to zero; both in [0, 1]."""
    return peak * fraction / warmup if fraction < warmup else peak * half_cosine((fraction - warmup) / (1 - warmup))


def half_cosine(fraction: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * fraction))
