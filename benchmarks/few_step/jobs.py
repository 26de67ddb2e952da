"""Jobs of a contest, which are trainings of methods with settings, and the costs of their steps."""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from typing import Any

import torch
import yaml

from ldm_smd.errors import UserError

from . import METHODS
from .method import Latents, Method
from .network import Start

COSTLY = (
    "share_equal",
    "critic_updates",
    "steps",
    "every",
    "particles",
    "derivative",
    "critic_gan",
    "draws",
    "views",
    "adversarial",
    "fitted",
    "energy_first",
    "consistency_first",
    "energy_weight",
    "guidance",
    "backward_simulation",
)
"""Settings that change the cost of a step."""
ROUNDS = 3
MIN_STEPS = 6


@dataclass
class Job:
    """One training of a method, with the measures of its samples.

    Attributes:
        settings: settings that differ from the defaults.
        images: cost of the training, in images of the denoising loss; 0 for the initial model itself.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    images: int = 0

    @property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.method}-{digest if self.settings else 'default'}-{self.images}-{self.seed}"

    @property
    def cost_key(self) -> str:
        """Key of the cost of a step. Jobs with the same key cost the same."""
        costly = {name: value for name, value in self.settings.items() if name in COSTLY}
        return f"{self.method} {json.dumps(costly, sort_keys=True)}"

    def make(self, start: Start) -> Method:
        cls = METHODS[self.method]
        return cls(start, cls.Settings(**self.settings))

    def as_dict(self) -> dict:
        return asdict(self)


def read_settings(lines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse and check METHOD.setting=value lines; returns settings by method."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        left, _, value = line.partition("=")
        method, _, name = left.partition(".")
        defaults = {each.name: each.default for each in fields(METHODS[method].Settings)} if method in METHODS else {}
        if name not in defaults:
            raise UserError(f"settings: expected METHOD.setting=value of {', '.join(METHODS)}, found {line!r}")
        found.setdefault(method, {})[name] = type(defaults[name])(yaml.safe_load(value))
    return found


def searched(method: str, tries: int, images: int) -> list[Job]:
    """Return the jobs of a search, one seed each.

    They are the first ``tries`` of: the defaults, every learning rate, every value of the other settings (in turn, one setting
    changed at a time), and random combinations.
    """
    cls = METHODS[method]
    defaults = {each.name: each.default for each in fields(cls.Settings)}
    others = {name: [value for value in values if value != defaults[name]] for name, values in cls.SEARCH.items()}
    rates = [{"learning_rate": value} for value in others.pop("learning_rate")]
    alone = [
        {name: value} for values in zip_longest(*others.values()) for name, value in zip(others, values) if value is not None
    ]
    generator = random.Random(0)
    many = [{name: generator.choice(values) for name, values in cls.SEARCH.items()} for _ in range(tries)]
    jobs: dict[str, Job] = {}
    for settings in [{}, *rates, *alone, *many]:
        job = Job(method, {name: value for name, value in settings.items() if value != defaults[name]}, 0, images)
        jobs.setdefault(job.name, job)
    return list(jobs.values())[:tries]


def step_costs(jobs: Sequence[Job], start: Start, latents: Latents, batch: int) -> dict[str, float]:
    """Measure the time per image of a step of each job, relative to the denoising loss: the median of ratios, timed in turn.

    Parts of a training with different work are timed one by one, and weighted with their fractions of the images.
    """
    device = start.device
    generator = torch.Generator(device).manual_seed(0)

    def seconds(method: Method, steps: int, part: tuple[float, float] = (0.0, 1.0)) -> float:
        torch.manual_seed(0)  # methods draw the kind of a step from the global generator
        rows = max(batch // method.group, 1) * method.group
        x0, labels = latents.batch(rows, method.group, 0.1, generator)
        began = synchronised(device)
        for count in range(steps):
            method.count, method.progress = count, part[0] + (count + 0.5) / steps * (part[1] - part[0])
            method.step(x0, labels, generator, 0.0)
        return (synchronised(device) - began) / steps / rows

    costs: dict[str, float] = {}
    plain = Job("gaussian").make(start)
    for job in jobs:
        if job.cost_key not in costs:
            method = job.make(start)
            steps = method.cycle * -(-MIN_STEPS // method.cycle)
            costs[job.cost_key] = 0.0
            for part in method.parts:
                seconds(method, 2, part), seconds(plain, 2)
                ratios = [seconds(method, steps, part) / seconds(plain, MIN_STEPS) for _ in range(ROUNDS)]
                costs[job.cost_key] += (part[1] - part[0]) * statistics.median(ratios)
            costs[job.cost_key] = round(costs[job.cost_key], 3)
            print(f"{job.cost_key}: {costs[job.cost_key]:.2f}", flush=True)
    return costs


def synchronised(device: torch.device) -> float:
    """Wait until the device has finished its work; returns the time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
