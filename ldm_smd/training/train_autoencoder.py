"""tools/train_autoencoder.py: train a small autoencoder with L1, image gradient and KL losses, and EMA weights."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from torchvision.utils import make_grid, save_image

from ..autoencoder import INPUT_RANGE, FrozenAutoencoder
from ..config import config_as_dict
from ..data.images import load_pixels
from ..data.shards import ChannelStatistics
from ..device import pick_device, pick_precision
from ..errors import UserError, renamed_settings
from ..evaluation.reconstruction import reconstruction_psnr
from ..files import claimed
from ..models.settings import AutoencoderModelConfig
from ..progress import progress
from .checkpoint import load_weights, resume, resume_optimizers, save_checkpoint
from .ema import EMA
from .metrics_log import MetricsLog, RunningMeans, crossed
from .model_folder import model_card, require_replaceable, write_model_folder
from .rates import warmup_times_cosine
from .record import RunRecord, open_record
from .settings import TrainAutoencoderConfig
from .signals import exit_stopped, stop_signals
from .trained import TrainedNetwork

REPORT_EVERY_IMAGES = 1_000
LATENT_CONSTANTS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
"""Settings of an autoencoder that latents, or the precision of their decoder, depend on."""
NOT_COMPARED = (
    *(f"images.{name}" for name in ("source", "classes", "split", "cache", "strict", "max_pixels", "allow_pipe")),
    *("held_out.", "work", "num_workers", "resume_changed"),
)
"""Prefixes of settings that are not compared: paths, whose contents are, and settings that do not change the model."""
MAY_CHANGE = ("images_total", "learning_rate", "warmup_images", "ema_halflife_images", "checkpoint_every_images", "precision")


def build(config: TrainAutoencoderConfig) -> AutoencoderKL | AutoencoderDC:
    """Build an untrained autoencoder of the configured shape."""
    shape = config_as_dict(config.model)
    if shape.pop("kind") == "AutoencoderDC":
        return build_deep_compression(config.model)
    shape.pop("decoder_layers_per_block")
    levels = len(config.model.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=config.images.resolution,
        scaling_factor=1.0,
        force_upcast=False,
        **shape,
    )


def build_deep_compression(shape: AutoencoderModelConfig) -> AutoencoderDC:
    """Build an AutoencoderDC of convolutions only. It has no shortcuts at the latents, so that its weights can normalise them,
    and upsamples by interpolation, to avoid checkerboard artefacts."""
    levels = len(shape.block_out_channels)
    return AutoencoderDC(
        latent_channels=shape.latent_channels,
        encoder_block_out_channels=tuple(shape.block_out_channels),
        decoder_block_out_channels=tuple(shape.block_out_channels),
        encoder_layers_per_block=(0, *[shape.layers_per_block] * (levels - 1)),
        decoder_layers_per_block=(0, *[shape.decoder_layers_per_block] * (levels - 1)),
        encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels,
        upsample_block_type="interpolate",
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
    )


def posterior(model: AutoencoderKL | AutoencoderDC, x: torch.Tensor, latent_noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and log-variance of the latents. A deterministic autoencoder has the standard deviation ``latent_noise``."""
    if isinstance(model, AutoencoderKL):
        distribution = model.encode(x).latent_dist
        return distribution.mean, distribution.logvar
    mean = model.encode(x).latent
    return mean, torch.full_like(mean, 2 * math.log(latent_noise))


def autoencoder_loss(
    reconstruction: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor, config: TrainAutoencoderConfig
) -> dict[str, torch.Tensor]:
    """Compute the terms of the loss and their weighted total ``loss``, each a scalar.

    l1       = mean |x' - x|
    l2       = mean (x' - x)^2
    gradient = mean |dx' - dx| over horizontal and vertical differences
    kl       = mean over latent elements of (mean^2 + var - 1 - log var) / 2
    """
    error = reconstruction - x
    l1, l2 = error.abs().mean(), error.square().mean()
    gradient = 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    total = l1 + config.l2_weight * l2 + config.gradient_weight * gradient + config.kl_weight * kl
    return {"loss": total, "l1": l1, "l2": l2, "gradient": gradient, "kl": kl}


