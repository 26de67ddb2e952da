"""Training of the denoiser: one loop, in images, on any number of processes."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from einops import rearrange
from torchvision.utils import make_grid, save_image

from ..autoencoder import FrozenAutoencoder, sample_latents
from ..config import config_as_dict, dump_config
from ..data.shards import Manifest
from ..data.stream import LatentBatch, LatentStream, latent_loader
from ..device import pick_precision
from ..diffusion.objectives import objective, timestep_weight
from ..diffusion.process import DiffusionProcess
from ..diffusion.settings import DiffusionConfig
from ..errors import UserError
from ..evaluation.diagnostics import COLLAPSED, has_collapsed, spread_over_eta
from ..files import atomic_folder, claimed_by_first
from ..models.attention import set_attention_backend
from ..models.denoiser import embedding_dimensions, known_labels
from ..models.extended import ExtendedUNet2DModel, class_of
from ..models.fit import fit_posterior_noise
from ..models.unet import SMDUNet2DModel
from ..pipelines import SMDPipeline, seeded_generators
from ..progress import progress
from ..schema import check
from .average import resume_averages, save_snapshot
from .card import card
from .checkpoint import checkpoints, load_weights, newest_images, optimizer_tensors, resume, resume_optimizer, save_checkpoint
from .draws import Draws, draw, step_seed
from .ema import EMA, PowerEMA
from .fit_gaussian import LATENTS_PER_COMPONENT, fitting_latents
from .metrics_log import MetricsLog, RunningMeans, crossed
from .record import RunRecord, compared_settings, open_record
from .settings import TrainConfig
from .sharding import gathered, is_divided, set_sharded_precision, whole
from .signals import EXIT_CODE, sigterm_flag

logger = logging.getLogger(__name__)

SPREAD_TIMESTEPS = (99, 249, 499, 749, 999)
PREVIEW_PICTURES = 40
CARD_CLASSES = 20
COSINE_MAX_BETA = 0.75
NOT_COMPARED = (
    "shards",
    "autoencoder",
    "output",
    "accumulate",
    "gradient_checkpointing",
    "compile",
    "attention",
    "num_workers",
    "resume_changed",
)
"""Settings that are paths, whose contents are compared, or say how and not what is computed."""
MAY_CHANGE = (
    "images_total",
    "learning_rate",
    "warmup_images",
    "cooldown_images",
    "weight_decay",
    "gradient_clip",
    "ema_halflife_images",
    "precision",
    "log_every_images",
    "sample_every_images",
    "sample_steps",
    "checkpoint_every_images",
    "keep_checkpoints",
)
"""Settings that a resumed run may have others of, which is logged and told in the model card."""
STOP_EVERY_STEPS = 10
"""Ranks vote on stopping every this many steps."""


def train(config: TrainConfig) -> Path:
    """Train from latent shards; returns the model folder. Continues from the newest checkpoint of ``config.output``.

    On CPUs a run that goes on ends bit by bit as one that was never stopped, on the same machine with the same number of
    threads and the same torch. A SIGTERM ends it with a checkpoint and exit code 143.
    """
    # On CPUs several processes are a group only where one says that there is no GPU to look for.
    no_gpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision=pick_precision(config.precision), cpu=no_gpu)
    output = Path(config.output)
    with claimed_by_first(output, inside=True), sigterm_flag() as stop:
        stopped_at = run(config, accelerator, stop)
    accelerator.end_training()
    if stopped_at is not None:
        if accelerator.is_main_process:
            print(f"stopped by SIGTERM after {stopped_at} images; run it again to go on", file=sys.stderr)
        sys.exit(EXIT_CODE)
    return output / "model"


def run(config: TrainConfig, accelerator: Accelerator, stop: threading.Event) -> int | None:
    """The training itself, to its end, or to the images returned where ``stop`` is set on any process."""
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    set_attention_backend(config.attention)
    manifest = Manifest.load(config.shards)
    autoencoder = FrozenAutoencoder.from_pretrained(config.autoencoder).to(device)
    manifest.check_autoencoder(autoencoder)
    scheduler = build_scheduler(config.diffusion)
    output, main = Path(config.output), accelerator.is_main_process
    record = open_record(
        output,
        {"shards": manifest.sha256} | compared_settings(config, NOT_COMPARED),
        newest_images(output / "checkpoints"),
        MAY_CHANGE,
        config.resume_changed,
    )

    torch.manual_seed(config.seed)
    model = build_model(config, manifest)
    if model.mixture is not None and not model.mixture.noise.is_fitted and not checkpoints(output / "checkpoints"):
        fit_noise(model, config, manifest, autoencoder, scheduler)
    model.to(device)
    ema = EMA(model, config.ema_halflife_images, ramp=config.init_from is None)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
    )
    averages = [PowerEMA(model, width) for width in config.ema_widths]
    state = resume(output / "checkpoints", model, ema)
    images_seen = state["images_seen"]
    if images_seen:
        resume_averages(output, images_seen, averages)
    stream = LatentStream(
        manifest,
        config.batch_size,
        config.images_total,
        images_seen,
        config.seed,
        config.mirror,
        rank,
        world,
        embeddings=config.image_conditional,
    )
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    set_sharded_precision(accelerator)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    resume_optimizer(output / "checkpoints", model, optimizer.optimizer)
    if is_divided(model):
        for each in (ema, *averages):
            each.divide_as(model)
    step = TrainingStep(
        config,
        accelerator,
        cast(torch.nn.Module, torch.compile(prepared)) if config.compile else prepared,
        DiffusionProcess(scheduler.alphas_cumprod).to(device),
        autoencoder,
    )

    log = MetricsLog(output, images_seen) if main else None
    if main:
        record.save(output)
        (output / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    bar = progress(config.images_total, images_seen, output.name, disable=not main)
    means = RunningMeans(("loss", "gradient_norm"), device, state.get("means"))
    stopping = False
    for batch in latent_loader(stream, config.num_workers):
        learning_rate = learning_rate_at(config, images_seen)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad(set_to_none=True)
        loss = step(batch.to(device), images_seen)
        norm = whole(accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip))
        optimizer.step()

        before = images_seen
        images_seen += config.batch_size
        for each in (ema, *averages):
            each.update(model, config.batch_size, images_seen)
        means.add(loss, norm)
        bar.update(config.batch_size)
        last = images_seen >= config.images_total
        stopping = not last and stop_everywhere(accelerator, stop, images_seen // config.batch_size)
        sample_now = last or crossed(before, images_seen, config.sample_every_images)
        save_now = last or stopping or crossed(before, images_seen, config.checkpoint_every_images)
        # Sums stay on the device between reports: reading them is the only time the host waits for it.
        if last or crossed(before, images_seen, config.log_every_images):
            values = means.read(accelerator)
            check_finite(values["loss"], images_seen, stream.keys_at(before))
            if log is not None:
                log.log(
                    images_seen,
                    values | {"learning_rate": learning_rate, "images_per_second": bar.format_dict["rate"] or 0.0},
                )
                bar.set_postfix(loss=f"{values['loss']:.4f}")
            means.reset()
        averaged = ema.gather() if sample_now or save_now else None
        if log is not None and averaged is not None and sample_now:
            preview(config, averaged, autoencoder, scheduler, manifest, stream, images_seen, log)
        if averaged is not None and save_now:
            state = {"images_seen": images_seen, "means": means.state(accelerator)}
            check_finite(state["means"]["loss"], images_seen, stream.keys_at(before))
            for each in averages:
                snapshot = each.gather()
                if main:
                    save_snapshot(output, images_seen, each.sigma_rel, snapshot)
            tensors = optimizer_tensors(model, optimizer.optimizer)
            weights = gathered(model, like=averaged)
            if main:
                save_checkpoint(output / "checkpoints", weights, averaged, tensors, state, config.keep_checkpoints)
            accelerator.wait_for_everyone()
        if stopping:
            break
    bar.close()
    if log is not None:
        log.close()
    if stopping:
        return images_seen
    averaged = ema.gather()
    if main:
        save_model_folder(config, averaged, autoencoder, scheduler, manifest, images_seen, record)
    return None


def stop_everywhere(accelerator: Accelerator, stop: threading.Event, step: int) -> bool:
    """Whether any process is to stop: the same answer on all, though a signal reaches each at its own time."""
    if accelerator.num_processes == 1:
        return stop.is_set()
    if step % STOP_EVERY_STEPS:
        return False
    return accelerator.reduce(torch.tensor(float(stop.is_set()), device=accelerator.device), "sum").item() > 0


def check_finite(loss: float, images_seen: int, keys: list[str]) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"loss: expected a finite number, found {loss} at {images_seen} images; last batch: {', '.join(keys[:8])}. "
            "The last good checkpoint is kept; lower learning_rate or gradient_clip"
        )


@dataclass
class TrainingStep:
    """From a batch to its loss and gradients: draw latents, noise and eta; predict; compare."""

    config: TrainConfig
    accelerator: Accelerator
    model: torch.nn.Module
    process: DiffusionProcess
    autoencoder: FrozenAutoencoder

    def __post_init__(self) -> None:
        o = self.config.objective
        self.objective = objective(o.name, o.beta, o.diversity, o.patches, o.bandwidth)
        self.exponent = o.beta if o.name == "energy" else 2.0
        self.null_class = self.accelerator.unwrap_model(self.model).config.num_classes
        self.generator = torch.Generator(self.accelerator.device)

    def __call__(self, batch: LatentBatch, images_seen: int) -> torch.Tensor:
        """Add the gradients of this process's part of a batch, in ``accumulate`` parts; returns its loss.

        The random numbers are a function of (seed, images_seen): a resumed run draws what it would have drawn, and so do
        processes of another number.
        """
        size, rank = len(batch.labels), self.accelerator.process_index
        objective_draws = self.config.objective.draws if self.config.model.z_channels > 0 else 0
        self.generator.manual_seed(step_seed(self.config.seed, images_seen))
        shape = (size * self.accelerator.num_processes, *batch.moments.shape[2:])
        draws = draw(self.generator, shape, objective_draws, self.process.num_timesteps, self.config.label_dropout).rows(
            rank * size, (rank + 1) * size
        )
        torch.manual_seed(step_seed(self.config.seed, images_seen, rank))  # for dropout inside the network
        part = -(-size // self.config.accumulate)
        total = torch.zeros((), device=batch.labels.device)
        for start in range(0, size, part):
            rows = (start, min(start + part, size))
            # Processes exchange gradients once, with the last part.
            with self.accelerator.no_sync(self.model) if rows[1] < size else nullcontext():
                loss = self.losses(batch.rows(*rows), draws.rows(*rows)).sum() / size
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def losses(self, batch: LatentBatch, draws: Draws) -> torch.Tensor:
        """Return the loss of each image, (b,)."""
        x0 = self.autoencoder.normalise(sample_latents(batch.moments, noise=draws.posterior))
        t, eta = draws.t, rearrange(draws.eta, "b m ... -> (b m) ...") if draws.eta.shape[1] else None
        prediction_type = self.config.diffusion.prediction_type
        x_t = self.process.noise(x0, draws.eps, t)
        target = self.process.target(x0, draws.eps, t, prediction_type)
        labels = known_labels(batch.labels, self.null_class)
        if labels is not None:
            labels = torch.where(draws.dropped, self.null_class, labels)
        inputs = {}
        if batch.embeddings is not None:
            inputs["image_embeds"] = batch.embeddings.float() * ~draws.unlike[:, None]
        with self.accelerator.autocast():  # which a prepared model has by itself, but not under FSDP
            prediction = self.model(x_t, t, labels, eta, return_dict=False, **inputs)[0].float()
        losses = self.objective(rearrange(prediction, "(b m) ... -> b m ...", b=len(x0)), target)
        return losses * timestep_weight(self.config.objective.weighting, self.exponent, self.process, t, prediction_type)


def build_model(config: TrainConfig, manifest: Manifest) -> SMDUNet2DModel | ExtendedUNet2DModel:
    """The configured UNet for the latents and classes of the shards, untrained or with the weights of ``init_from``; the
    extension of ``init_from`` to a mixture where that is a UNet2DModel of diffusers."""
    if config.init_from and class_of(config.init_from) in ("UNet2DModel", "ExtendedUNet2DModel"):
        return extended_model(config, manifest)
    channels, height, width = manifest.latent_shape
    classes = len(manifest.classes) if config.class_conditional else 0
    shape = config_as_dict(config.model)
    shape["noise_modes"] = noise_modes(config, manifest)
    model = SMDUNet2DModel(
        sample_size=max(height, width),
        in_channels=channels,
        out_channels=channels,
        num_classes=classes or None,
        noise_timesteps=config.diffusion.num_train_timesteps,
        embedding_dimensions=manifest.embedding_dimensions if config.image_conditional else None,
        **{name: tuple(value) if isinstance(value, list) else value for name, value in shape.items()},
    )
    if config.init_from:
        kept = None if model.mixture is None else model.mixture.noise
        load_weights(model, Path(config.init_from), "init_from", new=(model.mixture, model.image_embedding), kept=kept)
    return model


def noise_modes(config: TrainConfig, manifest: Manifest) -> int:
    """Modes of the mixture's noise: fewer than configured where there are few pictures."""
    return max(1, min(config.model.noise_modes, manifest.count // LATENTS_PER_COMPONENT))


def fit_noise(
    model: SMDUNet2DModel | ExtendedUNet2DModel,
    config: TrainConfig,
    manifest: Manifest,
    autoencoder: FrozenAutoencoder,
    scheduler: DDPMScheduler,
) -> None:
    """Colour the mixture's noise as the first latents of the stream, the same on every process."""
    latents, labels = fitting_latents(manifest, autoencoder, config.seed, config.mirror)
    assert model.mixture is not None
    path = DiffusionProcess(scheduler.alphas_cumprod)
    fit_posterior_noise(model.mixture.noise, latents, labels, path, config.diffusion.prediction_type)


def extended_model(config: TrainConfig, manifest: Manifest) -> ExtendedUNet2DModel:
    """``init_from``, extended; its own blocks, and the sizes of the mixture from ``config.model``."""
    shape = config.model
    check(not config.image_conditional, "image_conditional", "false for a UNet2DModel of diffusers", True)
    assert config.init_from is not None
    if class_of(config.init_from) == "ExtendedUNet2DModel":
        model = ExtendedUNet2DModel.from_pretrained(config.init_from, use_safetensors=True)
    elif shape.z_channels == 0 or shape.placement != "up":
        raise UserError(
            "init_from: expected a mixture, model.z_channels > 0 and model.placement=up, to extend a diffusers "
            f"UNet2DModel to, found {shape.z_channels} and {shape.placement}"
        )
    else:
        model = ExtendedUNet2DModel.from_unet(
            config.init_from,
            z_channels=shape.z_channels,
            identifier_channels=shape.identifier_channels,
            hypernetwork_width=shape.hypernetwork_width,
            noise_rank=shape.noise_rank,
            noise_modes=noise_modes(config, manifest),
            noise_timesteps=config.diffusion.num_train_timesteps,
        )
    channels, classes = manifest.latent_shape[0], len(manifest.classes)
    check(model.config.in_channels == channels, "init_from", f"{channels} channels, as the latents", model.config.in_channels)
    if model.config.num_classes is not None:
        what = f"{classes + 1} class embeddings, {classes} classes and no label"
        check(model.config.num_classes == classes, "init_from", what, model.config.num_classes + 1)
    return model


def build_scheduler(config: DiffusionConfig) -> DDPMScheduler:
    """Ancestral sampling with the exact posterior variance, which for a mixture is exact sampling of the mixture.

    "trailing" spacing starts few-step sampling at the noisiest timestep (arXiv 2305.08891).
    """
    if config.beta_schedule == "cosine":
        betas = betas_for_alpha_bar(config.num_train_timesteps, max_beta=COSINE_MAX_BETA)
        noise = {"trained_betas": betas.tolist()}
    else:
        noise = {"beta_schedule": config.beta_schedule}
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        **noise,
        prediction_type=config.prediction_type,
        variance_type="fixed_small",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def learning_rate_at(config: TrainConfig, images_seen: int) -> float:
    """Linear warm-up over ``warmup_images``, constant, linear cool-down to zero over the last ``cooldown_images``."""
    warm = (images_seen + config.batch_size) / max(config.warmup_images, config.batch_size)
    cool = (config.images_total - images_seen) / max(config.cooldown_images, config.batch_size)
    return config.learning_rate * min(1.0, warm, cool)


def preview(
    config: TrainConfig,
    unet: SMDUNet2DModel | ExtendedUNet2DModel,
    autoencoder: FrozenAutoencoder,
    scheduler: DDPMScheduler,
    manifest: Manifest,
    stream: LatentStream,
    images_seen: int,
    log: MetricsLog,
) -> None:
    """A grid of samples from fixed seeds, and the spread over eta by timestep, both from the EMA weights."""
    home = unet.device  # the CPU, where the training weights are divided over the processes
    pipeline = build_pipeline(unet.to(autoencoder.device), autoencoder, scheduler, manifest)
    pipeline.set_progress_bar_config(disable=True)
    classes = unet.config.num_classes
    labels = None if classes is None else [index % classes for index in range(PREVIEW_PICTURES)]
    images = pipeline(
        labels,
        PREVIEW_PICTURES,
        config.sample_steps,
        generator=seeded_generators(range(PREVIEW_PICTURES)),
        output_type="pt",
    )[0]
    grid = make_grid(images.cpu(), nrow=10, padding=2, pad_value=0.7)
    folder = log.path.parent / "samples"
    folder.mkdir(exist_ok=True)
    save_image(grid, folder / f"{images_seen:012d}.png")
    log.image(images_seen, "samples", grid)
    if unet.is_mixture:
        batch = stream.batch_at(0).to(unet.device)
        latents = autoencoder.normalise(batch.moments[:16, 0].float())
        known = known_labels(batch.labels[:16], classes)
        process = DiffusionProcess(scheduler.alphas_cumprod).to(unet.device)
        prediction_type = config.diffusion.prediction_type
        steps = [t for t in SPREAD_TIMESTEPS if t < process.num_timesteps]
        spread = spread_over_eta(unet, process, prediction_type, latents, known, steps)
        over_eta = {f"spread/{t}": at.over_eta for t, at in spread.items()}
        log.log(images_seen, over_eta | {f"spread_share/{t}": at.ratio for t, at in spread.items()})
        if has_collapsed(spread):
            logger.warning(
                "the mixture has collapsed: at no timestep do its draws differ by %.0f %% of the posterior's spread%s",
                100 * COLLAPSED,
                "; the mse objective does that, use energy" if config.objective.name == "mse" else "",
            )
    unet.to(home)


def build_pipeline(
    unet: SMDUNet2DModel | ExtendedUNet2DModel, autoencoder: FrozenAutoencoder, scheduler: DDPMScheduler, manifest: Manifest
) -> SMDPipeline:
    labels = {str(number): name for number, name in enumerate(manifest.classes)} if unet.config.num_classes else None
    embedding = manifest.embedding if embedding_dimensions(unet) else None
    return SMDPipeline(unet, autoencoder.model, scheduler, labels, embedding=embedding)


def save_model_folder(
    config: TrainConfig,
    unet: SMDUNet2DModel | ExtendedUNet2DModel,
    autoencoder: FrozenAutoencoder,
    scheduler: DDPMScheduler,
    manifest: Manifest,
    images_seen: int,
    record: RunRecord,
) -> None:
    """What users keep: OUTPUT/model, the pipeline with the EMA weights, and its card."""
    with atomic_folder(Path(config.output) / "model") as folder:
        build_pipeline(unet, autoencoder, scheduler, manifest).save_pretrained(folder)
        card = model_card(config, unet, manifest, images_seen, record)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "unet" / "README.md").write_text(card, encoding="utf-8")


def model_card(
    config: TrainConfig,
    unet: SMDUNet2DModel | ExtendedUNet2DModel,
    manifest: Manifest,
    images_seen: int,
    record: RunRecord,
) -> str:
    """README.md of a model folder: what it is and the settings that made it."""
    kind = "soft mixture denoising" if unet.is_mixture else "Gaussian (no mixture part)"
    start = f", starting from `{config.init_from}`" if config.init_from else ""
    names = ", ".join(f"{number} {name}" for number, name in enumerate(manifest.classes[:CARD_CLASSES]))
    more = ", ..." if len(manifest.classes) > CARD_CLASSES else ""
    conditions = [f"Classes: {names}{more}."] if unet.config.num_classes else []
    if embedding_dimensions(unet) and manifest.embedding is not None:
        conditions.append(f"`image_embeds`: of {manifest.embedding['network']}, SHA-256 `{manifest.embedding['sha256']}`.")
    given = "[0, 1]" if unet.config.num_classes else "batch_size=2"
    text = f"""\
{unet.num_parameters() / 1e6:.2f} million parameters, EMA weights after {images_seen:,} images{start}; \
{manifest.count:,} pictures, {len(manifest.classes)} classes, {manifest.metadata["resolution"]} pixels, latents \
{"x".join(map(str, manifest.latent_shape))}. {" ".join(conditions)}

```python
from ldm_smd.pipelines import SMDPipeline

pictures = SMDPipeline.from_pretrained("this folder")({given}, num_inference_steps=8).images
```

How good the pictures are, `tools/evaluate.py` says. {record.history()}Made by `tools/train.py` with these settings:"""
    return card(f"{type(unet).__name__}, {kind}", text, config)
