"""tools/train_moments.py: train MomentHeads, the variance and skew of the prediction error of a frozen Gaussian UNet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..autoencoder import FrozenAutoencoder, sample_latents
from ..data.shards import Manifest
from ..data.stream import LatentBatch, LatentStream, latent_loader
from ..device import pick_device
from ..errors import UserError
from ..evaluation.diagnostics import DIAGNOSTIC_TIMESTEPS
from ..files import makes_folder
from ..models.denoiser import embedding_dimensions, is_mixture, model_labels, num_classes
from ..models.moments import MomentHeads
from ..pipelines import SMDPipeline, load_pipeline
from ..progress import progress
from ..schedulers import make_scheduler
from ..schedulers.conversion import process_of
from .ema import EMA
from .fit_gaussian import check_classes
from .model_folder import model_card, write_model_folder
from .rates import warmup_then_cosine
from .settings import TrainMomentsConfig
from .trained import TrainedNetwork, adamw

REPORT_EVERY_BATCHES = 50
WARMUP = 0.05
CALIBRATION_PICTURES = 512


@makes_folder()
def train_moments(config: TrainMomentsConfig) -> Path:
    """Train the heads and write the model folder; returns its path."""
    output = Path(config.output)
    device = pick_device(config.device)
    pipeline = load_pipeline(config.model).to(device)
    if is_mixture(pipeline.unet):
        raise UserError(f"model: expected a Gaussian UNet, found a mixture in {config.model}")
    pipeline.unet.eval().requires_grad_(False)
    manifest = Manifest.load(config.shards, config.shards_cache)
    autoencoder = FrozenAutoencoder(pipeline.vae, config.model)
    manifest.check_autoencoder(autoencoder)
    check_classes(pipeline, manifest)

    torch.manual_seed(config.seed)
    try:
        heads = MomentHeads.for_unet(pipeline.unet).to(device)
    except ValueError as wrong:
        raise UserError(f"model: {wrong}") from wrong
    ema = EMA(heads, config.ema_halflife_images)
    trained = TrainedNetwork(heads, adamw(heads, config.learning_rate, weight_decay=0.01))
    errors = PredictionErrors(pipeline, autoencoder, config.label_dropout)
    conditional = embedding_dimensions(pipeline.unet) is not None
    stream = LatentStream(manifest, config.batch_size, config.images_total, seed=config.seed, embeddings=conditional)
    bar, images_seen = progress(config.images_total, 0, output.name), 0
    for index, batch in enumerate(latent_loader(stream, num_workers=0)):
        variance, third, error = errors(heads, batch.to(device))
        loss = (variance - error**2).square().mean() + config.third_moment_weight * (third - error**3).square().mean()
        heads.zero_grad()
        loss.backward()
        learning_rate = warmup_then_cosine(config.learning_rate, images_seen / config.images_total, WARMUP)
        trained.descend(learning_rate, gradient_clip=1.0)
        images_seen += config.batch_size
        ema.update(heads, config.batch_size, images_seen)
        bar.update(config.batch_size)
        if index % REPORT_EVERY_BATCHES == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    bar.close()

    calibrating = LatentStream(manifest, CALIBRATION_PICTURES, CALIBRATION_PICTURES, seed=config.seed, embeddings=conditional)
    few = calibrating.batch_at(0).to(device)
    ratios = calibration(PredictionErrors(pipeline, autoencoder, label_dropout=0.0), ema.model, few, config.batch_size)
    measured = ", ".join(f"{ratio:.2f} at t = {t}" for t, ratio in ratios.items())
    pipeline.register_modules(moments=ema.model, scheduler=make_scheduler("GMSScheduler", pipeline.scheduler))
    text = f"""\
{heads.num_parameters() / 1e6:.2f} million parameters on top of the unchanged UNet of `{config.model}`; EMA weights after \
{images_seen:,} images. Ratio of predicted variance to squared error: {measured}.

Trained by `tools/train_moments.py` with these settings:"""
    card = model_card("Variance and skew of the step, for GMSScheduler", text, config)
    write_model_folder(output, pipeline, card, "moments")
    print(f"ratio of predicted variance to squared error: {measured}")
    return output


@dataclass
class PredictionErrors:
    """Computes, for a batch, the error of the network's v and the moments of it that the heads predict."""

    pipeline: SMDPipeline
    autoencoder: FrozenAutoencoder
    label_dropout: float

    def __call__(
        self, heads: MomentHeads, batch: LatentBatch, t: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (variance, third moment, error), each (B, C, H, W), at timesteps (B,), random by default.

        v = (a_t x_t - x_0) / s_t, so the error of v is that of x_0 over -s_t for any prediction type. If n^2 = a_t^2 + s_t^2
        is not 1, v is that of x_t / n, with s_t / n in place of s_t.
        """
        unet, process = self.pipeline.unet, process_of(self.pipeline.training_scheduler)
        x0 = self.autoencoder.normalise(sample_latents(batch.moments))
        path = process.path.to(x0.device)
        if t is None:
            t = path.random_t(len(x0), device=x0.device)
        classes = num_classes(unet)
        labels = model_labels(batch.labels, classes)
        if labels is not None and classes is not None:
            labels = torch.where(self.dropped(x0), classes, labels)
        embeds = batch.embeddings
        if embeds is not None:
            embeds = embeds.float() * ~self.dropped(x0)[:, None]
        x_t = path.noise(x0, torch.randn_like(x0), t)
        prediction, variance, third = heads.predict(unet, x_t, t, labels, embeds).chunk(3, dim=1)
        a, s = path.signal_and_noise(t, x0)
        error = (path.to_x0(prediction, x_t, t, process.prediction_type) - x0) / (s / torch.hypot(a, s))
        return variance, third, error

    def dropped(self, x0: torch.Tensor) -> torch.Tensor:
        """Draw the images, (B,), that are trained without a condition."""
        return torch.rand(len(x0), device=x0.device) < self.label_dropout


@torch.no_grad()
def calibration(errors: PredictionErrors, heads: MomentHeads, batch: LatentBatch, size: int = 64) -> dict[int, float]:
    """Return t -> ratio of the mean predicted variance to the mean squared error; 1 if calibrated. Computed ``size`` latents at
    a time."""
    count = len(batch.labels)
    ratios = {}
    for t in DIAGNOSTIC_TIMESTEPS:
        if t < errors.pipeline.training_scheduler.config.num_train_timesteps:
            predicted = measured = 0.0
            for start in range(0, count, size):
                part = batch.rows(start, min(start + size, count))
                variance, _, error = errors(heads, part, torch.full((len(part.labels),), t, device=part.moments.device))
                predicted, measured = predicted + float(variance.sum()), measured + float(error.square().sum())
            ratios[t] = predicted / measured
    return ratios
