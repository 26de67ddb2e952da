"""Compares few-step methods that are trained from the same Gaussian model at the same cost, and measured in the same way.

Parts: check (train on data of known distribution), costs (measure the cost of a step of every method and setting of the search,
relative to a denoising step), search (settings of each method), contest (the best settings, several seeds), collect (combine
the existing results). Each training writes a file of its own into ``folder``. A part that is run again does what is missing.

examples:
  python benchmarks/rivals.py --config configs/benchmarks/rivals-emoji.yaml part=check name=known
  python benchmarks/rivals.py --config configs/benchmarks/rivals-emoji.yaml part=costs
  python benchmarks/rivals.py --config configs/benchmarks/rivals-emoji.yaml part=search workers=8
  python benchmarks/rivals.py --config configs/benchmarks/rivals-emoji.yaml part=contest workers=8

Writes benchmarks/results/rivals-NAME.json and .md.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Optional

from few_step import METHODS
from few_step.contest import load_start_and_latents, measured_reconstructions, run_jobs
from few_step.jobs import Job, read_settings, searched, step_costs
from few_step.known import check_known
from few_step.report import draw, tables, targets
from omegaconf import MISSING
from targets import target_table
from yardstick import RESULTS

from ldm_smd.cli import run_tool
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.schema import check

PARTS = ("check", "costs", "search", "contest", "collect")
OPTIONAL = ("folder", "gaussian-guided", "consistency-distillation")
"""Methods that are used only if named."""
CRITERION_STEPS = ("1", "2", "4", "8")
"""Numbers of steps that the criterion of the search averages over."""


@dataclass
class RivalsConfig:
    """benchmarks/rivals.py"""

    name: str = MISSING
    """Name of the image set, used in the names of the result files."""
    part: str = "contest"
    """check, costs, search, contest or collect."""
    start: str = "checkpoints/unet-emoji-vanilla"
    """Folder of the Gaussian model."""
    shards: str = "outputs/latents/emoji"
    autoencoder: str = "checkpoints/autoencoder-emoji"
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """Images of the shards."""
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Real images that no model was trained on. Samples get their labels."""
    features: list[str] = field(default_factory=lambda: ["checkpoints/classifier", "checkpoints/features-selfsupervised"])
    methods: list[str] = field(default_factory=lambda: [name for name in METHODS if name not in OPTIONAL])
    settings: list[str] = field(default_factory=list)
    """METHOD.setting=value: settings of the contest, in place of those that the search found."""
    budget: int = 80_000
    """Cost of every training of the contest, in images of the denoising loss."""
    search_budget: int = 24_000
    """Cost of every training of the search, in images of the denoising loss."""
    tries: int = 12
    """Settings that the search tries for each method."""
    seeds: int = 3
    batch: int = 32
    samples: int = 2000
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    measured: list[str] = field(default_factory=list)
    """Folders of other mixtures to measure."""
    device_name: Optional[str] = None
    """Description of the device, for the result."""
    start_schedulers: list[str] = field(default_factory=lambda: ["UniPC", "SDE-DPM-Solver++", "DDPM"])
    start_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 100])
    """Numbers of steps for the Gaussian model that all methods start from."""
    gaussian: Optional[str] = None
    """Folder of a fitted Gaussian mixture (tools/fit_gaussian.py), to sample from its drafts too."""
    draft_sigma: float = 2.5
    draft_steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    workers: int = 1
    """Processes that train at the same time, all on one device."""
    folder: str = "outputs/rivals"
    device: str = "auto"

    def __post_init__(self) -> None:
        check(self.part in PARTS, "part", f"one of {', '.join(PARTS)}", self.part)
        unknown = set(self.methods) - set(METHODS)
        check(not unknown, "methods", f"some of {', '.join(METHODS)}", ", ".join(sorted(unknown)))
        check(self.samples >= 32, "samples", "at least 32", self.samples)


