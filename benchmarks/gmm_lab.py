"""Where everything is known: Gaussian mixtures as data, and what few-step models learn of their exact posteriors.

For every data set, number of steps T and model: three seeds of a small network, trained on the same samples; then 20,000
samples (5,000 above T = 10) against the data, and the one-step kernel p(x_s | x_t) against the exact q(x_s | x_t).

    python benchmarks/gmm_lab.py                 # all of it; over an hour on one core
    python benchmarks/gmm_lab.py --quick         # the ring at T = 2, one seed, some minutes
    python benchmarks/gmm_lab.py --part targets  # one of: targets, objectives, sweep

Writes benchmarks/results/gmm_lab-PART.json, .md and .png (gmm_lab-quick.* with --quick).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from gmm_models import PointDenoiser, parameters_per_model, repeat
from scipy.stats import chi2
from sklearn.cluster import kmeans_plusplus

from ldm_smd.diffusion.gaussian_mixture import GaussianMixture
from ldm_smd.diffusion.objectives import energy, mixture_nll, mse, timestep_weight
from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.progress import progress

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
SEEDS = 3
ALL_STEPS = (2, 5, 10, 50, 100, 500)
IN_MODE = chi2.cdf(16.0, 2)  # within 4 standard deviations in two dimensions, and as rare outside it in more
PLACE_POINTS = 2000
WEIGHTS_FIRST = 0.2
"""Share of the updates in which the components stay at their places: else they all move after x_t, before the network can tell
which of them x_t belongs to, and few of them end up with all the weight."""
PAIRS, SETS = 24, 6
"""Of sets of samples, whose distances are averaged: for the floor, and of every model."""
KERNEL_POINTS, KERNEL_DRAWS, KERNEL_STEPS = 48, 256, 5


@dataclass(frozen=True)
class Model:
    """One way to model the step and to train it."""

    name: str
    objective: str = "energy"
    draws: int = 4
    beta: float = 0.25
    bandwidth: float = 0.15
    components: int = 1
    """K > 1: a discrete part of z; then ``draws`` are of each component."""
    mixture: bool = True
    frozen: bool = False
    """z is frozen: eta is 0, so that the mixture's layers are there and the mixture is not."""


@dataclass(frozen=True)
class Budget:
    updates: int
    batch: int = 128
    learning_rate: float = 4e-3


GAUSSIAN = Model("Gaussian", "mse", 1, mixture=False)
PAPER = Model("SMD, squared error (the paper)", "mse", 1)
FROZEN = Model("SMD, z frozen", "mse", 1, frozen=True)
SMD = Model("SMD, energy, beta 0.25, M = 4")
SWEEP, SHORT = Budget(1200, learning_rate=2e-3), Budget(1500, learning_rate=2e-3)


def components(count: int) -> Model:
    return Model(f"SMD, energy, beta 0.25, {count} components", draws=2, components=count)


OBJECTIVES = (
    GAUSSIAN,
    PAPER,
    FROZEN,
    *(replace(PAPER, name=f"SMD, squared error, M = {m}", draws=m) for m in (5, 10, 20)),
    *(Model(f"SMD, mixture NLL, M = {m}", "mixture_nll", m) for m in (5, 10, 20)),
    *(Model(f"SMD, energy, beta {beta:g}, M = 5", draws=5, beta=beta) for beta in (1.0, 0.5)),
    *(Model(f"SMD, energy, beta 0.25, M = {m}", draws=m) for m in (2, 5, 10, 20)),
    components(10),
)


def ring(modes: int = 8) -> GaussianMixture:
    """Modes on a circle of radius 2, standard deviation 0.08."""
    angles = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    return GaussianMixture.isotropic(2.0 * torch.stack((angles.cos(), angles.sin()), dim=1), 0.08)


def grid(side: int = 5) -> GaussianMixture:
    """side x side modes a unit apart, standard deviation 0.08."""
    places = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    return GaussianMixture.isotropic(torch.cartesian_prod(places, places), 0.08)


