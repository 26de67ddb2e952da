"""Checks methods on a known distribution: points of a Gaussian mixture, as images of one pixel and two channels.

The code path is the same as for real images."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from gmm_data import Problem
from gmm_measures import floor, modes, sliced_w2

from ldm_smd.models.unet import SMDUNet2DModel

from . import METHODS
from .method import Latents, Method, Training, train
from .network import Start, start_from

PROBLEMS = ("ring of 8", "one Gaussian")
STEPS = (1, 2, 4, 8)
POINTS, SAMPLES, SETS = 100_000, 5_000, 2
BATCH, UPDATES, START_UPDATES = 128, 1500, 2000
RATE = 1e-3
SETTINGS: dict[str, dict] = {
    "gaussian": {"learning_rate": RATE},
    "ect": {"learning_rate": RATE},
    "meanflow": {"learning_rate": RATE},
    "alphaflow": {"learning_rate": RATE},
    "shortcut": {"learning_rate": RATE},
    "imm": {"learning_rate": RATE},
    "dmd2": {"learning_rate": 2e-4, "critic_rate": 1e-3},
    "ddgan": {"learning_rate": 2e-4, "critic_rate": 2e-4},
}
"""Settings for these small networks. The defaults are for images and a network a hundred times larger."""


def points(problem: Problem) -> Latents:
    x = problem.sample(POINTS, torch.Generator().manual_seed(6))
    return Latents(x.view(POINTS, 1, 2, 1, 1), torch.zeros(POINTS, dtype=torch.long), 1)


def known_start(latents: Latents) -> Start:
    """Train a Gaussian model of the points."""
    torch.manual_seed(0)
    unet = SMDUNet2DModel(
        sample_size=1,
        in_channels=2,
        out_channels=2,
        block_out_channels=(32,),
        layers_per_block=1,
        attention_levels=(),
        num_classes=1,
        norm_num_groups=4,
        z_channels=0,
    )
    method = METHODS["gaussian"](start_from(unet), METHODS["gaussian"].Settings(learning_rate=RATE))
    network = train(method, latents, training(START_UPDATES))
    return start_from(network.unet)


def training(updates: int) -> Training:
    images = updates * BATCH
    return Training(images, BATCH, warmup_images=images // 40, ema_halflife_images=images // 40)


@torch.no_grad()
def distances(name: str, problem: Problem, method: Method, network: torch.nn.Module) -> dict[str, dict[str, float]]:
    """Measure, for each number of steps, sliced W2 relative to that of two samples of the data, and the points in modes."""
    labels, found = torch.zeros(SAMPLES, dtype=torch.long), {}
    for steps in STEPS:
        generator = torch.Generator().manual_seed(7)
        apart, inside = [], {}
        for _ in range(SETS):
            noise = torch.randn(SAMPLES, 2, 1, 1, generator=generator)
            x = method.sample(network, noise, labels, steps, generator).flatten(1).double() * problem.scale + problem.mean
            apart.append(sliced_w2(x, problem.mixture.sample(SAMPLES, generator)))
            inside = inside or modes(problem.mixture, x)
        found[str(steps)] = {"over_floor": round(statistics.mean(apart) / floor(name, SAMPLES), 2)} | {
            key: round(value, 3) for key, value in inside.items()
        }
    return found


def check_known(path: Path, methods: Sequence[str]) -> Path:
    """Train each method on each problem, and write a table. Results of other methods in the file are kept."""
    content: dict = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in PROBLEMS:
        problem = Problem(name, 10)
        latents = points(problem)
        start = known_start(latents)
        start.latents, start.labels = latents.moments[:, 0], latents.labels
        entry = content.setdefault(name, {})
        for scheduler in ("DDIM", "UniPC", "DDPM"):
            method = METHODS["gaussian"](start, METHODS["gaussian"].Settings(scheduler=scheduler))
            entry[f"start, {scheduler}"] = {"steps": distances(name, problem, method, method.networks["model"])}
        for key in methods:
            began = time.perf_counter()
            method = METHODS[key](start, METHODS[key].Settings(**SETTINGS.get(key, {})))
            network = train(method, latents, training(UPDATES)).eval()
            seconds = time.perf_counter() - began
            entry[key] = {
                "settings": SETTINGS.get(key, {}),
                "seconds": round(seconds),
                "steps": distances(name, problem, method, network),
            }
            found = [cell["over_floor"] for cell in entry[key]["steps"].values()]
            print(f"{name}, {key}: {found} in {seconds:.0f} s", flush=True)
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text("\n".join(table(content)) + "\n", encoding="utf-8")
    return path


def table(content: dict) -> list[str]:
    lines = [
        "Sliced W2 to the data, relative to that between two samples of the data (1 is exact), and fraction of points in modes."
    ]
    for name, entry in content.items():
        lines += ["", "| " + name + " | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |"]
        lines.append("|---" * (len(STEPS) + 1) + "|")
        for key, found in entry.items():
            cells = [f"{cell['over_floor']:.1f}, {100 * cell['in_mode']:.0f} %" for cell in found["steps"].values()]
            lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return lines
