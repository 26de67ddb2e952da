"""A network that is trained further must keep the process it was trained on: its noise schedule and prediction type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..diffusion.settings import BETA_SCHEDULES, DiffusionConfig
from ..errors import UserError
from ..models.hub import SCHEDULER
from ..schedulers.conversion import process_of, read_process
from ..schedulers.schedule import build_scheduler


def check_process(config: DiffusionConfig, folder: Path, key: str) -> None:
    """Raise UserError unless ``config`` is the process of the scheduler that lies beside the network in ``folder``.

    A network of one process that is trained on another gets wrong inputs from the first step on, and nothing shows it but bad
    samples. Where there is no scheduler, as for a folder of a network alone, nothing is checked.
    """
    found = read_process(folder.parent / SCHEDULER)
    if found is None or found[1] == process_of(build_scheduler(config)):
        return
    scheduler, process = found
    fitting = next((each for each in candidates(scheduler) if process_of(build_scheduler(each)) == process), None)
    if fitting is None:
        wanted = "a noise schedule that the settings of diffusion can express, beside the network"
    else:
        wanted = f"{settings_of(fitting)}, as in the scheduler beside the network"
    raise UserError(f"{key}: expected {wanted} in {folder.parent / SCHEDULER}, found {settings_of(config)}")


def candidates(scheduler: dict[str, Any]) -> Iterator[DiffusionConfig]:
    """Yield the settings that may be those of a scheduler."""
    steps = scheduler.get("num_train_timesteps", 1000)
    yield DiffusionConfig(path="flow", num_train_timesteps=steps)
    prediction = scheduler.get("prediction_type", "epsilon")
    for schedule in BETA_SCHEDULES:
        betas = {name: scheduler[name] for name in ("beta_start", "beta_end") if name in scheduler}
        if prediction in ("v_prediction", "epsilon", "sample"):
            yield DiffusionConfig("variance_preserving", steps, schedule, prediction_type=prediction, **betas)


def settings_of(config: DiffusionConfig) -> str:
    """Write the settings that matter as on a command line."""
    if config.path == "flow":
        names = ["path", "num_train_timesteps"]
    else:
        names = [each.name for each in fields(config)]
        if config.beta_schedule not in ("linear", "scaled_linear"):
            names = [name for name in names if name not in ("beta_start", "beta_end")]
    return " ".join(f"diffusion.{name}={getattr(config, name)}" for name in names)