def random_mixture(dimensions: int, modes: int = 16, seed: int = 0) -> GaussianMixture:
    """Normal means, random full covariances a fiftieth as large, unequal weights."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(modes, dimensions, generator=generator, dtype=torch.float64)
    roots = torch.randn(modes, dimensions, dimensions, generator=generator, dtype=torch.float64) / math.sqrt(dimensions)
    weights = 0.5 + torch.rand(modes, generator=generator, dtype=torch.float64)
    covariances = 0.02 * roots @ roots.mT + 0.005 * torch.eye(dimensions, dtype=torch.float64)
    return GaussianMixture.from_covariances(weights / weights.sum(), means, covariances)


def one_gaussian() -> GaussianMixture:
    covariance = torch.tensor([[[1.0, 0.6], [0.6, 0.5]]], dtype=torch.float64)
    return GaussianMixture.from_covariances(torch.ones(1, dtype=torch.float64), torch.zeros(1, 2).double(), covariance)


DATA = {
    "ring of 8": ring,
    "5x5 grid": grid,
    "mixture in 16-D": lambda: random_mixture(16),
    "mixture in 64-D": lambda: random_mixture(64),
    "one Gaussian": one_gaussian,
}
# Of the targets: components, a few more than the data have modes; and small batches where components are many. The grid has
# 12,000 updates: with 3,000 its 25 modes' shares were off by as much again as those of 20,000 samples are by chance.
TARGETS = {
    ("ring of 8", 2): (components(10), Budget(2000)),
    ("ring of 8", 5): (components(10), Budget(3000)),
    ("5x5 grid", 5): (components(28), Budget(12_000, batch=64)),
    ("mixture in 64-D", 5): (components(20), Budget(5000, batch=32, learning_rate=5e-3)),
    ("one Gaussian", 5): (components(2), Budget(2000)),
}


def cells(part: str) -> list[tuple[str, int, Model, Budget]]:
    """(data, T, model, budget) of one part of the benchmark."""
    if part == "quick":
        return [("ring of 8", 2, model, Budget(1500)) for model in (GAUSSIAN, PAPER, SMD, components(10))]
    if part == "targets":
        return [
            cell
            for (name, steps), (model, budget) in TARGETS.items()
            for cell in (
                # An update of the Gaussian costs a tenth: it gets four times the points, and the rate that suits it.
                (name, steps, GAUSSIAN, replace(budget, batch=4 * budget.batch, learning_rate=2e-3)),
                (name, steps, model, budget),
            )
        ]
    if part == "objectives":
        # At T = 5 only some: the others cost as much and say the same.
        few = [model for model in OBJECTIVES if model.draws in (1, 5) or model.components > 1]
        return [("ring of 8", T, model, SHORT) for T, models in ((2, OBJECTIVES), (5, few)) for model in models]
    return [(name, T, model, SWEEP) for T in ALL_STEPS for name in DATA for model in (GAUSSIAN, SMD)]


class Problem:
    """Data, brought to mean 0 and mean variance 1, and the forward process of T steps."""

    def __init__(self, name: str, steps: int) -> None:
        self.mixture = DATA[name]()
        self.mean = self.mixture.mean()
        self.scale = float((self.mixture.covariance().trace() / self.mixture.dimensions).sqrt())
        self.steps = steps
        # The cosine schedule (arXiv 2102.09672), its end at alphabar = 1e-5.
        times = (torch.arange(steps, dtype=torch.float64) + 1) / steps
        self.process = DiffusionProcess((((times + 0.008) / 1.008 * math.pi / 2).cos() ** 2).clamp_min(1e-5).float())
        self.normalised = GaussianMixture(
            self.mixture.weights,
            (self.mixture.means - self.mean) / self.scale,
            self.mixture.variances / self.scale**2,
            self.mixture.bases,
        )
        # Samplers clip x_0 to the range of the data, as diffusers' schedulers do with clip_sample.
        self.limit = 1.02 * float(self.sample(20_000, torch.Generator().manual_seed(1)).abs().max())

    @property
    def dimensions(self) -> int:
        return self.mixture.dimensions

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return self.normalised.sample(count, generator).float()

    def times(self, t: torch.Tensor) -> torch.Tensor:
        return t.float() / max(self.steps - 1, 1)

    def draw(self, model: PointDenoiser, x_t: torch.Tensor, t: int, draws: int, generator: torch.Generator) -> torch.Tensor:
        """Draws of x_0 for x_t (E, N, D), (E, N * draws, D)."""
        time = self.times(torch.full(x_t.shape[:2], t))
        return model.draw(x_t, time, draws, generator).clamp(-self.limit, self.limit)

    def step(self, x_t: torch.Tensor, x0: torch.Tensor, t: int, generator: torch.Generator) -> torch.Tensor:
        """A draw of q(x_s | x_t, x_0) for the step from t to t - 1; x_0 itself at the end."""
        if t == 0:
            return x0
        rows = x_t.flatten(0, -2)
        steps = torch.full((len(rows),), t)
        mean, variance = self.process.posterior(rows, x0.flatten(0, -2), steps, steps - 1)
        return (mean + variance.sqrt() * torch.randn(mean.shape, generator=generator)).view(x_t.shape)


def train(problem: Problem, model: Model, budget: Budget, seeds: int) -> PointDenoiser:
    """``seeds`` independent models, all trained on their own fresh samples; EMA weights."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = build(problem, model, seeds)
    if model.components > 1:
        points = problem.sample(PLACE_POINTS, generator).numpy()
        places = [kmeans_plusplus(points, model.components, random_state=seed)[0] for seed in range(seeds)]
        network.place.data = torch.from_numpy(np.stack(places))
    ema = copy.deepcopy(network).requires_grad_(False)
    movers = network.movers()
    others = [p for p in network.parameters() if all(p is not mover for mover in movers)]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": movers}], betas=(0.9, 0.99), weight_decay=0, fused=True)
    shape = (seeds, budget.batch)
    count = model.draws * model.components
    which = None
    if model.components > 1:
        which = torch.arange(model.components).repeat_interleave(model.draws).repeat(seeds, budget.batch)
    bar = progress(budget.updates, 0, model.name)
    for update in range(budget.updates):
        rate = min(1.0, (update + 1) / 200) * 0.5 * (1 + math.cos(math.pi * update / budget.updates))
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * rate
        if update < WEIGHTS_FIRST * budget.updates:
            optimizer.param_groups[1]["lr"] = 0.0
        x0 = problem.sample(seeds * budget.batch, generator)
        t = torch.randint(problem.steps, (len(x0),), generator=generator)
        x_t = problem.process.noise(x0, torch.randn(x0.shape, generator=generator), t).view(*shape, -1)
        features = network.features(x_t, problem.times(t).view(shape))
        eta, log_weights = None, None
        if model.mixture:
            eta = torch.randn(seeds, budget.batch * count, network.eta_dimensions, generator=generator)
            eta = torch.zeros_like(eta) if model.frozen else eta
        if model.components > 1:
            log_weights = network.log_weights(x_t, features).flatten(0, 1)
        predictions = network.predict(features, eta, which).view(len(x0), -1, problem.dimensions, 1, 1)
        losses = loss(model, predictions, x0[..., None, None], log_weights)
        exponent = model.beta if model.objective == "energy" else 2.0
        weight = timestep_weight("v", exponent, problem.process, t, "sample")
        optimizer.zero_grad(set_to_none=True)
        # The models share nothing, so the sum of their losses trains each by its own.
        (seeds * (weight * losses).mean()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), math.sqrt(seeds))
        optimizer.step()
        decay = min(0.999, (update + 1) / (update + 10))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in network.parameters()], 1 - decay)
        bar.update()
    bar.close()
    return ema