def train_autoencoder(config: TrainAutoencoderConfig) -> Path:
    """Train, measure the PSNR on held-out images, write the model folder; returns its path.

    On SIGTERM, or Ctrl-C, it saves a checkpoint and exits with code 143, or 130.
    """
    output = Path(config.output)
    work = Path(config.work) if config.work else output.with_name(f"{output.name}.run")
    if work.absolute().is_relative_to(output.absolute()):
        raise UserError(f"work: expected a folder outside of output, which is replaced at the end, found {work}")
    with claimed(output), claimed(work, "work", inside=True), stop_signals() as stop:
        require_replaceable(output, (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
        device = pick_device("auto")
        torch.manual_seed(config.seed)
        pixels, _, _ = load_pixels(config.images, config.num_workers)
        with renamed_settings({"images": "held_out"}):
            held_out, _, _ = load_pixels(config.held_out, config.num_workers)
        hashes = {"images": hashlib.sha256(pixels.numpy().tobytes()).hexdigest()}
        record = open_record(work, hashes, config, NOT_COMPARED, MAY_CHANGE)
        model = build(config)
        if config.init_from:
            load_weights(model, Path(config.init_from), "init_from")
            initial = model.load_config(config.init_from)
            model.register_to_config(**{name: initial[name] for name in LATENT_CONSTANTS if name in initial})
        model.encoder.requires_grad_(config.train_encoder)
        model.to(device)
        if device.type == "cuda":  # convolutions prefer channels last; copying batches would take longer than a step
            model.to(memory_format=torch.channels_last)
            pixels = pixels.to(device)
        half = pick_precision(config.precision) == "bf16"
        ema = EMA(model, config.ema_halflife_images, ramp=config.init_from is None)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        trained = {"model": TrainedNetwork(model, optimizer)}

        images_seen = resume(work / "checkpoints", trained, ema)["images_seen"]
        resume_optimizers(work / "checkpoints", trained)
        record.save(work)
        log = MetricsLog(work, images_seen)
        bar = progress(config.images_total, images_seen, "autoencoder")
        means = RunningMeans()
        while images_seen < config.images_total:
            # The batch is a function of (seed, images_seen), so a resumed run sees the same batches.
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + images_seen)
            x = random_batch(pixels, config, generator).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                mean, logvar = (value.float() for value in posterior(model, x, config.latent_noise))
                noise = torch.randn(mean.shape, generator=generator).to(device)
                reconstruction = model.decode(mean + (0.5 * logvar).exp() * noise).sample.float()
            terms = autoencoder_loss(reconstruction, x, mean, logvar, config)
            model.zero_grad()
            terms["loss"].backward()
            trained["model"].descend(warmup_times_cosine(config, images_seen), gradient_clip=1.0)

            before, images_seen = images_seen, images_seen + len(x)
            ema.update(model, len(x), images_seen)
            means.add(terms)
            bar.update(len(x))
            if crossed(before, images_seen, REPORT_EVERY_IMAGES):
                values = means.read()
                if not math.isfinite(values["loss"]):
                    raise UserError(f"loss: expected a finite number, found {values['loss']} at {images_seen} images")
                log.log(images_seen, values)
                bar.set_postfix(l1=f"{values['l1']:.4f}")
            stopped = bool(stop) and images_seen < config.images_total
            if stopped or crossed(before, images_seen, config.checkpoint_every_images):
                check_weights(ema.model, images_seen)
                save_checkpoint(work / "checkpoints", trained, ema.model, {"images_seen": images_seen}, keep=1)
                if stopped:
                    bar.close()
                    log.close()
                    exit_stopped(stop[0], images_seen)
                measured = reconstruction_psnr(FrozenAutoencoder(ema.model), held_out)
                log.log(images_seen, {"held_out_psnr": measured["psnr"]})
                bar.write(f"{images_seen} images: held-out PSNR {measured['psnr']:.2f} dB")
                save_comparison(FrozenAutoencoder(ema.model), held_out[:24], work / "reconstructions.png")
        bar.close()
        log.close()

        check_weights(ema.model, images_seen)
        if config.train_encoder:
            normalise_latents(ema.model, pixels)
        frozen = FrozenAutoencoder(ema.model)
        measured = reconstruction_psnr(frozen, held_out)
        save_comparison(frozen, held_out[:24], work / "reconstructions.png")
        write_model_folder(output, ema.model, autoencoder_card(config, frozen, measured, len(pixels), record))
        print(f"held-out PSNR {measured['psnr']:.2f} dB; wrote {output}")
        return output


def check_weights(model: AutoencoderKL | AutoencoderDC, images_seen: int) -> None:
    """Raise UserError unless all weights are finite, so that a diverged training replaces no checkpoint and no model."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(
            f"learning_rate: expected one at which training is stable, found weights of NaN at {images_seen} images"
        )


def random_batch(pixels: torch.Tensor, config: TrainAutoencoderConfig, generator: torch.Generator) -> torch.Tensor:
    """Draw a random batch in [-1, 1], half of it mirrored if ``mirror`` is set."""
    index = torch.randint(len(pixels), (config.batch_size,), generator=generator)
    low, high = INPUT_RANGE
    x = pixels[index.to(pixels.device)].float() / 255.0 * (high - low) + low
    if config.mirror:
        mirrored = (torch.rand(config.batch_size, generator=generator) < 0.5).to(pixels.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x


def normalise_latents(model: AutoencoderKL | AutoencoderDC, pixels: torch.Tensor, batch_size: int = 64) -> None:
    """Make the normalised latents of ``pixels`` have mean 0 and variance 1 in every channel: through the config of an
    AutoencoderKL, or the weights of an AutoencoderDC, whose config has only one factor for all channels."""
    frozen, statistics = FrozenAutoencoder(model), ChannelStatistics()
    for batch in pixels.split(batch_size):
        statistics.add(frozen.encode_moments(batch).cpu().numpy())
    if isinstance(model, AutoencoderKL):
        constants = {"latents_mean": statistics.mean.tolist(), "latents_std": statistics.std.tolist()}
        model.register_to_config(scaling_factor=1.0, shift_factor=None, **constants)
    else:
        model.register_to_config(scaling_factor=1.0)
        mean, std = (torch.as_tensor(value).to(model.device, model.dtype) for value in (statistics.mean, statistics.std))
        fold_normalisation(model.encoder.conv_out, model.decoder.conv_in, mean, std)


@torch.no_grad()
def fold_normalisation(last: nn.Conv2d, first: nn.Conv2d, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Make ``last`` return z' = (z - mean) / std instead of z, and ``first`` take it: w * z + b = (w std) * z' + (b + w mean).
    At the border, zero padding of ``first`` then stands for the mean instead of zero."""
    assert last.bias is not None and first.bias is not None
    last.weight /= std[:, None, None, None]
    last.bias.sub_(mean).div_(std)
    first.bias += (first.weight * mean[:, None, None]).sum(dim=(1, 2, 3))
    first.weight *= std[:, None, None]


def save_comparison(autoencoder: FrozenAutoencoder, pixels: torch.Tensor, path: Path) -> None:
    """Save a grid with rows of images, each above the row of their reconstructions."""
    latents = autoencoder.normalise(autoencoder.encode_moments(pixels)[:, 0])
    decoded = (autoencoder.decode(latents).cpu() + 1) / 2
    rows = [row for pair in zip((pixels / 255.0).split(8), decoded.split(8)) for row in pair]
    save_image(make_grid(torch.cat(rows), nrow=8, padding=2, pad_value=0.7), path)


def autoencoder_card(
    config: TrainAutoencoderConfig, autoencoder: FrozenAutoencoder, measured: dict, count: int, record: RunRecord
) -> str:
    """Return the README.md of the model folder."""
    how = "by `latents_mean` and `latents_std` in `config.json`" if config.model.kind == "AutoencoderKL" else "by the weights"
    part = "" if config.train_encoder else " (decoder only)"
    start = f"{part}, starting from `{config.init_from}`" if config.init_from else ""
    text = f"""\
Trained by `tools/train_autoencoder.py` on {count:,} images of `{config.images.source}` at \
{config.images.resolution}x{config.images.resolution}, for {config.images_total:,} images{start}; \
{autoencoder.model.num_parameters() / 1e6:.2f} million parameters. {record.history()}

| measured on `{config.held_out.source}` | dB |
|---|---|
| PSNR, mean over images | {measured["psnr"]:.2f} |
| PSNR of the mean squared error | {measured["psnr_of_mean"]:.2f} |

Latents are normalised {how}, with statistics of the training images."""
    return model_card(f"A small {config.model.kind}", text, config)
