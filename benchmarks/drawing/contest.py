"""A plot of Frechet distances over network evaluations for all methods of a contest (benchmarks/rivals.py)."""

from __future__ import annotations

import json
import statistics
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
from few_step.report import AFTER, NOISE, OURS, START, WHITE, Row, networks_of, of_network, rows_of
from yardstick import plain_log_ticks

from drawing.style import EXACT, GAUSSIAN, INK, MIXTURE, OTHERS, save, styled

NORMAL_95 = 1.96
MAX_STEPS = 16
OWN = {AFTER: MIXTURE, OURS: EXACT}
NETWORKS = {"classifier": "features of a classifier", "features-selfsupervised": "features trained without labels"}


def best_start(rows: list[Row], network: str) -> dict[int, tuple[float, float]]:
    """Return mean and interval of the initial Gaussian model with the best scheduler at each number of steps."""
    starts = [row for row in rows if row.name.startswith(START)]
    counts = sorted({n for row in starts for n in row.counts(NOISE) if n <= MAX_STEPS})
    return {n: min(interval(row, n, network) for row in starts if n in row.counts(NOISE)) for n in counts}


def interval(row: Row, steps: int, network: str) -> tuple[float, float]:
    """Return the mean over training seeds and half the 95 % interval of one training.

    The latter is 1.96 times the larger one of the standard deviations over seeds and over samples (bootstrap).
    """
    values = row.values(NOISE, steps, of_network(network))
    over_samples = statistics.mean(row.values(NOISE, steps, of_network(network, "frechet_sd")))
    over_seeds = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), NORMAL_95 * max(over_samples, over_seeds)


def contest(results: Path, path: Path) -> Path:
    """Plot the trainings in a result file of benchmarks/rivals.py, sampled from noise: a panel for each feature network."""
    rows = rows_of(json.loads(results.read_text(encoding="utf-8"))["contest"])
    trained = sorted((row for row in rows if row.images), key=lambda row: row.name in OWN)
    names = [name for name in NETWORKS if name in networks_of(rows)]
    with styled():
        figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 4.4), squeeze=False)
        for axis, network in zip(axes[0], names):
            others = cycle(OTHERS)
            start = best_start(rows, network)
            band(axis, start, GAUSSIAN, "Gaussian model, best scheduler", width=2.2)
            for row in trained:
                colour = OWN.get(row.name) or next(others)
                curve = {n: interval(row, n, network) for n in row.counts(NOISE)}
                band(axis, curve, colour, label(row), width=2.2 if row.name in OWN else 1.1)
            axis.set(xscale="log", yscale="log", xlabel="evaluations of the network", title=NETWORKS[network])
            axis.set_xticks(list(start), [str(n) for n in start])
            axis.minorticks_off()
            plain_log_ticks(axis.yaxis)
            axis.tick_params(axis="y", which="both", labelcolor=INK)
        axes[0][0].set_ylabel("Frechet distance, lower is better")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, fontsize=10)
        figure.tight_layout()
        return save(figure, path)


def label(row: Row) -> str:
    names = {OURS: "ours: distillation", AFTER: "ours: energy score, then distillation", WHITE: "ours, white noise"}
    seeds = f" ({len(row.results)} seeds)" if len(row.results) > 1 else ""
    return names.get(row.name, "more denoising loss" if row.name == "gaussian" else row.name) + seeds


def band(axis: plt.Axes, curve: dict[int, tuple[float, float]], colour: str, name: str, width: float) -> None:
    means, halves = zip(*curve.values())
    axis.errorbar(list(curve), means, halves, label=name, color=colour, lw=width, marker="o", ms=3, capsize=2, elinewidth=1)
