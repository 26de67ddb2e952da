"""Targets, table and plots of the results of the Gaussian mixture lab."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import matplotlib
import torch
from gmm_cells import EXACT, GAUSSIAN, SMD
from gmm_data import DATA, Problem
from gmm_measures import sample
from gmm_models import PointDenoiser
from targets import target, target_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def targets(done: list[dict]) -> list[dict]:
    """Check the targets of the model with components in the cells that were measured."""

    def cell(data: str, steps: int, gaussian: bool) -> dict | None:
        model = GAUSSIAN.name if gaussian else "components"
        found = [e["measures"] for e in done if (e["data"], e["T"]) == (data, steps) and model in e["model"]]
        return found[0] if found else None

    checks = []

    def add(name: str, wanted: str, measured: float) -> None:
        checks.append(target(name, wanted, measured, digits=4))

    wanted = (("ring of 8", 2, 1.15, 0.95), ("ring of 8", 5, 1.1, 0.98), ("5x5 grid", 5, 1.1, 0.98))
    for data, steps, over_floor, in_mode in wanted:
        if smd := cell(data, steps, False):
            ratio, inside = statistics.mean(smd["sliced_w2_over_floor"]), statistics.mean(smd["in_mode"])
            add(f"{data}, T = {steps}: sliced W2 / floor", f"<= {over_floor}", ratio)
            add(f"{data}, T = {steps}: fraction in modes", f">= {in_mode}", inside)
            if steps == 2:
                add("ring of 8, T = 2: largest relative error of a mode's weight", "<= 0.2", max(smd["worst_mode"]))
    smd, baseline = cell("mixture in 64-D", 5, False), cell("mixture in 64-D", 5, True)
    if smd and baseline:
        ratio = statistics.mean(smd["energy_distance"]) / statistics.mean(baseline["energy_distance"])
        add("mixture in 64-D, T = 5: energy distance to the data / Gaussian model's", "<= 0.25", ratio)
    smd, baseline = cell("one Gaussian", 5, False), cell("one Gaussian", 5, True)
    if smd and baseline and len(smd["sliced_w2"]) > 1:
        apart = statistics.mean(smd["sliced_w2"]) - statistics.mean(baseline["sliced_w2"])
        noise = math.hypot(statistics.stdev(smd["sliced_w2"]), statistics.stdev(baseline["sliced_w2"]))
        add("one Gaussian, T = 5: (sliced W2 of SMD - Gaussian model's) / seed noise", "<= 1", apart / noise)
    return checks


def distill_targets(done: list[dict]) -> list[dict]:
    """Check the targets of the best distillation from the exact teacher: the one with the lowest sliced W2."""
    checks = []
    for data, steps in (("ring of 8", 2), ("5x5 grid", 5)):
        found = [e for e in done if (e["data"], e["T"]) == (data, steps) and e["model"].startswith(EXACT)]
        if found:
            best = min(found, key=lambda entry: statistics.mean(entry["measures"]["sliced_w2_over_floor"]))
            name, measured = f"{data}, T = {steps}, {best['model']}", best["measures"]
            ratio, inside = statistics.mean(measured["sliced_w2_over_floor"]), statistics.mean(measured["in_mode"])
            checks += [
                target(f"{name}: sliced W2 / floor", "<= 1.1", ratio, digits=4),
                target(f"{name}: fraction in modes", ">= 0.99", inside, digits=4),
                target(f"{name}: largest relative error of a mode's weight", "<= 0.15", max(measured["worst_mode"]), digits=4),
            ]
    return checks


def line(entry: dict) -> str:
    """Format one row of the table: mean and standard deviation over seeds."""

    def value(name: str, digits: int) -> str:
        values = entry["measures"][name]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    columns = [entry["data"], str(entry["T"]), entry["model"], value("sliced_w2_over_floor", 2), value("in_mode", 3)]
    columns += [f"{statistics.mean(entry['measures']['modes_covered']):.0f}", value("worst_mode", 2)]
    columns += [value("energy_distance", 4)]
    columns += [value("kernel_energy_distance", 4), value("spread_share", 2), value("seconds", 0).split(" ")[0]]
    return "| " + " | ".join(columns) + " |"


def table(result: dict) -> str:
    names = [
        "data",
        "T",
        "model",
        "sliced W2 / floor",
        "in modes",
        "modes",
        "error of a mode",
        "energy distance",
        "kernel's energy distance",
    ]
    head = "| " + " | ".join([*names, "spread ratio", "s"]) + " |"
    lines = [f"`{result['command']}`, {result['seeds']} seeds: mean ± standard deviation.", "", head, "|---" * 11 + "|"]
    lines += [line(entry) for entry in result["cells"]]
    return "\n".join(lines + target_table(result["targets"])) + "\n"


@torch.no_grad()
def plot(trained: dict[tuple[str, int, str], tuple[Problem, PointDenoiser]], path: Path) -> None:
    """Plot a column for every (data, T, model): samples above; below, draws of x_0 for one x_t of the last step, over those of
    the exact posterior."""
    if not trained:
        return
    figure, axes = plt.subplots(2, len(trained), figsize=(2.6 * len(trained), 5.6), squeeze=False)
    for (above, below), ((name, steps, model), (problem, network)) in zip(axes.T, trained.items()):
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
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_sweep(done: list[dict], path: Path) -> None:
    """Plot the distance of the samples and that of the one-step kernel over T, for every data set."""
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
    figure.savefig(path, dpi=80)
    plt.close(figure)