def rivals(config: RivalsConfig) -> Path:
    """Run a part; returns the JSON file."""
    if config.part == "check":
        return check_known(RESULTS / f"rivals-{config.name}.json", config.methods)
    folder = Path(config.folder)
    if config.part != "collect":
        jobs = planned(config, folder)
        costs = known_costs(jobs, config, folder)
        if config.part != "costs":
            run_jobs(jobs, costs, config, folder / config.part)
        if config.part == "search":
            jobs = [combined(method, config.search_budget, folder / "search") for method in config.methods]
            run_jobs(jobs, known_costs(jobs, config, folder), config, folder / "search")
    return collect(config, folder)


def planned(config: RivalsConfig, folder: Path) -> list[Job]:
    """Return the trainings of a part; for part=costs, those of the search."""
    if config.part in ("costs", "search"):
        tries = [searched(method, config.tries, config.search_budget) for method in config.methods]
        return [job for jobs in zip_longest(*tries) for job in jobs if job]  # in turn, so that a stopped search is balanced
    found = {method: entry["settings"] for method, entry in best_settings(folder / "search").items()}
    found |= read_settings(config.settings)
    jobs = [
        Job(method, found.get(method, {}), seed, config.budget) for seed in range(config.seeds) for method in config.methods
    ]
    given = [Job("folder", {"folder": folder}) for folder in config.measured]
    return [Job("gaussian", {"scheduler": name}) for name in config.start_schedulers] + given + jobs


def known_costs(jobs: list[Job], config: RivalsConfig, folder: Path) -> dict[str, float]:
    """Read the costs from the file, and measure the missing ones. Nothing else should run on the device meanwhile."""
    path = folder / "costs.json"
    costs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    missing = [job for job in jobs if job.images and job.cost_key not in costs]
    if missing:
        start, latents, _ = load_start_and_latents(config)
        costs |= step_costs(missing, start, latents, config.batch)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
    return costs


def read_results(folder: Path) -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def criterion(result: dict) -> float:
    """Return the geometric mean of the Frechet distances to training images over steps and feature networks; inf if failed."""
    cells = [result["steps"][count] for count in CRITERION_STEPS if count in result.get("steps", {})]
    values = [network["frechet"] for cell in cells for network in cell["features"].values()]
    return math.inf if result.get("failed") or not values else statistics.geometric_mean(values)


def best_settings(folder: Path) -> dict[str, dict]:
    """Return the best result of a search for each method."""
    best: dict[str, dict] = {}
    for result in read_results(folder):
        if result["method"] not in best or criterion(result) < criterion(best[result["method"]]):
            best[result["method"]] = result
    return best


def combined(method: str, images: int, folder: Path) -> Job:
    """Combine the best value of every setting, among those that alone are better than the default."""
    best: dict[str, tuple[float, Any]] = {}
    found = [each for each in read_results(folder) if each["method"] == method and each["images"] == images]
    default = next((criterion(each) for each in found if not each["settings"]), math.inf)
    for result in found:
        if len(result["settings"]) == 1 and criterion(result) < default:
            [(name, value)] = result["settings"].items()
            best[name] = min(best.get(name, (math.inf, None)), (criterion(result), value), key=lambda each: each[0])
    return Job(method, {name: value for name, (_, value) in best.items()}, 0, images)


def collect(config: RivalsConfig, folder: Path) -> Path:
    """Combine the files of all jobs; returns the JSON file."""
    command = " ".join(["python", "benchmarks/rivals.py", *sys.argv[1:]])
    content = {"command": command, "device": config.device_name}
    content |= {name: getattr(config, name) for name in ("name", "budget", "search_budget", "samples", "batch")}
    costs = folder / "costs.json"
    content["costs"] = json.loads(costs.read_text(encoding="utf-8")) if costs.is_file() else {}
    for part in ("search", "contest"):
        content[part] = sorted(read_results(folder / part), key=lambda result: (result["method"], criterion(result)))
    if config.part in ("contest", "collect"):
        content["reconstructed"] = measured_reconstructions(config, folder / "reconstructed.json")
    content["targets"] = targets(content)
    path = RESULTS / f"rivals-{config.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = "\n".join([f"`{content['command']}`", *tables(content), *target_table(content["targets"])]) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(content, path.with_suffix(".png"))
    print(text)
    return path


if __name__ == "__main__":
    sys.exit(run_tool(RivalsConfig, rivals, __doc__))
