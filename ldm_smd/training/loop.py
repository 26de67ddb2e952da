"""tools/train.py: the training loop of the denoiser, on any number of processes. Counts are in images."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from ..config import dump_config
from ..data.stream import latent_loader
from ..device import pick_precision
from ..errors import UserError
from ..files import claimed_by_first
from ..models.attention import set_attention_backend
from ..progress import progress
from .average import resume_averages, save_snapshot
from .checkpoint import resume, resume_optimizers, save_checkpoint
from .ema import EMA, PowerEMA
from .learners import learner_for
from .metrics_log import DataWaits, MetricsLog, RunningMeans, crossed
from .model_folder import save_model_folder
from .preview import preview
from .rates import warmup_cooldown, warn_of_long_ramps
from .record import RECORD
from .run import Run
from .settings import TrainConfig
from .share import share_checkpoint
from .signals import exit_stopped, stop_signals
from .watch import CriticWatch

STOP_EVERY_STEPS = 10
"""Processes agree on whether to stop every this many steps."""
LOG_EVERY_STEPS = 32
"""Default interval of the log."""


def train(config: TrainConfig) -> Path:
    """Train on latent shards; returns the model folder. Resumes from the newest checkpoint in ``config.output``.

    On CPUs, a resumed run gives bit-identical results to an uninterrupted one, on the same machine with the same number of
    threads and the same torch version. On SIGTERM, or Ctrl-C, it saves a checkpoint and exits with code 143, or 130.
    """
    # Without a GPU, accelerate forms a process group only if it is told to use the CPU.
    no_gpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision=pick_precision(config.precision), cpu=no_gpu)
    output = Path(config.output)
    with claimed_by_first(output, inside=True), stop_signals() as stop:
        stopped_at = training_loop(config, accelerator, stop)
    accelerator.end_training()
    if stopped_at is not None:
        reason = stop[0] if stop else signal.SIGTERM  # of another process
        exit_stopped(reason, stopped_at, accelerator.is_main_process)
    if accelerator.is_main_process:
        print(f"wrote {output / 'model'}")
    return output / "model"


def training_loop(config: TrainConfig, accelerator: Accelerator, stop: list[signal.Signals]) -> int | None:
    """Train to the end and return None, or until a process has received one of ``stop`` and return the images seen."""
    # Set up.
    set_attention_backend(config.attention)
    share_checkpoint(Path(config.output), (RECORD,), accelerator)
    run, main = Run.open(config, accelerator), accelerator.is_main_process
    torch.manual_seed(config.seed)
    learner = learner_for(run)
    model = learner.networks["model"].network
    ema = EMA(model, config.ema_halflife_images, ramp=config.init_from is None)
    averages = [PowerEMA(model, width) for width in config.ema_widths]

    # Resume.
    state = resume(run.checkpoints, learner.networks, ema)
    images_seen = state["images_seen"]
    if images_seen:
        resume_averages(run.output, images_seen, averages)
    batches = run.batches(images_seen)
    for trained in learner.networks.values():
        trained.prepare(accelerator, config.gradient_checkpointing, config.compile)
    resume_optimizers(run.checkpoints, learner.networks)
    for average in (ema, *averages):
        average.shard_like(model, keeps=main)
    means, watch = RunningMeans(accelerator, state.get("means")), CriticWatch()
    log = MetricsLog(run.output, images_seen) if main else None
    if main:
        run.record.save(run.output)
        warn_of_long_ramps(config)
        (run.output / "config.yaml").write_text(dump_config(config), encoding="utf-8")

    bar = progress(config.images_total, images_seen, run.output.name, disable=not main)
    waits, log_every = DataWaits(), config.log_every_images or LOG_EVERY_STEPS * config.batch_size
    for batch in waits.timed(latent_loader(batches, config.num_workers)):
        # Step.
        learning_rate = warmup_cooldown(config, images_seen)
        means.add(learner.step(batch.to(accelerator.device), images_seen, learning_rate))
        before, images_seen = images_seen, images_seen + config.batch_size
        for average in (ema, *averages):
            average.update(model, config.batch_size, images_seen)
        bar.update(config.batch_size)
        last = images_seen >= config.images_total
        stopping = not last and stop_everywhere(accelerator, stop, images_seen // config.batch_size)

        # Report. Sums stay on the device until then, because reading them synchronises with it.
        if last or crossed(before, images_seen, log_every):
            values = means.read()
            check_finite(values, images_seen, partial(batches.keys_at, before))
            if log is not None:
                rates = {"learning_rate": learning_rate, "images_per_second": bar.format_dict["rate"] or 0.0}
                log.log(images_seen, values | watch.ratio(values) | rates | {"data_wait_share": waits.share()})
                bar.set_postfix(loss=f"{values['loss']:.4f}")

        # Show samples.
        shows = last or crossed(before, images_seen, config.sample_every_images)
        saves = last or stopping or crossed(before, images_seen, config.checkpoint_every_images)
        averaged = ema.gather() if shows or saves else ema.model
        if shows and log is not None:
            preview(run, averaged, images_seen, log)

        # Save a checkpoint.
        if saves:
            state = {"images_seen": images_seen, "means": means.state()}
            check_finite(state["means"], images_seen, partial(batches.keys_at, before))
            for average in averages:
                save_snapshot(run.output, images_seen, average, writes=main)
            save_checkpoint(run.checkpoints, learner.networks, averaged, state, config.keep_checkpoints, writes=main)
            accelerator.wait_for_everyone()
        if stopping:
            break

    # Finish.
    bar.close()
    if log is not None:
        log.close()
    if images_seen < config.images_total:
        return images_seen
    averaged = ema.gather()
    if main:
        save_model_folder(run, averaged, images_seen)
    return None


def stop_everywhere(accelerator: Accelerator, stop: list[signal.Signals], step: int) -> bool:
    """Return whether any process is to stop. All processes agree, although signals reach them at different times."""
    if accelerator.num_processes == 1:
        return bool(stop)
    if step % STOP_EVERY_STEPS:
        return False
    return accelerator.reduce(torch.tensor(float(bool(stop)), device=accelerator.device), "sum").item() > 0


def check_finite(values: dict[str, float], images_seen: int, keys: Callable[[], list[str]]) -> None:
    """Raise UserError if a mean over the last steps is not finite; ``keys`` are those of the last batch."""
    for name, value in values.items():
        if not math.isfinite(value):
            last = ", ".join(keys()[:8])
            raise UserError(
                f"{name}: expected a finite number, found {value} at {images_seen} images; last batch: {last}. "
                "The last checkpoint is intact; lower learning_rate or gradient_clip"
            )