def build(problem: Problem, model: Model, seeds: int) -> PointDenoiser:
    """The network of the model; a Gaussian one is as much wider as makes its parameters those of the others."""
    shape = {"models": seeds, "dimensions": problem.dimensions}
    mixture = {"eta_dimensions": max(8, problem.dimensions), "components": model.components}
    if model.mixture:
        return PointDenoiser(**shape, **mixture)
    wanted = parameters_per_model(PointDenoiser(**shape, **mixture))
    widths = range(64, 128)
    width = min(widths, key=lambda w: abs(parameters_per_model(PointDenoiser(**shape, width=w)) - wanted))
    return PointDenoiser(**shape, width=width)


def loss(model: Model, predictions: torch.Tensor, target: torch.Tensor, log_weights: torch.Tensor | None) -> torch.Tensor:
    if model.objective == "mse":
        return mse(predictions, target)
    if model.objective == "mixture_nll":
        return mixture_nll(predictions, target, model.bandwidth, log_weights=log_weights)
    return energy(predictions, target, model.beta, log_weights=log_weights)


@torch.no_grad()
def sample(problem: Problem, network: PointDenoiser, count: int, generator: torch.Generator) -> torch.Tensor:
    """All T steps, each with its own draw: (E, count, D) in the data's own units."""
    x = torch.randn(network.models, count, problem.dimensions, generator=generator)
    for t in reversed(range(problem.steps)):
        x = problem.step(x, problem.draw(network, x, t, 1, generator), t, generator)
    return x.double() * problem.scale + problem.mean


