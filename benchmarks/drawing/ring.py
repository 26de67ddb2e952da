"""A plot of the ring of eight modes, sampled in a few steps with the exact posterior, its mean, and a trained mixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from gmm_cells import Budget, components
from gmm_data import Problem
from gmm_training import train

from drawing.style import EXACT, GAUSSIAN, INK, MIXTURE, save, styled
from ldm_smd.diffusion.gaussian_mixture import GaussianMixture

STEPS = 3
POINTS, DRAWS, MODES = 1500, 150, 10
BETWEEN_MODES = (0.55, 0.35)
"""x_t of the last column."""
Draw = Callable[[torch.Tensor, int], torch.Tensor]
"""(x_t (N, D), t) -> a draw or a prediction of x_0 for each point, (N, D)."""


def posterior(problem: Problem, x_t: torch.Tensor, t: int) -> GaussianMixture:
    a, s = (float(each) for each in problem.process.signal_and_noise(torch.tensor([t]), torch.zeros(1)))
    return problem.normalised.posterior(x_t.double(), a, s)


def denoisers(problem: Problem, updates: int, generator: torch.Generator) -> dict[str, tuple[str, Draw]]:
    """Return, for each row of the figure, its colour and the x_0 that it samples with. The optimal Gaussian model predicts the
    mean of the exact posterior."""
    network = train(problem, components(MODES), Budget(updates), seeds=1)

    def exact(x_t: torch.Tensor, t: int) -> torch.Tensor:
        return posterior(problem, x_t, t).sample(1, generator)[:, 0].float()

    def mean(x_t: torch.Tensor, t: int) -> torch.Tensor:
        return posterior(problem, x_t, t).mean().float()

    @torch.no_grad()
    def mixture(x_t: torch.Tensor, t: int) -> torch.Tensor:
        return problem.draw(network, x_t[None], t, 1, generator)[0]

    return {
        "exact posterior": (EXACT, exact),
        "Gaussian model\n(its optimum)": (GAUSSIAN, mean),
        "mixture\n(trained)": (MIXTURE, mixture),
    }


def ring(path: Path, updates: int = 3000) -> Path:
    """Plot a column for the noise and for every step, and one with draws of x_0 for a single x_t after the first step."""
    problem, generator = Problem("ring of 8", STEPS), torch.Generator().manual_seed(0)
    rows = denoisers(problem, updates, generator)
    noise = torch.randn(POINTS, 2, generator=generator)
    with styled():
        figure, axes = plt.subplots(len(rows), STEPS + 2, figsize=(2.1 * (STEPS + 2), 2.1 * len(rows)))
        for line, (name, (colour, draw)) in zip(axes, rows.items()):
            x = noise
            line[0].set_ylabel(name)
            scatter(line[0], x, colour)
            for column, t in enumerate(range(STEPS - 1, -1, -1), start=1):
                x = problem.step(x, draw(x, t), t, generator)
                scatter(line[column], x, colour)
            x_t = torch.tensor(BETWEEN_MODES).expand(DRAWS, 2)
            line[-1].plot(*problem.normalised.means.T, "o", mfc="none", mec=INK, ms=7, mew=0.8)
            line[-1].plot(*BETWEEN_MODES, "x", color=INK, ms=8, mew=2)
            scatter(line[-1], draw(x_t, STEPS - 2), colour, size=10)
        titles = ["noise", *(f"after step {step}" for step in range(1, STEPS + 1)), "clean x for the cross"]
        for axis, title in zip(axes[0], titles):
            axis.set_title(title, fontsize=11)
        for axis in axes.flat:
            axis.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal")
            axis.spines[:].set(visible=True, alpha=0.5)
        figure.tight_layout(pad=0.4)
        return save(figure, path)


def scatter(axis: plt.Axes, points: torch.Tensor, colour: str, size: float = 2.0) -> None:
    """Plot points as an image inside the SVG, because thousands of shapes would take a megabyte."""
    axis.scatter(*points.T, s=size, color=colour, linewidths=0, alpha=0.8, rasterized=True)