@torch.no_grad()
def kernel(problem: Problem, network: PointDenoiser) -> tuple[list[float], list[float]]:
    """Of every model, means over timesteps and points x_t: the energy distance between the learned p(x_s | x_t) and the
    exact q(x_s | x_t), and the spread of x_0 over eta as a share of the exact posterior's."""
    generator = torch.Generator().manual_seed(2)
    count = min(KERNEL_STEPS, problem.steps)
    chosen = sorted({round(i * (problem.steps - 1) / max(count - 1, 1)) for i in range(count)})
    distances, shares = [], []
    for t in chosen:
        x_t = problem.process.noise(
            problem.sample(KERNEL_POINTS, generator),
            torch.randn(KERNEL_POINTS, problem.dimensions, generator=generator),
            torch.full((KERNEL_POINTS,), t),
        )
        many = x_t.expand(network.models, -1, -1)
        x0 = problem.draw(network, many, t, KERNEL_DRAWS, generator)
        learned = problem.step(repeat(many, KERNEL_DRAWS), x0, t, generator)
        a_t, s_t = (float(v) for v in problem.process.signal_and_noise(torch.tensor([t]), torch.zeros(1)))
        a_s, s_s = (float(v) for v in problem.process.signal_and_noise(torch.tensor([t - 1]), torch.zeros(1)))
        exact = reverse(problem, x_t, a_t, s_t, a_s, s_s).sample(KERNEL_DRAWS, generator).float()
        learned = learned.unflatten(1, (KERNEL_POINTS, KERNEL_DRAWS))
        distances.append([float(energy_distance(rows, exact).mean()) for rows in learned])
        posterior = problem.normalised.posterior(x_t.double(), a_t, s_t).total_variance().mean()
        variance = x0.unflatten(1, (KERNEL_POINTS, KERNEL_DRAWS)).var(dim=2).sum(dim=-1).mean(dim=1)
        shares.append((variance / posterior).sqrt().tolist())
    return [statistics.mean(column) for column in zip(*distances)], [statistics.mean(column) for column in zip(*shares)]


def reverse(problem: Problem, x_t: torch.Tensor, a_t: float, s_t: float, a_s: float, s_s: float):
    """q(x_s | x_t), or q(x_0 | x_t) in the last step."""
    numbers = (torch.tensor(v, dtype=torch.float64) for v in (a_t, s_t, a_s, s_s))
    return problem.normalised.reverse(x_t.double(), *numbers)


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples (..., N, D) and (..., N', D), unbiased."""
    n, m = a.shape[-2], b.shape[-2]
    within = torch.cdist(a, a).sum((-1, -2)) / (n * (n - 1)) + torch.cdist(b, b).sum((-1, -2)) / (m * (m - 1))
    return 2 * torch.cdist(a, b).mean((-1, -2)) - within


def sliced_w2(a: torch.Tensor, b: torch.Tensor, projections: int = 64) -> float:
    """Root of the mean over random directions of the squared 2-Wasserstein distance of the projections."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(a.shape[1], projections, generator=generator).double(), dim=0)
    apart = (a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values
    return float(apart.square().mean().sqrt())


def modes(mixture: GaussianMixture, points: torch.Tensor) -> dict[str, float]:
    """Share of the points in a mode (IN_MODE of a component's own are), how many modes are covered (at least a fifth of their
    share), and the largest relative error of a mode's share, of the points in modes."""
    rotated = torch.einsum("kde,nkd->nke", mixture.bases, points[:, None] - mixture.means)
    distance, nearest = (rotated.square() / mixture.variances).sum(dim=2).min(dim=1)
    inside = distance <= chi2.ppf(IN_MODE, mixture.dimensions)
    shares = torch.bincount(nearest[inside], minlength=len(mixture.weights)) / max(int(inside.sum()), 1)
    relative = shares / mixture.weights
    return {
        "in_mode": float(inside.double().mean()),
        "modes_covered": int((relative >= 0.2).sum()),
        "worst_mode": float((relative - 1).abs().max()),
    }


@cache
def floor(name: str, count: int) -> float:
    """Mean sliced W2 of two sets of so many samples of the data: where an exact sampler is. A single pair is off by a sixth."""
    generator, mixture = torch.Generator().manual_seed(5), DATA[name]()
    return statistics.mean(sliced_w2(mixture.sample(count, generator), mixture.sample(count, generator)) for _ in range(PAIRS))


def measure(name: str, problem: Problem, network: PointDenoiser, seconds: float) -> dict[str, list[float]]:
    """Every measure, a value for each seed; sliced W2 is the mean over SETS sets of samples, the others are of the first."""
    generator = torch.Generator().manual_seed(4)
    count = 20_000 if problem.steps <= 10 else 5_000
    if problem.dimensions > 16:
        count = min(count, 10_000)
    sets = [sample(problem, network, count, generator) for _ in range(SETS)]
    rows: dict[str, list[float]] = {}
    for model in range(network.models):
        apart = [sliced_w2(samples[model], problem.mixture.sample(count, generator)) for samples in sets]
        found = {"sliced_w2": statistics.mean(apart)}
        found["sliced_w2_over_floor"] = found["sliced_w2"] / floor(name, count)
        found |= modes(problem.mixture, sets[0][model])
        data = problem.mixture.sample(5000, generator)
        found["energy_distance"] = float(energy_distance(sets[0][model, :5000], data))
        for key, value in found.items():
            rows.setdefault(key, []).append(value)
    rows["kernel_energy_distance"], rows["spread_share"] = kernel(problem, network)
    rows["seconds"] = [seconds / network.models] * network.models
    return rows


def run(part: str, seeds: int, resume: bool) -> None:
    """Train and measure every cell of a part; write the results and the plot."""
    path = RESULTS / f"gmm_lab-{part}.json"
    done = json.loads(path.read_text(encoding="utf-8"))["cells"] if resume and path.is_file() else []
    known = {(entry["data"], entry["T"], entry["model"], entry["updates"], entry["batch"]) for entry in done}
    pictures = {}
    for name, steps, model, budget in cells(part):
        if (name, steps, model.name, budget.updates, budget.batch) in known:
            continue
        problem = Problem(name, steps)
        started = time.perf_counter()
        network = train(problem, model, budget, seeds)
        rows = measure(name, problem, network, time.perf_counter() - started)
        done.append(
            {
                "data": name,
                "T": steps,
                "model": model.name,
                "parameters": parameters_per_model(network),
                "updates": budget.updates,
                "batch": budget.batch,
                "measures": {key: [round(value, 5) for value in values] for key, values in rows.items()},
            }
        )
        print(line(done[-1]), flush=True)
        if problem.dimensions == 2 and part != "sweep" and model.objective != "mixture_nll" and len(pictures) < 8:
            pictures[(name, steps, model.name)] = (problem, network)
        write(part, seeds, done)
    if part == "sweep":
        plot_sweep(done)
    else:
        plot(part, pictures)


def write(part: str, seeds: int, done: list[dict]) -> None:
    """The results so far: a crash loses one cell."""
    RESULTS.mkdir(exist_ok=True)
    command = "python benchmarks/gmm_lab.py " + ("--quick" if part == "quick" else f"--part {part}")
    result = {
        "command": command,
        "seeds": seeds,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "models": sorted({entry["model"] for entry in done}),
        "cells": done,
        "targets": targets(done) if part == "targets" else [],
    }
    path = RESULTS / f"gmm_lab-{part}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(result), encoding="utf-8")


def targets(done: list[dict]) -> list[dict]:
    """What the components model is to reach, where its cells are there."""

    def cell(data: str, steps: int, gaussian: bool) -> dict | None:
        kind = GAUSSIAN.name if gaussian else "components"
        found = [e["measures"] for e in done if (e["data"], e["T"]) == (data, steps) and kind in e["model"]]
        return found[0] if found else None

    checks = []

    def add(name: str, wanted: str, measured: float, holds: bool) -> None:
        checks.append({"name": name, "target": wanted, "measured": round(measured, 4), "holds": bool(holds)})

    wanted = (("ring of 8", 2, 1.15, 0.95), ("ring of 8", 5, 1.1, 0.98), ("5x5 grid", 5, 1.1, 0.98))
    for data, steps, over_floor, share in wanted:
        if smd := cell(data, steps, False):
            ratio, inside = statistics.mean(smd["sliced_w2_over_floor"]), statistics.mean(smd["in_mode"])
            add(f"{data}, T = {steps}: sliced W2 over its floor", f"<= {over_floor}", ratio, ratio <= over_floor)
            add(f"{data}, T = {steps}: share in a mode", f">= {share}", inside, inside >= share)
            if steps == 2:
                worst = max(smd["worst_mode"])
                add("ring of 8, T = 2: worst mode's relative error", "<= 0.2", worst, worst <= 0.2)
    smd, baseline = cell("mixture in 64-D", 5, False), cell("mixture in 64-D", 5, True)
    if smd and baseline:
        ratio = statistics.mean(smd["energy_distance"]) / statistics.mean(baseline["energy_distance"])
        add("mixture in 64-D, T = 5: energy distance to the data over the Gaussian's", "<= 0.25", ratio, ratio <= 0.25)
    smd, baseline = cell("one Gaussian", 5, False), cell("one Gaussian", 5, True)
    if smd and baseline and len(smd["sliced_w2"]) > 1:
        apart = statistics.mean(smd["sliced_w2"]) - statistics.mean(baseline["sliced_w2"])
        noise = math.hypot(statistics.stdev(smd["sliced_w2"]), statistics.stdev(baseline["sliced_w2"]))
        title = "one Gaussian, T = 5: SMD's sliced W2 less the Gaussian's, over the seed noise"
        add(title, "<= 1", apart / noise, apart <= noise)
    return checks


def line(entry: dict) -> str:
    """One row of the table: mean and, over seeds, standard deviation."""

    def value(name: str, digits: int) -> str:
        values = entry["measures"][name]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    columns = [entry["data"], str(entry["T"]), entry["model"], value("sliced_w2_over_floor", 2), value("in_mode", 3)]
    columns += [f"{statistics.mean(entry['measures']['modes_covered']):.0f}", value("energy_distance", 4)]
    columns += [value("kernel_energy_distance", 4), value("spread_share", 2), value("seconds", 0).split(" ")[0]]
    return "| " + " | ".join(columns) + " |"


def table(result: dict) -> str:
    head = "| data | T | model | sliced W2 / floor | in a mode | modes | energy distance | kernel's | spread share | s |"
    lines = [f"`{result['command']}`, {result['seeds']} seeds: mean ± standard deviation.", "", head, "|---" * 10 + "|"]
    lines += [line(entry) for entry in result["cells"]]
    if result["targets"]:
        lines += ["", "| target | wanted | measured | |", "|---|---|---|---|"]
        lines += [
            f"| {entry['name']} | {entry['target']} | {entry['measured']:.3f} | {'yes' if entry['holds'] else 'no'} |"
            for entry in result["targets"]
        ]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def plot(part: str, pictures: dict) -> None:
    """Above: samples. Below: draws of x_0 for one x_t at the noisiest step but the first, over the exact posterior."""
    if not pictures:
        return
    figure, axes = plt.subplots(2, len(pictures), figsize=(2.6 * len(pictures), 5.6), squeeze=False)
    for (above, below), ((name, steps, model), (problem, network)) in zip(axes.T, pictures.items()):
        generator = torch.Generator().manual_seed(5)
        points = sample(problem, network, 3000, generator)[0]
        above.scatter(*points.T, s=1, alpha=0.3, linewidths=0)
        above.set_title(f"{name}, T = {steps}\n{model}", fontsize=7)
        x_t = problem.process.noise(problem.sample(1, generator), torch.randn(1, 2, generator=generator), torch.tensor([0]))
        a, s = (float(v) for v in problem.process.signal_and_noise(torch.tensor([0]), torch.zeros(1)))
        exact = problem.normalised.posterior(x_t.double(), a, s).sample(1000, generator)[0]
        drawn = problem.draw(network, x_t.expand(network.models, -1, -1), 0, 1000, generator)[0]
        below.scatter(*exact.T, s=6, alpha=0.5, linewidths=0, color="tab:gray", label="exact q(x0 | x_t)")
        below.scatter(*drawn.T, s=2, alpha=0.5, linewidths=0, color="tab:red", label="learned")
        below.legend(fontsize=6, loc="upper right")
        for axis in (above, below):
            axis.set_aspect("equal")
            axis.set_xticks([])
            axis.set_yticks([])
        limit = float(problem.mixture.means.abs().max() + 4 * problem.mixture.variances.max().sqrt())
        above.set_xlim(-limit, limit)
        above.set_ylim(-limit, limit)
    figure.tight_layout()
    figure.savefig(RESULTS / f"gmm_lab-{part}.png", dpi=80)
    plt.close(figure)


def plot_sweep(done: list[dict]) -> None:
    """The samples' distance and the one-step kernel's against T, for every data set."""
    figure, axes = plt.subplots(2, len(DATA), figsize=(2.9 * len(DATA), 5.2), sharex=True, squeeze=False)
    for (above, below), data in zip(axes.T, DATA):
        for model in (GAUSSIAN, SMD):
            entries = sorted((e for e in done if (e["data"], e["model"]) == (data, model.name)), key=lambda e: e["T"])
            for axis, name in ((above, "sliced_w2_over_floor"), (below, "kernel_energy_distance")):
                values = [entry["measures"][name] for entry in entries]
                means = [statistics.mean(v) for v in values]
                deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
                axis.errorbar([e["T"] for e in entries], means, deviations, marker="o", markersize=3, label=model.name)
        above.set_title(data, fontsize=9)
        above.set_yscale("log")
        above.axhline(1.0, color="gray", linewidth=0.5)
        below.set_yscale("symlog", linthresh=1e-3)
        below.set_xscale("log")
        below.set_xlabel("T")
    axes[0, 0].set_ylabel("sliced W2 / floor")
    axes[1, 0].set_ylabel("kernel's energy distance")
    axes[0, 0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(RESULTS / "gmm_lab-sweep.png", dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the ring at T = 2, one seed")
    parser.add_argument("--part", choices=("targets", "objectives", "sweep"), help="all three where it is not given")
    parser.add_argument("--resume", action="store_true", help="keep the cells of the result file (made with the same code)")
    arguments = parser.parse_args()
    parts = ["quick"] if arguments.quick else [arguments.part] if arguments.part else ["targets", "objectives", "sweep"]
    for part in parts:
        run(part, 1 if arguments.quick else SEEDS, arguments.resume)


if __name__ == "__main__":
    main()
